"""Floor 3, data: iNaturalist 2018 with its super-categories as classes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from sat.data import sources
from sat.data.base import check_at_least
from sat.data.cache import Prepared
from sat.data.pictures import ImageDataModule

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}


class INaturalist(ImageDataModule):
    """iNaturalist 2018, super-categories, one gray pixel a token: 1,024 tokens, 256 ids, 14 classes.

    No copy with super-categories is known on the hub, so ``path`` is needed. It is one of

    - the unpacked archive of the competition: ``train_val2018/<super-category>/<species>/*.jpg`` and
      ``val2018.json``, which says what belongs to the official validation set;
    - a folder of pictures: ``<class>/**/*.jpg``, or ``train/<class>/**/*.jpg`` and ``val/...`` (or
      ``validation/...``) and ``test/...``;
    - parquet files with an ``image`` and a ``label`` column.

    ``num_classes`` must be given when the folder has another number of classes than 14.

    As is usual with this data set, whose test labels were never published, the official validation set (24,426
    pictures) is the test set, and a part of the official training set (437,513) is held out for validation.

    Args:
        path: local folder in one of these forms, or a single parquet file.
        hub_id: a data set on the hub with ``image`` and ``label`` columns, used when there is no path.
        num_classes: classes in the source; must be given when there are not 14, the original's super-categories.
        image_size: edge of the pictures in pixels; others are resized, bilinearly.
        batch_size: samples in a training batch, per process. Incomplete training batches are left out.
        kwargs: as of :class:`~sat.data.pictures.ImageDataModule`.

    Raises:
        ValueError: an argument is out of range, or there is neither a path nor a hub id.
    """

    dataset_name = "iNaturalist 2018"
    published = ("train", "validation")
    content_columns = ("image", "img")

    def __init__(
        self,
        *,
        path: str | None = None,
        hub_id: str | None = None,
        num_classes: int = 14,
        image_size: int = 32,
        batch_size: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(path=path, image_size=image_size, batch_size=batch_size, **kwargs)
        check_at_least("num_classes", num_classes, 2)
        if path is None and hub_id is None:
            raise ValueError(
                "no copy of iNaturalist 2018 with super-categories is known on the hub; download it from "
                "github.com/visipedia/inat_comp and pass its folder as --data.path"
            )
        self.hub_id = hub_id
        self.num_classes = num_classes

    def load(self) -> Prepared:
        """Tokens from the cache, or else from a folder of pictures, from parquet files or from the hub.

        Raises:
            FileNotFoundError: the path, or training pictures in it, do not exist.
            ValueError: the number of classes is not ``num_classes``, a split is empty, ``val2018.json`` is not what it
                should be, or a picture cannot be decoded.
        """
        if self.path is None:
            return super().load()
        root = sources.existing_path(self.path, self.dataset_name)
        if root.is_file() or next(root.rglob("*.parquet"), None) is not None:
            return super().load()
        files = find_pictures(root)
        names = sorted({name for split in files.values() for name, _ in split})
        if len(names) != self.num_classes:
            raise ValueError(
                f"{root} has {len(names)} class folders ({', '.join(names[:5])}...), expected {self.num_classes}; pass "
                f"--data.num_classes {len(names)} if these are the classes"
            )
        identity = [[split, sources.fingerprint(path for _, path in found)] for split, found in sorted(files.items())]
        return self.load_cached(
            identity, lambda: {split: _table(root, split, found, names) for split, found in files.items()}
        )


def find_pictures(root: Path) -> dict[str, list[tuple[str, Path]]]:
    """The pictures of each split, as (class name, file), in one of the forms that :class:`INaturalist` names.

    Raises:
        FileNotFoundError: there are no training pictures.
        ValueError: ``val2018.json`` is damaged, or is about other pictures.
    """
    folders = {"train": root}
    if (root / "train_val2018").is_dir():
        folders = {"train": root / "train_val2018"}
    elif any(split_of_folder(folder) for folder in root.iterdir()):
        folders = {}
        for folder in sorted(root.iterdir()):
            if (split := split_of_folder(folder)) is None:
                continue
            if split in folders:
                raise ValueError(
                    f"{root} has two folders of the {split} split, {folders[split].name} and {folder.name}; remove one"
                )
            folders[split] = folder
    found = {split: _pictures(folder) for split, folder in folders.items()}
    listing = root / "val2018.json"
    if found.get("train") and listing.is_file():
        official = _official_validation(listing)
        found["validation"] = [item for item in found["train"] if item[1] in official]
        found["train"] = [item for item in found["train"] if item[1] not in official]
        missing = sorted(official - {file for _, file in found["validation"]})
        if missing or not official:
            such = f", such as {missing[0]}" if missing else ""
            raise ValueError(
                f"{listing} names {len(official)} validation picture(s), of which {len(missing)} are missing{such}; "
                f"unpack the whole archive in {root}, or remove {listing.name}, and other pictures are "
                f"held out"
            )
    if not found.get("train"):
        raise FileNotFoundError(
            f"looked for <class>/*.jpg, train/<class>/*.jpg, train_val2018/<class>/*/*.jpg and train*.parquet in "
            f"{root} and found no training picture; point --data.path at a folder of one of these forms"
        )
    return found


def split_of_folder(folder: Path) -> str | None:
    """The split that a folder named train, val, validation or test holds."""
    names = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
    return names.get(folder.name.lower()) if folder.is_dir() else None


def _official_validation(listing: Path) -> set[Path]:
    """The pictures that ``val2018.json`` names.

    Raises:
        ValueError: it is cut short, or of another form.
    """
    try:
        images = json.loads(listing.read_text(encoding="utf-8"))["images"]
        return {listing.parent / image["file_name"] for image in images}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{listing} is cut short or of another form ({type(error).__name__}: {error}), expected "
            f'{{"images": [{{"file_name": "train_val2018/..."}}, ...]}}; unpack it again from the '
            f"competition's val2018.json.tar.gz, or remove it, and other pictures are held out"
        ) from error


def _pictures(folder: Path) -> list[tuple[str, Path]]:
    """(class name, file) of each picture, where the class is the folder's first level; sorted."""
    found = []
    for file in sources.files_below(folder):
        inside = file.relative_to(folder).parts
        if len(inside) > 1 and not inside[0].startswith(".") and file.suffix.lower() in IMAGE_SUFFIXES:
            found.append((inside[0], file))
    return sorted(found)


def _table(root: Path, split: str, found: list[tuple[str, Path]], names: list[str]) -> sources.Table:
    number = {name: i for i, name in enumerate(names)}

    def read(columns: list[str]) -> Iterator[pa.Table]:
        for start in range(0, len(found), 512):
            part = found[start : start + 512]
            images = [{"bytes": path.read_bytes(), "path": str(path)} for _, path in part]
            yield pa.table({"image": images, "label": [number[name] for name, _ in part]}).select(columns)

    return sources.Table(f"{root} ({split})", ["image", "label"], len(found), {"label": names}, read)
