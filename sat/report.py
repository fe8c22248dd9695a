"""Floor 8: ``python -m sat.report RUN``, what was learned, as tables and as one page."""

from __future__ import annotations

import argparse
import sys
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console

from sat.files import readable
from sat.findings import Findings, read
from sat.page import print_sections, write_page
from sat.sections import sections_of

DESCRIPTION = """Show what was learned: tables here, and one HTML page that can be passed on as it is.

The page has the blocks that each layer and head keeps, what it attended to, the statistics that led to the switch,
loss, accuracy and step times, and how far information travels. It needs no network, and nothing beside it.

  python -m sat.report runs/quickstart/2026-11-20_14-04-40             a run's folder
  python -m sat.report runs/quickstart/TIME/checkpoints/best.ckpt      a checkpoint
  python -m sat.report layouts/layer0.safetensors                      a layout file
  python -m sat.report first.safetensors second.safetensors            several, beside each other
  python -m sat.report FOLDER                                          a folder of them, or of a fine-tuned model
"""


def main(argv: list[str] | None = None) -> Path:
    """The command. Bad input ends it with a sentence and exit status 2.

    Returns:
        The page.
    """
    parser = argparse.ArgumentParser(
        "python -m sat.report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="a run's folder, a checkpoint, layout files")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page; by default report.html in the run's folder, or beside a file",
    )
    arguments = parser.parse_args(argv)
    try:
        if arguments.out is not None:
            _check_place(arguments.out)
        found = read(arguments.paths)
        out = arguments.out or _beside(arguments.paths)
        sections = sections_of(found)
    except (ValueError, OSError) as error:
        _fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        _fail("interrupted; no page was written", 130)
    trouble = ""
    try:
        write_page(out, found.title, sections, _footer(found))
    except OSError as error:
        trouble = f"{out} cannot be written ({error.strerror}); choose another place with --out"
        trouble = trouble if error.strerror else str(error)
    except KeyboardInterrupt:
        _fail("interrupted; no page was written", 130)
    # After the page, which those who only want the first lines get as well.
    print_sections(Console(), sections)
    if trouble:
        _fail(trouble)
    print(f"page: {readable(str(out))}")
    return out


def _check_place(out: Path) -> None:
    """That a page can lie there, before any work is done."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file in it, such as {out / 'report.html'}")
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {out} is to be an HTML page; give a name that ends in .html")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out} lies in a folder that does not exist; make {out.parent}, or give another place")


def _beside(paths: list[Path]) -> Path:
    """Where the page goes: into a folder, or beside a file, by its name."""
    first = paths[0]
    if first.is_dir():
        return first / "report.html"
    return first.with_name("report.html" if len(paths) > 1 else f"{first.stem}.report.html")


def _footer(found: Findings) -> str:
    try:
        version = metadata.version("sat-sparse-attention")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        version = "of a checkout"
    return f"Made from {found.source} by python -m sat.report, SAT {version}, PyTorch {torch.__version__}."


def _fail(sentence: str, status: int = 2) -> NoReturn:
    print(f"sat.report: {readable(sentence)}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
