"""The Python examples of the README and of docs/ run as they stand, and what they link to and command exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
EXAMPLES = [
    pytest.param(name, example, id=f"{name}-{number}")
    for name, page in PAGES.items()
    for number, example in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("page", "example"), EXAMPLES)
def test_example_runs(page, example, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, page, "exec"), {})


def test_there_are_examples():
    assert {example.values[0] for example in EXAMPLES} == set(PAGES)


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES.keys())
def test_commands_and_links_exist(page):
    text = page.read_text()
    for config in re.findall(r"--config (\S+\.yaml)", text):
        assert (ROOT / "configs" / config).is_file()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for module in re.findall(r"python -m ((?:sat|experiments)[\w.]*)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
