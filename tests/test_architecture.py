"""Imports point down: every module's imports are checked against the floors of the architecture."""

import pytest

from benchmarks.inspection import imports as inspect_imports

pytestmark = pytest.mark.once

GRAPH = inspect_imports.graph()

# From the ground up. A module may import from its own floor and those below. A name includes all modules within it.
FLOORS = (
    ("fastbert.kernels",),
    ("fastbert._moved", "fastbert.checkpoint", "fastbert.config", "fastbert.formats", "fastbert.parent",
     "fastbert.storage"),
    ("fastbert.functional",),
    ("fastbert.packing",),
    ("fastbert.inference",),
    ("fastbert.stack",),
    ("fastbert.layers", "fastbert.testing", "fastbert.text", "fastbert.whole_layer", "fastbert.workloads"),
    ("fastbert.models",),
    ("fastbert.dropin",),
    ("fastbert.encoding", "fastbert.training"),
    ("fastbert.corpus", "fastbert.pretraining"),
    ("fastbert.engines",),
    ("fastbert.compression",),
    ("fastbert.convert", "fastbert.demo", "fastbert.emulator", "fastbert.info"),
    ("fastbert.verify",),
    ("fastbert.service",),
    ("fastbert.cli",),
    ("fastbert.__main__",),
    ("benchmarks.harness",),
    ("benchmarks.peers",),
    ("benchmarks.suites",),
    ("benchmarks.inspection", "benchmarks.reporting", "benchmarks.run"),
    ("benchmarks.__main__", "benchmarks.tuning"),
    ("benchmarks.gpu_day",),
)  # fmt: skip
# The only modules of the package that may import kernels: operators, and weights at inference.
SEAMS = ("fastbert.functional", "fastbert.inference")


def is_within(module: str, name: str) -> bool:
    return module == name or module.startswith(f"{name}.")


def floor_of(module: str) -> int:
    found = [n for n, floor in enumerate(FLOORS) if any(is_within(module, name) for name in floor)]
    assert len(found) == 1, f"{module} has no floor: give it one in FLOORS"
    return found[0]


def arrows() -> list[tuple[str, str]]:
    """All imports, except those from and to the bare package, which only offers public names."""
    return [(a, b) for a in sorted(GRAPH) for b in sorted(GRAPH[a]) if "fastbert" not in (a, b)]


def test_every_module_has_a_floor_and_none_reaches_up():
    assert not [f"{a} -> {b}" for a, b in arrows() if floor_of(a) < floor_of(b)]


def test_only_the_two_seams_import_kernels():
    kernels = "fastbert.kernels"
    ways = [
        f"{a} -> {b}"
        for a, b in arrows()
        if is_within(b, kernels) and is_within(a, "fastbert") and not any(is_within(a, n) for n in (kernels, *SEAMS))
    ]
    assert not ways


def test_kernels_import_only_torch_and_triton():
    modules = [module for module in GRAPH if is_within(module, "fastbert.kernels")]
    assert len(modules) > 20
    assert {name for module in modules for name in inspect_imports.outside(module)} <= {"torch", "triton"}
    assert not [(a, b) for a in modules for b in GRAPH[a] if not is_within(b, "fastbert.kernels")]


def test_no_circles():
    assert inspect_imports.circles(GRAPH) == []


# ---- the script itself -----------------------------------------------------------------------------------


def test_every_form_of_import_is_read(tmp_path, monkeypatch):
    (tmp_path / "fastbert" / "inner").mkdir(parents=True)
    (tmp_path / "fastbert" / "__init__.py").write_text("")
    (tmp_path / "fastbert" / "inner" / "__init__.py").write_text("from .a import f\n")
    (tmp_path / "fastbert" / "inner" / "a.py").write_text(
        "from .. import b\nfrom ..kernels import k\nimport torch.nn\n"
    )
    (tmp_path / "fastbert" / "b.py").write_text("def f():\n    import fastbert.c\n    from fastbert.inner import f\n")
    (tmp_path / "fastbert" / "c.py").write_text("TABLE = {'b': 'fastbert.b'}\n'fastbert'\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "k.py").write_text("from ._l import x\nfrom os import path\n")
    (tmp_path / "kernels" / "_l.py").write_text("")
    monkeypatch.setattr(inspect_imports, "ROOT", tmp_path)
    found = inspect_imports.graph()
    assert found == {
        "fastbert": set(),
        "fastbert.inner": {"fastbert.inner.a"},
        "fastbert.inner.a": {"fastbert.b", "fastbert.kernels.k"},
        "fastbert.b": {"fastbert.c", "fastbert.inner"},
        "fastbert.c": {"fastbert.b"},
        "fastbert.kernels.k": {"fastbert.kernels._l"},
        "fastbert.kernels._l": set(),
    }
    assert inspect_imports.outside("fastbert.inner.a") == {"torch"}
    assert inspect_imports.outside("fastbert.kernels.k") == set()
    assert inspect_imports.circles(found) == [["fastbert.b", "fastbert.c", "fastbert.inner", "fastbert.inner.a"]]
