# Which backend is taken, what is refused with which sentence, and what the lists and launch parameters hold.
import itertools
import json
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from sat import ops
from sat.layout import BlockLayout
from sat.ops.triton import index, launch, parameters
from tests.ops import oracle

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def call(name: str, dtype: torch.dtype = torch.float32, size: int = 16, dim: int = 8, **options):
    query = torch.randn(1, 2, 2 * size, dim, device=DEVICE).to(dtype)
    layout = BlockLayout(torch.ones(2, 2, 2, dtype=torch.bool, device=DEVICE), size)
    values = torch.randn(1, 8, size, size, device=DEVICE).to(dtype)
    return {
        "attention": lambda: ops.block_sparse_attention(query, query, query, layout, **options),
        "composed": lambda: ops.block_sparse_attention(query, query, query, layout, fused=False, **options),
        "sddmm": lambda: ops.sddmm(query, query, layout, **options),
        "sparse_softmax": lambda: ops.sparse_softmax(values, layout, **options),
        "spmm": lambda: ops.spmm(values, query, layout, **options),
        "matmul": lambda: ops.matmul(query, query, layout, "sdd", trans_b=True, **options),
        "statistics": lambda: ops.attention_statistics(query, query, size, **options),
    }[name]()


NAMES = ["attention", "composed", "sddmm", "sparse_softmax", "spmm", "matmul", "statistics"]


@pytest.mark.parametrize("name", NAMES)
def test_a_case_that_the_kernels_do_not_cover_is_a_sentence(name):
    with pytest.raises(
        RuntimeError, match=r"backend='triton' cannot take this case: .*float16, got torch.float64; use"
    ):
        call(name, dtype=torch.float64, backend="triton")
    with pytest.raises(RuntimeError, match="blocks of 16, 32, 64 and 128, got 24"):
        call(name, size=24, backend="triton")
    if name != "sparse_softmax":
        for dim in (4, 300):
            with pytest.raises(RuntimeError, match=f"head dimensions from 8 to 256, got {dim}"):
                call(name, dim=dim, backend="triton")


@pytest.mark.parametrize("name", NAMES)
def test_auto_takes_another_backend_for_such_a_case(name):
    for options in ({"dtype": torch.float64}, {"size": 24}, {"dim": 4}):
        call(name, **options)


def test_on_a_cpu_the_kernels_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert "set TRITON_INTERPRET=1" in launch.unsupported(CPU, torch.float32, 16, 8)
    assert "tensors are on meta" in launch.unsupported(torch.device("meta"), torch.float32, 16, 8)


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    reason = launch.unsupported(torch.device("cuda"), torch.float16, 16, 64)
    assert reason == "its kernels need compute capability 8.0 or newer, and Tesla T4 has 7.5"


def test_without_the_package_triton(monkeypatch):
    monkeypatch.setattr(ops, "triton", None)
    with pytest.raises(RuntimeError, match="the package triton is not installed"):
        call("attention", backend="triton")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU nothing is interpreted")
def test_on_a_cpu_auto_never_interprets(monkeypatch):
    monkeypatch.setattr(ops.triton, "block_sparse_attention", None)
    call("attention")


@pytest.mark.skipif(not launch.INTERPRETED, reason="nothing is interpreted")
def test_a_large_case_in_the_interpreter_warns(monkeypatch):
    monkeypatch.setattr(ops.triton, "block_sparse_attention", lambda query, *_, **__: query)
    query = torch.zeros(1, 1, 8192, 16)
    layout = BlockLayout(torch.ones(64, 64, dtype=torch.bool), 128)
    with pytest.warns(UserWarning, match="computes 67,108,864 scores one tile at a time: about 4 minutes"):
        ops.block_sparse_attention(query, query, query, layout, backend="triton")


def test_too_many_programs_are_refused_before_the_launch():
    with pytest.raises(ValueError, match="needs 3,000,000,000 programs"):
        launch.launch(None, 3_000_000_000)


def test_precision_follows_pytorchs_switch():
    assert launch.matrix_precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert launch.matrix_precision(torch.float32) == "tf32"
        assert launch.matrix_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_precision_follows_pytorchs_newer_switch():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert launch.matrix_precision(torch.float32) == "tf32"
        matmul.fp32_precision = "ieee"
        assert launch.matrix_precision(torch.float32) == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("name", NAMES)
def test_lists_made_in_evaluation_do_for_training(name):
    """Lightning validates in inference mode before the first training step."""
    size, layout = 16, BlockLayout(torch.ones(2, 2, 2, dtype=torch.bool, device=DEVICE), 16)
    query = torch.randn(1, 2, 2 * size, 8, device=DEVICE, requires_grad=True)
    values = torch.randn(1, 8, size, size, device=DEVICE, requires_grad=True)

    def run():
        if name == "statistics":
            return ops.attention_statistics(query, query, size, backend="triton").pooled
        return {
            "attention": lambda: ops.block_sparse_attention(query, query, query, layout, backend="triton"),
            "composed": lambda: ops.block_sparse_attention(query, query, query, layout, fused=False, backend="triton"),
            "sddmm": lambda: ops.sddmm(query, query, layout, backend="triton"),
            "sparse_softmax": lambda: ops.sparse_softmax(values, layout, backend="triton"),
            "spmm": lambda: ops.spmm(values, query, layout, backend="triton"),
            "matmul": lambda: ops.matmul(query, query, layout, "sdd", trans_b=True, backend="triton"),
        }[name]()

    with torch.inference_mode():
        evaluated = run()
    trained = run()
    assert torch.equal(evaluated, trained)
    if name != "statistics":
        trained.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": torch.tensor(0.5)}, TypeError, "scale must be a number, got Tensor"),
        ({"attn_bias": torch.zeros(32, 32).to(torch.float8_e5m2)}, TypeError, "got torch.float8_e5m2"),
    ],
)
def test_bad_options(change, error, message):
    for name in ("attention", "sparse_softmax"):
        with pytest.raises(error, match=message):
            call(name, **{key: x.to(DEVICE) if key == "attn_bias" else x for key, x in change.items()})


def test_bad_values():
    layout = BlockLayout(torch.ones(1, 1, dtype=torch.bool), 16)
    values = torch.zeros(1, 1, 16, 16)
    with pytest.raises(ValueError, match="scores is empty"):
        ops.sparse_softmax(values[:0], layout)
    with pytest.raises(ValueError, match="layout is on cpu but scores is on meta"):
        ops.sparse_softmax(values.to("meta"), layout)
    with pytest.raises(ValueError, match="layout is on cpu but weights is on meta"):
        ops.spmm(values.to("meta"), torch.zeros(1, 1, 16, 8), layout)


@pytest.mark.parametrize("name", ["attention", pytest.param("composed", marks=pytest.mark.long), "statistics"])
def test_compiles_with_sizes_that_are_kept_open(name):
    def run(query, size):
        layout = layouts[size]
        if name == "statistics":
            return ops.attention_statistics(query, query, size, backend="triton").pooled
        return ops.block_sparse_attention(query, query, query, layout, fused=name == "attention", backend="triton")

    layouts = {size: BlockLayout(torch.ones(1, 2, 2, dtype=torch.bool, device=DEVICE), size) for size in (16, 32)}
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for size, dim, batch in ((16, 8, 1), (16, 24, 2), (32, 24, 2)):
        query = torch.randn(batch, 1, 2 * size - 3, dim, device=DEVICE)
        torch.testing.assert_close(compiled(query, size), run(query, size))


def check_lists(own, lists, group):
    """They hold what a mask keeps, and the segments of a cut list are all of it, in order."""
    entries, counts, segments, slots = (x.cpu() for x in lists)
    for head in range(len(own)):
        for i, rows in enumerate(own[head].split(group)):
            listed = entries[head, i, : counts[head, i]]
            assert (listed & 2**24 - 1).tolist() == rows.any(0).nonzero()[:, 0].tolist()
            for entry in listed.tolist():
                kept = rows[:, entry & 2**24 - 1].tolist()
                assert [bool(entry >> 24 + bit & 1) for bit in range(len(kept))] == kept
            first, pieces = slots[head, i].tolist()
            if pieces:
                own_segments = segments[head, first : first + pieces]
                assert (own_segments[:, 0] == i).all()
                bounds = [own_segments[0, 1].item(), *own_segments[:, 2].tolist()]
                assert own_segments[1:, 1].tolist() == bounds[1:-1]  # each begins where the one before it ends
                assert (bounds[0], bounds[-1]) == (0, counts[head, i].item())
                assert max(b - a for a, b in itertools.pairwise(bounds)) < counts[head, i]
        used = slots[head, :, 1].sum()
        assert (segments[head, used:, 0] == -1).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 13, 17), (3, 40, 40), (2, 64, 3), (2, 3, 64), (1, 1, 1)], ids=str)
def test_lists_hold_each_groups_union(shape, group, transposed):
    mask = torch.rand(shape) < 0.1
    mask[:, :, shape[2] // 2] = True
    mask[0, shape[1] // 2] = True
    mask[-1, shape[1] - 1] = False
    lists = index.tile_index(BlockLayout(mask.to(DEVICE), 16), 16 * group, 1, transposed=transposed)
    check_lists(mask.transpose(1, 2) if transposed else mask, lists, group)


def test_there_are_no_more_segments_than_room(monkeypatch):
    kept = torch.eye(64, dtype=torch.bool)[None].repeat(3, 1, 1)
    kept[0, :8], kept[1, 5], kept[2, 7:10] = True, True, True  # eight long lists, one, and three
    layout = BlockLayout(kept.to(DEVICE), 16)
    monkeypatch.setattr(index, "MOST_SEGMENTS", 3 * 8)
    lists = index.tile_index(layout, 16, 3)
    assert lists.capacity == 8
    check_lists(kept, lists, 1)
    parts = lists.slots[..., 1].cpu()
    assert parts[0].sum() == 0  # each of the eight in two parts would be too many
    assert parts[1].sum() == parts[1, 5] == 8
    assert parts[2, 7:10].tolist() == [2, 2, 2]  # of 32 entries: four of 16 would be too many


def test_lists_are_made_once_and_never_cut_where_there_is_work_enough(monkeypatch):
    layout = BlockLayout(torch.ones(1, 64, 64, dtype=torch.bool, device=DEVICE), 16)
    assert index.tile_index(layout, 16, 1) is index.tile_index(layout, 16, 1)
    assert index.tile_index(layout, 16, 1).capacity > 0
    assert index.tile_index(layout, 16, 63).capacity > 0
    assert index.tile_index(layout, 16, 64).capacity == 0
    # Batches of any size share a few lists, of which each takes memory.
    assert {index.tile_index(layout, 16, pairs).capacity for pairs in range(1, 64)} == {32}
    monkeypatch.setattr(index, "MOST_SEGMENTS", 32)
    assert {index.tile_index(layout, 16, pairs).capacity for pairs in range(1, 33)} == {32, 16, 8, 4, 2, 1}
    monkeypatch.undo()
    # Many more lists than that are not enough beside one that is as long as they are many.
    layout = BlockLayout(torch.ones(1, 1024, 1024, dtype=torch.bool, device=DEVICE), 64)
    assert index.tile_index(layout, 64, 12).capacity > 0
    wide = BlockLayout(torch.ones(1, 16, 1024, dtype=torch.bool, device=DEVICE), 64)
    assert index.tile_index(wide, 64, 64).capacity > 0
    assert index.tile_index(wide, 64, 64, transposed=True).capacity == 0


def test_each_stream_makes_its_own_lists(monkeypatch):
    """They may be read as soon as they are asked for, but for that another stream need not have come to them."""
    streams, made = [1, 1, 2, 1], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=streams.pop(0)))
    layout = cast(BlockLayout, SimpleNamespace(device=torch.device("cuda"), derived={}))
    for _ in range(4):
        index.kept_with(layout, "lists", lambda: made.append(len(made)) or torch.ones(()))
    assert made == [0, 1]


class TestParameters:
    case = (64, 80, torch.bfloat16)

    @pytest.fixture(autouse=True)
    def file(self, tmp_path, monkeypatch):
        monkeypatch.setenv("SAT_TUNING", str(tmp_path / "kept" / "tuned.json"))
        monkeypatch.setattr(parameters, "_TUNED", {})
        return tmp_path / "kept" / "tuned.json"

    @pytest.mark.parametrize("kernel", [*parameters.ATTENTION_KERNELS, "sddmm", "softmax", "spmm"])
    def test_there_are_some_for_every_case(self, kernel):
        for size in launch.BLOCK_SIZES:
            for dim in (8, 16, 64, 80, 128, 129, 256) if kernel != "softmax" else (16, 128):
                for dtype in launch.DTYPES:
                    for heavy in (False, True):
                        tile = parameters.tile(kernel, size, dim, dtype, CPU, heavy)
                        assert {tile.rows, tile.columns} <= {16, 32, 64, 128}

    def test_measured_ones_take_their_place_on_that_gpu_only(self, monkeypatch, file):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU 1")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        device = torch.device("cuda")
        default = parameters.tile("attention", *self.case, device)
        measured = parameters.Tile(128, 32, 8, 4)
        assert parameters.save_tuned("GPU 1", {parameters.case_name("attention", *self.case, False): measured}) == file
        parameters.save_tuned("GPU 2", {})
        assert parameters.tile("attention", *self.case, device) == measured
        assert parameters.load_tuned()["GPU 1"] == {parameters.case_name("attention", *self.case, False): measured}
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU 2")
        assert parameters.tile("attention", *self.case, device) == default

    @pytest.mark.parametrize(
        "content",
        ["{", "[1]", '{"GPU": {"case": [1, 2]}}', '{"GPU": {"case": [17, 64, 4, 2]}}', '{"G": {"c": [16, 16, 4, 0]}}'],
    )
    def test_a_file_that_holds_something_else_is_named(self, content, file):
        file.parent.mkdir()
        file.write_text(content)
        with pytest.raises(ValueError, match=r"tuned\.json.*delete"):
            parameters.load_tuned()
        with pytest.warns(UserWarning, match=r"measured launch parameters are not used: .*tuned\.json"):
            parameters.save_tuned("GPU", {})  # the tuner mends it
        assert parameters.load_tuned() == {"GPU": {}}

    def test_without_a_home_there_is_none(self, monkeypatch):
        for name in ("SAT_TUNING", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
        assert parameters.load_tuned() == {}

    def test_the_file_is_readable(self, file):
        parameters.save_tuned("GPU", {"a case": parameters.Tile(64, 64, 4, 2)})
        assert json.loads(file.read_text()) == {"GPU": {"a case": [64, 64, 4, 2]}}


def test_the_layouts_own_lists_follow_its_heads():
    """Heads that share a layout walk one list."""
    shared = oracle.random_layout(1, 4, 4, 16)
    each = BlockLayout(shared.mask.expand(3, -1, -1).contiguous(), 16)
    query = torch.randn(2, 3, 64, 8, device=DEVICE)
    ours = [ops.block_sparse_attention(query, query, query, x.to(DEVICE), backend="triton") for x in (shared, each)]
    assert torch.equal(*ours)
