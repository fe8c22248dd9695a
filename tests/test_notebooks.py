"""The notebooks run from top to bottom and are stored without outputs."""

import json
import re
from pathlib import Path

import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_of(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore:.*no accelerator is found.*:UserWarning")
def test_fine_tune_pretrained_runs(tmp_path, monkeypatch, capsys, project_root):
    """On a tiny model with a tiny vocabulary, and sentences about nothing."""
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    words = [f"word{number}" for number in range(40)]
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = transformers.BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "model")
    config = transformers.BertConfig(
        vocab_size=45, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    for split, count in (("train", 64), ("test", 8)):
        picks = torch.randint(40, (count, 2, 30)).tolist()
        rows = [[" ".join(words[i] for i in sentence) for sentence in pair] for pair in picks]
        columns = {"sentence1": [a for a, _ in rows], "sentence2": [b for _, b in rows], "label": [0, 1] * (count // 2)}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"{split}.parquet")
    for name, value in (("SAT_MODEL", tmp_path / "model"), ("SAT_DATA", tmp_path), ("SAT_STEPS", 12)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in code_of(project_root / "notebooks" / "fine_tune_pretrained.ipynb"):
        exec(compile(cell, "fine_tune_pretrained", "exec"), names)
    printed = capsys.readouterr().out
    assert "layer 1: step " in printed
    assert "accuracy   dense 0." in printed
    assert len(names["sparsity"].layouts) == 2


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning", "ignore:.*no accelerator is found.*:UserWarning")
@pytest.mark.parametrize("name", ["inspect_layouts", "train_and_compare"])
def test_notebooks_on_digits_run(name, tmp_path, monkeypatch, capsys, project_root):
    monkeypatch.setenv("SAT_STEPS", "20")
    monkeypatch.setenv("SAT_EDGE", "8")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in code_of(project_root / "notebooks" / f"{name}.ipynb"):
        exec(compile(cell, name, "exec"), names)
    printed = capsys.readouterr().out
    if name == "inspect_layouts":
        assert "layer 1, learned " in printed
        assert (names["RUN"] / "report.html").is_file()
    else:
        assert {run: round(summary["density"] or 1, 2) for run, summary in names["summaries"].items()} == {
            "dense": 1,
            "learned": 0.12,  # the diagonal
            "window": 0.34,
        }
        assert "learned " in printed
        assert "nan" not in printed


@pytest.mark.parametrize("name", ["inspect_layouts", "train_and_compare"])
def test_what_is_rendered_is_the_notebook(name, project_root):
    rendered = project_root / "docs" / "notebooks" / f"{name}.md"
    text = rendered.read_text(encoding="utf-8")
    for cell in code_of(project_root / "notebooks" / f"{name}.ipynb"):
        assert f"```python\n{cell}\n```" in text, "run it anew: CONTRIBUTING.md, Numbers"
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert sorted(pictures) == sorted(f"{name}_files/{p.name}" for p in rendered.with_name(f"{name}_files").iterdir())
    assert "![png]" not in text  # each says what it shows
    assert "Warning" not in text
    assert sum((rendered.parent / picture).stat().st_size for picture in pictures) + len(text) < 300_000
