"""Triton programs of block-sparse attention (FlashAttention-2, arXiv 2307.08691, over lists).

One program for a part of a piece of rows and a head: it goes through the piece's list. What a pair
of pieces sees is data: limits of coordinates where LIMITED, else a mask of one bit a pair of rows.
Two compilations serve every pattern.

Sizes: BM rows of queries, BN rows of keys at a time; D and DV head sizes, PD and PDV the next
powers of two. Scores are kept in base 2. MASKED says which of a list's two parts is gone through:
pairs of which something may not be seen or not be there, or plain ones. A tile of rows is read at a
first row, once for all of them 64 bits wide, and places in the tile, which stay the same. That row
is read a step ahead: keys and values cannot be asked for before it is there.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
OF_A_CALL = ("guard", "pieces", "heads", "layers_batch", "layers_head")
"""Numbers for which Triton must not compile programs anew, as it else does where one is 1 or a
multiple of 16: they come from lists, and decide no shape. In a tuple they would not be found. That
a group is of one head is worth knowing: without it forward and backward took 10% longer
(benchmarks/tries.md)."""


@triton.jit(do_not_specialize=OF_A_CALL)  # type: ignore[untyped-decorator]
def forward(  # type: ignore[no-untyped-def]  # Triton reads the annotations
    q,
    k,
    v,
    out,
    lse,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    lse_strides,
    lists,
    masks,
    guard,
    q_pieces,
    kv_pieces,
    pieces,
    heads,
    group,
    layers_batch,
    layers_head,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    PD: tl.constexpr,
    PDV: tl.constexpr,
    LARGEST_Q: tl.constexpr,
    LARGEST_KV: tl.constexpr,
    WORDS: tl.constexpr,
    LIMITED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Out [B, S, H, DV] and lse [B, H, S] of BM rows of a piece of queries."""
    layers = layers_batch, layers_head
    masks = masks[0], masks[1], masks[2], masks[3], guard
    piece, first = _part(LARGEST_Q, BM)
    b, h = _row_and_head(heads)
    x, inside, rows = _rows(q_pieces, piece, first, BM)
    queries = _load(q, q_strides, b, h, rows, inside, D, PD)
    k += b * k_strides[0] + h // group * k_strides[2]
    v += b * v_strides[0] + h // group * v_strides[2]
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    summed = tl.zeros([BM, PDV], tl.float32)
    mine = x, x
    if LIMITED:
        mine = tl.load(masks[2] + rows, inside, other=0), tl.load(masks[3] + rows, inside, other=0)
    start, plain, stop = _list(lists, layers, b, h // group, pieces, piece)
    if LARGEST_KV % BN != 0:
        plain = stop  # what is behind the end of a piece must be masked
    largest, total, summed = _meet(
        largest, total, summed, queries, k, v, k_strides, v_strides, lists, masks, kv_pieces,
        x, mine, start, plain, scale,
        D, DV, PD, PDV, LARGEST_Q, LARGEST_KV, WORDS, LIMITED, BM, BN, True,
    )  # fmt: skip
    largest, total, summed = _meet(
        largest, total, summed, queries, k, v, k_strides, v_strides, lists, masks, kv_pieces,
        x, mine, plain, stop, scale,
        D, DV, PD, PDV, LARGEST_Q, LARGEST_KV, WORDS, LIMITED, BM, BN, False,
    )  # fmt: skip
    seen = total > 0
    summed = summed / tl.where(seen, total, 1.0)[:, None]
    natural = (largest + tl.log2(tl.where(seen, total, 1.0))) / LOG2E
    at = b * lse_strides[0] + h * lse_strides[1] + rows * lse_strides[2]
    tl.store(lse + at, tl.where(seen, natural, float("-inf")), inside)
    _store(out, out_strides, b, h, rows, inside, summed, DV, PDV)


@triton.jit  # type: ignore[untyped-decorator]
def _meet(  # type: ignore[no-untyped-def]
    largest, total, summed, queries, k, v, k_strides, v_strides, lists, masks, kv_pieces,
    x, mine, begin, end, scale,
    D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    LARGEST_Q: tl.constexpr, LARGEST_KV: tl.constexpr, WORDS: tl.constexpr,
    LIMITED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go on with pairs ``begin`` to ``end`` of a list: FlashAttention-2's online softmax."""
    PARTS: tl.constexpr = (LARGEST_KV + BN - 1) // BN
    ahead = _next(lists, begin, end)
    for step in range(begin * PARTS, end * PARTS):
        pair = step // PARTS
        y, there = _other(lists, kv_pieces, pair, step % PARTS * BN, BN, MASKED)
        row = ahead + step % PARTS * BN
        ahead = _next(lists, (step + 1) // PARTS, end)
        keys = _tile(k, k_strides, row, there, BN, D, PD, MASKED)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
        if MASKED:
            if LIMITED:
                at = _line(masks[1], 1, row, there, BN, True, 0)
                shown = _within(at[None, :], mine[0][:, None], mine[1][:, None], masks)
            else:
                shown = _shown(lists, masks, pair, x, y, LARGEST_Q, WORDS, BM, BN, False)
            scores = tl.where(shown & there[None, :], scores, float("-inf"))
        now = tl.maximum(largest, tl.max(scores, 1))
        # exp2(-inf - -inf) is NaN; against 0 it is the 0 that a row weighs which saw nothing yet.
        pivot = tl.where(now == float("-inf"), 0.0, now) if MASKED else now
        weights = tl.exp2(scores - pivot[:, None])
        kept = tl.exp2(largest - pivot)
        total = total * kept + tl.sum(weights, 1)
        values = _tile(v, v_strides, row, there, BN, DV, PDV, MASKED)
        summed = summed * kept[:, None]
        summed = tl.dot(weights.to(values.dtype), values, summed, input_precision="ieee")
        largest = now
    return largest, total, summed


@triton.jit(do_not_specialize=("rows", "heads"))  # type: ignore[untyped-decorator]
def deltas(  # type: ignore[no-untyped-def]
    dout, out, delta, dout_strides, out_strides, rows, heads,
    DV: tl.constexpr, PDV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Sums of dout * out over the head size: float32 [B, H, S]."""
    row = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    inside = row < rows
    b, h = _row_and_head(heads)
    d_out = _load(dout, dout_strides, b, h, row, inside, DV, PDV).to(tl.float32)
    found = _load(out, out_strides, b, h, row, inside, DV, PDV).to(tl.float32)
    at = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(delta + at, tl.sum(d_out * found, 1), inside)


@triton.jit(do_not_specialize=OF_A_CALL)  # type: ignore[untyped-decorator]
def query_gradients(  # type: ignore[no-untyped-def]
    dout,
    q,
    k,
    v,
    lse,
    delta,
    dq,
    dout_strides,
    q_strides,
    k_strides,
    v_strides,
    lse_strides,
    delta_strides,
    dq_strides,
    lists,
    masks,
    guard,
    q_pieces,
    kv_pieces,
    pieces,
    heads,
    group,
    layers_batch,
    layers_head,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    PD: tl.constexpr,
    PDV: tl.constexpr,
    LARGEST_Q: tl.constexpr,
    LARGEST_KV: tl.constexpr,
    WORDS: tl.constexpr,
    LIMITED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dq [B, S, H, D] of BM rows of a piece of queries."""
    layers = layers_batch, layers_head
    masks = masks[0], masks[1], masks[2], masks[3], guard
    piece, first = _part(LARGEST_Q, BM)
    b, h = _row_and_head(heads)
    x, inside, rows = _rows(q_pieces, piece, first, BM)
    queries = _load(q, q_strides, b, h, rows, inside, D, PD)
    d_out = _load(dout, dout_strides, b, h, rows, inside, DV, PDV)
    sums = _sums(lse, lse_strides, b, h, rows, inside)
    at = b * delta_strides[0] + h * delta_strides[1] + rows * delta_strides[2]
    less = tl.load(delta + at, inside, other=0.0)
    k += b * k_strides[0] + h // group * k_strides[2]
    v += b * v_strides[0] + h // group * v_strides[2]
    summed = tl.zeros([BM, PD], tl.float32)
    mine = x, x
    if LIMITED:
        mine = tl.load(masks[2] + rows, inside, other=0), tl.load(masks[3] + rows, inside, other=0)
    start, plain, stop = _list(lists, layers, b, h // group, pieces, piece)
    if LARGEST_KV % BN != 0:
        plain = stop  # exp(0 - lse) of what is behind a piece's end may be inf, and times 0 NaN
    summed = _query_gradients(
        summed, queries, d_out, sums, less, k, v, k_strides, v_strides, lists, masks, kv_pieces,
        x, mine, start, plain, scale,
        D, DV, PD, PDV, LARGEST_Q, LARGEST_KV, WORDS, LIMITED, BM, BN, True,
    )  # fmt: skip
    summed = _query_gradients(
        summed, queries, d_out, sums, less, k, v, k_strides, v_strides, lists, masks, kv_pieces,
        x, mine, plain, stop, scale,
        D, DV, PD, PDV, LARGEST_Q, LARGEST_KV, WORDS, LIMITED, BM, BN, False,
    )  # fmt: skip
    _store(dq, dq_strides, b, h, rows, inside, summed * scale, D, PD)


@triton.jit  # type: ignore[untyped-decorator]
def _query_gradients(  # type: ignore[no-untyped-def]
    summed, queries, d_out, sums, less, k, v, k_strides, v_strides, lists, masks, kv_pieces,
    x, mine, begin, end, scale,
    D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    LARGEST_Q: tl.constexpr, LARGEST_KV: tl.constexpr, WORDS: tl.constexpr,
    LIMITED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what pairs ``begin`` to ``end`` of a list give."""
    PARTS: tl.constexpr = (LARGEST_KV + BN - 1) // BN
    ahead = _next(lists, begin, end)
    for step in range(begin * PARTS, end * PARTS):
        pair = step // PARTS
        y, there = _other(lists, kv_pieces, pair, step % PARTS * BN, BN, MASKED)
        row = ahead + step % PARTS * BN
        ahead = _next(lists, (step + 1) // PARTS, end)
        keys = _tile(k, k_strides, row, there, BN, D, PD, MASKED)
        values = _tile(v, v_strides, row, there, BN, DV, PDV, MASKED)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
        weights = tl.exp2(scores - sums[:, None])
        if MASKED:
            if LIMITED:
                at = _line(masks[1], 1, row, there, BN, True, 0)
                shown = _within(at[None, :], mine[0][:, None], mine[1][:, None], masks)
            else:
                shown = _shown(lists, masks, pair, x, y, LARGEST_Q, WORDS, BM, BN, False)
            weights = tl.where(shown & there[None, :], weights, 0.0)
        d_weights = tl.dot(d_out, tl.trans(values), input_precision="ieee")
        d_scores = weights * (d_weights - less[:, None])
        summed = tl.dot(d_scores.to(keys.dtype), keys, summed, input_precision="ieee")
    return summed


@triton.jit(do_not_specialize=OF_A_CALL)  # type: ignore[untyped-decorator]
def key_gradients(  # type: ignore[no-untyped-def]
    dout,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    dout_strides,
    q_strides,
    k_strides,
    v_strides,
    lse_strides,
    delta_strides,
    dk_strides,
    dv_strides,
    lists,
    masks,
    guard,
    q_pieces,
    kv_pieces,
    pieces,
    heads,
    group,
    layers_batch,
    layers_head,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    PD: tl.constexpr,
    PDV: tl.constexpr,
    LARGEST_Q: tl.constexpr,
    LARGEST_KV: tl.constexpr,
    WORDS: tl.constexpr,
    LIMITED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dk [B, S, K, D] and dv [B, S, K, DV] of BN rows of a piece of keys, for KV ``heads``."""
    layers = layers_batch, layers_head
    masks = masks[0], masks[1], masks[2], masks[3], guard
    piece, first = _part(LARGEST_KV, BN)
    b, h = _row_and_head(heads)
    y, there, rows = _rows(kv_pieces, piece, first, BN)
    keys = _load(k, k_strides, b, h, rows, there, D, PD)
    values = _load(v, v_strides, b, h, rows, there, DV, PDV)
    d_keys = tl.zeros([BN, PD], tl.float32)
    d_values = tl.zeros([BN, PDV], tl.float32)
    mine = y
    if LIMITED:
        mine = tl.load(masks[1] + rows, there, other=0)
    start, plain, stop = _list(lists, layers, b, h, pieces, piece)
    if LARGEST_Q % BM != 0:
        plain = stop
    for member in range(group):
        head = h * group + member
        d_keys, d_values = _key_gradients(
            d_keys, d_values, keys, values, dout, q, lse, delta, dout_strides, q_strides,
            lse_strides, delta_strides, lists, masks, q_pieces, b, head, y, mine,
            start, plain, scale,
            D, DV, PD, PDV, LARGEST_Q, LARGEST_KV, WORDS, LIMITED, BM, BN, True,
        )  # fmt: skip
        d_keys, d_values = _key_gradients(
            d_keys, d_values, keys, values, dout, q, lse, delta, dout_strides, q_strides,
            lse_strides, delta_strides, lists, masks, q_pieces, b, head, y, mine,
            plain, stop, scale,
            D, DV, PD, PDV, LARGEST_Q, LARGEST_KV, WORDS, LIMITED, BM, BN, False,
        )  # fmt: skip
    _store(dk, dk_strides, b, h, rows, there, d_keys * scale, D, PD)
    _store(dv, dv_strides, b, h, rows, there, d_values, DV, PDV)


@triton.jit  # type: ignore[untyped-decorator]
def _key_gradients(  # type: ignore[no-untyped-def]
    d_keys, d_values, keys, values, dout, q, lse, delta, dout_strides, q_strides,
    lse_strides, delta_strides, lists, masks, q_pieces, b, h, y, mine, begin, end, scale,
    D: tl.constexpr, DV: tl.constexpr, PD: tl.constexpr, PDV: tl.constexpr,
    LARGEST_Q: tl.constexpr, LARGEST_KV: tl.constexpr, WORDS: tl.constexpr,
    LIMITED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what pairs ``begin`` to ``end`` of a list give. Queries behind a piece's end weigh 0."""
    PARTS: tl.constexpr = (LARGEST_Q + BM - 1) // BM
    q += b * q_strides[0] + h * q_strides[2]
    dout += b * dout_strides[0] + h * dout_strides[2]
    lse += b * lse_strides[0] + h * lse_strides[1]
    delta += b * delta_strides[0] + h * delta_strides[1]
    ahead = _next(lists, begin, end)
    for step in range(begin * PARTS, end * PARTS):
        pair = step // PARTS
        x, inside = _other(lists, q_pieces, pair, step % PARTS * BM, BM, MASKED)
        row = ahead + step % PARTS * BM
        ahead = _next(lists, (step + 1) // PARTS, end)
        queries = _tile(q, q_strides, row, inside, BM, D, PD, MASKED)
        sums = _base2(_line(lse, lse_strides[2], row, inside, BM, MASKED, float("-inf")))
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * (scale * LOG2E)
        weights = tl.exp2(scores - sums[None, :])
        if MASKED:
            if LIMITED:
                low = _line(masks[2], 1, row, inside, BM, True, 0)
                high = _line(masks[3], 1, row, inside, BM, True, 0)
                shown = _within(mine[:, None], low[None, :], high[None, :], masks)
            else:
                shown = _shown(lists, masks, pair, x, y, LARGEST_Q, WORDS, BM, BN, True)
            weights = tl.where(shown, weights, 0.0)
        d_out = _tile(dout, dout_strides, row, inside, BM, DV, PDV, MASKED)
        d_values = tl.dot(weights.to(d_out.dtype), d_out, d_values, input_precision="ieee")
        less = _line(delta, delta_strides[2], row, inside, BM, MASKED, 0.0)
        d_weights = tl.dot(values, tl.trans(d_out), input_precision="ieee")
        d_scores = weights * (d_weights - less[None, :])
        d_keys = tl.dot(d_scores.to(queries.dtype), queries, d_keys, input_precision="ieee")
    return d_keys, d_values


@triton.jit  # type: ignore[untyped-decorator]
def _part(LARGEST: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's piece, and the first of its rows there."""
    PARTS: tl.constexpr = (LARGEST + ROWS - 1) // ROWS
    return tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * ROWS


@triton.jit
def _row_and_head(heads):  # type: ignore[no-untyped-def]
    """This program's batch row and head; times a stride they may pass 2**31."""
    layer = tl.program_id(1).to(tl.int64)
    return layer // heads, layer % heads


@triton.jit  # type: ignore[untyped-decorator]
def _rows(pieces, piece, first, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a piece: counted in it, whether it has so many, and in the tile."""
    place = first + tl.arange(0, ROWS)
    inside = place < tl.load(pieces[1] + piece)
    return place, inside, (tl.load(pieces[0] + piece) + place).to(tl.int64)


@triton.jit
def _list(lists, layers, b, h, pieces, piece):  # type: ignore[no-untyped-def]
    """A piece's list: its first pair, its first plain one, and the one behind the last."""
    which = (b * layers[0] + h * layers[1]) * pieces + piece
    return tl.load(lists[0] + which), tl.load(lists[1] + which), tl.load(lists[0] + which + 1)


@triton.jit
def _within(at, low, high, masks):  # type: ignore[no-untyped-def]
    """Whether keys at some coordinates are within limits of queries, whichever of the two come
    first; see :class:`ring_attention_blocksparse.limits.Packed`."""
    return (at - low) & (high - at) & masks[4] == masks[4]


@triton.jit  # type: ignore[untyped-decorator]
def _shown(  # type: ignore[no-untyped-def]
    lists, masks, pair, x, y,
    LARGEST_Q: tl.constexpr, WORDS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, KEYS_FIRST: tl.constexpr,
):  # fmt: skip
    """Whether rows x of a pair's queries see rows y of its keys: [BM, BN], or [BN, BM].

    y are BN rows from a multiple of BN on. A word is read once for all keys that it speaks of.
    """
    number = tl.load(lists[3] + pair)
    bits = masks[0] + number.to(tl.int64) * (LARGEST_Q * WORDS)
    WIDE: tl.constexpr = BN if BN < 32 else 32
    words = tl.min(y, 0) // 32 + tl.arange(0, BN // WIDE)
    rows, masked = x < LARGEST_Q, (words < WORDS) & (number >= 0)
    if KEYS_FIRST:
        at, there = x[None, :] * WORDS + words[:, None], rows[None, :] & masked[:, None]
        found = tl.load(bits + at, there, other=-1)[:, None, :]
        found = tl.reshape(tl.broadcast_to(found, (BN // WIDE, WIDE, BM)), (BN, BM))
        shown = found >> (y % 32)[:, None] & 1 != 0
    else:
        at, there = x[:, None] * WORDS + words[None, :], rows[:, None] & masked[None, :]
        found = tl.load(bits + at, there, other=-1)[:, :, None]
        found = tl.reshape(tl.broadcast_to(found, (BM, BN // WIDE, WIDE)), (BM, BN))
        shown = found >> (y % 32)[None, :] & 1 != 0
    return shown


@triton.jit
def _next(lists, pair, end):  # type: ignore[no-untyped-def]
    """The first row of a pair's other piece; any behind the list's end."""
    return tl.load(lists[4] + pair, pair < end, other=0)


@triton.jit  # type: ignore[untyped-decorator]
def _other(lists, pieces, pair, first, ROWS: tl.constexpr, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows from ``first`` on of a pair's other piece: counted in the piece, and whether it has so
    many, as it has where all is plain."""
    place = first + tl.arange(0, ROWS)
    there = place >= 0
    if MASKED:
        there = place < tl.load(pieces[1] + tl.load(lists[2] + pair))
    return place, there


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    x, strides, row, there,
    ROWS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """ROWS rows from ``row`` on of x [S, D], a head of a batch row; 0 where there is none."""
    column = tl.arange(0, P)[None, :]
    at = x + row.to(tl.int64) * strides[1] + (tl.arange(0, ROWS)[:, None] * strides[1] + column)
    if MASKED:
        return tl.load(at, there[:, None] & (column < D), other=0.0)
    if D != P:
        return tl.load(at, column < D, other=0.0)
    return tl.load(at)


@triton.jit  # type: ignore[untyped-decorator]
def _line(  # type: ignore[no-untyped-def]
    x, stride, row, there, ROWS: tl.constexpr, MASKED: tl.constexpr, nothing,
):  # fmt: skip
    """ROWS numbers from ``row`` on of x [S]; ``nothing`` where there is none."""
    at = x + row.to(tl.int64) * stride + tl.arange(0, ROWS) * stride
    if MASKED:
        return tl.load(at, there, other=nothing)
    return tl.load(at)


@triton.jit
def _sums(lse, strides, b, h, rows, inside):  # type: ignore[no-untyped-def]
    """lse in base 2 of some rows of a head."""
    at = b * strides[0] + h * strides[1] + rows * strides[2]
    return _base2(tl.load(lse + at, inside, other=float("-inf")))


@triton.jit
def _base2(lse):  # type: ignore[no-untyped-def]
    """lse in base 2; inf for rows that see nothing, or are not there: all weighs 0 then."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit  # type: ignore[untyped-decorator]
def _load(x, strides, b, h, rows, inside, D: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows [rows, P] of a head of x [B, S, H, D]; 0 where there is none."""
    column = tl.arange(0, P)
    x += b * strides[0] + h * strides[2]
    at = x + rows[:, None] * strides[1] + column[None, :]
    return tl.load(at, inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _store(x, strides, b, h, rows, inside, found, D: tl.constexpr, P: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.arange(0, P)
    x += b * strides[0] + h * strides[2]
    at = x + rows[:, None] * strides[1] + column[None, :]
    tl.store(at, found.to(x.dtype.element_ty), inside[:, None] & (column < D)[None, :])
