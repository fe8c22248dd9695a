"""Time and memory: by operation, over length and density, of training steps, beside other implementations."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from experiments import length as by_length
from experiments import operations as by_operation
from experiments import scaling as over_length
from experiments.gpu_suite.case import number
from experiments.results_page import pictures
from experiments.results_page.page import Content, Shown, listed, markdown


def operations(content: Content) -> Shown:
    """Each operation beside the dense one."""
    tasks = content["tasks"]
    table = markdown(by_operation.HEADER, [row for task in tasks for row in by_operation.rows(task)], left=(0, 3, 4))
    leads, failed = [], []
    for task in tasks:
        for name, modes in task["operations"].items():
            for mode, figures in modes.items():
                for other, faster in figures["faster_than"].items():
                    what = f"{name}, {mode}, {task['name']}, against {other}"
                    if faster is None:
                        failed.append(f"{what}: {figures['times'][other]['error']}")
                    elif other != by_operation.PARTS:
                        leads.append((faster, what))
    slower = [f"{what} ({number(faster)} times as fast)" for faster, what in sorted(leads) if faster < 1]
    short = []
    if slower:
        short.append(f"Slower than dense: {listed(slower)}.")
    elif leads:
        faster, what = min(leads)
        short.append(f"At these densities nothing dense is faster; the smallest lead is {number(faster)}: {what}.")
    reduced = [f"{t['name']} {t['batch']} for {t['batch_of_the_task']}" for t in tasks if is_reduced(t)]
    if reduced:
        short.append(f"The batch is smaller than the task's: {', '.join(reduced)}.")
    if failed:
        short.append(f"Could not be measured: {listed(failed)}.")
    return Shown([table], short, {"How many times faster each operation is": pictures.operations(tasks)})


def is_reduced(task: dict[str, Any]) -> bool:
    return task["batch"] < task["batch_of_the_task"]


def scaling(content: Content) -> Shown:
    """Break-even and growth; all rows are folded away."""
    cases = sorted(content["cases"], key=lambda case: case["length"])
    fused = over_length.FUSED
    rows = []
    for case in cases:
        by_way = {row["way"]: row for row in case["rows"]}  # of ours the densest, which is not used
        same: dict[str, Any] = next((r for r in case["rows"] if r.get("kept_blocks_a_row") == over_length.PER_ROW), {})
        row = [case["length"], case["batch"]]
        row += [over_length.even_text(case, way) for way in (fused, over_length.EXPLICIT)]
        for figures in (same, by_way.get(fused, {}), by_way.get(over_length.EXPLICIT, {})):
            row += [number(figures.get("ms", {}).get("median")), number(figures.get("peak_mib"))]
        rows.append(row)
    same_name = f"SAT, {over_length.PER_ROW} blocks a row:"
    header = ["length", "batch", "as fast as fused dense at density", "as explicit dense"]
    header += [f"{same_name} ms", "MiB", "fused dense: ms", "MiB", "explicit dense: ms", "MiB"]
    every = markdown(over_length.HEADER, [cells for case in cases for cells in over_length.cells(case)], left=(2,))
    folded = f"<details><summary>All densities</summary>\n\n{every}\n\n</details>"
    shape = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in content["shape"].items())
    text = [markdown(header, rows, left=()), f"Forward and backward; {shape}.", folded]
    return Shown(text, scaling_short(cases), {"Time, memory and break-even over length": pictures.scaling(cases)})


def scaling_short(cases: list[dict[str, Any]]) -> list[str]:
    """Where fused dense attention is faster, or takes less memory."""
    fused, short = over_length.FUSED, []
    even = {case["length"]: over_length.even_text(case, fused) for case in cases}
    behind = [f"{value} for {length} tokens" for length, value in even.items() if value[0].isdigit()]
    if behind:
        short.append(f"Fused dense attention is faster from a density of about {', '.join(behind)} on.")
    for words in ("slower throughout", "not measured"):
        if lengths := [str(length) for length, value in even.items() if value == words]:
            short.append(f"Beside fused dense attention, SAT is {words} at a length of {', '.join(lengths)}.")
    shares = []
    for case in cases:
        dense = next((row.get("peak_mib") for row in case["rows"] if row["way"] == fused), None)
        ours = [row["peak_mib"] for row in case["rows"] if row["way"] == over_length.OURS and row["peak_mib"]]
        if dense and ours:
            shares.append((min(ours) / dense, max(ours) / dense, case["length"]))
    if shares and max(high for _, high, _ in shares) > 1:
        high, length = max((high, length) for _, high, length in shares)
        all_more = "at every density" if min(low for low, _, _ in shares) > 1 else "at some densities"
        short.append(
            f"SAT takes more memory than fused dense attention {all_more}: up to {number(high)} times as much, at a "
            f"length of {length}."
        )
    errors = [f"{r['way']} at {c['length']}: {r['error']}" for c in cases for r in c["rows"] if "error" in r]
    if errors:
        short.append(f"Could not be measured: {listed(errors)}.")
    return short


def length(content: Content) -> Shown:
    """Growth with the length, what layouts take, and training on 16,384 tokens."""
    cases = sorted(content["attention"], key=lambda case: case["length"])
    ours, dense = by_length.OURS, by_length.DENSE
    growth = by_length.exponents(cases)
    spans = list(growth[ours]["ms"])
    header = ["grows with the length to the power of", *(f"{what}, {span}" for what in ("ms", "MiB") for span in spans)]
    powers = [
        [way, *(number(figures[name][span]) for name in ("ms", "peak_mib") for span in spans)]
        for way, figures in growth.items()
    ]
    shape = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in content["shape"].items())
    text = [
        markdown(by_length.HEADER, by_length.rows(cases), left=()),
        f"Forward and backward of one sequence; {shape}; SAT keeps {content['per_row']} blocks a row.",
        markdown(header, powers),
    ]
    if layouts := content["layouts"]:
        kept = ("structure", "length", "block_size", "heads", "kept_blocks", "build_s", "index_s", "mib", "mask_mib")
        table = markdown([name.replace("_", " ") for name in kept], [[row[name] for name in kept] for row in layouts])
        slowest = max(row["build_s"] + row["index_s"] for row in layouts)
        text.append(f"Layouts: building and indexing one takes {number(slowest)} s of the processor at most.")
        text.append(f"<details><summary>All layouts</summary>\n\n{table}\n\n</details>")
    if content["training"]:
        names = ["training on 16,384 tokens", "blocks kept", "dense step ms", "step ms", "peak MiB"]
        text.append(markdown(names, [trained(row) for row in content["training"]]))
    short = []
    for way, name, what in ((ours, "ms", "Time"), (ours, "peak_mib", "Memory")):
        power = growth[way][name][spans[-1]]
        if power is not None and power > by_length.LINEAR:
            short.append(f"{what} of SAT grows faster than the length: to the power of {power} {spans[-1]}.")
    behind = [str(case["length"]) for case in cases if case[ours].get("ms", 0) > case[dense].get("ms", math.inf)]
    if behind:
        short.append(f"Fused dense attention is faster at a length of {', '.join(behind)}.")
    more = [case[ours]["peak_mib"] / case[dense]["peak_mib"] for case in cases if case[dense].get("peak_mib")]
    if more and max(more) > 1:
        short.append(f"SAT takes up to {number(max(more))} times the memory of fused dense attention.")
    return Shown(text, short, {"Time and memory over the length of a sequence": pictures.length(cases)})


def trained(row: dict[str, Any]) -> list[str]:
    """A training's row: with two phases, the time of a dense step, too."""
    own = dict(row["median_step_ms"])
    before = own.pop("dense", None) if len(own) > 1 else None
    time = next(iter(own.values()), None)
    return [row["name"], number(row["density"]), number(before), number(time), number(max_of(row["peak_memory_mib"]))]


def max_of(figures: dict[str, float]) -> float | None:
    return max(figures.values(), default=None)


def training(content: Content) -> Shown:
    """A step of the paper's CIFAR-10 model on a CPU."""
    names = ("dense", "dense, observed", "sparse")
    rows = [[name, number(content[name]["median_ms"]), quartiles(content[name])] for name in names]
    share, faster = content["statistics, share of the dense phase"], content["sparse step faster by"]
    text = [
        markdown(["step", "ms", "quartiles"], rows),
        f"Batch {content['batch_size']}, density {number(content['density'], 2)}: a sparse step is {faster} times as "
        f"fast as a dense one, which uses fused attention.",
    ]
    every = content["statistics, every so many steps"]
    short = [f"The statistics, taken every {every} steps, add {100 * share:.0f} % to the dense phase."]
    if faster < 1:
        short.append("A sparse step is slower than a dense one.")
    return Shown(text, short)


def estimates(content: Content) -> Shown:
    """What ``--estimate`` said beside what the training then took."""
    rows, errors = [], []
    for task, part in content["tasks"].items():
        for name, figures in part["figures"].items():
            share = figures["error"]
            rows.append(
                [task, name, number(figures["estimated"]), number(figures["measured"]), f"{100 * share:+.0f} %"]
            )
            errors.append((abs(share), f"{task}, {name}"))
    text = [markdown(["task", "", "estimated", "measured", "error"], rows, left=(0, 1))]
    worst, what = max(errors, default=(0.0, ""))
    return Shown(text, [f"The estimate that is furthest off is {100 * worst:.0f} % off: {what}."] if errors else [])


def quartiles(figures: dict[str, Any]) -> str:
    low, high = figures["quartiles_ms"]
    return f"{number(low)} to {number(high)}"


def baselines(content: Content) -> Shown:
    """Our Longformer and BigBird beside Hugging Face's."""
    faster = {pair["ours"]: pair["faster"] for pair in content["pairs"]}
    against_dense, layers = content["faster than fused dense"], content["layers"]
    rows = [
        [
            name,
            number(figures["median_ms"]),
            quartiles(figures),
            number(figures["extra_memory_mib"]),
            number(faster.get(name)),
            number(against_dense.get(name)),
        ]
        for name, figures in layers.items()
    ]
    header = ["layer", "ms", "quartiles", "MiB", "x Hugging Face's", "x fused dense"]
    short = []
    for what, ratios in (("Hugging Face's", faster), ("fused dense attention", against_dense)):
        slower = [f"{name} ({ratio} times as fast)" for name, ratio in ratios.items() if ratio < 1]
        if slower:
            short.append(f"Slower than {what}: {', '.join(slower)}.")
    least = layers["fused dense"]["extra_memory_mib"]
    more = [name for name in faster if layers[name]["extra_memory_mib"] > least]
    if more:
        short.append(f"More memory than fused dense attention ({number(least)} MiB) is taken by {', '.join(more)}.")
    return Shown([markdown(header, rows)], short)


def distributed(content: Content) -> Shown:
    """What several processes cost."""
    rows = [[f"step, {name}", number(f["median_ms"]), quartiles(f)] for name, f in content["step"].items()]
    parts = content["of an observed step, ours"]
    rows += [[f"of an observed step: {name}", number(f["median_ms"]), quartiles(f)] for name, f in parts.items()]
    dense, sparse = (content[f"ours, share of the {phase} phase"] for phase in ("dense", "sparse"))
    short = [
        f"Observing and deciding take {100 * dense:.1f} % of the dense phase and {100 * sparse:.2f} % of the sparse "
        f"one, and {number(content['at the switch, ours_ms'])} ms at the switch."
    ]
    table = markdown(["", "ms", "quartiles"], rows)
    return Shown([table, f"{content['processes']} processes, batch {content['batch_size']} each."], short)


def gpu(content: Content) -> Shown:
    """A section of the GPU suite, by its own table."""
    from experiments.gpu_suite.sections import SECTIONS

    cases = content["cases"]
    done = [case for case in cases if case["status"] == "ok"]
    table = SECTIONS[content["section"]].table(done) if done else "no case was done"
    counts: Counter[str] = Counter()
    slower: Counter[str] = Counter()
    for case in done:
        for name, faster in leads(case):
            counts[name] += 1
            slower[name] += faster < 1
    short = [f"Slower than {name} in {slower[name]} of {counts[name]} comparisons." for name in counts if slower[name]]
    for status, verb in (("failed", "Failed"), ("not run", "Not run")):
        if names := [case["case"] for case in cases if case["status"] == status]:
            short.append(f"{verb}: {listed(names)}.")
    return Shown([f"Section `{content['section']}`:\n\n```text\n{table}\n```"], short)


def leads(case: dict[str, Any]) -> list[tuple[str, float]]:
    """What a case of the suite was compared with, and how many times faster ours was."""
    found: list[tuple[str, float | None]] = [("dense", case.get("sparse_faster"))]
    found += case.get("sparse_faster_than", {}).items()
    for mode in ("forward", "forward+backward"):
        found += case.get(mode, {}).get("faster_than", {}).items()
    return [(name, faster) for name, faster in found if faster is not None and name != "composed"]
