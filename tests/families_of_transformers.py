"""Compares each text model of the installed transformers, built small, with itself accelerated.

    python -m tests.families_of_transformers                 all models, in minutes; makes the table of docs/families.md
    python -m tests.families_of_transformers bert esm        only these model types

A model whose outputs differ from the original's is a fault, and the exit status is 1. `make full` runs it.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import signal
import sys
import warnings
from contextlib import contextmanager, suppress

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import fastbert

WORDS, PADDING = 99, 1
# small sizes, under the names that configs use: heads of 16 columns and widths that the C++ operators take
SMALL = {
    64: ("hidden_size", "d_model", "dim", "embedding_size", "input_embedding_size", "output_embedding_size"),
    2: ("num_hidden_layers", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_key_value_heads",
        "type_vocab_size"),
    4: ("num_attention_heads", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
    96: ("intermediate_size", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff"),
    16: ("d_kv", "head_dim"),
    66: ("max_position_embeddings", "n_positions"),
    WORDS: ("vocab_size",),
}  # fmt: skip
# settings that a small config needs beside its defaults
MORE = {
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    "esm": {"pad_token_id": PADDING, "mask_token_id": 4, "vocab_size": WORDS, "position_embedding_type": "rotary"},
    "esm (absolute)": {"pad_token_id": PADDING, "mask_token_id": 4, "vocab_size": WORDS},
    "gemma3_text (bidirectional)": {"use_bidirectional_attention": True, "sliding_window": 20},
    "esmc": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
}
# encoders without a model type of their own
TOWERS = {
    "align (text)": ("AlignTextModel", "AlignTextConfig"),
    "altclip (text)": ("AltCLIPTextModel", "AltCLIPTextConfig"),
    "bridgetower (text)": ("BridgeTowerTextModel", "BridgeTowerTextConfig"),
    "chinese_clip (text)": ("ChineseCLIPTextModel", "ChineseCLIPTextConfig"),
    "clap (text)": ("ClapTextModel", "ClapTextConfig"),
    "clip (text)": ("CLIPTextModel", "CLIPTextConfig"),
    "clipseg (text)": ("CLIPSegTextModel", "CLIPSegTextConfig"),
    "esm (absolute)": ("EsmModel", "EsmConfig"),
    "gemma3_text (bidirectional)": ("Gemma3TextModel", "Gemma3TextConfig"),
    "metaclip_2 (text)": ("MetaClip2TextModel", "MetaClip2TextConfig"),
    "mt5 (encoder)": ("MT5EncoderModel", "MT5Config"),
    "owlv2 (text)": ("Owlv2TextModel", "Owlv2TextConfig"),
    "owlvit (text)": ("OwlViTTextModel", "OwlViTTextConfig"),
    "siglip (text)": ("SiglipTextModel", "SiglipTextConfig"),
    "siglip2 (text)": ("Siglip2TextModel", "Siglip2TextConfig"),
    "t5 (encoder)": ("T5EncoderModel", "T5Config"),
    "umt5 (encoder)": ("UMT5EncoderModel", "UMT5Config"),
    "x_clip (text)": ("XCLIPTextModel", "XCLIPTextConfig"),
}
LARGEST = 30_000_000  # parameters; a larger config is one that SMALL does not shrink
SECONDS = 30  # limit for building a model, and for running it
TOLERANCE = 1e-5  # for numbers near 1 in float32


def shrink(config: transformers.PreTrainedConfig, depth: int = 0) -> transformers.PreTrainedConfig:
    for value, names in SMALL.items():
        for name in names:
            if isinstance(getattr(config, name, None), int):
                # some names are properties that stand for several sizes, and cannot be set
                with suppress(ValueError, NotImplementedError, AttributeError):
                    setattr(config, name, value)
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PreTrainedConfig) and depth < 2:
            shrink(value, depth + 1)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id"):
        if isinstance(getattr(config, name, None), int) and getattr(config, name) >= WORDS:
            setattr(config, name, PADDING if name == "pad_token_id" else 2)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return config


@contextmanager
def limit(seconds: int):
    def over(*_):
        raise TimeoutError(f"over {seconds} s")

    signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def class_of(name: str) -> type:
    if name == "BridgeTowerTextModel":  # not exported
        return importlib.import_module("transformers.models.bridgetower.modeling_bridgetower").BridgeTowerTextModel
    return getattr(transformers, name)


def build(kind: str) -> torch.nn.Module:
    more = MORE.get(kind, {})
    if kind in TOWERS:
        cls, of = map(class_of, TOWERS[kind])
        config = shrink(of(**more))
    else:
        cls, config = None, shrink(transformers.AutoConfig.for_model(kind, **more))
    for name, value in more.items():
        setattr(config, name, value)
    made = transformers.AutoModel.from_config(config) if cls is None else cls(config)
    if sum(p.numel() for p in made.parameters()) > LARGEST:
        raise ValueError("it stays large")
    for p in made.parameters():
        if p.is_floating_point():
            torch.nn.init.normal_(p, std=0.2)
    if hasattr(made.config, "use_cache"):
        made.config.use_cache = False  # a decoder that returns a cache is not accelerated
    return made.eval()


def batch_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    mask = (torch.arange(12) < torch.tensor([12, 7, 3])[:, None]).long()
    padding = getattr(model.config, "pad_token_id", None)
    padding = padding if isinstance(padding, int) and 0 <= padding < WORDS else 0
    return {"input_ids": torch.where(mask == 1, torch.randint(5, 90, mask.shape), padding), "attention_mask": mask}


def outcome(kind: str) -> tuple[str, str, str] | None:
    """(class, "equal", "left alone" or "DIFFERENT", error or reason). None: the model does not read text alone, or
    cannot be built small."""
    torch.manual_seed(0)
    try:
        with limit(SECONDS), torch.no_grad():
            model = build(kind)
            batch = batch_of(model)
            torch.manual_seed(1)  # some models draw random numbers in evaluation too
            expected = model(**batch)[0]
    except Exception as error:
        print(f"{kind}: not built, or reads more than ids: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
        return None
    name = type(model).__name__
    try:
        with torch.no_grad():
            ours = fastbert.accelerate(copy.deepcopy(model), impl="native", padding="exact")
            torch.manual_seed(1)
            error = (ours(**batch)[0] - expected).abs().max().item()
    except Exception as raised:
        return name, "DIFFERENT", f"raises {type(raised).__name__}: {str(raised)[:100]}"
    report = fastbert.explain(ours)
    if not error <= TOLERANCE * max(1.0, expected.abs().max().item()):
        return name, "DIFFERENT", f"{error:.1e}"
    if any("unpads once" in done for done in report.replaced.values()):
        own = [why for why in report.left.values() if "own code:" in why]
        return name, "left alone" if own else "equal", own[0] if own else f"{error:.0e}"
    return name, "left alone", next(iter(report.left.values()), "only parts of it are torch's")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", help="model types of transformers; default: all")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = {kind: outcome(kind) for kind in args.kinds or sorted([*MODEL_MAPPING_NAMES, *TOWERS])}
    found = {kind: row for kind, row in found.items() if row is not None}
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{versions}, float32, three texts of 12, 7 and 3 tokens\n")
    print("| model type | class | accelerated | largest difference, or why not |\n|---|---|---|---|")
    for kind, row in sorted(found.items(), key=lambda item: (item[1][1], item[0])):
        print(f"| {kind} | {' | '.join(row)} |")
    count = [row[1] for row in found.values()]
    print("\n" + ", ".join(f"{count.count(each)} {each.lower()}" for each in ("equal", "left alone", "DIFFERENT")))
    return 1 if "DIFFERENT" in count else 0


if __name__ == "__main__":
    sys.exit(main())
