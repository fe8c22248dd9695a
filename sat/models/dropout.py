"""Floor 3: dropout that a CPU can afford."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """``nn.Dropout`` with cheaper random numbers on a CPU.

    PyTorch draws a number for each element on one thread, a large part of a sparse training step of a small model.
    Here one 64-bit draw serves four elements, so the probability is exact to ``2 ** -16``. The stream is that of the
    default CPU generator. On other devices, and in compiled code, this is ``nn.Dropout``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        if not self.training or self.p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        numel = x.numel()
        # The whole range of int64: all four 16-bit lanes are uniform.
        draws = torch.empty((numel + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        lanes = draws.view(torch.int16)[:numel].view(x.shape)
        kept = lanes >= round(self.p * 2**16) - 2**15
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))
