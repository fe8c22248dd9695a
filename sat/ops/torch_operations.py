"""Floor 1: SDDMM, sparse softmax and SpMM on block values, and score statistics, in plain PyTorch on any device.

Shapes: B batch, H heads, L queries, S keys, D head dimension, b block size, M x N blocks, nnz kept blocks. Block
values are ``[B, nnz, b, b]`` in (head, row, column) order.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sat.layout import BlockLayout
from sat.ops.autocast import without_autocast
from sat.ops.checks import no_second_derivative
from sat.ops.moments import in_float64, skewness_from_moments

# Elements of a temporary that are computed at a time.
CHUNK_ELEMENTS = 2**22


def _entries(mask: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Block row and block column ``[nnz]`` of the kept blocks, each counted through the heads."""
    head, row, column = mask.expand(heads, -1, -1).nonzero(as_tuple=True)
    return head * mask.shape[1] + row, head * mask.shape[2] + column


def _to_blocks(x: Tensor, size: int) -> Tensor:
    """``[B, H, length, D]`` to ``[B, H * blocks, b, D]``, the last block filled up with 0."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % size))
    return x.reshape(x.shape[0], -1, size, x.shape[3])


def _split(batch: int, nnz: int, block_numel: int) -> range:
    return range(0, nnz, max(1, CHUNK_ELEMENTS // max(1, batch * block_numel)))


@torch.library.custom_op("sat::sddmm_torch", mutates_args=())
@without_autocast
def sddmm(query: Tensor, key: Tensor, mask: Tensor, nnz: int, block_size: int, fill: float) -> Tensor:
    """Kept blocks of ``query @ key^T``; positions past the end hold ``fill``."""
    batch, heads, query_length, dim = query.shape
    rows, columns = _entries(mask, heads)
    q_blocks, k_blocks = _to_blocks(query, block_size), _to_blocks(key, block_size)
    out = query.new_empty(batch, nnz, block_size, block_size)
    chunks = _split(batch, nnz, block_size * max(block_size, dim))
    for start in chunks:
        part = slice(start, start + chunks.step)
        out[:, part] = q_blocks[:, rows[part]] @ k_blocks[:, columns[part]].transpose(2, 3)
    if fill != 0:
        offset = torch.arange(block_size, device=query.device)
        past_rows = (rows % mask.shape[1])[:, None] * block_size + offset >= query_length
        past_columns = (columns % mask.shape[2])[:, None] * block_size + offset >= key.shape[2]
        out.masked_fill_(past_rows[:, :, None] | past_columns[:, None, :], fill)
    return out


@sddmm.register_fake
def _(query: Tensor, key: Tensor, mask: Tensor, nnz: int, block_size: int, fill: float) -> Tensor:
    return query.new_empty(query.shape[0], nnz, block_size, block_size)


@torch.library.custom_op("sat::spmm_torch", mutates_args=())
@without_autocast
def spmm(weights: Tensor, value: Tensor, mask: Tensor, transpose: bool, output_length: int) -> Tensor:
    """Block-sparse times dense, ``[B, H, output_length, D]``."""
    batch, heads, _, dim = value.shape
    nnz, size = weights.shape[1:3]
    rows, columns = _entries(mask, heads)
    if transpose:
        rows, columns, weights = columns, rows, weights.transpose(2, 3)
    blocks_out = mask.shape[2 if transpose else 1]
    v_blocks = _to_blocks(value, size)
    # Past the end there is nothing to be weighed, whatever the weights are there: scores of sddmm are -inf.
    past = None
    if value.shape[2] % size:
        past = (columns % (v_blocks.shape[1] // heads))[:, None] * size + torch.arange(size, device=value.device)
        past = (past >= value.shape[2])[:, None]
    # Half precisions are summed in float32, as one dense matrix product would.
    compute = torch.promote_types(value.dtype, torch.float32)
    out = value.new_zeros(batch, heads * blocks_out, size, dim, dtype=compute)
    chunks = _split(batch, nnz, size * dim)
    for start in chunks:
        part = slice(start, start + chunks.step)
        of_part = weights[:, part].to(compute)
        if past is not None:
            of_part = of_part.masked_fill(past[part], 0)
        out.index_add_(1, rows[part], of_part @ v_blocks[:, columns[part]].to(compute))
    out = out.view(batch, heads, blocks_out * size, dim)[:, :, :output_length]
    return out.to(value.dtype).contiguous()


@spmm.register_fake
def _(weights: Tensor, value: Tensor, mask: Tensor, transpose: bool, output_length: int) -> Tensor:
    return value.new_empty(value.shape[0], value.shape[1], output_length, value.shape[3])


def _sddmm_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _sddmm_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, mask = ctx.saved_tensors  # type: ignore[attr-defined]
    need_query, need_key, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
    d_query = spmm(grad, key, mask, False, query.shape[2]) if need_query else None
    d_key = spmm(grad, query, mask, True, key.shape[2]) if need_key else None
    return d_query, d_key, None, None, None, None


def _spmm_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.transpose = inputs[3]  # type: ignore[attr-defined]


def _spmm_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, value, mask = ctx.saved_tensors  # type: ignore[attr-defined]
    need_weights, need_value, *_ = ctx.needs_input_grad  # type: ignore[attr-defined]
    d_weights = d_value = None
    if need_weights:
        rows, columns = (value, grad) if ctx.transpose else (grad, value)  # type: ignore[attr-defined]
        d_weights = sddmm(rows, columns, mask, weights.shape[1], weights.shape[2], 0.0)
    if need_value:
        d_value = spmm(weights, grad, mask, not ctx.transpose, value.shape[2])  # type: ignore[attr-defined]
    return d_weights, d_value, None, None, None


sddmm.register_autograd(_sddmm_backward, setup_context=_sddmm_setup)
spmm.register_autograd(_spmm_backward, setup_context=_spmm_setup)


def _row_sums(x: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Sums ``[B, num_rows, b]`` over the blocks ``[B, nnz, b]`` of each row."""
    return x.new_zeros(x.shape[0], num_rows, x.shape[2]).index_add_(1, rows, x)


@torch.library.custom_op("sat::sparse_softmax_torch", mutates_args=())
@without_autocast
def sparse_softmax(
    scores: Tensor,
    bias_blocks: Tensor | None,
    allowed_blocks: Tensor | None,
    allowed_totals: Tensor | None,
    mask: Tensor,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Softmax over the kept blocks of each row.

    ``bias_blocks`` is ``[B|1, nnz, b, b]``, ``allowed_blocks`` the same in bool (False = not a candidate), and
    ``allowed_totals`` ``[B|1, M, b]`` counts every row's candidates, kept or pruned; given, each pruned one counts as
    a logit of 0.
    """
    compute = torch.promote_types(scores.dtype, torch.float32)
    rows, _ = _entries(mask, num_heads)
    num_rows = num_heads * mask.shape[1]
    x = scores.to(compute) * scale
    if bias_blocks is not None:
        x += bias_blocks
    if allowed_blocks is not None:
        x.masked_fill_(~allowed_blocks, -math.inf)
    pivot = x.new_full((x.shape[0], num_rows, x.shape[2]), -math.inf)
    pivot.scatter_reduce_(1, rows[None, :, None].expand(x.shape[0], -1, x.shape[2]), x.amax(3), "amax")
    pruned = None
    if allowed_totals is not None:
        kept = x.new_full((1, len(rows), x.shape[2]), x.shape[3])
        if allowed_blocks is not None:
            kept = allowed_blocks.sum(3, dtype=compute)
        pruned = allowed_totals.repeat(1, num_heads, 1).to(compute) - _row_sums(kept, rows, num_rows)
        pivot = torch.where(pruned > 0, pivot.clamp(min=0), pivot)
    pivot.masked_fill_(pivot == -math.inf, 0)
    x.sub_(pivot[:, rows].unsqueeze(3)).exp_()
    totals = _row_sums(x.sum(3), rows, num_rows)
    if pruned is not None:
        totals = totals + pruned * torch.exp(-pivot.clamp(min=0))
    return x.div_(totals.masked_fill_(totals == 0, 1)[:, rows].unsqueeze(3)).to(scores.dtype).contiguous()


@sparse_softmax.register_fake
def _(scores: Tensor, *args: object) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.custom_op("sat::sparse_softmax_torch_backward", mutates_args=())
@without_autocast
def sparse_softmax_backward(grad: Tensor, weights: Tensor, mask: Tensor, num_heads: int) -> Tensor:
    """Gradient to the scaled and biased scores: ``p * (dp - sum_j p_j dp_j)``, also with pruned logits of 0."""
    compute = torch.promote_types(grad.dtype, torch.float32)
    rows, _ = _entries(mask, num_heads)
    p, dp = weights.to(compute), grad.to(compute)
    mean = _row_sums((p * dp).sum(3), rows, num_heads * mask.shape[1])
    return (p * (dp - mean[:, rows].unsqueeze(3))).to(grad.dtype).contiguous()


@sparse_softmax_backward.register_fake
def _(grad: Tensor, weights: Tensor, mask: Tensor, num_heads: int) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


sparse_softmax_backward.register_autograd(no_second_derivative)


def _softmax_setup(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, bias_blocks, _, _, mask, num_heads, scale = inputs
    ctx.save_for_backward(output, mask)
    ctx.num_heads, ctx.scale = num_heads, scale  # type: ignore[attr-defined]
    ctx.bias_batch = None if bias_blocks is None else bias_blocks.shape[0]  # type: ignore[attr-defined]


def _softmax_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, mask = ctx.saved_tensors  # type: ignore[attr-defined]
    d_biased = sparse_softmax_backward(grad.contiguous(), weights, mask, ctx.num_heads)  # type: ignore[attr-defined]
    d_bias = None
    if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
        d_bias = d_biased.sum(0, keepdim=True) if ctx.bias_batch == 1 else d_biased  # type: ignore[attr-defined]
    return d_biased * ctx.scale, d_bias, *[None] * 5  # type: ignore[attr-defined]


sparse_softmax.register_autograd(_softmax_backward, setup_context=_softmax_setup)


@torch.library.custom_op("sat::attention_statistics_torch", mutates_args=())
@without_autocast
def attention_statistics(
    query: Tensor,
    key: Tensor,
    block_size: int,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    score_matrix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled means, skewness and (or empty) the score matrix, some query rows at a time."""
    batch, heads, query_length, _ = query.shape
    key_length = key.shape[2]
    compute = torch.promote_types(query.dtype, torch.float32)
    key = key.to(compute).transpose(2, 3)
    columns = -(-key_length // block_size)
    tail = columns * block_size - key_length
    matrix = query.new_empty((query_length, key_length) if score_matrix else (0,), dtype=torch.float32)
    pooled: list[Tensor] = []
    shift = sums = None
    # Whole block rows at a time, so that each is pooled at once; some samples at a time where a row of all is too much.
    samples = max(1, min(batch, CHUNK_ELEMENTS // (heads * key_length * block_size)))
    step = max(1, CHUNK_ELEMENTS // (samples * heads * key_length * block_size)) * block_size
    for start in range(0, query_length, step):
        rows = slice(start, min(start + step, query_length))
        future = None
        if is_causal:
            positions = torch.arange(rows.start, rows.stop, device=query.device)
            future = torch.arange(key_length, device=query.device) > positions[:, None]
        per_head = None
        for begin in range(0, batch, samples):
            group = slice(begin, begin + samples)
            scores = (query[group, :, rows].to(compute) * scale) @ key[group]
            padding = None if key_padding_mask is None else key_padding_mask[group]
            if padding is not None:
                scores.masked_fill_(~padding[:, None, None, :], -math.inf)
            if future is not None:
                scores.masked_fill_(future, -math.inf)
            weights = torch.softmax(scores, 3)
            del scores
            if padding is not None:  # rows without a single key: 0, not 0 / 0
                last = min(rows.stop, key_length) if is_causal else key_length
                seen = padding[:, :last].cumsum(1) > 0
                seen = seen[:, [min(i, last - 1) for i in range(rows.start, rows.stop)]] if is_causal else seen[:, -1:]
                weights.masked_fill_(~seen[:, None, :, None], 0)
            if query_padding_mask is not None:
                weights.mul_(query_padding_mask[group, None, rows, None])
            of_group = weights.sum(0)
            per_head = of_group if per_head is None else per_head.add_(of_group)
        assert per_head is not None
        per_head /= batch
        mean = per_head.mean(0)
        if score_matrix:
            matrix[rows] = mean
        # Power sums about the mean of the first rows, which is close to that of all: no cancellation.
        exact = in_float64(mean)
        shift = exact.mean() if shift is None else shift
        deviation = exact - shift
        of_rows = torch.stack([deviation.pow(power).sum() for power in range(4)])
        sums = of_rows if sums is None else sums + of_rows
        blocks = F.pad(per_head, (0, tail, 0, -per_head.shape[1] % block_size))
        pooled.append(blocks.unflatten(2, (columns, -1)).unflatten(1, (-1, block_size)).sum((2, 4)))
    assert shift is not None
    assert sums is not None
    first, second, third = (sums[1:] / sums[0]).unbind()
    skewness = skewness_from_moments(shift + first, second - first**2, third - 3 * first * second + 2 * first**3)
    return (
        torch.cat(pooled, 1).float() / _block_areas(query_length, key_length, block_size, query.device),
        skewness.float().to(query.device),
        matrix,
    )


def _block_areas(query_length: int, key_length: int, size: int, device: torch.device) -> Tensor:
    """``[M, N]``: how many elements each block has; fewer than b * b in the last row and column."""
    rows = (query_length - torch.arange(0, query_length, size, device=device)).clamp(max=size)
    columns = (key_length - torch.arange(0, key_length, size, device=device)).clamp(max=size)
    return rows[:, None] * columns


@attention_statistics.register_fake
def _(
    query: Tensor,
    key: Tensor,
    block_size: int,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    score_matrix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = query.shape[2], key.shape[2]
    blocks = [(length + block_size - 1) // block_size for length in lengths]
    return (
        query.new_empty(query.shape[1], *blocks, dtype=torch.float32),
        query.new_empty((), dtype=torch.float32),
        query.new_empty(lengths if score_matrix else (0,), dtype=torch.float32),
    )


def gather_blocks(dense: Tensor, kept: Tensor, size: int, fill: float) -> Tensor:
    """The kept blocks ``[B, nnz, b, b]`` of ``[B, H, L, S]`` (any strides); past the end they hold ``fill``.

    ``kept`` is ``[nnz, 3]``: head, row and column of each. Only the kept elements are read, and differentiated.
    """
    query_length, key_length = dense.shape[2:]
    head, row, column = kept.unbind(1)
    offset = torch.arange(size, device=dense.device)
    rows, columns = row[:, None] * size + offset, column[:, None] * size + offset
    past = (rows >= query_length)[:, :, None] | (columns >= key_length)[:, None, :]
    rows, columns = rows.clamp(max=query_length - 1), columns.clamp(max=key_length - 1)
    blocks = dense[:, head[:, None, None], rows[:, :, None], columns[:, None, :]]
    return blocks.masked_fill(past, fill)


def allowed_blocks(
    layout: BlockLayout,
    kept: Tensor,
    query_length: int,
    key_length: int,
    key_padding_mask: Tensor | None,
    is_causal: bool,
) -> tuple[Tensor | None, Tensor]:
    """What padding and causality permit: in the kept blocks, ``[B|1, nnz, b, b]`` (None = everything), and in each
    whole row, ``[B|1, M, b]``."""
    size, device = layout.block_size, layout.device
    row_blocks, column_blocks = layout.shape
    keys = torch.ones(1, key_length, dtype=torch.bool, device=device) if key_padding_mask is None else key_padding_mask
    keys = F.pad(keys, (0, column_blocks * size - key_length))
    positions = torch.arange(row_blocks * size, device=device)
    if is_causal:
        totals = keys.cumsum(1)[:, positions.clamp(max=keys.shape[1] - 1)]
    else:
        totals = keys.sum(1, keepdim=True).expand(-1, len(positions))
    totals = totals.reshape(-1, row_blocks, size)
    if key_padding_mask is None and not is_causal and query_length % size == 0 and key_length % size == 0:
        return None, totals
    _, row, column = kept.unbind(1)
    offset = torch.arange(size, device=device)
    rows, columns = row[:, None] * size + offset, column[:, None] * size + offset
    allowed = keys[:, columns][:, :, None, :] & (rows < query_length)[:, :, None]
    if is_causal:
        allowed = allowed & (columns[:, None, :] <= rows[:, :, None])
    return allowed, totals
