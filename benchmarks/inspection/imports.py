"""The import graph: `python -m benchmarks.inspection.imports [PREFIX]` prints each module's imports within the project.

It is read from the source without running it, so imports inside functions and names of modules in tables count too.
`tests/test_architecture.py` compares the graph with the floors of the architecture.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# folder -> name of the package that it is
PACKAGES = {"fastbert": "fastbert", "kernels": "fastbert.kernels", "benchmarks": "benchmarks"}

Graph = dict[str, set[str]]


def sources() -> dict[str, Path]:
    """Module -> its file."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imported(module: str, path: Path) -> Iterator[str]:
    """The absolute names of all modules, and of objects in modules, that the source of `module` may import. Imports
    under `if TYPE_CHECKING:` do not count, because they never run."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            yield node.value  # the string may be an entry in a table of modules to import


def graph() -> Graph:
    """Module -> the modules of the project that it imports. A package counts if one of its own names is imported."""
    files = sources()
    found: Graph = {}
    for module, path in files.items():
        homes = {name if name in files else name.rpartition(".")[0] for name in imported(module, path)}
        found[module] = {home for home in homes if home in files and home != module}
    return found


def outside(module: str) -> set[str]:
    """The top-level packages that a module imports, without the project and Python's standard library."""
    tree = ast.parse(sources()[module].read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names} - {*sys.stdlib_module_names, "fastbert", "benchmarks"}


def circles(edges: Graph) -> list[list[str]]:
    """The groups of modules that import each other, directly or by way of others. Tarjan, SIAM J. Comput. 1972."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in sorted(edges[module]):
            if other not in index:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], index[other])
        if lowest[module] == index[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    for module in edges:
        if module not in index:
            visit(module)
    return sorted(groups)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prints the imports of each module within the project.")
    parser.add_argument("prefix", nargs="?", default="", help="only modules whose name begins with this")
    prefix = parser.parse_args(argv).prefix
    edges = graph()
    for module in sorted(edges):
        if module.startswith(prefix):
            print(module, *(f"  -> {other}" for other in sorted(edges[module])), sep="\n")
    for group in circles(edges):
        print("circle:", ", ".join(group))
    return 0


if __name__ == "__main__":
    sys.exit(main())
