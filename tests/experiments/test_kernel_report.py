# Kernels compiled ahead of time in a process of their own: in this one they may be interpreted.
import os
import subprocess
import sys

import pytest

from experiments import kernel_report


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_attention_compiles_without_spills(arch, project_root):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    case = ["--block_size", "32", "--head_dim", "64", "--precision", "bfloat16", "--options", "plain"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.kernel_report", "--arch", str(arch), *case],
        cwd=project_root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    forward = next(line for line in done.stdout.splitlines() if line.startswith("forward"))
    assert {80: "mma", 90: "wgmma", 100: "tcgen05"}[arch] in forward
    assert "only the whole table is" in done.stdout


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
