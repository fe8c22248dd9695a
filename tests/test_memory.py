"""Memory of a long run: it does not grow with the steps, and the switch needs no more than a dense step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20

# Both run in a process of their own, whose memory is nobody else's.
COMMON = """
import gc, json, logging, resource, sys
from pathlib import Path
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from sat.callback import AdaptiveSparsity
from sat.models import SequenceClassifier
from sat.module import ClassificationModule
from sat.monitor import Monitor
from rich.console import Console
torch.set_num_threads(1)
torch.manual_seed(0)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))

def trainer(steps, callbacks):
    return pl.Trainer(max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks, limit_val_batches=0)
"""

GROWTH = """
class Watch(pl.Callback):
    def __init__(self): self.seen = []
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step % 1000 == 0:
            gc.collect()
            self.seen.append((trainer.global_step, status("VmRSS"), len(gc.get_objects())))

phase = sys.argv[1]
model = SequenceClassifier(20, 32, 3, num_layers=2, width=16, num_heads=2, mlp_dim=16, block_size=8, dropout=0.1)
data = [{"input_ids": torch.randint(0, 20, (4, 32)), "labels": torch.randint(0, 3, (4,))} for _ in range(50)]
# Observed at every tenth step, as by default; sparse from the third observation on, or never.
sparsity = AdaptiveSparsity(density=0.5, theta=1e9 if phase == "dense" else None, delta=1e9)
watch = Watch()
module = ClassificationModule(model, 3)
callbacks = [sparsity, Monitor(None, Console(quiet=True)), watch]
trainer(12_000, callbacks).fit(module, DataLoader(data, batch_size=None))
assert bool(sparsity.transitions) == (phase == "sparse")
print(json.dumps(watch.seen))
"""

SWITCH = """
class Watch(pl.Callback):
    def __init__(self): self.peaks = []
    def on_train_batch_start(self, *args):
        Path("/proc/self/clear_refs").write_text("5")
    def on_train_batch_end(self, *args):
        self.peaks.append(status("VmHWM"))

model = SequenceClassifier(20, 2048, 3, num_layers=2, width=32, num_heads=2, mlp_dim=32, block_size=32, dropout=0.0)
data = [{"input_ids": torch.randint(0, 20, (4, 2048)), "labels": torch.randint(0, 3, (4,))} for _ in range(4)]
sparsity = AdaptiveSparsity(density=0.1, theta=None, delta=1e9, interval=2, samples=4)
watch = Watch()  # last: at the end of a batch, after the switch
trainer(8, [sparsity, watch]).fit(ClassificationModule(model, 3), DataLoader(data, batch_size=None))
print(json.dumps([sparsity.transitions[0].step, watch.peaks]))
"""


def measured(program: str, *arguments: str, folder: Path) -> list:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("memory is read from /proc, which only Linux has")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    # What is freed goes back to the system at once, so that the process is as large as what it holds.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", COMMON + program, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: list = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.long
@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_ten_thousand_steps_do_not_grow(phase: str, tmp_path: Path) -> None:
    seen = measured(GROWTH, phase, folder=tmp_path)
    (_, first, objects), *_, (last_step, last, more_objects) = seen[1:]  # after 2,000 steps to warm up
    assert last_step == 12_000
    # A dense run keeps its statistics for their picture, at every tenth step in containers that the collector knows of.
    kept = 1000 * 2 if phase == "dense" else 0
    assert more_objects - objects <= kept + 200
    assert last - first <= 4 * MIB


def test_the_switch_takes_no_more_memory_than_a_dense_step(tmp_path: Path) -> None:
    switch, peaks = measured(SWITCH, folder=tmp_path)
    assert switch == 6
    dense, at_switch, sparse = max(peaks[: switch - 1]), peaks[switch - 1], max(peaks[switch:])
    assert at_switch <= dense + 2 * MIB  # the allocator's grain
    assert sparse <= dense
