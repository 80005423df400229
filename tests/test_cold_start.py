"""The first vector soon: what `fastbert encode` must not import or compute for one sentence."""

import os
import subprocess
import sys

import pytest
import torch
from tokenizers.models import WordPiece

from fastbert import BertConfig, BertModel, Tokenizer
from fastbert.text import folder
from small_bert import save_bert

pytestmark = pytest.mark.once

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
# Each takes from a tenth of a second to several seconds to import, and encoding on a CPU needs none of them.
UNWANTED = [
    "torch._dynamo", "torch._inductor", "torch._functorch", "torch._refs", "torch.fx.experimental.symbolic_shapes",
    "torch.distributed.tensor", "torch.ao.quantization", "sympy", "triton", "transformers", "sentence_transformers",
    "huggingface_hub", "fastbert.kernels.attention", "fastbert.dropin", "fastbert.encoding.workers",
    "fastbert.encoding.ranks",
]  # fmt: skip


def test_one_sentence_imports_no_more_than_it_needs(tmp_path):
    """Building the model on the meta device imported torch's compiler, which took 1.3 of 2.7 seconds."""
    save_bert(tmp_path, WORDS, max_position_embeddings=16)
    (tmp_path / "texts").write_text("a b c\n")
    code = (
        "import sys; from fastbert.cli.main import main; import torch; bare = set(sys.modules)\n"
        "assert main(sys.argv[1:]) == 0\n"
        f"print(*sorted(set({UNWANTED}) & (set(sys.modules) - bare)))"
    )
    words = ["encode", tmp_path / "texts", "-o", tmp_path / "out.npy", "--model", tmp_path, "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == []


def test_the_collector_rests_while_loading(tmp_path):
    """Python's garbage collector visited all of torch's objects once or twice while torch was imported and a model
    loaded, and again at exit: 0.4 of 1.5 seconds of processor time."""
    save_bert(tmp_path, WORDS, max_position_embeddings=16)
    (tmp_path / "texts").write_text("a b c\n")
    code = (
        "import gc, sys; from fastbert.cli.main import main; full = []\n"
        "gc.callbacks.append(lambda phase, of: full.append(phase) if of['generation'] == 2 else None)\n"
        "assert main() == 0; print(full, gc.isenabled(), gc.get_freeze_count() > 0)\n"
    )
    words = ["encode", tmp_path / "texts", "-o", tmp_path / "out.npy", "--model", tmp_path, "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[] True True"


def test_a_short_text_needs_one_vocabulary(tmp_path, monkeypatch):
    """A tokenizer.json was read, its words were copied into Python and from there into a second model, and a third one
    was made that truncates: 60 ms for BERT's 30,522 words, where reading takes 15."""
    save_bert(tmp_path, WORDS, max_position_embeddings=16)
    plain = Tokenizer.from_pretrained(tmp_path)
    plain.save_pretrained(tmp_path)
    made = []
    build = folder.bert_backend
    monkeypatch.setattr(folder, "bert_backend", lambda words, *rest: made.append(type(words)) or build(words, *rest))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert made == [WordPiece]
    monkeypatch.setattr(Tokenizer, "_backend_for", None)
    assert tokenizer.input_ids(["a b c", "a"], max_length=5) == [[2, 5, 6, 7, 3], [2, 5, 3]]
    monkeypatch.undo()
    assert tokenizer.input_ids(["a b c c", "a"], max_length=5) == [[2, 5, 6, 7, 3], [2, 5, 3]]
    assert tokenizer.input_ids(["a b c c"]) == plain.input_ids(["a b c c"])


def test_a_loaded_model_has_the_numbers_of_its_file(tmp_path):
    """Loading initialises nothing, so the file must set every number."""
    config = BertConfig(
        vocab_size=11, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertModel(config)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter)
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    loaded = BertModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in loaded.named_parameters():
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert torch.nn.init.zeros_(torch.ones(2)).tolist() == [0.0, 0.0]
