"""Which degree of Ulysses is predicted to be fastest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

from ring_attention_distributed.heads import Split, degrees
from ring_attention_distributed.mesh import ring_plan
from ring_core.plan import Plan
from ring_core.prediction.memory import Sizes
from ring_core.prediction.rates import Rates, read
from ring_core.prediction.timeline import Prediction, Where, predict
from ring_core.protocols import AttentionKernel

logger = logging.getLogger("ring_attention_distributed")


def with_exchange(
    plan: Plan,
    sizes: Sizes,
    rates: Rates,
    where: Where,
    kernels: Sequence[AttentionKernel],
    degree: int,
    *,
    quick: bool = False,
    near: bool = False,
) -> Prediction:
    """How long a call would take where ``degree`` ranks exchange heads.

    Args:
        plan: of a ring of all ranks. quick: whether to look at two ranks alone, at the end and in
            the middle: a call with new documents chooses anew, and must not take long. The rest:
            see :func:`ring_core.prediction.timeline.predict`.
    """
    split = Split.of(sizes.q_heads, sizes.kv_heads, degree)
    world, per_host = plan.world, where.per_host
    even = per_host % degree == 0
    within = replace(
        where,
        per_host=per_host // degree if even else 1,
        # Keys cross between hosts once, each by another rank, where a ring has two levels.
        relayed=per_host // degree if even and world % per_host == 0 else 1,
    )
    ring = ring_plan(plan, degree) if degree > 1 else plan
    found = predict(
        ring,
        replace(sizes, q_heads=max(map(len, split.q)), kv_heads=max(map(len, split.kv))),
        rates,
        within,
        kernels,
        ranks=sorted({ring.world // 2, ring.world - 1}) if quick else None,
        held=split.held(0) if degree > 1 else None,
        near=near,
    )
    if degree == 1:
        return found
    forward, backward = (
        replace(spent, exchange=moved, busy=spent.busy + busy)
        for spent, moved, busy in zip(
            (found.forward, found.backward),
            _exchange(plan, sizes, rates, where, degree),
            rates.exchange,
            strict=True,
        )
    )
    peak = found.peak_bytes + _copies(plan, sizes, degree)
    return replace(found, degree=degree, forward=forward, backward=backward, peak_bytes=peak)


def _exchange(
    plan: Plan, sizes: Sizes, rates: Rates, where: Where, degree: int
) -> tuple[float, float]:
    """Seconds for the heads of q, k, v and out; and for those again with all gradients."""
    assert rates.link is not None
    away = (degree - 1) / degree
    size = _copies(plan, sizes, degree)
    rate = rates.link.bytes_per_second
    if degree > where.per_host and where.between:
        rate = where.between
    # Rows are copied together before they travel, and apart behind.
    each = size * away / rate + 2 * 2 * size / rates.memory
    return each + 4 * rates.link.start, 2 * each + 8 * rates.link.start


def _copies(plan: Plan, sizes: Sizes, degree: int) -> int:
    """Bytes of the q, k, v and out that a rank sends; a head that several hold goes to each."""
    queries = plan.queries.size * sizes.q_heads * sizes.key_row
    keys = plan.keys.size * max(sizes.kv_heads, degree) * sizes.key_row
    return (queries + keys) * sizes.itemsize


def quickest(found: Sequence[Prediction]) -> int:
    """The degree that is predicted to be fastest; of equal ones the lower."""
    best = min(found, key=lambda one: one.total)
    _say(best.degree, tuple((one.degree, one.total) for one in found))
    return best.degree


def predictions(
    plan: Plan, sizes: Sizes, kernel: AttentionKernel, device_type: str, per_host: int
) -> tuple[Prediction, ...]:
    """Of every degree that the heads and ranks allow, ascending.

    By rates that come with the core, so that all ranks find the same.
    """
    return _predictions(plan, sizes, cast(Any, kernel), device_type, per_host)


@lru_cache(maxsize=256)
def _predictions(
    plan: Plan, sizes: Sizes, kernel: Any, device_type: str, per_host: int
) -> tuple[Prediction, ...]:
    return tuple(
        with_exchange(
            plan,
            sizes,
            _rates(device_type),
            Where(per_host, _BETWEEN if device_type == "cuda" else None),
            [kernel],
            degree,
            quick=True,
            near=True,
        )
        for degree in degrees(sizes.q_heads, sizes.kv_heads, plan.world)
    )


_BETWEEN = 4e10
"""Bytes a second between GPUs of two hosts: assumed, for an adapter of 400 Gbit/s for each."""


@lru_cache(maxsize=2)
def _rates(device_type: str) -> Rates:
    return read("h200" if device_type == "cuda" else "cpu")


@lru_cache(maxsize=256)
def _say(best: int, found: tuple[tuple[int, float], ...]) -> None:
    """Once for each kind of call."""
    listed = ", ".join(f"{seconds * 1e3:.3g} ms with {degree}" for degree, seconds in found)
    logger.info("ulysses=%d: predicted %s", best, listed)
