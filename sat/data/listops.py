"""Floor 3, data: ListOps of the Long Range Arena: drawn by its rules, or read from the released files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import get_console
from rich.progress import Progress
from torch import Tensor

from sat.data import sources
from sat.data.base import check_at_least, check_rows
from sat.data.cache import Prepared, cached
from sat.data.texts import TextDataModule
from sat.files import shortened

# Tokens in the order of their ids, which begin at 1. The parentheses of the released files say nothing more than the
# brackets do, and the reference leaves them out, too.
TOKENS = (*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")
MIN, MAX, MED, SM, END = range(10, 15)

# The reference: an operator has up to 10 arguments (its randint includes both ends), each of which is an operation with
# this probability, and the arguments of operations at the ninth level are digits.
MOST_ARGUMENTS = 10
NESTED = 0.25
DEEPEST = 9

DRAWN_AT_ONCE = 4096
# As long as a draw of many finds fewer than one expression of the wanted lengths, nobody waits for all of them.
HOPELESS_AFTER = 16
FILES = {"train": "basic_train.tsv", "validation": "basic_val.tsv", "test": "basic_test.tsv"}


class ListOps(TextDataModule):
    """ListOps: the value, 0 to 9, of nested MIN, MAX, MED (integer median) and SM (sum modulo 10): 16 ids, 10 classes.

    Drawn by the rules of the Long Range Arena (Tay et al. 2021), without duplicates, 96 % for training, 2 % for
    validation and 2 % for tests; or read from the Arena's released files ``basic_train.tsv``, ``basic_val.tsv`` and
    ``basic_test.tsv``. A token is a digit, an operator with its bracket, or a closing bracket; id 0 is padding.

    Args:
        path: folder with the released files; expressions are drawn when not given.
        seq_len: tokens in a sequence; shorter expressions are padded, longer ones are refused.
        min_length: drawn expressions have more tokens than this.
        max_length: drawn expressions have fewer tokens than this.
        num_samples: expressions to draw, of all splits together.
        draw_seed: decides which expressions are drawn.
        batch_size: samples in a training batch, per process. Incomplete training batches are left out.
        kwargs: as of :class:`~sat.data.texts.TextDataModule`.

    Raises:
        ValueError: an argument is out of range, or no such expressions can be drawn.
    """

    dataset_name = "ListOps"
    vocab_size = len(TOKENS) + 1
    num_classes = 10

    def __init__(
        self,
        *,
        path: str | None = None,
        seq_len: int = 2048,
        min_length: int = 500,
        max_length: int = 2000,
        num_samples: int = 100_000,
        draw_seed: int = 0,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(path=path, seq_len=seq_len, batch_size=batch_size, **kwargs)
        check_at_least("min_length", min_length, 3)  # the shortest operation, [MIN 1 2 ], has 4 tokens
        check_at_least("max_length", max_length, min_length + 2)
        check_at_least("num_samples", num_samples, 50)  # below, 2 % are none
        check_at_least("draw_seed", draw_seed, 0)
        if path is None and max_length > seq_len + 1:
            raise ValueError(
                f"expressions of up to {max_length - 1} tokens do not fit a seq_len of {seq_len}; raise --data.seq_len "
                f"to {max_length - 1}, or lower --data.max_length"
            )
        # Operations on digits alone: the rest is more, but drawn too rarely to wait for.
        possible = 4 * 10 ** (min(max_length - 1, MOST_ARGUMENTS + 2) - 2)
        if 4 * num_samples > possible:
            raise ValueError(
                f"{num_samples} different expressions of fewer than {max_length} tokens would take too long to find; "
                f"lower --data.num_samples to {possible // 4}, or raise --data.max_length"
            )
        self.min_length, self.max_length = min_length, max_length
        self.num_samples, self.draw_seed = num_samples, draw_seed

    def load(self) -> Prepared:
        """Tokens from the cache, or else drawn, or from the released files.

        Raises:
            FileNotFoundError: the path, or one of the three files in it, does not exist.
            ValueError: a file is cut short or of another form, an expression is longer than ``seq_len``, or hardly any
                drawn expression has the wanted length.
            PermissionError: the cache cannot be written.
        """
        if self.path is None:
            drawn = [MOST_ARGUMENTS, self.min_length, self.max_length, self.num_samples, self.draw_seed]
            return cached(self.cache_dir, self.dataset_name, ["drawn", *drawn], self._draw, self.check_prepared)
        folder = sources.existing_path(self.path, self.dataset_name)
        files = {split: folder / name for split, name in FILES.items()}
        if missing := [file.name for file in files.values() if not file.is_file()]:
            raise FileNotFoundError(
                f"{folder} has no {' and no '.join(missing)}; point --data.path at a folder with all of "
                f"{', '.join(FILES.values())}, or leave it out, and expressions are drawn"
            )
        identity = ["files", self.seq_len, sources.fingerprint(files.values())]

        def read() -> Prepared:
            return Prepared({split: read_released(file, self.seq_len) for split, file in files.items()}, [])

        return cached(self.cache_dir, self.dataset_name, identity, read, self.check_prepared)

    def check_tensors(self, tensors: dict[str, Tensor], rows: int) -> None:
        """Refuse anything but a buffer of tokens and its offsets."""
        super().check_tensors(tensors, rows)
        if tensors["bytes"].max() >= len(TOKENS):
            raise ValueError(f"it has tokens that are none of ListOps' {len(TOKENS)}")

    def _draw(self) -> Prepared:
        tokens, values = draw(self.num_samples, self.min_length, self.max_length, self.draw_seed)
        held_out = self.num_samples // 50
        ends = [self.num_samples - 2 * held_out, self.num_samples - held_out, self.num_samples]
        splits = {}
        for name, begin, end in zip(FILES, [0, *ends], ends, strict=False):
            labels = torch.tensor(values[begin:end], dtype=torch.int64)
            splits[name] = {**_ragged(tokens[begin:end]), "labels": labels}
        return Prepared(splits, [])


def draw(count: int, min_length: int, max_length: int, seed: int) -> tuple[list[bytes], list[int]]:
    """Different expressions of more than ``min_length`` and fewer than ``max_length`` tokens, and their values.

    Returns:
        ``count`` expressions, each a byte a token (an index of ``TOKENS``), and as many values, 0 to 9.

    Raises:
        ValueError: hardly any expression has such a length.
    """
    found: dict[bytes, int] = {}
    draws = 0
    with Progress(transient=True, disable=count < 20_000 or not get_console().is_terminal) as progress:
        bar = progress.add_task("drawing ListOps", total=count)
        while len(found) < count:
            tokens, values = draw_some(np.random.default_rng([seed, draws]), DRAWN_AT_ONCE, min_length, max_length)
            # In the order of the draws, so that as many as are wanted do not depend on how many are drawn at once.
            found.update(zip(tokens, values, strict=True))
            draws += 1
            if draws == HOPELESS_AFTER and len(found) < min(count, draws):
                raise ValueError(
                    f"of {draws * DRAWN_AT_ONCE:,} expressions drawn by the rules of ListOps, {len(found)} have more "
                    f"than {min_length} and fewer than {max_length} tokens; lower --data.min_length, or raise "
                    f"--data.max_length"
                )
            progress.update(bar, completed=min(len(found), count))
    return list(found)[:count], list(found.values())[:count]


def draw_some(
    generator: np.random.Generator, count: int, min_length: int, max_length: int
) -> tuple[list[bytes], list[int]]:
    """Draw ``count`` operations level by level, all at once, and keep those of the wanted length.

    A level is a list of nodes, those of one parent after the other: ``kinds`` (a digit, or an operator),
    ``parents`` (places in the level above) and ``trees`` (which expression they belong to).
    """
    kinds = [generator.integers(MIN, END, count)]
    parents = [np.zeros(count, np.int64)]
    trees = [np.arange(count)]
    lengths = np.full(count, 2)  # of what is drawn so far, closing brackets included
    for level in range(2, DEEPEST + 2):
        inner = np.flatnonzero((kinds[-1] >= MIN) & (lengths[trees[-1]] < max_length))
        arguments = generator.integers(2, MOST_ARGUMENTS + 1, len(inner))
        parents.append(np.repeat(inner, arguments))
        trees.append(trees[-1][parents[-1]])
        size = len(parents[-1])
        nested = generator.random(size) < (NESTED if level <= DEEPEST else 0)
        kinds.append(np.where(nested, generator.integers(MIN, END, size), generator.integers(0, 10, size)))
        lengths += np.bincount(trees[-1], 1 + nested, minlength=count).astype(np.int64)
    keep = (lengths > min_length) & (lengths < max_length)
    kinds, parents, trees = _only(keep, kinds, parents, trees)
    spans, values = _evaluate(kinds, parents)
    offsets = np.concatenate([[0], np.cumsum(spans[0])])
    buffer = np.empty(offsets[-1], np.uint8)
    begin = offsets[:-1]
    for level in range(len(kinds)):
        if level:
            # Behind the operator and the arguments before this one, as the first of which all have the same parent.
            before = np.cumsum(spans[level]) - spans[level]
            first = np.flatnonzero(np.diff(parents[level], prepend=-1))
            of = np.cumsum(np.diff(parents[level], prepend=-1) != 0) - 1
            begin = begin[parents[level]] + 1 + before - before[first][of]
        buffer[begin] = kinds[level]
        operators = kinds[level] >= MIN
        buffer[begin[operators] + spans[level][operators] - 1] = END
    content = buffer.tobytes()
    tokens = [content[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return tokens, values[0].tolist()


Levels = list[np.ndarray]


def _only(keep: np.ndarray, kinds: Levels, parents: Levels, trees: Levels) -> tuple[Levels, Levels, Levels]:
    """The same for some of the expressions."""
    kept = [keep[tree] for tree in trees]
    places = [np.cumsum(chosen) - 1 for chosen in kept]
    return (
        [level[chosen] for level, chosen in zip(kinds, kept, strict=True)],
        [parents[0][kept[0]], *(places[i][parents[i + 1][kept[i + 1]]] for i in range(len(kept) - 1))],
        [level[chosen] for level, chosen in zip(trees, kept, strict=True)],
    )


def _evaluate(kinds: Levels, parents: Levels) -> tuple[Levels, Levels]:
    """For each node how many tokens it takes, and its value; from the deepest level up."""
    spans, values = [np.ones_like(level) for level in kinds], [level.copy() for level in kinds]
    for level in range(len(kinds) - 1, 0, -1):
        if len(kinds[level]) == 0:
            continue
        first = np.flatnonzero(np.diff(parents[level], prepend=-1))
        above = parents[level][first]
        spans[level - 1][above] = 2 + np.add.reduceat(spans[level], first)
        arguments, count = values[level], np.diff(first, append=len(kinds[level]))
        ordered = arguments[np.lexsort((arguments, parents[level]))]
        median = (ordered[first + (count - 1) // 2] + ordered[first + count // 2]) // 2
        results = [
            np.minimum.reduceat(arguments, first),
            np.maximum.reduceat(arguments, first),
            median,
            np.add.reduceat(arguments, first) % 10,
        ]
        values[level - 1][above] = np.choose(kinds[level - 1][above] - MIN, results)
    return spans, values


def read_released(file: Path, longest: int) -> dict[str, Tensor]:
    """The expressions of one released file: a header, then on each line an expression, a tab and its value.

    Raises:
        ValueError: the file is cut short or of another form, or an expression has more than ``longest`` tokens.
    """
    number = {token: bytes([i]) for i, token in enumerate(TOKENS)} | {"(": b"", ")": b""}
    tokens: list[bytes] = []
    labels: list[int] = []
    with (
        file.open(encoding="utf-8", errors="replace") as lines,
        Progress(transient=True, disable=not get_console().is_terminal) as progress,
    ):
        bar = progress.add_task(f"reading {file.name}", total=file.stat().st_size)
        if next(lines, "") != "Source\tTarget\n":
            raise ValueError(f"{file} does not begin with the line Source, tab, Target; replace it by a released copy")
        for row, line in enumerate(lines, 2):
            source, _, target = line.partition("\t")
            try:
                expression = b"".join(map(number.__getitem__, source.split()))
            except KeyError as error:
                raise ValueError(
                    f"line {row} of {file} has {shortened(str(error), 40)}, which is no token of ListOps; replace the "
                    f"file by a released copy"
                ) from error
            if len(target) != 2 or target[0] not in "0123456789" or target[1] != "\n" or not is_whole(expression):
                raise ValueError(
                    f"line {row} of {file} is not a whole expression, a tab and its value from 0 to 9, as in a file "
                    f"that is cut short; download it again"
                )
            if len(expression) > longest:
                raise ValueError(
                    f"line {row} of {file} is an expression of {len(expression)} tokens, but --data.seq_len is "
                    f"{longest}; raise it"
                )
            tokens.append(expression)
            labels.append(int(target))
            progress.advance(bar, len(line))
    check_rows("ListOps", file.stem, str(file), len(labels))
    return {**_ragged(tokens), "labels": torch.tensor(labels, dtype=torch.int64)}


def is_whole(expression: bytes) -> bool:
    """Whether the brackets close as they open, the first one at the very end; a digit alone is whole, too."""
    tokens = np.frombuffer(expression, np.uint8)
    depth = np.cumsum((tokens >= MIN).astype(np.int64) - 2 * (tokens == END))
    return len(tokens) > 0 and depth[-1] == 0 and (len(tokens) == 1 or bool((depth[:-1] > 0).all()))


def _ragged(tokens: Sequence[bytes]) -> dict[str, Tensor]:
    lengths = torch.tensor([0, *map(len, tokens)], dtype=torch.int64)
    return {"bytes": torch.frombuffer(bytearray(b"".join(tokens)), dtype=torch.uint8), "offsets": lengths.cumsum(0)}
