import pytest
import torch
import triton

from sat.ops.triton import parameters, tune

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("kernel", parameters.ATTENTION_KERNELS)
def test_candidates_fit_the_lists(kernel, size, half):
    tiles = list(tune.candidates(kernel, size, half))
    assert len(tiles) == len(set(tiles)) >= 4
    for tile in tiles:
        own = tile.columns if kernel == "key_value_gradient" else tile.rows
        assert own // size <= 8  # an entry has eight bits for the blocks of its group


def test_layouts_like_learned_ones_have_the_density_and_the_diagonal():
    layout = tune.learned_like(3, 20, 16, 0.1, torch.device("cpu"))
    assert layout.mask[:, range(20), range(20)].all()
    assert (layout.mask.sum((1, 2)) == 40).all()
    assert (layout.mask.sum(1).max(1).values > 5).all()  # a vertical line in each head


def test_the_fastest_tile_wins(monkeypatch):
    """The kernels really run with each tile; only the clock is made up."""
    tiles = {
        name: [parameters.Tile(16, 16, 4, 1), parameters.Tile(32, 16, 4, 2)] for name in parameters.ATTENTION_KERNELS
    }
    monkeypatch.setattr(tune, "candidates", lambda kernel, *_: iter(tiles[kernel]))
    calls = []

    def milliseconds(function):
        assert function() is not None
        calls.append(None)
        return {2: 1.0}.get(len(calls), 5.0)  # the first candidate of the first kernel

    layout = tune.learned_like(1, 3, 16, 0.4, DEVICE)
    found = tune.tune(layout, torch.randn(1, 1, 40, 16, device=DEVICE), False, milliseconds)
    default = parameters.attention_tiles(16, 16, torch.float32, DEVICE, False)
    assert found["attention"] == (tiles["attention"][0], 1.0, 5.0)
    assert found["query_gradient"] == (parameters.Tile(*default[4:8]), 5.0, 5.0)


@pytest.mark.parametrize("error", [triton.runtime.errors.OutOfResources(9, 8, "memory"), RuntimeError("PassManager")])
def test_a_tile_that_does_not_run_with_masks_does_not_win(monkeypatch, error):
    tiles = [parameters.Tile(16, 16, 4, 1), parameters.Tile(32, 16, 4, 2)]
    monkeypatch.setattr(tune, "candidates", lambda kernel, *_: iter(tiles if kernel == "attention" else []))

    def attend(query, key, value, layout, *, tiles, is_causal, key_padding_mask, **_):
        if is_causal and tiles[:4] == [16, 16, 4, 1]:
            assert key_padding_mask.all()
            raise error
        return query

    monkeypatch.setattr(tune.flash, "block_sparse_attention", attend)
    times = iter([5.0, 1.0, 2.0])
    layout = tune.learned_like(1, 3, 16, 0.4, DEVICE)
    found = tune.tune(layout, torch.randn(1, 1, 40, 16, device=DEVICE), False, lambda run: next(times, 9.0))
    assert found["attention"] == (tiles[1], 2.0, 5.0)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu_there_is_a_sentence(capsys):
    assert tune.main([]) == 2
    assert "no CUDA device here" in capsys.readouterr().err
