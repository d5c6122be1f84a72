"""The shape of the house, checked on the sources alone: floors, cycles, sizes and exports."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "moekit"

FLOORS = {
    0: {"errors", "config", "registry", "files", "figures", "machine"},
    1: {"kernels"},
    2: {"moe"},
    3: {"models"},
    4: {"adapt", "parallel"},
    5: {"train", "engine", "plan", "lint", "integrations"},
    6: {"serve", "bench"},
    7: {"cli", "commands", "__main__"},
}
FLOOR_OF = {unit: floor for floor, units in FLOORS.items() for unit in units}
# Narrower than "anything below".
ONLY = {
    "kernels": {"errors"},
    "serve": {"engine", "train.monitor", "config", "errors", "files", "registry"},
}
FORBIDDEN = {
    "errors": {"torch", "transformers"},
    "config": {"torch", "transformers"},
    "registry": {"torch", "transformers"},
    "files": {"torch", "transformers"},
    "figures": {"torch", "transformers"},
    "machine": {"torch", "transformers"},
    "moe": {"torch.distributed", "transformers", "datasets", "huggingface_hub"},
    "kernels": {"torch.nn.Module", "transformers"},
    "plan": {"torch", "transformers", "numpy"},
    "lint": {"torch", "transformers", "numpy"},
}
# Modules whose import must stay light enough for `moekit --help` and for `--help` of a verb.
LAZY_UNITS = {"cli", "commands", "__main__"}
HEAVY = {"torch", "transformers", "numpy", "datasets", "matplotlib"}
LIGHT = FLOORS[0] | {"plan", "lint"} | LAZY_UNITS
MAX_LINES = 400


class Import:
    """One import statement: the module it names, its line, and whether it runs when the file is imported."""

    def __init__(self, target: str, line: int, top_level: bool) -> None:
        self.target, self.line, self.top_level = target, line, top_level


def modules(package: Path) -> dict[str, Path]:
    """Dotted names below the package ('moe.router', '' for the package itself) to their files."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> list[Import]:
    """Every import of a file, also those inside functions; `from a import b` counts as a.b and as a."""
    found = []

    def visit(node: ast.AST, top_level: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend(Import(alias.name, child.lineno, top_level) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno} relative imports hide their floor"
                found.extend(Import(f"{child.module}.{alias.name}", child.lineno, top_level) for alias in child.names)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                visit(child, False)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                visit(child, top_level and not inside)

    visit(ast.parse(path.read_text()), True)
    return found


def resolve(target: str, known: dict[str, Path]) -> str | None:
    """The module of ours that an import names ('moekit.moe.types.Routing' → 'moe.types'), or None if it is not ours."""
    if target != "moekit" and not target.startswith("moekit."):
        return None
    name = target.removeprefix("moekit").lstrip(".")
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def allowed(source: str, target: str) -> bool:
    """Whether module `source` may import module `target`: downwards, or inside its own unit (or floor 0)."""
    from_unit, to_unit = source.split(".", maxsplit=1)[0], target.split(".", maxsplit=1)[0]
    if from_unit == to_unit or target == "":
        return True
    if from_unit in ONLY:
        return to_unit in ONLY[from_unit] or target in ONLY[from_unit]
    down = FLOOR_OF[to_unit] < FLOOR_OF[from_unit]
    same_floor = FLOOR_OF[to_unit] == FLOOR_OF[from_unit] and FLOOR_OF[from_unit] in (0, 7)
    return down or same_floor


def violations(package: Path) -> list[str]:
    """Every import that breaks the floor table, as 'file:line imports what'."""
    known, found = modules(package), []
    for name, path in known.items():
        for statement in imports(path):
            unit, target = name.split(".")[0], resolve(statement.target, known)
            outside = statement.target if target is None else ""
            forbidden = any(outside == bad or outside.startswith(f"{bad}.") for bad in FORBIDDEN.get(unit, ()))
            heavy = (
                unit in LAZY_UNITS
                and statement.top_level
                and (outside.split(".")[0] in HEAVY or (target and target.split(".")[0] not in LIGHT))
            )
            upward = target is not None and name != "" and not allowed(name, target)
            if forbidden or heavy or upward:
                found.append(f"{path.relative_to(package)}:{statement.line} imports {statement.target}")
    return found


def cycles(package: Path) -> list[str]:
    """Import cycles between modules, function-level imports included; package __init__ files only re-export."""
    known = modules(package)
    graph = {
        name: {t for s in imports(path) if (t := resolve(s.target, known)) and t != name and not is_init(known[t])}
        for name, path in known.items()
        if not is_init(path)
    }
    found, done = [], set()

    def walk(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append(" → ".join([*trail[trail.index(name) :], name]))
            return
        if name in done:
            return
        for target in sorted(graph.get(name, ())):
            walk(target, [*trail, name])
        done.add(name)

    for name in graph:
        walk(name, [])
    return found


def is_init(path: Path) -> bool:
    return path.name == "__init__.py"


def test_every_unit_has_a_floor():
    units = {name.split(".")[0] for name in modules(PACKAGE)} - {""}
    assert units <= FLOOR_OF.keys(), f"give {units - FLOOR_OF.keys()} a floor in docs/design.md and here"


def test_imports_only_go_down():
    assert violations(PACKAGE) == []


def test_no_import_cycles():
    assert cycles(PACKAGE) == []


def test_files_stay_small():
    for name, path in modules(PACKAGE).items():
        lines = path.read_text().count("\n")
        reason = "Size:" in (ast.get_docstring(ast.parse(path.read_text())) or "")
        assert lines <= MAX_LINES or reason, f"{name} has {lines} lines; split it or state 'Size: why' in its docstring"


@pytest.mark.parametrize("name", sorted(n for n, p in modules(PACKAGE).items() if n != "__main__"))
def test_exports_are_sorted_and_exist(name):
    module = importlib.import_module(f"moekit.{name}".rstrip("."))
    declared = getattr(module, "__all__", None)
    if declared is None:
        assert not is_init(modules(PACKAGE)[name]) or not imports(modules(PACKAGE)[name]), "re-exports need __all__"
        return
    assert list(declared) == sorted(declared, key=export_order), f"{name}.__all__ is not sorted"
    for export in declared:
        assert hasattr(module, export), f"{name}.__all__ names {export}, which does not exist"


def export_order(export: str) -> tuple[int, str]:
    """CONSTANTS, then Classes, then functions: the order ruff sorts `__all__` in."""
    return (0 if export.isupper() else 1 if export[0].isupper() else 2), export


def write_tree(root: Path, files: dict[str, str]) -> Path:
    package = root / "moekit"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("moe/router.py", "from moekit.models.decoder import Decoder"),  # upwards
        ("kernels/cpu.py", "from moekit.config import MoEConfig"),  # kernels take tensors and ints only
        (
            "train/trainer.py",
            "def f():\n    from moekit.engine.engine import load",
        ),  # across floor 5, inside a function
        ("config.py", "import torch"),
        ("moe/router.py", "import torch.distributed as dist"),
        ("commands/train.py", "import torch"),  # would slow --help
        ("commands/train.py", "from moekit.train.trainer import Trainer"),
    ],
)
def test_checker_sees_an_import_turned_upside_down(tmp_path, name, line):
    tree = dict.fromkeys(["models/decoder.py", "engine/engine.py", "train/trainer.py", "config.py"], "")
    assert violations(write_tree(tmp_path, tree)) == []
    assert len(violations(write_tree(tmp_path, tree | {name: line}))) == 1


def test_checker_sees_a_cycle(tmp_path):
    tree = {"moe/a.py": "from moekit.moe import b", "moe/b.py": "def f():\n    from moekit.moe.a import x"}
    assert cycles(write_tree(tmp_path, tree)) == ["moe.a → moe.b → moe.a"]
