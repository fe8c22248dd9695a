"""Floor 3, data: pictures as gray pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from sat.data.base import check_at_least
from sat.data.files import FileDataModule
from sat.data.loading import Batch
from sat.data.sources import Table


class Pixels(Dataset[Batch]):
    """Rows of a uint8 tensor ``[n, L]``; indexed by a list of positions, it gives a batch."""

    def __init__(self, tensors: dict[str, Tensor], rows: Tensor) -> None:
        self.pixels, self.labels, self.rows = tensors["pixels"].numpy(), tensors["labels"].numpy(), rows.numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: list[int]) -> Batch:
        """``input_ids`` int64 ``[B, L]``, 0 to 255, row by row of the picture; and labels."""
        # NumPy: at this size PyTorch's parallel indexing costs more in waiting threads than it saves.
        rows = self.rows[positions]
        ids = self.pixels[rows].astype(np.int64)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(self.labels[rows])}


class ImageDataModule(FileDataModule):
    """Pictures, one gray pixel a token, row by row: ``seq_len`` is ``image_size ** 2``.

    Args:
        path: local folder with train*.parquet and, if there are, validation*.parquet and test*.parquet, or a single
            parquet file; the hub when not given.
        cache_dir: folder for the prepared tokens; $XDG_CACHE_HOME/sat or ~/.cache/sat when not given.
        image_size: edge of the pictures in pixels; others are resized, bilinearly.
        batch_size: samples in a training batch, per process. Incomplete training batches are left out.
        eval_batch_size: samples in a validation or test batch, per process; ``batch_size`` when not given.
        num_workers: processes that prepare batches; 0 is enough, since a batch takes about a millisecond.
        seed: decides the order of the training samples, together with the epoch.
        train_samples: train on so many samples only, chosen at random; all when not given.
        eval_samples: validate and test on so many samples only, chosen at random; all when not given.
    """

    vocab_size = 256
    has_padding = False
    content_columns: Sequence[str] = ("img", "image")

    def __init__(
        self,
        *,
        path: str | None = None,
        cache_dir: str | None = None,
        image_size: int = 32,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        train_samples: int | None = None,
        eval_samples: int | None = None,
    ) -> None:
        super().__init__(
            path=path,
            cache_dir=cache_dir,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            train_samples=train_samples,
            eval_samples=eval_samples,
        )
        check_at_least("image_size", image_size, 1)
        self.image_size = image_size
        self.seq_len = image_size**2

    def dataset(self, tensors: dict[str, Tensor], rows: Tensor) -> Pixels:
        """Some rows of a split, as a map from a list of positions to a batch."""
        return Pixels(tensors, rows)

    def encoding(self) -> list[int]:
        """The tokens of a picture depend on its size."""
        return [self.image_size]

    def encode(self, rows: Iterator[pa.Array], table: Table) -> dict[str, Tensor]:
        """Every picture as a row of uint8 ``[n, L]``."""
        pixels = np.empty((table.num_rows, self.seq_len), dtype=np.uint8)
        done = 0
        # Pillow decodes outside the interpreter's lock, so threads do.
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for column in rows:
                if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
                    raise ValueError(
                        f"the pictures of {table.name} are of the type {column.type}, expected {{bytes, path}} as the "
                        f"datasets library writes them; write them with an Image feature"
                    )
                encoded = column.field("bytes").to_pylist()
                names = [f"the picture in row {done + i} of {table.name}" for i in range(len(encoded))]
                for picture in threads.map(partial(gray_pixels, size=self.image_size), encoded, names):
                    pixels[done] = picture
                    done += 1
        return {"pixels": torch.from_numpy(pixels)}


def gray_pixels(encoded: bytes | str | None, name: str, size: int) -> np.ndarray:
    """A picture, given as the bytes of a file or its path, as ``[size * size]`` gray values, uint8.

    Raises:
        ValueError: there is no picture, or Pillow cannot decode it.
    """
    if encoded is None:
        raise ValueError(f"{name} has no bytes; store the pictures inside the parquet file")
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as image:
            # A JPEG far larger than needed is decoded at a fraction of its size, which is several times faster.
            if min(image.size) >= 8 * size:
                image.draft("L", (4 * size, 4 * size))
            gray = image.convert("L")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be decoded ({error}); replace it or leave it out") from error
    if gray.size != (size, size):
        gray = gray.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(gray, dtype=np.uint8).reshape(-1)
