"""`fastbert quantize`: writes a model with its linear layers in 8 bits, after training or trained for that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import save_state_dict
from ..config import BertConfig
from ..encoding.devices import expect_int8
from ..formats.integers import described, put_in
from ..inference.eight_bits import replace_linears
from ..inference.training_in_8_bits import TrainedInt8Linear, integers_of
from ..models.bert import BertModel
from ..packing import PackedBatch
from ..storage import write_json
from ..text.files import read_lines
from ..text.tokenizer import Tokenizer
from ..training.files import DataError
from ..training.pipeline import SPEC_FILE, spec_in
from ..training.predicting import pack
from ..training.shaping import Shaping
from .folders import Model, add_step, digest_of, expect_free, reading, write
from .quantize_plan import Outputs, Plan, in_training, make_plan
from .sampling import sample, task_model

TEXTS = 256  # texts for calibration
FEWEST_TEXTS = 16
MOST_TOKENS = 8192  # most tokens of these texts, which are computed at once
# Layers outside of the encoder that are not quantised: they compute the logits of a few labels.
_HEADS = ("classifier.", "qa_outputs.")


@dataclass(frozen=True)
class Settings:
    """How layers are chosen, and the dtype of the others.

    Attributes:
        percentile, smooth, error: see `quantize_plan.make_plan`.
        texts: number of texts for calibration, drawn by `seed`.
        dtype: of all weights that are not in 8 bits.
    """

    percentile: float | None = None
    smooth: bool = True
    error: float | None = None
    texts: int = TEXTS
    seed: int = 0
    dtype: torch.dtype = torch.bfloat16


def quantize(model: str, out: Path, data: str, settings: Settings) -> dict[str, Any]:
    """Writes the folder. Returns the new record in its compression.json. data: examples as `fastbert predict` reads
    them, or lines of text for a model without a task.

    Raises: DataError, ValueError or CheckpointError, in one line; nothing is written then.
    """
    expect_products()
    expect_free(out)
    with reading(model) as source:
        network, outputs = calibrating(source, data, settings)
        plan = make_plan(network, outputs, settings.percentile, settings.smooth, settings.error)
        config, state, about = stored(source.config, source.state, plan, settings.dtype)
        record = {
            "command": "quantize", "model": model, "data": data, **asked(settings), **plan.record(),
            "before": {"bytes": source.nbytes}, "after": {"bytes": sum(t.nbytes for t in state.values())},
            "notes": notes(settings),
        }  # fmt: skip
        write(replace(source, config=config, state=state), out, record, about)
    return record


def expect_products() -> None:
    """Raises ValueError if this machine has no products in 8 bits, so that their error cannot be measured."""
    expect_int8(torch.device("cpu"), "native")


def asked(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values."""
    return {
        "calibration texts": settings.texts, "percentile": settings.percentile, "smoothing": settings.smooth,
        "largest error": settings.error, "the rest in": str(settings.dtype).removeprefix("torch."),
    }  # fmt: skip


def notes(settings: Settings) -> list[str]:
    """Notes for those who load the folder."""
    if not settings.smooth:
        return ["the layout is compressed-tensors' int-quantized"]
    return [
        "the layout is compressed-tensors' int-quantized with factors for the inputs, which other libraries refuse; "
        "--no-smooth writes what they read, a little less exact"
    ]


# ---- calibration -----------------------------------------------------------------------------------------


def calibrating(source: Model, data: str, settings: Settings) -> tuple[nn.Module, Outputs]:
    """(the model in float32, a function that returns its outputs for the calibration data)."""
    spec = spec_in(source.path / SPEC_FILE)
    if spec is None:
        return _encoder(source, data, settings)
    network, task = task_model(source, "native")
    examples = sample(task.read(data, gold=False), settings.texts, settings.seed)
    expect_texts(len(examples), data)
    return network, outputs_of_task(network, task, task.features(examples, training=False).windows)


def expect_texts(count: int, data: str) -> None:
    if count < FEWEST_TEXTS:
        raise DataError(f"{data} has {count} texts: calibration needs at least {FEWEST_TEXTS}, better hundreds")


def outputs_of_task(network: nn.Module, task: Any, windows: list[Any]) -> Outputs:
    """A function that returns the logits of the first windows, of as many as are computed at once."""
    chosen = within(windows, lambda window: len(window.input_ids))
    batch = pack(chosen, range(len(chosen)), torch.device("cpu"))

    def outputs() -> Tensor:
        found = network(batch)
        return found.logits if hasattr(found, "logits") else torch.stack((found.start_logits, found.end_logits), 1)

    return outputs


def within(items: Sequence[Any], length: Callable[[Any], int]) -> list[Any]:
    """The first items, as many as have MOST_TOKENS together, and at least one."""
    ends = accumulate(map(length, items))
    return [item for place, (item, end) in enumerate(zip(items, ends, strict=True)) if place == 0 or end <= MOST_TOKENS]


def _encoder(source: Model, data: str, settings: Settings) -> tuple[nn.Module, Outputs]:
    with open(data, "rb") as stream:
        texts = [line.text for line in read_lines(stream, data) if line.text.strip()]
    texts = sample(texts, settings.texts, settings.seed)
    expect_texts(len(texts), data)
    network = BertModel.from_pretrained(source.home, dtype=torch.float32, impl="native", add_pooling_layer=False)
    tokenizer = Tokenizer.from_pretrained(source.home)
    longest = min(128, network.config.max_position_embeddings)
    batch = PackedBatch.from_lists(within(tokenizer.input_ids(texts, max_length=longest), len))
    return network, lambda: network(batch).last_hidden_state


# ---- storing ---------------------------------------------------------------------------------------------


def stored(
    config: BertConfig, state: dict[str, Tensor], plan: Plan, dtype: torch.dtype
) -> tuple[BertConfig, dict[str, Tensor], dict[str, Any]]:
    """(config, weights, content of config.json) of the model with the layers of the plan in 8 bits.

    The biases of these layers are float32, in which they are added; the rest of the encoder is in `dtype`.
    """
    factors = {name.removeprefix("bert."): f for name, f in plan.factors.items()}
    written: dict[str, Tensor] = {}
    for name, t in state.items():
        layer, _, kind = name.rpartition(".")
        bare = layer.removeprefix("bert.")
        if bare in factors and kind == "weight":
            put_in(written, layer, integers_of(t, factors[bare]))
        elif (bare in factors and kind == "bias") or name.startswith(_HEADS):
            written[name] = t.float()
        else:
            written[name] = t.to(dtype) if t.is_floating_point() else t
    config = copy.copy(config)
    config.dtype = str(dtype).removeprefix("torch.")
    linears = [name.removesuffix(".weight") for name, t in state.items() if name.endswith(".weight") and t.dim() == 2]
    ignored = [name for name in linears if name.removeprefix("bert.") not in factors and "embeddings" not in name]
    smooth = any(f is not None for f in factors.values())
    return config, written, {**config.to_dict(), "quantization_config": described(ignored, smooth)}


# ---- training --------------------------------------------------------------------------------------------


class QuantisedTraining(Shaping):
    """Fine-tuning with the products of 8-bit integers. The model is stored as `quantize` stores it."""

    def __init__(self, settings: Settings, name: str) -> None:
        """name: path or id of the model that is trained."""
        self.settings, self.name = settings, name
        self.plan: Plan | None = None
        self._model: nn.Module | None = None
        self._digest = ""

    def binding(self) -> dict[str, Any]:
        chosen = {name: value for name, value in asked(self.settings).items() if name != "the rest in"}
        # A resumed run makes the same plan again, from the model with which the run began.
        return {"in 8 bits": {**chosen, "model of SHA-256": self._digest}}

    def prepare(self, model: nn.Module, task: Any, windows: Any) -> None:
        chosen = sample(windows, self.settings.texts, self.settings.seed)
        expect_texts(len(chosen), "the training file")
        self._digest = digest_of(model.state_dict())
        model.eval()
        s = self.settings
        self.plan = make_plan(model, outputs_of_task(model, task, chosen), s.percentile, s.smooth, s.error)
        in_training(model, self.plan.factors)
        self._model = model

    def keeps_first(self) -> bool:
        """True: before the first step the model is quantised by calibration alone, which training should improve."""
        return True

    def served(self, model: nn.Module) -> nn.Module:
        frozen = copy.deepcopy(self._model)
        made = {module: module.frozen() for module in frozen.modules() if isinstance(module, TrainedInt8Linear)}
        replace_linears(frozen, made)
        frozen.bert.to(self.settings.dtype)
        return frozen

    def save(self, model: nn.Module, out: Path, state: dict[str, Tensor]) -> None:
        config = copy.copy(model.config)
        config.architectures = [type(model).__name__]
        _, written, about = stored(config, state, self.plan, self.settings.dtype)
        write_json(out / "config.json", about)
        save_state_dict(out, written)
        add_step(self.name, out, self.record())

    def record(self) -> dict[str, Any]:
        """The record for HISTORY."""
        return {
            "command": "quantize --train", "model": self.name, **asked(self.settings), **self.plan.record(),
            "notes": notes(self.settings),
        }  # fmt: skip
