"""The Triton kernels of runtime/kernels/bias_attention.py. Imported only where Triton is used.

Shapes as in model_parts.py: q [B, H, T, D], k and v [B, G, T, D], table [H, L, L] with L >= T. A
tile is a rectangle of scores: M rows are queries, N columns are keys. Scores, probabilities and
sums are float32, in powers of 2: exp(s) is 2^(s log2(e)), and `log` [B, H, T] is the base-2
logarithm of the softmax's sum.

No kernel adds to what another program has written, so results have the same bits in every run. The
programs that read one tile of the table follow each other (the batch is the fastest axis of a
grid), so that memory gives it once. A program's own offsets are int64; within a tile they are
int32, but for the rows of the table.

Rows beyond T are read as 0. They see keys as others do, and add 0 to every sum.

In all kernels: NAME_b, NAME_h and NAME_t are the strides of a tensor's batch, heads and tokens.
J: query heads that share a head of keys. D: numbers in a head, W: the power of 2 that they are
padded to. DOT: the dtype of what is multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Below every score, and finite: a row of -inf so far then gives 0 and no NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def attention_bias_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    y_ptr,
    log_ptr,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    y_b,
    y_h,
    y_t,
    H,
    T,
    L,
    scale,
    J: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
):
    """y and log of M queries of one head. The longest rows begin first."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * M
    features, rows, columns = tl.arange(0, W), tl.arange(0, M), tl.arange(0, N)
    is_feature, is_row = features < D, rows < T - first
    in_row = is_row[:, None] & is_feature[None, :]
    start = first.to(tl.int64)
    q_tile = q_ptr + b * q_b + h * q_h + start * q_t + rows[:, None] * q_t + features[None, :]
    q = tl.load(q_tile, mask=in_row, other=0.0).to(DOT)
    k_tile = k_ptr + b * k_b + h // J * k_h + features[:, None] + columns[None, :] * k_t
    v_tile = v_ptr + b * v_b + h // J * v_h + columns[:, None] * v_t + features[None, :]
    table_tile = table_ptr + (h * L + first) * L + rows[:, None].to(tl.int64) * L + columns[None, :]
    highest = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, W], tl.float32)
    for key in range(0, tl.minimum(first + M, T), N):
        is_key = columns < T - key
        seen = columns[None, :] <= (rows + (first - key))[:, None]
        k = tl.load(k_tile, mask=is_feature[:, None] & is_key[None, :], other=0.0).to(DOT)
        bias = tl.load(table_tile, mask=is_row[:, None] & is_key[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * (scale * LOG2_E)
        scores += bias.to(tl.float32) * LOG2_E
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(v_tile, mask=is_key[:, None] & is_feature[None, :], other=0.0).to(DOT)
        p = p.to(v_ptr.dtype.element_ty).to(DOT)
        sums = sums * shrink[:, None] + tl.dot(p, v, input_precision="ieee")
        highest = higher
        k_tile += N * k_t
        v_tile += N * v_t
        table_tile += N
    y = (sums / total[:, None]).to(y_ptr.dtype.element_ty)
    y_tile = y_ptr + b * y_b + h * y_h + start * y_t + rows[:, None] * y_t + features[None, :]
    tl.store(y_tile, y, mask=in_row)
    tl.store(log_ptr + (b * H + h) * T + first + rows, highest + tl.log2(total), mask=is_row)


@triton.jit
def attention_bias_delta(
    y_ptr,
    dy_ptr,
    delta_ptr,
    y_b,
    y_h,
    y_t,
    dy_b,
    dy_h,
    dy_t,
    H,
    T,
    D: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
):
    """delta [B, H, T]: the sum over the features of the output times its gradient, of M queries."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * M
    features, rows = tl.arange(0, W), tl.arange(0, M)
    is_row = rows < T - first
    in_row = is_row[:, None] & (features < D)[None, :]
    start = first.to(tl.int64)
    y_tile = y_ptr + b * y_b + h * y_h + start * y_t + rows[:, None] * y_t + features[None, :]
    dy_tile = dy_ptr + b * dy_b + h * dy_h + start * dy_t + rows[:, None] * dy_t + features[None, :]
    y = tl.load(y_tile, mask=in_row, other=0.0).to(tl.float32)
    dy = tl.load(dy_tile, mask=in_row, other=0.0).to(tl.float32)
    tl.store(delta_ptr + (b * H + h) * T + first + rows, tl.sum(y * dy, 1), mask=is_row)


@triton.jit
def attention_bias_backward_q(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    dy_ptr,
    log_ptr,
    delta_ptr,
    dq_ptr,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    dy_b,
    dy_h,
    dy_t,
    dq_b,
    dq_h,
    dq_t,
    H,
    T,
    L,
    scale,
    J: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
):
    """The gradient of M queries of one head. The longest rows begin first."""
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * M
    features, rows, columns = tl.arange(0, W), tl.arange(0, M), tl.arange(0, N)
    is_feature, is_row = features < D, rows < T - first
    in_row = is_row[:, None] & is_feature[None, :]
    start = first.to(tl.int64)
    q_tile = q_ptr + b * q_b + h * q_h + start * q_t + rows[:, None] * q_t + features[None, :]
    dy_tile = dy_ptr + b * dy_b + h * dy_h + start * dy_t + rows[:, None] * dy_t + features[None, :]
    q = tl.load(q_tile, mask=in_row, other=0.0).to(DOT)
    dy = tl.load(dy_tile, mask=in_row, other=0.0).to(DOT)
    at = (b * H + h) * T + first + rows
    log = tl.load(log_ptr + at, mask=is_row, other=0.0)[:, None]
    delta = tl.load(delta_ptr + at, mask=is_row, other=0.0)[:, None]
    k_tile = k_ptr + b * k_b + h // J * k_h + features[:, None] + columns[None, :] * k_t
    v_tile = v_ptr + b * v_b + h // J * v_h + features[:, None] + columns[None, :] * v_t
    table_tile = table_ptr + (h * L + first) * L + rows[:, None].to(tl.int64) * L + columns[None, :]
    sums = tl.zeros([M, W], tl.float32)
    for key in range(0, tl.minimum(first + M, T), N):
        is_key = columns < T - key
        in_column = is_feature[:, None] & is_key[None, :]
        seen = columns[None, :] <= (rows + (first - key))[:, None]
        k = tl.load(k_tile, mask=in_column, other=0.0).to(DOT)
        v = tl.load(v_tile, mask=in_column, other=0.0).to(DOT)
        bias = tl.load(table_tile, mask=is_row[:, None] & is_key[None, :], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * (scale * LOG2_E)
        scores += bias.to(tl.float32) * LOG2_E
        p = tl.where(seen, tl.exp2(scores - log), 0.0)
        ds = p * (tl.dot(dy, v, input_precision="ieee") - delta)
        ds = ds.to(k_ptr.dtype.element_ty).to(DOT)
        sums += tl.dot(ds, tl.trans(k), input_precision="ieee")
        k_tile += N * k_t
        v_tile += N * v_t
        table_tile += N
    dq_tile = dq_ptr + b * dq_b + h * dq_h + start * dq_t + rows[:, None] * dq_t + features[None, :]
    tl.store(dq_tile, (sums * scale).to(dq_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def attention_bias_backward_kv(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    dy_ptr,
    log_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    dy_b,
    dy_h,
    dy_t,
    dk_b,
    dk_h,
    dk_t,
    dv_b,
    dv_h,
    dv_t,
    H,
    T,
    L,
    scale,
    J: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
):
    """The gradients of N keys and values of one head, over the heads that share it in order."""
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    key = tl.program_id(2) * N
    features, rows, columns = tl.arange(0, W), tl.arange(0, M), tl.arange(0, N)
    is_feature, is_key = features < D, columns < T - key
    in_column = is_feature[:, None] & is_key[None, :]
    start = key.to(tl.int64)
    k_tile = k_ptr + b * k_b + g * k_h + start * k_t + columns[None, :] * k_t + features[:, None]
    v_tile = v_ptr + b * v_b + g * v_h + start * v_t + columns[None, :] * v_t + features[:, None]
    k = tl.load(k_tile, mask=in_column, other=0.0).to(DOT)
    v = tl.load(v_tile, mask=in_column, other=0.0).to(DOT)
    dk = tl.zeros([N, W], tl.float32)
    dv = tl.zeros([N, W], tl.float32)
    # The first tile of rows that sees one of these keys.
    top = key // M * M
    for j in range(0, J):
        h = g * J + j
        q_tile = q_ptr + b * q_b + h * q_h + top.to(tl.int64) * q_t
        q_tile += rows[:, None] * q_t + features[None, :]
        dy_tile = dy_ptr + b * dy_b + h * dy_h + top.to(tl.int64) * dy_t
        dy_tile += rows[:, None] * dy_t + features[None, :]
        at = (b * H + h) * T + rows
        table_tile = table_ptr + (h * L + top) * L + key
        table_tile += rows[:, None].to(tl.int64) * L + columns[None, :]
        for first in range(top, T, M):
            is_row = rows < T - first
            in_row = is_row[:, None] & is_feature[None, :]
            seen = columns[None, :] <= (rows + (first - key))[:, None]
            q = tl.load(q_tile, mask=in_row, other=0.0).to(DOT)
            dy = tl.load(dy_tile, mask=in_row, other=0.0).to(DOT)
            log = tl.load(log_ptr + at + first, mask=is_row, other=0.0)[:, None]
            delta = tl.load(delta_ptr + at + first, mask=is_row, other=0.0)[:, None]
            bias = tl.load(table_tile, mask=is_row[:, None] & is_key[None, :], other=0.0)
            scores = tl.dot(q, k, input_precision="ieee") * (scale * LOG2_E)
            scores += bias.to(tl.float32) * LOG2_E
            p = tl.where(seen, tl.exp2(scores - log), 0.0)
            ds = p * (tl.dot(dy, v, input_precision="ieee") - delta)
            p = p.to(q_ptr.dtype.element_ty).to(DOT)
            ds = ds.to(q_ptr.dtype.element_ty).to(DOT)
            dv += tl.dot(tl.trans(p), dy, input_precision="ieee")
            dk += tl.dot(tl.trans(ds), q, input_precision="ieee")
            q_tile += M * q_t
            dy_tile += M * dy_t
            table_tile += tl.cast(L, tl.int64) * M
    dk_tile = dk_ptr + b * dk_b + g * dk_h + start * dk_t
    dk_tile += columns[:, None] * dk_t + features[None, :]
    dv_tile = dv_ptr + b * dv_b + g * dv_h + start * dv_t
    dv_tile += columns[:, None] * dv_t + features[None, :]
    in_key = is_key[:, None] & is_feature[None, :]
    tl.store(dk_tile, (dk * scale).to(dk_ptr.dtype.element_ty), mask=in_key)
    tl.store(dv_tile, dv.to(dv_ptr.dtype.element_ty), mask=in_key)


# Not compiled again for batches of other sizes.
@triton.jit(do_not_specialize=["B"])
def attention_bias_backward_table(
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    dy_ptr,
    log_ptr,
    delta_ptr,
    dtable_ptr,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    dy_b,
    dy_h,
    dy_t,
    H,
    T,
    L,
    scale,
    B,
    J: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of the table's gradient, summed over the batch in order and written once.

    Zeros where no query sees the key, and beyond T.
    """
    key, first = tl.program_id(0) * N, tl.program_id(1) * M
    h = tl.program_id(2).to(tl.int64)
    features, rows, columns = tl.arange(0, W), tl.arange(0, M), tl.arange(0, N)
    there = (h * L + first) * L + key + rows[:, None].to(tl.int64) * L + columns[None, :]
    sums = tl.zeros([M, N], tl.float32)
    if (key < first + M) & (first < T):
        is_feature, is_row = features < D, rows < T - first
        in_row = is_row[:, None] & is_feature[None, :]
        is_key = columns < T - key
        in_column = is_feature[:, None] & is_key[None, :]
        seen = is_row[:, None] & (columns[None, :] <= (rows + (first - key))[:, None])
        bias = tl.load(table_ptr + there, mask=is_row[:, None] & is_key[None, :], other=0.0)
        bias = bias.to(tl.float32) * LOG2_E
        q_tile = q_ptr + h * q_h + first.to(tl.int64) * q_t
        q_tile += rows[:, None] * q_t + features[None, :]
        dy_tile = dy_ptr + h * dy_h + first.to(tl.int64) * dy_t
        dy_tile += rows[:, None] * dy_t + features[None, :]
        k_tile = k_ptr + h // J * k_h + key.to(tl.int64) * k_t
        k_tile += features[:, None] + columns[None, :] * k_t
        v_tile = v_ptr + h // J * v_h + key.to(tl.int64) * v_t
        v_tile += features[:, None] + columns[None, :] * v_t
        at = h * T + first + rows
        for _ in range(0, B):
            q = tl.load(q_tile, mask=in_row, other=0.0).to(DOT)
            dy = tl.load(dy_tile, mask=in_row, other=0.0).to(DOT)
            k = tl.load(k_tile, mask=in_column, other=0.0).to(DOT)
            v = tl.load(v_tile, mask=in_column, other=0.0).to(DOT)
            log = tl.load(log_ptr + at, mask=is_row, other=0.0)[:, None]
            delta = tl.load(delta_ptr + at, mask=is_row, other=0.0)[:, None]
            scores = tl.dot(q, k, input_precision="ieee") * (scale * LOG2_E) + bias
            p = tl.where(seen, tl.exp2(scores - log), 0.0)
            sums += p * (tl.dot(dy, v, input_precision="ieee") - delta)
            q_tile += q_b
            dy_tile += dy_b
            k_tile += k_b
            v_tile += v_b
            at += tl.cast(H, tl.int64) * T
    inside = (rows < L - first)[:, None] & (columns < L - key)[None, :]
    tl.store(dtable_ptr + there, sums.to(dtable_ptr.dtype.element_ty), mask=inside)
