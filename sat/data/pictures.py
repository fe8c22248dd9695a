"""Floor 3, data: pictures as gray pixels, and as pretrained models take them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from sat.data.base import check_at_least
from sat.data.files import FileDataModule
from sat.data.loading import Batch, Transform
from sat.data.sources import Table, from_folder_or_hub

# Pillow knows more, among them some that it has other programs read (EPS: Ghostscript).
PICTURE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


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
        image_size: edge of the pictures in pixels; others are resized, bilinearly.
        batch_size: samples in a training batch, per process. Incomplete training batches are left out.
        kwargs: as of :class:`~sat.data.files.FileDataModule`.
    """

    vocab_size = 256
    has_padding = False
    pixel_tokens = True
    content_columns: Sequence[str] = ("img", "image")
    mode: Literal["L", "RGB"] = "L"  # Pillow's names
    resizes = True  # or else pictures of another size are refused

    def __init__(
        self,
        *,
        image_size: int = 32,
        batch_size: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        check_at_least("image_size", image_size, 1)
        self.image_size = image_size
        self.seq_len = image_size**2

    def dataset(self, tensors: dict[str, Tensor], rows: Tensor) -> Pixels:
        """Some rows of a split, as a map from a list of positions to a batch."""
        return Pixels(tensors, rows)

    def encoding(self) -> Sequence[int | str]:
        """The pixels of a picture depend on its size and on whether it is gray."""
        return [self.image_size] if self.mode == "L" else [self.image_size, self.mode]

    def check_tensors(self, tensors: dict[str, Tensor], rows: int) -> None:
        """Refuse anything but so many pictures of this size."""
        pixels, expected = tensors.get("pixels"), [rows, self.image_size**2 * len(self.mode)]
        if pixels is None or pixels.dtype != torch.uint8 or list(pixels.shape) != expected:
            raise ValueError(f"it has no pixels of the shape {expected}")

    def encode(self, rows: Iterator[pa.Array], table: Table) -> dict[str, Tensor]:
        """Every picture as a row of uint8: ``[n, L]``, in colour ``[n, 3 * L]``, three values a pixel."""
        pixels = np.empty((table.num_rows, self.image_size**2 * len(self.mode)), dtype=np.uint8)
        decode = partial(decode_pixels, size=self.image_size, mode=self.mode, resize=self.resizes)
        done = 0
        # Pillow decodes outside the interpreter's lock, so threads do.
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for column in rows:
                if not _holds_pictures(column.type):
                    raise ValueError(
                        f"the pictures of {table.name} are of the type {column.type}, expected {{bytes, path}} as the "
                        f"datasets library writes them; write them with an Image feature"
                    )
                encoded = column.field("bytes").to_pylist()
                names = [f"the picture in row {done + i} of {table.name}" for i in range(len(encoded))]
                for picture in threads.map(decode, encoded, names):
                    pixels[done] = picture
                    done += 1
        return {"pixels": torch.from_numpy(pixels)}


class ColorPictures(Dataset[Batch]):
    """Rows of a uint8 tensor ``[n, 3 * L]``; indexed by a list of positions, it gives a pretrained model's batch."""

    def __init__(
        self,
        tensors: dict[str, Tensor],
        rows: Tensor,
        stored: int,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.pixels, self.labels, self.rows = tensors["pixels"].numpy(), tensors["labels"].numpy(), rows.numpy()
        self.stored, self.size = stored, size
        self.mean, self.std = (np.array(each, np.float32)[:, None, None] for each in (mean, std))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, positions: list[int]) -> Batch:
        """``pixel_values`` float32 ``[B, 3, height, width]``, normalised; and labels."""
        rows = self.rows[positions]
        pixels = self.pixels[rows].reshape(len(rows), self.stored, self.stored, 3).transpose(0, 3, 1, 2)
        values = torch.from_numpy((pixels.astype(np.float32) / 255 - self.mean) / self.std)
        if self.size != (self.stored, self.stored):
            # Here and not in the cache, which stays small and fits every model.
            values = F.interpolate(values, self.size, mode="bilinear", antialias=True)
        return {"pixel_values": values, "labels": torch.from_numpy(self.labels[rows])}


class ColorImageDataModule(ImageDataModule):
    """Pictures in colour, as a pretrained vision model takes them.

    A batch is a dict of ``pixel_values`` float32 ``[B, 3, height, width]``, normalised by the mean and the standard
    deviation of the model's image processor (its ``preprocessor_config.json``) and, where that wants another size than
    the stored one, resized bilinearly; and ``labels`` int64 ``[B]``.

    Args:
        processor: folder or hub name of the model whose image processor says mean, standard deviation and size; that of
            model.pretrained when not given.
        image_size: edge in pixels to which the pictures are resized; that of the image processor when not given.
        augment: change the training pictures at random: flipped from left to right half of the time, and shifted by up
            to an eighth of their size in any direction.
        batch_size: samples in a training batch, per process. Incomplete training batches are left out.
        kwargs: as of :class:`ImageDataModule`.

    Raises:
        ValueError: an argument is out of range, no processor is given, or its file cannot be read.
        ConnectionError: the hub does not give the processor.
    """

    mode = "RGB"
    inputs = "pictures"
    pixel_tokens = False
    stored_size: int

    def __init__(
        self,
        *,
        processor: str | None = None,
        image_size: int | None = None,
        augment: bool = False,
        batch_size: int = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=self.stored_size, batch_size=batch_size, **kwargs)
        check_at_least("image_size", image_size, 1)
        if processor is None:
            raise ValueError(
                f"{self.dataset_name} in colour needs the image processor of a model; set model.pretrained or "
                f"--data.processor to a hub name or a folder that holds preprocessor_config.json"
            )
        self.mean, self.std, size = read_processor(processor)
        self.picture_size = size if image_size is None else (image_size, image_size)
        self.augment = augment

    def size(self) -> str:
        """How large a sample is, for people."""
        return f"{self.picture_size[0]} x {self.picture_size[1]} pixels"

    def dataset(self, tensors: dict[str, Tensor], rows: Tensor) -> ColorPictures:  # type: ignore[override]
        """Some rows of a split, as a map from a list of positions to a batch."""
        return ColorPictures(tensors, rows, self.image_size, self.picture_size, self.mean, self.std)

    def save_processor(self, folder: Path) -> None:
        """Write how these pictures are prepared, as an image processor of transformers that any of its models takes."""
        height, width = self.picture_size
        content = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": height, "width": width},
            "resample": Image.Resampling.BILINEAR.value,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean,
            "image_std": self.std,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def transform(self) -> Transform | None:
        """The random changes, if they are asked for."""
        return flip_and_shift if self.augment else None


def flip_and_shift(batch: Batch, generator: np.random.Generator) -> Batch:
    """Every picture flipped with probability 1/2 and shifted by up to an eighth; what moves in is of the mean colour.

    Source: Krizhevsky's CIFAR-10 networks, and He et al. 2016, section 4.2.
    """
    pictures = batch["pixel_values"]
    count, _, height, width = pictures.shape
    flips = torch.from_numpy(generator.integers(0, 2, count).astype(bool))
    pictures = torch.where(flips[:, None, None, None], pictures.flip(-1), pictures)
    up, left = (generator.integers(0, 2 * (side // 8) + 1, count) for side in (height, width))
    padded = F.pad(pictures, (width // 8, width // 8, height // 8, height // 8))  # 0 is the mean
    rows, columns = (
        torch.from_numpy(start)[:, None] + torch.arange(side) for start, side in ((up, height), (left, width))
    )
    shifted = padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None]]
    return {**batch, "pixel_values": shifted.permute(0, 3, 1, 2).contiguous()}


def read_processor(name: str) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, int]]:
    """Mean, standard deviation (of values from 0 to 1, by colour) and (height, width) of a model's image processor.

    Raises:
        ValueError: the file cannot be read, or does not say these.
        ConnectionError: there is no such folder, and the hub does not give the file.
    """
    found = from_folder_or_hub(name, partial(_processor_file, name), "preprocessor_config.json", "--data.processor")
    content: dict[str, Any] = json.loads(found)
    # What the model gets: a crop of what was resized, if there is one.
    cropped = content.get("do_center_crop") and "crop_size" in content
    size = content["crop_size"] if cropped else content.get("size", 224)
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge")), size.get("width", size.get("shortest_edge"))
    else:
        size = size, size
    try:
        # An image processor need not normalise; values from 0 to 1 are what it gives then.
        plain = not content.get("do_normalize", True)
        mean = tuple(float(value) for value in ((0.0, 0.0, 0.0) if plain else content["image_mean"]))
        std = tuple(float(value) for value in ((1.0, 1.0, 1.0) if plain else content["image_std"]))
        height, width = (int(side) for side in size)
        if (
            len(mean) != 3
            or len(std) != 3
            or not (np.isfinite([*mean, *std]).all() and min(std) > 0 < min(height, width))
        ):
            raise ValueError("three means, three positive deviations and a size are expected")
        factor = content.get("rescale_factor", 1 / 255) if content.get("do_rescale", True) else 1.0
        if abs(255 * float(factor) - 1) > 1e-6:
            raise ValueError(f"values are multiplied by {factor}, and 1/255 is expected")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"the preprocessor_config.json of {name} does not say image_mean, image_std and size as an image processor "
            f"for RGB pictures does ({type(error).__name__}: {error}); give another --data.processor"
        ) from error
    return mean, std, (height, width)


def _processor_file(name: str, local_files_only: bool) -> str:
    file = "preprocessor_config.json"
    if not Path(name).is_dir():
        from huggingface_hub import hf_hub_download

        found = hf_hub_download(name, file, local_files_only=local_files_only)
    else:
        found = str(Path(name) / file)
    text = Path(found).read_text(encoding="utf-8")
    if not isinstance(json.loads(text), dict):
        raise ValueError(f"{file} holds no settings")
    return text


def _holds_pictures(kind: pa.DataType) -> bool:
    """Whether a column holds files of pictures. Texts in their place would be names of files on this machine."""
    place = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    return place >= 0 and any(
        check(kind.field(place).type) for check in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_null)
    )


def decode_pixels(
    encoded: bytes | None, name: str, size: int, mode: Literal["L", "RGB"] = "L", resize: bool = True
) -> np.ndarray:
    """A picture, given as the bytes of a file, as ``[size * size * colours]`` values, uint8.

    Raises:
        ValueError: there is no picture, Pillow cannot decode it, or it has another size and may not be resized.
    """
    if encoded is None:
        raise ValueError(f"{name} has no bytes; store the pictures inside the parquet file")
    try:
        with Image.open(io.BytesIO(encoded), formats=PICTURE_FORMATS) as image:
            # A JPEG far larger than needed is decoded at a fraction of its size, which is several times faster.
            if resize and min(image.size) >= 8 * size:
                image.draft(mode, (4 * size, 4 * size))
            if image.mode.startswith("I") or image.mode == "F":  # Pillow would cut off what is above 255
                raise ValueError(f"its mode {image.mode} has more than 8 bits a colour")
            picture = image.convert(mode)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be decoded ({error}); replace it or leave it out") from error
    if picture.size != (size, size):
        if not resize:
            raise ValueError(
                f"{name} has {picture.width} x {picture.height} pixels, expected {size} x {size}; correct "
                f"--data.image_size, or point --data.path at pictures of this size"
            )
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture, dtype=np.uint8).reshape(-1)
