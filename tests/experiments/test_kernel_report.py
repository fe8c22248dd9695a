# Kernels compiled ahead of time in a process of their own: in this one they may be interpreted.
import os
import subprocess
import sys

import pytest

from experiments import kernel_report


def run(project_root, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=project_root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_attention_compiles_without_spills(arch, project_root):
    case = ["--block_size", "32", "--head_dim", "64", "--precision", "bfloat16", "--options", "plain"]
    done = run(project_root, "-m", "experiments.kernel_report", "--arch", str(arch), *case)
    forward = next(line for line in done.stdout.splitlines() if line.startswith("forward"))
    assert {80: "mma", 90: "wgmma", 100: "tcgen05"}[arch] in forward
    assert "only the whole table is" in done.stdout


VARYING = """
import collections

import torch
import triton
from triton.runtime import driver

from experiments.kernel_report import _NoDevice
from sat import ops
from sat.layout import BlockLayout
from sat.ops.triton.launch import observed

wanted = collections.defaultdict(set)


def want(*, key, fn, **_):
    wanted[fn.name.split(".")[-1]].add(key)
    return True  # and do not compile it


driver.set_active(_NoDevice(90))
triton.knobs.runtime.jit_cache_hook = want
with observed(lambda kernel, programs, *args, **options: kernel.warmup(*args, grid=(1,), **options), (9, 0)):
    # The first is a single block, and the last has lists of more than 64 entries.
    for length in (50, 65, 100, 128, 320, 333, 512, 700, 1000, 1024, 1040, 2048, 5000):
        query, key, value = (torch.empty(2, 2, length, 64, requires_grad=True) for _ in range(3))
        blocks = -(-length // 64)
        layout = BlockLayout(torch.ones(2, blocks, blocks, dtype=torch.bool), 64)
        real = torch.ones(2, length, dtype=torch.bool)
        masks = {"key_padding_mask": real, "is_causal": True, "backend": "triton"}
        out = ops.block_sparse_attention(query, key, value, layout, query_padding_mask=real, dropout_p=0.1, **masks)
        out.backward(torch.empty_like(out))
        ops.attention_statistics(query, key, 64, **masks)
        scores = ops.sddmm(query, key, layout, backend="triton")
        weights = ops.sparse_softmax(scores, layout, num_heads=2, query_length=length, **masks)
        out = ops.spmm(weights, value, layout, backend="triton")
        out.backward(torch.empty_like(out))
for name, keys in wanted.items():
    print(name, len(keys))
"""


def test_varying_lengths_compile_few_kernels(project_root):
    counts = dict(line.split() for line in run(project_root, "-c", VARYING).stdout.splitlines())
    # Lengths are whole blocks or not; SpMM and the lists have two directions, and lists are few or many numbers. Of a
    # single block a stride is 1. Segments are joined in dQ's tiles, in those of dK and dV, and in SpMM's.
    two = {"_forward_kernel", "_query_gradient_kernel", "_key_value_gradient_kernel", "_logsumexp_kernel"}
    most = dict.fromkeys(two | {"_segment_kernel", "_ends_kernel"}, 2) | {
        "_spmm_kernel": 4,
        "_list_kernel": 5,
        "_sum_segments_kernel": 3,
    }
    assert len(counts) == 17
    for name, count in counts.items():
        assert int(count) <= most.get(name, 1), name


def row(**values):
    return {
        "kernel": "forward",
        "precision": "bfloat16",
        "tile": [64, 64],
        "spilled_bytes": 0,
        "shared_bytes": 0,
        "matrix": {"wgmma": 4},
        **values,
    }


def test_broken_rules_are_found():
    assert kernel_report.broken_rules(90, row()) == []
    assert kernel_report.broken_rules(90, row(spilled_bytes=8)) == ["spills 8 bytes"]
    assert kernel_report.broken_rules(89, row(shared_bytes=110_000)) == ["wants 110000 bytes of shared memory"]
    assert kernel_report.broken_rules(90, row(matrix={"mma": 4})) == ["no wgmma"]
    assert kernel_report.broken_rules(80, row(matrix={"mma": 4})) == []
    assert kernel_report.broken_rules(90, row(matrix={"mma": 4}, tile=[32, 64])) == []
    assert kernel_report.broken_rules(90, row(kernel="key_value_gradient", matrix={}, tile=[32, 64])) == ["no wgmma"]
    assert kernel_report.broken_rules(90, row(matrix={}, precision="float32")) == []


def test_every_block_and_head_dimension_is_in_the_table():
    cases = kernel_report.every_case()
    assert {case.block_size for case in cases} == {16, 32, 64, 128}
    assert {case.precision for case in cases} == {"bfloat16", "float32", "tf32"}
    assert len(set(cases)) == len(cases)
