"""Floor 3: models."""

from sat.models.encoder import Encoder, SequenceClassifier
from sat.models.pretrained import PretrainedClassifier

__all__ = ["Encoder", "PretrainedClassifier", "SequenceClassifier"]
