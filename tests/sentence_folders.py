"""Small folders of sentence-transformers, the vectors of that library, and ours for comparison."""

import json
from pathlib import Path

import pytest
import torch

from fastbert import Encoder
from fastbert.testing import assert_within_budget
from small_bert import SPECIAL, save_bert

library = pytest.importorskip("sentence_transformers", reason="compared with sentence-transformers")
if not library.__version__.startswith(("6.2", "6.3", "6.4")):
    pytest.skip(f"needs the folders of sentence-transformers 6.2, found {library.__version__}", allow_module_level=True)
from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.sentence_transformer import modules as st  # noqa: E402

WIDTH, LAYERS, LIMIT = 32, 3, 12
BERT_CONFIG, LIBRARY_CONFIG = "sentence_bert_config.json", "config_sentence_transformers.json"
# Python and the tokenizers library lowercase the last of these letters differently.
WORDS = "the a cat dog sat ran on under mat tree and query : find ##s İ i ̇ ß Σ σ ς C c".split()  # noqa: RUF001
TEXTS = ["the cat sat", "", "dogs ran and ran " * 20, "a dog", "query : the mat under a tree [MASK] Cat"]


def make_bert(folder: Path) -> Path:
    """A folder with a small random BERT and a cased vocabulary of a few words."""
    settings = {"do_lower_case": False, "tokenizer_class": "BertTokenizer", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "architectures": ["BertModel"]}
    return save_bert(folder, [*SPECIAL, *WORDS], initializer_range=0.3, **sizes)


def transformer(bert: Path, **options) -> st.Transformer:
    return st.Transformer(str(bert), **{"max_seq_length": LIMIT, **options})


def save(folder: Path, *modules, **options) -> Path:
    """A folder of these modules, whose weights differ from module to module."""
    torch.manual_seed(1)
    model = SentenceTransformer(modules=list(modules), device="cpu", **options)
    for module in list(model.modules()):
        if isinstance(module, (st.LayerNorm, st.WeightedLayerPooling)):
            for parameter in module.parameters():
                parameter.data.uniform_(0.5, 1.5)
    model.save(str(folder), create_model_card=False)
    return folder


def save_usual(bert: Path, folder: Path) -> Path:
    return save(folder, transformer(bert), st.Pooling(WIDTH), st.Dense(WIDTH, 8), st.Normalize())


def theirs(folder: Path, how: str = "encode", texts: list[str] = TEXTS, **call) -> list[torch.Tensor]:
    """Vectors by the library, in float32 and in float64."""
    model = SentenceTransformer(str(folder), device="cpu")
    return [
        getattr(model.to(dtype), how)(texts, convert_to_tensor=True, batch_size=2, **call)
        for dtype in (torch.float32, torch.float64)
    ]


def load(folder: Path, **options) -> Encoder:
    return Encoder.from_pretrained(folder, **{"dtype": "float32", "device": "cpu", "impl": "native", **options})


def assert_same(folder: Path, how: str = "encode", texts: list[str] = TEXTS, **call) -> torch.Tensor:
    encoder = load(folder)
    vectors = getattr(encoder, how)(texts, **call)
    assert vectors.shape == (len(texts), encoder.dimension)
    assert_within_budget(vectors, *theirs(folder, how, texts, **call))
    return vectors


def change(folder: Path, name: str, **settings) -> None:
    """Changes settings in a file; the value ... removes one."""
    path = folder / name
    content = (json.loads(path.read_text()) if path.is_file() else {}) | settings
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
