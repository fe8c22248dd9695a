"""Where the moments of the scores are reckoned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from sat.ops.moments import in_float64


def test_devices_without_float64_leave_it_to_the_cpu():
    """No such device is here: what stands for its tensor refuses what that would."""
    on_cpu = torch.ones(2)
    tensor = SimpleNamespace(device=torch.device("mps"), cpu=lambda: on_cpu)
    assert in_float64(cast(Any, tensor)).dtype == torch.float64
    assert in_float64(on_cpu).dtype == torch.float64
