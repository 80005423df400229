"""What was public stays public: names and their parameters, rows of the benchmark, and the results of fifty calls.

Before this test a name could move without a warning, and break programs that imported it.
"""

import ast
import json
import sys
import warnings
from importlib import import_module

import pytest
import torch

import public_calls as calls
import public_surface as surface
from fastbert._moved import MOVED, RENAMED

RECORDED = json.loads(surface.RECORD.read_text())


def arguments(text: str) -> ast.arguments:
    return ast.parse(f"def function({text}): pass").body[0].args


def broken(before: str, now: str) -> list[str]:
    """The errors that a formerly valid call would now get."""
    old, new = arguments(before), arguments(now)
    problems = []
    positional = [a.arg for a in new.posonlyargs + new.args]
    if [a.arg for a in old.args] != positional[: len(old.args)]:
        problems.append(f"positional ({before}) became ({now})")
    keywords = {*positional, *(a.arg for a in new.kwonlyargs)}
    if not new.kwarg:
        problems += [f"no {a.arg} any more" for a in old.kwonlyargs if a.arg not in keywords]

    def defaults(of: ast.arguments) -> dict[str, str]:
        last = of.args[len(of.args) - len(of.defaults) :]
        pairs = [*zip(last, of.defaults, strict=True), *zip(of.kwonlyargs, of.kw_defaults, strict=True)]
        return {a.arg: ast.unparse(value) for a, value in pairs if value is not None}

    had, has = defaults(old), defaults(new)
    problems += [f"{name}={value} became {has.get(name)}" for name, value in had.items() if has.get(name) != value]
    known = {a.arg for a in old.args + old.kwonlyargs}
    required = [a.arg for a in new.args + new.kwonlyargs if a.arg not in known and a.arg not in has]
    return problems + [f"{name} has to be given" for name in required]


def found(path: str) -> bool:
    """Whether `path` still has a value, with or without a DeprecationWarning."""
    parts = path.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            value = import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for name in parts[n:]:
            if not hasattr(value, name):
                return False
            value = getattr(value, name)
        return True
    return False


def is_in(path: str, module: str) -> bool:
    return path.startswith(f"{module}.")


@pytest.mark.once
def test_every_public_name_still_exists_and_can_be_called_as_before():
    now = surface.names()
    now |= {old + path.removeprefix(new): now[path] for old, new in MOVED.items() for path in now if is_in(path, new)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        gone = [path for path in RECORDED["names"] if not found(path)]
    assert not gone, f"gone without a deprecation: {gone}"
    changed = {
        path: problems
        for path, before in RECORDED["names"].items()
        if path in now and (problems := broken(before, now[path]))
    }
    assert not changed


@pytest.mark.once
@pytest.mark.parametrize(
    ("before", "now", "problems"),
    [
        ("a, b=1, *, c=None", "a, b=1, d=2, *, c=None, e=3", 0),
        ("a, *, b", "a, **others", 0),
        ("a, b", "b, a", 1),
        ("a, b=1", "a, b=2", 1),
        ("a, *, b=1", "a", 2),
        ("a", "a, *, b", 1),
        ("a", "", 1),
    ],
)
def test_changes_that_break_a_call(before, now, problems):
    assert len(broken(before, now)) == problems


@pytest.mark.once
@pytest.mark.parametrize("old", MOVED)
def test_a_moved_module_warns_and_is_the_same(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old]}"):
        module = import_module(old)
    assert module is import_module(MOVED[old])


@pytest.mark.once
@pytest.mark.parametrize(("module", "old", "new"), [(m, old, new) for m in RENAMED for old, new in RENAMED[m].items()])
def test_a_moved_name_warns_and_is_the_same(module, old, new):
    home = import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is now {module}.{new}"):
        assert getattr(home, old) is getattr(home, new)
    assert not hasattr(home, f"{old}_OF_OLD")


@pytest.mark.once
def test_removed_names_are_detected():
    assert found("fastbert.layers.prepack")
    assert found("fastbert.BertModel.forward")
    assert not found("fastbert.layers.prepacked")
    assert not found("fastbert.nowhere.prepack")


@pytest.mark.once
def test_every_row_of_the_benchmark_still_exists():
    now = surface.rows()
    gone = [
        f"{suite}: {name}"
        for suite, recorded in RECORDED["rows"].items()
        for kind in ("cases", "rows")
        for name in recorded[kind]
        if name not in now.get(suite, {}).get(kind, ())
    ]
    assert not gone


@pytest.mark.once
def test_the_record_has_the_names_of_the_readme():
    import fastbert

    assert {f"fastbert.{name}" for name in fastbert.__all__ if name != "__version__"} <= {*RECORDED["names"]}
    assert len(RECORDED["names"]) > 200
    assert len(RECORDED["rows"]) == 4 * 8


# ---- results of calls ------------------------------------------------------------------------------------

GIVEN = json.loads(calls.RECORD.read_text())
# Relative to the largest recorded number of a tensor. Implementations differ only by rounding.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def differences(now, before, path="") -> list[str]:
    """The places where two records differ by more than rounding."""
    if isinstance(before, list) and isinstance(now, list) and len(now) == len(before):
        pairs = enumerate(zip(now, before, strict=True))
        return [line for n, (a, b) in pairs for line in differences(a, b, f"{path}[{n}]")]
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if now == before else [f"{path}: {now!r}, and before {before!r}"]
    facts = [(record["dtype"], record["shape"], len(record["numbers"])) for record in (now, before)]
    if facts[0] != facts[1]:
        return [f"{path}: {facts[0]}, and before {facts[1]}"]
    tolerance = TOLERANCE.get(before["dtype"], 0.0)
    largest = max((abs(x) for x in before["numbers"][1:] if not isinstance(x, str)), default=0.0)
    found = []
    for n, (a, b) in enumerate(zip(now["numbers"], before["numbers"], strict=True)):
        allowed = tolerance * (largest if n else abs(b)) + 1e-9
        if isinstance(b, str) or isinstance(a, str):
            allowed, same = 0.0, a == b
        else:
            same = abs(a - b) <= allowed
        if not same:
            found.append(f"{path}: {a} in place of {b}, {allowed:.2g} allowed")
    return found


@pytest.mark.parametrize("name", calls.CALLS)
def test_results_of_public_calls(name):
    if name.startswith("transformers"):
        pytest.importorskip("transformers", reason="its models are accelerated")
    given = json.loads(json.dumps(calls.kept(calls.CALLS[name]())))
    assert not differences(given, GIVEN[name])


@pytest.mark.once
def test_fifty_calls_are_recorded():
    assert {*calls.CALLS} == {*GIVEN}
    assert len(GIVEN) >= 50


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda x: x, False),
        (lambda x: x * (1 + 1e-6), False),
        (lambda x: x * (1 + 1e-4), True),
        (lambda x: x.roll(1), True),
        (lambda x: x.double(), True),
        (lambda x: x[:-1], True),
        (lambda x: torch.where(x == x.max(), torch.nan, x), True),
    ],
)
def test_differences_are_found(change, differs):
    x = torch.linspace(-1, 2, 12)
    now, before = (calls.kept([t, "words"]) for t in (change(x), x))
    assert bool(differences(now, before)) == differs
