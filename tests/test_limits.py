"""Limits of coordinates say what masks do: on tiles of every rank, layout and order."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from ring_attention_blocksparse.kernels.cpu_blocks import CpuBlocks
from ring_attention_blocksparse.kernels.padded import Masks
from ring_attention_blocksparse.limits import Limits

from ring_core import registry
from ring_core.program import Program

LOCAL = {"kind": "local", "left": 9, "right": 4}
LENGTH = 3 * 8 * 5
FIELDS: dict[str, dict[str, Any]] = {
    "window": {"patterns": [LOCAL]},
    "causal window": {"patterns": [LOCAL], "causal": True, "window": (6, None)},
    "sink": {"patterns": [{"kind": "sink", "n": 7}]},
    "neighbourhood": {"patterns": [{"kind": "neighborhood", "radius": (1, 2, 0)}]},
    "causal in time": {
        "patterns": [{"kind": "neighborhood", "radius": 1, "causal_axes": [0]}],
        "causal": True,
    },
    "windows of cells": {
        "patterns": [{"kind": "window_blocks", "shape": (2, 3, 2), "shift": (1, 2, 0)}]
    },
}
NONE: dict[str, dict[str, Any]] = {
    "two patterns": {"patterns": [LOCAL, {"kind": "sink", "n": 1}]},
    "strides": {"patterns": [{"kind": "strided", "stride": 3}]},
    "prefix": {"patterns": [{"kind": "neighborhood", "radius": 1}], "grid": (8, 14), "prefix": 8},
}


def shown(limits: Limits) -> torch.Tensor | None:
    """What the packed fields show: bool [queries, keys]."""
    if (packed := limits.packed) is None:
        return None
    at, low, high = (x.long() for x in packed[:3])
    guards = packed.guards & 0xFFFFFFFF
    return (at - low[:, None]) & (high[:, None] - at) & guards == guards


def tiles(fields: dict[str, Any], world: int, documents: list[int]) -> Any:
    fields = {"grid": (3, 8, 5), "block_q": 8, "block_kv": 8, **fields}
    attention = registry.create("hilbert", **fields)
    plan = attention.make_plan(attention.plan(cu_seqlens=documents).sequences, world)
    for rank in range(world):
        for one in Program.build(plan, rank, CpuBlocks(), kv_heads=2).rounds:
            yield from one.tiles


@given(
    name=st.sampled_from(sorted(FIELDS)),
    world=st.sampled_from([1, 2, 3]),
    layout=st.sampled_from(["auto", "contiguous", "zigzag", "striped"]),
    order=st.sampled_from(["row", "hilbert", "tile"]),
    border=st.integers(0, LENGTH),
)
def test_limits_show_what_masks_do(name, world, layout, order, border):
    documents = sorted({0, border, LENGTH})
    fields = {**FIELDS[name], "layout": layout, "order": order}
    for tile in tiles(fields, world, documents):
        nq, nk = tile.q.count, tile.kv.count
        tables = tile.mask.tables(torch.device("cpu"))
        right = tile.mask.visible(range(nq), nk)[0, 0, 0]
        found = shown(tables.limits)
        assert found is not None
        if tables.q.total < nq or tables.kv.total < nk:
            continue  # rows in no piece have no limits
        assert torch.equal(found[:nq, :nk], right)
        packed = tables.limits.packed
        if packed.reach is not None:
            assert torch.equal(packed.low[:nq] + packed.reach, packed.high[:nq])
        if band := tables.limits.band:
            apart = torch.arange(nk) - torch.arange(nq)[:, None]
            assert torch.equal((band.low <= apart) & (apart <= band.high), right)


def test_reaches_are_found():
    """Borders cut no reach short: there are no keys behind them."""
    for name in ("neighbourhood", "windows of cells", "window"):
        for tile in tiles({**FIELDS[name], "order": "hilbert"}, 2, [0, LENGTH]):
            assert tile.mask.tables(torch.device("cpu")).limits.packed.reach is not None


def test_bands_are_found():
    """Where neighbours in the tile are neighbours in the sequence, windows go by distance."""
    for name in ("window", "causal window"):
        fields = {**FIELDS[name], "order": "row", "layout": "contiguous"}
        assert all(
            tile.mask.tables(torch.device("cpu")).limits.band for tile in tiles(fields, 3, [0, 120])
        )


@pytest.mark.parametrize("name", NONE)
def test_what_has_no_limits(name):
    for tile in tiles(NONE[name], 2, [0, LENGTH]):
        limits = tile.mask.tables(torch.device("cpu")).limits
        assert (limits.axes, limits.packed, limits.band) == (None, None, None)


def test_coordinates_that_do_not_fit():
    """More than 32 bits: kernels look at bits of pairs instead."""
    pattern = {"kind": "neighborhood", "grid": (2,) * 12, "radius": 1}
    fields = {"patterns": [pattern], "causal": True, "block_q": 128, "block_kv": 128}
    attention = registry.create("blocksparse", **fields)
    program = Program.build(attention.plan(2**12).plan, 0, CpuBlocks(), kv_heads=1)
    tables = program.rounds[0].tiles[0].mask.tables(torch.device("cpu"))
    assert len(tables.limits.axes) == 13
    assert tables.limits.packed is None
    assert isinstance(tables.padded[0].shown, Masks)
