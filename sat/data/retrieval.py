"""Floor 3, data: Retrieval of the Long Range Arena: pairs of papers, by bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import get_console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from sat.data import sources
from sat.data.base import check_rows
from sat.data.cache import Prepared, cached
from sat.data.files import check_ragged
from sat.data.loading import Batch
from sat.data.texts import Characters, TextDataModule
from sat.files import shortened

FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}


class Pairs(Dataset[Batch]):
    """Rows of two flat buffers of bytes; indexed by a list of positions, it gives a batch of padded pairs."""

    def __init__(self, tensors: dict[str, Tensor], rows: Tensor, seq_len: int) -> None:
        labels = tensors["labels"]
        self.sides = [
            Characters(
                {"bytes": tensors[f"bytes{side}"], "offsets": tensors[f"offsets{side}"], "labels": labels},
                rows,
                seq_len,
            )
            for side in (1, 2)
        ]

    def __len__(self) -> int:
        return len(self.sides[0])

    def __getitem__(self, positions: list[int]) -> Batch:
        """``input_ids`` int64 and ``attention_mask`` bool, ``[B, 2, L]``; and labels."""
        first, second = (side[positions] for side in self.sides)
        both = {name: torch.stack([first[name], second[name]], 1) for name in ("input_ids", "attention_mask")}
        return {**both, "labels": first["labels"]}


class Retrieval(TextDataModule):
    """Pairs of papers, of which one cites the other or does not, by bytes: 2 x 4,000 tokens, 257 ids, 2 classes.

    From the Long Range Arena's released files of the ACL Anthology Network, ``new_aan_pairs.train.tsv``, ``.eval.tsv``
    and ``.test.tsv``: 147,086 / 18,090 / 17,437 pairs. A token is a byte of the text, + 1; id 0 is padding. A batch has
    ``input_ids`` int64 and ``attention_mask`` bool, ``[B, 2, L]``, for a model of two towers.

    Args:
        path: folder with the three released files.
        seq_len: bytes of each of the two texts: longer ones are cut, shorter ones padded.
        batch_size: pairs in a training batch, per process. Incomplete training batches are left out.
        kwargs: as of :class:`~sat.data.texts.TextDataModule`.

    Raises:
        ValueError: an argument is out of range, or there is no path.
    """

    dataset_name = "Retrieval"
    num_classes = 2
    towers = 2

    def __init__(
        self,
        *,
        path: str | None = None,
        seq_len: int = 4000,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(path=path, seq_len=seq_len, batch_size=batch_size, **kwargs)
        if path is None:
            raise ValueError(
                "the pairs of Retrieval are in no library that could fetch them; download lra_release.gz from "
                "github.com/google-research/long-range-arena and pass its folder tsv_data as --data.path"
            )

    def size(self) -> str:
        """How large a sample is, for people."""
        return f"2 x {self.seq_len} tokens"

    def dataset(self, tensors: dict[str, Tensor], rows: Tensor) -> Pairs:  # type: ignore[override]
        """Some rows of a split, as a map from a list of positions to a batch."""
        return Pairs(tensors, rows, self.seq_len)

    def load(self) -> Prepared:
        """Tokens from the cache, or else from the released files.

        Raises:
            FileNotFoundError: the path, or one of the three files in it, does not exist.
            ValueError: a file is cut short or of another form.
            PermissionError: the cache cannot be written.
        """
        folder = sources.existing_path(str(self.path), self.dataset_name)
        files = {split: folder / name for split, name in FILES.items()}
        if missing := [file.name for file in files.values() if not file.is_file()]:
            raise FileNotFoundError(
                f"{folder} has no {' and no '.join(missing)}; point --data.path at a folder with all of "
                f"{', '.join(FILES.values())}"
            )

        def read() -> Prepared:
            return Prepared({split: read_pairs(file, self.seq_len) for split, file in files.items()}, [])

        identity = [self.seq_len, sources.fingerprint(files.values())]
        return cached(self.cache_dir, self.dataset_name, identity, read, self.check_prepared)

    def check_tensors(self, tensors: dict[str, Tensor], rows: int) -> None:
        """Refuse anything but two buffers of bytes and their offsets."""
        for side in (1, 2):
            check_ragged(tensors.get(f"offsets{side}"), rows, tensors.get(f"bytes{side}"), torch.uint8, self.seq_len)


def read_pairs(file: Path, seq_len: int) -> dict[str, Tensor]:
    """Lines of a label, two names and two texts, separated by tabs.

    Raises:
        ValueError: the file is cut short or of another form.
    """
    buffers = bytearray(), bytearray()
    lengths: tuple[list[int], list[int]] = ([0], [0])
    labels: list[int] = []
    with Progress(transient=True, disable=not get_console().is_terminal) as progress:
        bar = progress.add_task(f"reading {file.name}", total=file.stat().st_size)
        for row, line in enumerate(_lines(file), 1):
            match line.split(b"\t"):
                case [b"0" | b"1" | b"0.0" | b"1.0" as label, _, _, first, second] if line.endswith(b"\n"):
                    labels.append(int(float(label)))
                case _:
                    raise ValueError(
                        f"line {row} of {file} ({shortened(repr(line), 60)}) is not a label 0 or 1, two names and two "
                        f"texts with tabs between them, as in a file that is cut short; download it again"
                    )
            for text, buffer, each in zip((first, second.rstrip(b"\r\n")), buffers, lengths, strict=True):
                content = text[:seq_len] or b" "
                buffer += content
                each.append(len(content))
            progress.advance(bar, len(line))
    check_rows("Retrieval", file.stem, str(file), len(labels))
    tensors = {"labels": torch.tensor(labels, dtype=torch.int64)}
    for side, buffer, each in zip((1, 2), buffers, lengths, strict=True):
        tensors[f"bytes{side}"] = torch.frombuffer(buffer, dtype=torch.uint8)
        tensors[f"offsets{side}"] = torch.from_numpy(np.cumsum(each))
    return tensors


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as lines:
        yield from lines
