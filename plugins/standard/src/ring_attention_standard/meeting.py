"""Let the ranks of any group meet for symmetric memory, whatever other groups did before."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import _SymmetricMemory

from ring_core.groups import rank_and_world, store_of

_NUMBERED = re.compile(r"(?P<what>.*)/(?P<number>\d+)/(?P<rank>\d+)")


def prepare(group: Any) -> None:
    """Have torch's rendezvous in ``group`` use a store that counts by group.

    torch (2.11 at least) numbers its exchanges by process, not by group: ranks that made unequally
    many in other groups would wait for each other's for ever.
    """
    rank, world = rank_and_world(group)
    store = dist.PrefixStore("ring_attention/symmetric", store_of(group))
    with suppress(RuntimeError):  # somebody else's rendezvous came first in this group
        _SymmetricMemory.set_group_info(group.group_name, rank, world, _CountedByGroup(store))


class _CountedByGroup(dist.Store):
    """A store in whose keys ``what/number/rank`` numbers are 0, 1, ... by first use here."""

    def __init__(self, inner: dist.Store) -> None:
        super().__init__()
        self._inner = inner
        self._numbers: dict[tuple[str, str], int] = {}

    def _key(self, key: str) -> str:
        found = _NUMBERED.fullmatch(key)
        if not found:
            return key
        what, number = found["what"], found["number"]
        used = sum(1 for other, _ in self._numbers if other == what)
        return f"{what}/{self._numbers.setdefault((what, number), used)}/{found['rank']}"

    def set(self, key: str, value: Any) -> None:
        self._inner.set(self._key(key), value)

    def get(self, key: str) -> bytes:
        return self._inner.get(self._key(key))

    def add(self, key: str, value: int) -> int:
        return self._inner.add(self._key(key), value)

    def check(self, keys: Sequence[str]) -> bool:
        return self._inner.check([self._key(key) for key in keys])

    def wait(self, keys: Sequence[str], *timeout: Any) -> None:
        self._inner.wait([self._key(key) for key in keys], *timeout)

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return self._inner.multi_get([self._key(key) for key in keys])

    def has_extended_api(self) -> bool:
        return self._inner.has_extended_api()
