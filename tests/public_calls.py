"""Fifty small calls of the public API, and their results: `python tests/public_calls.py` writes public_calls.json.

test_public_surface.py makes the same calls in each of the three ways to compute, and compares the results. Inputs and
weights are sines, which are the same on every machine and in every version of torch. Of a tensor, the shape, the dtype
and some numbers are kept; text is kept whole.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastbert
from fastbert import BertConfig, BertModel, PackedBatch, Tokenizer, layers
from fastbert import functional as F
from fastbert.cli.encode import SUFFIXES
from public_inputs import (
    CONFIG,
    INNER,
    LENGTHS,
    TEXTS,
    C,
    D,
    H,
    T,
    command,
    encoder,
    folder,
    gradients,
    lengths,
    model,
    qkv,
    rows,
    seed,
    wave,
    waved,
)

RECORD = Path(__file__).with_suffix(".json")
KEPT = 12  # numbers of a tensor, evenly spaced; with the tensor's sum they show most errors

CALLS: dict[str, Callable[[], Any]] = {}


def call(function: Callable[[], Any]) -> Callable[[], Any]:
    CALLS[function.__name__] = function
    return function


# ---- operators -------------------------------------------------------------------------------------------


@call
def attention():
    return F.attention(*qkv(), lengths(), max(LENGTHS))


@call
def attention_in_bfloat16():
    return F.attention(*qkv(torch.bfloat16), lengths(), max(LENGTHS))


@call
def attention_with_lse_and_scale():
    return F.attention(*qkv(), lengths(), max(LENGTHS), return_lse=True, scale=0.5)


@call
def attention_with_bias_and_mask():
    size = max(LENGTHS)
    mask = torch.ones(size, size, dtype=torch.bool).tril(3)[None, None]
    return F.attention(*qkv(), lengths(), size, bias=wave(1, H, size, size, phase=2.0), mask=mask)


@call
def attention_with_window_alibi_and_rotary():
    angles = wave(max(LENGTHS), D // 2, phase=1.0)
    slopes = torch.tensor([0.5, 0.25])
    rotary = (angles.cos(), angles.sin())
    return F.attention(*qkv(), lengths(), max(LENGTHS), window=(2, 4), alibi_slopes=slopes, rotary=rotary)


@call
def attention_with_dropout():
    return F.attention(*qkv(), lengths(), max(LENGTHS), dropout_p=0.3, seed=seed(), stream=3)


@call
def attention_across():
    q, k, v = wave(4, H, D), wave(T, H, D, phase=1.0), wave(T, H, D, phase=2.0)
    starts = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)
    return F.attention(q, k, v, starts, 1, cu_seqlens_k=lengths(), max_seqlen_k=max(LENGTHS))


@call
def attention_gradients():
    return gradients(lambda q, k, v: F.attention(q, k, v, lengths(), max(LENGTHS)), *qkv())


@call
def attention_gradients_with_dropout():
    options = {"dropout_p": 0.2, "seed": seed(), "stream": 1}
    return gradients(lambda q, k, v: F.attention(q, k, v, lengths(), max(LENGTHS), **options), *qkv())


@call
def attention_padded():
    q, k, v = wave(3, 2, 9, H, D).unbind(0)
    return F.attention_padded(q, k, v, torch.tensor([9, 4], dtype=torch.int32))


@call
def attention_with_a_schedule():
    schedule = F.attention_schedule(lengths(), T)
    return F.attention(*qkv(), lengths(), max(LENGTHS), schedule=schedule)


def norm_inputs() -> tuple[Tensor, ...]:
    return wave(T, C), wave(T, C, phase=1.0), wave(C, phase=2.0) + 1, wave(C, phase=3.0)


@call
def add_layer_norm():
    return F.add_layer_norm(*norm_inputs())


@call
def add_layer_norm_gradients_with_dropout():
    options = {"dropout_p": 0.25, "seed": seed(), "stream": 2}
    return gradients(lambda *inputs: F.add_layer_norm(*inputs, **options), *norm_inputs())


@call
def add_layer_norm_sum():
    return F.add_layer_norm_sum(*norm_inputs(), x_bias=wave(C, phase=4.0))


@call
def add_rms_norm():
    return F.add_rms_norm(*norm_inputs()[:3])


@call
def linear():
    return F.linear(wave(T, C), wave(48, C, phase=1.0), wave(48, phase=2.0))


@call
def linear_act():
    x, weight, bias = wave(T, C), wave(INNER, C, phase=1.0, scale=0.3), wave(INNER, phase=2.0)
    return [F.linear_act(x, weight, bias, activation) for activation in F.ACTIVATIONS]


@call
def feed_forward():
    up, down = wave(INNER, C, phase=1.0, scale=0.3), wave(C, INNER, phase=2.0, scale=0.3)
    return F.feed_forward(wave(T, C), up, wave(INNER, phase=3.0), down, wave(C, phase=4.0))


@call
def feed_forward_gradients():
    up, down = wave(INNER, C, phase=1.0, scale=0.3), wave(C, INNER, phase=2.0, scale=0.3)
    inputs = wave(T, C), up, wave(INNER, phase=3.0), down, wave(C, phase=4.0)
    return gradients(lambda *given: F.feed_forward(*given, "gelu_tanh", recompute=True), *inputs)


@call
def embedding_layer_norm():
    packed = PackedBatch.from_lists(rows())
    ids = packed.input_ids, torch.arange(T) % 2, packed.positions
    tables = wave(40, C), wave(32, C, phase=1.0), wave(2, C, phase=2.0), wave(C, phase=3.0) + 1, wave(C, phase=4.0)
    return F.embedding_layer_norm(*ids, *tables)


@call
def pool():
    x = wave(T, C)
    return [F.pool(x, lengths(), mode, normalize) for mode in F.POOLING_MODES for normalize in (False, True)]


def loss_inputs() -> tuple[Tensor, ...]:
    labels = torch.arange(T) % 50
    labels[3] = -100
    return wave(T, C, scale=0.5), wave(50, C, phase=1.0, scale=0.5), wave(50, phase=2.0), labels


@call
def linear_cross_entropy():
    reductions = ("mean", "sum", "none")
    return [F.linear_cross_entropy(*loss_inputs(), reduction=how, label_smoothing=0.1) for how in reductions]


@call
def linear_cross_entropy_gradients():
    hidden, weight, bias, labels = loss_inputs()
    return gradients(lambda *given: F.linear_cross_entropy(*given, labels), hidden, weight, bias)


@call
def each_impl():
    return [F.feed_forward(wave(T, C), wave(INNER, C), None, wave(C, INNER), impl=i) for i in ("native", "reference")]


# ---- layers ----------------------------------------------------------------------------------------------


@call
def multi_head_attention():
    module = waved(layers.MultiheadAttention(C, H, batch_first=True))
    x, padding = wave(2, 5, C), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return module(x, x, x, key_padding_mask=padding)[0][~padding]


@call
def encoder_layer():
    module = waved(layers.EncoderLayer(C, H, INNER, activation="gelu", batch_first=True))
    return module(wave(2, 5, C))


@call
def layer_modules():
    norm = waved(layers.AddLayerNorm(C))
    return norm(wave(T, C), wave(T, C, phase=1.0)), waved(layers.FeedForward(C, INNER))(wave(T, C))


@call
def fused_linears():
    fused = waved(layers.FusedLinears({name: torch.nn.Linear(C, C) for name in ("query", "key", "value")}))
    return fused(wave(T, C)), sorted(fused.state_dict())


# ---- models ----------------------------------------------------------------------------------------------


@call
@torch.no_grad()
def model_of_padded_rows():
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows()], batch_first=True)
    return model()(ids, attention_mask=ids != 0).to_tuple()


@call
@torch.no_grad()
def model_of_a_packed_batch():
    return model()(PackedBatch.from_lists(rows())).to_tuple()


@call
@torch.no_grad()
def model_in_bfloat16():
    return model().bfloat16()(PackedBatch.from_lists(rows())).last_hidden_state


@call
@torch.no_grad()
def model_s_states_and_attentions():
    output = model()(PackedBatch.from_lists(rows()), output_hidden_states=True)
    padded = model()(torch.tensor([rows()[0]]), output_attentions=True)
    return *output.hidden_states, *padded.attentions


@call
@torch.no_grad()
def model_within_batch_invariant():
    with fastbert.batch_invariant():
        return model()(PackedBatch.from_lists(rows())).last_hidden_state


@call
@torch.no_grad()
def model_prepacked():
    return fastbert.prepack(model())(PackedBatch.from_lists(rows())).last_hidden_state


@call
def model_gradients():
    trained = model()
    output = trained(PackedBatch.from_lists(rows()))
    output.last_hidden_state.backward(wave(T, C, phase=9.0))
    return [p.grad for name, p in trained.named_parameters() if "pooler" not in name and "key.bias" not in name]


@call
def model_saved_and_loaded():
    loaded = BertModel.from_pretrained(folder())
    return sorted(loaded.state_dict()), loaded.state_dict()["encoder.layer.1.output.dense.weight"]


@call
def packed_batch():
    packed = PackedBatch.from_padded(torch.tensor([[1, 2, 0], [0, 3, 4]]), torch.tensor([[1, 1, 0], [0, 1, 1]]))
    fields = packed.input_ids, packed.token_type_ids, packed.positions, packed.cu_seqlens, packed.first_tokens
    return *fields, packed.pad(wave(4, 2)), packed.unpad(wave(2, 3, 2)), packed.row_ids()


@call
def config():
    return json.dumps(BertConfig.base(num_labels=3).to_dict(), sort_keys=True)


# ---- text ------------------------------------------------------------------------------------------------


@call
def tokenizer():
    made = Tokenizer.from_pretrained(folder())
    encoded = made(TEXTS)
    return json.dumps([encoded.input_ids, made.tokenize("abc naïve"), made.decode([5, 6, 33]), made.vocab_size])


@call
def tokenizer_of_pairs():
    made = Tokenizer.from_pretrained(folder())
    encoded = made(["a b", "c"], ["d e f", "g"])
    return json.dumps([encoded.input_ids, encoded.token_type_ids])


@call
def encoder_of_texts():
    made = encoder()
    return made.encode(TEXTS), made.encode("a b"), json.dumps([made.stats.texts, made.stats.tokens])


@call
def encoder_poolings():
    return [encoder(pooling=how, normalize=True).encode(TEXTS) for how in ("mean", "cls", "max", "pooler")]


@call
def encoder_of_a_lower_layer_and_short_texts():
    return encoder(layer=1, max_length=4).encode(TEXTS)


@call
def encoder_in_small_batches_and_streams():
    made = encoder()
    return made.encode(TEXTS, max_tokens_per_batch=8), *made.encode_stream(TEXTS, chunk_size=4)


# ---- other libraries' models -----------------------------------------------------------------------------


@call
@torch.no_grad()
def transformers_accelerated_and_restored():
    import transformers

    config = transformers.BertConfig(**{**CONFIG.to_dict(), "pad_token_id": 0})
    theirs = waved(transformers.BertModel(config))
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows()], batch_first=True)
    fastbert.accelerate(theirs)
    mask = ids != 0
    ours = theirs(ids, attention_mask=mask).last_hidden_state[mask]
    fastbert.restore(theirs)
    return ours, theirs(ids, attention_mask=mask).last_hidden_state[mask], sorted(theirs.state_dict())


@call
@torch.no_grad()
def torch_encoder_accelerated():
    layer = torch.nn.TransformerEncoderLayer(C, H, INNER, activation="gelu", batch_first=True)
    theirs = waved(torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    fastbert.accelerate(theirs)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return theirs(wave(2, 5, C), src_key_padding_mask=padding)[~padding]


# ---- the command line ------------------------------------------------------------------------------------


@call
def command_encode():
    """Writes three kinds of file, and standard output."""
    place = folder()
    (place / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    common = ["encode", place / "texts.txt", "--model", place, "--device", "cpu", "--dtype", "float32"]
    said = [command(*common, "-o", place / f"out{suffix}") for suffix in SUFFIXES]
    lines = (place / "out.jsonl").read_text().splitlines()
    vectors = torch.tensor([json.loads(line)["embedding"] for line in lines])
    return vectors, json.dumps(said), json.dumps([json.loads(line)["text"] for line in lines])


@call
def command_wrong():
    return json.dumps([command("encode"), command("encode", "nowhere.txt", "-o", "out.csv"), command("nothing")])


@call
def command_info():
    """Only the headings and the operators; the rest depends on the machine."""
    said = command("info").splitlines()
    names = [line.split()[0] for line in said if line.startswith("  ")]
    headings = [line for line in said if line and not line.startswith("  ")]
    return json.dumps([sorted({*F.TRITON_MODULES} & {*names}), headings[0], headings[-1]])


@call
def command_verify():
    words = ("verify", "--op", "pool", "--op", "add_rms_norm", "--dtype", "fp32", "--impl", "native", "--device", "cpu")
    report = json.loads(command(*words, "--json").rsplit("exit code", 1)[0])
    return json.dumps(sorted({*report}))


# ---- what is kept ----------------------------------------------------------------------------------------


def kept(value: Any) -> Any:
    """A tensor as (dtype, shape, sum of magnitudes, some numbers), anything else unchanged, in lists."""
    if isinstance(value, (list, tuple)):
        return [kept(item) for item in value]
    if not isinstance(value, Tensor):
        return value
    flat = value.detach().flatten().double()
    some = flat[torch.linspace(0, len(flat) - 1, min(KEPT, len(flat))).long()] if len(flat) else flat
    total = flat[flat.isfinite()].abs().sum().item()
    numbers = [float(f"{x:.7g}") if math.isfinite(x) else str(x) for x in [total, *some.tolist()]]
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "numbers": numbers}


if __name__ == "__main__":
    made = {name: kept(function()) for name, function in CALLS.items()}
    RECORD.write_text(json.dumps(made, indent=None).replace('}, "', '},\n"').replace('], "', '],\n"') + "\n")
    print(f"{len(made)} calls", file=sys.stderr)
