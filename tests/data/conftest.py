from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shared() -> Callable[[str], str]:
    """Folder of a real data set, or skip."""

    def find(name: str) -> str:
        folder = Path(os.environ.get("SAT_SHARED") or PROJECT.parent / "shared") / "data" / name
        if not folder.is_dir():
            pytest.skip(f"no copy of {name} at hand")
        return str(folder)

    return find


@pytest.fixture
def text_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes parquet files of texts: ``text_folder(train=[("hello", 0), ...], test=[...])``."""

    def write(**splits: list[tuple[str | None, Any]]) -> Path:
        for split, rows in splits.items():
            texts, labels = zip(*rows, strict=True)
            table = pa.table({"text": pa.array(texts, pa.string()), "label": pa.array(labels)})
            pq.write_table(table, tmp_path / f"{split}.parquet")
        return tmp_path

    return write


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def picture_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes parquet files of pictures: ``picture_folder(train=[(array or bytes, 0), ...], column="img")``."""

    def write(column: str = "img", **splits: list[tuple[np.ndarray | bytes | None, int]]) -> Path:
        for split, rows in splits.items():
            encoded = [png(p) if isinstance(p, np.ndarray) else p for p, _ in rows]
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            pictures = pa.array([{"bytes": e, "path": None} for e in encoded], kind)
            pq.write_table(
                pa.table({column: pictures, "label": [label for _, label in rows]}), tmp_path / f"{split}.parquet"
            )
        return tmp_path

    return write
