"""Floor 3, data: CIFAR-10 as the Long Range Arena's "Image" task, and in colour for pretrained models."""

from __future__ import annotations

from sat.data.pictures import ColorImageDataModule, ImageDataModule


class CIFAR10(ImageDataModule):
    """CIFAR-10, one gray pixel a token: 1,024 tokens, 256 ids, 10 classes (hub: ``uoft-cs/cifar10``).

    The splits are the Long Range Arena's in size, 45,000 / 5,000 / 10,000: the official test set, and a
    class-stratified tenth of the official training set for validation. The arguments are those of
    :class:`~sat.data.pictures.ImageDataModule`; local files have the columns ``img`` and ``label``.
    """

    dataset_name = "CIFAR-10"
    hub_id = "uoft-cs/cifar10"
    num_classes = 10


class CIFAR10RGB(ColorImageDataModule):
    """CIFAR-10 in colour, as a pretrained vision model takes it: 10 classes (hub: ``uoft-cs/cifar10``).

    The splits are those of :class:`CIFAR10`, sample by sample. The arguments are those of
    :class:`~sat.data.pictures.ColorImageDataModule`; local files have the columns ``img`` and ``label``.
    """

    dataset_name = "CIFAR-10 RGB"
    hub_id = "uoft-cs/cifar10"
    num_classes = 10
    stored_size = 32
