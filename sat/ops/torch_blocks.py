"""Floor 1: fused block-sparse attention in plain PyTorch, forward and backward, on any device.

Block rows that keep equally many blocks are gathered and computed together as batched matrix products, a bounded
number of scores at a time. So time grows with the kept blocks, and the memory for scores does not grow at all. What
does grow, beyond inputs and outputs: the indices, with the kept blocks of every sample; and one copy of each input that
is not contiguous, ends in a partial block or is of half precision, in a buffer that a CPU keeps for the next call (if
it is not larger than ``workspace.KEPT_BUFFER``). The backward pass computes the weights once more, so that nothing of
their size is kept in between. On a CPU block sums into key and value gradients go in a fixed order, so that results are
repeatable bit for bit; on a GPU PyTorch adds them atomically.

Shapes: B batch, H heads, L queries, S keys, D head dimension, b block size, M x N blocks; n block rows in a chunk,
each of which keeps k blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sat.ops.autocast import without_autocast
from sat.ops.checks import no_second_derivative
from sat.ops.workspace import Workspace

# Scores computed at a time. On a CPU the chunk's operands should stay in the second and third level caches.
CHUNK_SCORES_CPU = 2**18
CHUNK_SCORES_OTHER = 2**25


class Chunk(NamedTuple):
    """Block rows that are computed together."""

    rows: Tensor  # [n], block rows, counted through batch and heads: (sample * H + head) * M + row
    columns: Tensor  # [n * k], their kept block columns: (sample * H + head) * N + column
    blocks_per_row: int  # k


class Problem:
    """One call's shapes, masks and constants, shared by forward and backward."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor,
        block_size: int,
        key_padding_mask: Tensor | None,
        query_padding_mask: Tensor | None,
        attn_bias: Tensor | None,
        is_causal: bool,
        scale: float,
        count_pruned: bool,
    ) -> None:
        self.batch, self.heads, self.query_length, self.head_dim = query.shape
        self.key_length = key.shape[2]
        self.size = block_size
        self.mask = mask
        self.block_rows, self.block_columns = mask.shape[1:]
        self.device = query.device
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.is_causal, self.scale = is_causal, scale
        self.query_padding_mask = query_padding_mask
        self.key_allowed = self._key_allowed(key_padding_mask)
        self.bias = None if attn_bias is None else self.split_bias(attn_bias.to(self.dtype))
        self.workspace = Workspace(self.dtype, self.device)
        self.rows, self.columns = self._kept_blocks()
        self.counts = torch.bincount(self.rows, minlength=self.batch * self.heads * self.block_rows)
        self.allowed_totals = self._allowed_totals() if count_pruned else None

    def _key_allowed(self, key_padding_mask: Tensor | None) -> Tensor | None:
        """Bool ``[B, N * b]``, False at padding and past the end; None where nothing is forbidden."""
        tail = self.block_columns * self.size - self.key_length
        if key_padding_mask is None:
            if tail == 0:
                return None
            key_padding_mask = torch.ones(self.batch, self.key_length, dtype=torch.bool, device=self.device)
        return F.pad(key_padding_mask, (0, tail))

    def to_blocks(self, name: str, x: Tensor) -> Tensor:
        """``[B, H, length, D]`` to contiguous ``[B * H * blocks, b * D]``, the last block filled up with 0.

        A copy lies in the workspace under this name.
        """
        batch, heads, length, dim = x.shape
        tail = -length % self.size
        if tail == 0 and x.dtype == self.dtype and x.is_contiguous():
            return x.view(-1, self.size * dim)
        blocks = self.workspace.empty(name, batch, heads, length + tail, dim)
        blocks[:, :, :length] = x
        blocks[:, :, length:] = 0
        return blocks.view(-1, self.size * dim)

    def empty_rows(self, width: int) -> Tensor:
        """``[B * H * M, width]`` for one value a kept block row; rows without a kept block are 0 already."""
        rows = torch.empty(self.batch * self.heads * self.block_rows, width, dtype=self.dtype, device=self.device)
        return rows.index_fill_(0, (self.counts == 0).nonzero()[:, 0], 0)

    def from_blocks(self, x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        """Back to contiguous ``[B, H, length, D]``."""
        x = x.view(self.batch, self.heads, -1, self.head_dim)
        return x[:, :, :length].to(dtype).contiguous()

    def split_bias(self, bias: Tensor) -> Tensor:
        """A bias (or its gradient) by blocks, ``[B|1, H|1, M|1, N|1, b|1, b|1]``; broadcast dimensions stay 1."""
        tails = [-length % self.size if length > 1 else 0 for length in bias.shape[2:]]
        bias = F.pad(bias, (0, tails[1], 0, tails[0]))
        rows = (self.block_rows, self.size) if bias.shape[2] > 1 else (1, 1)
        columns = (self.block_columns, self.size) if bias.shape[3] > 1 else (1, 1)
        return bias.unflatten(3, columns).unflatten(2, rows).transpose(3, 4)

    def chunks(self) -> Iterator[Chunk]:
        """All kept blocks, grouped by the number of blocks in their row."""
        starts = self.counts.cumsum(0) - self.counts
        order = torch.argsort(self.counts, stable=True)
        limit = CHUNK_SCORES_CPU if self.device.type == "cpu" else CHUNK_SCORES_OTHER
        blocks_per_row, sizes = torch.unique_consecutive(self.counts[order], return_counts=True)
        for k, group in zip(blocks_per_row.tolist(), order.split(sizes.tolist()), strict=True):
            if k == 0:
                continue
            entries = starts[group][:, None] + torch.arange(k, device=self.device)
            group_columns = self.columns[entries]
            step = max(1, limit // (k * self.size * max(self.size, self.head_dim)))
            for part, part_columns in zip(group.split(step), group_columns.split(step), strict=True):
                yield Chunk(part, part_columns.reshape(-1), k)

    def _kept_blocks(self) -> tuple[Tensor, Tensor]:
        """Row and column (see :class:`Chunk`) of every kept block of every sample, in row order.

        Blocks that hold nothing but padding or the future are left out here, so they cost nothing.
        """
        head, row, column = self.mask.expand(self.heads, -1, -1).nonzero(as_tuple=True)
        if self.is_causal:
            past = column <= row
            head, row, column = head[past], row[past], column[past]
        sample = torch.arange(self.batch, device=self.device)[:, None]
        rows = (sample * self.heads + head) * self.block_rows + row
        columns = (sample * self.heads + head) * self.block_columns + column
        alive = None
        if self.key_allowed is not None:
            alive = self.key_allowed.view(self.batch, -1, self.size).any(2)[:, column]
        if self.query_padding_mask is not None:
            real = F.pad(self.query_padding_mask, (0, -self.query_length % self.size))
            real_rows = real.view(self.batch, -1, self.size).any(2)[:, row]
            alive = real_rows if alive is None else alive & real_rows
        if alive is not None:
            return rows[alive], columns[alive]
        return rows.reshape(-1), columns.reshape(-1)

    def locate(self, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample, head and block row ``[n, 1]``, and block column ``[n, k]`` of a chunk's blocks."""
        sample = chunk.rows // (self.heads * self.block_rows)
        head = chunk.rows // self.block_rows % self.heads
        row = chunk.rows % self.block_rows
        column = (chunk.columns % self.block_columns).view(len(chunk.rows), -1)
        return sample[:, None], head[:, None], row[:, None], column

    def allowed(self, chunk: Chunk) -> Tensor | None:
        """Bool ``[n, b|1, k * b]``: what padding and causality permit in a chunk; None where that is everything."""
        allowed = None
        sample, _, row, column = self.locate(chunk)
        if self.key_allowed is not None:
            keys = self.key_allowed.reshape(-1, self.size)[sample * self.block_columns + column]
            allowed = keys.view(len(chunk.rows), 1, -1)
        if self.is_causal:
            offset = torch.arange(self.size, device=self.device)
            queries = row[:, :, None] * self.size + offset[:, None]  # [n, b, 1]
            keys = (column[:, :, None] * self.size + offset).view(len(chunk.rows), 1, -1)
            allowed = keys <= queries if allowed is None else allowed & (keys <= queries)
        return allowed

    def weights(self, chunk: Chunk, query: Tensor, key: Tensor) -> Tensor:
        """Attention weights of a chunk, ``[n, b, k * b]``, in the workspace; 0 in rows without a key.

        Where pruned entries count as logits of 0, there is one more column, which holds the weight of all of them.
        """
        out = self.workspace.empty("scores", len(query), self.size, key.shape[1])
        scores = torch.baddbmm(out, query, key.transpose(1, 2), beta=0, alpha=self.scale, out=out)
        if self.bias is not None:
            scores += self.gather_bias(chunk)
        allowed = self.allowed(chunk)
        if allowed is not None:
            scores.masked_fill_(~allowed, -math.inf)
        if self.allowed_totals is not None:
            # c logits of 0 weigh as much as one logit of log c.
            scores = torch.cat([scores, self.pruned_count(chunk, allowed, self.allowed_totals).log()], 2)
        weights = torch.softmax(scores, 2, out=self.workspace.empty("weights", *scores.shape))
        if self.bias is not None or allowed is not None:
            weights.masked_fill_(scores.amax(2, keepdim=True) == -math.inf, 0)
        return weights

    def bias_index(self, chunk: Chunk, bias: Tensor) -> tuple[Tensor, ...]:
        """Index ``[n, k]`` of a chunk's blocks in the first four dimensions of a bias split into blocks."""
        index = self.locate(chunk)
        return tuple(x if length > 1 else torch.zeros_like(x) for x, length in zip(index, bias.shape[:4], strict=True))

    def gather_bias(self, chunk: Chunk) -> Tensor:
        """A chunk's bias, ``[n, b, k * b]``."""
        assert self.bias is not None
        blocks = self.bias[self.bias_index(chunk, self.bias)]  # [n, k, b|1, b|1]
        n, k = len(chunk.rows), chunk.blocks_per_row
        return blocks.transpose(1, 2).expand(n, self.size, k, self.size).reshape(n, self.size, -1)

    def pruned_count(self, chunk: Chunk, allowed: Tensor | None, totals: Tensor) -> Tensor:
        """``[n, b, 1]``: how many permitted keys each row leaves out."""
        kept = chunk.blocks_per_row * self.size if allowed is None else allowed.sum(-1, keepdim=True)
        sample, _, row, _ = self.locate(chunk)
        return totals[sample[:, 0], row[:, 0]].unsqueeze(-1) - kept

    def _allowed_totals(self) -> Tensor:
        """``[B, M, b]``: how many keys padding and causality permit each query."""
        ends = torch.arange(self.block_rows * self.size, device=self.device)
        if self.key_allowed is None:
            totals = (ends + 1).clamp(max=self.key_length) if self.is_causal else ends.new_full((), self.key_length)
            totals = totals.expand(self.batch, len(ends))
        elif self.is_causal:
            totals = self.key_allowed.cumsum(1)[:, ends.clamp(max=self.key_allowed.shape[1] - 1)]
        else:
            totals = self.key_allowed.sum(1, keepdim=True).expand(-1, len(ends))
        return totals.reshape(self.batch, self.block_rows, self.size).to(self.dtype)


def dropout_mask(like: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """0 or ``1 / (1 - p)`` in the shape of ``like``; forward and backward draw the same ones in the same order."""
    return torch.empty_like(like).bernoulli_(1 - p, generator=generator).div_(1 - p)


def _generator(seed: Tensor | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(int(seed))


@torch.library.custom_op("sat::block_attention_torch", mutates_args=())
@without_autocast
def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    block_size: int,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    attn_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    is_causal: bool,
    count_pruned: bool,
) -> Tensor:
    """Forward pass: the context ``[B, H, L, D]``.

    ``mask`` is ``[H|1, M, N]``. The arguments have been checked by :mod:`sat.ops`.
    """
    problem = Problem(
        query, key, mask, block_size, key_padding_mask, query_padding_mask, attn_bias, is_causal, scale, count_pruned
    )
    b, dim, work = block_size, problem.head_dim, problem.workspace
    q_blocks = problem.to_blocks("query blocks", query)
    k_blocks, v_blocks = problem.to_blocks("key blocks", key), problem.to_blocks("value blocks", value)
    out = problem.empty_rows(b * dim)
    generator = _generator(seed, query.device)
    for chunk in problem.chunks():
        n, k = len(chunk.rows), chunk.blocks_per_row
        q = work.gather("q", q_blocks, chunk.rows, n, b, dim)
        keys = work.gather("kv", k_blocks, chunk.columns, n, k * b, dim)
        weights = problem.weights(chunk, q, keys)[:, :, : k * b]
        if generator is not None:
            weights = weights.mul_(dropout_mask(weights, dropout_p, generator))
        values = work.gather("kv", v_blocks, chunk.columns, n, k * b, dim)
        context = torch.bmm(weights, values, out=work.empty("q", n, b, dim))
        out.index_copy_(0, chunk.rows, context.view(n, -1))
    context = problem.from_blocks(out, problem.query_length, query.dtype)
    if query_padding_mask is not None:
        context.masked_fill_(~query_padding_mask[:, None, :, None], 0)
    return context


@block_attention.register_fake
def _(query: Tensor, *args: object) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("sat::block_attention_torch_backward", mutates_args=())
@without_autocast
def block_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    block_size: int,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    attn_bias: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    is_causal: bool,
    count_pruned: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward pass: gradients to query, key, value and the bias (empty unless ``bias_grad``)."""
    problem = Problem(
        query, key, mask, block_size, key_padding_mask, query_padding_mask, attn_bias, is_causal, scale, count_pruned
    )
    b, dim, work = block_size, problem.head_dim, problem.workspace
    if query_padding_mask is not None:
        grad = grad.masked_fill(~query_padding_mask[:, None, :, None], 0)
    q_blocks, grad_blocks = problem.to_blocks("query blocks", query), problem.to_blocks("grad blocks", grad)
    k_blocks, v_blocks = problem.to_blocks("key blocks", key), problem.to_blocks("value blocks", value)
    d_query = problem.empty_rows(b * dim)
    d_key, d_value = torch.zeros_like(k_blocks), torch.zeros_like(v_blocks)
    d_bias = torch.zeros_like(problem.bias) if bias_grad and problem.bias is not None else None
    generator = _generator(seed, query.device)
    for chunk in problem.chunks():
        n, k = len(chunk.rows), chunk.blocks_per_row
        q = work.gather("q", q_blocks, chunk.rows, n, b, dim)
        keys = work.gather("kv", k_blocks, chunk.columns, n, k * b, dim)
        row_grad = work.gather("grad", grad_blocks, chunk.rows, n, b, dim)
        all_weights = problem.weights(chunk, q, keys)
        weights = all_weights[:, :, : k * b]
        drop = None if generator is None else dropout_mask(weights, dropout_p, generator)
        dropped = weights if drop is None else weights * drop
        column_grad = torch.bmm(dropped.transpose(1, 2), row_grad, out=work.empty("column_grad", n, k * b, dim))
        d_value.index_add_(0, chunk.columns, column_grad.view(n * k, -1))
        values = work.gather("value", v_blocks, chunk.columns, n, k * b, dim)
        # The scores have been used: their buffer is free.
        d_weights = torch.bmm(row_grad, values.transpose(1, 2), out=work.empty("scores", n, b, k * b))
        if drop is not None:
            d_weights.mul_(drop)
        if count_pruned:
            d_weights = F.pad(d_weights, (0, 1))
        d_scores = work.empty("d_scores", *all_weights.shape)
        torch.ops.aten._softmax_backward_data.out(d_weights, all_weights, 2, problem.dtype, grad_input=d_scores)
        d_scores = d_scores[:, :, : k * b]
        if d_bias is not None:
            _add_bias_grad(problem, chunk, d_scores, d_bias)
        row_d_query = work.empty("grad", n, b, dim)
        torch.baddbmm(row_d_query, d_scores, keys, beta=0, alpha=scale, out=row_d_query)
        d_query.index_copy_(0, chunk.rows, row_d_query.view(n, -1))
        torch.baddbmm(column_grad, d_scores.transpose(1, 2), q, beta=0, alpha=scale, out=column_grad)
        d_key.index_add_(0, chunk.columns, column_grad.view(n * k, -1))
    return (
        problem.from_blocks(d_query, problem.query_length, query.dtype),
        problem.from_blocks(d_key, problem.key_length, key.dtype),
        problem.from_blocks(d_value, problem.key_length, value.dtype),
        query.new_empty(0) if d_bias is None else _join_bias_grad(d_bias, attn_bias),
    )


def _add_bias_grad(problem: Problem, chunk: Chunk, d_scores: Tensor, d_bias: Tensor) -> None:
    blocks = d_scores.unflatten(2, (chunk.blocks_per_row, problem.size)).transpose(1, 2)  # [n, k, b, b]
    for dim in (2, 3):
        if d_bias.shape[dim + 2] == 1:
            blocks = blocks.sum(dim, keepdim=True)
    d_bias.index_put_(problem.bias_index(chunk, d_bias), blocks, accumulate=True)


def _join_bias_grad(d_bias: Tensor, attn_bias: Tensor | None) -> Tensor:
    assert attn_bias is not None
    joined = d_bias.transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return joined[:, :, : attn_bias.shape[2], : attn_bias.shape[3]].to(attn_bias.dtype).contiguous()


@block_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    block_size: int,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    attn_bias: Tensor | None,
    *constants: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_grad = constants[-1]
    d_bias = attn_bias.new_empty(attn_bias.shape) if bias_grad and attn_bias is not None else query.new_empty(0)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), d_bias


block_attention_backward.register_autograd(no_second_derivative)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    query, key, value, mask, size, key_padding, query_padding, bias, seed, *constants = inputs
    ctx.save_for_backward(query, key, value, mask, key_padding, query_padding, bias, seed)
    ctx.size, ctx.constants = size, constants  # type: ignore[attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    *dense, mask, key_padding, query_padding, bias, seed = ctx.saved_tensors  # type: ignore[attr-defined]
    size, constants = ctx.size, ctx.constants  # type: ignore[attr-defined]
    bias_grad = ctx.needs_input_grad[7]  # type: ignore[attr-defined]
    d_query, d_key, d_value, d_bias = block_attention_backward(
        grad, *dense, mask, size, key_padding, query_padding, bias, seed, *constants, bias_grad
    )
    return d_query, d_key, d_value, *[None] * 4, d_bias if bias_grad else None, *[None] * 5


block_attention.register_autograd(_backward, setup_context=_setup_context)
