"""Whole runs, and what was checked: long tests, fuzzed files, kernels as compiled."""

from __future__ import annotations

from typing import Any

from experiments.gpu_suite.case import number
from experiments.results_page.page import Content, Shown, markdown, points

RUN_HEADER = ["run", "attention", "steps", "blocks kept", "test accuracy", "step ms: dense", "sparse", "faster", "MiB"]


def run_row(name: str, summary: Content) -> list[str]:
    """A run's summary under :data:`RUN_HEADER`."""
    times, memory = summary["median_step_ms"], summary["peak_memory_mib"]
    kept = summary.get("density")
    if kept is None and summary.get("transitions"):
        kept = summary["transitions"][0]["density"]
    fixed = next((value for phase, value in times.items() if phase not in ("dense", "sparse")), None)
    return [
        name,
        summary.get("attention", "adaptive"),
        str(summary["steps"]),
        number(kept, 2),
        f"{summary['test_accuracy']['final']:.3f}",
        number(times.get("dense")),
        number(times.get("sparse", fixed)),
        number(summary.get("sparse_step_speedup")),
        str(max(memory.values())),
    ]


def run_short(name: str, summary: Content) -> list[str]:
    """What a run did not do well."""
    short = []
    validation = summary["validation_accuracy"]
    if "after" in validation and validation["after"] < validation["before"]:
        lost = validation["before"] - validation["after"]
        short.append(f"{name}: the switch costs {points(lost)} of validation accuracy until training makes up for it.")
    transitions = summary.get("transitions", [])
    if any(transition["forced"] for transition in transitions):
        short.append(f"{name}: the criterion was not met, the switch came by `max_dense_steps`.")
    if transitions:
        shares = [transition["captured_mass"] / transition["best_mass"] for transition in transitions]
        short.append(
            f"{name}: the blocks kept hold {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the attention "
            f"that the best blocks of the same number would."
        )
    if summary.get("sparse_step_speedup", 1) < 1:
        short.append(f"{name}: a sparse step is slower than a dense one.")
    return short


def run(content: Content) -> Shown:
    """The summary of one run."""
    name = content["name"]
    short = [*run_short(name, content), "A single run: no spread is known, and no other method stands beside it."]
    return Shown([markdown(RUN_HEADER, [run_row(name, content)], left=(0, 1))], short)


def notebooks(content: Content) -> Shown:
    """The runs of the notebooks, and those that do better than learned layouts."""
    runs = content["runs"]
    short = [sentence for name, summary in runs.items() for sentence in run_short(name, summary)]
    final = {name: summary["test_accuracy"]["final"] for name, summary in runs.items()}
    ours = {name: final[name] for name, summary in runs.items() if summary["attention"] == "adaptive"}
    if ours:
        best = max(ours.values())
        better = [f"{name} ({value:.3f})" for name, value in final.items() if value > best]
        if better:
            short.append(f"Better than learned layouts ({best:.3f}): {', '.join(better)}.")
    short.append("One seed each: no spread is known.")
    return Shown([markdown(RUN_HEADER, [run_row(name, s) for name, s in runs.items()], left=(0, 1))], short)


def byte_counts(content: Content) -> Shown:
    """Accuracy of a regression on the counts of bytes."""
    short = ["Where the tables above have no more than this on a task, our models have learned no order of its bytes."]
    rows = [
        [
            each["task"],
            str(each["bytes"]),
            *(f"{each[part + '_accuracy']:.3f} ({each[part + '_samples']:,})" for part in ("train", "test")),
        ]
        for each in content["tasks"]
    ]
    return Shown([markdown(["task", "bytes", "training accuracy (samples)", "test accuracy (samples)"], rows)], short)


def drawn(content: Content) -> Shown:
    """Samples a second, and the distractors that fit."""
    rows: list[list[str]] = []
    short = [content["note"]]
    for name, each in content["drawn"].items():
        most, fit = each.get("distractors_at_most"), each.get("distractors")
        rows.append([name, f"{each['per_second']:,}", "" if most is None else f"{fit} of {most}"])
        if most is not None and fit < most:
            short.append(f"{name}: of {most} distractors {fit} fit on average.")
    return Shown([markdown(["", "samples a second", "distractors"], rows)], short)


def long_tests(content: Content) -> Shown:
    """What ``make test-long`` came to."""
    outcomes = ("passed", "failed", "skipped")
    files: dict[str, dict[str, int]] = content["files"]
    rows = [[name, *(str(f.get(o, 0)) for o in outcomes), str(f["seconds"])] for name, f in files.items()]
    short = [f"`{name}` has {f['failed']} failures." for name, f in files.items() if f.get("failed")]
    skipped = sum(f.get("skipped", 0) for f in files.values())
    if skipped:
        short.append(f"{skipped} tests were skipped: what they need was not there.")
    if not content["all_passed"] and not short:
        short.append("The run did not pass.")
    return Shown([markdown(["file", *outcomes, "seconds"], rows)], short)


def fuzz(content: Content) -> Shown:
    """Damaged and hostile files that were read."""
    kinds = content["kinds"]
    rows: list[list[Any]] = [
        [name, f["inputs"], f["read"], f["refused"], number(f["largest_growth"] / 2**20)] for name, f in kinds.items()
    ]
    text = [markdown(["kind", "inputs", "read", "refused", "largest growth, MiB"], rows)]
    short = [f"{len(content['failures'])} inputs were neither read nor refused with a sentence."]
    later = content.get("later")
    if later:
        text.append(
            f"Later, `{later['command']}`, {later['note']}: {later['inputs']} inputs, of which {later['read']} "
            f"were read, {later['refused']} refused."
        )
        if later["failures"]:
            short.append(f"Of the later run, {later['failures']} failed: {later['failed']}.")
    if over := content.get("memory_over_steps"):
        rows = []
        for phase in ("sparse", "dense"):
            for step, mib, objects in zip(*over[phase].values(), strict=True):
                rows.append([phase, step, mib, objects])
        text.append(f"Memory over steps (`{over['command']}`):")
        text.append(markdown(["phase", "step", "resident MiB", "objects"], rows))
    if switch := content.get("memory_at_switch_mib"):
        names = [name for name in switch if name not in ("command", "case")]
        text.append(f"Memory at the switch (`{switch['command']}`; {switch['case']}):")
        text.append(markdown([name.replace("_", " ") for name in names], [[switch[name] for name in names]], left=()))
    return Shown(text, short)


def kernels(content: Content) -> Shown:
    """What the compiler made of the kernels: the most that each takes in any case."""
    found = [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
    rows = []
    for kernel in sorted({row["kernel"] for row in found}):
        own = [row for row in found if row["kernel"] == kernel]
        shared = max(row["shared_bytes"] for row in own) / 1024
        spilling = sum(row["spilled_bytes"] > 0 for row in own)
        units = ", ".join(sorted({name for row in own for name in row["matrix"]}))
        rows.append(
            [kernel.replace("_", " "), len(own), max(r["registers"] for r in own), f"{shared:.0f}", spilling, units]
        )
    arch = content["arch"]
    header = ["kernel", "cases", "most registers", "most shared KiB", "spill", "matrix units"]
    folded = f"<details><summary>All kernels</summary>\n\n{markdown(header, rows, left=(0, 5))}\n\n</details>"
    most = max(row["registers"] for row in found)
    about = f"Compute capability {arch // 10}.{arch % 10}: {len(found)} kernels, at most {most} registers a thread."
    bad = [row for row in found if row["broken"]]
    cases = ["kernel", "block_size", "head_dim", "precision", "options", "broken"]
    if bad:
        lines = [[*(str(row[name]) for name in cases[:-1]), "; ".join(row["broken"])] for row in bad]
        folded += f"\n\n{markdown(['kernel', 'block size', 'head dimension', *cases[3:5], 'breaks a rule'], lines)}"
    short = [f"{len(bad)} of {len(found)} kernels break a rule, those of the table above."] if bad else []
    short.append("Compiled, not run: this says nothing of their speed.")
    return Shown([about, folded], short)
