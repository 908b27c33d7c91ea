"""Ranks compare what they are about to compute, once per kind of call, and fail alike.

Comparison goes through the group's store: no collective that a missing rank could block, nothing
unpickled, and a rank that never comes is known by name.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from ring_core import errors
from ring_core.errors import DisagreementError, RingError
from ring_core.groups import rank_and_world, store_of

_REMEMBERED = 65536
_COMPLETE = "complete"


class Signature:
    """What one call computes, field by field, and the digest that ranks compare."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.fields = dict(fields)
        self.digest = hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()


class Agreement:
    """One per process group; its checks are numbered alike on every rank."""

    def __init__(self, group: Any) -> None:
        self._store = store_of(group)
        self._rank, self._world = rank_and_world(group)
        self._checks = 0
        # Ranks add to it in lock-step, so the oldest one to go is the same everywhere.
        self._agreed: OrderedDict[str, None] = OrderedDict()

    def check(self, signature: Signature, timeout: float) -> None:
        """Return when every rank came with an equal ``signature``; known ones return at once.

        Raises:
            DisagreementError: some rank's differs, refused its input, or did not come within
                ``timeout`` seconds; the same message on every rank.
        """
        if signature.digest in self._agreed:
            return
        number, self._checks = self._checks, self._checks + 1
        self._post(number, {"digest": signature.digest, "fields": signature.fields})
        keys = [_key(number, rank) for rank in range(self._world)]
        missing: list[int] = []
        try:
            self._store.wait(keys, timedelta(seconds=timeout))
        except RuntimeError:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        # The first verdict to be written holds for all, so nobody goes on while another gives up.
        if missing:
            late = DisagreementError(
                f"{_ranks(missing)} did not reach, within {timeout:g} s, the call that the other "
                f"ranks of the group made: {_summary(signature)}. Every rank of the group must "
                "make the same calls in the same order."
            )
            verdict = self._decide(number, _encode(late))
        else:
            verdict = self._decide(number, _COMPLETE)
        if verdict != _COMPLETE:
            raise _decode(verdict)
        posts = [json.loads(self._store.get(key)) for key in keys]
        self._forget(number - 1)
        if message := _difference(posts):
            raise DisagreementError(message)
        self._agreed[signature.digest] = None
        if len(self._agreed) > _REMEMBERED:
            self._agreed.popitem(last=False)

    def refuse(self, message: str) -> None:
        """Tell the ranks that wait at the next check why this one will not come; does not wait."""
        number, self._checks = self._checks, self._checks + 1
        self._post(number, {"refused": message})

    def fail(self, error: RingError) -> RingError:
        """Agree on why the group failed in mid-call: the first error that any rank came with."""
        return _decode(self._decide(self._checks, _encode(error)))

    def _decide(self, number: int, verdict: str) -> str:
        return str(self._store.compare_set(_key(number, "verdict"), "", verdict).decode())

    def _post(self, number: int, content: Mapping[str, Any]) -> None:
        self._store.set(_key(number, self._rank), json.dumps(content))

    def _forget(self, number: int) -> None:
        """Delete this rank's entries of a check that every rank has left behind."""
        if number >= 0:
            self._store.delete_key(_key(number, self._rank))
            if self._rank == 0:
                self._store.delete_key(_key(number, "verdict"))


def _encode(error: RingError) -> str:
    return json.dumps([type(error).__name__, str(error)])


def _decode(verdict: str) -> RingError:
    kind, message = json.loads(verdict)
    error: RingError = getattr(errors, kind, RingError)(message)
    return error


def _key(number: int, what: int | str) -> str:
    return f"ring_attention/{number}/{what}"


def _difference(posts: Sequence[Mapping[str, Any]]) -> str | None:
    refused = [
        f"rank {rank} refused its input: {post['refused']}"
        for rank, post in enumerate(posts)
        if "refused" in post
    ]
    if refused:
        return "; ".join(refused)
    if len({post["digest"] for post in posts}) == 1:
        return None
    names = sorted({name for post in posts for name in post["fields"]})
    lines = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, post in enumerate(posts):
            ranks.setdefault(post["fields"].get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            values = "; ".join(f"{value} on {_ranks(who)}" for value, who in ranks.items())
            lines.append(f"  {name}: {values}")
    return "\n".join(
        [
            "the ranks of the group are about to compute different things:",
            *lines,
            "Give every rank the same config, plan, shapes and dtype.",
        ]
    )


def _summary(signature: Signature) -> str:
    shown = ("variant", "tokens", "dtype", "q", "k", "v")
    fields = signature.fields
    return ", ".join(f"{name} {fields[name]}" for name in shown if name in fields)


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks))
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"
