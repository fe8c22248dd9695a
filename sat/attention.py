"""Floor 2: multi-head attention that is dense until it is given a layout, and block-sparse from then on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat import ops
from sat.layout import BlockLayout, check_int, check_is_layout
from sat.ops import checks
from sat.ops.autocast import as_autocast_does
from sat.ops.moments import skewness


class AdaptiveAttention(nn.Module):
    """Queries, keys and values in, context out; without projections, so that it fits into any model.

    The layout and the phase are buffers of fixed shape: a checkpoint of either phase loads into a fresh module, and no
    parameter appears or vanishes at the transition.

    Args:
        num_heads: ``H``.
        seq_len: the longest sequence, in tokens. Shorter ones use the layout's first rows and columns.
        block_size: edge of a block, in tokens.
        dropout: probability with which an attention weight is dropped in training.
        is_causal: query i sees keys 0 to i only.
        pruned: ``"drop"`` or ``"zero"``, see :func:`sat.ops.block_sparse_attention`.
        backend: backend of the sparse phase. The dense phase is PyTorch's fused attention, but where that would hold
            ``[L, S]``, with dropout on a CPU or with padding under ``is_causal``, block-sparse attention of all blocks.

    Raises:
        ValueError: an argument is out of range.
    """

    layout_mask: Tensor
    sparse: Tensor

    def __init__(
        self,
        num_heads: int,
        seq_len: int,
        block_size: int = 32,
        *,
        dropout: float = 0.0,
        is_causal: bool = False,
        pruned: ops.Pruned = "drop",
        backend: ops.Backend = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("num_heads", num_heads), ("seq_len", seq_len), ("block_size", block_size)):
            check_int(name, value, 1)
        if block_size > seq_len:
            raise ValueError(f"block_size {block_size} exceeds seq_len {seq_len}; choose smaller blocks")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.num_heads, self.seq_len, self.block_size = num_heads, seq_len, block_size
        self.dropout, self.is_causal, self.pruned, self.backend = dropout, is_causal, pruned, backend
        blocks = -(-seq_len // block_size)
        self.register_buffer("layout_mask", torch.ones(num_heads, blocks, blocks, dtype=torch.bool))
        self.register_buffer("sparse", torch.zeros((), dtype=torch.bool))
        # What the buffer ``sparse`` says, readable without waiting for the device, and which buffer it was read of, in
        # which version: another may stand in its place, after a move or in torch.func.functional_call.
        self._is_sparse = False
        self._sparse_read: tuple[Tensor, int] | None = (self.sparse, _version(self.sparse))
        self._current: tuple[tuple, BlockLayout] | None = None
        self.observe_samples = 0
        self.observe_score_matrix = True  # whether statistics are to have it: [L, S] of each layer
        self.observed_samples = 0  # how many there were
        self.statistics: ops.AttentionStatistics | None = None  # of all calls since it was last set to None
        # While it is there, backward passes leave the blocks' sensitivity as its gradient. No parameter, no buffer.
        self.block_gate: Tensor | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether a layout has been given; what others have written to the buffer counts, such as an average's copy.

        A compiled module notices that once this has been read outside of it.
        """
        sparse = self.sparse
        if torch.compiler.is_compiling() or sparse.is_meta or type(sparse) is not Tensor:  # fake ones have no value
            return self._is_sparse
        version = _version(sparse)
        if self._sparse_read is None or self._sparse_read[0] is not sparse or self._sparse_read[1] != version:
            try:
                self._is_sparse, self._sparse_read = bool(sparse), (sparse, version)
            except RuntimeError:  # nor has the one of many models that torch.func.vmap calls at once
                return self._is_sparse
        return self._is_sparse

    @property
    def layout(self) -> BlockLayout | None:
        """The layout in use, ``[H, M, N]``; None in the dense phase."""
        return BlockLayout(self.layout_mask.clone(), self.block_size) if self.is_sparse else None

    def set_layout(self, layout: BlockLayout | None) -> None:
        """Go on sparsely with a layout of H heads or one that all share; None: go on densely.

        Use this, or ``load_state_dict``: what else writes to the buffer ``layout_mask`` may not be noticed
        (``.data``, or a broadcast between processes, which is right only if all had the same layout before).

        Raises:
            TypeError: it is no layout, but a mask or a pattern.
            ValueError: the layout has another block size, number of heads or of blocks.
        """
        if layout is None:
            self.layout_mask.fill_(True)
        else:
            check_is_layout("layout", layout)
            heads, rows, columns = self.layout_mask.shape
            if layout.block_size != self.block_size:
                raise ValueError(f"the layout has blocks of {layout.block_size}, this attention of {self.block_size}")
            if layout.num_heads not in (1, heads) or layout.shape != (rows, columns):
                raise ValueError(
                    f"a layout for this attention has {heads} heads (or 1) and {rows} x {columns} blocks, got "
                    f"{layout.num_heads} and {layout.shape[0]} x {layout.shape[1]}"
                )
            self.layout_mask.copy_(layout.mask.expand_as(self.layout_mask))
        self.sparse.fill_(layout is not None)
        self._is_sparse, self._sparse_read = layout is not None, (self.sparse, _version(self.sparse))

    def reset_parameters(self) -> None:
        """Dense again; after ``to_empty``, for a module that was made on the device ``meta``."""
        self.set_layout(None)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        attn_bias: Tensor | None = None,
        scale: float | None = None,
        dropout_p: float | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[B, H, L, D]``.
            key: ``[B, H, S, D]``.
            value: ``[B, H, S, D]``. Under autocast all three are cast to its dtype, in either phase.
            key_padding_mask: bool ``[B, S]``, True = a real token.
            query_padding_mask: bool ``[B, L]``, True = a real token; in the sparse phase padded queries give 0.
            attn_bias: broadcastable to ``[B, H, L, S]``, added to the scaled scores, in the sparse phase only.
            scale: factor of the scores, ``D ** -0.5`` by default.
            dropout_p: probability with which a weight is dropped; by default ``dropout`` in training and 0 otherwise.

        Returns:
            ``[B, H, L, D]``.

        Raises:
            ValueError: more heads or tokens than this module was made for, shapes or devices that do not match, or an
                empty batch.
            TypeError: dtypes that do not, or a padding mask that is not of bools.
        """
        # Both phases and the statistics see one dtype, and refuse the same.
        query, key, value = as_autocast_does(query, key, value)
        checks.check_query_key(query, key, value)
        batch, heads, query_length, _ = query.shape
        key_length = key.shape[2]
        checks.check_padding("key_padding_mask", key_padding_mask, batch, key_length, query.device)
        checks.check_padding("query_padding_mask", query_padding_mask, batch, query_length, query.device)
        sparse = self.is_sparse
        if attn_bias is not None and not sparse:
            raise ValueError("the dense phase takes no attn_bias: its statistics would not know of it")
        if heads != self.num_heads or max(query_length, key_length) > self.seq_len:
            raise ValueError(
                f"this attention was made for {self.num_heads} heads and up to {self.seq_len} tokens, got {heads} "
                f"heads, {query_length} queries and {key_length} keys"
            )
        if attn_bias is not None and self.block_gate is not None:
            raise ValueError("an attention with attn_bias cannot be watched: the sensitivity would not know of it")
        if self.observing and not (sparse and self.block_gate is not None):
            self.observe(query, key, key_padding_mask, query_padding_mask, scale)
        dropout = dropout_p if dropout_p is not None else self.dropout if self.training else 0.0
        if sparse:
            context = ops.block_sparse_attention(
                query,
                key,
                value,
                self._layout_for(query_length, key_length),
                key_padding_mask=key_padding_mask,
                query_padding_mask=query_padding_mask,
                attn_bias=attn_bias,
                is_causal=self.is_causal,
                dropout_p=dropout,
                scale=scale,
                pruned=self.pruned,
                backend=self.backend,
            )
            watched = self.watch(context, query, key, value, key_padding_mask, scale)
            if watched is not context and query_padding_mask is not None:  # no block matters to them
                watched = watched.masked_fill(~query_padding_mask[:, None, :, None], 0)
            return watched
        if (dropout > 0 and query.device.type == "cpu") or (self.is_causal and key_padding_mask is not None):
            # PyTorch has no fused kernel for the first and none that needs no [L, S] mask for the second: by blocks, of
            # which all are kept. Exact, and what it holds grows with the length only.
            context = ops.block_sparse_attention(
                query,
                key,
                value,
                self._layout_for(query_length, key_length),
                key_padding_mask=key_padding_mask,
                is_causal=self.is_causal,
                dropout_p=dropout,
                scale=scale,
            )
        elif key_padding_mask is None:
            context = F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=self.is_causal, scale=scale
            )
        else:
            mask = key_padding_mask[:, None, None, :]
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
            # PyTorch's kernels disagree on rows without a key (0, NaN or the mean of all values); ours are 0.
            context = context.masked_fill(~mask.any(-1, keepdim=True), 0)
        return self.watch(context, query, key, value, key_padding_mask, scale)

    def _layout_for(self, query_length: int, key_length: int) -> BlockLayout:
        """The part of the layout that a batch needs.

        The same object again while nobody wrote to the buffer: what the operators have derived from it stays good.
        """
        rows, columns = (-(-length // self.block_size) for length in (query_length, key_length))
        mask = self.layout_mask[:, :rows, :columns]
        if torch.compiler.is_compiling() or mask.is_inference():
            return BlockLayout(mask, self.block_size, keep_mask=True)
        state = (mask.data_ptr(), mask._version, rows, columns)
        if self._current is None or self._current[0] != state:
            self._current = state, BlockLayout(mask, self.block_size, keep_mask=True)
        return self._current[1]

    def __getstate__(self) -> dict[str, Any]:
        # What a copy is to derive from its own buffer does not travel, nor that somebody watches the original.
        own = {"_current": None, "_sparse_read": None, "block_gate": None, "observe_samples": 0}
        return super().__getstate__() | own

    @property
    def observing(self) -> bool:
        """Whether a call leaves statistics: if they were asked for, and not in evaluation without gradients.

        A training that was broken off in an observed step has not taken its question back.
        """
        return self.observe_samples > 0 and (self.training or torch.is_grad_enabled())

    def observe(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> None:
        """Leave the statistics of the first ``observe_samples`` samples in ``statistics``; arguments as in forward.

        Statistics that are there already, of another call in the same batch, become means over the samples of both.
        """
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing, which computes the layer again in the backward pass: observed already
        first = slice(self.observe_samples)
        statistics = ops.attention_statistics(
            query[first],
            key[first],
            self.block_size,
            key_padding_mask=None if key_padding_mask is None else key_padding_mask[first],
            query_padding_mask=None if query_padding_mask is None else query_padding_mask[first],
            is_causal=self.is_causal,
            scale=scale,
            score_matrix=self.observe_score_matrix,
        )
        if query.shape[2] == key.shape[2] == self.seq_len:
            self._add(statistics, len(query[first]))
            return
        # Positions that this batch does not reach received no attention: one grid for batches of every length. A mean
        # over part of a block becomes one over all of it.
        reached = [self._reached(length, query.device) for length in (query.shape[2], key.shape[2])]
        pooled, matrix = (
            None if x is None else F.pad(x, (0, columns - x.shape[-1], 0, rows - x.shape[-2]))
            for x, (rows, columns) in (
                (statistics.pooled * torch.outer(*reached), self.layout_mask.shape[1:]),
                (statistics.score_matrix, (self.seq_len, self.seq_len)),
            )
        )
        assert pooled is not None
        # Of the whole matrix: that is what the mean over several batches and processes has.
        whole = statistics.skewness if matrix is None else skewness(matrix).float().to(matrix.device)
        self._add(ops.AttentionStatistics(pooled, whole, matrix), len(query[first]))

    def _add(self, new: ops.AttentionStatistics, samples: int) -> None:
        """A module that a model calls several times, such as a shared layer, is observed in all of its calls."""
        old = self.statistics
        if old is None:
            self.statistics, self.observed_samples = new, samples
            return
        self.observed_samples += samples
        share = samples / self.observed_samples
        matrix = None
        if new.score_matrix is not None and old.score_matrix is not None:
            matrix = old.score_matrix.lerp(new.score_matrix, share)
        mean = old.skewness.lerp(new.skewness, share) if matrix is None else skewness(matrix).float().to(matrix.device)
        self.statistics = ops.AttentionStatistics(old.pooled.lerp(new.pooled, share), mean, matrix)

    def _reached(self, length: int, device: torch.device) -> Tensor:
        """Which share of their tokens the blocks have that a sequence of this length reaches."""
        starts = torch.arange(0, length, self.block_size, device=device)
        return (length - starts).clamp(max=self.block_size) / (self.seq_len - starts).clamp(max=self.block_size)

    def watch(
        self,
        context: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """``context`` ``[B, H, L, D]`` again; its backward pass leaves the blocks' sensitivity in ``block_gate.grad``.

        Of the first ``observe_samples`` samples, if there is a ``block_gate``; see :func:`sat.ops.watch_blocks`.
        """
        if self.block_gate is None or not self.observe_samples or not torch.is_grad_enabled():
            return context
        first = slice(self.observe_samples)
        if self.statistics is None:  # else those know how many there were
            self.observed_samples = len(query[first])
        layout = self._layout_for(query.shape[2], key.shape[2]) if self.is_sparse else None
        return ops.watch_blocks(
            context,
            self.block_gate,
            query[first],
            key[first],
            value[first],
            self.block_size,
            layout=layout,
            key_padding_mask=None if key_padding_mask is None else key_padding_mask[first],
            is_causal=self.is_causal,
            scale=scale,
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._sparse_read = None
        _ = self.is_sparse  # read now, so that a compiled module knows

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        phase = "dense"
        if self.is_sparse:
            density = int(self.layout_mask.count_nonzero()) / self.layout_mask.numel()
            phase = f"sparse, density {density:.3f}"
        return f"num_heads={self.num_heads}, seq_len={self.seq_len}, block_size={self.block_size}, {phase}"


def _version(buffer: Tensor) -> int:
    """How often a buffer was written to; those of inference mode do not count it."""
    return -1 if buffer.is_inference() else buffer._version
