"""The first vector soon: what `fastbert encode` must not import or compute for one sentence."""

import os
import subprocess
import sys

import pytest
import torch

from fastbert import BertConfig, BertModel
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
