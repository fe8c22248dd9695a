"""Fine-tuning, dense and sparse: what is kept of runs that fail, and what is refused."""

import json

import pytest

from experiments import fine_tuning, record

OPTIONS = ["--", "--model.pretrained", "M", "--sparsity.density", "0.1"]


@pytest.fixture
def trained(monkeypatch):
    """The runs that were begun; those named in ``broken`` fail."""
    begun, broken = [], set()

    def train(config, run):
        begun.append(run)
        if run[:2] in broken:
            raise RuntimeError(f"{run[0]}, seed {run[1]} failed with status 1; its last lines say why")
        return {"test_accuracy": {"final": 0.5 + run[1] / 10}, "median_step_ms": {"dense": 2.0}}

    monkeypatch.setattr(fine_tuning, "train", train)
    return begun, broken


def run(out, *options, seeds=("0", "1")):
    arguments = ["--config", "vit_cifar10.yaml", "--seeds", *seeds, "--out", str(out), *options, *OPTIONS]
    fine_tuning.main(arguments)
    return json.loads(next(out.glob("*.json")).read_text())


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_ends_is_kept_and_what_fails_is_tried_again(trained, tmp_path, jobs):
    begun, broken = trained
    broken.add(("dense", 0))
    with pytest.raises(SystemExit, match=r"dense, seed 0 failed with status 1[\s\S]*tries these again"):
        run(tmp_path, "--jobs", jobs)
    found = json.loads((tmp_path / "fine_tuning_vit_cifar10.json").read_text())["runs"]
    assert sorted((r["method"], r["seed"]) for r in found) == [("adaptive", 0), ("adaptive", 1), ("dense", 1)]
    broken.clear()
    begun.clear()
    content = run(tmp_path, "--jobs", jobs)
    assert begun == [("dense", 0, ("--model.pretrained", "M"))]  # which has no sparsity to set
    assert len(content["runs"]) == 4
    assert {r["commit"] for r in content["runs"]} == {record.environment()["commit"]}


def test_the_command_makes_the_file_that_it_stands_in(trained, tmp_path):
    content = run(tmp_path, "--name", "other", "--jobs", "2", seeds=("0",))
    assert [path.name for path in tmp_path.glob("*.json")] == ["fine_tuning_other.json"]
    assert content["command"] == (
        "python -m experiments.fine_tuning --config vit_cifar10.yaml --name other --jobs 2 -- "
        "--model.pretrained M --sparsity.density 0.1"
    )


def test_an_interrupt_begins_no_other_run(tmp_path, monkeypatch):
    begun = []

    def train(config, each):
        begun.append(each)
        raise KeyboardInterrupt

    monkeypatch.setattr(fine_tuning, "train", train)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on from here"):
        run(tmp_path)
    assert len(begun) == 1


@pytest.mark.parametrize("text", ["{bad", '{"runs": [{"method": "dense"}]}', "[]"])
def test_a_file_that_is_none_of_ours_is_refused_and_stays(trained, tmp_path, text):
    file = tmp_path / "fine_tuning_vit_cifar10.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match="holds no results of this experiment"):
        run(tmp_path)
    assert file.read_text() == text
    assert trained[0] == []


def test_two_commands_do_not_write_one_file(trained, tmp_path):
    with (
        record.alone(tmp_path / "fine_tuning_vit_cifar10.json"),
        pytest.raises(SystemExit, match="another process is measuring"),
    ):
        run(tmp_path)
