"""The one-pass merge: in Triton's interpreter, compiled for a GPU, and under the accumulators."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ring_core.accumulation import cells


def interpret() -> None:
    """In the interpreter."""
    from ring_core.fused import merge_into, sum_into

    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 2e-2)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        torch.manual_seed(0)
        # Rows of larger tensors, a head size that is no power of two, one source or several.
        for count in (1, 2, 3, 4):
            outs = [torch.randn(2, 10, 3, 20).to(dtype)[:, 2:7] for _ in range(count)]
            lses = [torch.randn(2, 3, 9).to(wide)[:, :, 1:6] for _ in range(count)]
            for lse in lses:
                lse[:, :, 1] = -torch.inf  # this row saw nothing anywhere
            lses[0][:, :, 0] = -torch.inf
            outs[0][:, :2] = torch.nan  # what a kernel leaves there is its own business
            out = torch.full((2, 8, 3, 20), 7.0, dtype=dtype)
            lse = torch.full((2, 3, 8), 7.0, dtype=wide)
            merge_into(
                out[:, 1:6], lse.transpose(1, 2)[:, 1:6], outs, [x.transpose(1, 2) for x in lses]
            )
            together = torch.stack(lses).double()
            right_lse = torch.logsumexp(together, 0)
            weights = torch.exp(together - right_lse.masked_fill(right_lse == -torch.inf, 0))
            right = sum(
                torch.where(w > 0, o.double(), 0) * w
                for o, w in zip(outs, weights.transpose(2, 3)[..., None], strict=True)
            )
            assert (out[:, 1:6].double() - right).abs().max() < bound
            assert torch.equal(lse[:, :, 1:6] == -torch.inf, right_lse == -torch.inf)
            seen = right_lse > -torch.inf
            assert (lse[:, :, 1:6].double() - right_lse)[seen].abs().max() < max(bound, 1e-6) / 2
            assert (out[:, 0] == 7).all()
            assert (out[:, 6:] == 7).all()
            assert (lse[:, :, 6:] == 7).all()

            parts = [torch.randn(2, 5, 3, 20).to(dtype) for _ in range(count)]
            total = sum(part.double() for part in parts)
            sum_into(parts[0], parts)  # over one of its sources
            assert (parts[0].double() - total).abs().max() < 2 * bound


def accumulate() -> None:
    """Accumulators through the kernel give what they give through the accumulation dtype."""
    from ring_core import copying, fused
    from ring_core.accumulation import Merge, Place, Sum
    from ring_core.plan import ALL_HEADS, Heads, Rows
    from ring_core.rows import grouped, select

    fused.MANY = 0
    runs = [(0, 12), (6, 6), (0, 6), (3, 5), (0, 12), (11, 1), (2, 9)]
    torch.manual_seed(0)
    q = torch.randn(2, 12, 4, 8)
    places = [Place(Rows(a, n)) for a, n in runs]
    places += [
        Place(Rows(1, 3, 3), Heads(1, 2)),  # strided rows of some heads
        Place(Rows(0, 3, 1, 4, 3)),  # repeated, and all there are
        Place(Rows(1, 2, 2, 3, 4), Heads(0, 2)),  # repeated and strided
        Place(Rows(0, 2, 2, 3, 4, 1), Heads(0, 2, 2)),  # all heads, each row of two phases
        Place(Rows(4, 5), ALL_HEADS, range(1, 2)),
    ]
    tiles = []
    for place in places:
        rows, batch = place.rows, 2 if place.batch is None else len(place.batch)
        heads = 2 * place.heads.count(2)
        out = torch.randn(batch * rows.repeat, rows.count, heads, 8)
        tiles.append((place, out, torch.randn(batch * rows.repeat, heads, rows.count)))
    for first in (0, 1, 7):  # the first may cover all rows, or leave some unseen
        for count in range(len(tiles) - first, 0, -2):
            chosen = tiles[first : first + count]
            found = {}
            for with_it in (False, True):
                copying.is_fused = lambda device, with_it=with_it: with_it
                merged, total, settled = Merge(q, 8, 2), Sum.of(q, 2), Sum.of(q, 2)
                for place, out, lse in chosen:
                    merged.add(place, out.clone(), lse.clone())
                    total.add(place, out.clone())
                    settled.add(place, out.clone(), borrowed=True)
                    settled.settle()
                block = total.rows(range(3, 5), torch.float32).clone()
                found[with_it] = (*merged.result(), total.result(), settled.result(), block)
            for a, b in zip(found[False], found[True], strict=True):
                assert torch.allclose(a, b, atol=1e-5), (count, first)
    x = torch.randn(2, 12, 4, 8).to(torch.bfloat16)
    for place in places:
        window = select(grouped(x, 2), place.rows, place.heads, place.batch)
        together = torch.empty(window.shape)
        copying.copy(together, window)
        assert torch.equal(together, window.float())
        for with_it in (False, True):
            copying.is_fused = lambda device, with_it=with_it: with_it
            chosen = torch.rand(window.shape[:-1]) < 0.5
            target = torch.full((*window.shape[:-1], 9), 7.0).to(x.dtype)
            copying.copy_chosen(target[..., 1:], window, chosen)
            right = torch.where(chosen[..., None], window, 7)
            assert torch.equal(target[..., 1:], right)
            assert (target[..., 0] == 7).all()


def compile_for_a_gpu() -> None:
    """The kernels are compiled to machine code of Hopper, on whatever machine this is."""
    import triton.language as tl

    from ring_core import fused

    for merge in (False, True):
        n = 3
        _compile(
            fused._combine,
            {"WIDE": tl.float32, "N": n, "MERGE": merge, "WIDE_INDEX": merge},
            out="*bf16",
            out_strides=("i64",) * 6,
            lse="*fp32",
            lse_strides=("i64",) * 6,
            outs=("*bf16",) * n,
            outs_strides=(("i64",) * 6,) * n,
            lses=("*fp32",) * n,
            lses_strides=(("i64",) * 6,) * n,
        )
    strides = {f"{name}_strides": ("i64",) * 6 for name in ("out", "x", "chosen")}
    _compile(fused._pick, {"WIDE_INDEX": True}, out="*bf16", x="*bf16", chosen="*i1", **strides)


def _compile(kernel, constants: dict, **types) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, "PAIRS": 16, "D": 128}
    signature = dict.fromkeys(kernel.arg_names, "i32")
    signature |= {**types, "sizes": ("i32",) * 6, **dict.fromkeys(constants, "constexpr")}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(compiled.asm["cubin"]) > 1000


PROGRAMS = {interpret: "1", accumulate: "1", compile_for_a_gpu: "0"}
"""Functions, and whether in the interpreter, which is chosen when the kernel is first imported."""


@pytest.fixture(scope="module")
def started(elsewhere):
    return {run: elsewhere(run, TRITON_INTERPRET=PROGRAMS[run]) for run in PROGRAMS}


@pytest.mark.parametrize("function", PROGRAMS)
def test_the_kernel(started, function):
    """Merges and sums are as defined; accumulators give the same with it; it compiles."""
    _, errors = started[function].communicate()
    assert started[function].returncode == 0, errors[-3000:]


def test_cells_cover_all_rows_once():
    runs = range(5), range(3, 9), range(9, 9)
    found = cells(runs, 12)
    assert [(rows.start, rows.stop) for rows, _ in found] == [(0, 3), (3, 5), (5, 9), (9, 12)]
    assert [members for _, members in found] == [(0,), (0, 1), (1,), ()]
