"""Floor 3, data: scikit-learn's digits, for runs of a minute without any download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sat.data.base import SequenceDataModule, check_at_least
from sat.data.cache import Prepared
from sat.data.pictures import Pixels


class Digits(SequenceDataModule):
    """Handwritten digits, 8x8 pictures of 17 gray levels enlarged bilinearly: 17 ids, 10 classes; no download.

    The 1,797 samples come with scikit-learn, without an official test set: a class-stratified tenth is held out as
    the test set, and a tenth of the rest for validation.

    Args:
        image_size: edge of the enlarged pictures in pixels; ``seq_len`` is its square.
        batch_size: samples in a training batch, per process. Incomplete training batches are left out.
        kwargs: as of :class:`~sat.data.base.SequenceDataModule`.
    """

    dataset_name = "Digits"
    vocab_size = 17
    num_classes = 10
    has_padding = False
    published = ("train",)
    pixel_tokens = True

    def __init__(
        self,
        *,
        image_size: int = 32,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        check_at_least("image_size", image_size, 1)
        self.image_size = image_size
        self.seq_len = image_size**2

    def load(self) -> Prepared:
        """Every picture in its 17 levels. Nothing is cached: it takes a tenth of a second."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        size = (self.image_size, self.image_size)
        enlarged = [
            Image.fromarray(picture.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
            for picture in digits.images
        ]
        pixels = np.stack([np.asarray(picture).round().astype(np.uint8).reshape(-1) for picture in enlarged])
        labels = torch.from_numpy(digits.target).long()
        train = {"pixels": torch.from_numpy(pixels), "labels": labels}
        return Prepared({"train": train}, [str(name) for name in digits.target_names])

    def dataset(self, tensors: dict[str, Tensor], rows: Tensor) -> Pixels:
        """Some rows, as a map from a list of positions to a batch."""
        return Pixels(tensors, rows)
