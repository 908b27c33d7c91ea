"""Kernels: every band, cut into what each computes directly, against the definition."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ring_attention_standard.kernels.bands import cut, is_mirrored_causal
from ring_attention_standard.kernels.cpu_flash import CpuFlash, _direct
from ring_attention_standard.kernels.cuda_flash import CudaFlash
from ring_attention_standard.kernels.cudnn import Cudnn
from ring_attention_standard.kernels.eager import Eager
from ring_attention_standard.kernels.flash4 import Flash4
from ring_attention_standard.kernels.varlen import ends_of, joined

from ring_core import reference, registry
from ring_core.dropout import Dropout
from ring_core.errors import ConfigError, InputError, KernelError
from ring_core.masks import CAUSAL, FULL, Band, Diagonal, trim
from ring_core.plan import Heads, Rows, Tile
from ring_core.softmax import RingAttentionState

bounds = st.one_of(st.none(), st.integers(-700, 700))


def _tile(nq, nk, lo, hi):
    trimmed = trim(nq, nk, Band(lo, hi))
    if trimmed is None:
        return None
    q, k, band = trimmed
    return Tile(Rows(0, len(q)), Rows(0, len(k)), band)


@given(st.integers(1, 700), st.integers(1, 700), bounds, bounds)
def test_pieces_are_the_tile(nq, nk, lo, hi):
    """Each visible pair in exactly one piece, each piece what the kernel computes directly."""
    tile = _tile(nq, nk, lo, hi)
    if tile is None:
        return
    times = torch.zeros(tile.q.count, tile.kv.count, dtype=torch.int32)
    for piece in cut(tile, _direct, 256):
        seen = piece.mask.visible(range(piece.q.count), piece.kv.count)
        assert _direct(piece.q.count, piece.kv.count, piece.mask)
        assert seen.any(1).all()
        rows = slice(piece.q.start, piece.q.start + piece.q.count)
        times[rows, piece.kv.start : piece.kv.start + piece.kv.count] += seen.int()
    assert torch.equal(times, tile.mask.visible(range(tile.q.count), tile.kv.count).int())


@pytest.mark.parametrize("nk", [5, 9, 14])
def test_mirrored_causal_is_the_left_edge_of_a_window(nk):
    band = Band(nk - 9, None)
    assert is_mirrored_causal(9, nk, band)
    assert torch.equal(band.visible(range(9), nk).flip(0, 1), CAUSAL.visible(range(9), nk))


BANDS = [
    FULL,
    CAUSAL,
    Band(None, 5),
    Band(-4, None),
    Band(-3, 6),
    Band(0, 0),
    Band(-600, -20),
    Band(None, -7),
]
_GPU = pytest.mark.gpu
KERNELS = [
    pytest.param(CpuFlash(), "cpu", id="cpu_flash"),
    pytest.param(Eager(), "cpu", id="reference"),
    pytest.param(Eager(), "cuda", id="reference-cuda", marks=_GPU),
    pytest.param(CudaFlash(), "cuda", id="flash", marks=_GPU),
    pytest.param(Cudnn(), "cuda", id="cudnn", marks=_GPU),
    pytest.param(Flash4(), "cuda", id="flash4", marks=_GPU),
]


@pytest.mark.parametrize(("kernel", "device"), KERNELS)
@pytest.mark.parametrize(
    ("nq", "nk"), [(37, 37), (20, 53), (53, 20), (600, 700), (700, 600), (1, 1)]
)
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_kernel_equals_the_reference(kernel, device, band, nq, nk):
    """Out, lse and gradients of one tile, grouped heads and Dv != D, merged from its pieces."""
    _compare(kernel, device, band, nq, nk, 16, 24)


@pytest.mark.parametrize(("kernel", "device"), KERNELS)
@pytest.mark.parametrize("sizes", [(8, 8), (64, 64), (64, 65), (72, 72), (96, 80), (128, 128)])
@pytest.mark.parametrize("band", [FULL, CAUSAL], ids=str)
def test_head_sizes(kernel, device, band, sizes):
    """A gradient through lse asks for one more column than the values have."""
    _compare(kernel, device, band, 300, 300, *sizes)


@given(st.lists(st.tuples(*[st.integers(0, 40)] * 4, bounds, bounds), max_size=12), st.booleans())
def test_joined_tiles_are_the_tiles(sizes, one_kind):
    """Each pair as often as before; and the ends of a call's sequences are its pieces."""
    tiles = []
    for start, nq, first, nk, lo, hi in sizes:
        tile = _tile(nq, nk, lo, hi)
        if tile is not None:
            q = Rows(start + tile.q.start, tile.q.count)
            tiles.append(Tile(q, Rows(first + tile.kv.start, tile.kv.count), tile.mask))
    found = joined(tiles, lambda nq, nk, band: "all" if one_kind else str(band))
    assert torch.equal(_times(found), _times(tiles))
    for tile in found:
        if isinstance(tile.mask, Diagonal):
            ends = ends_of(tile.mask, tile.q.count, tile.kv.count, torch.device("cpu"))
            runs = [[range(a, b) for a, b in pairwise(x.tolist())] for x in (ends.q, ends.kv)]
            both = [(q, kv) for q, kv in zip(*runs, strict=True) if q and kv]
            assert both == [(q, kv) for q, kv, _ in tile.mask.pieces]
            assert int(ends.q[-1]) == tile.q.count
            assert int(ends.kv[-1]) == tile.kv.count
            assert ends.longest_q == max(map(len, runs[0]))
            assert ends.some_see_nothing == (sum(len(q) for q, _ in both) < tile.q.count)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 30), st.integers(0, 3), st.integers(0, 14), st.integers(1, 3), bounds
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_joined_tiles_of_strided_rows_are_the_tiles(sizes, fetched):
    """Of some heads or, with slanted rows, of all: each pair of each head as often as before."""
    tiles = []
    for start, phase, count, rate, lo in sizes:
        tile = _tile(count, count, lo, 0)
        if tile is None:
            continue
        heads = Heads(0, rate, rate) if phase >= rate else Heads(phase, rate)
        slant = int(heads.phases > 1)
        q, kv = (
            Rows(start + rate * rows.start, rows.count, rate, slant=slant)
            for rows in (tile.q, tile.kv)
        )
        if fetched:  # what arrives are neighbours, for all phases the same
            kv = Rows(start + tile.kv.start, tile.kv.count)
        tiles.append(Tile(q, kv, tile.mask, heads))
    found = joined(tiles, lambda nq, nk, band: "all")
    assert len(found) <= len(tiles)
    assert torch.equal(_times_by_head(found), _times_by_head(tiles))


def _times_by_head(tiles, heads=6):
    times = torch.zeros(heads, 80, 80, dtype=torch.int32)
    for tile in tiles:
        seen = tile.mask.visible(range(tile.q.count), tile.kv.count).int()
        for number, head in enumerate(tile.heads.indices(heads)):
            phase = number % tile.heads.phases
            q, kv = (
                torch.tensor(rows.indices()) + phase * rows.slant for rows in (tile.q, tile.kv)
            )
            times[head].index_put_((q[:, None], kv[None]), seen, accumulate=True)
    return times


def _times(tiles):
    times = torch.zeros(80, 80, dtype=torch.int32)
    for tile in tiles:
        seen = tile.mask.visible(range(tile.q.count), tile.kv.count)
        assert int(seen.sum()) == tile.pairs
        assert torch.equal(tile.mask.visible(range(1, tile.q.count, 3), tile.kv.count), seen[1::3])
        times[_slice(tile.q), _slice(tile.kv)] += seen.int()
    return times


DIAGONALS = {
    "packed": ((0, 300, 0, 300, 0), (300, 1, 300, 1, None), (301, 500, 301, 500, 0)),
    "short": ((0, 3, 0, 5, 2), (3, 60, 5, 70, 10), (70, 9, 80, 9, 0)),
    "single rows": ((0, 1, 0, 1, None), (1, 1, 70, 1, None), (2, 1, 71, 80, None)),
    "gaps": ((100, 300, 64, 300, 0), (500, 130, 500, 700, 570), (1000, 70, 1300, 77, 7)),
    "rectangles": ((40, 300, 0, 300, None), (500, 130, 300, 700, None), (800, 500, 1300, 77, None)),
}


@pytest.mark.parametrize(("kernel", "device"), KERNELS)
@pytest.mark.parametrize("name", DIAGONALS)
def test_several_tiles_in_one_call(kernel, device, name):
    """Under a diagonal, as one call where the kernel makes that of it; rows between see nothing."""
    tiles = [
        Tile(Rows(q, nq), Rows(kv, nk), Band(None, hi)) for q, nq, kv, nk, hi in DIAGONALS[name]
    ]
    # Fewer batch rows than pieces, and more, which is all one to kernels that join nothing.
    for batch in (2, 4) if device == "cuda" else (1,):
        _compare_tiles(kernel, device, tiles, 64, 64, batch)
    if kernel.name in ("flash", "flash4", "cudnn") and name in ("gaps", "rectangles"):
        assert len(kernel.lower(tiles)) == 1


@pytest.mark.parametrize(
    ("sizes", "ragged"),
    [
        ({"seq_len": 32}, False),
        ({"cu_seqlens": [0, 16, 32]}, False),
        ({"cu_seqlens": [0, 15, 32]}, True),
        ({"seq_len": 32, "lengths": [32, 7]}, True),
    ],
)
def test_auto_leaves_new_lengths_to_kernels_that_need_not_plan_them(monkeypatch, sizes, ragged):
    monkeypatch.setattr(CudaFlash, "refuse", lambda self, problem: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    q = torch.randn(1, 32, 2, 64, dtype=torch.bfloat16)
    for named in ("auto", "cudnn"):
        attention = registry.create("standard", causal=True, kernel=named)
        asked = attention.runtime.problem(q, 64, attention.plan(**sizes), dropout=False)
        assert asked.ragged == (ragged and named == "auto")
        refusal = Cudnn().refuse(asked)
        assert (refusal is not None and "each new length" in refusal) == asked.ragged


def test_cudnn_leaves_short_documents_to_flash():
    """Many a call, where that saves calls; the long ones, and one alone, it computes itself."""
    ends = [0, *range(5000, 5000 + 40 * 130, 130)]
    tiles = [Tile(Rows(a, b - a), Rows(a, b - a), CAUSAL) for a, b in pairwise(ends)]
    long, short = Cudnn().lower(tiles)
    assert long == tiles[0]
    assert [len(q) for q, _, _ in short.mask.pieces] == 39 * [130]
    assert list(Cudnn().lower(tiles[:2])) == tiles[:2]


def _compare(kernel, device, band, nq, nk, head_dim, value_dim):
    tile = _tile(nq, nk, band.lo, band.hi)
    if tile is not None:
        batch = 1 if device == "cpu" and nq > 100 else 2
        _compare_tiles(kernel, device, [tile], head_dim, value_dim, batch)


def _compare_tiles(kernel, device, tiles, head_dim, value_dim, batch):
    if kernel.name == "flash4":
        pytest.importorskip("flash_attn.cute")
    exact = kernel.name in ("cpu_flash", "reference")
    dtype = torch.float64 if exact else torch.bfloat16
    (q, k, v, dout), right, right_lse, gradients = _defined(
        tuple(tiles), head_dim, value_dim, batch, dtype
    )
    nq = q.shape[1]

    q, k, v, dout = (x.to(device) for x in (q, k, v, dout))
    state = RingAttentionState()
    pieces = kernel.lower(tiles)
    for piece in pieces:
        rows, keys = _slice(piece.q), _slice(piece.kv)
        out, lse = kernel.forward(
            q[:, rows], k[:, keys], v[:, keys], piece.mask, scale=head_dim**-0.5, dropout=None
        )
        if isinstance(piece.mask, Diagonal):
            seen_here = piece.mask.visible(range(piece.q.count), piece.kv.count).any(1)
            assert (out[:, ~seen_here] == 0).all()
            assert torch.isneginf(lse[:, :, ~seen_here]).all()
        whole = out.new_zeros(batch, nq, 6, value_dim)
        whole_lse = lse.new_full((batch, 6, nq), -torch.inf)
        whole[:, rows], whole_lse[:, :, rows] = out, lse
        state.update(whole, whole_lse)
    out, lse = state.result()
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    for piece in pieces:
        rows, keys = _slice(piece.q), _slice(piece.kv)
        parts = kernel.backward(
            dout[:, rows],
            q[:, rows],
            k[:, keys],
            v[:, keys],
            out[:, rows],
            lse[:, :, rows],
            piece.mask,
            scale=head_dim**-0.5,
            dropout=None,
            deterministic=False,
        )
        for total, part, where in zip(sums, parts, (rows, keys, keys), strict=True):
            total[:, where] += part
    bound = 1e-11 if exact else 3e-2
    for name, found, wanted in zip(
        ["out", "lse", "dq", "dk", "dv"],
        (out, lse, *sums),
        (right, right_lse, *gradients),
        strict=True,
    ):
        found = found.double().cpu()
        if name == "lse":
            assert torch.equal(torch.isneginf(found), torch.isneginf(wanted))
            found, wanted = (x[~torch.isneginf(wanted)] for x in (found, wanted))
        error = float((found - wanted).norm() / (wanted.norm() + 1))
        assert error < bound, (name, error)


@lru_cache(maxsize=1)  # the kernels take turns
def _defined(tiles, head_dim, value_dim, batch, dtype):
    """q, k, v, dout; and out, lse and gradients by the definition."""
    torch.manual_seed(0)
    nq, nk = (max(rows.start + rows.count for rows in side) for side in _sides(tiles))
    shapes = ((batch, nq, 6, head_dim), (batch, nk, 2, head_dim), (batch, nk, 2, value_dim))
    shapes += ((batch, nq, 6, value_dim),)
    seen = torch.zeros(nq, nk, dtype=torch.bool)
    for tile in tiles:
        inside = tile.mask.visible(range(tile.q.count), tile.kv.count)
        seen[_slice(tile.q), _slice(tile.kv)] |= inside
    q, k, v, dout = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    leaves = [x.clone().double().requires_grad_() for x in (q, k, v)]
    right, right_lse = reference.attention(*leaves, seen)
    gradients = torch.autograd.grad(right, leaves, dout.double())
    return (q, k, v, dout), right.detach(), right_lse.detach(), gradients


def _sides(tiles):
    return [tile.q for tile in tiles], [tile.kv for tile in tiles]


def _slice(rows: Rows) -> slice:
    return slice(rows.start, rows.start + rows.count)


def test_no_kernel_says_why():
    attention = registry.create("standard", kernel="flash")
    q = torch.randn(1, 4, 1, 8)
    with pytest.raises(KernelError, match=r"no kernel for torch.float32 on cpu.*flash: CUDA only"):
        attention(q, q, q)


def test_dropout_with_a_kernel_that_cannot_repeat_it_is_refused_at_create():
    with pytest.raises(ConfigError, match=r"kernel 'cpu_flash' cannot repeat.*auto, reference"):
        registry.create("standard", kernel="cpu_flash", dropout=0.5)


def test_dropout_drops_by_global_index_and_keeps_the_mean():
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(64)
    dropout = Dropout(
        0.3, 11, torch.arange(3), torch.arange(4), index.expand(3, -1), index.expand(3, -1)
    )
    factor = dropout.factor()
    kept = (factor > 0).double().mean()
    assert abs(kept - 0.7) < 0.01
    assert torch.equal(factor.unique(), torch.tensor([0, 1 / 0.7], dtype=torch.float64))
    order = torch.randperm(64, generator=generator)
    moved = Dropout(
        0.3, 11, torch.arange(3), torch.arange(4), index[order].expand(3, -1), index.expand(3, -1)
    )
    assert torch.equal(moved.factor(), factor[:, :, order])
    other = Dropout(0.3, 12, *(getattr(dropout, n) for n in ("batch", "heads", "q", "kv")))
    assert 0.35 < (other.factor() == factor).double().mean() < 0.65
    for axis in range(4):  # no two batch rows, heads, queries or keys share a mask
        a, b = factor.select(axis, 0), factor.select(axis, 1)
        assert 0.4 < (a == b).double().mean() < 0.75


class TestState:
    """The merge that third parties use."""

    def test_any_split_and_order_of_keys_gives_the_whole(self):
        torch.manual_seed(1)
        q, k, v = (torch.randn(2, n, 4, 8, dtype=torch.float64) for n in (5, 30, 30))
        whole, whole_lse = reference.attention(q, k, v, torch.ones(5, 30, dtype=torch.bool))
        state = RingAttentionState()
        for keys in (slice(20, 30), slice(0, 1), slice(1, 20)):
            seen = torch.ones(5, 1, dtype=torch.bool)
            state.update(*reference.attention(q, k[:, keys], v[:, keys], seen))
        out, lse = state.result()
        assert torch.allclose(out, whole, atol=1e-12)
        assert torch.allclose(lse, whole_lse, atol=1e-12)

    def test_rows_that_see_nothing_stay_empty_and_merge(self):
        state = RingAttentionState()
        empty = torch.full((1, 1, 2), -torch.inf)
        for _ in range(2):
            state.update(torch.full((1, 2, 1, 4), torch.nan), empty)
        out, lse = state.result()
        assert (out == 0).all()
        assert torch.isneginf(lse).all()
        state.update(torch.ones(1, 2, 1, 4), torch.tensor([[[0.5, -torch.inf]]]))
        out, lse = state.result()
        assert torch.equal(out[0, :, 0, 0], torch.tensor([1.0, 0.0]))
        assert lse[0, 0, 0] == 0.5

    def test_half_precision_is_merged_in_float32_and_the_inputs_are_left_alone(self):
        out, lse = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 1)
        state = RingAttentionState()
        for step in range(300):  # in bfloat16, 1/300 of a step would be lost
            state.update(out * (step % 2), lse)
        found, total = state.result()
        assert found.dtype == torch.bfloat16
        assert total.dtype == torch.float32
        assert (found == 0.5).all()
        assert abs(float(total) - math.log(300)) < 1e-5
        assert (out == 1).all()
        assert (lse == 0).all()

    def test_earlier_results_stay_and_gradients_flow(self):
        state = RingAttentionState()
        a, b = (torch.randn(1, 2, 1, 4, requires_grad=True) for _ in range(2))
        lse = torch.zeros(1, 1, 2)
        state.update(a, lse)
        first, _ = state.result()
        before = first.clone()
        state.update(b, lse)
        assert torch.equal(first, before)
        state.result()[0].sum().backward()
        assert torch.allclose(a.grad, torch.full_like(a, 0.5))
        assert torch.allclose(b.grad, torch.full_like(b, 0.5))

    def test_shapes_that_do_not_fit_are_named(self):
        state = RingAttentionState()
        with pytest.raises(InputError, match="no update yet"):
            state.result()
        with pytest.raises(InputError, match=r"out \(1, 2, 3, 4\) and lse \(1, 2, 3\): expected"):
            state.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3))
        state.update(torch.ones(1, 2, 3, 4), torch.ones(1, 3, 2))
        with pytest.raises(InputError, match="one state holds one set of queries"):
            state.update(torch.ones(1, 5, 3, 4), torch.ones(1, 3, 5))
