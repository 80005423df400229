"""The swap for sentence-transformers: `encode`, `predict` and `rank` in batches by tokens rather than by texts.

The library's own method runs with all its arguments on a view of the model: a shallow copy that gets one large batch
of texts. Its `preprocess` returns the tokens of each text, and its `forward` sorts the texts by length and runs them in
batches by tokens. Prompts, normalising, truncating, precisions, pools of processes and the order of the results are
left to the library's code. The model itself only gets another method in its `__dict__`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from ..text.batching import CHUNK_TEXTS, even_batches, run_batches, tokens_per_batch
from ..text.cutting import KeptCutter
from .encoder import EncoderForward
from .forward import Forward, forward_of
from .original import tensor_hooks
from .padding import Policy, Reading, reading, reading_now

# class of the model -> the methods that may contain the loop over batches, the innermost first
METHODS = {"SentenceTransformer": ("_inference", "encode"), "CrossEncoder": ("_inference", "predict")}
PUBLIC = {"SentenceTransformer": "encode", "CrossEncoder": "predict, rank"}
# Classes of sentence-transformers that do not read padding, or get one vector for each text -> whether an object of the
# class is set up so.
BY_MASK = {
    "Pooling": lambda module: True,
    "SpladePooling": lambda module: True,
    "WeightedLayerPooling": lambda module: True,
    "Normalize": lambda module: getattr(module, "module_input_name", VECTOR) == VECTOR,
    "Dense": lambda module: getattr(module, "module_input_name", VECTOR) == VECTOR,
    "LayerNorm": lambda module: True,
    "Dropout": lambda module: True,
    "LogitScore": lambda module: True,
}
VECTOR = "sentence_embedding"
LAST = "LogitScore"  # the class that reads the last column, of logits of a language model, which declares that row
TOKENISED_TEXTS = 128  # texts in one call of the tokenizer, which pads them to the longest
SHOWN_TEXTS = 512  # texts for one step of a progress bar
ROWS = "fastbert_rows"  # key of the `Rows` among the features
# classes that contain a model of transformers and return its rows
TRANSFORMERS = ("Transformer", "MLMTransformer")


class CannotPack(Exception):
    """Why the texts of a batch cannot be regrouped."""


def model_kind(module: nn.Module) -> str | None:
    """ "SentenceTransformer" or "CrossEncoder" for a model of that class or a subclass; else None."""
    for cls in type(module).__mro__:
        if cls.__name__ in METHODS and cls.__module__.startswith("sentence_transformers."):
            return cls.__name__
    return None


def is_pipeline(model: nn.Module) -> bool:
    """Whether this is a list of modules of sentence-transformers, the first of which holds an accelerated encoder."""
    of_library = any(cls.__module__.startswith("sentence_transformers.") for cls in type(model).__mro__)
    if not (of_library and isinstance(model, nn.Sequential) and len(model)):
        return False
    return any(isinstance(forward_of(m), EncoderForward) for m in model[0].modules())


def why_read(model: nn.Sequential) -> str | None:
    """Why a module in this list, or a hook on it, may read padding; or None."""
    for module in model:
        cls = type(module)
        if not cls.__module__.startswith("sentence_transformers."):
            return f"a {cls.__name__} may read padding"
        if "forward" in module.__dict__:
            return f"the forward of a {cls.__name__} was replaced"
        if tensor_hooks(module):
            return f"a {cls.__name__} has a hook"
        if module is not model[0] and not BY_MASK.get(cls.__name__, lambda module: False)(module):
            return f"a {cls.__name__} may read padding"
    return None if type(model[0]).__name__ in TRANSFORMERS else f"its first module is a {type(model[0]).__name__}"


class PooledForward(Forward):
    """The `forward` of a list of modules of sentence-transformers: its own code, and a declaration of what it reads."""

    def why_read(self) -> str | None:
        model = self.module
        if tensor_hooks(model):
            return f"a {type(model).__name__} has a hook"
        if type(model).forward.__module__.partition(".")[0] not in ("sentence_transformers", "torch"):
            return f"{type(model).__name__} has a forward of its own"
        return why_read(model)

    def reads(self) -> Reading:
        """The declaration for a call. The rows of tokens that it also returns do not count as read."""
        why = self.why_read()
        return Reading() if why is None else Reading(True, why=why)

    def summary(self) -> str:
        why = self.why_read()
        return "it does not read padding" if why is None else f"padding is computed: {why}"

    def call(self, *args, **kwargs):
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph computes all rows
            return self.original(*args, **kwargs)
        outer = reading_now()
        with reading(self.reads() if outer is None or not outer.shows else outer):
            return self.original(*args, **kwargs)


def method_of(model: nn.Module, kind: str) -> str | None:
    return next((name for name in METHODS[kind] if hasattr(type(model), name)), None)


def why_left(model: nn.Module, kind: str) -> str | None:
    """Why a model's `encode` or `predict` is not replaced, or None."""
    base = next(cls for cls in type(model).__mro__ if cls.__name__ == kind)
    name = method_of(model, kind)
    if not isinstance(model, nn.Sequential):
        return f"a {kind} of this version of sentence-transformers does not run a list of modules"
    for own in (name, "forward", "preprocess", "tokenize"):
        if getattr(type(model), own, None) is not getattr(base, own, None):
            return f"{type(model).__name__} has a {own} of its own"
    if "batch_size" not in inspect.signature(getattr(base, name)).parameters:
        return f"{name} of this version of sentence-transformers takes no batch_size"
    if len(model) == 0 or type(model[0]).__name__ != "Transformer" or getattr(model[0], "can_flatten_inputs", False):
        first = type(model[0]).__name__ if len(model) else "nothing"
        flat = first == "Transformer"
        return "it runs without padding on FlashAttention" if flat else f"its first module is a {first}"
    inside = [f for m in model[0].modules() if isinstance(f := forward_of(m), EncoderForward)]
    if not inside:
        return "its transformer was left alone"
    if any(forward.facts.pooled == "last" for forward in inside):
        return "it reads the last column, which is another token in another batch"
    return None


class BatchedMethod(Forward):
    """`_inference`, `encode` or `predict` of one model in place of its class's method."""

    def __init__(self, model: nn.Module, kind: str, padding: Policy = "auto"):
        self.module, self.kind, self.padding = model, kind, padding
        self.name = method_of(model, kind)
        self.warned: dict[str, int] = {}
        self.cutter = KeptCutter()

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(getattr(type(self.module), self.name).__get__(self.module))

    def entries(self) -> dict[str, Any]:
        return {self.name: self, "__getstate__": self.state}

    def original(self, *args, **kwargs):
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)

    def call(self, *args, **kwargs):
        model, method = self.module, getattr(type(self.module), self.name)
        bound = inspect.signature(method).bind(model, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        texts, size = bound.args[1], given["batch_size"]
        if given.get("pool") is not None or isinstance(given.get("device"), list) or not size > 0:
            return self.original(*args, **kwargs)  # its processes call this method again, each with a part of the texts
        reason = self.why_not(texts, given)
        if reason is None:
            chunk = SHOWN_TEXTS if given.get("show_progress_bar") else CHUNK_TEXTS
            given["batch_size"] = max(size, chunk)
            try:
                tokens = given.get("output_value") == "token_embeddings"
                view = Regrouped(model, size, tokens, self.cutter).view()
                return method(view, *bound.args[1:], **bound.kwargs)
            except CannotPack as error:
                reason = str(error)
        self.warn(reason)
        if given.get("output_value", "") is None:  # the caller gets the rows of all tokens
            with reading(Reading(shows=True, why="output_value=None returns the rows of all tokens")):
                return self.original(*args, **kwargs)
        return self.original(*args, **kwargs)

    def why_not(self, texts: Any, given: dict[str, Any]) -> str | None:
        """Why this call uses the library's batches, or None."""
        model = self.module
        if reason := why_left(model, self.kind):
            return reason
        if self.padding != "zero" and (reason := why_read(model)):
            return f"{reason}, and other batches have other padding"
        if not isinstance(texts, str) and not all(map(_is_text, texts)):
            return "not all inputs are texts"
        if "output_value" in given and given["output_value"] is None:
            return "output_value=None asks for the padded batches"
        if torch.compiler.is_compiling() or getattr(model, "_compiled_call_impl", None) is not None:
            return "the model is compiled"
        if getattr(model, "_placement_is_delegated", False):
            return "hooks or a device map place its modules"
        if str(given.get("device") or model.device).startswith("hpu"):
            return "the device is an HPU"
        for module in model.modules():
            if "forward" in module.__dict__ and forward_of(module) is None:
                return f"the forward of a {type(module).__name__} was replaced"
            if tensor_hooks(module):
                return f"a {type(module).__name__} has a hook"
        return None


def _is_text(text: Any) -> bool:
    return isinstance(text, str) or (
        isinstance(text, (list, tuple)) and len(text) == 2 and all(isinstance(part, str) for part in text)
    )


class Regrouped:
    """One call: the model's own code tokenises the texts; batches by tokens are run; results get the texts' order.

    Args:
        batch_size: the caller's limit of texts computed at once. A batch has at most as many tokens as so many texts
            of the greatest length.
        tokens: whether the call returns the embeddings of tokens.
        cutter: cuts long texts.
    """

    def __init__(self, model: nn.Module, batch_size: int, tokens: bool, cutter: KeptCutter):
        self.model, self.batch_size, self.cutter = model, batch_size, cutter
        self.kept = ("sentence_embedding", "scores", *(("token_embeddings",) if tokens else ()))

    def view(self) -> nn.Module:
        """A shallow copy of the model with the two methods of this class."""
        model = self.model.eval()  # as `encode` and `predict` do
        view = object.__new__(type(model))
        view.__dict__.update(model.__dict__)
        for name in {name for names in METHODS.values() for name in names}:
            view.__dict__.pop(name, None)
        view.__dict__["forward"] = self.forward
        for name in ("preprocess", "tokenize"):
            if hasattr(type(model), name):
                view.__dict__[name] = partial(self.tokenise_apart, getattr(type(model), name).__get__(model))
        return view

    def tokenise_apart(self, tokenise: Callable[..., dict], texts: list, *args, **kwargs) -> dict[str, Any]:
        """The output of `preprocess`, with the unpadded tokens of each text under `ROWS`."""
        if not args:
            texts = cut(self.model, texts, kwargs, self.cutter)
        if len(texts) < 2:
            return tokenise(texts, *args, **kwargs)
        inside = map(forward_of, self.model[0].modules())
        anywhere = all(forward.facts.anywhere for forward in inside if isinstance(forward, EncoderForward))
        padding = getattr(self.model.tokenizer, "pad_token_id", None) or 0
        rows, rest = Rows(padding, anywhere, any(type(module).__name__ == LAST for module in self.model)), {}
        for start in range(0, len(texts), TOKENISED_TEXTS):
            rest = rows.add(dict(tokenise(texts[start : start + TOKENISED_TEXTS], *args, **kwargs)))
        return {**rest, ROWS: rows}

    def budget(self, device: torch.device) -> int:
        """The largest number of tokens in a batch."""
        budget = tokens_per_batch(device)
        longest = self.model.max_seq_length
        return budget if not longest else min(budget, self.batch_size * longest)

    def forward(self, features: dict[str, Any], **kwargs) -> dict[str, Any]:
        """The output of the model's `forward`, in the order of the texts."""
        model = self.model
        rows = features.pop(ROWS, None)
        if rows is None:
            return type(model).forward(model, features, **kwargs)
        device = model.device
        order = sorted(range(len(rows.lengths)), key=rows.lengths.__getitem__, reverse=True)
        batches = even_batches(order, rows.lengths, self.budget(device), device)
        outputs: dict[int, dict[str, Tensor]] = {}
        modes = _modes(device)

        def encode(numbers: list[int]) -> None:
            with modes(), reading(Reading()):  # `why_not` or the caller's padding="zero" allows this
                out = type(model).forward(model, {**features, **rows.batch(numbers, device)}, **kwargs)
                outputs[numbers[0]] = {name: out[name] for name in self.kept if name in out}

        if all(type(module).__module__.startswith("sentence_transformers.") for module in model):
            run_batches(encode, batches, device)
        else:  # a module that is not the library's may not support calls from several threads
            for numbers in batches:
                encode(numbers)
        return {**features, **_merged(batches, outputs, rows.lengths)}


def cut(model: nn.Module, texts: list, options: dict[str, Any], kept: KeptCutter | None = None) -> list:
    """Texts or pairs of texts, long ones cut to a beginning of which the tokenizer keeps the same tokens.

    Args:
        options: the arguments of `preprocess` besides the texts.
        kept: what further calls for this model use, too.
    """
    longest, tokenizer, first = model.max_seq_length, model.tokenizer, model[0]
    of_lengths = ("processing_kwargs", "query_length", "document_length", "query_expansion")
    if not longest or options.keys() - {"prompt", "task"} or any(getattr(first, name, None) for name in of_lengths):
        return texts  # the tokenizer may keep other tokens than the first `longest`
    if not (
        type(tokenizer).__module__.startswith("transformers.")
        and tokenizer.is_fast
        and tokenizer.truncation_side == "right"
        and tokenizer.chat_template is None
    ):
        return texts
    cutter = (kept or KeptCutter()).of(tokenizer.backend_tokenizer)
    if getattr(first, "do_lower_case", False) and not cutter.ignores_outer_spaces:
        return texts  # releases before 6 change the letters first
    of_one, of_two = (max(longest - tokenizer.num_special_tokens_to_add(pair=pair), 0) for pair in (False, True))

    prompt = options.get("prompt") or ""

    def same(whole: str, part: str) -> bool:
        # Releases before 6 strip texts.
        return cutter.ignores_outer_spaces or (whole == whole.strip() and part == part.strip())

    def beginning(text: Any) -> Any:
        if isinstance(text, str):
            part = cutter.text(prompt + text, of_one)
            return part[len(prompt) :] if same(prompt + text, part) else text
        if prompt:
            return text
        parts = cutter.pair(*text, of_two, "longest_first")
        return type(text)(parts) if all(map(same, text, parts)) else text

    return [beginning(text) for text in texts]


def _merged(batches: list[list[int]], outputs: dict[int, dict[str, Tensor]], lengths: list[int]) -> dict[str, Any]:
    """name -> the outputs of all batches in the order of the texts."""
    order = [number for batch in batches for number in batch]
    merged: dict[str, Any] = {}
    for name in outputs[order[0]]:
        parts = [outputs[batch[0]][name] for batch in batches]
        for part, batch in zip(parts, batches, strict=True):
            if not isinstance(part, Tensor) or len(part) != len(batch):
                raise CannotPack(f"{name} does not have one row for each text")
        if name == "token_embeddings":
            found = dict(zip(order, (row for part in parts for row in part), strict=True))
            merged[name] = [found[n] for n in range(len(order))]  # the library cuts each one by its mask
            merged["attention_mask"] = [torch.ones(length, dtype=torch.long, device="cpu") for length in lengths]
        else:
            places = torch.from_numpy(np.argsort(order)).to(parts[0].device)
            merged[name] = torch.cat(parts)[places]
    return merged


class Rows:
    """The tokens of each text, and padded batches of some texts.

    Args:
        padding: id of the padding token.
        anywhere: whether texts that the tokenizer pads on the left may be padded on the right.
        last: whether the last column is read, so that texts are padded on the left.
    """

    def __init__(self, padding: int, anywhere: bool = False, last: bool = False):
        self.padding, self.anywhere, self.last = padding, anywhere, last
        self.lengths: list[int] = []
        self.planes: dict[str, list[np.ndarray]] = {}

    def add(self, features: dict[str, Any]) -> dict[str, Any]:
        """Adds the tensors [texts, tokens] of a padded batch, and returns the other features."""
        mask = features.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise CannotPack("there is no attention_mask [texts, tokens]")
        left = not (mask[:, 1:] <= mask[:, :-1]).all()
        if left and not (self.anywhere and (mask[:, 1:] >= mask[:, :-1]).all()):
            raise CannotPack("texts are padded on the left")
        if self.last and not mask[:, -1].all():
            raise CannotPack("its score is read from the last column, and texts are padded on the right")
        lengths = mask.sum(1).tolist()
        if min(lengths) == 0:
            raise CannotPack("a text has no token")
        self.lengths += lengths
        rest = {}
        for name, value in features.items():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                rows, width = value.numpy(), mask.shape[1]
                spans = (slice(width - n, width) if left else slice(n) for n in lengths)
                self.planes.setdefault(name, []).extend(row[span] for row, span in zip(rows, spans, strict=True))
            elif isinstance(value, Tensor):
                raise CannotPack(f"{name} is not [texts, tokens]")
            else:
                rest[name] = value
        return rest

    def batch(self, numbers: list[int], device: torch.device) -> dict[str, Tensor]:
        """The batch of these texts, padded on the right, or on the left if the last column is read."""
        width = max(self.lengths[number] for number in numbers)
        batch = {}
        for name, plane in self.planes.items():
            fill = self.padding if name == "input_ids" else 0
            padded = np.full((len(numbers), width), fill, plane[0].dtype)
            for row, number in zip(padded, numbers, strict=True):
                first = width - self.lengths[number] if self.last else 0
                row[first : first + self.lengths[number]] = plane[number]
            batch[name] = torch.from_numpy(padded).to(device)
        return batch


def _modes(device: torch.device) -> Callable[[], contextlib.AbstractContextManager]:
    """A context manager that sets the caller's gradient mode, inference mode and autocast in another thread."""
    kind = device.type
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    @contextlib.contextmanager
    def modes():
        with torch.inference_mode(inference), torch.set_grad_enabled(grad), torch.autocast(kind, dtype, autocast):
            yield

    return modes
