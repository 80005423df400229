"""Compares encoding on a CPU with other libraries, in turns in one process: tokens a second, from ids to vectors.

    python -m benchmarks.suites.cpu_peers --cache FOLDER [--texts 128] [--repeats 3] [--models minilm base]
        [--precisions int8 float32 bfloat16] [--json FILE]

Each peer has its best settings: batches of sorted texts with at most 256 or 512 padded tokens, whichever is faster;
OpenVINO with its throughput hint, and in int8 with NNCF's static quantisation for transformers; ONNX Runtime with its
transformer fusions, in int8 with `per_channel=True`; CTranslate2 in its own int8 or in float32. Converted models are
kept in FOLDER. The model has MiniLM's or BERT-base's shape and random weights, and the texts are Python's docstrings,
so nothing has to be downloaded. A peer that is not installed is named and skipped. Wrong vectors of a peer end the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.harness.docstrings import docstrings
from fastbert import BertConfig, BertModel
from fastbert.encoding.assembly import run_on_random_words
from fastbert.encoding.encoder import Encoder
from fastbert.inference.eight_bits import quantise
from fastbert.inference.large_pages import move_to_large_pages

SHAPES = {"minilm": (384, 6, 12, 1536), "base": (768, 12, 12, 3072)}
PADDED_TOKENS = (256, 512)
WORDS, LONGEST = 30528, 256
# The mean cosine of a row's vectors with our bfloat16 ones must be above this; ONNX Runtime's int8 has 0.99.
LEAST_COSINE = 0.95
Ids = Sequence[Sequence[int]]
Batches = Iterable[tuple[np.ndarray, np.ndarray]]
Run = Callable[[Ids], np.ndarray]
RunBatches = Callable[[Batches], list[np.ndarray]]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.cpu_peers", description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="folder for converted models")
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=[*SHAPES])
    parser.add_argument("--precisions", nargs="+", choices=tuple(PEERS), default=[*PEERS])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)
    found = []
    for name in args.models:
        found += compare(name, args.cache / name, ids_of_texts(args.texts), args.repeats, args.precisions)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(name: str, folder: Path, ids: Ids, repeats: int, precisions: Sequence[str]) -> list[dict[str, object]]:
    """Prints a table and returns its rows: median, slowest and fastest tokens a second, and the median ratio of the
    row's time to ours in the same precision; for our rows, to ours in bfloat16."""
    tokens = sum(map(len, ids))
    saved = folder / "model"
    if not saved.exists():
        save(SHAPES[name], saved)
    own = dict.fromkeys(["bfloat16", *precisions])  # int8 is compared with bfloat16 too
    runs: dict[str, Run] = {f"fastbert {precision}": ours(saved, precision) for precision in own}
    compared = {f"fastbert {precision}": "fastbert bfloat16" for precision in own}
    for precision in precisions:
        for label, make in PEERS[precision].items():
            try:
                run = make(saved, folder)
            except ImportError as error:
                print(f"{label} {precision}: not installed ({error})")
                continue
            for most in PADDED_TOKENS:
                row = f"{label} {precision}, {most} padded tokens a batch"
                runs[row], compared[row] = partial(in_batches, run, most), f"fastbert {precision}"
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    expected = None
    for _ in range(repeats + 1):  # the first round does not count
        for label, run in runs.items():
            start = time.perf_counter()
            vectors = run(ids)
            seconds[label].append(time.perf_counter() - start)
            expected = vectors if expected is None else expected
            expect_close(label, vectors, expected)
    print(f"\n{name}, {len(ids)} docstrings, {tokens} tokens, {torch.get_num_threads()} threads, {repeats} repeats")
    print(f"{'':<56} {'tokens/s':>9} {'slowest - fastest':>19} {'times the time of':>32}")
    rows = []
    for label, taken in seconds.items():
        speeds = [tokens / t for t in taken[1:]]
        of_own = seconds[compared[label]][1:]
        ratio = statistics.median(theirs / mine for theirs, mine in zip(taken[1:], of_own, strict=True))
        spread = f"{min(speeds):,.0f} - {max(speeds):,.0f}"
        print(f"{label:<56} {statistics.median(speeds):>9,.0f} {spread:>19} {ratio:>6.3f} {compared[label]:>25}")
        rows.append({"model": name, "row": label, "tokens_per_second": speeds, "ratio": ratio, "to": compared[label]})
    return rows


def expect_close(label: str, vectors: np.ndarray, expected: np.ndarray) -> None:
    """Raises AssertionError if these vectors are not those of the same texts and model."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = float(((vectors * expected).sum(1) / lengths).mean())
    assert vectors.shape == expected.shape, (label, vectors.shape, expected.shape)
    assert cosine > LEAST_COSINE, f"{label}: a mean cosine of {cosine:.3f}"


def ids_of_texts(count: int) -> list[list[int]]:
    """Ids of docstrings: one for each six letters of a word, which are about as many as its word pieces."""
    texts = []
    for text in docstrings(count):
        pieces = [word[at : at + 6] for word in text.split() for at in range(0, len(word), 6)][: LONGEST - 2]
        texts.append([101, *(1000 + sum(map(ord, piece)) * 7919 % (WORDS - 1000) for piece in pieces), 102])
    return sorted(texts, key=len)


def save(shape: tuple[int, int, int, int], folder: Path, positions: int = 512) -> None:
    """Writes a model in the form of transformers 4, with the key that CTranslate2's converter needs."""
    width, layers, heads, inner = shape
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=positions,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    file = folder / "config.json"
    written = json.loads(file.read_text()) | {"position_embedding_type": "absolute", "architectures": ["BertModel"]}
    file.write_text(json.dumps(written))
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(WORDS - 5))])
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def ours(folder: Path, precision: str) -> Run:
    class NoTokenizer:  # an encoder of ids only needs this of its tokenizer
        model_max_length = None

    in_8_bits = precision == "int8"
    dtype = torch.bfloat16 if in_8_bits else getattr(torch, precision)
    model = BertModel.from_pretrained(folder, dtype=dtype if in_8_bits else None, impl="native")
    model.pooler = None
    if in_8_bits:
        quantise(model.encoder, partial(run_on_random_words, model))
    else:
        move_to_large_pages(model, dtype)
    encoder = Encoder(model, NoTokenizer())
    return lambda ids: encoder.encode_ids(ids, 2048).numpy()


def batches(ids: Ids, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, mask) [B, S] of sorted texts, with at most `most` elements, or of one text."""
    group: list[Sequence[int]] = []
    for text in [*ids, None]:
        if text is None or (group and len(text) * (len(group) + 1) > most):
            longest = max(map(len, group))
            yield (
                np.array([[*one, *[0] * (longest - len(one))] for one in group], dtype=np.int64),
                np.array([[1] * len(one) + [0] * (longest - len(one)) for one in group], dtype=np.int64),
            )
            group = []
        if text is not None:
            group.append(text)


def in_batches(run: RunBatches, most: int, ids: Ids) -> np.ndarray:
    return np.concatenate(run(batches(ids, most)))


# ---- peers: (saved model, folder for the converted model) -> a run over batches ----------------------------


class Mean(nn.Module):
    """A model with the mean over a text's tokens as part of its graph."""

    def __init__(self, folder: Path, attention: str):
        super().__init__()
        from transformers import BertModel as TheirBert

        self.bert = TheirBert.from_pretrained(folder, attn_implementation=attention, add_pooling_layer=False).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)


def exported(saved: Path, folder: Path, attention: str = "eager") -> Path:
    """The model as ONNX, with dynamic sizes."""
    file = folder / ("model.onnx" if attention == "eager" else f"{attention}.onnx")
    if not file.exists():
        names, sizes = ("input_ids", "attention_mask", "vectors"), {0: "batch", 1: "length"}
        example = torch.ones(2, 8, dtype=torch.int64, device="cpu"), torch.ones(2, 8, dtype=torch.int64, device="cpu")
        torch.onnx.export(
            Mean(saved, attention), example, str(file), dynamo=False, input_names=names[:2], output_names=names[2:],
            dynamic_axes={names[0]: sizes, names[1]: sizes, names[2]: {0: "batch"}}, opset_version=17,
        )  # fmt: skip
    return file


def openvino(saved: Path, folder: Path, precision: str, attention: str = "eager") -> RunBatches:
    import openvino as ov

    file = folder / ("openvino.xml" if precision == "int8" else "openvino-float.xml")
    if attention != "eager":
        file = file.with_stem(f"{file.stem}-{attention}")
    if not file.exists():
        model = ov.Core().read_model(exported(saved, folder, attention))
        if precision == "int8":
            import nncf

            sample = [{"input_ids": i, "attention_mask": m} for i, m in batches(ids_of_texts(64), 512)]
            model = nncf.quantize(
                model, nncf.Dataset(sample), subset_size=len(sample), model_type=nncf.ModelType.TRANSFORMER
            )
        ov.save_model(model, file, compress_to_fp16=False)
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if precision != "int8":
        settings["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[precision]
    model = ov.Core().compile_model(file, "CPU", settings)

    def run(given: Batches) -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        queue = ov.AsyncInferQueue(model)
        queue.set_callback(lambda request, place: found.__setitem__(place, request.get_output_tensor(0).data.copy()))
        for place, (ids, mask) in enumerate(given):
            queue.start_async({"input_ids": ids, "attention_mask": mask}, place)
        queue.wait_all()
        return [found[place] for place in range(len(found))]

    return run


def onnxruntime(saved: Path, folder: Path, precision: str) -> RunBatches:
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    fused, quantised = folder / "fused.onnx", folder / "onnxruntime.onnx"
    if not fused.exists():
        config = json.loads((saved / "config.json").read_text())
        heads, width = config["num_attention_heads"], config["hidden_size"]
        optimize_model(str(exported(saved, folder)), "bert", heads, width).save_model_to_file(str(fused))
    if precision == "int8" and not quantised.exists():
        quantize_dynamic(str(fused), str(quantised), per_channel=True, extra_options={"DefaultTensorType": 1})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    file = str(quantised if precision == "int8" else fused)
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda given: [session.run(None, {"input_ids": ids, "attention_mask": mask})[0] for ids, mask in given]


def ctranslate2(saved: Path, folder: Path, precision: str) -> RunBatches:
    import ctranslate2

    converted = folder / ("ctranslate2" if precision == "int8" else "ctranslate2-float32")
    if not converted.exists():
        quantisation = "int8" if precision == "int8" else None
        ctranslate2.converters.TransformersConverter(str(saved)).convert(str(converted), quantization=quantisation)
    encoder = ctranslate2.Encoder(
        str(converted), device="cpu", compute_type=precision, intra_threads=torch.get_num_threads()
    )

    def run(given: Batches) -> list[np.ndarray]:
        found = []
        for ids, mask in given:
            texts = [row[:length].tolist() for row, length in zip(ids, mask.sum(1), strict=True)]
            states = np.array(encoder.forward_batch(texts).last_hidden_state)
            found.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True))
        return found

    return run


PEERS: dict[str, dict[str, Callable[[Path, Path], RunBatches]]] = {
    "int8": {
        "OpenVINO": partial(openvino, precision="int8"),
        "ONNX Runtime": partial(onnxruntime, precision="int8"),
        "CTranslate2": partial(ctranslate2, precision="int8"),
    },
    "float32": {
        "OpenVINO": partial(openvino, precision="float32"),
        "ONNX Runtime": partial(onnxruntime, precision="float32"),
        "CTranslate2": partial(ctranslate2, precision="float32"),
    },
    "bfloat16": {"OpenVINO": partial(openvino, precision="bfloat16")},
}

if __name__ == "__main__":
    main()
