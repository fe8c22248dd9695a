# The house rules that a machine can check: who imports whom, what code never contains, what the wheel carries.
from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "sat").rglob("*.py"))

# A room imports itself and the rooms on lower floors. `sat` is sat/__init__.py, the street door: it may lead anywhere,
# and no room goes out through it to come in again.
FLOORS = {
    "files": -1,  # below all rooms
    "layout": 0,
    "ops": 1,
    "patterns": 1,
    "connectivity": 1,
    "scaling": 1,
    "sparsity": 2,
    "attention": 2,
    "baselines": 2,
    "models": 3,
    "data": 3,
    "integrations": 3,
    "deepspeed": 3,
    "module": 4,
    "callback": 4,
    "plots": 4,
    "checkpoints": 5,
    "monitor": 5,
    "saving": 5,
    "page": 5,
    "findings": 5,
    "estimate": 6,
    "runs": 6,
    "sections": 6,
    "cli": 7,
    "train": 8,
    "report": 8,
    "sat": 9,
}


def room_of(file: str) -> str:
    """``sat/ops/types.py`` is in the room ``ops``, ``sat/layout.py`` is the room ``layout``."""
    parts = Path(file).with_suffix("").parts
    return "sat" if parts[1] == "__init__" else parts[1]


def imported_rooms(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    """Line and room of each import from SAT, wherever it stands: in functions and under TYPE_CHECKING too."""
    package = Path(file).parent.parts
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from sat import ops` names a room, `from sat import BlockLayout` goes through the street door.
            names = [f"sat.{alias.name}" for alias in node.names] if module == "sat" else [module]
        for name in names:
            if name.split(".")[0] == "sat":
                room = [*name.split("."), "sat"][1]
                is_room = room in FLOORS or any((ROOT / "sat" / name).exists() for name in (room, f"{room}.py"))
                yield node.lineno, room if is_room else "sat"


def upward_imports(source: str, file: str) -> list[str]:
    """One sentence for each import that does not lead to a lower floor."""
    room = room_of(file)
    if room not in FLOORS:
        return []  # test_every_file_is_in_a_known_room says so, once
    return [
        f"{file}:{line}: {room} (floor {FLOORS[room]}) imports {target} (floor {FLOORS.get(target, 'unknown')})"
        for line, target in imported_rooms(ast.parse(source), file)
        if target != room and FLOORS.get(target, 99) >= FLOORS[room]
    ]


def forbidden_code(source: str, file: str) -> list[str]:
    """One sentence for each thing in this source that could run code out of a data file or a string."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, node.module or "")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found += [(node.lineno, f"{node.func.id}()")]
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            # Said outright, it is False: left out, transformers asks on the terminal.
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found += [(node.value.lineno, node.arg)]
        elif isinstance(node, ast.keyword) and node.arg == "weights_only":
            if not (isinstance(node.value, ast.Constant) and node.value.value is True):
                found += [(node.value.lineno, "weights_only other than True")]
        elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "weights_only"):
            found += [(node.lineno, f"{node.value} as a string")]
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    return [
        f"{file}:{line}: {what}"
        for line, what in found
        if what.split(".")[0] in banned or what.endswith(("()", "string", "True", "remote_code"))
    ]


@pytest.mark.parametrize("file", FILES)
def test_every_file_is_in_a_known_room(file: str) -> None:
    assert room_of(file) in FLOORS, f"{file} is in no room of FLOORS; give it one, there and in CONTRIBUTING.md"


@pytest.mark.parametrize("file", FILES)
def test_imports_lead_to_lower_floors_only(file: str) -> None:
    assert upward_imports((ROOT / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize("file", FILES)
def test_no_code_comes_out_of_data(file: str) -> None:
    assert forbidden_code((ROOT / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("sat/attention.py", "from sat.ops import block_sparse_attention", True),
        ("sat/attention.py", "from sat import ops, layout", True),
        (
            "sat/ops/torch_blocks.py",
            "from . import reference\nfrom .types import B\nfrom ..layout import x",
            True,
        ),
        ("sat/__init__.py", "from .layout import BlockLayout", True),
        ("sat/ops/__init__.py", "from sat.attention import AdaptiveAttention", False),
        ("sat/ops/triton/spmm.py", "from ...patterns import BigBird", False),
        ("sat/sparsity/masks.py", "import sat.attention", False),
        ("sat/attention.py", "from sat import BlockLayout", False),
        ("sat/layout.py", "def f():\n    import sat.ops.types", False),
        ("sat/layout.py", "if TYPE_CHECKING:\n    from sat.module import SATModule", False),
        ("sat/layout.py", "import satellite\nfrom math import sat", True),
    ],
)
def test_the_import_check_itself(file: str, source: str, allowed: bool) -> None:
    assert (upward_imports(source, file) == []) is allowed


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("module.eval()", True),
        ("torch.load(path, weights_only=True)", True),
        ("x = 'a string'", True),
        ("eval('1')", False),
        ("exec(code)", False),
        ("import pickle", False),
        ("from joblib import load", False),
        ("torch.load(path, weights_only=False)", False),
        ("torch.load(path, weights_only=flag)", False),
        ("load_dataset(name, trust_remote_code=True)", False),
        ("load_dataset(name, trust_remote_code=flag)", False),
        ("AutoConfig.from_pretrained(name, trust_remote_code=False)", True),
        ("torch.load(path, **{'weights_only': False})", False),
    ],
)
def test_the_code_check_itself(source: str, allowed: bool) -> None:
    assert (forbidden_code(source, "sat/x.py") == []) is allowed


def test_the_wheel_lists_every_package() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sat").rglob("__init__.py")}
    assert set(packages) == folders | {"sat.configs"}, "bring `packages` in pyproject.toml up to date"


def test_every_folder_of_code_is_a_package() -> None:
    assert [file for file in FILES if not (ROOT / file).with_name("__init__.py").exists()] == []


def test_constraints_fit_the_requirements() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {
        r.name.lower().replace("_", "-"): r for r in map(Requirement, filter(lambda x: x[:1] not in ("", "#"), lines))
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        wanted = Requirement(text)
        (pin,) = pins[wanted.name.lower().replace("_", "-")].specifier
        assert wanted.specifier.contains(pin.version), f"{text} is not met by the constraint {pin}"


def test_memory_nobody_wrote_to_reads_as_nan() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
    assert (torch.empty(2, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
