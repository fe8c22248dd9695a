"""Floor 1: the operators as Triton kernels, for NVIDIA GPUs from compute capability 8.0 on.

With ``TRITON_INTERPRET=1`` in the environment, the same kernels run on a CPU, slowly, for tests and for debugging.
"""

from sat.ops.triton.flash import block_sparse_attention
from sat.ops.triton.launch import INTERPRETED, unsupported, warn_if_slow
from sat.ops.triton.sddmm import sddmm
from sat.ops.triton.softmax import sparse_softmax
from sat.ops.triton.spmm import spmm
from sat.ops.triton.statistics import attention_statistics

__all__ = [
    "INTERPRETED",
    "attention_statistics",
    "block_sparse_attention",
    "sddmm",
    "sparse_softmax",
    "spmm",
    "unsupported",
    "warn_if_slow",
]
