"""The structure of the package: modules import each other in one direction only, and keep to their dependencies."""

import ast
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import megatron_dsrl

ROOT = Path(megatron_dsrl.__file__).parent
FILES = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in ROOT.rglob("*.py")}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The modules that these statements import, and what they import from them, by dotted names."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Also not inside functions and for type checking."""
    imports = {name: imported(ast.walk(tree)) & set(FILES) for name, tree in TREES.items()}
    assert imports["megatron_dsrl.cli"] and sum(map(len, imports.values())) > len(FILES)
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


def test_importing_algorithms_and_rollout_does_not_import_megatron() -> None:
    def path_to_megatron(name: str) -> list[str]:
        """The modules by which importing this one imports Megatron; empty if it does not."""
        names = imported(TREES[name].body)
        if any(each.startswith("megatron.") for each in names):
            return [name]
        return next(([name, *path] for each in names & set(FILES) if (path := path_to_megatron(each))), [])

    assert path_to_megatron("megatron_dsrl.train")
    names = [name for name in FILES if name.startswith(("megatron_dsrl.algorithms.", "megatron_dsrl.rollout."))]
    assert [path for name in names if (path := path_to_megatron(name))] == []


def test_only_the_platform_asks_for_cuda() -> None:
    asking = {file.relative_to(ROOT) for file in FILES.values() if "cuda.is_available" in file.read_text()}
    assert asking and {path.parts[0] for path in asking} == {"platform"}
