"""Floor 2: SPION's way from scores to kept blocks, the method that the same group published before SAT.

Shapes: G layouts, L tokens, b block size, N = ceil(L / b) blocks a side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the score matrix, so that a CPU keeps in its caches what it works on.
ROWS_AT_A_TIME = 128


def spion_blocks(score_matrix: Tensor, block_size: int, quantile: float = 0.96, kernel_size: int = 31) -> Tensor:
    """Blocks along the ridges of the score matrix, found by convolution and flood filling, each layout for itself.

    1. Each score becomes the sum of the ``kernel_size`` scores around it on its diagonal (convolution with an identity
       matrix); outside of the matrix the scores are 0.
    2. Each block becomes the mean of these sums. A partial last block has the mean over what it really contains.
    3. The threshold is the ``quantile`` of a layout's N * N means, interpolated linearly.
    4. From each block of the first row and of the first column a walk goes on to the largest of the blocks below, to
       the right, and diagonally below: diagonally unless another one is larger than that, to the right if that one and
       the one below are equal and larger. Outside of the matrix there are blocks of 0; a walk that steps onto one of
       them ends. Each block that is stepped onto is kept if it is above the threshold. The walk goes on from blocks
       that are not kept too, and over those that others have stepped onto. Where a walk starts does not count as
       stepped onto.
    5. The diagonal is kept in any case.

    Args:
        score_matrix: ``[G, L, L]``, mean attention weight of each layout's queries and keys.
        block_size: ``b``, in tokens.
        quantile: 0 to 1; the paper has .96 for images, .98 for ListOps and .99 for texts.
        kernel_size: edge of the identity matrix, in tokens; an odd number, 31 in the paper.

    Returns:
        bool ``[G, N, N]``, True = the block is kept.

    Raises:
        TypeError: the score matrix is no floating-point tensor.
        ValueError: it is not square, or not finite; or an argument is out of range.

    Source: Yoon, Han and Moon 2023, "SPION: Layer-Wise Sparse Training of Transformer via Convolutional Flood Filling",
    and where it leaves a choice, their program mlsys-lab-sogang/SPION (``main_conv_ff.py``).
    """
    _check(score_matrix, block_size, quantile, kernel_size)
    pooled = _pool(score_matrix.detach(), block_size, kernel_size)
    if not pooled.isfinite().all():
        raise ValueError("the score matrix contains NaN or infinite values; attention weights are finite")
    threshold = pooled.flatten(1).quantile(quantile, dim=1)
    return _flood(pooled, threshold)


def _check(score_matrix: Tensor, block_size: int, quantile: float, kernel_size: int) -> None:
    if not isinstance(score_matrix, Tensor) or not score_matrix.is_floating_point():
        found = str(score_matrix.dtype) if isinstance(score_matrix, Tensor) else type(score_matrix).__name__
        raise TypeError(f"the score matrix must be a floating-point tensor, got {found}")
    if score_matrix.dim() != 3 or score_matrix.shape[1] != score_matrix.shape[2] or 0 in score_matrix.shape:
        raise ValueError(
            f"the score matrix must be [layouts, tokens, tokens], got {list(score_matrix.shape)}; SPION follows the "
            f"diagonals of self-attention"
        )
    for name, value in (("block_size", block_size), ("kernel_size", kernel_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that the kernel has a middle, got {kernel_size}")
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must be 0 to 1, got {quantile}")


def _pool(x: Tensor, block_size: int, kernel_size: int) -> Tensor:
    """Mean over each block of the sums along diagonals, float64 ``[G, N, N]``."""
    length = x.shape[1]
    # No more of the kernel than reaches into the matrix.
    radius = min(kernel_size // 2, length - 1)
    rows = block_size * max(1, ROWS_AT_A_TIME // block_size)
    sums = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        above, below = min(radius, start), min(radius, length - stop)
        strip = x[:, start - above : stop + below].to(torch.promote_types(x.dtype, torch.float32))
        strip = F.pad(strip, (radius, radius, radius - above, radius - below))
        sums.append(_sum_blocks(_sum_diagonally(strip, 2 * radius + 1), block_size))
    edges = (length - torch.arange(0, length, block_size, device=x.device)).clamp(max=block_size)
    return torch.cat(sums, 1) / (edges[:, None] * edges)


def _sum_diagonally(x: Tensor, count: int) -> Tensor:
    """Sums of ``count`` successive entries of each diagonal, ``[G, rows - count + 1, columns - count + 1]``."""
    rows, columns = x.shape[1] - count + 1, x.shape[2] - count + 1
    total = x.new_zeros(x.shape[0], rows, columns)
    # A sum of 2 ** n entries is one of two sums of half as many: few additions, and no running sum that loses digits.
    offset, width = 0, 1
    while True:
        if count & width:
            total += x[:, offset : offset + rows, offset : offset + columns]
            offset += width
        if 2 * width > count:
            return total
        x = x[:, :-width, :-width] + x[:, width:, width:]
        width *= 2


def _sum_blocks(x: Tensor, block_size: int) -> Tensor:
    """Sum of each block, of partial last ones too: float64."""
    for _ in range(2):  # along the rows, then along what were the columns
        x = F.pad(x, (0, -x.shape[2] % block_size)).unflatten(2, (-1, block_size)).sum(3, dtype=torch.float64)
        x = x.transpose(1, 2)
    return x


def _flood(pooled: Tensor, threshold: Tensor) -> Tensor:
    """Blocks above the threshold that walks step onto, and the diagonal: bool ``[G, N, N]``."""
    layouts, blocks, _ = pooled.shape
    bordered = F.pad(pooled, (0, 1, 0, 1))
    down, right, diagonal = bordered[:, 1:, :-1], bordered[:, :-1, 1:], bordered[:, 1:, 1:]
    goes_down = (down > right) & (down > diagonal)
    goes_right = (right >= down) & (right > diagonal)

    # Blocks are counted through, with a border of one on the far sides. Whoever comes there stays.
    edge = blocks + 1
    here = torch.arange(edge * edge, device=pooled.device).view(edge, edge)
    successor = here.expand(layouts, -1, -1).clone()
    successor[:, :-1, :-1] += torch.where(goes_down, edge, torch.where(goes_right, 1, edge + 1))
    successor = successor.flatten(1)
    ahead = successor
    reached = torch.zeros_like(successor, dtype=torch.bool).view(layouts, edge, edge)
    reached[:, 0], reached[:, :, 0] = True, True
    reached = reached.flatten(1)
    # What is reached in fewer than 1, 2, 4, ... steps; no walk has more than 2 N.
    for _ in range((2 * blocks).bit_length()):
        reached = reached | _scatter(ahead, reached)
        ahead = ahead.gather(1, ahead)

    stepped_onto = _scatter(successor, reached).view(layouts, edge, edge)[:, :-1, :-1]
    kept = stepped_onto & (pooled > threshold[:, None, None])
    kept.diagonal(dim1=1, dim2=2).fill_(True)
    return kept


def _scatter(positions: Tensor, where: Tensor) -> Tensor:
    """bool ``[G, n]``, True at the positions ``[G, n]`` that count."""
    # The last position is the far corner of the border, where it does no harm.
    last = positions.shape[1] - 1
    return torch.zeros_like(where).scatter_(1, torch.where(where, positions, last), True)
