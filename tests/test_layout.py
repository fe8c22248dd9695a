import copy

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sat import layout as layouts
from sat.layout import FORMAT_VERSION, BlockLayout, LayoutsByLength
from sat.patterns import SlidingWindow
from tests.ops import oracle


def layout(*rows: str, size: int = 4) -> BlockLayout:
    """A layout of one head, drawn: ``#`` is kept."""
    return BlockLayout(torch.tensor([[c == "#" for c in row] for row in rows]), size)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_indices_are_torchs_and_scipys(heads, rows, columns, size, seed):
    mask = torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.4
    made = BlockLayout(mask, size)
    assert made.nnz == int(mask.sum())
    assert made.density == pytest.approx(mask.float().mean().item())
    assert made.crow_indices.dtype == made.col_indices.dtype == torch.int32
    for head in range(heads):
        dense = mask[head].numpy().repeat(size, 0).repeat(size, 1)
        bsr = scipy.sparse.bsr_array(dense.astype(float), blocksize=(size, size))
        bsc = scipy.sparse.csc_array(mask[head].numpy())
        start, end = made.crow_indices[head, [0, -1]].tolist()
        assert (made.crow_indices[head] - start).tolist() == bsr.indptr.tolist()
        assert made.col_indices[start:end].tolist() == bsr.indices.tolist()
        start, end = made.ccol_indices[head, [0, -1]].tolist()
        assert (made.ccol_indices[head] - start).tolist() == bsc.indptr.tolist()
        assert made.row_indices[start:end].tolist() == bsc.indices.tolist()
        assert (made.to_scipy(head).toarray() == dense).all()
    assert made.crow_indices[-1, -1] == made.ccol_indices[-1, -1] == made.nnz
    assert torch.equal(made.mask, mask)


def held(made: BlockLayout) -> int:
    """Bytes of all tensors in a layout."""
    found, left = 0, [*vars(made).values()]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            found += value.untyped_storage().nbytes()
        elif isinstance(value, tuple | list | dict):
            left += value.values() if isinstance(value, dict) else value
    return found


@pytest.mark.parametrize("heads", [1, 8])
def test_a_layout_of_256k_tokens_takes_memory_by_its_kept_blocks(heads, tmp_path):
    made = SlidingWindow(heads, 64, num_sliding_window_blocks=7, attention="bidirectional").layout(2**18)
    assert made.nnz == heads * (7 * 4096 - 2 * (1 + 2 + 3))
    indices = (made.crow_indices, made.col_indices, made.ccol_indices, made.row_indices)
    needed = 4 * (2 * made.nnz + 2 * heads * 4097)  # a column and a row each, and where rows and columns begin
    assert held(made) == sum(4 * x.numel() for x in indices) == needed
    assert made.mask.shape == (heads, 4096, 4096)
    assert held(made) == needed  # the mask is not kept
    assert made.shared().nnz == made.nnz // heads
    if heads == 1:
        made.save(tmp_path / "layout.safetensors")
        assert (tmp_path / "layout.safetensors").stat().st_size < needed / 2 + 1000
        loaded = BlockLayout.load(tmp_path / "layout.safetensors")
        assert loaded == made
        assert held(loaded) < needed


def test_an_expanded_mask_makes_the_layout_of_its_copies():
    mask = torch.rand(1, 5, 6) < 0.4
    one, other = (BlockLayout(x, 4) for x in (mask.expand(3, -1, -1), mask.repeat(3, 1, 1)))
    assert one == other
    for name in ("crow_indices", "col_indices", "ccol_indices", "row_indices", "mask"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_layouts_of_other_sizes_or_blocks_are_not_equal():
    made = layout("#.", ".#")
    assert made == layout("#.", ".#")
    assert made != layout("#.", "#.")
    assert made != layout("#..", ".#.")
    assert made != layout("#.", ".#", "..")
    assert made != layout("#.", ".#", size=8)
    assert made != BlockLayout(made.mask.repeat(2, 1, 1), 4)
    assert made != "a layout"


def test_only_a_kept_mask_is_still_read_later():
    mask = torch.eye(3, dtype=torch.bool)
    made, reads = BlockLayout(mask, 4), BlockLayout(mask, 4, keep_mask=True)
    assert made == reads
    assert reads.mask.data_ptr() == mask.data_ptr()
    mask[0, 2] = True
    assert reads.mask[0, 0, 2]
    assert not made.mask[0, 0, 2]


def test_element_mask_of_a_partial_last_block():
    made = layout("#.", ".#", size=3)
    expected = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1]], dtype=bool)
    assert (made.element_mask(5, 4)[0].numpy() == expected).all()
    assert made.fits(4, 6)
    assert not made.fits(7, 6)
    with pytest.raises(ValueError, match="2 x 2 blocks of 3 does not fit 7 queries and 6 keys: these need 3 x 2"):
        made.element_mask(7, 6)


def test_blocks_are_counted_once_and_inside_compiled_code_not_at_all():
    made = layout("#.", "##")
    assert torch.compile(lambda x: x + made.nnz, fullgraph=True, backend="eager")(torch.zeros(())) == 3
    assert made.to("meta").nnz == 3  # nothing to count there

    def outside(x):
        return x + made.mask

    assert torch.compile(outside, fullgraph=True, backend="eager")(torch.zeros(1, 2, 2)).sum() == 3

    def inside(mask):
        return BlockLayout(mask, 4).mask.float()

    assert torch.compile(inside, fullgraph=True, backend="eager")(made.mask).sum() == 3


def test_one_mask_without_heads_is_shared():
    made = layout("##", "..")
    assert made.mask.shape == (1, 2, 2)
    assert made.num_heads == 1
    assert made.shape == (2, 2)
    assert repr(made) == "BlockLayout(1 head, 2 x 2 blocks of 4, density 0.500)"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [1, 2])
def test_to_block_mask_computes_the_same_attention(heads):
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    mask = torch.rand(heads, 3, 3) < 0.5
    mask[:, range(3), range(3)] = True
    made = BlockLayout(mask, 16)
    query, key, value = torch.randn(3, 1, 2, 45, 8).unbind(0)
    block_mask = made.to_block_mask(45, 45)
    assert (block_mask.to_dense()[0].bool() == mask).all()
    # The way back, for gradients to keys and values: as PyTorch derives it from the way there.
    theirs = BlockMask.from_kv_blocks(
        *(getattr(block_mask, f"{kind}kv_{what}") for kind in ("", "full_") for what in ("num_blocks", "indices")), 16
    )
    for kind in ("", "full_"):
        counts = getattr(theirs, f"{kind}q_num_blocks")
        assert torch.equal(getattr(block_mask, f"{kind}q_num_blocks"), counts)
        first = torch.arange(3) < counts[..., None]
        found, expected = (getattr(x, f"{kind}q_indices")[first] for x in (block_mask, theirs))
        assert torch.equal(found, expected)
    ours = flex_attention(query, key, value, block_mask=block_mask)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=made.element_mask(45, 45))
    torch.testing.assert_close(ours, expected)


class TestFiles:
    def test_round_trip(self, tmp_path):
        made = BlockLayout(torch.rand(3, 4, 5) < 0.3, 16)
        made.save(tmp_path / "layer0.safetensors")
        assert BlockLayout.load(tmp_path / "layer0.safetensors") == made
        assert [p.name for p in tmp_path.iterdir()] == ["layer0.safetensors"]

    def test_a_file_of_the_first_format_a_byte_a_block(self, tmp_path):
        mask = torch.rand(2, 3, 9) < 0.5
        metadata = {"format": "sat.BlockLayout", "version": "1", "block_size": "8"}
        save_file({"mask": mask}, tmp_path / "old.safetensors", metadata=metadata)
        assert BlockLayout.load(tmp_path / "old.safetensors") == BlockLayout(mask, 8)

    @pytest.mark.parametrize(
        ("crow", "col", "columns", "said"),
        [
            ([[0, 1, 2]], None, "3", "it holds no indices of blocks"),
            ([0, 1, 2], [0, 1], "3", "it holds no indices of blocks"),
            ([[0, 1, 2]], [0.0, 1.0], "3", "it holds no indices of blocks"),
            ([[0, 1, 2]], [0, 1], "0", "its columns is 0, expected a whole number"),
            ([[0, 1, 2]], [0, 1], "999999999999", "its columns is 999999999999, expected a whole number"),
            ([[0] * 10], [], "300000000", "it says that it has 1 x 9 x 300000000 blocks, expected 1 to 2147483648"),
            ([[0]], [], "3", "it says that it has 1 x 0 x 3 blocks"),
            ([[0, 2, 1]], [0], "3", "its crow_indices do not rise"),
            ([[1, 1, 2]], [0, 1], "3", "its crow_indices do not rise"),
            ([[0, 1, 3]], [0, 1], "3", "its crow_indices do not rise"),
            ([[0, 1, 1], [2, 2, 2]], [0, 1], "3", "its crow_indices do not rise"),
            ([[0, 1, 2]], [0, 3], "3", "its col_indices do not rise from 0 to 2"),
            ([[0, 1, 2]], [-1, 0], "3", "its col_indices do not rise from 0 to 2"),
            ([[0, 2, 2]], [1, 1], "3", "its col_indices do not rise from 0 to 2"),
            ([[0, 0, 2]], [1, 0], "3", "its col_indices do not rise from 0 to 2"),
        ],
    )
    def test_indices_that_no_mask_has_are_refused(self, tmp_path, crow, col, columns, said):
        path = tmp_path / "a.safetensors"
        tensors = {"crow_indices": torch.tensor(crow, dtype=torch.int32)}
        if col is not None:
            floats = any(isinstance(value, float) for value in col)
            tensors["col_indices"] = torch.tensor(col, dtype=torch.float32 if floats else torch.int32)
        metadata = {"format": "sat.BlockLayout", "version": "2", "block_size": "4", "columns": columns}
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ValueError, match=f"is not a whole layout file .{said}"):
            BlockLayout.load(path)

    def test_rows_may_be_empty_and_begin_anywhere(self, tmp_path):
        made = BlockLayout(
            torch.tensor([[[0, 0, 1], [1, 0, 0], [0, 0, 0]], [[0, 0, 0], [1, 1, 1], [0, 0, 0]]]).bool(), 4
        )
        empty = BlockLayout(torch.zeros(2, 3, 4, dtype=torch.bool), 4)
        for layout in (made, empty):
            layout.save(tmp_path / "a.safetensors")
            assert BlockLayout.load(tmp_path / "a.safetensors") == layout

    def test_failed_save_keeps_the_old_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.safetensors"
        old = layout("#.", ".#")
        old.save(path)

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("sat.files.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            layout("##", "##").save(path)
        assert BlockLayout.load(path) == old
        assert len(list(tmp_path.iterdir())) == 1

    def test_what_is_too_large_to_be_read_again_is_not_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sat.layout.LARGEST", 4)
        many = layout("##", "##")
        BlockLayout(many.mask.expand(3, -1, -1), many.block_size).save(tmp_path / "a")  # each head by itself
        assert BlockLayout.load(tmp_path / "a").num_heads == 3
        with pytest.raises(ValueError, match="up to 4 blocks a head, this one has 1 x 5; use larger blocks"):
            layout("#####").save(tmp_path / "b")
        assert not (tmp_path / "b").exists()

    def test_bad_files_are_refused(self, tmp_path):
        path = tmp_path / "a.safetensors"
        with pytest.raises(FileNotFoundError, match=r"no layout file at .*a\.safetensors"):
            BlockLayout.load(path)
        path.write_bytes(b"not a layout")
        with pytest.raises(ValueError, match="not a whole layout file"):
            BlockLayout.load(path)
        layout("#.", ".#").save(path)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match="not a whole layout file"):
            BlockLayout.load(path)
        save_file({"mask": torch.ones(2, 2)}, path)
        with pytest.raises(ValueError, match=r"not a layout written by BlockLayout\.save"):
            BlockLayout.load(path)
        newer = {"format": "sat.BlockLayout", "version": str(FORMAT_VERSION + 1), "block_size": "4"}
        save_file({"mask": torch.ones(2, 2, dtype=torch.bool)}, path, metadata=newer)
        with pytest.raises(ValueError, match=f"format {FORMAT_VERSION + 1}, this version of SAT reads up to"):
            BlockLayout.load(path)


@pytest.mark.parametrize(
    ("mask", "size", "error", "message"),
    [
        (torch.ones(2, 2), 4, TypeError, "torch.bool tensor, got torch.float32"),
        ([[True]], 4, TypeError, "torch.bool tensor, got list"),
        (torch.ones(2, dtype=torch.bool), 4, ValueError, r"got the shape \[2\]"),
        (torch.ones(0, 2, dtype=torch.bool), 4, ValueError, "none of them 0"),
        (torch.ones(2, 2, dtype=torch.bool), 0, ValueError, "at least 1, got 0"),
        (torch.ones(2, 2, dtype=torch.bool), 4.0, TypeError, "must be an integer, got 4.0"),
    ],
)
def test_bad_layouts_are_refused(mask, size, error, message):
    with pytest.raises(error, match=message):
        BlockLayout(mask, size)


def test_no_such_head():
    with pytest.raises(IndexError, match="head 1 asked for, but the layout has the heads 0 to 0"):
        layout("#.", ".#").to_scipy(1)


def test_equal_heads_become_one():
    mask = torch.rand(1, 4, 5) < 0.5
    alike = BlockLayout(mask.repeat(3, 1, 1), 16)
    assert alike.shared() == BlockLayout(mask, 16)
    mask = torch.cat([mask, ~mask])
    assert BlockLayout(mask, 16).shared() == BlockLayout(mask, 16)


class Counting:
    """A structure that counts its calls."""

    block_size = 8

    def __init__(self, num_heads: int = 2) -> None:
        self.num_heads, self.calls = num_heads, 0

    def layout(self, seq_len: int) -> BlockLayout:
        self.calls += 1
        blocks = -(-seq_len // 8)
        return BlockLayout(torch.eye(blocks, dtype=torch.bool).repeat(self.num_heads, 1, 1), 8)


def test_a_structures_layouts_are_made_once_for_each_number_of_blocks():
    cpu = torch.device("cpu")
    layouts = LayoutsByLength(Counting())
    with torch.inference_mode():
        first = layouts.get(17, 2, cpu)
    assert not first.mask.is_inference()
    assert layouts.get(24, 2, cpu) is first
    assert layouts.get(25, 2, cpu).shape == (4, 4)
    assert layouts.structure.calls == 2
    assert first.num_heads == 1
    other = copy.deepcopy(layouts)
    assert other.get(17, 2, cpu) is not first
    with pytest.raises(ValueError, match="layouts for 3 heads, but there are 2"):
        LayoutsByLength(Counting(3)).get(17, 2, cpu)


def test_files_are_for_everybody_whom_new_files_are_for(tmp_path):
    """safetensors' own are their owner's alone, which a group that shares its runs cannot read."""
    (tmp_path / "plain").touch()
    BlockLayout(torch.ones(2, 2, dtype=torch.bool), 8).save(tmp_path / "layout.safetensors")
    assert (tmp_path / "layout.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_loaded_layout_is_its_own_when_the_file_changes(tmp_path):
    first, other = (oracle.random_layout(2, 6, 6, 16, density=density) for density in (0.3, 0.6))
    path = tmp_path / "layout.safetensors"
    first.save(path)
    loaded = BlockLayout.load(path)
    expected = loaded.mask.clone()
    with path.open("r+b") as file:  # in place, as cp and rsync --inplace do
        file.truncate(0)
    assert torch.equal(loaded.mask, expected)
    other.save(path)
    assert loaded == first


@pytest.mark.parametrize("heads", [1, 2])
def test_more_blocks_than_can_be_counted_are_refused(monkeypatch, heads):
    """At the true limit the mask alone has 2 GiB."""
    monkeypatch.setattr(layouts, "MOST_KEPT", 9 * heads - 1)
    with pytest.raises(ValueError, match=rf"keeps {9 * heads} blocks, and at most {9 * heads - 1} can be counted"):
        BlockLayout(torch.ones(3, 3, dtype=torch.bool).expand(heads, 3, 3), 16)
