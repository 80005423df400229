"""Reads a sentence-transformers folder's settings, as sentence-transformers 6.2 reads them.

    modules.json                        the modules, in order; without this file: BERT and the mean of its tokens
    sentence_bert_config.json           settings of the Transformer: the longest text, which output is pooled
    config_sentence_transformers.json   prompts, truncate_dim
    1_Pooling/config.json, 2_Dense/...  settings and weights of the other modules

Every setting is honoured, or known to change no vector, or refused by name.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..checkpoint import load_into, load_state_dict
from ..formats.detect import find_source
from ..formats.sentence_folder import (
    LIBRARY,
    MODULES,
    ROUTERS,
    Listed,
    Routes,
    has_modules,
    listed_modules,
    read_transformer_settings,
)
from ..storage import read_json
from .modules import (
    TOKENS,
    VECTOR,
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    Router,
    SentenceModule,
    Truncate,
    WeightedLayerPooling,
    WordWeights,
    is_normalised,
    modes_of,
)
from .settings import ANY, Settings

# sentence-transformers' prompts for these names if a folder has none.
NO_PROMPTS = {"query": "", "document": ""}
_OF_LIBRARY = {"__version__": ANY, "model_type": ANY, "similarity_fn_name": ANY, "requirements": ANY}
# Settings of finding and loading files, which change vectors by rounding at most.
_OF_LOADING = {
    "cache_dir": ANY, "force_download": ANY, "local_files_only": ANY, "token": ANY, "use_auth_token": ANY,
    "trust_remote_code": ANY, "resume_download": ANY, "proxies": ANY, "revision": (None, "main"),
    "subfolder": (None, ""),
}  # fmt: skip
_OF_MODEL = _OF_LOADING | {
    "dtype": ANY, "torch_dtype": ANY, "attn_implementation": ANY, "device_map": ANY, "low_cpu_mem_usage": ANY,
    "use_safetensors": ANY, "weights_only": ANY, "output_loading_info": (False,),
}  # fmt: skip
_OF_CONFIG = _OF_LOADING | {
    "dtype": ANY, "torch_dtype": ANY, "attn_implementation": ANY, "use_cache": ANY, "return_dict": (True,),
    "output_attentions": ANY,
}  # fmt: skip
_OF_PROCESSOR = _OF_LOADING | {"use_fast": ANY, "clean_up_tokenization_spaces": ANY, "padding_side": ("right",)}
_OF_PROCESSING = {
    "padding": ANY, "padding_side": ("right",), "pad_to_multiple_of": ANY, "return_tensors": ("pt",), "verbose": ANY,
    "truncation": (True, "longest_first", "only_first"), "add_special_tokens": (True,), "stride": (0,),
    "return_attention_mask": (True,), "return_token_type_ids": ANY, "return_special_tokens_mask": ANY,
    "return_offsets_mapping": ANY, "is_split_into_words": (False,), "logits_to_keep": ANY,
}  # fmt: skip
_OF_TRANSFORMER = {"backend": ANY, "unpad_inputs": ANY, "cache_dir": ANY, "query_expansion": (None,),
                   "tokenizer_name_or_path": (None,), "transformer_task": ("feature-extraction",)}  # fmt: skip


class Output(NamedTuple):
    """The output of BERT that the modules start from, and the name of the feature that it becomes.

    `keys` name the output: ("last_hidden_state",), ("pooler_output",), or ("hidden_states", number).
    """

    name: str = TOKENS
    keys: tuple[str | int, ...] = ("last_hidden_state",)


LAST_STATE, POOLER = Output(), Output(VECTOR, ("pooler_output",))


@dataclass(frozen=True)
class SentenceConfig:
    """The settings of a folder; the defaults are sentence-transformers' for a plain BERT.

    Attributes:
        pooling, normalize: how vectors are made; with `modules`, a summary of these.
        max_length: longest text in tokens; None leaves that to the tokenizer.
        lowercase: lower-case the text before the tokenizer's own steps.
        prompt: put before every text, unless a call names another.
        prompts: name -> prompt.
        encoder: the folder of BERT and its tokenizer, relative to the model's.
        output: the output of BERT that the modules start from.
        output_hidden_states: whether every layer's output is needed; None leaves that to BERT's config.json.
        modules: the steps after BERT.
        max_lengths: task -> longest text, in place of max_length.
        truncate_dim: how many numbers of each vector are kept; None for all.
    """

    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None
    lowercase: bool = False
    prompt: str = ""
    prompts: Mapping[str, str] = field(default_factory=lambda: dict(NO_PROMPTS))
    encoder: str = ""
    output: Output = LAST_STATE
    output_hidden_states: bool | None = None
    modules: tuple[SentenceModule, ...] | None = None
    max_lengths: Mapping[str, int] = field(default_factory=dict)
    truncate_dim: int | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> SentenceConfig:
        """Reads modules.json and the files that it names; for a GGUF file its pooling type.

        Raises: CheckpointError for files that are missing or damaged, ValueError for modules and settings that are not
            supported.
        """
        source = find_source(folder)
        if source is not None and source.pooling is not None:
            return cls(pooling=source.pooling)
        if not has_modules(folder):
            return cls()
        library = folder / LIBRARY
        settings = Settings(library, read_json(library) if library.is_file() else {})
        # For a reranker's folder sentence-transformers makes vectors as for a plain BERT; its prompts are for
        # reranking.
        if settings.values.get("model_type", "SentenceTransformer") != "SentenceTransformer":
            return cls()
        first, *modules = listed_modules(folder)
        built: list[SentenceModule] = []
        if first.kind in ROUTERS:
            routes = Routes.read(folder, first)
            encoder = routes.encoder().path.as_posix()
            built.append(_router(folder, routes, routes.encoder()))
        elif first.kind == "Transformer":
            encoder = first.path.as_posix()
        else:
            raise ValueError(
                f"{folder / MODULES}: the first module must be a Transformer, or a Router; it is {first.kind}"
            )
        built += [module for listed in modules if (module := build_module(folder, listed)) is not None]
        read = _read_library(settings) | _read_transformer(*read_transformer_settings(folder / encoder))
        return cls(
            pooling="pooler" if read["output"] == POOLER else modes_of(built),
            normalize=is_normalised(built),
            encoder="" if encoder == "." else encoder,
            modules=tuple(built),
            **read,
        )


# ---- the library's own file ------------------------------------------------------------------------------


def _read_library(settings: Settings) -> dict[str, Any]:
    """Fields of a SentenceConfig."""
    saved = settings.take("prompts", (dict, type(None)), None) or {}
    prompts = NO_PROMPTS | {name: prompt or "" for name, prompt in saved.items()}
    if not all(isinstance(prompt, str) for prompt in prompts.values()):
        raise ValueError(f"{settings.file}: prompts must be texts")
    default = settings.take("default_prompt_name", (str, type(None)), None)
    if default is not None and default not in prompts:
        known = ", ".join(prompts)
        raise ValueError(f"{settings.file}: default_prompt_name is {default!r}, and there are prompts for {known} only")
    truncate_dim = settings.take("truncate_dim", (int, type(None)), None)
    if truncate_dim is not None:
        Truncate(truncate_dim)  # raises ValueError for an invalid number
    settings.drop(_OF_LIBRARY)
    settings.expect_empty()
    prompt = "" if default is None else prompts[default]
    return {"prompts": prompts, "prompt": prompt, "truncate_dim": truncate_dim}


# ---- Transformer -----------------------------------------------------------------------------------------


def _read_transformer(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Fields of a SentenceConfig."""
    if (file.parent / "adapter_config.json").is_file():
        raise ValueError(f"{file.parent}: adapter_config.json: weights of an adapter are not read; merge them first")
    settings = Settings(file, content)
    found: dict[str, Any] = {"lowercase": settings.take("do_lower_case", bool, False)}
    lengths = [settings.take("max_seq_length", (int, type(None)), None)]

    settings.take_part(("model_kwargs", "model_args")).drop_all(_OF_MODEL)
    config = settings.take_part(("config_kwargs", "config_args"))
    found["output_hidden_states"] = config.take("output_hidden_states", (bool, type(None)), None)
    config.drop_all(_OF_CONFIG)
    processor = settings.take_part(("processor_kwargs", "tokenizer_args"))
    lengths.append(processor.take("model_max_length", (int, type(None)), None))
    processor.drop_all(_OF_PROCESSOR)
    lengths.append(of_processing := _max_length_of_processing(settings.take_part("processing_kwargs")))

    by_task = {task: settings.take(f"{task}_length", (int, type(None)), None) for task in ("query", "document")}
    # As in sentence-transformers, a max_length in processing_kwargs overrides the lengths of tasks.
    found["max_lengths"] = {t: n for t, n in by_task.items() if n is not None} if of_processing is None else {}
    found["max_length"] = next((length for length in reversed(lengths) if length is not None), None)
    found["output"] = _output(settings)
    settings.drop(_OF_TRANSFORMER)
    settings.expect_empty()
    return found


def _max_length_of_processing(settings: Settings) -> int | None:
    """The longest text in processing_kwargs, or None. Settings for images, audio and chats change no text."""
    settings.drop(dict.fromkeys(("audio", "image", "video", "chat_template"), ANY))
    found = None
    for part in map(settings.take_part, ("text", "common")):  # the later one wins
        found = part.take("max_length", (int, type(None)), found)
        part.drop_all(_OF_PROCESSING)
    settings.expect_empty()
    return found


def _output(settings: Settings) -> Output:
    """The output of BERT that the modules start from."""
    name = settings.take("module_output_name", (str, type(None)), None)
    modalities = settings.take("modality_config", (dict, type(None)), None)
    if modalities is None:
        return LAST_STATE
    if "message" in modalities:
        raise settings.refusal("modality_config", modalities, "texts would go through a chat template")
    if name is None:
        raise ValueError(f"{settings.file}: with a modality_config the setting 'module_output_name' must be there too")
    text = Settings(f"{settings.file}: modality_config", modalities).take_part("text")
    method, keys = text.take("method", str), text.take("method_output_name", (str, list))
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    if method != "forward":
        raise text.refusal("method", method, "a BERT has forward")
    if keys not in (("last_hidden_state",), ("pooler_output",)) and not (
        len(keys) == 2 and keys[0] == "hidden_states" and type(keys[1]) is int
    ):
        known = "last_hidden_state, pooler_output and one of hidden_states"
        raise text.refusal("method_output_name", list(keys), f"a BERT's outputs are {known}")
    text.expect_empty()
    return Output(name, keys)


# ---- the modules after it --------------------------------------------------------------------------------


def build_module(folder: Path, listed: Listed) -> SentenceModule | None:
    """A module from its folder, in float32 on the CPU; None for a module that only acts in training.

    Raises: ValueError for a kind, or a setting, that is not supported; CheckpointError for damage.
    """
    if listed.kind in ROUTERS:
        return _router(folder, Routes.read(folder, listed))
    if listed.kind in _NOT_COMPUTED:
        raise ValueError(f"{folder / MODULES}: module {listed.kind!r} is not supported: {_NOT_COMPUTED[listed.kind]}")
    if listed.kind not in _BUILDERS:
        known = ", ".join(["Transformer", *_BUILDERS, "Router"])
        raise ValueError(f"{folder / MODULES}: module {listed.kind!r} is not supported; known are {known}")
    inside = folder / listed.path
    file = inside / "config.json"
    settings = Settings(file, read_json(file) if file.is_file() else {})
    module = _BUILDERS[listed.kind](settings, inside)
    settings.expect_empty()
    return module


_NOT_COMPUTED = {
    "CNN": "it reads the padding, so its vectors depend on the other texts of a batch",
    "LSTM": "after a Transformer sentence-transformers cannot run it either",
}
_WIDTH = ("embedding_dimension", "word_embedding_dimension")
# The old spelling of pooling modes, in the order in which several are joined.
_OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def _pooling(settings: Settings, folder: Path) -> SentenceModule:
    settings.take(_WIDTH, int, None)  # not used: the width is BERT's
    old = [mode for key, mode in _OLD_MODES.items() if settings.take(key, bool, False)]
    modes = settings.take("pooling_mode", (str, list), old or ["mean"])
    include_prompt = settings.take("include_prompt", bool, True)
    try:
        return Pooling([modes] if isinstance(modes, str) else modes, include_prompt)
    except ValueError as error:
        raise ValueError(f"{settings.file}: {error}") from error


def _dense(settings: Settings, folder: Path) -> SentenceModule:
    input_name = settings.take("module_input_name", str, VECTOR)
    module = Dense(
        settings.take("in_features", int),
        settings.take("out_features", int),
        bias=settings.take("bias", bool, True),
        activation=_activation(settings),
        input_name=input_name,
        output_name=settings.take("module_output_name", (str, type(None)), None) or input_name,
        use_residual=settings.take("use_residual", bool, False),
    )
    return _with_weights(module, folder)


def _activation(settings: Settings) -> nn.Module:
    """One of torch.nn's activations that take no arguments."""
    path = settings.take("activation_function", str, "torch.nn.modules.activation.Tanh")
    cls = getattr(nn, path.rpartition(".")[2], None) if path.startswith("torch.nn.") else None
    of_torch = (nn.Tanh.__module__, nn.Identity.__module__)
    try:
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ in of_torch:
            return cls()
    except TypeError:  # the class needs arguments
        pass
    raise settings.refusal("activation_function", path, "it is no activation of torch.nn that takes no arguments")


def _layer_norm(settings: Settings, folder: Path) -> SentenceModule:
    return _with_weights(LayerNorm(settings.take("dimension", int)), folder)


def _normalize(settings: Settings, folder: Path) -> SentenceModule:
    input_name = settings.take("module_input_name", str, VECTOR)
    return Normalize(input_name, settings.take("module_output_name", (str, type(None)), None) or input_name)


def _dropout(settings: Settings, folder: Path) -> None:
    settings.take("dropout", (int, float), 0.2)


def _weighted_layers(settings: Settings, folder: Path) -> SentenceModule:
    settings.take(_WIDTH, int, None)
    start, layers = settings.take("layer_start", int, 4), settings.take("num_hidden_layers", int, 12)
    weights = torch.empty(max(layers + 1 - start, 0), dtype=torch.float32, device="cpu")
    return _with_weights(WeightedLayerPooling(start, weights), folder)


def _word_weights(settings: Settings, folder: Path) -> SentenceModule:
    words = settings.take("vocab", list)
    settings.drop({"word_weights": ANY, "unknown_word_weight": ANY})  # the resulting weights are in the weights' file
    return _with_weights(WordWeights(torch.empty(len(words), 1, dtype=torch.float32, device="cpu")), folder)


_BUILDERS: dict[str, Callable[[Settings, Path], SentenceModule | None]] = {
    "Pooling": _pooling,
    "Dense": _dense,
    "LayerNorm": _layer_norm,
    "Normalize": _normalize,
    "Dropout": _dropout,
    "WeightedLayerPooling": _weighted_layers,
    "WordWeights": _word_weights,
}


def _with_weights(module: SentenceModule, folder: Path) -> SentenceModule:
    load_into(module, load_state_dict(folder), source=folder)
    return module


# ---- Router ----------------------------------------------------------------------------------------------


def _router(folder: Path, routes: Routes, encoder: Listed | None = None) -> SentenceModule:
    """A Router. folder: the model's. encoder: the BERT in front of all routes, which is computed before the Router."""
    settings = Settings(routes.file, routes.content)
    settings.drop({"types": ANY, "structure": ANY})
    parameters = settings.take_part("parameters")
    settings.expect_empty()
    default = parameters.take("default_route", (str, type(None)), None)
    if parameters.take("allow_empty_key", bool, True) and default is None:
        default = next(iter(routes.modules))
    mappings = parameters.take_part("route_mappings").values
    parameters.expect_empty()
    built: dict[Listed, SentenceModule | None] = {}  # a module on two routes is one module
    for listed in (listed for modules in routes.modules.values() for listed in modules):
        if listed != encoder and listed not in built:
            built[listed] = build_module(folder, listed)
    by_route = {
        route: [module for listed in modules if (module := built.get(listed)) is not None]
        for route, modules in routes.modules.items()
    }
    return Router(by_route, default, {_mapped(key, routes.file): route for key, route in mappings.items()})


def _mapped(key: str, file: Path) -> tuple[str | None, Any]:
    """(task, modality) of a key in route_mappings, which is the repr of a tuple: "('query', None)"."""
    try:
        task, modality = ast.literal_eval(key)
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f"{file}: route_mappings: {key!r} is no pair of a task and a modality") from None
    return task, modality
