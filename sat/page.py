"""Floor 5: sections of text, tables and pictures, as one HTML page that needs nothing else, and on a terminal."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape as unmarked
from rich.table import Table

from sat.files import readable, written_whole
from sat.plots import FAINT, INK, KEPT, PRUNED, RULE

# Pixels an inch of an embedded picture; twice as many as it is shown with, for sharp screens.
DPI = 160

STYLE = f"""
body {{ font: 16px/1.5 system-ui, "Segoe UI", "Liberation Sans", "DejaVu Sans", sans-serif; color: {INK};
       background: #fff; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 68rem; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: .8rem; border-top: 1px solid {RULE}; }}
p {{ max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }}
nav a {{ color: {KEPT}; margin-right: 1rem; }}
.outcome {{ font-size: 1.1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .25rem .8rem; border-bottom: 1px solid {PRUNED}; vertical-align: top; }}
th {{ font-weight: 600; border-bottom-color: {RULE}; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
td {{ white-space: nowrap; }}
.facts td {{ text-align: left; white-space: normal; }}
.note {{ background: #fff6e0; border-left: 4px solid #E69F00; padding: .4rem .8rem; }}
figure {{ margin: 1.2rem 0; }}
figure img {{ display: block; max-width: 100%; height: auto; }}
figcaption {{ color: {FAINT}; font-size: .9rem; max-width: 46rem; margin-top: .3rem; }}
footer {{ color: {FAINT}; font-size: .85rem; margin-top: 3rem; }}
""".strip()


@dataclass
class Picture:
    """A figure with words for those who see it (caption) and for those who do not (what it shows)."""

    figure: Figure
    caption: str
    shows: str


@dataclass
class Section:
    """Part of a report.

    Attributes:
        heading: empty for the part that stands before all others.
        outcome: what came out, in a sentence or two, on a terminal too.
        paragraphs: explanations, for the page only.
        notes: sentences that must not be overlooked.
        header: of the table; empty for a table of names and values.
        rows: of the table.
        pictures: for the page only.
    """

    heading: str
    outcome: str = ""
    paragraphs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    header: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def _readable(section: Section) -> Section:
    return replace(
        section,
        heading=readable(section.heading),
        outcome=readable(section.outcome),
        paragraphs=[readable(text) for text in section.paragraphs],
        notes=[readable(text) for text in section.notes],
        header=tuple(readable(text) for text in section.header),
        rows=[tuple(readable(cell) for cell in row) for row in section.rows],
        pictures=[Picture(p.figure, readable(p.caption), readable(p.shows)) for p in section.pictures],
    )


def write_page(path: Path, title: str, sections: Sequence[Section], footer: str) -> None:
    """Write the page: no script, nothing that is loaded from elsewhere, readable without styles.

    Raises:
        OSError: it cannot be written; an existing file stays as it was.
    """
    title, footer, sections = readable(title), readable(footer), [_readable(section) for section in sections]
    links = "".join(f'<a href="#{_id(s)}">{escape(s.heading)}</a> ' for s in sections if s.heading)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Browsers then refuse to run or to load anything, should there ever be something in here.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title>",
        f"<style>\n{STYLE}\n</style>",
        "</head>",
        "<body>",
        f"<h1>{escape(title)}</h1>",
    ]
    for index, section in enumerate(sections):
        parts += _html(section)
        if index == 0 and links:
            parts.append(f"<nav>{links}</nav>")
    parts += [f"<footer>{escape(footer)}</footer>", "</body>", "</html>", ""]
    with written_whole(path) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")


def print_sections(console: Console, sections: Sequence[Section]) -> None:
    """Notes and tables on a terminal."""
    for section in map(_readable, sections):
        for note in section.notes:
            console.print(f"[yellow]{unmarked(note)}[/yellow]", highlight=False, soft_wrap=True)
        if section.outcome:
            console.print(unmarked(section.outcome), highlight=False)
        if not section.rows:
            continue
        facts = not section.header
        table = Table(title=unmarked(section.heading) or None, title_justify="left", show_header=not facts)
        for index, name in enumerate(section.header or ("", "")):
            table.add_column(unmarked(name), justify="left" if facts or index == 0 else "right", overflow="fold")
        for row in section.rows:
            table.add_row(*map(unmarked, row))
        console.print(table)


def _html(section: Section) -> list[str]:
    parts = [f'<section id="{_id(section)}">'] if section.heading else ["<section>"]
    if section.heading:
        parts.append(f"<h2>{escape(section.heading)}</h2>")
    parts += [f'<p class="note">{escape(note)}</p>' for note in section.notes]
    if section.outcome:
        parts.append(f'<p class="outcome">{escape(section.outcome)}</p>')
    parts += [f"<p>{escape(text)}</p>" for text in section.paragraphs]
    if section.rows:
        parts.append('<div class="wide">' + ("<table>" if section.header else '<table class="facts">'))
        if section.header:
            cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in section.header)
            parts.append(f"<thead><tr>{cells}</tr></thead>")
        parts.append("<tbody>")
        parts += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in section.rows]
        parts.append("</tbody></table></div>")
    for picture in section.pictures:
        width = round(picture.figure.get_figwidth() * 96)
        try:
            data = _data(picture.figure)
        except (ValueError, TypeError, ArithmeticError) as error:  # of numbers that no axis can show
            why = escape(readable(" ".join(str(error).split()) or type(error).__name__))
            parts.append(f'<p class="note">Not drawn ({why}): {escape(picture.caption)}</p>')
            continue
        parts.append(
            f'<figure><img src="{data}" width="{width}" alt="{escape(picture.shows)}">'
            f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        )
    return [*parts, "</section>"]


def _data(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _id(section: Section) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in section.heading.lower())
