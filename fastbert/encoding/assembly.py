"""Builds the parts of an Encoder: a folder's model, tokenizer and modules, changed by the caller's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import functional as F
from ..formats import opened
from ..inference.eight_bits import holds_integers, quantise
from ..inference.graphs import why_no_graphs
from ..inference.large_pages import move_to_large_pages
from ..models.bert import BertModel
from ..packing import PackedBatch
from .devices import INT8, expect_int8, resolve_device, resolve_dtype
from .folder import LAST_STATE, POOLER, Output, SentenceConfig
from .layers import layer_numbers
from .modules import (
    POOLINGS,
    Normalize,
    Pooling,
    SentenceModule,
    Truncate,
    WeightedLayerPooling,
    WordWeights,
    is_normalised,
    kinds_of,
    parts_of,
)

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

POOLING = (*POOLINGS, "pooler")


def plain_modules(pooling: str, normalize: bool) -> tuple[list[SentenceModule], Output]:
    if pooling not in POOLING:
        raise ValueError(f"pooling must be one of {POOLING}, got {pooling!r}")
    of_bert = pooling == "pooler"
    return [*([] if of_bert else [Pooling([pooling])]), *([Normalize()] if normalize else [])], (
        POOLER if of_bert else LAST_STATE
    )


def modules_of(
    sentence: SentenceConfig, pooling: str | None, normalize: bool | None, truncate_dim: int | None
) -> tuple[list[SentenceModule], Output]:
    """The folder's modules and BERT's output, changed by the caller's arguments; None leaves the folder's setting."""
    if sentence.modules is None:
        modules, output = plain_modules(sentence.pooling, sentence.normalize)
    else:
        modules, output = list(sentence.modules), sentence.output
    if pooling is not None:
        kinds = kinds_of(modules)
        if kinds[:1] != ["Pooling"] or kinds[1:] not in ([], ["Normalize"]) or output != LAST_STATE:
            raise ValueError(f"pooling {pooling!r} cannot replace the model's modules {', '.join(kinds)}")
        include_prompt = modules[0].include_prompt
        modules, output = plain_modules(pooling, len(kinds) > 1)
        for own in parts_of(modules, Pooling):
            own.include_prompt = include_prompt
    if normalize is False and is_normalised(modules):
        if not isinstance(modules[-1], Normalize):
            raise ValueError("normalize=False is not possible: the routes of the model's Router end in Normalize")
        modules.pop()
    truncate_dim = sentence.truncate_dim if truncate_dim is None else truncate_dim
    if truncate_dim is not None:
        modules.append(Truncate(truncate_dim))
    if normalize and not is_normalised(modules):
        modules.append(Normalize())
    return modules, output


def expect_words(name: str | Path, tokenizer: Tokenizer, model: BertModel, modules: Sequence[SentenceModule]) -> None:
    """Raises ValueError if the tokenizer has more words than the model, or than a table of word weights."""
    words = [("the model", model.config.vocab_size)]
    words += [("WordWeights", module.emb_layer.num_embeddings) for module in parts_of(modules, WordWeights)]
    for of, count in words:
        if tokenizer.vocab_size > count:
            raise ValueError(f"{name}: the tokenizer knows {tokenizer.vocab_size} words, {of} {count}")


def expect_padding_on_the_right(folder: Path, tokenizer: Tokenizer) -> None:
    """Raises ValueError if a folder's tokenizer pads on the left. With such a tokenizer transformers numbers a text's
    positions after its padding, so the text's vector depends on the longest text of its batch.
    """
    side, file = tokenizer.config.get("padding_side", "right"), folder / "tokenizer_config.json"
    if side != "right":
        raise ValueError(
            f"{file}: the setting 'padding_side' = {side!r} is not supported: "
            "a text's vector would depend on how long the other texts of its batch are"
        )


def keep_layers(model: BertModel, layer: int, output: Output, all_layers: bool) -> Output:
    """Removes the pooler and the layers whose outputs are not used; returns the output to read afterwards.

    Args:
        layer: the layer whose output is pooled, as an index into hidden_states; -1 leaves that to `output`.
        all_layers: whether the output of every layer is used.
    """
    count = len(model.encoder["layer"])
    if not -count - 1 <= layer <= count:
        raise ValueError(f"layer must be {-count - 1} to {count} for a model of {count} layers, got {layer}")
    if layer not in (-1, count):
        if output == POOLER:
            raise ValueError(f'pooling "pooler" reads the last layer, so layer must be -1 or {count}, got {layer}')
        if output.keys != LAST_STATE.keys or all_layers:
            raise ValueError(f"layer {layer} cannot be pooled: the model's modules say which layers are read")
        output = Output(output.name, ("hidden_states", layer))
    if "pooler_output" not in output.keys:
        model.pooler = None
    if output.keys[0] == "hidden_states" and not all_layers:
        number = output.keys[1]
        if not -count - 1 <= number <= count:
            raise ValueError(f"a model of {count} layers has no hidden_states[{number}]")
        model.encoder["layer"] = model.encoder["layer"][: number if number >= 0 else count + 1 + number]
        return Output(output.name)
    return output


# Numbers of random words in the texts that calibrate int8. Most are short, because short texts lose most in 8 bits:
# much of their vector is from the first and the last token, which have the largest outliers.
SAMPLE_WORDS = [*range(1, 7)] * 20 + [62] * 6


def run_on_random_words(model: BertModel, special: Sequence[int] = ()) -> None:
    """Runs the model on short texts of random words, which show its layers nearly the same activations as real texts do
    (benchmarks/log/int8.md). special: the ids of an empty text; the first one begins each text, and the others end it.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    most = model.config.max_position_embeddings - len(special)
    lengths = [min(count, most) for count in SAMPLE_WORDS]
    size = (sum(lengths),)
    words = torch.randint(model.config.vocab_size, size, generator=generator, dtype=torch.int64, device="cpu")
    texts = [[*special[:1], *text.tolist(), *special[1:]] for text in words.split(lengths)]
    model(PackedBatch.from_lists(texts, device=model.device))


def loaded_parts(
    id_or_path: str | Path,
    *,
    pooling: str | None,
    normalize: bool | None,
    layer: int,
    dtype: str | torch.dtype,
    device: str | torch.device,
    max_length: int | None,
    impl: F.Impl | None,
    cuda_graphs: bool | None,
    truncate_dim: int | None,
    layers: Sequence[int] | None,
) -> tuple[BertModel, Tokenizer, dict[str, Any]]:
    """(model, tokenizer, options of `Encoder`); arguments and errors as in `Encoder.from_pretrained`."""
    from ..text.tokenizer import Tokenizer

    device = resolve_device(device)
    int8 = dtype in (INT8, torch.int8)
    if int8:
        expect_int8(device, impl)
    dtype = resolve_dtype("auto" if int8 else dtype, device)
    F.choose_impl(impl, device)
    with opened(id_or_path) as path:
        sentence = SentenceConfig.from_folder(path)
        inside = path / sentence.encoder if sentence.encoder else path
        tokenizer = Tokenizer.from_pretrained(inside)
        expect_padding_on_the_right(inside, tokenizer)
        to_move = device.type == "cpu" and not int8
        model = BertModel.from_pretrained(inside, dtype=None if to_move else dtype, device=device, impl=impl)
    modules, output = modules_of(sentence, pooling, normalize, truncate_dim)
    expect_words(id_or_path, tokenizer, model, modules)
    all_layers = sentence.output_hidden_states
    if all_layers is None:
        all_layers = model.config.output_hidden_states
    if layers is not None:
        layers = layer_numbers(layers, len(model.encoder["layer"]))
        if layer != -1:
            raise ValueError("give layer, whose output is pooled, or layers, whose outputs are combined, not both")
        if output == LAST_STATE:
            layer = max(layers)
    output = keep_layers(model, layer, output, all_layers and bool(parts_of(modules, WeightedLayerPooling)))
    if int8 and not holds_integers(model):
        quantise(model.encoder, partial(run_on_random_words, model, tokenizer.input_ids([""])[0]))
    if to_move:
        move_to_large_pages(model, dtype)
    if cuda_graphs or (cuda_graphs is None and why_no_graphs(model, impl) is None):
        model.use_cuda_graphs()
    max_lengths = sentence.max_lengths if max_length is None else {}
    if max_length is None and sentence.max_length is not None:
        max_length = min(sentence.max_length, model.config.max_position_embeddings)
    return model, tokenizer, {
        "modules": modules, "output": output, "output_hidden_states": all_layers, "layers": layers,
        "max_length": max_length, "max_lengths": max_lengths, "lowercase": sentence.lowercase,
        "prompt": sentence.prompt, "prompts": sentence.prompts,
    }  # fmt: skip
