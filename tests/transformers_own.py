"""transformers' own tests of a model, run on the plain model and on the accelerated one: none may turn red.

    pip download --no-deps --no-binary :all: transformers==5.24.0 && tar xzf transformers-5.24.0.tar.gz
    pip install parameterized
    python -m tests.transformers_own transformers-5.24.0 [--family bert ...] [-k WORD]

What runs are the tests that all of transformers' models share (tests/test_modeling_common.py, which the source
distribution on PyPI carries; the test files of single models are in none: for these see libraries_own.py), for each of
the nine families that `accelerate` knows, with small configs from here.
"""

from __future__ import annotations

import argparse
import io
import sys
import types
import unittest
import warnings
from pathlib import Path

import torch
import transformers

from .libraries_own import accelerate_transformers

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37,
    "max_position_embeddings": 64, "pad_token_id": 0, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
# family -> (prefix of its classes, what its config says in other words)
FAMILIES = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {"pad_token_id": 1}),
    "xlm_roberta": ("XLMRoberta", {"pad_token_id": 1}),
    "camembert": ("Camembert", {"pad_token_id": 1}),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37}),
    "electra": ("Electra", {"embedding_size": 16}),
    "albert": ("Albert", {"embedding_size": 16, "num_hidden_groups": 1}),
    "mpnet": ("MPNet", {"pad_token_id": 1}),
    "modernbert": (
        "ModernBert", {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
    ),
}  # fmt: skip
BATCH, WIDTH = 4, 7


def common_tests(folder: Path) -> type:
    """ModelTesterMixin of the unpacked source distribution, without the mixins of files that this does not carry."""
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        if name != __name__:
            del sys.modules[name]
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        absent = types.ModuleType(f"tests.{name}")
        setattr(absent, mixin, type(mixin, (), {}))
        sys.modules[f"tests.{name.split('.')[0]}"] = types.ModuleType(f"tests.{name.split('.')[0]}")
        sys.modules[f"tests.{name}"] = absent
    from importlib import import_module

    return import_module("tests.test_modeling_common").ModelTesterMixin


class Tester:
    """A small config of a family and a batch for it, as transformers' mixin asks for them."""

    is_training, batch_size, seq_length = True, BATCH, WIDTH
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, prefix: str, sizes: dict):
        self.prefix, self.sizes = prefix, sizes

    def get_config(self):
        return getattr(transformers, f"{self.prefix}Config")(**(SIZES | self.sizes))

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 99, (BATCH, WIDTH))
        mask = (torch.arange(WIDTH) < torch.randint(2, WIDTH + 1, (BATCH, 1))).long()
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


def case_of(mixin: type, family: str) -> type[unittest.TestCase]:
    prefix, sizes = FAMILIES[family]
    classes = [getattr(transformers, prefix + head, None) for head in HEADS]

    class Family(mixin, unittest.TestCase):
        all_model_classes = tuple(cls for cls in classes if cls is not None)

        def setUp(self):
            self.model_tester = Tester(prefix, sizes)

    Family.__name__ = Family.__qualname__ = prefix
    return Family


def outcomes(case: type[unittest.TestCase], word: str) -> dict[str, str]:
    """Test -> passed, skipped, or the last line of what it raised."""
    found = {}
    for name in unittest.TestLoader().getTestCaseNames(case):
        if word in name:
            torch.manual_seed(0)
            result = unittest.TextTestRunner(stream=io.StringIO()).run(case(name))
            bad = result.failures + result.errors
            last = bad[0][1].strip().splitlines()[-1] if bad else ""
            found[name] = f"FAILED {last}" if bad else "skipped" if result.skipped else "passed"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, action="append")
    parser.add_argument("-k", default="", metavar="WORD")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    mixin = common_tests(args.folder.resolve())
    families = args.family or list(FAMILIES)
    plain = {family: outcomes(case_of(mixin, family), args.k) for family in families}
    accelerate_transformers()
    red = 0
    for family in families:
        ours = outcomes(case_of(mixin, family), args.k)
        turned = {name: ours[name] for name, was in plain[family].items() if was == "passed" and ours[name] != was}
        green = sum(outcome == "passed" for outcome in plain[family].values())
        print(f"{family}: {green} of {len(plain[family])} pass on the plain model, {len(turned)} of these turn red")
        for name, outcome in turned.items():
            print(f"    {name}: {outcome[:200]}")
        red += len(turned)
    return min(red, 1)


if __name__ == "__main__":
    sys.exit(main())
