"""Floor 3, data: reads rows from parquet files or from the hub, and says in a sentence what is wrong with them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from sat.files import shortened

if TYPE_CHECKING:
    import datasets

Loaded = TypeVar("Loaded")

# What the hub names the files of a split: number and count.
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
SPLIT_PREFIXES = {"train": "train", "validation": "val", "test": "test"}


@dataclass(frozen=True)
class Table:
    """Rows of one split.

    Args:
        name: what to call it in messages.
        columns: the names of its columns.
        num_rows: how many rows it has.
        class_names: label column -> names of the classes, where the file says so.
        read: given column names, yields the rows as Arrow tables of some hundred rows.
    """

    name: str
    columns: list[str]
    num_rows: int
    class_names: dict[str, list[str]]
    read: Callable[[list[str]], Iterable[pa.Table | pa.RecordBatch]]


def existing_path(path: str, dataset: str) -> Path:
    """``path`` as a ``Path``, or a FileNotFoundError."""
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(
            f"there is no {found} to read {dataset} from; correct --data.path (a folder or a parquet file)"
        )
    return found.resolve()


def split_of(name: str) -> str | None:
    """The split that a file or folder of this name holds: "train", "validation", "test", or None."""
    return next((split for split, prefix in SPLIT_PREFIXES.items() if name.lower().startswith(prefix)), None)


def find_parquet(path: Path) -> dict[str, list[Path]]:
    """The parquet files of each split; a single file is the training split.

    A file belongs to a split by its own name (``train-00000-of-00001.parquet``) or by its folder's
    (``train/0000.parquet``), at any depth.

    Raises:
        FileNotFoundError: there is no parquet file, or none of the training split.
    """
    if path.is_file():
        return {"train": [path]}
    files = sorted(
        file
        for file in files_below(path)
        if file.suffix == ".parquet" and not file.relative_to(path).parts[0].startswith(".")
    )
    splits: dict[str, list[Path]] = {}
    for file in files:
        inside = file.relative_to(path)
        split = split_of(inside.name) or next((s for part in inside.parts[-2::-1] if (s := split_of(part))), None)
        if split:
            splits.setdefault(split, []).append(file)
    for split, own in splits.items():
        _check_shards(split, own)
    if "train" not in splits:
        found = ", ".join(str(file.relative_to(path)) for file in files[:5]) or "no parquet file at all"
        raise FileNotFoundError(
            f"looked for train*.parquet or train/*.parquet in {path} and found {found}; point --data.path at a folder "
            f"that holds train*.parquet (and, if there are, validation*.parquet and test*.parquet)"
        )
    return splits


def _check_shards(split: str, files: Sequence[Path]) -> None:
    """That the files say they are all there are: ``train-00000-of-00003.parquet`` is one of three."""
    numbers: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if match := SHARD.fullmatch(file.stem):
            numbers.setdefault((file.parent, match[1], int(match[3])), set()).add(int(match[2]))
    for (folder, name, count), there in numbers.items():
        if missing := sorted(set(range(count)) - there):
            raise FileNotFoundError(
                f"{folder} has {len(there)} of the {count} files of the {split} split, {name}-{missing[0]:05}-of-"
                f"{count:05}.parquet is missing; download it again"
            )


def files_below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All files of a folder and of those in it, also where these are links, but for one to a folder it is in."""
    real = os.path.realpath(folder)
    if real in above or not os.access(folder, os.R_OK | os.X_OK):  # lost+found, say
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from files_below(Path(entry.path), above | {real})
            else:
                yield Path(entry.path)


def fingerprint(files: Iterable[Path]) -> list[list[str | int]]:
    """Path, size and time of change of each file: what a cached copy depends on."""
    result: list[list[str | int]] = []
    for file in files:
        status = file.stat()
        result.append([str(file), status.st_size, status.st_mtime_ns])
    return result


def parquet_table(files: Sequence[Path]) -> Table:
    """The rows of some parquet files of the same columns, as one table.

    Raises:
        ValueError: a file is cut short or no parquet file.
    """
    opened = [_open_parquet(file) for file in files]

    def read(columns: list[str]) -> Iterator[pa.RecordBatch]:
        for file, parquet in zip(files, opened, strict=True):
            try:
                yield from parquet.iter_batches(batch_size=512, columns=columns)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error}); replace it by a whole copy") from error

    columns = [name for name in opened[0].schema_arrow.names if all(name in p.schema_arrow.names for p in opened)]
    return Table(
        name=str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more",
        columns=columns,
        num_rows=sum(parquet.metadata.num_rows for parquet in opened),
        class_names=one_naming(files, [_class_names(parquet.schema_arrow) for parquet in opened]),
        read=read,
    )


def one_naming(names: Sequence[object], found: Sequence[dict[str, list[str]]]) -> dict[str, list[str]]:
    """The names of the classes, by column, of which all tables that say them say the same.

    Raises:
        ValueError: two do not; the labels of one of them would be wrong.
    """
    merged: dict[str, tuple[object, list[str]]] = {}
    for name, own in zip(names, found, strict=True):
        for column, classes in own.items():
            first, before = merged.setdefault(column, (name, classes))
            if before != classes:
                raise ValueError(
                    f"{first} and {name} name the classes of {column} differently, {shortened(str(before))} and "
                    f"{shortened(str(classes))}, so that their labels do not mean the same; take files of one release"
                )
    return {column: classes for column, (_, classes) in merged.items()}


def hub_tables(hub_id: str, cache_dir: Path, dataset: str, config: str | None = None) -> dict[str, Table]:
    """Every split of a data set on the Hugging Face hub; ``datasets`` keeps its files below ``cache_dir``.

    ``config`` is the name of one of several data sets that share the id.

    Raises:
        ConnectionError: the hub cannot be reached and has not been downloaded before.
    """
    import datasets  # here, since it takes a second and local files need none of it
    from huggingface_hub import HfApi

    hub_cache = cache_dir / "hub"
    try:
        # One request without retries: load_dataset alone would try for half a minute.
        HfApi().dataset_info(hub_id, timeout=10)
    except Exception as error:  # the kind depends on the version of the library and on its HTTP client
        if not (hub_cache / hub_id.replace("/", "___")).exists():
            raise _unreachable(hub_id, dataset, error) from error
    try:
        splits = datasets.load_dataset(hub_id, config, cache_dir=str(hub_cache))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _unreachable(hub_id, dataset, error) from error
    chosen: dict[str, str] = {}
    for name in splits:
        split = split_of(name)
        if split is None or chosen.get(split) == split:
            continue
        if name != split and split in chosen and split not in splits:
            raise ValueError(
                f"{hub_id} has {chosen[split]!r} and {name!r}, which both may be its {split} split; download the files "
                f"that are meant and give their folder as --data.path"
            )
        if name == split or split not in chosen:
            chosen[split] = name
    return {split: _hub_table(f"{hub_id} ({name})", splits[name]) for split, name in chosen.items()}


def from_folder_or_hub(name: str, load: Callable[[bool], Loaded], what: str, option: str) -> Loaded:
    """What ``load(local_files_only)`` makes of the folder ``name``, or of the files that the hub has under that name.

    Raises:
        ValueError: the folder holds no such thing.
        ConnectionError: there is no such folder, and the hub does not give it and has not given it before.
    """
    from huggingface_hub import HfApi

    refusal: Exception | None = None
    is_folder = Path(name).is_dir()
    if not is_folder:
        try:
            # One request without retries: the loaders alone would try for half a minute.
            HfApi().model_info(name, timeout=10)
        except Exception as error:  # the kind depends on the version of the library and on its HTTP client
            refusal = error
    try:
        return load(is_folder or refusal is not None)
    except Exception as error:  # tokenizers raises nothing more special
        if is_folder:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(
                f"the folder {name} holds no {what} that can be read ({reason}); correct {option}"
            ) from error
        reason = f"{type(refusal or error).__name__}: {refusal or error}".splitlines()[0]
        raise ConnectionError(
            f"{name!r} is no folder, and the hub gives no {what} of that name ({reason}); correct {option}, or connect "
            f"to the internet"
        ) from error


def checked_column(table: Table, candidates: Sequence[str]) -> str:
    """The first of ``candidates`` that the table has.

    Raises:
        ValueError: it has none of them.
    """
    for name in candidates:
        if name in table.columns:
            return name
    raise ValueError(
        f"{table.name} has the columns {', '.join(table.columns)}, expected one named {' or '.join(candidates)}; "
        f"rename the column in the file"
    )


def checked_labels(column: pa.Array | pa.ChunkedArray, num_classes: int, table: Table) -> list[int]:
    """Labels as integers from 0 to ``num_classes - 1``.

    Raises:
        ValueError: a label is missing, no integer, or out of range.
    """
    if not pa.types.is_integer(column.type):
        raise ValueError(
            f"the labels of {table.name} are of the type {column.type}, expected integers from 0 to "
            f"{num_classes - 1}; write the labels as integers"
        )
    labels: list[int | None] = column.to_pylist()
    for label in labels:
        if label is None or not 0 <= label < num_classes:
            what = "a row without a label" if label is None else f"the label {label}"
            raise ValueError(
                f"{table.name} has {what}, expected integers from 0 to {num_classes - 1}; leave such rows out or "
                f"correct their labels"
            )
    return [label for label in labels if label is not None]


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a whole parquet file ({error}); replace it by a whole copy") from error


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names that the ``datasets`` library wrote into a file's schema; unreadable notes count as none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {column: list(feature["names"]) for column, feature in features.items() if "names" in feature}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}


def _hub_table(name: str, rows: datasets.Dataset) -> Table:
    return Table(
        name=name,
        columns=list(rows.column_names),
        num_rows=rows.num_rows,
        class_names={c: list(f.names) for c, f in rows.features.items() if getattr(f, "names", None)},
        # Arrow tables hold pictures as they are stored ({bytes, path}), like the rows of a parquet file.
        read=lambda columns: rows.select_columns(columns).with_format("arrow").iter(batch_size=512),
    )


def _unreachable(hub_id: str, dataset: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"{dataset} could not be fetched from the hub as {hub_id} ({type(error).__name__}: {error}); connect to the "
        f"internet, or pass --data.path with a local folder that holds train*.parquet and test*.parquet"
    )
