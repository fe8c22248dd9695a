"""What a section is made of. Nothing here, nor in a section's ``cases``, touches the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all cases of a run have in common."""

    out: Path  # the folder of the results
    smoke: bool = False  # tiny sizes on the CPU, to try the suite itself

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"

    @property
    def backend(self) -> Any:  # one of sat.ops.Backend
        return "torch" if self.smoke else "triton"


@dataclass(frozen=True)
class Case:
    """One measurement or check."""

    name: str
    run: Callable[[float], Record]  # from the seconds it may take; figures, with a few words as "line"
    seconds: float  # usual need, compilation included: the case is not begun when less is left
    longest: float = 90  # after so many seconds, or three times its usual need, it is ended by force


@dataclass(frozen=True)
class Section:
    """Cases in the order of their importance, and how their figures are shown."""

    name: str
    weight: float  # its share of the time, relative to the others
    cases: Callable[[Setting], list[Case]]
    table: Callable[[list[Record]], str]  # from the records that are "ok"


def sentence(error: BaseException) -> str:
    """An exception as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def text_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned to the right, narrow, without a frame: many fit into the end of a log."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (" ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return "\n".join([title, *lines])


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, without an exponent; a dash for None."""
    if value is None:
        return "-"
    decimals = next((d for d in range(6) if abs(value) * 10**d >= 10 ** (digits - 1)), 6)
    return f"{value:.{decimals}f}"
