"""Floor 1: memory that the fused block implementation uses again from call to call."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

# Elements of the largest buffer that is kept for the next call.
KEPT_BUFFER = 2**22


class Workspace:
    """Buffers that are kept from call to call: fresh memory costs a CPU more than the arithmetic on it."""

    _kept = threading.local()

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        if device.type == "cpu":  # elsewhere PyTorch's caching allocator does this already
            self.buffers = self._kept.__dict__.setdefault("buffers", {})

    def empty(self, name: str, *shape: int) -> Tensor:
        """A buffer of this shape, not initialised; it is overwritten at the next request under the same name."""
        numel = math.prod(shape)
        buffer = self.buffers.get((name, self.dtype))
        if buffer is None or buffer.numel() < numel:
            with torch.inference_mode(False):  # else a buffer made in evaluation could not be written in training
                buffer = torch.empty(numel, dtype=self.dtype, device=self.device)
            if numel <= KEPT_BUFFER or self.device.type != "cpu":
                self.buffers[name, self.dtype] = buffer
        return buffer[:numel].view(shape)

    def gather(self, name: str, blocks: Tensor, index: Tensor, *shape: int) -> Tensor:
        """The rows of ``blocks`` that ``index`` names, in a buffer, viewed as ``shape``."""
        out = self.empty(name, len(index), blocks.shape[1])
        return torch.index_select(blocks, 0, index, out=out).view(shape)
