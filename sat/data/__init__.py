"""Floor 3, data: Lightning data modules that turn data sets into token sequences, one file a data set."""

from sat.data.ag_news import AGNews
from sat.data.base import SequenceDataModule
from sat.data.cifar10 import CIFAR10
from sat.data.digits import Digits
from sat.data.inaturalist import INaturalist
from sat.data.texts import TextDataModule
from sat.data.yelp import YelpPolarity

DATASETS: dict[str, type[SequenceDataModule]] = {
    "digits": Digits,
    "cifar10": CIFAR10,
    "inaturalist": INaturalist,
    "ag_news": AGNews,
    "yelp": YelpPolarity,
}

__all__ = [
    "CIFAR10",
    "DATASETS",
    "AGNews",
    "Digits",
    "INaturalist",
    "SequenceDataModule",
    "TextDataModule",
    "YelpPolarity",
]
