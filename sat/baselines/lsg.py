"""Floor 2: Local-Sparse-Global attention (LSG), one of the methods that users compare with.

Shapes: B batch, H heads, g global tokens, T other tokens, L = g + T, D head dimension, b block size, f sparsity factor.
Selections work on ``[B, H, P, D]``, where P is T brought to a multiple of b; n = P / f sparse tokens come of it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.layout import check_int
from sat.ops import checks
from sat.ops.autocast import as_autocast_does

Selection = Literal["norm", "pooling", "stride", "block_stride", "lsh", "bos_pooling"]

# The rotations of lsh are drawn before the head dimension is known.
MAX_HEAD_DIM_OF_LSH = 256


class LSGAttention(nn.Module):
    """Each block of queries sees the global tokens, its own and the two next blocks, and sparse tokens beyond these.

    The block ``i`` of ``b`` queries sees all ``g`` global tokens, the blocks ``i - 1`` to ``i + 1``, and of the
    ``n = T / f`` sparse tokens those from ``(i - 1) b / f - sb`` to ``(i - 1) b / f`` and from ``(i + 2) b / f`` to
    ``(i + 2) b / f + sb``, ends excluded, ``sb`` being ``sparse_block_size``. Global tokens see all tokens. Up to ``2
    b`` tokens attention is full. Time and memory grow with T, not with its square.

    The selections make the sparse tokens of each head:

    - ``"norm"``: of each ``min(b, sb)`` successive tokens the share ``1 / f`` with the longest keys (L2 norm), in the
      order of their positions. Of keys of one length the first is taken; padding comes after all tokens.
    - ``"pooling"``: the mean of each ``f`` successive tokens, of their keys and of their values.
    - ``"stride"``: of each ``f`` tokens one, in head ``h`` the one at ``h mod f``.
    - ``"block_stride"``: of each block ``b / f`` successive tokens, in head ``h`` those from ``(h mod f) b / f`` on.
    - ``"lsh"``: of each ``min(b, sb)`` tokens, ``1 / f`` as many means over tokens whose keys point in like directions,
      by hashing with random rotations in two rounds; they are the same in training and in evaluation.
    - ``"bos_pooling"``: of each ``f`` tokens a mean weighed by the softmax of the scores that the first real token's
      query gives them.

    Where padding leaves nothing to a sparse token, it is not seen. No gradient flows through a choice of tokens (norm,
    lsh). With ``f = 1`` every token is a sparse token, whatever the selection.

    Args:
        num_heads: ``H``.
        seq_len: the most tokens, not counting the global ones.
        block_size: ``b``, in tokens. Any number of tokens will do, whole blocks are made inside.
        sparse_block_size: ``sb``, the number of sparse tokens on each side; 0: local and global tokens only.
        sparsity_factor: ``f``, a divisor of the block size; for norm and lsh of ``min(b, sb)``.
        selection: one of those above.
        num_global_tokens: ``g``, how many of the first tokens are global. The caller prepends them.
        seed: of the rotations of lsh.
        dropout: probability with which an attention weight is dropped in training.

    Raises:
        TypeError: a size is no integer.
        ValueError: an argument is out of range, or the sizes do not divide.

    Source: Condevaux and Harispe 2022, "LSG Attention: Extrapolation of pretrained Transformers to long sequences", and
    their program ccdv-ai/convert_checkpoint_to_lsg. Theirs draws new rotations for lsh in each forward pass, may choose
    padding in place of tokens with keys of 0, takes the query of the first position for bos_pooling, be it padding, and
    where ``b / f`` is odd begins the sparse tokens on the right two too early.
    """

    directions: Tensor

    def __init__(
        self,
        num_heads: int,
        seq_len: int,
        *,
        block_size: int = 32,
        sparse_block_size: int = 32,
        sparsity_factor: int = 2,
        selection: Selection = "norm",
        num_global_tokens: int = 1,
        seed: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {
            "num_heads": num_heads,
            "seq_len": seq_len,
            "block_size": block_size,
            "sparsity_factor": sparsity_factor,
        }
        for name, size in sizes.items():
            check_int(name, size, 1)
        check_int("sparse_block_size", sparse_block_size, 0)
        check_int("num_global_tokens", num_global_tokens, 0)
        checks.check_choice("selection", selection, get_args(Selection))
        checks.check_probability("dropout", dropout)
        if block_size % sparsity_factor:
            raise ValueError(
                f"sparsity_factor must divide block_size {block_size}, so that each block has as many sparse tokens; "
                f"got {sparsity_factor}"
            )
        chunk_size = min(block_size, sparse_block_size or block_size)
        if selection in ("norm", "lsh"):
            if block_size % chunk_size:
                raise ValueError(
                    f"with selection={selection!r} a sparse_block_size below block_size {block_size} must divide it, "
                    f"got {sparse_block_size}"
                )
            if chunk_size % sparsity_factor:
                raise ValueError(
                    f"with selection={selection!r} sparsity_factor must divide sparse_block_size {sparse_block_size}, "
                    f"got {sparsity_factor}; tokens are selected out of as many at a time"
                )
        self.num_heads, self.seq_len, self.num_global_tokens = num_heads, seq_len, num_global_tokens
        self.block_size, self.sparse_block_size, self.sparsity_factor = block_size, sparse_block_size, sparsity_factor
        self.selection, self.seed, self.dropout, self.chunk_size = selection, seed, dropout, chunk_size
        if selection == "lsh":
            # Drawn once, and not saved: the seed says it all.
            shape = (num_heads, MAX_HEAD_DIM_OF_LSH, _half(chunk_size) + _half(chunk_size // sparsity_factor))
            directions = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
            self.register_buffer("directions", directions, persistent=False)

    @property
    def prepended_tokens(self) -> int:
        """How many learned tokens the caller has to put before the sequence."""
        return self.num_global_tokens

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        query_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[B, H, L, D]``, the global tokens first.
            key: ``[B, H, L, D]``.
            value: ``[B, H, L, D]``. Under autocast all three are cast to its dtype.
            key_padding_mask: bool ``[B, L]``, True = a real token. Padded keys are never seen.
            query_padding_mask: bool ``[B, L]``, True = a real token. Padded queries give 0.

        Returns:
            ``[B, H, L, D]``. A query that sees no key gives 0, and gradients 0.

        Raises:
            ValueError, TypeError: tensors that do not go together, or not with this module.
        """
        query, key, value = as_autocast_does(query, key, value)
        checks.check_query_key(query, key, value)
        batch, heads, length, _ = query.shape
        tokens = length - self.num_global_tokens
        if heads != self.num_heads or key.shape[2] != length or not 1 <= tokens <= self.seq_len:
            raise ValueError(
                f"this attention was made for {self.num_heads} heads and as many keys as queries, "
                f"{self.num_global_tokens} global ones and 1 to {self.seq_len} others, got {heads} heads, {length} "
                f"queries and {key.shape[2]} keys"
            )
        if self.selection == "lsh" and query.shape[3] > MAX_HEAD_DIM_OF_LSH:
            raise ValueError(
                f"selection='lsh' takes head dimensions up to {MAX_HEAD_DIM_OF_LSH}, got {query.shape[3]}; use more "
                f"heads, or another selection"
            )
        checks.check_padding("key_padding_mask", key_padding_mask, batch, length, query.device)
        checks.check_padding("query_padding_mask", query_padding_mask, batch, length, query.device)
        # Whatever padding holds, even NaN, goes no further: 0 times NaN would be NaN. From here on padding is 0.
        if key_padding_mask is not None:
            padded = ~key_padding_mask[:, None, :, None]
            key, value = key.masked_fill(padded, 0), value.masked_fill(padded, 0)
        if query_padding_mask is not None:
            query = query.masked_fill(~query_padding_mask[:, None, :, None], 0)
        # Sums of half precisions are taken in float32, which autocast would undo.
        with torch.autocast(query.device.type, enabled=False):
            if tokens > 2 * self.block_size:
                context = self._attend_sparsely(query, key, value, key_padding_mask, query_padding_mask)
            else:
                context = self._attend_fully(query, key, value, key_padding_mask)
        return context if query_padding_mask is None else context.masked_fill(~query_padding_mask[:, None, :, None], 0)

    def _attend_fully(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if key_padding_mask is None:
            return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return _masked_attention(query, key, value, key_padding_mask[:, None, None], dropout)

    def _attend_sparsely(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        query_padding_mask: Tensor | None,
    ) -> Tensor:
        batch, heads, length, _ = query.shape
        size, num_global = self.block_size, self.num_global_tokens
        tokens = length - num_global
        missing = -tokens % size
        queries, keys, values = (F.pad(x[:, :, num_global:], (0, 0, 0, missing)) for x in (query, key, value))
        key_mask = key_padding_mask
        if key_mask is None:
            key_mask = torch.ones(batch, length, dtype=torch.bool, device=query.device)
        real = F.pad(key_mask[:, num_global:], (0, missing))[:, None].expand(-1, heads, -1)
        sparse_keys, sparse_values, sparse_real = self._select(
            queries, keys, values, real, None if query_padding_mask is None else query_padding_mask[:, num_global:]
        )
        sizes = (size, size // self.sparsity_factor, self.sparse_block_size)
        keys_of_blocks = _windows(key[:, :, :num_global], keys, sparse_keys, *sizes)
        values_of_blocks = _windows(value[:, :, :num_global], values, sparse_values, *sizes)
        global_mask = key_mask[:, None, :num_global].expand(-1, heads, -1)
        mask = _windows(*(x[..., None] for x in (global_mask, real, sparse_real)), *sizes).transpose(-1, -2)
        # Blocks in the place of heads, and not of the batch: GPU kernels take no more than 65,535 of either.
        context = _masked_attention(
            queries.unflatten(2, (-1, size)).flatten(0, 1),
            keys_of_blocks.flatten(0, 1),
            values_of_blocks.flatten(0, 1),
            mask.flatten(0, 1),
            self.dropout if self.training else 0.0,
        )
        context = context.unflatten(0, (batch, heads)).flatten(2, 3)[:, :, :tokens]
        if num_global == 0:
            return context
        return torch.cat([self._attend_fully(query[:, :, :num_global], key, value, key_padding_mask), context], 2)

    def _select(
        self, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor, real_queries: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sparse keys and values ``[B, H, n, D]``, and bool ``[B, H, n]``, whether there is anything in them."""
        if self.sparse_block_size == 0:  # nobody sees any
            some = slice(None, None, self.sparsity_factor)
            return keys[:, :, some], values[:, :, some], real[:, :, some]
        if self.sparsity_factor == 1:
            return keys, values, real
        if self.selection == "lsh":
            return self._hash(keys, values, real)
        if self.selection == "pooling":
            groups = real.unflatten(2, (-1, self.sparsity_factor)).to(_compute_dtype(keys))
            weights = groups / groups.sum(-1, keepdim=True).clamp(min=1)
            return self._pool(weights, keys, values, real)
        if self.selection == "bos_pooling":
            weights = self._scores_of_bos(queries, keys, real, real_queries).softmax(-1)
            return self._pool(weights, keys, values, real)
        positions = self._choose(keys, real)
        return _take(keys, positions), _take(values, positions), real.gather(2, positions)

    def _choose(self, keys: Tensor, real: Tensor) -> Tensor:
        """Positions ``[B, H, n]`` of the tokens that norm, stride or block_stride select."""
        batch, heads, length, _ = keys.shape
        factor, size = self.sparsity_factor, self.block_size
        if self.selection == "norm":
            norm = torch.linalg.vector_norm(keys.detach(), dim=-1, dtype=_compute_dtype(keys)).masked_fill(~real, -1)
            order = norm.unflatten(2, (-1, self.chunk_size)).argsort(dim=-1, descending=True, stable=True)
            chosen = order[..., : self.chunk_size // factor].sort(-1).values
            chunks = torch.arange(0, length, self.chunk_size, device=keys.device)
            return (chosen + chunks[:, None]).flatten(2)
        phase = torch.arange(heads, device=keys.device)[:, None] % factor
        sparse = torch.arange(length // factor, device=keys.device)
        if self.selection == "stride":
            positions = sparse * factor + phase
        else:
            step = size // factor
            positions = sparse // step * size + phase * step + sparse % step
        return positions.expand(batch, -1, -1)

    def _pool(self, weights: Tensor, keys: Tensor, values: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means over each f tokens with weights ``[B, H, n, f]``."""
        split = (-1, self.sparsity_factor)
        pooled_keys, pooled_values = (
            (weights[..., None] * x.unflatten(2, split)).sum(3).to(x.dtype) for x in (keys, values)
        )
        return pooled_keys, pooled_values, real.unflatten(2, split).any(-1)

    def _scores_of_bos(self, queries: Tensor, keys: Tensor, real: Tensor, real_queries: Tensor | None) -> Tensor:
        """What the query of the first real token gives the keys, ``[B, H, n, f]``."""
        candidates = real[:, 0]
        if real_queries is not None:
            candidates = candidates & F.pad(real_queries, (0, candidates.shape[1] - real_queries.shape[1]))
        first = candidates.byte().argmax(1)
        bos = _take(queries, first[:, None, None].expand(-1, self.num_heads, 1))
        dtype = _compute_dtype(keys)
        scores = (keys.to(dtype) * bos.to(dtype)).sum(-1) * keys.shape[-1] ** -0.5
        # Not -inf, of which a softmax over nothing but padding would make NaN.
        return scores.masked_fill(~real, torch.finfo(dtype).min).unflatten(2, (-1, self.sparsity_factor))

    def _hash(self, keys: Tensor, values: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means over buckets of tokens; those of one bucket in the first round are hashed as one in the second."""
        size, dtype = self.chunk_size, _compute_dtype(keys)
        buckets = size // self.sparsity_factor
        with torch.no_grad():
            chunks = keys.detach().to(dtype).unflatten(2, (-1, size))
            # As many numbers of each direction as the keys have.
            directions = self.directions[:, None, : keys.shape[-1]].to(dtype)
            first, second = directions.split([_half(size), _half(buckets)], -1)
            bucket = _bucket(chunks, first, size)
            sums = _one_hot(bucket, size).to(dtype) @ chunks  # padding adds 0
            bucket = _bucket(sums, second, buckets).gather(-1, bucket)
            share = (_one_hot(bucket, buckets) & real.unflatten(2, (-1, size))[..., None, :]).to(
                dtype
            )  # [B, H, P / size, buckets, size]
            count = share.sum(-1, keepdim=True)
            share = share / count.clamp(min=1)
        mean_keys, mean_values = (
            (share @ x.unflatten(2, (-1, size)).to(dtype)).flatten(2, 3).to(x.dtype) for x in (keys, values)
        )
        return mean_keys, mean_values, count.flatten(2) > 0

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return (
            f"num_heads={self.num_heads}, seq_len={self.seq_len}, block_size={self.block_size}, "
            f"sparse_block_size={self.sparse_block_size}, sparsity_factor={self.sparsity_factor}, "
            f"selection={self.selection!r}, num_global_tokens={self.num_global_tokens}"
        )


@torch.library.custom_op("sat::lsg_windows", mutates_args=())
def _windows(
    of_globals: Tensor, of_tokens: Tensor, of_sparse: Tensor, size: int, step: int, sparse_size: int
) -> Tensor:
    """What each block of queries sees: ``[B, H, P / b, g + 3 b + 2 sb, *]`` of ``[B, H, g | P | n, *]``.

    Outside of the sequence is 0, which is False. An operator of its own, because PyTorch's backward pass would fill and
    add a tensor of full length for each slice; this one adds each slice where it belongs.
    """
    blocks, margin = of_tokens.shape[2] // size, _margin(step, sparse_size)
    local = F.pad(of_tokens, (0, 0, size, size)).unflatten(2, (-1, size))
    sparse = F.pad(of_sparse, (0, 0, margin * step, margin * step)).unflatten(2, (-1, step))
    return torch.cat(
        [
            of_globals[:, :, None].expand(-1, -1, blocks, -1, -1),
            *(local[:, :, i : i + blocks] for i in range(3)),
            *(sparse[:, :, i : i + blocks, first:last] for i, first, last in _sparse_pieces(step, sparse_size)),
        ],
        3,
    )


@_windows.register_fake
def _windows_shape(
    of_globals: Tensor, of_tokens: Tensor, of_sparse: Tensor, size: int, step: int, sparse_size: int
) -> Tensor:
    batch, heads, length, features = of_tokens.shape
    seen = of_globals.shape[2] + 3 * size + 2 * sparse_size
    return of_tokens.new_empty(batch, heads, length // size, seen, features)


def _windows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    of_globals, _, _, *sizes = inputs
    ctx.num_global, ctx.sizes = of_globals.shape[2], sizes


def _windows_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    size, step, sparse_size = ctx.sizes
    batch, heads, blocks, _, features = grad.shape
    margin = _margin(step, sparse_size)
    local = grad.new_zeros(batch, heads, blocks + 2, size, features)
    sparse = grad.new_zeros(batch, heads, blocks + 2 * margin, step, features)
    position = ctx.num_global
    for i in range(3):
        local[:, :, i : i + blocks] += grad[:, :, :, position : position + size]
        position += size
    for i, first, last in _sparse_pieces(step, sparse_size):
        sparse[:, :, i : i + blocks, first:last] += grad[:, :, :, position : position + last - first]
        position += last - first
    of_sparse = sparse[:, :, margin : margin + blocks].flatten(2, 3)
    return grad[:, :, :, : ctx.num_global].sum(2), local[:, :, 1:-1].flatten(2, 3), of_sparse, None, None, None


_windows.register_autograd(_windows_backward, setup_context=_windows_setup)


def _margin(step: int, sparse_size: int) -> int:
    """How far before its first block a block's windows may begin, in pieces of ``step`` sparse tokens."""
    return -(-sparse_size // step) + 1


def _sparse_pieces(step: int, sparse_size: int) -> list[tuple[int, int, int]]:
    """For the sparse tokens of a block: which pieces of ``step`` they are, and which part of each.

    Counted from the first piece that the block's windows may begin in; the outermost may be seen only in part.
    """
    pieces = -(-sparse_size // step)
    unseen = pieces * step - sparse_size
    left = [(i, unseen if i == 0 else 0, step) for i in range(pieces)]
    right = [(2 * pieces + 2 - i, 0, last) for i, last in [(i, step - first) for i, first, _ in left]]
    return left + right[::-1]


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """PyTorch's attention where the mask is True; elsewhere keys and values must be 0."""
    # PyTorch's kernels disagree on rows without a key (0, NaN or the mean of all): let them see all, which is 0.
    visible = mask | ~mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _take(x: Tensor, positions: Tensor) -> Tensor:
    """``x[b, h, positions[b, h]]``: ``[B, H, n, D]`` of ``[B, H, P, D]``.

    Whole rows by one index each: on a CPU faster, forward and backward, than ``gather`` with one for each number.
    """
    batch, heads, length, head_dim = x.shape
    starts = torch.arange(0, batch * heads * length, length, device=x.device)
    rows = starts.view(batch, heads, 1) + positions
    return x.reshape(-1, head_dim).index_select(0, rows.flatten()).view(batch, heads, -1, head_dim)


def _half(buckets: int) -> int:
    """A bucket for each direction and for its opposite; of an odd number of buckets the last has no opposite."""
    return (buckets + 1) // 2


def _bucket(x: Tensor, directions: Tensor, buckets: int) -> Tensor:
    """The direction, or opposite of one, that each vector comes closest to: ``[..., rows]`` of ``[..., rows, D]``."""
    projections = x @ directions
    return torch.cat([projections, -projections], -1)[..., :buckets].argmax(-1)


def _one_hot(bucket: Tensor, buckets: int) -> Tensor:
    """bool ``[..., buckets, rows]`` of ``[..., rows]``."""
    return bucket[..., None, :] == torch.arange(buckets, device=bucket.device)[:, None]
