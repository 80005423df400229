"""fastbert: the fastest BERT that is still plain PyTorch.

from fastbert import BertModel, Encoder
encoder = Encoder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2")
vectors = encoder.encode(["text in", "vectors out"])
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import _moved

if TYPE_CHECKING:  # for type checkers and editors; at run time `__getattr__` imports each name on first use
    from . import functional as functional
    from .config import BertConfig as BertConfig
    from .dropin import accelerate as accelerate
    from .dropin import register_attention as register_attention
    from .dropin import restore as restore
    from .dropin.explain import explain as explain
    from .encoding.encoder import Encoder as Encoder
    from .inference.weights import prepack as prepack
    from .kernels._invariance import batch_invariant as batch_invariant
    from .models.bert import BertModel as BertModel
    from .models.heads import BertForMultipleChoice as BertForMultipleChoice
    from .models.heads import BertForNextSentencePrediction as BertForNextSentencePrediction
    from .models.heads import BertForQuestionAnswering as BertForQuestionAnswering
    from .models.heads import BertForSequenceClassification as BertForSequenceClassification
    from .models.heads import BertForTokenClassification as BertForTokenClassification
    from .models.vocabulary import BertForMaskedLM as BertForMaskedLM
    from .models.vocabulary import BertForPreTraining as BertForPreTraining
    from .packing import PackedBatch as PackedBatch
    from .text.tokenizer import Tokenizer as Tokenizer
    from .training.pipeline import pipeline as pipeline

try:
    __version__ = version("fastbert-torch")  # the distribution: `fastbert` on the package index is another project
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

# public name -> module; imported on first use, so that `fastbert --help` does not wait for torch
_PUBLIC = {
    "BertConfig": "config",
    "BertForMaskedLM": "models.vocabulary",
    "BertForMultipleChoice": "models.heads",
    "BertForNextSentencePrediction": "models.heads",
    "BertForPreTraining": "models.vocabulary",
    "BertForQuestionAnswering": "models.heads",
    "BertForSequenceClassification": "models.heads",
    "BertForTokenClassification": "models.heads",
    "BertModel": "models.bert",
    "Encoder": "encoding.encoder",
    "PackedBatch": "packing",
    "Tokenizer": "text.tokenizer",
    "accelerate": "dropin",
    "batch_invariant": "kernels._invariance",
    "explain": "dropin.explain",
    "functional": "functional",
    "pipeline": "training.pipeline",
    "prepack": "inference.weights",
    "register_attention": "dropin",
    "restore": "dropin",
}
_moved.install()
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    module = import_module(f"fastbert.{_PUBLIC[name]}")
    value = module if name == "functional" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
