"""What a machine does in a second, as it was measured there, and the files that keep it."""

from __future__ import annotations

import os
from functools import cache
from importlib.resources import files
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ring_core.errors import InputError, did_you_mean

Both = tuple[float, float]
"""Of a forward, and of a backward."""
Points = tuple[tuple[float, float], ...]
"""Operations of a forward's matrix products, ascending, and seconds."""


class _Measured(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Curve(_Measured):
    """One kernel on tiles whose masks cost alike; see :meth:`ring_core.masks.Mask.cost`.

    Attributes:
        planned: the kinds of mask that plans had, before the kernel lowered their tiles.
        forward, backward: seconds a call, by the operations of its forward.
        host: seconds that a call keeps the processor of a GPU; 0 without one.
    """

    kernel: str
    mask: str
    planned: tuple[str, ...]
    dtype: str
    head_dim: int
    forward: Points = Field(min_length=1)
    backward: Points = Field(min_length=1)
    host: Both

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What a file holds one curve for."""
        return self.kernel, self.mask, self.dtype, self.head_dim

    def seconds(self, operations: float) -> Both:
        """Of a forward and of a backward with so many operations in the forward."""
        return _between(self.forward, operations), _between(self.backward, operations)


class Link(_Measured):
    """Transfers between the ranks of one machine.

    Attributes:
        shards: see :class:`ring_core.protocols.Communicator`.
        start: seconds until a transfer moves. bytes_per_second: one way.
        hidden: which part of a transfer costs no time where there is as much to compute: 1 if all.
    """

    communicator: str
    shards: float
    start: float
    bytes_per_second: float
    hidden: float


class Rates(_Measured):
    """What one machine does in a second.

    Attributes:
        device: its name. software: versions. date: of the measurement. source: how it was made.
        processes: that were at work at once, each on its GPU or its part of the cores.
        gpu: whether the processor runs ahead of what computes.
        memory: bytes read and written in a second, by each process.
        call: seconds of the processor in a call, beside its kernels'. tile: for each further tile
            of a round, whose rows are copied and put together. round: for each round of a ring,
            beside kernels and transfers. exchange: where ranks exchange heads.
        link: None where only one process was measured.
    """

    version: Literal[1] = 1
    device: str
    software: str
    date: str
    source: str
    processes: int
    gpu: bool
    memory: float
    call: Both
    round: Both
    tile: Both = (0.0, 0.0)
    exchange: Both = (0.0, 0.0)
    link: Link | None
    curves: tuple[Curve, ...]

    def curve(
        self, kernel: str, mask: str, dtype: str, head_dim: int, near: bool = False
    ) -> Curve | None:
        """The curve of a kernel, or of the same kernel and numbers under another mask, or None.

        Args:
            near: whether any other will do where there is none: the most similar one.
        """

        def differs(curve: Curve) -> tuple[bool, bool, float, bool]:
            far = abs(log(curve.head_dim / head_dim))
            return curve.kernel != kernel, curve.dtype != dtype, far, curve.mask != mask

        best = min(self.curves, key=differs)
        same = (best.kernel, best.dtype, best.head_dim) == (kernel, dtype, head_dim)
        return best if near or same else None

    def beside(self, other: Rates) -> Rates:
        """These, with what was measured for another attention where these have none."""
        known = {curve.key for curve in self.curves}
        more = [curve for curve in other.curves if curve.key not in known]
        curves = sorted((*self.curves, *more), key=lambda curve: curve.key)
        update: dict[str, Any] = {"curves": tuple(curves), "link": self.link or other.link}
        for name in ("tile", "exchange"):
            mine, theirs = getattr(self, name), getattr(other, name)
            update[name] = mine if any(mine) else theirs
        return self.model_copy(update=update)

    @property
    def packing(self) -> float:
        """Seconds to read and write a row once, so that it travels beside others that lie apart
        from it, over the seconds that it travels."""
        return 2 * self._link.bytes_per_second / self.memory

    @property
    def pairs_a_key(self) -> float:
        """Pairs of a query and a key that the fastest kernel computes while one key and its value
        travel, in 16 bits."""
        fastest = max(self.curves, key=lambda curve: curve.forward[-1][0] / curve.forward[-1][1])
        operations, seconds = fastest.forward[-1]
        pairs = operations / (4 * fastest.head_dim) / seconds
        return pairs * (2 * fastest.head_dim * 2) / self._link.bytes_per_second

    @property
    def _link(self) -> Link:
        if self.link is None:
            raise InputError(f"these rates of {self.device} know no link: one process was measured")
        return self.link

    def save(self, path: Path) -> None:
        """Write a file that :func:`read` reads."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n")


def _between(points: Points, operations: float) -> float:
    """Seconds on the straight line between the logarithms of two neighbours; what is smaller or
    larger than all is computed at the rate of the nearest."""
    if operations <= points[0][0]:
        return points[0][1] * operations / points[0][0]
    for (a, first), (b, last) in pairwise(points):
        if operations <= b:
            power = log(last / first) / log(b / a)
            return float(first * (operations / a) ** power)
    return points[-1][1] * operations / points[-1][0]


def default_file() -> Path:
    """Where rates are kept that were measured here."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "ring-attention", "rates.json")


def shipped() -> list[str]:
    """Names of the rates that come with the core."""
    folder = files(__package__)
    return sorted(Path(one.name).stem for one in folder.iterdir() if one.name.endswith(".json"))


@cache
def planned() -> Rates:
    """What plans are weighed by: rates that come with the core, so that all ranks weigh alike."""
    return read("h200")


def read(name: str) -> Rates:
    """Rates that come with the core, by name, or from a file.

    Raises:
        InputError: there is no such file, or it holds no rates.
    """
    names = shipped()
    path = files(__package__) / f"{name}.json" if name in names else Path(name)
    try:
        return Rates.model_validate_json(path.read_text())
    except OSError as error:
        raise InputError(
            f"rates {name}: {error.strerror or error}.{did_you_mean(name, names)} Rates that come "
            f"with the core: {', '.join(names) or 'none'}. 'ring-attention plan --calibrate "
            "--rates FILE' measures this machine's"
        ) from error
    except ValidationError as error:
        raise InputError(f"rates {name}: not a file of this version: {error}") from error
