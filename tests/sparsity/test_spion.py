import numpy as np
import pytest
import scipy.signal
import torch

from sat.sparsity import spion
from sat.sparsity.spion import spion_blocks


def pooled_by_definition(matrix: np.ndarray, block_size: int, kernel_size: int) -> np.ndarray:
    # Not mode="same", which gives no less than the kernel's size.
    inside = slice(kernel_size // 2, kernel_size // 2 + len(matrix))
    summed = scipy.signal.convolve2d(matrix, np.eye(kernel_size))[inside, inside]
    starts = range(0, len(matrix), block_size)
    return np.array([[summed[i : i + block_size, j : j + block_size].mean() for j in starts] for i in starts])


def walk(pooled: np.ndarray, row: int, column: int, threshold: float, kept: np.ndarray) -> None:
    """One walk, as the paper's algorithm goes on with itself; outside of the matrix is 0."""
    blocks = len(pooled)

    def at(i: int, j: int) -> float:
        return pooled[i, j] if i < blocks and j < blocks else 0.0

    down, right, diagonal = at(row + 1, column), at(row, column + 1), at(row + 1, column + 1)
    if down > right:
        row, column = (row + 1, column) if down > diagonal else (row + 1, column + 1)
    else:
        row, column = (row, column + 1) if right > diagonal else (row + 1, column + 1)
    if row < blocks and column < blocks:
        kept[row, column] |= pooled[row, column] > threshold
        walk(pooled, row, column, threshold, kept)


def flood_by_definition(pooled: np.ndarray, threshold: float) -> np.ndarray:
    kept = np.eye(len(pooled), dtype=bool)
    for i in range(len(pooled)):
        walk(pooled, 0, i, threshold, kept)
        walk(pooled, i, 0, threshold, kept)
    return kept


def definition(matrices: torch.Tensor, block_size: int, quantile: float, kernel_size: int) -> torch.Tensor:
    layouts = []
    for matrix in matrices.double().numpy():
        pooled = pooled_by_definition(matrix, block_size, kernel_size)
        layouts.append(flood_by_definition(pooled, np.quantile(pooled, quantile)))
    return torch.from_numpy(np.stack(layouts))


def attention_like(layouts: int, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Softmax weights with a diagonal, a column and noise."""
    position = torch.arange(length)
    ridge = -((position[:, None] - position * 0.9 - 3).abs() / 4)
    scores = torch.randn(layouts, length, length) + 3 * ridge.exp() + 2 * (position % 11 == 0)
    return scores.softmax(-1).to(dtype)


@pytest.mark.parametrize(("length", "block_size"), [(64, 8), (77, 8), (33, 32), (20, 32), (96, 1), (7, 3), (1, 1)])
@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_is_what_the_definition_says(length, block_size, quantile):
    matrices = attention_like(3, length)
    for kernel_size in (1, 5, 31) if length < 96 else (7,):
        expected = definition(matrices, block_size, quantile, kernel_size)
        assert torch.equal(spion_blocks(matrices, block_size, quantile, kernel_size), expected)
        if length == 77:
            assert 10 < expected[0].sum() < 60  # neither the diagonal alone nor everything


def test_defaults_are_the_papers():
    matrices = attention_like(2, 400)
    kept = spion_blocks(matrices, 8)
    assert torch.equal(kept, definition(matrices, 8, 0.96, 31))
    assert kept.shape == (2, 50, 50)
    assert kept.dtype == torch.bool
    # At most the upper 4 % beside the diagonal, and the ridge is found.
    assert 60 < kept[0].sum() <= 50 + 0.04 * 2500


@pytest.mark.parametrize("top", [2, 4])
@pytest.mark.parametrize("threshold", [0, 1])
def test_ties_and_zeros_fall_as_in_the_paper(top, threshold):
    pooled = torch.randint(top, (50, 6, 6)).double()
    kept = spion._flood(pooled, torch.full((50,), threshold, dtype=torch.float64))
    expected = [flood_by_definition(x.numpy(), threshold) for x in pooled]
    assert torch.equal(kept, torch.from_numpy(np.stack(expected)))


def test_worked_example():
    pooled = torch.tensor(
        [
            [
                9.0,
                1.0,
                5.0,
                1.0,
            ],  # from (0, 0): to the right, because 1 is not the largest; where walks start stays out
            [8.0, 2.0, 2.0, 3.0],  # (0, 0) -> (1, 0), the largest below
            [1.0, 7.0, 7.0, 1.0],  # (1, 0) -> (2, 1) diagonally, -> (2, 2) to the right, -> (3, 2) below
            [1.0, 1.0, 6.0, 4.0],  # -> (3, 3) along the last row
        ]
    )
    # (0, 1) -> (0, 2), and of its neighbours 2, 1, 3 diagonally -> (1, 3) -> (2, 3) -> (3, 3)
    kept = spion._flood(pooled[None].double(), torch.tensor([2.5]))[0]
    assert kept.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1]]
    # Above the threshold alone: (2, 2) is reached over (2, 1), which is not kept.
    pooled[2, 1] = 2.4
    pooled[1, 1] = 2.3
    kept = spion._flood(pooled[None].double(), torch.tensor([2.5]))[0]
    assert kept.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 1, 1]]


@pytest.mark.parametrize("length", [64, 70])
@pytest.mark.parametrize("number", [0.0, 1 / 64])
def test_of_a_constant_matrix_at_least_the_diagonal_is_kept(length, number):
    matrices = torch.full((2, length, length), number)
    kept = spion_blocks(matrices, 8, 0.96)
    assert torch.equal(kept, definition(matrices, 8, 0.96, 31))
    assert kept.diagonal(dim1=1, dim2=2).all()
    # Without the kernel's border there is nothing above the quantile.
    assert torch.equal(spion_blocks(matrices, 8, 0.96, 1)[0], torch.eye(-(-length // 8), dtype=torch.bool))


def test_each_layout_for_itself():
    matrices = attention_like(3, 77)
    together = spion_blocks(matrices * torch.tensor([1.0, 1000.0, 0.001])[:, None, None], 8, 0.9, 5)
    for i in range(3):
        assert torch.equal(together[i], spion_blocks(matrices[i : i + 1], 8, 0.9, 5)[0])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("rows_at_a_time", [1, 8, 128])
@pytest.mark.parametrize("kernel_size", [1, 3, 13, 31, 99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_means_of_sums_along_diagonals(kernel_size, dtype, rows_at_a_time, monkeypatch):
    monkeypatch.setattr(spion, "ROWS_AT_A_TIME", rows_at_a_time)
    matrices = torch.rand(2, 19, 19).to(dtype)
    expected = np.stack([pooled_by_definition(x, 4, kernel_size) for x in matrices.double().numpy()])
    pooled = spion._pool(matrices, 4, kernel_size)
    if dtype != torch.float64:  # sums in float32, means in float64
        pooled, expected = pooled.float(), expected.astype(np.float32)
    torch.testing.assert_close(pooled, torch.from_numpy(expected))


def test_does_not_change_or_differentiate_its_input():
    matrices = attention_like(1, 40).transpose(1, 2).requires_grad_()
    before = matrices.detach().clone()
    kept = spion_blocks(matrices, 8)
    assert torch.equal(matrices, before)
    assert not kept.requires_grad
    assert torch.equal(kept, spion_blocks(before.contiguous(), 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    matrices = attention_like(3, 200)
    kept = spion_blocks(matrices.cuda(), 8, 0.9)
    assert kept.is_cuda
    assert torch.equal(kept.cpu(), spion_blocks(matrices, 8, 0.9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score_matrix": torch.rand(4, 4)}, r"must be \[layouts, tokens, tokens\], got \[4, 4\]"),
        ({"score_matrix": torch.rand(1, 4, 5)}, r"got \[1, 4, 5\]; SPION follows the diagonals of self-attention"),
        ({"score_matrix": torch.rand(0, 4, 4)}, r"got \[0, 4, 4\]"),
        ({"score_matrix": torch.full((1, 4, 4), torch.nan)}, "contains NaN or infinite values"),
        ({"block_size": 0}, "block_size must be a whole number of at least 1, got 0"),
        ({"kernel_size": 30}, "kernel_size must be odd, so that the kernel has a middle, got 30"),
        ({"kernel_size": -1}, "kernel_size must be a whole number of at least 1, got -1"),
        ({"quantile": 1.01}, "quantile must be 0 to 1, got 1.01"),
        ({"quantile": -0.1}, "quantile must be 0 to 1, got -0.1"),
        ({"quantile": float("nan")}, "quantile must be 0 to 1, got nan"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        spion_blocks(**{"score_matrix": torch.rand(1, 8, 8), "block_size": 4, **arguments})


def test_only_floating_point_tensors():
    with pytest.raises(TypeError, match=r"must be a floating-point tensor, got torch\.int64"):
        spion_blocks(torch.ones(1, 8, 8, dtype=torch.int64), 4)
    with pytest.raises(TypeError, match="must be a floating-point tensor, got list"):
        spion_blocks([[1.0]], 4)
