"""Which degree of Ulysses is predicted to be fastest."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from ring_attention_distributed.heads import Split, degrees
from ring_core.plan import Plan
from ring_core.rank_plan import RankPlan
from ring_core.rounds import elements_fetched

logger = logging.getLogger("ring_attention_distributed")

_BACKWARD = 2.5
"""Operations of a flash backward over those of its forward."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        operations: of an attention kernel, by a number's bytes. link: bytes between two ranks of a
            host, one way; between: of two hosts. memory: bytes read or written.
        start: seconds until a transfer moves.
    """

    operations: tuple[tuple[int, float], ...]
    link: float
    between: float
    memory: float
    start: float

    def kernel(self, itemsize: int) -> float:
        """Operations a second for numbers of that size."""
        return dict(self.operations)[itemsize]


GPU = Rates(((2, 5.5e14), (4, 5e13), (8, 3e13)), 3.5e11, 4e10, 3.5e12, 3e-5)
"""About an H200 with NVLink."""
CPU = Rates(((2, 3e10), (4, 3e10), (8, 1.5e10)), 1e9, 1e9, 5e9, 2e-4)
"""About one core of a server, and gloo over its loopback."""


@dataclass(frozen=True)
class Sizes:
    """Of a call: heads, head sizes, batch rows, and bytes of a number."""

    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    batch: int
    itemsize: int


@dataclass(frozen=True)
class Prediction:
    """Seconds of a layer's forward and backward on the busiest rank.

    Attributes:
        compute: of the kernels. merge: of adding up what they gave. exchange: of heads. ring: of
            transfers of keys that the kernels do not hide.
    """

    degree: int
    compute: float
    merge: float
    exchange: float
    ring: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.merge + self.exchange + self.ring


@lru_cache(maxsize=256)
def predict(plan: Plan, sizes: Sizes, degree: int, rates: Rates, per_host: int) -> Prediction:
    """What a layer would take where ``degree`` ranks exchange heads.

    Args:
        plan: of a ring of all ranks. per_host: how many of them a host has.
    """
    world, ring = plan.world, plan.world // degree
    queries, keys = (layout.size * sizes.batch for layout in (plan.queries, plan.keys))
    both = sizes.head_dim + sizes.value_dim
    spread = world > per_host
    pairs = (
        float(_busiest(plan, sizes.batch))
        * Split.of(sizes.q_heads, sizes.kv_heads, degree).imbalance
    )
    compute = 2 * both * pairs * sizes.q_heads * (1 + _BACKWARD) / rates.kernel(sizes.itemsize)
    # Results in the accumulation dtype are read, added to and written, forward and backward.
    merge = (ring - 1) * queries * sizes.q_heads * both * 12 / rates.memory

    copies = max(sizes.kv_heads, degree)  # a head that several ranks hold goes to each
    numbers = queries * sizes.q_heads * (3 * sizes.head_dim + 3 * sizes.value_dim)
    numbers += keys * copies * 3 * both
    exchanged = numbers * sizes.itemsize * (degree - 1) / degree
    near = rates.between if degree > per_host else rates.link
    exchange = exchanged / near + (7 * rates.start if degree > 1 else 0.0)
    exchange += 2 * exchanged / rates.memory  # rows are copied together and apart

    rows = min(_fetched(plan, sizes.kv_heads), (ring - 1) * degree * plan.keys.size) * sizes.batch
    heads = -(-sizes.kv_heads // degree)
    moved = 3 * rows * heads * both * sizes.itemsize
    wire = moved / rates.link
    if spread:  # of what comes from other hosts, a rank fetches its number's part where it can
        away = (world - per_host) / world
        once = max(1, per_host // degree) if per_host % degree == 0 else 1
        wire = max(moved * (1 - away) / rates.link, moved * away / once / rates.between)
    wire += 3 * (ring - 1) * rates.start
    exposed = max(0.0, wire - compute * (ring - 1) / ring)
    return Prediction(degree, compute, merge, exchange, exposed)


def predictions(plan: RankPlan, q: Tensor, k: Tensor, v: Tensor, per_host: int) -> list[Prediction]:
    """Of every degree that the heads and ranks allow, ascending."""
    sizes = Sizes(q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.shape[0], q.element_size())
    rates = GPU if q.device.type == "cuda" else CPU
    return [
        predict(plan.plan, sizes, degree, rates, per_host)
        for degree in degrees(sizes.q_heads, sizes.kv_heads, plan.world)
    ]


def quickest(plan: RankPlan, q: Tensor, k: Tensor, v: Tensor, per_host: int) -> int:
    """The degree that is predicted to be fastest; of equal ones the lower."""
    found = predictions(plan, q, k, v, per_host)
    best = min(found, key=lambda one: one.total)
    _say(best, tuple(found))
    return best.degree


@lru_cache(maxsize=256)
def _say(best: Prediction, found: tuple[Prediction, ...]) -> None:
    """Once for each kind of call."""
    listed = ", ".join(f"{one.total * 1e3:.3g} ms with {one.degree}" for one in found)
    logger.info("ulysses=%d: predicted %s", best.degree, listed)


@lru_cache(maxsize=256)
def _busiest(plan: Plan, batch: int) -> float:
    """Visible pairs of the busiest rank: the mean over heads."""
    return max(float(plan.work(rank, batch)) for rank in _some(plan.world))


@lru_cache(maxsize=256)
def _fetched(plan: Plan, kv_heads: int) -> float:
    """Key rows that a rank of a ring of all ranks fetches: the mean over heads."""
    return max(elements_fetched(plan, rank, kv_heads) for rank in _some(plan.world)) / kv_heads


def _some(world: int) -> list[int]:
    """All ranks, or a few of very many: alike on all of them."""
    return list(range(world)) if world <= 8 else sorted({0, world // 2, world - 1})
