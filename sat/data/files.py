"""Floor 3, data: data modules whose rows come from files or from the hub, and are prepared once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from rich import get_console
from rich.progress import Progress
from torch import Tensor

from sat.data import sources
from sat.data.base import SequenceDataModule, check_rows
from sat.data.cache import Prepared, cached, default_cache_dir

# Below this many rows preparing takes about a second, and a bar would only flash up.
PROGRESS_FROM = 20_000


class FileDataModule(SequenceDataModule):
    """A data set in parquet files, or on the Hugging Face hub.

    Subclasses say where a row's content lies (``content_columns``, several names for one column, or :meth:`columns`),
    what it becomes (:meth:`encode`) and what that depends on (:meth:`encoding`).

    Args:
        path: local folder with train*.parquet and, if there are, validation*.parquet and test*.parquet, or a single
            parquet file; the hub when not given.
        cache_dir: folder for the prepared data; $XDG_CACHE_HOME/sat or ~/.cache/sat when not given.
        kwargs: as of :class:`~sat.data.base.SequenceDataModule`.
    """

    hub_id: str | None = None
    hub_config: str | None = None  # which of the data sets under this id, where it has several
    content_columns: Sequence[str]

    def __init__(
        self,
        *,
        path: str | None = None,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.path = path
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()

    def encode(self, rows: Iterator[pa.Array], table: sources.Table) -> dict[str, Tensor]:
        """The content, some hundred rows at a time, as tensors; several columns come as one of structs."""
        raise NotImplementedError

    def encoding(self) -> Sequence[int | str]:
        """What the tokens of a row depend on, besides its content."""
        raise NotImplementedError

    def columns(self, table: sources.Table) -> list[str]:
        """The columns of a table that hold its content."""
        return [sources.checked_column(table, self.content_columns)]

    def load(self) -> Prepared:
        """Tokens from the cache, or else from the files or the hub.

        Raises:
            FileNotFoundError: the path, or a training file in it, does not exist.
            ConnectionError: the hub cannot be reached.
            ValueError: a file cannot be read, a split has no rows, or columns, labels or content are not what they
                should be.
            PermissionError: the cache cannot be written.
        """
        if self.path is None:
            return self.load_cached(
                ["hub", self.hub_id, *([self.hub_config] if self.hub_config else [])],
                lambda: sources.hub_tables(str(self.hub_id), self.cache_dir, self.dataset_name, self.hub_config),
            )
        found = sources.find_parquet(sources.existing_path(self.path, self.dataset_name))
        return self.load_cached(
            [[split, sources.fingerprint(files)] for split, files in sorted(found.items())],
            lambda: {split: sources.parquet_table(files) for split, files in found.items()},
        )

    def load_cached(self, identity: object, tables: Callable[[], dict[str, sources.Table]]) -> Prepared:
        """The encoded tables, from the cache when they were encoded before under the same identity."""
        key = [self.encoding(), self.num_classes, identity]
        return cached(
            self.cache_dir, self.dataset_name, key, lambda: self._encode_tables(tables()), self.check_prepared
        )

    def check_prepared(self, prepared: Prepared) -> None:
        """Refuse what a cached file may hold and :meth:`encode` never gives, before training stumbles over it.

        Raises:
            ValueError: it holds such; the reason alone.
        """
        if not {"train"} <= prepared.splits.keys() <= set(sources.SPLIT_PREFIXES):
            raise ValueError("it has other splits than train, validation and test")
        for name, tensors in prepared.splits.items():
            labels = tensors.get("labels")
            if labels is None or labels.dtype != torch.int64 or labels.dim() != 1 or len(labels) == 0:
                raise ValueError(f"its {name} split has no labels")
            if labels.min() < 0 or labels.max() >= self.num_classes:
                raise ValueError(f"a label of its {name} split is none of {self.num_classes} classes")
            self.check_tensors(tensors, len(labels))

    def check_tensors(self, tensors: dict[str, Tensor], rows: int) -> None:
        """Refuse tensors of a split that :meth:`encode` never gives, with a ValueError; subclasses say which."""

    def _encode_tables(self, tables: dict[str, sources.Table]) -> Prepared:
        if "train" not in tables:
            raise ValueError(f"{self.dataset_name} has no split named train; pass --data.path with one that has")
        for split, table in tables.items():
            check_rows(self.dataset_name, split, table.name, table.num_rows)
        sources.one_naming([table.name for table in tables.values()], [table.class_names for table in tables.values()])
        columns = {
            split: [*self.columns(table), sources.checked_column(table, ["label"])] for split, table in tables.items()
        }
        splits = {}
        rows = sum(table.num_rows for table in tables.values())
        with Progress(transient=True, disable=rows < PROGRESS_FROM or not get_console().is_terminal) as progress:
            bar = progress.add_task(f"preparing {self.dataset_name}", total=rows)
            for split, table in tables.items():
                labels: list[int] = []
                contents = self._contents(table, columns[split], labels, lambda n: progress.advance(bar, n))
                splits[split] = self.encode(contents, table)
                splits[split]["labels"] = torch.tensor(labels, dtype=torch.int64)
        return Prepared(splits, tables["train"].class_names.get(columns["train"][-1], []))

    def _contents(
        self, table: sources.Table, columns: list[str], labels: list[int], advance: Callable[[int], None]
    ) -> Iterator[pa.Array]:
        """The content of the rows; their checked labels, the last column, are appended to ``labels`` on the way."""
        *names, label = columns
        for rows in table.read(columns):
            labels += sources.checked_labels(rows.column(label), self.num_classes, table)
            found = (rows.column(name) for name in names)
            content = [each.combine_chunks() if isinstance(each, pa.ChunkedArray) else each for each in found]
            yield content[0] if len(content) == 1 else pa.StructArray.from_arrays(content, names=names)
            advance(rows.num_rows)


def check_ragged(offsets: Tensor | None, rows: int, content: Tensor | None, dtype: torch.dtype, longest: int) -> None:
    """Refuse what is no flat buffer with the ``offsets [rows + 1]`` of rows of 1 to ``longest`` entries.

    Raises:
        ValueError: it is none; the reason alone.
    """
    if content is None or content.dtype != dtype or content.dim() != 1:
        raise ValueError("it has no buffer of tokens")
    if offsets is None or offsets.dtype != torch.int64 or list(offsets.shape) != [rows + 1]:
        raise ValueError(f"it does not say where {rows} rows begin")
    lengths = offsets.diff()
    if offsets[0] != 0 or offsets[-1] != len(content) or lengths.min() < 1 or lengths.max() > longest:
        raise ValueError("its rows do not begin one after the other")
