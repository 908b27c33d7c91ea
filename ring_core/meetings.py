"""How an attempt ended: ranks report through the group's store, and one verdict holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from ring_core.agreement import decode, encode
from ring_core.errors import NonFiniteError, RankFailedError, RingError, RingTimeoutError
from ring_core.store import ask

Ending = Literal["done", "late", "raised", "nonfinite"]


@dataclass(frozen=True)
class Report:
    """What an attempt came to on one rank.

    Attributes:
        ending: ``late``: a transfer failed, which another attempt may mend. ``raised``: anything
            else that was raised here. ``nonfinite``: a check found numbers that are not finite.
        text: what happened, naming the operation.
    """

    ending: Ending
    text: str = ""


@dataclass(frozen=True)
class Verdict:
    """What all ranks do now: go on, try again, or raise one error.

    Attributes:
        text: what the ranks that failed reported. error: to raise; None: none.
        lost: whether ranks are gone, so that the group cannot be used any more.
    """

    again: bool
    text: str
    error: RingError | None
    lost: bool


class Meetings:
    """Of the ranks of a group, numbered alike on all of them.

    Args:
        store: the group's. name: of the group, for keys.
    """

    def __init__(self, store: Any, rank: int, world: int, name: str) -> None:
        self._store, self._rank, self._world, self._name = store, rank, world, name
        self._number = 0

    def meet(self, what: str, report: Report, seconds: float) -> Verdict:
        """Report, and wait for what holds for all ranks.

        Args:
            what: the operation, for messages; alike on all ranks.
            seconds: that this rank waits for the others' reports.

        Raises:
            RankFailedError: the store is gone, or cannot be reached.
        """
        self._number += 1
        try:
            return ask(lambda: self._meet(what, report, seconds), seconds)
        except RankFailedError as error:
            here = f"rank {self._rank} of {self._world}, {what}: {error}"
            raise RankFailedError("; ".join(filter(None, (here, report.text)))) from error

    def _meet(self, what: str, report: Report, seconds: float) -> Verdict:
        store, key = self._store, f"{self._name}/{self._number}"
        mine = json.dumps([what, report.ending, report.text])
        store.set(f"{key}/{self._rank}", mine)
        if store.add(f"{key}/count", 1) < self._world:
            try:
                store.wait([f"{key}/verdict"], timedelta(seconds=seconds))
            except RuntimeError:
                self._decide(key, seconds)
        else:
            self._decide(key, seconds)
            if self._number > 1:  # everybody has left the one before
                self._forget(f"{self._name}/{self._number - 1}")
        again, text, error, lost = json.loads(store.get(f"{key}/verdict"))
        return Verdict(again, text, None if error is None else decode(error), lost)

    def _decide(self, key: str, seconds: float) -> None:
        """The first verdict to be written holds."""
        keys = {rank: f"{key}/{rank}" for rank in range(self._world)}
        there = [rank for rank, one in keys.items() if self._store.check([one])]
        reports = {rank: json.loads(self._store.get(keys[rank])) for rank in there}
        verdict = json.dumps(_verdict(reports, self._world, seconds))
        self._store.compare_set(f"{key}/verdict", "", verdict)

    def _forget(self, key: str) -> None:
        for what in (*range(self._world), "count", "verdict"):
            self._store.delete_key(f"{key}/{what}")


def _verdict(
    reports: Mapping[int, Sequence[str]], world: int, seconds: float
) -> tuple[bool, str, str | None, bool]:
    what = next(iter(reports.values()))[0]
    missing = [rank for rank in range(world) if rank not in reports]
    told = {
        ending: "; ".join(text for _, how, text in reports.values() if how == ending)
        for ending in ("late", "raised", "nonfinite")
    }
    text = "; ".join(filter(None, told.values()))
    error: RingError | None = None
    operations = {one[0] for one in reports.values()}
    if len(operations) > 1:
        each = "; ".join(f"rank {rank}: {one[0]}" for rank, one in sorted(reports.items()))
        error = RankFailedError(
            f"the ranks of the group are at different operations ({each}): every rank must make "
            "the same calls, and the same backwards, in the same order"
        )
    elif missing:
        names = ", ".join(map(str, missing))
        error = RankFailedError(
            f"rank{'s' * (len(missing) > 1)} {names} of {world} did not come to the end of {what} "
            f"within {seconds:.3g} s after the others: dead, stopped, or slower than timeout "
            f"allows. {'What the others met: ' + text if text else 'Look at the log there.'}"
        )
    elif told["raised"]:
        error = RankFailedError(told["raised"])
    elif told["nonfinite"]:
        error = NonFiniteError(told["nonfinite"])
    elif told["late"]:
        return True, text, encode(RingTimeoutError(text)), False
    lost = bool(missing) or len(operations) > 1
    return False, text, None if error is None else encode(error), lost
