"""Kernels of block tables: against the reference kernel, in the interpreter, and compiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ring_attention_blocksparse.kernels.cpu_blocks import CpuBlocks
from ring_attention_blocksparse.kernels.padded import Masks
from ring_attention_blocksparse.limits import Band, Packed
from ring_attention_standard.kernels.eager import Eager

from ring_core import registry
from ring_core.exchange import Exchange
from ring_core.program import Program


def tiles(fields, length, kv_heads, q, k, documents=None):
    """The tiles of one rank with their masks, filled where blocks are chosen."""
    attention = registry.create("blocksparse", **fields)
    plan = attention.plan(cu_seqlens=documents or [0, length])
    choice = attention.choose(plan, q, k, Exchange(0, 1, None))
    program = Program.build(plan.plan, 0, CpuBlocks(), kv_heads=kv_heads)
    for tile in program.rounds[0].tiles:
        rows, keys = (slice(x.start, x.start + x.count) for x in (tile.q, tile.kv))
        yield rows, keys, tile.mask.filled(choice, tile.batch)


def compare(
    kernel,
    fields,
    length,
    documents=None,
    *,
    batch=2,
    heads=4,
    kv_heads=2,
    dim=16,
    value_dim=16,
    dtype,
    bound,
    device,
):
    """Out, lse and gradients of every tile, with what ``kernel`` and the reference kernel say."""
    torch.manual_seed(0)
    q, k, v, dout = (
        torch.randn(batch, length, h, d, device=device).to(dtype)
        for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim), (heads, value_dim))
    )
    for rows, keys, mask in tiles(fields, length, kv_heads, q, k, documents):
        inputs = q[:, rows], k[:, keys], v[:, keys]
        options = {"scale": 0.3, "dropout": None}
        right, right_lse = Eager().forward(*inputs, mask, **options)
        out, lse = kernel.forward(*inputs, mask, **options)
        assert torch.equal(lse == -torch.inf, right_lse == -torch.inf)
        seen = right_lse > -torch.inf
        assert (lse - right_lse)[seen].abs().max() < max(bound / 4, 1e-5)
        found = [out]
        expected = [right]
        rest = right.to(dtype) if kernel.rounds else right, right_lse, mask
        for one, into in ((kernel, found), (Eager(), expected)):
            into += one.backward(dout[:, rows], *inputs, *rest, **options, deterministic=False)
        for x, y in zip(found, expected, strict=True):
            most = y.abs().max().clamp_min(8) / 8  # sums over thousands of tokens are large
            assert (x.to(y.dtype) - y).abs().max() < bound * most


def blocks(*patterns, block_q=16, block_kv=16, **fields):
    return {"patterns": patterns, "block_q": block_q, "block_kv": block_kv, **fields}


LOCAL = {"kind": "local", "left": 20, "right": 3}
CASES = {
    "causal window": (blocks(LOCAL, causal=True), 45),
    "heads that differ": (blocks({"kind": "random", "blocks": 2}, {"kind": "sink", "n": 3}), 45),
    "batch rows that differ": (
        blocks({"kind": "topk", "blocks": 2}, {"kind": "global_tokens", "ids": [5]}),
        45,
    ),
    "odd sizes": (blocks({"kind": "strided", "stride": 7}, block_q=12, block_kv=20), 45),
    "large blocks": (
        blocks({"kind": "dilated", "window": 7, "rate": 3}, block_q=64, block_kv=128, causal=True),
        150,
    ),
    "documents": (blocks(LOCAL, block_q=128, block_kv=128), 150, (0, 20, 97, 150)),
    "grid": (blocks({"kind": "neighborhood", "grid": (3, 4, 5), "radius": (1, 0, 2)}), 60),
}


@pytest.mark.parametrize("case", CASES)
def test_lists_as_batches_equal_the_reference(case):
    for dtype, bound in ((torch.float64, 1e-12), (torch.bfloat16, 1e-4)):
        compare(CpuBlocks(), *CASES[case], dtype=dtype, bound=bound, device="cpu")
    compare(
        CpuBlocks(),
        *CASES[case],
        dim=6,
        value_dim=5,
        dtype=torch.float64,
        bound=1e-12,
        device="cpu",
    )


def test_what_no_list_names_is_not_read():
    """Neither forward nor backward: NaN in the middle of a tile goes nowhere."""
    table = torch.eye(5, dtype=torch.bool)
    table[2, 2] = False
    fields = blocks({"kind": "blocks", "table": table})
    q = torch.randn(1, 80, 2, 8, dtype=torch.float64)
    ((rows, keys, _),) = tiles(fields, 80, 2, q, q)
    assert (rows, keys) == (slice(0, 80), slice(0, 80))
    q[:, 32:48] = torch.nan
    leaves = [q.clone().requires_grad_() for _ in range(3)]
    out = registry.create("blocksparse", **fields)(*leaves)
    assert (out[:, 32:48] == 0).all()
    for x in (out, *torch.autograd.grad(out.sum(), leaves)):
        assert not x.isnan().any()


def tiled(*patterns, **fields):
    return blocks(*patterns, block_q=128, block_kv=128, **fields)


LONG = {"kind": "local", "left": 700, "right": 130}
TILED = {
    "window": (tiled(LONG), 2000),
    "causal": (tiled(LONG, causal=True), 2048),
    "few long lists": (tiled({"kind": "global_tokens", "ids": [5]}, LOCAL), 6000),
    "long lists, heads that differ": (
        tiled({"kind": "random", "blocks": 2}, {"kind": "global_tokens", "ids": [2111]}),
        4999,
    ),
    "batch rows that differ": (tiled({"kind": "topk", "blocks": 3}, causal=True), 1000),
    "documents": (tiled(LONG), 1300, (0, 20, 700, 1300)),
    "rows that see nothing": (tiled({"kind": "sink", "n": 9}, LOCAL), 900, (0, 300, 700)),
    "sink": (tiled({"kind": "sink", "n": 200}, causal=True), 900, (0, 300, 700)),
    "grid": (tiled({"kind": "neighborhood", "grid": (30, 40), "radius": (9, 3)}), 1200),
    "video": (
        tiled({"kind": "window_blocks", "grid": (5, 9, 20), "shape": (2, 4, 7), "shift": 1}),
        900,
    ),
    "grid, documents": (
        tiled({"kind": "neighborhood", "grid": (30, 40), "radius": 5}, causal=True),
        1200,
        (0, 500, 1200),
    ),
}
BANDS = {"window", "causal", "batch rows that differ"}
BITS = {"few long lists", "long lists, heads that differ", "rows that see nothing"}


def shown_in(shown, x, y, b, h):
    """What tile x of queries sees of tile y of keys, as flash-attn-4's masks say it."""
    rows, keys = (128 * n + torch.arange(128) for n in (x, y))
    if isinstance(shown, Band):
        apart = keys - rows[:, None]
        return (shown.low <= apart) & (apart <= shown.high)
    if isinstance(shown, Packed):
        at, low, high = (
            side[part].long() for side, part in zip(shown[:3], (keys, rows, rows), strict=True)
        )
        fields = (at - low[:, None]) & (high[:, None] - at) & 0xFFFFFFFF
        return fields & (guards := shown.guards & 0xFFFFFFFF) == guards
    first = shown.slots[b, h, x, y % shown.slots.shape[-1]]
    words = shown.bits[first : first + 512].view(128, 4)
    return (words[:, :, None] >> torch.arange(32) & 1).bool().flatten(1)


def shown_by(padded, side, mine, theirs, b, h):
    """A row for each list, read as flash-attn-4 does: bool [tiles * 128, tiles * 128]."""
    found = torch.zeros(mine, theirs, 128, 128, dtype=torch.bool)
    for line in range(mine):
        for listed, count in (
            (padded.partial, padded.partial_count),
            (padded.full, padded.full_count),
        ):
            others = listed[b, h, line, : count[b, h, line]].tolist()
            assert others == sorted(set(others))
            for other in others:
                x, y = (line, other) if side == 0 else (other, line)
                assert not found[line, other].any(), "listed once"
                if listed is padded.full:
                    found[line, other] = True
                    continue
                shown = shown_in(padded.shown, x, y, b, h)
                found[line, other] = shown if side == 0 else shown.T
    return found.transpose(1, 2).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("case", TILED)
def test_lists_for_flash_attn_4_say_the_same(case):
    """And long ones are cut: no array is much larger than its pairs."""
    fields, length, *documents = TILED[case]
    q = torch.randn(2, length, 2, 4)
    ((rows, keys, mask),) = tiles(fields, length, 2, q, q, *documents)
    sizes = rows.stop - rows.start, keys.stop - keys.start
    right = mask.visible(range(sizes[0]), sizes[1])[:, :, 0]
    tables = mask.tables(torch.device("cpu"))
    for side, parts in enumerate(tables.parts):
        found = torch.zeros_like(right if side == 0 else right.mT)
        assert len(parts) == (2 if "long lists" in case else 1)
        for part, copies in parts:
            padded = part.padded[side]
            kind = Band if case in BANDS else Masks if case in BITS else Packed
            assert isinstance(padded.shown, kind)
            size = padded.partial.numel() + padded.full.numel()
            assert size <= 8 * len(part.by_query.other) + 16 * padded.partial_count.numel()
            mine = padded.partial_count.shape[-1]
            theirs = -(-sizes[1 - side] // 128)
            for b, h in np.ndindex(right.shape[:2]):
                shown = shown_by(padded, side, mine, theirs, b, h)[:, : sizes[1 - side]]
                if kind is not Masks:  # what is behind the end is left to the package
                    shown[sizes[side] :] = False
                if copies is None:
                    found[b, h] |= shown[: sizes[side]]
                    assert not shown[sizes[side] :].any()
                    continue
                each = shown.unflatten(0, (-1, 128)).split(copies.counts.tolist())
                for lines, several in zip(copies.lines, each, strict=True):
                    assert several.sum(0).max() == 1, "no pair in two copies"
                    assert not found[b, h, lines].any()
                    found[b, h, lines] = several.any(0)
        assert torch.equal(found, right if side == 0 else right.mT)


def large_scores(kernel, device):
    """A piece smaller than a program's rows, and sums of weights far below 1."""
    for block in (24, 16):
        fields = blocks({"kind": "local", "left": 99, "right": 99}, block_q=block, block_kv=block)
        q, k = (torch.full((1, 40, 1, 16), x, device=device, dtype=torch.float16) for x in (2, -2))
        ((*_, mask),) = tiles(fields, 40, 1, q, k)
        v = torch.randn_like(k)
        options = {"scale": 0.3, "dropout": None}
        out, lse = kernel.forward(q, k, v, mask, **options)
        assert lse.max() < -14
        found = kernel.backward(v, q, k, v, out, lse, mask, **options, deterministic=True)
        right = Eager().backward(v, q, k, v, out, lse, mask, **options, deterministic=True)
        for x, y in zip(found, right, strict=True):
            assert (x - y).abs().max() < 1e-2


LONG_LISTS = {
    "few long lists": (blocks({"kind": "global_tokens", "ids": [5]}, LOCAL), 500),
    "long lists, heads that differ, in the last block": (
        blocks({"kind": "random", "blocks": 1}, {"kind": "global_tokens", "ids": [283]}),
        284,
    ),
}


def interpret():
    """In the interpreter. One case has several batch rows, and two several KV heads."""
    from ring_attention_blocksparse.kernels.triton_blocks import TritonBlocks

    kernel, single = TritonBlocks(), {"dtype": torch.float32, "bound": 1e-5, "device": "cpu"}
    few = {"batch": 1, "heads": 2, "kv_heads": 1}
    special = {
        "batch rows that differ": {},
        "heads that differ": {"batch": 1},
        "odd sizes": {**few, "dim": 20, "value_dim": 12},
    }
    for name in CASES.keys() - {"documents"}:
        compare(kernel, *CASES[name], **single, **special.get(name, few))
    # The interpreter knows no products of bfloat16.
    half = {"dtype": torch.float16, "bound": 1e-2, "device": "cpu"}
    compare(kernel, *CASES["causal window"], **half, **few)
    large_scores(kernel, "cpu")


def interpret_long_lists():
    """In a process beside the one above."""
    from ring_attention_blocksparse.kernels.triton_blocks import TritonBlocks

    case = LONG_LISTS["long lists, heads that differ, in the last block"]
    sizes = {"batch": 1, "heads": 2, "kv_heads": 2}
    compare(TritonBlocks(), *case, **sizes, dtype=torch.float32, bound=1e-5, device="cpu")


def compile_for_a_gpu():
    """The programs are compiled to machine code of Hopper, and fit its shared memory."""
    import triton
    from ring_attention_blocksparse.kernels import programs
    from ring_attention_blocksparse.kernels.triton_blocks import shapes_for
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    halves = {"q", "k", "v", "out", "dout", "dq", "dk", "dv"}
    types = {
        "lse": "*fp32",
        "delta": "*fp32",
        "lists": ("*i32",) * 5,
        "masks": ("*i32",) * 4,
        "q_pieces": ("*i64",) * 2,
        "kv_pieces": ("*i64",) * 2,
        "scale": "fp32",
    }
    for size, block, limited in ((128, 128, True), (128, 64, False), (256, 128, False)):
        shapes = shapes_for(torch.bfloat16, size, block, large=True)
        for program, shape in (
            (programs.forward, shapes.forward),
            (programs.query_gradients, shapes.queries),
            (programs.key_gradients, shapes.keys),
        ):
            constants = dict.fromkeys(("D", "DV", "PD", "PDV"), size)
            constants |= {"LARGEST_Q": block, "LARGEST_KV": block, "WORDS": 4, "LIMITED": limited}
            constants |= {"BM": shape.rows_q, "BN": shape.rows_kv}
            signature, known, attributes = {}, {}, {}
            for i, name in enumerate(program.arg_names):
                if name in constants:
                    signature[name], known[i,] = "constexpr", constants[name]
                elif name.endswith("strides"):
                    last = "i64" if name.startswith(("lse", "delta")) else "constexpr"
                    signature[name] = ("i64", "i64", "i64", last)
                    known |= {} if last == "i64" else {(i, 3): 1}
                    attributes |= {(i, j): [["tt.divisibility", 16]] for j in range(3)}
                else:
                    signature[name] = "*bf16" if name in halves else types.get(name, "i32")
                    if name in halves:
                        attributes[i,] = [["tt.divisibility", 16]]
            compiled = triton.compile(
                ASTSource(program, signature, constexprs=known, attrs=attributes),
                target=GPUTarget("cuda", 90, 32),
                options={"num_warps": shape.warps, "num_stages": shape.stages},
            )
            assert compiled.metadata.shared <= 227 * 1024
            assert "wgmma.mma_async" in compiled.asm["ptx"] or size == 256
            assert "cp.async" in compiled.asm["ptx"], "loads overlap with products"


PROGRAMS = {interpret: "1", interpret_long_lists: "1", compile_for_a_gpu: "0"}
"""Functions, and whether in the interpreter, which is chosen when programs are first imported."""


@pytest.fixture(scope="module")
def started(elsewhere):
    pytest.importorskip("triton")
    return {run: elsewhere(run, TRITON_INTERPRET=PROGRAMS[run]) for run in PROGRAMS}


@pytest.mark.parametrize("function", PROGRAMS)
def test_triton_programs(started, function):
    _, errors = started[function].communicate()
    assert started[function].returncode == 0, errors[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES | LONG_LISTS)
@pytest.mark.parametrize(
    ("dim", "dtype", "bound"),
    [
        (16, torch.float32, 1e-4),
        (64, torch.float16, 2e-2),
        (128, torch.bfloat16, 0.15),
        (192, torch.bfloat16, 0.15),
    ],
)
def test_triton_programs_on_a_gpu(case, dim, dtype, bound):
    from ring_attention_blocksparse.kernels.triton_blocks import TritonBlocks

    sizes = {"dim": dim, "value_dim": dim}
    compare(
        TritonBlocks(),
        *(CASES | LONG_LISTS)[case],
        **sizes,
        dtype=dtype,
        bound=bound,
        device="cuda",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("case", TILED)
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (128, torch.bfloat16)])
def test_flash_attn_4_on_a_gpu(case, dim, dtype):
    from ring_attention_blocksparse.kernels.flash4_blocks import Flash4Blocks

    pytest.importorskip("flash_attn.cute")
    bound = 2e-2 if dtype == torch.float16 else 0.15
    sizes = {"dim": dim, "value_dim": dim}
    compare(Flash4Blocks(), *TILED[case], **sizes, dtype=dtype, bound=bound, device="cuda")


@pytest.mark.gpu
def test_one_compilation_serves_a_shape_class() -> None:
    """Whatever the length, so long as it is a multiple of 16 or none; whatever the window, the
    batch, the documents and the lists; however many heads there are, and in a group, but for 1."""
    from ring_attention_blocksparse.kernels import programs

    def compiled() -> dict[str, int]:
        names = ("forward", "query_gradients", "key_gradients", "deltas")
        caches = {name: getattr(programs, name).device_caches for name in names}
        return {name: len(cache[torch.cuda.current_device()][0]) for name, cache in caches.items()}

    def call(pattern, length, heads=4, kv_heads=2, batch=1, documents=None) -> None:
        fields = {"kernel": "triton_blocks", "causal": True, "block_q": 64, "block_kv": 64}
        attention = registry.create("blocksparse", patterns=[pattern], **fields)
        leaves = [
            torch.randn(batch, length, n, 64, dtype=torch.bfloat16, device="cuda").requires_grad_()
            for n in (heads, kv_heads, kv_heads)
        ]
        plan = attention.plan(cu_seqlens=documents or [0, length])
        attention(*leaves, plan=plan).sum().backward()

    window, strided = {"kind": "local", "left": 100, "right": 0}, {"kind": "strided", "stride": 7}
    for pattern in (window, strided):  # limits, and bits, which are two programs
        call(pattern, 1001)
        call(pattern, 1024)
        first = compiled()
        call(pattern, 2048)
        call(pattern, 777)
        call(pattern, 1024, batch=3)
        call(pattern, 1024, heads=16, kv_heads=2)
        call(pattern, 1024, heads=3, kv_heads=1)
        call(pattern, 1024, documents=[0, 300, 301, 1024])
        assert compiled() == first
    for other in (
        {**window, "left": 333},
        {**strided, "stride": 3},
        {"kind": "random", "blocks": 2},
        {"kind": "topk", "blocks": 2},
    ):
        call(other, 1024)
    assert compiled() == first
