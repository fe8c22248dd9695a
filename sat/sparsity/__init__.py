"""Floor 2: how sparsity is learned. Knows nothing of trainers and models, and of attention modules only a protocol."""

from sat.sparsity.controller import Phase, SparsityController
from sat.sparsity.criterion import Criterion, Verdict
from sat.sparsity.events import Revision, Transition
from sat.sparsity.masks import BilinearMask, DirectMask, FisherMask, GramMask, MaskLearner, MaskName, make_mask
from sat.sparsity.offsets import offset_scores
from sat.sparsity.phases import SparsityPhases
from sat.sparsity.pooled import PooledAttention
from sat.sparsity.processes import LayoutsDiffer
from sat.sparsity.selection import revise_blocks, select_blocks
from sat.sparsity.statistics import LayerHistory, best_mass, block_mass, captured_mass, distance, skewness

__all__ = [
    "BilinearMask",
    "Criterion",
    "DirectMask",
    "FisherMask",
    "GramMask",
    "LayerHistory",
    "LayoutsDiffer",
    "MaskLearner",
    "MaskName",
    "Phase",
    "PooledAttention",
    "Revision",
    "SparsityController",
    "SparsityPhases",
    "Transition",
    "Verdict",
    "best_mass",
    "block_mass",
    "captured_mass",
    "distance",
    "make_mask",
    "offset_scores",
    "revise_blocks",
    "select_blocks",
    "skewness",
]
