"""8-bit encoding beside other libraries' on this CPU, in turns in one process: tokens a second, from ids to vectors.

    python -m benchmarks.suites.int8_peers --cache FOLDER [--texts 128] [--repeats 3] [--models minilm base]

Each peer gets its best: batches of sorted texts of at most 256 or 512 padded tokens, whichever is faster; OpenVINO with
NNCF's static quantisation for transformers and its throughput hint, ONNX Runtime with its transformer fusions and
`per_channel=True`, CTranslate2 in its own int8. What they convert is kept in FOLDER. The model is MiniLM's or
BERT-base's shape with random weights, the texts are docstrings of Python, so both lie on every machine. A peer that is
not installed is named and left out.
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

SHAPES = {"minilm": (384, 6, 12, 1536), "base": (768, 12, 12, 3072)}
PADDED_TOKENS = (256, 512)
WORDS, LONGEST = 30528, 256
Ids = Sequence[Sequence[int]]
Run = Callable[[Ids], object]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.int8_peers", description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="a folder for converted models")
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=[*SHAPES])
    args = parser.parse_args(argv)
    for name in args.models:
        compare(name, args.cache / name, ids_of_texts(args.texts), args.repeats)


def compare(name: str, folder: Path, ids: Ids, repeats: int) -> None:
    """Prints a table: median tokens a second, slowest and fastest, and the median ratio of our int8's to it."""
    tokens = sum(map(len, ids))
    saved = folder / "model"
    if not saved.exists():
        save(SHAPES[name], saved)
    runs: dict[str, Run] = {"fastbert bf16": ours(saved, False), "fastbert int8": ours(saved, True)}
    for label, make in PEERS.items():
        try:
            run = make(saved, folder)
        except ImportError as error:
            print(f"{label}: not installed ({error})")
            continue
        for most in PADDED_TOKENS:
            runs[f"{label}, {most} padded tokens a batch"] = partial(in_batches, run, most)
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(repeats + 1):  # the first round does not count
        for label, run in runs.items():
            start = time.perf_counter()
            run(ids)
            seconds[label].append(time.perf_counter() - start)
    print(f"\n{name}, {len(ids)} docstrings, {tokens} tokens, {torch.get_num_threads()} threads, {repeats} repeats")
    print(f"{'':<52} {'tokens/s':>9} {'slowest - fastest':>19} {'ours in int8 is':>16}")
    own = seconds["fastbert int8"][1:]
    for label, taken in seconds.items():
        speeds = [tokens / t for t in taken[1:]]
        ratio = statistics.median(theirs / mine for theirs, mine in zip(taken[1:], own, strict=True))
        spread = f"{min(speeds):,.0f} - {max(speeds):,.0f}"
        print(f"{label:<52} {statistics.median(speeds):>9,.0f} {spread:>19} {ratio:>14.2f} x")


def ids_of_texts(count: int) -> list[list[int]]:
    """Of docstrings: an id for each six letters of a word, about as many as there are word pieces."""
    texts = []
    for text in docstrings(count):
        pieces = [word[at : at + 6] for word in text.split() for at in range(0, len(word), 6)][: LONGEST - 2]
        texts.append([101, *(1000 + sum(map(ord, piece)) * 7919 % (WORDS - 1000) for piece in pieces), 102])
    return sorted(texts, key=len)


def save(shape: tuple[int, int, int, int], folder: Path) -> None:
    """As transformers 4 saved it, with the key that CTranslate2's converter asks for."""
    width, layers, heads, inner = shape
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    file = folder / "config.json"
    written = json.loads(file.read_text()) | {"position_embedding_type": "absolute", "architectures": ["BertModel"]}
    file.write_text(json.dumps(written))
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(WORDS - 5))])
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


def ours(folder: Path, in_8_bits: bool) -> Run:
    class Ids:  # an encoder that is given ids asks its tokenizer for this alone
        model_max_length = None

    model = BertModel.from_pretrained(folder, dtype=torch.bfloat16, impl="native")
    model.pooler = None
    if in_8_bits:
        quantise(model.encoder, partial(run_on_random_words, model))
    encoder = Encoder(model, Ids())
    return lambda ids: encoder.encode_ids(ids, 2048)


def batches(ids: Ids, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, mask) [B, S] of sorted texts, at most so many elements, or one text."""
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


def in_batches(run: Callable[[Iterable[tuple[np.ndarray, np.ndarray]]], object], most: int, ids: Ids) -> None:
    run(batches(ids, most))


# ---- peers: (saved model, folder for what is converted) -> a run over batches ------------------------------


class Mean(nn.Module):
    """The mean over a text's tokens, as part of the graph."""

    def __init__(self, folder: Path):
        super().__init__()
        from transformers import BertModel as TheirBert

        self.bert = TheirBert.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)


def exported(saved: Path, folder: Path) -> Path:
    """The model as ONNX, with sizes that vary."""
    file = folder / "model.onnx"
    if not file.exists():
        names, sizes = ("input_ids", "attention_mask", "vectors"), {0: "batch", 1: "length"}
        example = torch.ones(2, 8, dtype=torch.int64, device="cpu"), torch.ones(2, 8, dtype=torch.int64, device="cpu")
        torch.onnx.export(
            Mean(saved), example, str(file), dynamo=False, input_names=names[:2], output_names=names[2:],
            dynamic_axes={names[0]: sizes, names[1]: sizes, names[2]: {0: "batch"}}, opset_version=17,
        )  # fmt: skip
    return file


def openvino(saved: Path, folder: Path) -> Run:
    import openvino as ov

    file = folder / "openvino.xml"
    if not file.exists():
        import nncf

        sample = [{"input_ids": i, "attention_mask": m} for i, m in batches(ids_of_texts(64), 512)]
        model = nncf.quantize(
            ov.Core().read_model(exported(saved, folder)), nncf.Dataset(sample), subset_size=len(sample),
            model_type=nncf.ModelType.TRANSFORMER,
        )  # fmt: skip
        ov.save_model(model, file)
    settings = {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = ov.Core().compile_model(file, "CPU", settings)

    def run(given: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        queue = ov.AsyncInferQueue(model)
        for ids, mask in given:
            queue.start_async({"input_ids": ids, "attention_mask": mask})
        queue.wait_all()

    return run


def onnxruntime(saved: Path, folder: Path) -> Run:
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    file = folder / "onnxruntime.onnx"
    if not file.exists():
        config = json.loads((saved / "config.json").read_text())
        fused = folder / "fused.onnx"
        heads, width = config["num_attention_heads"], config["hidden_size"]
        optimize_model(str(exported(saved, folder)), "bert", heads, width).save_model_to_file(str(fused))
        quantize_dynamic(str(fused), str(file), per_channel=True, extra_options={"DefaultTensorType": 1})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda given: [session.run(None, {"input_ids": ids, "attention_mask": mask}) for ids, mask in given]


def ctranslate2(saved: Path, folder: Path) -> Run:
    import ctranslate2

    converted = folder / "ctranslate2"
    if not converted.exists():
        ctranslate2.converters.TransformersConverter(str(saved)).convert(str(converted), quantization="int8")
    encoder = ctranslate2.Encoder(
        str(converted), device="cpu", compute_type="int8", intra_threads=torch.get_num_threads()
    )

    def run(given: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        for ids, mask in given:
            texts = [row[:length].tolist() for row, length in zip(ids, mask.sum(1), strict=True)]
            np.array(encoder.forward_batch(texts).last_hidden_state)

    return run


PEERS = {"OpenVINO int8": openvino, "ONNX Runtime int8": onnxruntime, "CTranslate2 int8": ctranslate2}

if __name__ == "__main__":
    main()
