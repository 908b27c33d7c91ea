"""A rank's rounds gone through with a clock in place of kernels and transfers.

What the engine does, in its order: keys of the next round are on their way while this round's
tiles are computed, gradients go home while the next round's are. Nothing but time is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from ring_core.errors import InputError
from ring_core.plan import ForHeads, HeldHeads, Plan, Tile
from ring_core.prediction.memory import Sizes, peak_bytes
from ring_core.prediction.rates import Both, Curve, Rates
from ring_core.program import parted, read_once
from ring_core.protocols import AttentionKernel
from ring_core.rounds import Part, Round, Step, rounds

MANY = 8
"""Ranks of a larger group are not all looked at."""


@dataclass(frozen=True)
class Where:
    """How ranks reach each other.

    Attributes:
        per_host: ranks of a host. between: bytes a second between ranks of two hosts; None: as
            within one. relayed: how many ranks of a host fetch different parts of what all need.
        overlap: whether keys travel while others are computed.
    """

    per_host: int
    between: float | None = None
    relayed: int = 1
    overlap: bool = True


@dataclass(frozen=True)
class Spent:
    """Seconds of one direction on one rank.

    Attributes:
        kernels: computing tiles. merging: putting results together, copying rows. transfers: that
            computing does not hide. exchange: of heads.
        busy: of the processor beside that. ahead: whether it runs ahead of a GPU, and adds only
            what it takes longer.
    """

    kernels: float
    merging: float
    transfers: float
    busy: float
    ahead: bool
    exchange: float = 0.0

    @property
    def processor(self) -> float:
        """What the processor adds."""
        return max(0.0, self.busy - self._device) if self.ahead else self.busy

    @property
    def total(self) -> float:
        """All of it."""
        return self._device + self.processor

    @property
    def _device(self) -> float:
        return self.kernels + self.merging + self.transfers + self.exchange

    def parts(self) -> dict[str, float]:
        """What the total is the sum of, by name."""
        names = ("kernels", "merging", "transfers", "exchange", "processor")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Prediction:
    """What a call would take on the slowest rank.

    Attributes:
        kernel: which computes. degree: ranks that exchange heads. peak_bytes: held at most beyond
            inputs, in forward and backward.
        instead: masks without rates of their own, each with the one whose rates were taken.
    """

    kernel: str
    forward: Spent
    backward: Spent
    peak_bytes: int
    degree: int = 1
    instead: tuple[tuple[str, str], ...] = ()

    @property
    def total(self) -> float:
        """Seconds of forward and backward."""
        return self.forward.total + self.backward.total


def some_ranks(world: int, most: int) -> list[int]:
    """All ranks, or of very many the first two, the last two, and some spread between them."""
    if world <= most:
        return list(range(world))
    step = (world - 1) / (most - 3)
    spread = {round(i * step) for i in range(most - 2)}
    return sorted({1, world - 2, *spread})


def predict(
    plan: Plan,
    sizes: Sizes,
    rates: Rates,
    where: Where,
    kernels: Sequence[AttentionKernel],
    *,
    ranks: Sequence[int] | None = None,
    held: HeldHeads | None = None,
    near: bool = False,
) -> Prediction:
    """How long forward and backward of a call take on the slowest of some ranks.

    Args:
        plan: of the ranks that share one ring. kernels: by priority; the first one is taken whose
            rates are known for all tiles.
        ranks: None: a few of many. held: which heads those of ``sizes`` are, where the
            attention has more.
        near: whether rates of something similar do where those asked for are not known.

    Raises:
        InputError: no kernel's rates are known, or no link's.
    """
    if plan.chooses and not near:
        raise InputError("what is computed depends on the tensors: there is nothing to predict")
    if plan.world > 1 and rates.link is None:
        raise InputError(
            f"rates of {rates.device}, {rates.date}: measured by one process, which sends nothing; "
            "say what a link carries with --link GB/S, or measure with --calibrate on more"
        )
    plan = ForHeads.of(plan, sizes.kv_heads, held=held)
    missing: dict[str, list[str]] = {}
    for kernel in kernels:
        if not near and not any(
            (curve.kernel, curve.planned) == (kernel.name, kinds(plan)) for curve in rates.curves
        ):
            continue
        try:
            found = [
                _Replay(plan, rank, sizes, rates, where, kernel, near).prediction()
                for rank in ranks or some_ranks(plan.world, MANY)
            ]
        except _UnknownRateError as error:
            missing.setdefault(str(error), []).append(kernel.name)
            continue
        return Prediction(
            kernel.name,
            forward=max((one.forward for one in found), key=lambda spent: spent.total),
            backward=max((one.backward for one in found), key=lambda spent: spent.total),
            peak_bytes=max(one.peak_bytes for one in found),
            instead=tuple(sorted({pair for one in found for pair in one.instead})),
        )
    lacks = "; ".join(f"{', '.join(names)}: no rate of {what}" for what, names in missing.items())
    known = sorted({f"{c.kernel} of {c.mask}, {c.dtype} {c.head_dim}" for c in rates.curves})
    raise InputError(
        f"rates of {rates.device}, {rates.date}: {lacks or 'no kernel that could compute this'} "
        f"(known: {'; '.join(known)}). Run 'ring-attention plan --calibrate' there with the same "
        "fields, --dtype and --head-dim"
    )


def kinds(plan: Plan) -> tuple[str, ...]:
    """Names of the masks that a plan's tiles have."""
    return tuple(sorted(mask.__name__ for mask in plan.masks))


class _UnknownRateError(Exception):
    """Says what the rates lack."""


class _Replay:
    """One rank's rounds."""

    def __init__(
        self,
        plan: ForHeads,
        rank: int,
        sizes: Sizes,
        rates: Rates,
        where: Where,
        kernel: AttentionKernel,
        near: bool,
    ) -> None:
        self.sizes, self.rates, self.where, self.kernel = sizes, rates, where, kernel
        self.plan, self.rank, self.near = plan, rank, near
        one_host = plan.world <= where.per_host
        shards = rates.link.shards if rates.link and one_host else 1
        self.rounds = [
            replace(one, tiles=tuple(kernel.lower(parted(one.tiles, sizes.batch))))
            for one in rounds(self.plan, rank, shards, kernel.rounds)
        ]

    def prediction(self) -> Prediction:
        kernels, merging = zip(*(self._tiles(one) for one in self.rounds), strict=True)
        keys = [self._keys(one) for one in self.rounds]
        home = [self._home(one) for one in self.rounds]
        after = [*keys[1:], 0.0]
        forward = self._spent(0, kernels, merging, after)
        backward = self._spent(
            1, kernels, merging, [a + b for a, b in zip(after, [0.0, *home], strict=False)]
        )
        backward = replace(backward, transfers=backward.transfers + home[-1])
        peak = peak_bytes(
            self.plan, self.rounds, self.sizes, self.kernel.rounds, self.where.overlap
        )
        taken = {(mask, curve.mask) for mask, curve in map(self._curve, self._all)}
        instead = tuple((mask, other) for mask, other in taken if mask != other)
        return Prediction(self.kernel.name, forward, backward, peak, instead=instead)

    @property
    def _all(self) -> list[Tile]:
        return [tile for one in self.rounds for tile in one.tiles]

    def _spent(
        self,
        way: int,
        kernels: Sequence[Both],
        merging: Sequence[Both],
        moving: Sequence[float],
    ) -> Spent:
        """Of a direction; ``moving``: while each round is computed."""
        hidden = self.rates.link.hidden if self.rates.link and self.where.overlap else 0.0
        transfers = sum(
            moved - hidden * min(moved, a[way] + b[way])
            for a, b, moved in zip(kernels, merging, moving, strict=True)
        )
        further = sum(max(0, len(one.tiles) - 1) for one in self.rounds)
        busy = self.rates.call[way] + self.rates.tile[way] * further
        busy += self.rates.round[way] * (len(self.rounds) - 1)
        if self.rates.gpu:
            busy += sum(self._curve(tile)[1].host[way] for tile in self._all)
        return Spent(
            kernels=sum(one[way] for one in kernels),
            merging=sum(one[way] for one in merging),
            transfers=max(0.0, transfers),
            busy=busy,
            ahead=self.rates.gpu,
        )

    def _curve(self, tile: Tile) -> tuple[str, Curve]:
        """The name of a tile's mask, and its curve."""
        return _cost(tile)[0], self._costs(tile)[0]

    def _costs(self, tile: Tile) -> tuple[Curve, float]:
        """The curve of a tile, and the operations of its forward."""
        mask, pairs = _cost(tile)
        sizes = self.sizes
        curve = self.rates.curve(self.kernel.name, mask, sizes.dtype, sizes.head_dim, self.near)
        if curve is None:
            raise _UnknownRateError(f"mask {mask!r}, {sizes.dtype}, heads of {sizes.head_dim}")
        batch = sizes.batch if tile.batch is None else len(tile.batch)
        return curve, 2.0 * (sizes.head_dim + sizes.value_dim) * pairs * batch * self._heads(tile)

    def _heads(self, tile: Tile) -> float:
        """Query heads of a tile."""
        return tile.heads.count(self.sizes.kv_heads) * self.sizes.q_heads / self.sizes.kv_heads

    def _tiles(self, one: Round) -> tuple[Both, Both]:
        """Seconds of a round's kernels, and of what happens to their rows, both ways."""
        sizes, kernels, moved = self.sizes, [0.0, 0.0], [0.0, 0.0]
        for tile in one.tiles:
            curve, operations = self._costs(tile)
            for way, seconds in enumerate(curve.seconds(operations)):
                kernels[way] += seconds
            batch = sizes.batch if tile.batch is None else len(tile.batch)
            queries = len(tile.q) * batch * self._heads(tile)
            keys = len(tile.kv) * batch * tile.heads.count(sizes.kv_heads)
            # What a tile gives is read, and its rows' state read and written.
            given = sizes.itemsize if self.kernel.rounds else sizes.wide
            once = given + 2 * sizes.wide
            if one.index or len(one.tiles) > 1:
                moved[0] += queries * sizes.value_dim * once
                moved[1] += queries * sizes.head_dim * once
            if len(one.tiles) > 1:
                moved[1] += keys * (sizes.head_dim + sizes.value_dim) * once
            if not (tile.q.is_run and tile.kv.is_run):  # copied together, and apart
                both = queries * sizes.head_dim + keys * (sizes.head_dim + sizes.value_dim)
                moved[0] += 2 * sizes.itemsize * both
                moved[1] += 2 * sizes.itemsize * (both + queries * sizes.value_dim)
        for step in one.steps:  # others' gradients for our keys
            given = sizes.itemsize + 2 * sizes.wide
            moved[1] += self._elements(step.give) * sizes.key_row * given
        merging = tuple(x / self.rates.memory for x in moved)
        return (kernels[0], kernels[1]), (merging[0], merging[1])

    def _keys(self, one: Round) -> float:
        """Seconds until a round's keys are here."""
        return sum(
            self._moved(step, self._elements(step.parts) * self.sizes.itemsize)
            for step in one.steps
        )

    def _home(self, one: Round) -> float:
        """Seconds until a round's gradients are with their owners, and ours here."""
        total = 0.0
        for step in one.steps:
            rounded = self.kernel.rounds and read_once(one.tiles, step.parts)
            size = self.sizes.itemsize if rounded else self.sizes.wide
            most = max(self._elements(step.parts), self._elements(step.give))
            total += self._moved(step, most * size)
        return total

    def _moved(self, step: Step, size: float) -> float:
        """Seconds of one step's transfer: ``size`` bytes for each number of a row."""
        link = self.rates.link
        if not size or link is None or step.source == self.rank:
            return 0.0
        rate, per_host = link.bytes_per_second, self.where.per_host
        if step.source // per_host != self.rank // per_host and self.where.between:
            rate = self.where.between * self.where.relayed
        return link.start + size * self.sizes.key_row / rate

    def _elements(self, parts: Sequence[Part]) -> int:
        """(Row, KV head) pairs."""
        return sum(len(part.rows) * part.heads.count(self.sizes.kv_heads) for part in parts)


@lru_cache(maxsize=4096)
def _cost(tile: Tile) -> tuple[str, int]:
    """A tile's pairs that a kernel goes through, for one head and batch row."""
    name, pairs = tile.mask.cost(tile.q.count, tile.kv.count)
    return name, pairs * tile.q.repeat
