import pytest
import torch

from sat.sparsity import MaskLearner, best_mass, captured_mass, make_mask, select_blocks

NAMES = ("gram", "bilinear", "direct")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sharp_attention(heads, rows, columns, seed=1):
    """Pooled attention with a band off the diagonal, preferred columns and noise; not symmetric. Blocks of 32."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    logits = torch.randn(heads, rows, columns, generator=seeded(seed)) + 4 * torch.exp(-((row - column + 3) ** 2) / 2)
    logits = logits + 2 * torch.randn(1, 1, columns, generator=seeded(seed + 1))
    return torch.softmax(logits, dim=2) / 32


def symmetric_attention(size, seed=1):
    """Pooled attention that is a Gram matrix of positive factors."""
    factors = torch.rand(size, 6, generator=seeded(seed)) ** 3
    gram = factors @ factors.T
    return (gram / gram.sum() * size / 32)[None]


def captured_share(name, pooled, num_layouts, steps):
    _, rows, columns = pooled.shape
    learner = MaskLearner(make_mask(name, (rows, columns), num_layouts=num_layouts, generator=seeded()), lr=0.05)
    for _ in range(steps // 10):
        learner.fit(pooled, columns * 32, 10)
    kept = select_blocks(learner.scores(), density=0.05, keep_diagonal=False, min_blocks_per_row=0)
    lengths = (32, rows * 32, columns * 32)
    return captured_mass(pooled, kept, *lengths) / best_mass(pooled, kept, *lengths)


@pytest.mark.parametrize("name", ["bilinear", "direct"])
@pytest.mark.parametrize(("shape", "num_layouts"), [((3, 32, 32), 1), ((3, 32, 32), 3), ((2, 24, 40), 1)])
def test_masks_find_the_blocks_that_matter(name, shape, num_layouts):
    assert captured_share(name, sharp_attention(*shape), num_layouts, steps=100) > 0.95


@pytest.mark.parametrize("name", NAMES)
def test_all_masks_fit_symmetric_attention(name):
    assert captured_share(name, symmetric_attention(32), 1, steps=100) > 0.95


def test_a_gram_mask_misses_attention_that_looks_one_way():
    pooled = sharp_attention(3, 32, 32)
    assert captured_share("gram", pooled, 1, steps=300) < captured_share("bilinear", pooled, 1, steps=300) - 0.1


@pytest.mark.parametrize("name", NAMES)
def test_shapes(name):
    mask = make_mask(name, (6, 6), num_layouts=2, rank=3, generator=seeded())
    assert mask().shape == (2, 6, 6)
    assert mask().dtype == torch.float32
    if name != "gram":
        assert make_mask(name, (4, 7), generator=seeded())().shape == (1, 4, 7)


def test_gram_is_symmetric_and_positive_at_the_start():
    mask = make_mask("gram", (8, 8), rank=4, generator=seeded())
    torch.testing.assert_close(mask(), mask().mT)
    assert mask.weight.min() >= 0
    assert mask.weight.max() < 1  # uniform(0, 1) * 2 / sqrt(4)
    assert mask.weight.shape == (1, 8, 4)


@pytest.mark.parametrize("name", NAMES)
def test_masks_start_near_uniform_attention(name):
    assert make_mask(name, (32, 32), generator=seeded())().mean().item() == pytest.approx(1, abs=0.15)


def test_the_start_depends_on_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make_mask("bilinear", (5, 5), generator=seeded(7))()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first, make_mask("bilinear", (5, 5), generator=seeded(7))())
    assert not torch.equal(first, make_mask("bilinear", (5, 5), generator=seeded(8))())


def test_a_direct_mask_starts_at_the_first_observation():
    learner = MaskLearner(make_mask("direct", (2, 2), generator=seeded()), lr=0.25)
    # Targets of the mean head, in units of uniform attention over 4 keys.
    learner.fit(torch.tensor([[[0.5, 0.0], [0.25, 0.25]], [[0.5, 0.0], [0.25, 0.0]]]), 4, 3)
    torch.testing.assert_close(learner.scores(), torch.tensor([[[2.0, 0.0], [1.0, 0.5]]]))
    learner.fit(torch.tensor([[[0.5, 0.5], [0.0, 0.0]]] * 2), 4, 1)
    moved = learner.scores()
    assert moved[0, 0, 0] == 2
    assert 0 < moved[0, 0, 1] < 2
    assert 0 < moved[0, 1, 0] < 1


def test_one_adam_step_by_hand():
    # The first step of Adam has the length of the learning rate, towards the target.
    mask = make_mask("bilinear", (2, 2), rank=1, generator=seeded())
    with torch.no_grad():
        mask.rows.copy_(torch.tensor([[[1.0], [2.0]]]))
        mask.columns.copy_(torch.tensor([[[1.0], [1.0]]]))
    learner = MaskLearner(mask, lr=0.25)
    learner.fit(torch.tensor([[[0.5, 0.5], [0.25, 0.25]]]), 4, 1)  # targets 2, 2, 1, 1 of scores 1, 1, 2, 2
    # The first row is too small, the second too large; the columns' gradients are 2 (-1 + 2) each.
    torch.testing.assert_close(learner.scores(), torch.tensor([[[1.25], [1.75]]]) @ torch.tensor([[[0.75, 0.75]]]))


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
@pytest.mark.parametrize("name", NAMES)
def test_the_fit_does_not_notice_its_surroundings(name, context):
    pooled = sharp_attention(2, 6, 6)
    plain, inside = (MaskLearner(make_mask(name, (6, 6), generator=seeded()), lr=0.05) for _ in range(2))
    plain.fit(pooled, 192, 5)
    with context():
        inside.fit(pooled * 1, 192, 5)
        scores = inside.scores()
    assert torch.equal(plain.scores(), scores)


def test_no_gradient_reaches_the_statistics():
    pooled = sharp_attention(1, 4, 4).requires_grad_()
    learner = MaskLearner(make_mask("direct", (4, 4), generator=seeded()), lr=0.05)
    learner.fit(pooled, 128, 3)
    assert pooled.grad is None
    assert not learner.scores().requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "dense", "grid": (4, 4)}, "'gram', 'bilinear', 'direct'"),
        ({"name": "gram", "grid": (4, 5)}, "as many block rows as columns"),
        ({"name": "bilinear", "grid": (4, 4), "rank": 0}, "mask_rank"),
    ],
)
def test_masks_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_mask(**arguments, generator=seeded())


def test_the_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        learner = MaskLearner(make_mask("bilinear", (4, 4), generator=seeded()), lr=0.05)
        learner.fit(sharp_attention(1, 4, 4), 128, 1)
        learner.scores()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
