"""Floor 1: the public operators. They check their arguments and choose the backend.

Shapes: B batch, H heads, L queries, S keys, D head dimension, b block size, M x N blocks, nnz kept blocks (counted over
all H heads). Block values ``[B, nnz, b, b]`` stand in (head, row, column) order.

Backends: ``"reference"`` is dense and masked, the specification; ``"torch"`` computes the kept blocks only, in plain
PyTorch, on any device; ``"triton"`` does so in kernels of our own, on NVIDIA GPUs from compute capability 8.0 on, in
float32 (exact, unless ``torch.set_float32_matmul_precision`` chose tf32), bfloat16 and float16, for blocks of 16, 32,
64 and 128 and head dimensions from 8 to 256. ``"auto"`` takes ``"triton"`` for whatever of this lies on a GPU, and
``"torch"`` for everything else. A backend that was asked for by name never silently becomes another.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sat.layout import BlockLayout
from sat.ops import checks, masks, reference, sensitivity, torch_blocks, torch_operations
from sat.ops.types import AttentionStatistics

try:
    from sat.ops import triton
except ImportError as error:
    if error.name != "triton":
        raise
    triton = None  # type: ignore[assignment]

__all__ = [
    "AttentionStatistics",
    "attention_statistics",
    "block_sensitivity",
    "block_sparse_attention",
    "matmul",
    "sddmm",
    "sparse_softmax",
    "spmm",
    "watch_blocks",
]

Backend = Literal["auto", "reference", "torch", "triton"]
Pruned = Literal["drop", "zero"]
MaskMode = masks.MaskMode


def _choose_backend(backend: str, x: Tensor, block_size: int, head_dim: int | None = None) -> str:
    """The backend by which to compute on tensors like ``x``."""
    checks.check_choice("backend", backend, ("auto", "reference", "torch", "triton"))
    if backend in ("reference", "torch") or (backend == "auto" and x.device.type != "cuda"):
        return "torch" if backend == "auto" else backend
    if triton is None:
        reason = "the package triton is not installed"
    else:
        reason = triton.unsupported(x.device, x.dtype, block_size, head_dim)
    if backend == "triton" and reason is not None:
        raise RuntimeError(f"backend='triton' cannot take this case: {reason}; use backend='torch' or 'auto'")
    return "triton" if reason is None else "torch"


def _is_interpreted() -> bool:
    """Whether Triton's kernels will run in its interpreter, and not only be traced."""
    return triton.INTERPRETED and not torch.compiler.is_compiling()


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    pruned: Pruned = "drop",
    backend: Backend = "auto",
    fused: bool = True,
) -> Tensor:
    """Scaled dot-product attention over the kept blocks; exact, differentiable in query, key, value and bias.

    Args:
        query: ``[B, H, L, D]``, any strides.
        key: ``[B, H, S, D]``.
        value: ``[B, H, S, D]``.
        layout: which blocks exist; one for each head or one that all share.
        key_padding_mask: bool ``[B, S]``, True = a real token, as in ``scaled_dot_product_attention``.
        query_padding_mask: bool ``[B, L]``, True = a real token. Padded queries give 0, and whole blocks of them cost
            nothing.
        attn_bias: broadcastable to ``[B, H, L, S]``, added to the scaled scores.
        is_causal: query i sees keys 0 to i only, exact to the element.
        dropout_p: probability with which a weight is dropped. The random stream is PyTorch's on the CPU; which weights
            fall differs between backends.
        scale: factor of the scores, ``D ** -0.5`` by default.
        pruned: ``"drop"`` leaves entries outside the layout out of the softmax. ``"zero"`` counts each of them as a
            logit of 0 in the denominator, as the paper's kernel does (Yoon et al. 2024, section 2 of its softmax),
            except those that ``key_padding_mask`` or ``is_causal`` forbid.
        backend: see the module.
        fused: False composes :func:`sddmm`, :func:`sparse_softmax` and :func:`spmm`, which holds the kept scores.

    Returns:
        ``[B, H, L, D]`` in the dtype of ``query``. A query without a single kept key gives 0, and gradients 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not go together.
        RuntimeError: the backend is not available here.
    """
    checks.check_query_key(query, key, value)
    checks.check_layout(layout, query, "query")
    batch, heads, query_length, head_dim = query.shape
    key_length = key.shape[2]
    checks.check_lengths(layout, query_length, key_length)
    checks.check_padding("key_padding_mask", key_padding_mask, batch, key_length, query.device)
    checks.check_padding("query_padding_mask", query_padding_mask, batch, query_length, query.device)
    attn_bias = checks.check_bias(attn_bias, (batch, heads, query_length, key_length), query.device)
    checks.check_probability("dropout_p", dropout_p)
    checks.check_scale(scale)
    checks.check_choice("pruned", pruned, ("drop", "zero"))
    backend_name = _choose_backend(backend, query, layout.block_size, head_dim)
    checks.check_no_tangents(backend_name, query, key, value, attn_bias)
    scale = head_dim**-0.5 if scale is None else scale
    if not fused:
        # Scaled first: the products of half precisions may be too large for them.
        scores = sddmm(query * scale, key, layout, backend=backend)
        weights = sparse_softmax(
            scores,
            layout,
            attn_bias=attn_bias,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            pruned=pruned,
            num_heads=heads,
            query_length=query_length,
            key_length=key_length,
            backend=backend,
        )
        context = spmm(F.dropout(weights, dropout_p), value, layout, output_length=query_length, backend=backend)
        return context if query_padding_mask is None else context * query_padding_mask[:, None, :, None]
    if backend_name == "reference":
        return reference.block_sparse_attention(
            query,
            key,
            value,
            layout,
            dropout_p=dropout_p,
            key_padding_mask=key_padding_mask,
            query_padding_mask=query_padding_mask,
            attn_bias=attn_bias,
            is_causal=is_causal,
            scale=scale,
            pruned=pruned,
        )
    if backend_name == "triton":
        if _is_interpreted():
            triton.warn_if_slow(batch * _total_blocks(layout, query) * layout.block_size**2)
        return triton.block_sparse_attention(
            query,
            key,
            value,
            layout,
            key_padding_mask=key_padding_mask,
            query_padding_mask=query_padding_mask,
            attn_bias=attn_bias,
            is_causal=is_causal,
            dropout_p=dropout_p,
            scale=scale,
            pruned=pruned,
        )
    seed = torch.randint(2**62, ()) if dropout_p > 0 else None
    return torch_blocks.block_attention(
        query,
        key,
        value,
        layout.mask,
        layout.block_size,
        key_padding_mask,
        query_padding_mask,
        attn_bias,
        seed,
        dropout_p,
        scale,
        is_causal,
        pruned == "zero",
    )


def sddmm(query: Tensor, key: Tensor, layout: BlockLayout, *, backend: Backend = "auto") -> Tensor:
    """The kept blocks of ``query @ key^T`` (sampled dense-dense matrix product).

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, H, S, D]``.
        layout: the blocks to compute.
        backend: see the module.

    Returns:
        ``[B, nnz, b, b]``, not scaled. Where the last block reaches past the end of the sequence, its entries are
        -inf: they are no positions, and a softmax gives them no weight.
    """
    return _sddmm(query, key, layout, -torch.inf, backend)


def _sddmm(query: Tensor, key: Tensor, layout: BlockLayout, fill: float, backend: Backend) -> Tensor:
    """The same with other values than -inf past the end."""
    checks.check_query_key(query, key)
    checks.check_layout(layout, query, "query")
    checks.check_lengths(layout, query.shape[2], key.shape[2])
    chosen = _choose_backend(backend, query, layout.block_size, query.shape[3])
    checks.check_no_tangents(chosen, query, key)
    if chosen == "reference":
        return reference.sddmm(query, key, layout, fill)
    if chosen == "triton":
        if _is_interpreted():
            triton.warn_if_slow(len(query) * _total_blocks(layout, query) * layout.block_size**2)
        return triton.sddmm(query, key, layout, fill)
    return torch_operations.sddmm(query, key, layout.mask, _total_blocks(layout, query), layout.block_size, fill)


def sparse_softmax(
    scores: Tensor,
    layout: BlockLayout,
    *,
    scale: float = 1.0,
    attn_bias: Tensor | None = None,
    rpe: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask_mode: MaskMode = "add",
    attn_mask_mode: MaskMode = "add",
    is_causal: bool = False,
    pruned: Pruned = "drop",
    num_heads: int | None = None,
    query_length: int | None = None,
    key_length: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax of ``scores * scale + attn_bias`` over the kept blocks of each row, computed in float32 or better.

    Biases and masks may be given together; differentiable in the scores and in all that is added. ``rpe`` and the
    masks' numbers and modes are those of DeepSpeed's sparse softmax.

    Args:
        scores: ``[B, nnz, b, b]``, from :func:`sddmm`.
        layout: where these blocks lie.
        scale: factor of the scores; the bias is not scaled.
        attn_bias: broadcastable to ``[B, H, L, S]``.
        rpe: a relative position embedding: the same as ``attn_bias``, by another name, and added to it.
        key_padding_mask: ``[B, S]``, bool with True = a real token, or numbers as ``key_padding_mask_mode`` says.
        attn_mask: broadcastable to ``[B, H, L, S]``, bool with True = may attend, or numbers as ``attn_mask_mode``
            says.
        key_padding_mask_mode: ``"add"`` adds the numbers of a mask, which must be floating-point, to the scaled scores;
            ``"mul"`` masks where they are 0. Either takes bools as above.
        attn_mask_mode: the same for ``attn_mask``.
        is_causal: query i sees keys 0 to i only.
        pruned: as in :func:`block_sparse_attention`. Of the masks only ``is_causal`` and a ``key_padding_mask`` that is
            bool or in the mode ``"mul"`` bear on pruned entries; biases and ``attn_mask`` are for the kept ones.
        num_heads: heads that share a layout of one head; by default inferred from the number of blocks.
        query_length: L, by default from ``attn_bias``, ``rpe`` or ``attn_mask``, or whole blocks.
        key_length: S, by default from ``key_padding_mask``, ``attn_bias``, ``rpe`` or ``attn_mask``, or whole blocks.
            With ``pruned="zero"`` and a partial last block it must be known.
        backend: see the module.

    Returns:
        ``[B, nnz, b, b]`` in the dtype of ``scores``. Rows without a single kept key are 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or modes that do not go together.
        RuntimeError: the backend is not available here.
    """
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout must be a BlockLayout, got {type(layout).__name__}")
    num_heads = checks.check_values("scores", scores, layout, num_heads)
    checks.check_scale(scale)
    checks.check_choice("pruned", pruned, ("drop", "zero"))
    size, batch = layout.block_size, scores.shape[0]
    if key_length is None and isinstance(key_padding_mask, Tensor) and key_padding_mask.dim() == 2:
        key_length = key_padding_mask.shape[1]
    sizes = [(1, 1, *x.shape)[-2:] for x in (attn_bias, rpe, attn_mask) if isinstance(x, Tensor)]
    lengths = []
    for dim, (given, blocks) in enumerate(zip((query_length, key_length), layout.shape, strict=True)):
        found = (bias_size[dim] for bias_size in sizes if bias_size[dim] > 1)
        lengths.append(given if given is not None else next(found, blocks * size))
    query_length, key_length = lengths
    checks.check_lengths(layout, query_length, key_length)
    chosen = _choose_backend(backend, scores, size)
    checks.check_no_tangents(chosen, scores, attn_bias, rpe)
    if scale <= 0:  # what is no position, -inf from sddmm, stays so under any factor
        scores, scale = torch.where(scores == -torch.inf, scores, scores * scale), 1.0
    key_padding_mask, attn_bias = masks.combine(
        scores,
        (batch, num_heads, query_length, key_length),
        attn_bias=attn_bias,
        rpe=rpe,
        key_padding_mask=key_padding_mask,
        attn_mask=attn_mask,
        key_padding_mask_mode=key_padding_mask_mode,
        attn_mask_mode=attn_mask_mode,
    )
    if chosen != "torch":
        if chosen == "triton" and _is_interpreted():
            triton.warn_if_slow(scores.numel())
        return (triton if chosen == "triton" else reference).sparse_softmax(
            scores,
            layout,
            num_heads=num_heads,
            query_length=query_length,
            key_length=key_length,
            scale=scale,
            attn_bias=attn_bias,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
            pruned=pruned,
        )
    # Found once: to a compiler, each search has a number of blocks of its own.
    mask, bias_blocks = layout.mask, None
    kept = mask.expand(num_heads, -1, -1).nonzero()
    if attn_bias is not None:
        compute = torch.promote_types(scores.dtype, torch.float32)
        expanded = attn_bias.expand(-1, num_heads, query_length, key_length)
        bias_blocks = torch_operations.gather_blocks(expanded, kept, layout.block_size, 0.0).to(compute)
    allowed_blocks, allowed_totals = torch_operations.allowed_blocks(
        layout, kept, query_length, key_length, key_padding_mask, is_causal
    )
    return torch_operations.sparse_softmax(
        scores,
        bias_blocks,
        allowed_blocks,
        allowed_totals if pruned == "zero" else None,
        mask,
        num_heads,
        scale,
    )


def spmm(
    weights: Tensor,
    value: Tensor,
    layout: BlockLayout,
    *,
    transpose: bool = False,
    output_length: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Block-sparse times dense: ``weights @ value``, or ``weights^T @ value``.

    Args:
        weights: ``[B, nnz, b, b]``, the values of a block-sparse ``[B, H, L, S]``.
        value: ``[B, H, S, D]``; with ``transpose`` ``[B, H, L, D]``.
        layout: where the blocks lie.
        transpose: multiply by the transposed matrix.
        output_length: rows of the result. By default those of ``value`` on a layout of as many block rows as columns
            (for L other than S it must then be given), and whole blocks on any other.
        backend: see the module.

    Returns:
        ``[B, H, L, D]``; with ``transpose`` ``[B, H, S, D]``. Rows without a block are 0.
    """
    checks.check_dense(value=value)
    checks.check_layout(layout, value, "value")
    checks.check_values("weights", weights, layout, value.shape[1])
    if weights.dtype != value.dtype:
        raise TypeError(f"weights are {weights.dtype} but value is {value.dtype}; convert them to one dtype")
    if weights.shape[0] != value.shape[0]:
        raise ValueError(f"weights have a batch of {weights.shape[0]}, value one of {value.shape[0]}")
    rows, columns = layout.shape
    if output_length is None:
        output_length = value.shape[2] if rows == columns else (columns if transpose else rows) * layout.block_size
    lengths = (value.shape[2], output_length) if transpose else (output_length, value.shape[2])
    checks.check_lengths(layout, *lengths)
    chosen = _choose_backend(backend, value, layout.block_size, value.shape[3])
    checks.check_no_tangents(chosen, weights, value)
    if chosen == "reference":
        return reference.spmm(weights, value, layout, transpose=transpose, output_length=output_length)
    if chosen == "triton":
        if _is_interpreted():
            triton.warn_if_slow(weights.numel())
        return triton.spmm(weights, value, layout, transpose, output_length)
    return torch_operations.spmm(weights, value, layout.mask, transpose, output_length)


def matmul(
    a: Tensor,
    b: Tensor,
    layout: BlockLayout,
    mode: Literal["sdd", "dsd", "dds"],
    *,
    trans_a: bool = False,
    trans_b: bool = False,
    output_length: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Matrix product with one block-sparse operand, in the modes of DeepSpeed's Sparse Attention.

    ``"sdd"``: sparse = dense x dense, ``"dsd"``: dense = sparse x dense, ``"dds"``: dense = dense x sparse. A sparse
    operand or result is ``[B, nnz, b, b]``; dense ones are ``[B, H, rows, columns]``, and are read transposed under
    ``trans_a`` / ``trans_b``, as is a sparse one. Where a result's last block reaches past the end, it holds 0.
    ``output_length`` is the length of a dense result along the sparse operand, rows in ``"dsd"`` and columns in
    ``"dds"``; its default is that of :func:`spmm`.

    Raises:
        ValueError, TypeError: an unknown mode, or operands that do not go together.
    """
    checks.check_choice("mode", mode, ("sdd", "dsd", "dds"))
    if mode == "sdd":
        if output_length is not None:
            raise ValueError("output_length is for the dense results of 'dsd' and 'dds'; that of 'sdd' is sparse")
        query = a.transpose(-1, -2) if trans_a else a
        key = b if trans_b else b.transpose(-1, -2)
        return _sddmm(query, key, layout, 0.0, backend)
    if mode == "dsd":
        dense = b.transpose(-1, -2) if trans_b else b
        return spmm(a, dense, layout, transpose=trans_a, output_length=output_length, backend=backend)
    dense = a if trans_a else a.transpose(-1, -2)
    product = spmm(b, dense, layout, transpose=not trans_b, output_length=output_length, backend=backend)
    return product.transpose(-1, -2)


def attention_statistics(
    query: Tensor,
    key: Tensor,
    block_size: int,
    *,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    score_matrix: bool = False,
    logsumexp: Tensor | None = None,
    backend: Backend = "auto",
) -> AttentionStatistics:
    """What the dense phase learns from one layer: pooled weights, skewness and the score matrix (paper, section 3).

    The score matrix is the mean of ``softmax(query key^T scale)`` over batch and heads. Nothing of size
    ``[B, H, L, S]`` is held, except by the reference. Not differentiable.

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, H, S, D]``.
        block_size: edge of the blocks that the weights are averaged over, in tokens.
        key_padding_mask: bool ``[B, S]``, True = a real token.
        query_padding_mask: bool ``[B, L]``; rows of padded queries count as 0.
        is_causal: query i sees keys 0 to i only.
        scale: factor of the scores, ``D ** -0.5`` by default.
        score_matrix: also return the score matrix, ``[L, S]``.
        logsumexp: float32 ``[B, H, L]``, natural logarithm, as a dense attention with the same scale and masks returns
            it. It spares ``"triton"`` a pass over the keys; the other backends have no use for it.
        backend: see the module.

    Returns:
        Means over the batch (and, for skewness and score matrix, heads), float32. A score matrix that is constant
        up to float32 rounding has the skewness 0.
    """
    checks.check_query_key(query, key)
    batch, _, query_length, head_dim = query.shape
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a whole number of at least 1, got {block_size!r}")
    checks.check_padding("key_padding_mask", key_padding_mask, batch, key.shape[2], query.device)
    checks.check_padding("query_padding_mask", query_padding_mask, batch, query_length, query.device)
    checks.check_scale(scale)
    scale = head_dim**-0.5 if scale is None else scale
    query, key = query.detach(), key.detach()
    if logsumexp is not None:
        checks.check_logsumexp(logsumexp, query)
    chosen = _choose_backend(backend, query, block_size, head_dim)
    if chosen == "reference":
        return reference.attention_statistics(
            query,
            key,
            block_size,
            key_padding_mask=key_padding_mask,
            query_padding_mask=query_padding_mask,
            is_causal=is_causal,
            scale=scale,
            score_matrix=score_matrix,
        )
    options = (query, key, block_size, key_padding_mask, query_padding_mask, is_causal, scale, score_matrix)
    if chosen == "triton":
        if _is_interpreted():
            triton.warn_if_slow(query.shape[:3].numel() * key.shape[2])
        pooled, skewness, matrix = triton.attention_statistics(*options, logsumexp)
    else:
        pooled, skewness, matrix = torch_operations.attention_statistics(*options)
    return AttentionStatistics(pooled, skewness, matrix if score_matrix else None)


def block_sensitivity(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    block_size: int,
    *,
    layout: BlockLayout | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """How much a loss depends on each block: what would change if it alone were left out, or taken in.

    For every query and block, the attention's output with the block minus that without it (all other blocks as they
    are), times the gradient: to first order in the output, but exactly in the weights, which all change with the norm.
    Summed over the block's queries, that is what a sample's loss would change by; squared, and averaged over the
    samples. A block that is looked at but does not matter has a small one, other than its attention mass. It is that
    of weights without dropout and without ``pruned="zero"``. Computed in PyTorch on any device, and nothing of size
    ``[B, H, L, S]`` is held. Not differentiable. Where a block outweighs all others by more than float32 can tell (a
    factor of about ``e ** 103``), its effect is that of a row without any others.

    Args:
        query: ``[B, H, L, D]``.
        key: ``[B, H, S, D]``.
        value: ``[B, H, S, D]``.
        grad: ``[B, H, L, D]``, gradient of the loss by the attention's output. A common factor (the mean over a batch,
            a loss scale) is squared in the result.
        block_size: edge of a block, in tokens.
        layout: the blocks that are kept, in which case the missing ones are measured too; None: all of them.
        key_padding_mask: bool ``[B, S]``, True = a real token.
        is_causal: query i sees keys 0 to i only.
        scale: factor of the scores, ``D ** -0.5`` by default.

    Returns:
        float32 ``[H, M, N]``.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, equation 7, applied to
    blocks of attention in place of feature maps, and with the change of the softmax's norm.
    """
    checks.check_query_key(query, key, value)
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a whole number of at least 1, got {block_size!r}")
    if grad.shape != query.shape[:3] + value.shape[3:]:
        raise ValueError(
            f"grad is the gradient of the attention's output, {[*query.shape[:3], value.shape[3]]}, got "
            f"{checks.shape_text(grad)}"
        )
    mask = _observed_mask(query, key, layout, block_size)
    checks.check_padding("key_padding_mask", key_padding_mask, query.shape[0], key.shape[2], query.device)
    checks.check_scale(scale)
    tensors = (x.detach() for x in (query, key, value, grad))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return sensitivity.block_sensitivity(*tensors, block_size, mask, key_padding_mask, is_causal, scale)


def watch_blocks(
    context: Tensor,
    gate: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_size: int,
    *,
    layout: BlockLayout | None = None,
    key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The attention's output again; its backward pass leaves :func:`block_sensitivity` as the gradient of a gate.

    Args:
        context: ``[B, H, L, D]``, the attention's output.
        gate: float32 ``[H, M, N]``, a leaf that requires a gradient; its values do not matter. Where it has more blocks
            than the sequence, these receive 0.
        query: ``[n, H, L, D]``: of the first ``n`` samples, which are observed. Key and value likewise.
        key: ``[n, H, S, D]``.
        value: ``[n, H, S, D]``.
        block_size: edge of a block, in tokens; this and what follows as in :func:`block_sensitivity`.
        layout: the blocks that the attention keeps; None: all of them.
        key_padding_mask: bool ``[n, S]``.
        is_causal: query i sees keys 0 to i only.
        scale: factor of the scores, ``D ** -0.5`` by default.

    Returns:
        A copy of ``context``, with its gradient.
    """
    checks.check_query_key(query, key, value)
    checks.check_no_tangents("torch", context)
    mask = _observed_mask(query, key, layout, block_size)
    checks.check_padding("key_padding_mask", key_padding_mask, query.shape[0], key.shape[2], query.device)
    checks.check_scale(scale)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    observed = (x.detach() for x in (query, key, value))
    return sensitivity.watch_blocks(context, gate, *observed, block_size, mask, key_padding_mask, is_causal, scale)


def _observed_mask(query: Tensor, key: Tensor, layout: BlockLayout | None, block_size: int) -> Tensor | None:
    """The layout's mask ``[H, M, N]``, of all heads."""
    if layout is None:
        return None
    checks.check_layout(layout, query, "query")
    checks.check_lengths(layout, query.shape[2], key.shape[2])
    if layout.block_size != block_size:
        raise ValueError(f"the layout has blocks of {layout.block_size}, but block_size is {block_size}")
    return layout.mask.expand(query.shape[1], -1, -1)


def _total_blocks(layout: BlockLayout, x: Tensor) -> int:
    """Kept blocks over all heads of ``[B, H, ...]``; a shared layout counts once a head."""
    return layout.nnz * (x.shape[1] // layout.num_heads)
