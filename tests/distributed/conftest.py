from __future__ import annotations

from pathlib import Path

import pytest

# In float64, so that another order of summation changes the weights by far less than a mistake would.
TINY = """
data: {name: digits, image_size: 8, batch_size: 16, train_samples: 128, eval_samples: 42}
model: {num_layers: 2, width: 16, num_heads: 2, mlp_dim: 16, dropout: 0.0, block_size: 8}
optimizer: {lr: 3.0e-3, warmup_steps: 3}
sparsity: {density: 0.3, theta: -100.0, delta: 1000000.0, interval: 3, samples: 10}
trainer:
  max_steps: 20
  accelerator: cpu
  precision: 64-true
  gradient_clip_val: 1.0
  gradient_clip_algorithm: value
  val_check_interval: 7
  check_val_every_n_epoch: null
  log_every_n_steps: 5
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with ``tiny.yaml``: 8 steps of 16 samples an epoch, the switch at step 9."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path
