import math

import numpy as np
import pytest
import scipy.stats
import torch

from sat.ops.triton import launch
from sat.ops.triton.statistics import attention_statistics
from tests.ops.oracle import assert_as_exact_as_pytorch

device = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    device == "cpu" and not launch.INTERPRETED, reason="no GPU, and TRITON_INTERPRET is not set"
)


def scores(query, key, *, keep=None, causal=False, scale=0.4):
    """Masked scores in the dtype of the inputs."""
    x = (query * scale) @ key.transpose(2, 3)
    if keep is not None:
        x = x.masked_fill(~keep[:, None, None], -math.inf)
    return x.masked_fill(~torch.ones_like(x, dtype=torch.bool).tril(), -math.inf) if causal else x


def explicit(query, key, *, keep=None, keep_queries=None, causal=False, scale=0.4):
    """Weights ``[B, H, L, S]`` of dense attention, in the dtype of the inputs."""
    weights = scores(query, key, keep=keep, causal=causal, scale=scale).softmax(3).nan_to_num(0)
    return weights if keep_queries is None else weights * keep_queries[:, None, :, None]


def pooled(weights, size):
    per_head = weights.mean(0)
    blocks = [[tile.mean((1, 2)) for tile in rows.split(size, 2)] for rows in per_head.split(size, 1)]
    return torch.stack([torch.stack(row, 1) for row in blocks], 1)


def skewness(weights):
    """SciPy's, but 0 for a constant matrix."""
    matrix = weights.double().mean((0, 1)).cpu().numpy()
    return 0.0 if np.ptp(matrix) < 1e-12 else scipy.stats.skew(matrix, axis=None)


def run(query, key, size, *, keep=None, keep_queries=None, causal=False, scale=0.4, matrix=True, logsumexp=None):
    return attention_statistics(query, key, size, keep, keep_queries, causal, scale, matrix, logsumexp)


def check(query, key, size, *, logsumexp=None, **options):
    """Compare with float64, granting twice the error that PyTorch makes in the same dtype."""
    exact = explicit(query.double(), key.double(), **options)
    pytorch = explicit(query, key, **options).float()
    if logsumexp is not None:  # rounded to float32, which PyTorch then has to start from as well
        masking = {name: value for name, value in options.items() if name != "keep_queries"}
        pytorch = (scores(query, key, **masking) - logsumexp[..., None]).exp().nan_to_num(0) * (exact > 0)
    ours = run(query, key, size, logsumexp=logsumexp, **options)
    assert [x.dtype for x in ours] == [torch.float32] * 3
    assert_as_exact_as_pytorch(ours[0], pooled(exact, size), pooled(pytorch, size), "pooled")
    assert_as_exact_as_pytorch(ours[2], exact.mean((0, 1)), pytorch.mean((0, 1)), "score matrix")
    np.testing.assert_allclose(ours[1].item(), skewness(exact), rtol=1e-4, atol=1e-5)
    return ours


def inputs(length, keys, dim=16, dtype=torch.float32, batch=3, heads=2):
    query = 2 * torch.randn(batch, heads, length, dim, device=device)
    return query.to(dtype), torch.randn(batch, heads, keys, dim, device=device).to(dtype)


def masks(length, keys):
    """Padding with holes; of three samples, the last is nothing but padding."""
    keep, keep_queries = (torch.rand(3, n, device=device) < 0.7 for n in (keys, length))
    keep[2] = False
    keep[:2, 0] = True
    return keep, keep_queries


@pytest.mark.parametrize("dim", [8, 32, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_head_dimensions(dtype, dim):
    check(*inputs(40, 70, dim, dtype), 16, scale=dim**-0.5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("length", "keys", "size"), [(64, 64, 16), (61, 61, 32), (35, 130, 64), (140, 40, 128), (1, 9, 16), (9, 1, 16)]
)
def test_lengths_blocks_and_masks(length, keys, size, padded, causal):
    options = dict(zip(("keep", "keep_queries"), masks(length, keys), strict=True)) if padded else {}
    check(*inputs(length, keys), size, causal=causal, **options)


def test_everything_in_half_precision():
    keep, keep_queries = masks(75, 90)
    check(*inputs(75, 90, 32, torch.bfloat16), 16, keep=keep, keep_queries=keep_queries, causal=True)


@pytest.mark.parametrize("which", ["key", "query"])
def test_one_mask_alone(which):
    keep, keep_queries = masks(40, 50)
    check(*inputs(40, 50), 16, **({"keep": keep} if which == "key" else {"keep_queries": keep_queries}))


@pytest.mark.parametrize("which", ["keys", "queries", "both"])
def test_tiles_of_padding_are_skipped(which):
    query, key = inputs(200, 200)
    keep = torch.ones(3, 200, dtype=torch.bool, device=device)
    keep[0, :64] = keep[1, 130:] = False  # tiles have 64 tokens
    keep[2] = False
    options = {}
    if which != "queries":
        options["keep"] = keep
    if which != "keys":
        options["keep_queries"] = keep
    expected = check(query, key, 32, **options)
    for x, name in ((query, "keep_queries"), (key, "keep")):
        if name in options:
            x[0, :, :64] = x[1, :, 192:] = x[2] = torch.nan
    for ours, before in zip(run(query, key, 32, **options), expected, strict=True):
        assert torch.equal(ours, before)


def test_one_sample_one_head():
    check(*inputs(20, 20, batch=1, heads=1), 16, causal=True)


def test_strides():
    query, key = inputs(40, 40)
    expected = run(query, key, 16, causal=True)
    by_token = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    by_feature = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key)]
    assert by_feature[0].stride(3) != 1
    for views in (by_token, by_feature):
        assert all(torch.equal(a, b) for a, b in zip(run(*views, 16, causal=True), expected, strict=True))
    keep, keep_queries = masks(40, 40)
    strided = [torch.stack([x, ~x], 2)[:, :, 0] for x in (keep, keep_queries)]
    masked = [run(query, key, 16, keep=a, keep_queries=b) for a, b in ((keep, keep_queries), strided)]
    assert all(torch.equal(a, b) for a, b in zip(*masked, strict=True))


def test_nothing_past_the_end_is_read():
    """Slices of a buffer that holds NaN around them."""
    slices = []
    for x in inputs(35, 45, 24):
        buffer = torch.full([4, 3, 80, 40], torch.nan, device=device)
        buffer[:3, :2, : x.shape[2], :24] = x
        slices.append(buffer[:3, :2, : x.shape[2], :24])
    for causal in (False, True):
        check(*slices, 16, causal=causal)


@pytest.mark.parametrize("causal", [False, True])
def test_given_logsumexp(causal):
    """As a dense forward pass leaves it: natural logarithm, and -inf or +inf for rows without a key."""
    query, key = inputs(40, 70)
    keep, keep_queries = masks(40, 70)
    for options in ({"causal": causal}, {"keep": keep, "keep_queries": keep_queries, "causal": causal}):
        masking = {name: value for name, value in options.items() if name != "keep_queries"}
        logsumexp = scores(query.double(), key.double(), **masking).logsumexp(3).float()
        check(query, key, 16, logsumexp=logsumexp, **options)
        check(query, key, 16, logsumexp=logsumexp.masked_fill(logsumexp == -math.inf, math.inf), **options)


def test_score_matrix_only_on_request():
    query, key = inputs(40, 40)
    with_matrix, without = run(query, key, 16), run(query, key, 16, matrix=False)
    assert without[2].shape == (0,)
    assert torch.equal(with_matrix[0], without[0])
    assert torch.equal(with_matrix[1], without[1])


def test_repeatable_to_the_bit():
    query, key = inputs(70, 70)
    keep, keep_queries = masks(70, 70)
    first, second = (run(query, key, 32, keep=keep, keep_queries=keep_queries, causal=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("length", [4, 25, 75])
def test_a_constant_matrix_leans_to_neither_side(length):
    zeros = torch.zeros(3, 2, length, 8, device=device)
    assert run(zeros, zeros, 16)[1] == 0
    # Half of the samples without queries: constant, but far from 1 / S.
    some = torch.tensor([True, False, False], device=device)[:, None].expand(3, length)
    assert run(zeros, zeros, 16, keep_queries=some)[1] == 0
    assert run(zeros, zeros, 16, keep_queries=torch.zeros_like(some))[1] == 0


def test_nearly_constant_weights_keep_their_skewness():
    """The deviations are a thousandth of the mean: cancellation would show."""
    query, key = inputs(70, 90, 8)
    check(1e-3 * query, key, 16)


def test_nan_is_not_hidden():
    query, key = inputs(20, 20)
    query[0, 0, 3] = torch.nan
    blocks, skew, matrix = run(query, key, 16)
    assert skew.isnan()
    assert matrix[3].isnan().all()
    assert not matrix[4].isnan().any()
    assert blocks[0, 0].isnan().all()
    assert not blocks[1].isnan().any()


def test_large_scores():
    """Weights stay weights where the exponentials of the scores would overflow."""
    query, key = inputs(40, 40)
    check(query, key, 16, scale=40.0)


@pytest.mark.parametrize("masked", [False, True])
def test_operator_is_registered(masked):
    query, key = inputs(20, 25)
    keep, keep_queries = masks(20, 25) if masked else (None, None)
    lse = torch.zeros(3, 2, 20, device=device) if masked else None
    torch.library.opcheck(attention_statistics, (query, key, 16, keep, keep_queries, masked, 0.4, masked, lse))


def test_autocast_changes_nothing():
    query, key = inputs(20, 20)
    expected = run(query, key, 16)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = run(query, key, 16)
    assert all(torch.equal(a, b) for a, b in zip(inside, expected, strict=True))
