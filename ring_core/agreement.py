"""Ranks compare what they are about to compute, once per kind of call, and fail alike.

Comparison goes through the group's store: no collective that a missing rank could block, nothing
unpickled, and a rank that never comes is known by name. Calls are numbered: ranks that make the
same calls count alike, so a comparison, a refusal and a failure each belong to one call.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from ring_core import errors
from ring_core.errors import DisagreementError, RankFailedError, RingError, RingTimeoutError
from ring_core.groups import rank_and_world
from ring_core.store import ask, store_of, turn

T = TypeVar("T")

_REMEMBERED = 65536
_COMPLETE = "complete"
_SECONDS_TO_EXPLAIN = 1.0


class Signature:
    """What one call computes, field by field, and the digest that ranks compare."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        self.fields = dict(fields)
        self.digest = hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()


class Agreement:
    """One per process group. Every call takes a number; the first of its kind is compared."""

    def __init__(self, group: Any) -> None:
        self._store = store_of(group)
        self._rank, self._world = rank_and_world(group)
        self._calls = 0
        self._ran = 0
        self._dead: str | None = None
        # Ranks add to it in lock-step, so the oldest one to go is the same everywhere.
        self._agreed: OrderedDict[str, None] = OrderedDict()
        self._prefix = f"ring_attention/calls/{turn(group, 'calls')}"
        self._last_check: int | None = None

    def next_call(self) -> int:
        """The number of the call that begins.

        Raises:
            RingError: the group failed in an earlier call; that call's error.
        """
        if self._dead is not None:
            raise decode(self._dead)
        self._calls += 1
        return self._calls

    def check(self, call: int, signature: Signature, timeout: float) -> None:
        """Return when every rank came to ``call`` with an equal signature; known ones at once.

        Raises:
            DisagreementError: some rank's differs, refused its input, or did not come within
                ``timeout`` seconds; the same message on every rank.
            RankFailedError: the store through which ranks compare is gone, or out of reach.
        """
        if signature.digest in self._agreed:
            self._ran += 1
            return
        self._ask(lambda: self._compare(call, signature, timeout), timeout + _SECONDS_TO_EXPLAIN)
        self._ran += 1
        self._agreed[signature.digest] = None
        if len(self._agreed) > _REMEMBERED:
            self._agreed.popitem(last=False)

    def _ask(self, question: Callable[[], T], seconds: float = 0.0) -> T:
        """The group cannot be used any more without its store."""
        try:
            return ask(question, seconds)
        except RankFailedError as error:
            self._dead = encode(error)
            raise

    def _compare(self, call: int, signature: Signature, timeout: float) -> None:
        self._raise_if_dead(0)
        self._post(call, signature)
        keys = [self._key(call, rank) for rank in range(self._world)]
        missing: list[int] = []
        try:
            self._store.wait(keys, timedelta(seconds=timeout))
        except RuntimeError:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
        if missing:  # perhaps because they gave up in an earlier call, and are just saying so
            self._raise_if_dead(_SECONDS_TO_EXPLAIN)
        # The first verdict to be written holds for all, so nobody goes on while another gives up.
        verdict = _COMPLETE
        if missing:
            verdict = encode(
                DisagreementError(
                    f"{_ranks(missing)} did not reach, within {timeout:g} s, the call that the "
                    f"other ranks of the group made: {_summary(signature)}. Every rank of the "
                    "group must make the same calls in the same order."
                )
            )
        verdict = self._decide(self._key(call, "verdict"), verdict)
        if verdict != _COMPLETE:
            raise decode(verdict)
        posts = {rank: json.loads(self._store.get(key)) for rank, key in enumerate(keys)}
        self._forget(call)
        if message := _difference(posts) or _out_of_step(posts):
            self._agreed.clear()  # a rank that refused compares every call again, as all must then
            raise DisagreementError(message)

    def refuse(self, call: int, message: str) -> None:
        """Tell the ranks of ``call`` why this one will not come; does not wait.

        From here on this rank compares every call again: a peer that is already computing must not
        meet a later call of this one.
        """
        self._agreed.clear()
        with suppress(RankFailedError):  # then nobody comes to a later call either
            self._ask(lambda: self._set(call, {"refused": message}))
            self._ask(lambda: self._store.set(self._key(call, f"late/{self._rank}"), ""))

    def explain(self, call: int, signature: Signature, error: Exception) -> RingError | None:
        """What to raise on this rank when ``error`` came in mid-call; None: the error itself.

        A late peer becomes the one error that every rank of the group raises, and ends the group:
        the call's verdict or refusal, another rank's own failure in this call, ranks that turn out
        to compute different things, or else the first timeout that any rank had, with the ranks
        of which nothing was heard since.
        """
        try:
            return self._ask(lambda: self._explain(call, signature, error), _SECONDS_TO_EXPLAIN)
        except RankFailedError as lost:
            return RankFailedError(f"{error}; moreover {lost}")

    def _explain(self, call: int, signature: Signature, error: Exception) -> RingError | None:
        if not isinstance(error, RingTimeoutError):
            told = RingTimeoutError(
                f"rank {self._rank} failed in the middle of a call with {type(error).__name__}: "
                f"{error}"
            )
            # This rank's transfers are out of step with the others' from here on.
            self._dead = self._decide(self._key(call, "failed"), encode(told))
            return None
        agreed = self._why(call, signature, error)
        self._dead = self._decide(f"{self._prefix}/dead", agreed)
        return decode(self._dead)

    def end(self, call: int, error: RingError) -> RingError:
        """The group cannot be used after ``call``: every later one raises at once what this gives,
        the same on all ranks: ``error``, or that a rank had refused its input.
        """
        return self._ask(lambda: self._end(call, error))

    def _end(self, call: int, error: RingError) -> RingError:
        keys = {rank: self._key(call, rank) for rank in range(self._world)}
        if message := _refusals(self._posted(keys)):
            error = DisagreementError(message)
        self._dead = self._decide(f"{self._prefix}/dead", encode(error))
        return decode(self._dead)

    def _raise_if_dead(self, seconds: float) -> None:
        """Raise what the group failed with, if it did or does so within ``seconds``."""
        key = f"{self._prefix}/dead"
        if seconds and not self._store.check([key]):
            with suppress(RuntimeError):
                self._store.wait([key], timedelta(seconds=seconds))
        if self._store.check([key]):
            self._dead = str(self._store.get(key).decode())
            raise decode(self._dead)

    def _why(self, call: int, signature: Signature, error: RingTimeoutError) -> str:
        for what in ("verdict", "failed"):
            key = self._key(call, what)
            if self._store.check([key]):
                verdict = str(self._store.get(key).decode())
                if verdict != _COMPLETE:
                    return verdict
        if self._store.check([f"{self._prefix}/dead"]):
            return encode(error)
        self._post(call, signature)
        late = [self._key(call, f"late/{rank}") for rank in range(self._world)]
        self._store.set(late[self._rank], "")
        with suppress(RuntimeError):
            self._store.wait(late, timedelta(seconds=_SECONDS_TO_EXPLAIN))
        keys = {rank: self._key(call, rank) for rank in range(self._world)}
        if message := _difference(self._posted(keys)):
            return encode(DisagreementError(message))
        silent = [rank for rank, key in enumerate(late) if not self._store.check([key])]
        if silent:
            error = RingTimeoutError(
                f"{error} Nothing was heard of {_ranks(silent)} within "
                f"{_SECONDS_TO_EXPLAIN:g} s more: dead, stopped, still waiting for others, or done "
                "with this call."
            )
        return encode(error)

    def _posted(self, keys: Mapping[int, str]) -> dict[int, Any]:
        """What ranks have posted so far, by rank."""
        there = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return {rank: json.loads(self._store.get(key)) for rank, key in there.items()}

    def _post(self, call: int, signature: Signature) -> None:
        fields = {"digest": signature.digest, "fields": signature.fields, "ran": self._ran}
        self._set(call, fields)

    def _set(self, call: int, content: Mapping[str, Any]) -> None:
        self._store.set(self._key(call, self._rank), json.dumps(content))

    def _decide(self, key: str, verdict: str) -> str:
        return str(self._store.compare_set(key, "", verdict).decode())

    def _forget(self, call: int) -> None:
        """Delete this rank's entries of the check before, which every rank has left behind."""
        if self._last_check is not None:
            self._store.delete_key(self._key(self._last_check, self._rank))
            if self._rank == 0:
                self._store.delete_key(self._key(self._last_check, "verdict"))
        self._last_check = call

    def _key(self, call: int, what: int | str) -> str:
        return f"{self._prefix}/{call}/{what}"


_agreements: WeakKeyDictionary[Any, Agreement] = WeakKeyDictionary()


def agreement_of(group: Any) -> Agreement:
    """The agreement of a group, shared by all its attentions."""
    if group not in _agreements:
        _agreements[group] = Agreement(group)
    return _agreements[group]


def tag(call: int, direction: str, signature: Signature) -> int:
    """A message tag by which transfers of different calls never meet, nor a user's own (tag 0)."""
    return zlib.crc32(f"{call}/{direction}/{signature.digest}".encode()) & 0x3FFFFFFF | 0x40000000


def encode(error: RingError) -> str:
    """An error as text that :func:`decode` makes an equal one of, on any rank."""
    return json.dumps([type(error).__name__, str(error)])


def decode(verdict: str) -> RingError:
    """The error of a text of :func:`encode`."""
    kind, message = json.loads(verdict)
    error: RingError = getattr(errors, kind, RingError)(message)
    return error


def _difference(posts: Mapping[int, Mapping[str, Any]]) -> str | None:
    if refused := _refusals(posts):
        return refused
    if len({post["digest"] for post in posts.values()}) <= 1:
        return None
    names = sorted({name for post in posts.values() for name in post["fields"]})
    lines = []
    for name in names:
        ranks: dict[str, list[int]] = {}
        for rank, post in posts.items():
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


def _refusals(posts: Mapping[int, Mapping[str, Any]]) -> str | None:
    refused = [
        f"rank {rank} refused its input: {post['refused']}"
        for rank, post in posts.items()
        if "refused" in post
    ]
    return "; ".join(refused) or None


def _out_of_step(posts: Mapping[int, Mapping[str, Any]]) -> str | None:
    """A rank that refused a call which others made would meet it in a later one of its own."""
    ran = {rank: post["ran"] for rank, post in posts.items()}
    if len(set(ran.values())) == 1:
        return None
    return (
        f"the ranks of the group made unequally many calls before this one: {ran} by rank. One of "
        "them refused its input while others went on; make a new group, and look at its error"
    )


def _summary(signature: Signature) -> str:
    shown = ("operation", "shape", "variant", "tokens", "dtype", "q", "k", "v")
    fields = signature.fields
    return ", ".join(f"{name} {fields[name]}" for name in shown if name in fields)


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks))
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"
