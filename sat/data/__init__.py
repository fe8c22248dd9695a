"""Floor 3, data: Lightning data modules that turn data sets into token sequences, one file a data set."""

from sat.data.ag_news import AGNews
from sat.data.base import SequenceDataModule
from sat.data.cifar10 import CIFAR10, CIFAR10RGB
from sat.data.digits import Digits
from sat.data.imdb import IMDB, IMDBBytes
from sat.data.inaturalist import INaturalist
from sat.data.listops import ListOps
from sat.data.mrpc import MRPC
from sat.data.pathfinder import Pathfinder
from sat.data.pictures import ColorImageDataModule
from sat.data.retrieval import Retrieval
from sat.data.texts import TextDataModule
from sat.data.tokens import TokenizedTextDataModule
from sat.data.yelp import YelpPolarity

DATASETS: dict[str, type[SequenceDataModule]] = {
    "digits": Digits,
    "cifar10": CIFAR10,
    "inaturalist": INaturalist,
    "ag_news": AGNews,
    "yelp": YelpPolarity,
    # The Long Range Arena's, whose Image is cifar10:
    "listops": ListOps,
    "imdb_bytes": IMDBBytes,
    "retrieval": Retrieval,
    "pathfinder": Pathfinder,
    # For pretrained models:
    "cifar10_rgb": CIFAR10RGB,
    "mrpc": MRPC,
    "imdb": IMDB,
}

__all__ = [
    "CIFAR10",
    "CIFAR10RGB",
    "DATASETS",
    "IMDB",
    "MRPC",
    "AGNews",
    "ColorImageDataModule",
    "Digits",
    "IMDBBytes",
    "INaturalist",
    "ListOps",
    "Pathfinder",
    "Retrieval",
    "SequenceDataModule",
    "TextDataModule",
    "TokenizedTextDataModule",
    "YelpPolarity",
]
