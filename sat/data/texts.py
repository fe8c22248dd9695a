"""Floor 3, data: texts as characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sat.data.base import check_at_least
from sat.data.files import FileDataModule, check_ragged
from sat.data.loading import Batch
from sat.data.sources import Table


class Characters(Dataset[Batch]):
    """Rows of a flat Latin-1 buffer; indexed by a list of positions, it gives a padded batch."""

    def __init__(self, tensors: dict[str, Tensor], rows: Tensor, seq_len: int) -> None:
        self.bytes, self.offsets, self.labels = (tensors[name].numpy() for name in ("bytes", "offsets", "labels"))
        self.rows, self.seq_len = rows.numpy(), seq_len

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: list[int]) -> Batch:
        """``input_ids`` int64 ``[B, L]``: a character's Latin-1 code + 1, 0 = padding; and mask and labels."""
        # NumPy, row by row: at this size PyTorch's parallel indexing costs more in waiting threads than it saves.
        rows = self.rows[positions]
        begin, end = self.offsets[rows], self.offsets[rows + 1]
        ids = np.zeros((len(rows), self.seq_len), dtype=np.int64)
        for row, first, last in zip(ids, begin.tolist(), end.tolist(), strict=True):
            np.add(self.bytes[first:last], 1, out=row[: last - first], dtype=np.int64)
        mask = np.arange(self.seq_len) < (end - begin)[:, None]
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(self.labels[rows]),
        }


class TextDataModule(FileDataModule):
    """Texts, one character a token, cut and padded to ``seq_len``.

    A token is the character's Latin-1 code + 1; characters outside Latin-1 become question marks, and id 0 is
    padding. An empty text counts as one space, so that every sample has a token to attend to.

    Args:
        seq_len: characters in a sequence: longer texts are cut, shorter ones padded.
        batch_size: samples in a training batch, per process. Incomplete training batches are left out.
        kwargs: as of :class:`~sat.data.files.FileDataModule`.
    """

    vocab_size = 257
    has_padding = True
    content_columns = ("text",)

    def __init__(
        self,
        *,
        seq_len: int = 1024,
        batch_size: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        check_at_least("seq_len", seq_len, 1)
        self.seq_len = seq_len

    def dataset(self, tensors: dict[str, Tensor], rows: Tensor) -> Characters:
        """Some rows of a split, as a map from a list of positions to a batch."""
        return Characters(tensors, rows, self.seq_len)

    def encoding(self) -> Sequence[int | str]:
        """The tokens of a text depend on where it is cut."""
        return [self.seq_len]

    def check_tensors(self, tensors: dict[str, Tensor], rows: int) -> None:
        """Refuse anything but a buffer of characters and its offsets."""
        check_ragged(tensors.get("offsets"), rows, tensors.get("bytes"), torch.uint8, self.seq_len)

    def to_bytes(self, text: str) -> bytes:
        """The beginning of a text, a byte a token."""
        return text[: self.seq_len].encode("latin-1", "replace")

    def encode(self, rows: Iterator[pa.Array], table: Table) -> dict[str, Tensor]:
        """All texts in one uint8 buffer, and int64 ``offsets [n + 1]`` of where each begins."""
        buffer = bytearray()
        offsets = [0]
        for column in rows:
            if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                raise ValueError(f"the texts of {table.name} are of the type {column.type}; write them as strings")
            for text in column.to_pylist():
                if text is None:
                    raise ValueError(f"row {len(offsets) - 1} of {table.name} has no text; leave such rows out")
                buffer += self.to_bytes(text) or b" "
                offsets.append(len(buffer))
        data = torch.frombuffer(buffer, dtype=torch.uint8) if buffer else torch.empty(0, dtype=torch.uint8)
        return {"bytes": data, "offsets": torch.tensor(offsets, dtype=torch.int64)}
