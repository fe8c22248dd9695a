# The page of results: made-up files whose figures are worked out by hand, damaged and missing files, and ours.
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from experiments import record
from experiments.results_page import accuracy, checks, speed
from experiments.results_page.__main__ import SECTIONS, main
from experiments.results_page.page import mean, plain, provenance

ORIGIN = {
    "command": "python -m it",
    "device": "a chip",
    "threads": 2,
    "torch": "9.9",
    "commit": "abc",
    "date": "2030-01-02",
}


def run(task, method, seed, value, attention="adaptive", **more):
    summary = {"attention": attention, "test_accuracy": {"final": value, "best": 1.0}, **more.pop("summary", {})}
    return {"task": task, "method": method, "seed": seed, "summary": summary, "options": {}, **more}


def write(folder: Path, name: str, content) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps({**ORIGIN, **content}))


RUNS = [
    *(run("digits", "ours", seed, value) for seed, value in enumerate((0.50, 0.52, 0.54))),
    *(run("digits", "dense", seed, value, "dense") for seed, value in enumerate((0.60, 0.60, 0.60))),
    *(run("yelp", "ours", seed, value) for seed, value in enumerate((0.70, 0.74))),
    *(run("yelp", "dense", seed, value, "dense") for seed, value in enumerate((0.71, 0.75))),
    run("yelp", "window", 0, 0.1, "structure"),
]


def make(tmp_path: Path) -> tuple[int, str]:
    """Exit status and page of the files in ``tmp_path / "in"``."""
    code = main(["--results", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    return code, (tmp_path / "out" / "RESULTS.md").read_text()


def test_means_have_their_spread_and_number():
    assert mean([0.50, 0.52, 0.54]) == "0.520 ± 0.020 (3)"
    assert mean([0.5]) == "0.500 (1)"
    assert mean([]) == ""


def test_accuracy_by_method_and_task_and_who_is_better(tmp_path):
    write(tmp_path / "in", "accuracy_small.json", {"runs": RUNS})
    code, page = make(tmp_path)
    assert code == 0
    assert "| test accuracy | digits | yelp |" in page
    assert "| ours | 0.520 ± 0.020 (3) | 0.720 ± 0.028 (2) |" in page
    assert "| window |  | 0.100 (1) |" in page
    assert "digits: better than the best of ours (ours, 0.520) is dense by 8.0 points." in page
    assert "yelp: better than the best of ours (ours, 0.720) is dense by 1.0 points (less than the spread" in page
    assert "window by" not in page
    assert "Some means are of 1 run only. Not run: window on digits." in page
    origin = "`python -m it`, a chip, 2 threads, torch 9.9, commit abc, 2030-01-02, seeds 0, 1, 2.*"
    assert f"*From [accuracy_small.json](results/accuracy_small.json): {origin}" in page
    assert (tmp_path / "out" / "results" / "plots" / "accuracy_small.png").stat().st_size > 10_000


def test_the_number_of_test_samples_bounds_what_an_accuracy_says(tmp_path):
    runs = [run("digits", "ours", seed, 0.9, options={"samples": {"test": 100}}) for seed in range(3)]
    assert "digits 3.0 points (100 samples)" in accuracy.accuracy({"runs": runs}).text[1]
    write(tmp_path / "in", "accuracy_small.json", {"runs": RUNS})
    assert "standard error" not in make(tmp_path)[1]


def test_what_needs_no_training_stands_beside_the_accuracies(tmp_path):
    runs = [{**run("yelp", "ours", seed, 0.75), "most_frequent_class": 0.744} for seed in range(3)]
    assert "Always answering the most frequent class: yelp 0.744." in accuracy.accuracy({"runs": runs}).text
    write(tmp_path / "in", "accuracy_small.json", {"runs": RUNS})
    assert "most frequent" not in make(tmp_path)[1]


def test_where_ours_is_best_it_says_only_that():
    better = [run("digits", "dense", 0, 0.5, "dense"), run("digits", "ours", 0, 0.6)]
    assert accuracy.Grid(better, "method", lambda r: r["summary"]["test_accuracy"]["final"]).short() == [
        "No reference has a higher mean than the best of ours on any task.",
        "Some means are of 1 run only.",
    ]


def test_runs_with_other_settings_are_not_counted():
    def options(steps, mask):
        return {"trainer.max_steps": steps, "sparsity.mask": mask, "model.attention": mask}

    old = run("digits", "ours", 0, 0.1, options=options(100, "gram"))
    other = run("digits", "ours", 1, 0.2, options=options(200, "gram"))
    dense = run("digits", "dense", 0, 0.3, "dense", options=options(200, "none"))
    new = run("digits", "ours", 2, 0.4, options=options(200, "fisher"))
    shown = accuracy.accuracy({"runs": [old, other, dense, new]})
    assert "Left out: 2 runs" in "".join(shown.text)


def test_costs_are_medians_and_slow_steps_are_named():
    dense = {"median_step_ms": {"dense": 10.0}, "peak_memory_mib": {"process": 100}, "training_seconds": 5.0}
    ours = [{**dense, "median_step_ms": {"dense": 11.0, "sparse": ms}} for ms in (20.0, 30.0)]
    runs = [run("digits", "dense", 0, 0.5, "dense", summary=dense)]
    runs += [run("digits", "ours", seed, 0.5, summary=summary, density=0.1) for seed, summary in enumerate(ours)]
    rows, slower = accuracy.costs(runs, ["ours"])
    assert rows[0] == ["digits", "dense", "", "", "10.0", "100", "5.00"]
    assert rows[1] == ["digits", "ours", "0.100", "11.0", "25.0", "100", "5.00"]
    assert slower == ["digits, ours (25.0 ms for 10.0 ms)"]


def test_masks_by_rule_and_the_blocks_they_kept(tmp_path):
    common = {"task": "digits", "settings": {"steps": 1000, "density": 0.1}}
    masses = {"captured_mass": 0.1, "best_mass": 0.4}
    runs = [{**common, "rule": "dense", "seed": 0, "accuracy": 0.1, "settings": {"steps": 9, "density": 0.1}}]
    runs += [{**common, "rule": "gram", "seed": s, "accuracy": 0.4, **masses} for s in (0, 1)]
    runs += [{**common, "rule": "dense", "seed": 0, "accuracy": 0.5}]
    write(tmp_path / "in", "masks.json", {"runs": runs})
    _, page = make(tmp_path)
    assert "| gram | 0.400 ± 0.000 (2) |" in page
    assert "of the most possible: gram 25%." in page
    assert "Settings: digits steps 1000, density 0.1." in page
    assert "better than the best of ours (gram, 0.400) is dense by 10.0 points" in page


def timed(ours, **others):
    ms = {"sat": ours, **others}
    times = {name: {"ms": {"median": x}} if x else {"error": "OutOfMemoryError: no"} for name, x in ms.items()}
    return {"times": times, "faster_than": {name: x and x / ours for name, x in others.items()}}


def test_operations_that_are_slower_are_named():
    measured = {
        "SDDMM": {"forward": timed(2.0, dense=8.0), "backward": timed(4.0, dense=3.0)},
        "attention": {
            "forward": timed(2.0, **{"three operations": 1.0, "explicit dense": None}),
            "backward": timed(2.0, **{"three operations": 1.0, "explicit dense": 9.0}),
        },
    }
    task = {"name": "T", "batch": 2, "batch_of_the_task": 4, "density": 0.1, "operations": measured}
    shown = speed.operations({"tasks": [task]})
    assert "| T | 2 | 0.10 | SDDMM | dense | 2.00 | 8.00 | 4.00 | 4.00 | 3.00 | 0.750 |" in shown.text[0]
    assert shown.short == [
        "Slower than dense: SDDMM, backward, T, against dense (0.750 times as fast).",
        "The batch is smaller than the task's: T 2 for 4.",
        "Could not be measured: attention, forward, T, against explicit dense: OutOfMemoryError: no.",
    ]


def scaled(length, even, faster, mib):
    fused = {"way": "fused dense", "ms": {"median": 6.0}, "peak_mib": 10.0}
    ours = {"way": "sat", "asked": 0.5, "density": 0.5, "kept_blocks_a_row": 4.0, "ms": {"median": 6.0 / faster}}
    ours |= {"peak_mib": mib, "faster_than": {"fused dense": faster}}
    return {"length": length, "batch": 1, "rows": [fused, ours], "break_even": {"fused dense": even}}


def test_scaling_names_the_densities_at_which_dense_is_faster():
    content = {"cases": [scaled(512, 0.25, 0.5, 25.0), scaled(1024, None, 2.0, 9.0)], "shape": {"tokens": 512}}
    shown = speed.scaling(content)
    assert "| 512 | 1 | 0.25 | not measured | 12.0 | 25.0 | 6.00 | 10.0 | - | - |" in shown.text[0]
    assert "| 1024 | 1 | faster throughout |" in shown.text[0]
    assert shown.short == [
        "Fused dense attention is faster from a density of about 0.25 for 512 tokens on.",
        "SAT takes more memory than fused dense attention at some densities: up to 2.50 times as much, at a length of "
        "512.",
    ]
    content["cases"][0]["break_even"]["fused dense"] = None
    assert "SAT is slower throughout at a length of 512." in "".join(speed.scaling(content).short)


def test_the_arena_stands_beside_what_was_published():
    options = {"trainer.accelerator": "cpu"}
    runs = [run("listops", "sat", seed, value, options=options) for seed, value in enumerate((0.5, 0.6))]
    runs += [run("listops", "dense", 0, 0.7, "dense", options=options)]
    shown = accuracy.arena({"runs": runs})
    assert "| sat | 0.550 ± 0.071 (2) |" in shown.text[1]
    assert "| published: Longformer | 0.356 |" in shown.text[1]
    assert "cannot be compared" in shown.text[2]


def longer(length, ours, dense):
    ways = {"sat": ours, "fused dense": dense}
    return {"length": length, **{way: {"ms": ms, "peak_mib": mib} for way, (ms, mib) in ways.items()}}


def test_length_names_the_powers_and_where_dense_is_ahead():
    cases = [longer(4096, (10.0, 4.0), (5.0, 2.0)), longer(8192, (20.0, 10.0), (20.0, 4.0))]
    cases.append(longer(16384, (40.0, 25.0), (80.0, 8.0)))
    layout = {"structure": "window", "length": 65536, "block_size": 64, "heads": 8, "kept_blocks": 9}
    layout |= {"build_s": 0.25, "index_s": 0.5, "mib": 1.5, "mask_mib": 8}
    steps = {"median_step_ms": {"dense": 3000.0, "sparse": 1000.0}, "peak_memory_mib": {"process": 4000}}
    content = {"attention": cases, "shape": {"heads": 2}, "per_row": 8, "layouts": [layout]}
    shown = speed.length({**content, "training": [{"name": "SAT", "density": 0.05, **steps}]})
    assert "| 4096 | 10.0 | 4.00 | 5.00 | 2.00 |" in shown.text[0]
    # 16 times the time and 4 times the memory for 4 times the length; ours 4 and 6.25 times.
    assert "| fused dense | 2.00 | 2.00 | 1.00 | 1.00 |" in shown.text[2]
    assert "| sat | 1.00 | 1.00 | 1.32 | 1.32 |" in shown.text[2]
    assert "takes 0.750 s of the processor at most" in shown.text[3]
    assert "| SAT | 0.0500 | 3000 | 1000 | 4000 |" in shown.text[5]
    assert shown.short == [
        "Memory of SAT grows faster than the length: to the power of 1.32 from 4096.",
        "Fused dense attention is faster at a length of 4096.",
        "SAT takes up to 3.12 times the memory of fused dense attention.",
    ]


def test_gpu_suite_is_shown_by_its_own_table():
    times = {name: {"ms": {"median": 1.0}, "wall_ms": {"median": 2.0}, "peak_mib": 3.0} for name in ("sparse", "dense")}
    cases = [{"case": f"L {i}", "status": "ok", "times": times, "sparse_faster": x} for i, x in enumerate((0.5, 2.0))]
    cases.append({"case": "L 9", "status": "not run"})
    shown = speed.gpu({"section": "long", "cases": cases})
    assert "a step of 2 layers" in shown.text[0]
    assert shown.short == ["Slower than dense in 1 of 2 comparisons.", "Not run: L 9."]


def test_runs_say_what_the_switch_cost():
    transition = {"forced": True, "density": 0.1, "captured_mass": 0.3, "best_mass": 0.4}
    summary = {
        "name": "x",
        "steps": 10,
        "validation_accuracy": {"before": 0.8, "after": 0.6},
        "test_accuracy": {"final": 0.9},
        "median_step_ms": {"dense": 2.0, "sparse": 4.0},
        "peak_memory_mib": {"process": 700},
        "sparse_step_speedup": 0.5,
        "transitions": [transition],
    }
    shown = checks.run(summary)
    assert "| x | adaptive | 10 | 0.10 | 0.900 | 2.00 | 4.00 | 0.500 | 700 |" in shown.text[0]
    text = " ".join(shown.short)
    assert "costs 20.0 points" in text
    assert "the switch came by `max_dense_steps`" in text
    assert "hold 75 to 75 % of the attention" in text
    assert "a sparse step is slower" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"runs": [', "`masks.json` cannot be read (Expecting value: line 1 column 11 (char 10)); make it anew."),
        ("[" * 100_000, "`masks.json` cannot be read (maximum recursion depth exceeded"),
        ("\udcff", "`masks.json` cannot be read ('utf-8' codec can't decode"),
        ("[1]", "`masks.json` holds no results but a list; make it anew."),
        ('{"format": 2, "runs": []}', "`masks.json` has the format 2 of another version of SAT, this page reads 1;"),
        ('{"command": "x"}', "`masks.json` is not of the form that this page knows (KeyError: 'runs'); make it anew"),
        ('{"command": "x", "runs": []}', "(ValueError: no run is in it)"),
        ('{"command": "x", "runs": [7]}', "`masks.json` is not of the form that this page knows (TypeError:"),
        ('{"runs": [{"task": "a", "rule": "b", "accuracy": 1, "settings": {}}]}', "(KeyError: 'command')"),
    ],
)
def test_damaged_and_unknown_files_are_named_and_the_others_shown(tmp_path, capsys, content, said):
    write(tmp_path / "in", "accuracy_small.json", {"runs": RUNS})
    (tmp_path / "in" / "masks.json").write_bytes(content.encode(errors="surrogateescape"))
    code, page = make(tmp_path)
    assert code == 2
    assert said in page
    assert said in capsys.readouterr().err
    assert "| ours | 0.520 ± 0.020 (3) |" in page


def test_what_is_missing_has_the_command_that_makes_it(tmp_path):
    write(tmp_path / "in", "test_long.json", {"files": {}, "all_passed": True})
    write(tmp_path / "in", "mine.json", {})
    code, page = make(tmp_path)
    assert code == 2
    assert "`mine.json` is of no kind that this page knows." in page
    commands = [command for section in SECTIONS for command in section.files.values()]
    assert [c for c in commands if f"Not measured yet: `{c}` makes" not in page] == ["make test-long"]


@pytest.mark.parametrize("there", [True, False])
def test_without_any_results_it_says_so(tmp_path, capsys, there):
    if there:
        (tmp_path / "in").mkdir()
    assert main(["--results", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 1
    assert "run an experiment first, such as python -m experiments.accuracy" in capsys.readouterr().err
    assert not (tmp_path / "out" / "RESULTS.md").exists()


def test_what_stands_in_files_stays_text():
    assert plain("a | b\n<b>") == "a \\| b &lt;b>"
    content = {"command": "a `b` | c", "device": "d|e", "commit": "", "note": "said <so>."}
    assert provenance("x.json", content) == (
        "*From [x.json](results/x.json): `a b | c`, d\\|e, commit not recorded. Said &lt;so>.*"
    )


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    assert "Makes RESULTS.md" in capsys.readouterr().out


def test_the_committed_page_is_what_the_command_makes(tmp_path):
    committed = record.RESULTS.parent
    main(["--out", str(tmp_path)])
    page = (tmp_path / "RESULTS.md").read_bytes()
    again = "run python -m experiments.results_page and commit what it writes"
    assert page == (committed / "RESULTS.md").read_bytes(), again
    pictures = {path.name: path for path in (tmp_path / "results" / "plots").glob("*.png")}
    shown = re.findall(r"\]\((results/[^)]+)\)", page.decode())
    assert {Path(link).name for link in shown if link.endswith(".png")} == set(pictures)
    for link in shown:
        assert (committed / link).is_file(), again
    for name, path in pictures.items():
        ours, theirs = imread(path), imread(committed / "results" / "plots" / name)
        assert ours.shape == theirs.shape, again
        assert np.abs(ours - theirs).max() < 0.1, again


def test_the_same_files_make_the_same_bytes(tmp_path):
    write(tmp_path / "in", "accuracy_small.json", {"runs": RUNS})
    write(tmp_path / "in", "scaling_cpu.json", {"cases": [scaled(512, 0.25, 0.5, 25.0)], "shape": {"tokens": 512}})

    def made():
        make(tmp_path)
        return {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}

    first = made()
    assert set(first) == {"RESULTS.md", "accuracy_small.png", "scaling_cpu.png"}
    assert made() == first


def test_what_somebody_has_noted_in_a_file_stays(tmp_path):
    record.save("one", "python -m it", {"runs": [1]}, tmp_path)
    content = json.loads((tmp_path / "one.json").read_text())
    assert "note" not in content
    (tmp_path / "one.json").write_text(json.dumps({"note": "from a friend", **content}))
    record.save("one", "python -m it", {"runs": [1, 2]}, tmp_path)
    content = json.loads((tmp_path / "one.json").read_text())
    assert (content["note"], content["runs"]) == ("from a friend", [1, 2])


def test_runs_name_the_threads_and_commits_that_they_had():
    """Not those of the process that began them."""
    runs = [
        {"seed": 0, "commit": "a1", "summary": {"device": "a chip, 1 threads"}},
        {"seed": 1, "commit": "b2", "summary": {"device": "a chip, 1 thread"}},
    ]
    text = provenance("x.json", {"command": "it", "device": "a chip", "threads": 2, "commit": "b2", "runs": runs})
    assert "`it`, a chip, 1 thread, commits a1, b2, seeds 0, 1" in text


def test_runs_without_an_accuracy_hide_no_others():
    def run(method, seed, final):
        summary = {"test_accuracy": {"final": final}, "attention": "adaptive" if method == "sat" else method}
        summary |= {"training_seconds": 1.0, "median_step_ms": {"dense": 1.0}, "peak_memory_mib": {"process": 1}}
        options = {"trainer.max_steps": 10}
        return {"task": "t", "method": method, "seed": seed, "options": options, "density": 1.0, "summary": summary}

    runs = [
        run("sat", 0, 0.5),
        run("sat", 1, 0.7),
        run("dense", 0, None),
        run("dense", 1, math.nan),
        run("dense", 2, 0.1),
    ]
    shown = accuracy.accuracy({"command": "it", "runs": runs})
    assert "| sat | 0.600 ± 0.141 (2) |" in shown.text[0]
    assert "| dense | 0.100 (1) |" in shown.text[0]
    assert any(text.startswith("Left out: 2 runs") for text in shown.text)


def test_fine_tuning_compares_seeds_that_both_have():
    def run(method, seed, final, memory):
        summary = {"test_accuracy": {"final": final}, "median_step_ms": {"dense": 1.0}}
        return {
            "method": method,
            "seed": seed,
            "jobs": 2,
            "summary": summary | {"peak_memory_mib": {"process": memory}},
        }

    runs = [run("dense", 0, 0.6, 100), run("adaptive", 0, 0.5, 110), run("adaptive", 1, 0.9, 110)]
    shown = accuracy.fine_tuning({"runs": runs})
    assert "accuracy: SAT is 10.0 points below dense attention." in shown.short
    assert "Seeds that both were trained with: 0 only." in shown.short
    assert any("takes 10% more memory" in sentence for sentence in shown.short)
    assert "on shared cores" in shown.text[1]
