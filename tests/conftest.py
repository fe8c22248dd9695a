# What holds for every test: no network, no display, a fixed seed, and memory that nobody wrote to reads as NaN.
# ruff: noqa: E402  the environment is set before the libraries that read it are imported
from __future__ import annotations

import os

# Before anything imports these libraries, because they read their environment once; subprocesses inherit it.
os.environ["MPLBACKEND"] = "Agg"
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[name] = "1"
# Asking whether there is a GPU must not touch it: processes that are forked later could not use it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
# Without it, cuBLAS warns about every matrix product while deterministic algorithms are on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Tests that run beside each other have a thread each: together they would wait for one another's.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Before anything imports Triton: where there is no GPU to run its kernels, they are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests import interpreter

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.hasten()

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """Keep what a whole run of the long tests came to."""
    from tests import long_record

    if long_record.is_whole(config):
        config.pluginmanager.register(long_record.LongRecord())


# The first run of a Triton or torch.compile test takes as long as its compilation; and a test that fails, fails again.
settings.register_profile("sat", deadline=None, derandomize=True)
settings.load_profile("sat")


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Let ``torch.empty`` and its kin return NaN (the largest value for integers, True for bools).

    What a kernel forgot to write then shows, instead of being 0 by luck. PyTorch fills only while deterministic
    algorithms are on; ``warn_only``, because operators without one on a GPU are still to be tested. Set anew for each
    test, because making a Lightning ``Trainer`` switches it off.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, alone or in company."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Graphs that one test compiled do not count towards the limit of the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder of pyproject.toml."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of data sets and models beside the checkout, or ``$SAT_SHARED``; skips where there is none."""
    folder = Path(os.environ.get("SAT_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; name the folder in SAT_SHARED")
    return folder
