"""What the page is made of: sections, what is shown of a file, and where its figures come from."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments import record
from sat.files import written_whole
from sat.plots.style import written

Content = dict[str, Any]
PLOTS = Path("results") / "plots"  # from the page's folder
FEWEST_SEEDS = 3


@dataclass
class Shown:
    """What a file comes to."""

    text: list[str]  # paragraphs and tables
    short: list[str]  # sentences: where we fall short
    pictures: dict[str, Figure] = field(default_factory=dict)  # by what they show; in the page after the first table


@dataclass(frozen=True)
class Section:
    """Results of one kind. ``files`` has the command that makes them for each pattern of names."""

    title: str
    about: str
    files: dict[str, str]
    show: Callable[[Content], Shown]


class Unreadable(ValueError):
    """A sentence that names a file and says what is wrong with it."""


def read(path: Path) -> Content:
    """The content of a file of results.

    Raises:
        Unreadable: it is damaged, or another version wrote it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Unreadable(f"`{path.name}` cannot be read ({plain(reason)}); make it anew.") from error
    if not isinstance(content, dict):
        raise Unreadable(f"`{path.name}` holds no results but a {type(content).__name__}; make it anew.")
    version = content.get("format", record.FORMAT)  # the first files had none
    if version != record.FORMAT:
        raise Unreadable(
            f"`{path.name}` has the format {plain(version)} of another version of SAT, this page reads "
            f"{record.FORMAT}; make it anew, or use the version that wrote it."
        )
    return content


def compose(sections: Sequence[Section], results: Path, out: Path) -> tuple[int, list[str]]:
    """Write ``RESULTS.md`` and its pictures.

    Args:
        sections: in their order.
        results: folder of the files.
        out: folder of the page; pictures go to ``results/plots`` in it.

    Returns:
        How many files are shown, and a sentence for each that cannot be.

    Raises:
        FileNotFoundError: there is no file of results.
    """
    left = {path.name: path for path in sorted(results.glob("*.json"))}
    if not left:
        raise FileNotFoundError(
            f"there are no results in {results}; run an experiment first, such as {first(sections)}"
        )
    page, problems, shown = [HEAD, contents(sections)], [], 0
    for section in sections:
        page += [f"## {section.title}", section.about]
        found = {pattern: sorted(path.name for path in results.glob(pattern)) for pattern in section.files}
        for name in [name for names in found.values() for name in names]:
            path = left.pop(name, None)
            if path is None:
                continue  # two patterns match it
            try:
                page += file_shown(section, path, out)
                shown += 1
            except Unreadable as error:
                problems.append(str(error))
                page.append(f"**{error}**")
        page += [
            f"Not measured yet: `{command}` makes `{pattern.replace('[!c]', '')}`."
            for pattern, command in section.files.items()
            if not found[pattern]
        ]
    if left:
        problems += [f"`{name}` is of no kind that this page knows." for name in left]
        page += ["## Other files", *(f"`{name}` is of no kind that this page knows." for name in left)]
    with written_whole(out / "RESULTS.md") as temporary:
        temporary.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return shown, problems


HEAD = """# What was measured

Made by `python -m experiments.results_page` from the files in [results](results), each of which names the command, the
device, the versions and the commit that it comes from. Nothing here is written by hand but the last sentence of some
sources, least of all where we fall short: these sentences compare figures of the tables above them. Times are medians;
ratios are medians of ratios within a round of one run, those of whole runs are ratios of medians; ± is the standard
deviation over the seeds, whose number stands in brackets."""


def contents(sections: Sequence[Section]) -> str:
    """Links to the sections, by the anchors that GitHub gives headings."""
    lines = []
    for section in sections:
        kept = [c for c in section.title.lower() if c.isalnum() or c in " -_"]
        lines.append(f"- [{section.title}](#{''.join(kept).replace(' ', '-')})")
    return "\n".join(lines)


def first(sections: Sequence[Section]) -> str:
    """The command of the first section."""
    return next(iter(sections[0].files.values()))


def file_shown(section: Section, path: Path, out: Path) -> list[str]:
    """The paragraphs of a file; its pictures are written.

    Raises:
        Unreadable: the file is damaged, or not of the form that its section knows.
    """
    content = read(path)
    try:
        shown = section.show(content)
        origin = provenance(path.name, content)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Unreadable(
            f"`{path.name}` is not of the form that this page knows ({type(error).__name__}: {plain(error)}); make it "
            f"anew, or use the version that wrote it."
        ) from error
    pictures = []
    for index, (title, figure) in enumerate(shown.pictures.items()):
        picture = PLOTS / f"{path.stem}{f'_{index}' if index else ''}.png"
        (out / picture).parent.mkdir(parents=True, exist_ok=True)
        written(figure, out / picture)
        pictures.append(f"![{title}]({picture.as_posix()})")
    short = " ".join(shown.short) or "No comparison in these figures goes against us."
    return [*shown.text[:1], *pictures, *shown.text[1:], f"**Where we fall short.** {short}", origin]


def provenance(name: str, content: Content) -> str:
    """Where the figures of a file come from."""
    parts = [f"`{str(content['command']).replace('`', '')}`"]
    runs = content["runs"] if isinstance(content.get("runs"), list) else []
    # Runs are processes of their own, with threads of their own.
    devices = [str(run.get("summary", {}).get("device") or "").replace(" 1 threads", " 1 thread") for run in runs]
    if own := unique(device or None for device in devices):
        parts.append(plain(" and ".join(own)))
    else:
        parts.append(plain(content.get("device", "device not recorded")))
        if "threads" in content:
            parts.append(f"{content['threads']} thread{'s' if content['threads'] != 1 else ''}")
    named = {key: content[key] for key in ("torch", "python", "cuda", "triton", "transformers") if key in content}
    versions = {**named, **content.get("versions", {})}
    parts += [f"{plain(key)} {plain(version)}" for key, version in versions.items()]
    commits = unique(run.get("commit") for run in runs) or [content.get("commit") or "not recorded"]
    parts.append(f"commit{'s' if len(commits) > 1 else ''} {plain(', '.join(map(str, commits)))}")
    if "date" in content:
        parts.append(plain(content["date"]))
    if seeds := seeds_of(content):
        parts.append(f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}")
    text = f"*From [{name}](results/{name}): {', '.join(parts)}."
    note = plain(content.get("note", "")).rstrip(".")
    return f"{text} {note[0].upper()}{note[1:]}.*" if note else f"{text}*"


def unique(values: Iterable[Any]) -> list[Any]:
    """Each of them once, without None, in their order."""
    return list(dict.fromkeys(value for value in values if value is not None))


def seeds_of(content: Content) -> list[int]:
    """The seeds of a file, or of its runs."""
    if "seed" in content:
        return [content["seed"]]
    runs = content.get("runs", [])
    return sorted({run["seed"] for run in runs if "seed" in run}) if isinstance(runs, list) else []


def plain(text: object) -> str:
    """A text as one line of Markdown that means nothing but itself in a table."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]], left: Sequence[int] = (0,)) -> str:
    """A table; columns other than ``left`` are aligned to the right."""
    rule = ["---" if index in left else "---:" for index in range(len(header))]
    lines = [header, rule, *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean(values: Sequence[float]) -> str:
    """Mean ± standard deviation (how many): of one, no deviation is known."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread} ({len(values)})"


def points(difference: float) -> str:
    """A difference of two shares, in points of a hundred."""
    return f"{100 * difference:.1f} points"


def listed(items: Sequence[str], most: int = 6) -> str:
    """The first of them, and how many there are beside."""
    more = len(items) - most
    return "; ".join(items[:most]) + (f"; and {more} more in the table" if more > 0 else "")
