"""The structure of the package: modules import each other in one direction only."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import megatron_dsrl

ROOT = Path(megatron_dsrl.__file__).parent


def imported_modules(file: Path, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports anywhere: also inside functions, and for type checking."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in ROOT.rglob("*.py")}
    imports = {name: imported_modules(file, set(files)) for name, file in files.items()}
    assert imports["megatron_dsrl.cli"] and sum(map(len, imports.values())) > len(files)
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle
