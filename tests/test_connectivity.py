import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sat.connectivity import reach
from sat.layout import BlockLayout
from sat.patterns import SlidingWindow

SIZE = 2


def token_by_token(layouts, causal):
    """What each token has heard of after each layer, as sets: the definition, told without matrices."""
    blocks = next(layout for layout in layouts if layout is not None).shape[0]
    tokens, every = blocks * SIZE, torch.ones(blocks, blocks, dtype=torch.bool)
    dense = BlockLayout(every.tril() if causal else every, SIZE)
    knows = [{token} for token in range(tokens)]
    for layout in layouts:
        kept = (layout or dense).element_mask(tokens, tokens).any(0)
        knows = [knows[row].union(*(knows[c] for c in range(tokens) if kept[row, c])) for row in range(tokens)]
        yield knows


@given(st.data())
def test_agrees_with_tokens_that_tell_each_other(data):
    blocks, heads = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 2))
    masks = st.lists(st.booleans(), min_size=heads * blocks**2, max_size=heads * blocks**2)
    drawn = data.draw(st.lists(st.one_of(st.none(), masks), min_size=1, max_size=4).filter(any))
    layouts = [None if m is None else BlockLayout(torch.tensor(m).view(heads, blocks, blocks), SIZE) for m in drawn]
    if all(layout is None for layout in layouts):
        return
    result = reach(layouts)
    for known, knows in zip(result.maps, token_by_token(layouts, result.causal), strict=True):
        for row in range(blocks):
            for column in range(blocks):
                queries = range(row * SIZE, (row + 1) * SIZE)
                expected = all(key in knows[q] for q in queries for key in range(column * SIZE, (column + 1) * SIZE))
                assert bool(known[row, column]) == expected


def test_a_window_of_one_neighbour_grows_by_one_block_a_layer():
    layout = SlidingWindow(1, 32, 3, "bidirectional").layout(32 * 5)
    result = reach([layout] * 6)
    assert result.complete == 4
    assert result.shares[:4] == [13 / 25, 19 / 25, 23 / 25, 1]
    assert not result.causal


def test_a_causal_layout_is_measured_by_what_it_can_reach():
    layout = BlockLayout(torch.ones(4, 4).tril().bool(), 16)
    result = reach([layout])
    assert result.causal
    assert result.complete == 1


def test_a_dense_layer_of_a_causal_model_hears_nothing_of_the_future():
    window = BlockLayout(torch.ones(8, 8).tril().triu(-1).bool(), 16)
    result = reach([window, None])
    assert result.causal
    assert result.shares == [reach([window]).shares[0], 1]
    assert not result.maps[-1].triu(1).any()


def test_what_never_meets_is_not_complete():
    result = reach([BlockLayout(torch.eye(4, dtype=torch.bool), 16)] * 3)
    assert result.complete is None
    assert result.shares == [0.25] * 3


def test_a_dense_layer_reaches_everything():
    assert reach([BlockLayout(torch.eye(4, dtype=torch.bool), 16), None]).shares == [0.25, 1]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [([(4, 5)], "4 x 5 blocks"), ([(4, 4), (5, 5)], "got 4 x 4 and 5 x 5"), ([], "got none")],
)
def test_errors_are_sentences(shapes, message):
    with pytest.raises(ValueError, match=message):
        reach([BlockLayout(torch.ones(shape, dtype=torch.bool), 16) for shape in shapes])


def test_blocks_of_different_sizes_are_not_one_model():
    blocks = torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="blocks of one size from layer to layer, got blocks of 16 and 32 tokens"):
        reach([BlockLayout(blocks, 16), BlockLayout(blocks, 32)])


def test_what_is_no_layout_is_refused():
    layout = BlockLayout(torch.ones(4, 4, dtype=torch.bool), 16)
    with pytest.raises(TypeError, match="a list with a layout for each layer"):
        reach(layout)
    with pytest.raises(TypeError, match=r"layouts\[1\] must be a BlockLayout, got Tensor; make one by BlockLayout\("):
        reach([layout, layout.mask])
