"""Floor 3: models."""

from sat.models.encoder import Encoder, SequenceClassifier

__all__ = ["Encoder", "SequenceClassifier"]
