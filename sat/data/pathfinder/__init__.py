"""Floor 3, data: Pathfinder of the Long Range Arena: pictures drawn by its rules, or the released folders of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich import get_console
from rich.progress import Progress
from torch import Tensor

from sat.data import sources
from sat.data.base import check_at_least
from sat.data.cache import Prepared, cached
from sat.data.files import PROGRESS_FROM
from sat.data.pathfinder.contours import Drawn, draw, settings_of
from sat.data.pictures import ImageDataModule
from sat.files import shortened

SPLITS = ("train", "validation", "test")  # eight tenths, one, and one
# The Arena's hardest level, which is the one that it reports.
LEVEL = "curv_contour_length_14"
# In the Arena's release of 32 x 32 pixels (curv_baseline), this file is empty.
KNOWN_EMPTY = "imgs/0/sample_172.png"


class Pathfinder(ImageDataModule):
    """Pathfinder: do two discs mark the ends of one dashed contour? One gray pixel a token: 256 ids, 2 classes.

    Drawn by the rules of the Long Range Arena (Tay et al. 2021) after Linsley et al. 2018, at 32 (1,024 tokens), 64,
    128 ("Path-X") or 256 pixels, or in a small variant of ours at 16; or read from the Arena's released folders of
    pictures (``imgs/*/*.png`` and ``metadata/*.npy``, in ``path`` or in its folder ``curv_contour_length_14``). Eight
    tenths are for training, one for validation, one for tests.

    Args:
        path: folder of pictures in the released form; they are drawn when not given.
        image_size: edge of the pictures in pixels; released ones of another size are refused.
        num_samples: pictures to draw, of all splits together.
        contour_length: paddles of each of the two contours; 14 when not given (at 16 pixels: 5).
        num_distractors: short contours that distract, as many as fit; the Arena's number when not given.
        draw_seed: decides which pictures are drawn.
        batch_size: samples in a training batch, per process. Incomplete training batches are left out.
        kwargs: as of :class:`~sat.data.pictures.ImageDataModule`.

    Raises:
        ValueError: an argument is out of range, or such contours do not fit.
    """

    dataset_name = "Pathfinder"
    num_classes = 2
    content_columns = ("image",)
    resizes = False

    def __init__(
        self,
        *,
        path: str | None = None,
        image_size: int = 32,
        num_samples: int = 200_000,
        contour_length: int | None = None,
        num_distractors: int | None = None,
        draw_seed: int = 0,
        batch_size: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(path=path, image_size=image_size, batch_size=batch_size, **kwargs)
        check_at_least("num_samples", num_samples, 10)  # below, a tenth is none
        check_at_least("draw_seed", draw_seed, 0)
        self.num_samples, self.draw_seed = num_samples, draw_seed
        if path is not None and (contour_length is not None or num_distractors is not None):
            raise ValueError(
                f"data.contour_length and data.num_distractors are of pictures that are drawn, those in {path} are "
                f"there already; leave them out, or leave out data.path"
            )
        if path is None:
            self.settings = settings_of(image_size, contour_length, num_distractors)

    def load(self) -> Prepared:
        """Tokens from the cache, or else drawn, or from the released pictures.

        Raises:
            FileNotFoundError: the path does not exist, holds no such folders, or pictures that it names are missing.
            ValueError: the metadata is of another form, or a picture has another size or cannot be decoded.
            PermissionError: the cache cannot be written.
        """
        if self.path is None:
            name, drawn = f"{self.dataset_name} {self.image_size}", [repr(self.settings), self.num_samples]
            return cached(self.cache_dir, name, [*drawn, self.draw_seed], self._draw, self.check_prepared)
        found, root = find_released(sources.existing_path(self.path, self.dataset_name))
        files = [*sorted((root / "metadata").iterdir()), *(root / name for name, _ in found)]
        order = np.random.default_rng(0).permutation(len(found))
        parts = {
            split: [found[i] for i in order[begin:end]]
            for split, begin, end in zip(SPLITS, [0, *_ends(len(found))], _ends(len(found)), strict=False)
        }
        return self.load_cached(
            ["released", sources.fingerprint(files)],
            lambda: {split: _table(root, split, part) for split, part in parts.items()},
        )

    def _draw(self) -> Prepared:
        count = self.num_samples
        pixels = torch.empty((count, self.seq_len), dtype=torch.uint8)
        labels = torch.empty(count, dtype=torch.int64)
        hidden = count * self.seq_len < PROGRESS_FROM * 1024 // 100 or not get_console().is_terminal
        with Progress(transient=True, disable=hidden) as progress:
            bar = progress.add_task(f"drawing {self.dataset_name}", total=count)

            def take(start: int, part: Drawn) -> None:
                end = start + len(part.labels)
                pixels[start:end] = torch.from_numpy(part.pictures.reshape(len(part.labels), -1))
                labels[start:end] = torch.from_numpy(part.labels)
                progress.advance(bar, len(part.labels))

            draw(self.settings, count, self.draw_seed, take)
        ends = _ends(count)
        splits: dict[str, dict[str, Tensor]] = {
            split: {"pixels": pixels[begin:end], "labels": labels[begin:end]}
            for split, begin, end in zip(SPLITS, [0, *ends], ends, strict=False)
        }
        return Prepared(splits, [])


def _ends(count: int) -> list[int]:
    """Where the splits end: eight tenths, nine, all."""
    return [count - 2 * (count // 10), count - count // 10, count]


def find_released(folder: Path) -> tuple[list[tuple[str, int]], Path]:
    """The pictures that the metadata names, with their labels, and the folder that they are relative to.

    Raises:
        FileNotFoundError: there are no such folders, or metadata or pictures are missing or empty.
        ValueError: a line of the metadata is of another form.
    """
    root = folder / LEVEL if (folder / LEVEL).is_dir() else folder
    if not (root / "imgs").is_dir() or not (root / "metadata").is_dir():
        raise FileNotFoundError(
            f"{root} has no folders imgs and metadata; point --data.path at a released folder of Pathfinder (such as "
            f"pathfinder32/{LEVEL}), or leave it out, and pictures are drawn"
        )
    sizes: dict[str, int] = {}
    for place in sorted((root / "imgs").iterdir()):
        if place.is_dir():
            with os.scandir(place) as entries:
                sizes |= {f"imgs/{place.name}/{entry.name}": entry.stat().st_size for entry in entries}
            if not (root / "metadata" / f"{place.name}.npy").is_file():
                raise FileNotFoundError(
                    f"{root} has no metadata/{place.name}.npy, which says the labels of imgs/{place.name}; unpack the "
                    f"whole archive again"
                )
    found: list[tuple[str, int]] = []
    for file in sorted((root / "metadata").glob("*.npy")):
        # A text in spite of its name: folder, file, number, label and settings.
        for row, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            match line.split():
                case [inside, name, _, ("0" | "1") as label, *_]:
                    found.append((f"{inside}/{name}", int(label)))
                case _:
                    raise ValueError(
                        f"line {row} of {file} is {shortened(repr(line), 80)}, expected a folder, a file, a number and "
                        f"the label 0 or 1; unpack the whole archive again"
                    )
    found = [(name, label) for name, label in found if name != KNOWN_EMPTY or sizes.get(name)]
    if missing := [name for name, _ in found if not sizes.get(name)]:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(found)} pictures that the metadata in {root} names are missing or empty, "
            f"such as {shortened(missing[0], 80)}; unpack the whole archive again"
        )
    if len(found) < 10:
        raise FileNotFoundError(f"the metadata in {root} names {len(found)} pictures, at least 10 are needed")
    return found, root


def _table(root: Path, split: str, found: Sequence[tuple[str, int]]) -> sources.Table:
    def read(columns: list[str]) -> Iterator[pa.Table]:
        for start in range(0, len(found), 512):
            part = found[start : start + 512]
            images = [{"bytes": (root / name).read_bytes(), "path": name} for name, _ in part]
            yield pa.table({"image": images, "label": [label for _, label in part]}).select(columns)

    return sources.Table(f"{root} ({split})", ["image", "label"], len(found), {}, read)
