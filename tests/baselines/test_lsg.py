import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sat.baselines import lsg
from sat.baselines.lsg import LSGAttention
from tests.ops.oracle import assert_as_exact_as_pytorch

SELECTIONS = ["norm", "pooling", "stride", "block_stride", "lsh", "bos_pooling"]
CHUNKED = ("norm", "lsh")


def tensors(attention: LSGAttention, tokens: int, batch: int = 2, dim: int = 4, dtype=torch.float64) -> list[Tensor]:
    length = attention.num_global_tokens + tokens
    # Not contiguous, as a projection of all heads leaves them.
    return [
        torch.randn(batch, length, attention.num_heads, dim, dtype=torch.float64)
        .to(dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]  # fmt: skip


def padding(attention: LSGAttention, tokens: int) -> Tensor:
    """Of a sequence with padding on both sides and in between, and one that ends early; globals are real."""
    mask = torch.ones(2, attention.num_global_tokens + tokens, dtype=torch.bool)
    sequence = mask[:, attention.num_global_tokens :]
    sequence[0, :3] = sequence[0, tokens // 2] = sequence[0, -1] = False
    sequence[1, tokens // 3 :] = False
    return mask


# The definition, one query at a time. What is chosen is chosen in float64, in whatever dtype the rest is computed.


def chosen_tokens(attention: LSGAttention, keys: Tensor, real: list[bool], head: int) -> list[list[int]]:
    """For each sparse token the tokens that it is made of; ``keys`` [P, D] and ``real`` of whole blocks."""
    size, factor = attention.block_size, attention.sparsity_factor
    length, keys = len(real), keys.detach().double()
    if factor == 1:
        return [[i] for i in range(length)]
    if attention.selection in ("pooling", "bos_pooling"):
        return [[i + j for j in range(factor)] for i in range(0, length, factor)]
    if attention.selection == "stride":
        return [[i + head % factor] for i in range(0, length, factor)]
    if attention.selection == "block_stride":
        step = size // factor
        return [[i + (head * step + j) % size] for i in range(0, length, size) for j in range(step)]
    chunk = min(size, attention.sparse_block_size or size)
    out = []
    for start in range(0, length, chunk):
        positions = range(start, start + chunk)
        if attention.selection == "norm":
            ranked = sorted(positions, key=lambda i: (not real[i], -keys[i].norm().item(), i))
            out += [[i] for i in sorted(ranked[: chunk // factor])]
            continue
        directions = attention.directions[head, : keys.shape[1]]
        first, second = directions[:, : (chunk + 1) // 2], directions[:, (chunk + 1) // 2 :]

        def bucket(x: Tensor, directions: Tensor, count: int) -> int:
            projections = [(x * direction).sum().item() for direction in directions.double().T]
            both = (projections + [-p for p in projections])[:count]
            return both.index(max(both))

        together: dict[int, list[int]] = {}
        for i in positions:
            if real[i]:
                together.setdefault(bucket(keys[i], first, chunk), []).append(i)
        buckets: list[list[int]] = [[] for _ in range(chunk // factor)]
        for members in together.values():
            buckets[bucket(sum(keys[i] for i in members), second, chunk // factor)] += members
        out += buckets
    return out


def definition(
    attention: LSGAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
) -> Tensor:
    size, sparse_size, factor = attention.block_size, attention.sparse_block_size, attention.sparsity_factor
    num_global = attention.num_global_tokens
    batch, heads, length, dim = query.shape
    tokens = length - num_global
    key_mask = torch.ones(batch, length, dtype=torch.bool) if key_padding_mask is None else key_padding_mask
    query_mask = torch.ones(batch, length, dtype=torch.bool) if query_padding_mask is None else query_padding_mask
    missing, step = -tokens % size, size // factor
    rows = []
    for sample in range(batch):
        for head in range(heads):
            q, k, v = (x[sample, head] for x in (query, key, value))
            real = key_mask[sample, num_global:].tolist() + [False] * missing
            made_of = chosen_tokens(attention, F.pad(k[num_global:], (0, 0, 0, missing)), real, head)
            made_of = [[num_global + i for i in group if real[i]] for group in made_of]
            both = (key_mask & query_mask)[sample, num_global:].tolist()
            bos = q[num_global + (both.index(True) if True in both else 0)]
            sparse = []
            for group in made_of:
                weights = torch.full([len(group)], 1 / max(len(group), 1), dtype=k.dtype)
                if attention.selection == "bos_pooling":
                    weights = torch.softmax(k[group] @ bos * dim**-0.5, 0)
                sparse.append((weights @ k[group], weights @ v[group]))
            for i in range(length):
                seen = [j for j in range(length) if key_mask[sample, j]]
                block = (i - num_global) // size
                far: list[int] = []
                if i >= num_global and tokens > 2 * size:
                    near = range(num_global + (block - 1) * size, num_global + (block + 2) * size)
                    seen = [j for j in seen if j < num_global or j in near]
                    left = range((block - 1) * step - sparse_size, (block - 1) * step)
                    right = range((block + 2) * step, (block + 2) * step + sparse_size)
                    far = [j for j in (*left, *right) if 0 <= j < len(sparse) and made_of[j]]
                if not query_mask[sample, i] or not seen + far:
                    rows.append(torch.zeros(dim, dtype=query.dtype))
                    continue
                keys, values = (
                    torch.cat([x[seen], *(sparse[j][which][None] for j in far)]) for which, x in enumerate((k, v))
                )
                rows.append(
                    F.scaled_dot_product_attention(*(x[None, None] for x in (q[i, None], keys, values))).view(-1)
                )
    return torch.stack(rows).view(query.shape)


def check(attention: LSGAttention, inputs: list[Tensor], **masks: Tensor) -> None:
    out = attention(*inputs, **masks)
    expected = definition(attention, *inputs, **masks)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, upstream)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, upstream))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("heads", "size", "sparse_size", "factor", "num_global", "tokens"),
    [
        (3, 4, 4, 2, 1, 25),  # partial last block; more heads than the factor
        (2, 4, 8, 2, 2, 32),  # longer sparse blocks, whole last block
        (1, 8, 4, 2, 0, 37),  # shorter ones, nothing global
        (2, 4, 4, 4, 1, 38),  # one sparse token a block
        (1, 4, 6, 1, 3, 23),  # all tokens are sparse tokens; sparse blocks that are no multiple of the step
        (2, 6, 7, 3, 1, 31),  # sizes that are no powers of 2
        (2, 4, 4, 2, 1, 9),  # one token more than full attention has
        (1, 6, 6, 2, 1, 26),  # an odd number of buckets
        (2, 4, 0, 2, 1, 27),  # no sparse tokens
    ],
)
@pytest.mark.parametrize("selection", SELECTIONS)
def test_is_what_the_definition_says(selection, heads, size, sparse_size, factor, num_global, tokens, padded):
    attention = LSGAttention(
        heads,
        tokens,
        block_size=size,
        sparse_block_size=sparse_size,
        sparsity_factor=factor,
        selection=selection,
        num_global_tokens=num_global,
    )
    mask = padding(attention, tokens)
    masks = {"key_padding_mask": mask, "query_padding_mask": mask} if padded else {}
    check(attention, tensors(attention, tokens, batch=2 if padded else 1), **masks)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_short_sparse_blocks_that_do_not_divide_the_block(selection):
    if selection in CHUNKED:
        with pytest.raises(ValueError, match="below block_size 8 must divide it, got 3"):
            LSGAttention(2, 40, block_size=8, sparse_block_size=3, sparsity_factor=1, selection=selection)
        return
    attention = LSGAttention(2, 40, block_size=8, sparse_block_size=3, sparsity_factor=2, selection=selection)
    check(attention, tensors(attention, 39, batch=1))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_masks_that_differ_and_rows_without_a_key(selection):
    attention = LSGAttention(
        1, 26, block_size=4, sparse_block_size=4, selection=selection, num_global_tokens=1
    )  # fmt: skip
    inputs = tensors(attention, 26, batch=3)
    keys, queries = torch.rand(2, 3, 27) < 0.6
    keys[0], queries[0] = False, True  # nothing to see at all
    keys[1, :12] = False  # the first two blocks see sparse tokens only, those before the first global one nothing
    check(attention, inputs, key_padding_mask=keys, query_padding_mask=queries)
    check(attention, inputs, key_padding_mask=keys)
    check(attention, inputs, query_padding_mask=queries)
    out = attention(*inputs, key_padding_mask=keys)
    assert (out[0] == 0).all()
    assert (out[1] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_as_exact_as_pytorch(selection, dtype):
    attention = LSGAttention(2, 45, block_size=8, sparse_block_size=8, sparsity_factor=4, selection=selection)
    query, key, value = tensors(attention, 45, dim=16)
    # Lengths so close that half precisions cannot tell which is the longest.
    key = F.normalize(key, dim=-1) * (4 + 0.03 * torch.rand(key.shape[:3])[..., None])
    inputs = [x.detach().to(dtype) for x in (query, key, value)]
    mask = padding(attention, 45)
    upstream = torch.randn(inputs[0].shape, dtype=torch.float64).to(dtype)

    def results(function, dtype: torch.dtype) -> list[Tensor]:
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = function(*given, key_padding_mask=mask, query_padding_mask=mask)
        assert out.dtype == dtype
        return [out, *torch.autograd.grad(out, given, upstream.to(dtype))]

    def of_definition(*args: Tensor, **masks: Tensor) -> Tensor:
        return definition(attention, *args, **masks)

    ours, exact, pytorch = (
        results(attention, dtype),
        results(of_definition, torch.float64),
        results(of_definition, dtype),
    )
    for x, y, z, what in zip(ours, exact, pytorch, ("out", "query", "key", "value"), strict=True):
        assert_as_exact_as_pytorch(x, y, z, what)


@pytest.mark.parametrize("tokens", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_up_to_two_blocks_it_is_full_attention(selection, tokens):
    attention = LSGAttention(2, 100, block_size=4, sparse_block_size=4, selection=selection, num_global_tokens=2)
    inputs = tensors(attention, tokens)
    torch.testing.assert_close(attention(*inputs), F.scaled_dot_product_attention(*inputs))
    mask = torch.ones(2, 2 + tokens, dtype=torch.bool)
    mask[0], mask[1, -1] = False, False
    check(attention, inputs, key_padding_mask=mask, query_padding_mask=mask)
    check(attention, inputs, key_padding_mask=mask)


def seen_by(attention: LSGAttention, query_position: int, head: int, tokens: int, **masks: Tensor) -> set[int]:
    """Keys, in their positions without the global ones, on which the output of one query depends."""
    query, key, value = tensors(attention, tokens, batch=1)
    first = attention.num_global_tokens
    out = attention(query, key, value, **masks)[0, head, first + query_position]
    grads = torch.autograd.grad(out.sum(), [key, value])
    used = {tuple(index) for grad in grads for index in (grad[0] != 0).any(-1).nonzero().tolist()}
    assert {h for h, _ in used} <= {head}
    assert {(head, i) for i in range(first)} <= used
    return {i - first for _, i in used if i >= first}


@pytest.mark.parametrize("query_position", [12, 14, 15])
def test_worked_example(query_position):
    # Block 3 of 8 blocks of 4, the last with 1 token; 2 of 4 sparse tokens fall to each block.
    local = set(range(8, 20))

    def seen(selection: str, head: int = 0, **sizes: int) -> set[int]:
        attention = LSGAttention(
            2, 29, selection=selection, **{"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 2, **sizes}
        )
        return seen_by(attention, query_position, head, 29)

    assert seen("stride") == local | {0, 2, 4, 6} | {20, 22, 24, 26}
    assert seen("stride", head=1) == local | {1, 3, 5, 7} | {21, 23, 25, 27}
    assert seen("block_stride") == local | {0, 1, 4, 5} | {20, 21, 24, 25}
    assert seen("block_stride", head=1) == local | {2, 3, 6, 7} | {22, 23, 26, 27}
    assert seen("stride", sparse_block_size=2) == local | {4, 6} | {20, 22}
    assert seen("stride", sparse_block_size=3) == local | {2, 4, 6} | {20, 22, 24}
    assert seen("stride", sparse_block_size=5) == local | {0, 2, 4, 6} | {20, 22, 24, 26, 28}
    assert seen("stride", sparsity_factor=4, sparse_block_size=1) == local | {4} | {20}
    assert seen("pooling", sparse_block_size=2) == local | {4, 5, 6, 7} | {20, 21, 22, 23}
    # Of tokens 0 to 3, 4 to 7, 20 to 23 and 24 to 27 two each.
    far = seen("norm") - local
    assert [len(far & set(range(i, i + 4))) for i in range(0, 29, 4)] == [2, 2, 0, 0, 0, 2, 2, 0]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_what_is_not_seen_has_no_effect(selection):
    attention = LSGAttention(
        2, 60, block_size=4, sparse_block_size=4, selection=selection, sparsity_factor=2, num_global_tokens=1
    )  # fmt: skip
    query, key, value = (x.detach() for x in tensors(attention, 60, batch=1))
    before = attention(query, key, value)
    key, value = key.clone(), value.clone()
    key[:, :, 1:25] += 3  # tokens 0 to 23: blocks 0 to 5
    value[:, :, 1:25] *= -2
    after = attention(query, key, value)
    # Sparse tokens reach 2 blocks beyond the next one: the blocks 9 on see nothing of it. The last query of bos_pooling
    # is that of token 0, which did not change.
    assert torch.equal(after[:, :, 1 + 9 * 4 :], before[:, :, 1 + 9 * 4 :])
    assert (after[:, :, : 1 + 9 * 4] != before[:, :, : 1 + 9 * 4]).any(-1).all()


@pytest.mark.parametrize("tokens", [7, 45])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_padding_may_hold_anything(selection, tokens):
    attention = LSGAttention(2, 45, block_size=4, sparse_block_size=8, selection=selection, num_global_tokens=1)
    inputs = tensors(attention, tokens)
    mask = padding(attention, tokens)
    masks = {"key_padding_mask": mask, "query_padding_mask": mask}
    spoilt = [x.detach().masked_fill(~mask[:, None, :, None], torch.nan).requires_grad_() for x in inputs]
    out, expected = attention(*spoilt, **masks), attention(*inputs, **masks)
    assert torch.equal(out, expected)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, spoilt, upstream)
    assert all((grad.masked_select(~mask[:, None, :, None]) == 0).all() for grad in grads)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected, inputs, upstream)))


def test_norm_takes_tokens_with_keys_of_zero_before_padding():
    attention = LSGAttention(1, 40, block_size=4, sparse_block_size=4, selection="norm", num_global_tokens=0)
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, 0:2] = mask[0, 5] = False
    query, _, value = (x.detach() for x in tensors(attention, 40, batch=1))
    value.requires_grad_()
    out = attention(query, torch.zeros_like(query), value, key_padding_mask=mask)
    (grad,) = torch.autograd.grad(out[0, 0, 12].sum(), value)  # block 3 sees 8 to 19 and two of each 4 beyond
    seen = (grad[0, 0] != 0).any(-1).nonzero().flatten().tolist()
    assert seen == [2, 3, 4, 6, *range(8, 20), 20, 21, 24, 25]


def test_rotations_depend_on_nothing_but_the_seed():
    def run(seed: int, **options) -> Tensor:
        attention = LSGAttention(2, 64, block_size=8, sparse_block_size=8, selection="lsh", seed=seed)
        return attention.train(options.get("training", False))(*inputs)

    inputs = tensors(LSGAttention(2, 64, block_size=8), 64)
    state = torch.get_rng_state()
    first = run(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(run(0, training=True), first)
    assert not torch.equal(run(1), first)
    fresh = LSGAttention(2, 64, block_size=8, sparse_block_size=8, selection="lsh")
    assert not fresh.state_dict()


def test_no_gradient_flows_through_the_choice_of_norm():
    attention = LSGAttention(1, 40, block_size=4, sparse_block_size=4, selection="norm", num_global_tokens=0)
    query, key, value = tensors(attention, 40, batch=1)
    (grad,) = torch.autograd.grad(attention(query, key, value)[0, 0, 12:16].sum(), key)
    with_gradient = (grad[0, 0] != 0).any(-1).view(-1, 4).sum(1).tolist()
    assert with_gradient == [2, 2, 4, 4, 4, 2, 2, 0, 0, 0]


@pytest.mark.parametrize(("selection", "tokens"), [("norm", 8), *((selection, 37) for selection in SELECTIONS)])
def test_compiles_into_one_graph(selection, tokens):
    attention = LSGAttention(2, 37, block_size=4, sparse_block_size=4, selection=selection)
    inputs, mask = tensors(attention, tokens, dtype=torch.float32), padding(attention, tokens)
    expected = attention(*inputs, key_padding_mask=mask, query_padding_mask=mask)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    out = compiled(*inputs, key_padding_mask=mask, query_padding_mask=mask)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, inputs, upstream)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, upstream))


def test_opcheck():
    sizes = ((2, 1, 1, 3), (2, 1, 12, 3), (2, 1, 6, 3))
    inputs = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    torch.library.opcheck(lsg._windows, (*inputs, 4, 2, 3))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_under_autocast_it_is_attention_in_its_dtype(selection):
    attention = LSGAttention(2, 37, block_size=4, sparse_block_size=4, selection=selection)
    query, key, value = tensors(attention, 37, dtype=torch.float32)
    value = value.detach().bfloat16()
    expected = attention(query.bfloat16(), key.bfloat16(), value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(query, key, value)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.float().sum().backward()
    assert query.grad.dtype == torch.float32


@pytest.mark.parametrize("tokens", [8, 37])
def test_dropout_acts_in_training_only(tokens):
    attention = LSGAttention(2, 37, block_size=4, sparse_block_size=4, dropout=0.5)
    inputs = tensors(attention, tokens)
    first, second = attention.train()(*inputs), attention(*inputs)
    assert not torch.equal(first[:, :, 0], second[:, :, 0])  # the global token
    assert not torch.equal(first[:, :, 1:], second[:, :, 1:])
    assert torch.equal(attention.eval()(*inputs), attention(*inputs))
    check(attention, inputs)
    mean = torch.stack([attention.train()(*inputs).detach() for _ in range(400)]).mean(0)
    torch.testing.assert_close(mean, attention.eval()(*inputs), rtol=0, atol=0.4)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_memory_grows_with_the_length_only(selection):
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, Tensor):
                    self.numbers = max(self.numbers, x.numel())
            return out

    attention = LSGAttention(1, 1024, block_size=8, sparse_block_size=8, selection=selection)

    def largest(tokens: int) -> int:
        inputs = tensors(attention, tokens, batch=1)
        with Largest() as mode:
            attention(*inputs).sum().backward()
        return mode.numbers

    assert largest(1024) <= 2 * largest(512) < 2 * 512**2 // 8


def test_tells_how_many_tokens_to_prepend():
    assert LSGAttention(2, 64, num_global_tokens=3).prepended_tokens == 3
    assert not list(LSGAttention(2, 64).parameters())
    assert "selection='norm', num_global_tokens=1" in repr(LSGAttention(2, 64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"sparse_block_size": -1}, "sparse_block_size must be at least 0, got -1"),
        ({"sparsity_factor": 0}, "sparsity_factor must be at least 1, got 0"),
        ({"num_global_tokens": -1}, "num_global_tokens must be at least 0, got -1"),
        ({"selection": "best"}, "selection must be one of 'norm', 'pooling', .*'bos_pooling', got 'best'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"sparsity_factor": 3}, "sparsity_factor must divide block_size 32, .* got 3"),
        ({"sparse_block_size": 24}, "selection='norm' a sparse_block_size below block_size 32 must divide it, got 24"),
        (
            {"sparse_block_size": 4, "sparsity_factor": 8, "selection": "lsh"},
            "selection='lsh' sparsity_factor must divide sparse_block_size 4, got 8",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LSGAttention(**{"num_heads": 2, "seq_len": 64, **arguments})


def test_tensors_that_do_not_fit():
    attention = LSGAttention(2, 40, block_size=8, num_global_tokens=2)
    for shape in ((1, 3, 20, 4), (1, 2, 43, 4), (1, 2, 2, 4)):
        with pytest.raises(
            ValueError, match=f"2 heads .* 2 global ones and 1 to 40 others, got {shape[1]} heads, {shape[2]}"
        ):
            attention(*(torch.randn(shape) for _ in range(3)))
    query, key, value = (torch.randn(1, 2, 20, 4) for _ in range(3))
    with pytest.raises(ValueError, match="20 queries and 19 keys"):
        attention(query, key[:, :, 1:], value[:, :, 1:])
    with pytest.raises(TypeError, match=r"value is torch\.float16"):
        attention(query, key, value.half())
    with pytest.raises(TypeError, match="key_padding_mask must be a bool tensor"):
        attention(query, key, value, key_padding_mask=torch.ones(1, 20))
    with pytest.raises(ValueError, match=r"query_padding_mask must have the shape \[1, 20\], got \[1, 18\]"):
        attention(query, key, value, query_padding_mask=torch.ones(1, 18, dtype=torch.bool))
    attention = LSGAttention(2, 40, selection="lsh")
    with pytest.raises(ValueError, match="head dimensions up to 256, got 257; use more heads, or"):
        attention(*(torch.randn(1, 2, 20, 257) for _ in range(3)))
