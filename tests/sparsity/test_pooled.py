import pytest
import torch
from safetensors.torch import load_file, save_file

from sat.layout import BlockLayout
from sat.ops import attention_statistics
from sat.sparsity import PooledAttention


@pytest.fixture
def attention():
    query, key = torch.randn(2, 3, 2, 50, 8).unbind(0)
    return PooledAttention(attention_statistics(query, key, 16).pooled, 16, 50, 50, 120)


def test_survives_its_file(attention, tmp_path):
    attention.save(tmp_path / "a.safetensors")
    again = PooledAttention.load(tmp_path / "a.safetensors")
    assert torch.equal(again.pooled, attention.pooled)
    assert (again.block_size, again.query_length, again.key_length, again.step) == (16, 50, 50, 120)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_mass_and_multiples_of_uniform_attention():
    even = PooledAttention(torch.full((1, 4, 4), 1 / 50), 16, 50, 50, 0)
    assert torch.allclose(even.over_uniform(), torch.ones(1, 4, 4))
    assert even.mass()[0, 0, 0].item() == pytest.approx((16 / 50) ** 2)
    assert even.mass()[0, 3, 3].item() == pytest.approx((2 / 50) ** 2)


@pytest.mark.parametrize("shape", [(), (4,), (0, 4, 4), (2, 0, 4)])
def test_attention_of_no_blocks_is_refused(shape, tmp_path):
    with pytest.raises(ValueError, match=r"pooled attention is \[heads, rows, columns\]"):
        PooledAttention(torch.zeros(shape), 16, 50, 50, 0)
    metadata = {"format": "sat.PooledAttention", "version": "1", "block_size": "16", "step": "3"}
    metadata |= {"query_length": "50", "key_length": "50"}
    save_file({"pooled": torch.zeros(shape)}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ValueError, match="cannot be read as pooled attention"):
        PooledAttention.load(tmp_path / "a.safetensors")


def test_other_files_are_refused_with_a_sentence(attention, tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="no pooled attention"):
        PooledAttention.load(path)
    BlockLayout(torch.ones(4, 4, dtype=torch.bool), 16).save(path)
    with pytest.raises(ValueError, match="holds no pooled attention"):
        PooledAttention.load(path)
    attention.save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="cannot be read as pooled attention"):
        PooledAttention.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2"}, "upgrade SAT"),
        ({"block_size": "0"}, "expected a whole number"),
        ({"block_size": "17"}, "need pooled attention of"),
        ({"step": "soon"}, "expected a whole number"),
    ],
)
def test_files_that_say_something_else(attention, tmp_path, change, message):
    path = tmp_path / "a.safetensors"
    attention.save(path)
    names = {"block_size": "16", "query_length": "50", "key_length": "50", "step": "1"}
    metadata = {"format": "sat.PooledAttention", "version": "1", **names, **change}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        PooledAttention.load(path)


def test_nan_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    PooledAttention(torch.full((1, 2, 2), torch.nan), 16, 32, 32, 1).save(path)
    with pytest.raises(ValueError, match="finite"):
        PooledAttention.load(path)
