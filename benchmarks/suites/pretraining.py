"""Pre-trains a tiny BERT on real text and checks its scores; measures the speed and memory of the data loader.

    python -m benchmarks.suites.pretraining learn --data DIR --out DIR [--objective mlm+nsp] [--seeds 3] [--steps 2400]
    python -m benchmarks.suites.pretraining loader --data DIR [--megabytes 1000]

`learn` trains on War and Peace and WikiText-2 (with --chinese on CMRC 2018's contexts, whole words by --segmenter).
One chapter in twenty and six articles are held out for evaluation. An interrupted run continues. Three goals are
checked, and the exit code is 1 if one is missed: the loss of masked words is 0.3 nats below the entropy of single
words, pairs are classified better than chance by two standard errors, and ELECTRA's detection has an area under the
curve of 0.6. ELECTRA starts from a model trained on masked words (--init; both with --no-whole-words --max-length 32
--vocab-size 300 --batch-tokens 4096; 1,500 steps, then 1,000 with --lr 1e-3), because from random weights a
discriminator would first have to learn which positions are adjacent, with one bit for each token. Next sentences start
from sentence order (--objective mlm+sop --max-length 64; then --objective mlm+nsp --max-length 64 --steps 1200
--lr 2e-3 --init OUT/seed-{seed}). scores.svg in the folder shows all seeds.

`loader` writes a text of this size, the same paragraphs with running numbers, and prints the growth of the process'
memory over the whole text. For each objective, and for CMRC's contexts masked in Chinese whole words, it prints how
many tokens a second are read, cut into examples and masked, compared with those of a training step of BERT-tiny:
processor time on one thread, the loader and the step in turns.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from fastbert.cli.options import positive, shown
from fastbert.pretraining.batches import Loader
from fastbert.pretraining.chinese import Segmenter, segmenter_of
from fastbert.pretraining.corpus import Corpus, build_corpus
from fastbert.pretraining.documents import longest_segment
from fastbert.pretraining.objectives import OBJECTIVES
from fastbert.pretraining.plan import PretrainingPlan
from fastbert.pretraining.pretrain import Request, make_model, pretrain
from fastbert.pretraining.run import Pretraining
from fastbert.pretraining.vocabulary import train_tokenizer
from fastbert.storage import read_json, write_json
from fastbert.text.tokenizer import Tokenizer
from fastbert.training.loop import Settings
from fastbert.training.memory import keep_freed_memory
from fastbert.training.processes import Processes

LENGTH = 128
EVALUATIONS = 8  # in a run
PAIRS = ("next_sentence_accuracy", "order_accuracy")
# The scores with a goal, and what the dotted line in their picture is.
LEVELS = {"masked_loss": "entropy of single words", **dict.fromkeys((*PAIRS, "detection_auc"), "chance")}
WIDTH, HEIGHT, COLOURS = 420, 320, ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # of the pictures
STEPS_MEASURED = 43  # of the loader
MARGIN, AREA = 0.3, 0.6  # nats below the entropy of single words; area under the curve of ELECTRA's detection


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(required=True, metavar="learn|loader")
    learning = actions.add_parser("learn", help="train a tiny BERT and check its scores")
    learning.set_defaults(run=learn)
    learning.add_argument("--out", type=Path, required=True, help="folder for the runs, one for each seed")
    learning.add_argument("--objective", choices=tuple(OBJECTIVES), default="mlm+nsp", help="default: mlm+nsp")
    learning.add_argument("--chinese", action="store_true", help="use CMRC's contexts instead of English")
    learning.add_argument("--segmenter", help="segmenter of Chinese words: jieba, or a word list")
    learning.add_argument("--seeds", type=positive, default=3, help="default: 3")
    learning.add_argument("--steps", type=positive, default=2400, help="default: 2,400")
    learning.add_argument("--batch-tokens", type=positive, default=2048, help="tokens of a step (default: 2,048)")
    learning.add_argument("--init", help="start from this model, with its tokenizer; {seed} is replaced")
    learning.add_argument("--vocab-size", type=positive, help="default: 4,000, for Chinese 5,000")
    learning.add_argument("--max-length", type=positive, default=LENGTH, help=f"default: {LENGTH}")
    learning.add_argument("--no-whole-words", dest="whole_words", action="store_false", help="mask pieces of words")
    learning.add_argument("--lr", type=float, default=3e-3, help="default: 0.003")
    loading = actions.add_parser("loader", help="measure the data loader")
    loading.set_defaults(run=loader)
    loading.add_argument("--segmenter", default="jieba", help="segmenter of Chinese words: jieba (default), or a list")
    loading.add_argument("--megabytes", type=positive, default=1000, help="size of the text (default: 1,000)")
    for action in (learning, loading):
        action.add_argument("--data", type=Path, required=True, help="with gutenberg/, wikitext-2/ and cmrc2018/")
    args = parser.parse_args(argv)
    keep_freed_memory()
    return args.run(args)


# ---- texts ---------------------------------------------------------------------------------------------------


def english(data: Path) -> tuple[list[str], list[str]]:
    """(training documents, evaluation documents): chapters of the book, and articles."""
    (book,) = (data / "gutenberg").glob("*.txt")
    text = book.read_text(encoding="utf-8-sig")
    text = text[text.index("\n", text.index("*** START OF")) : text.index("*** END OF")]
    chapters: list[list[str]] = [[]]
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        if re.match(r"CHAPTER [IVXLC]+", line):
            chapters.append([])
        elif line:
            chapters[-1].append(line)
    documents = ["\n".join(chapter) for chapter in chapters if sum(map(len, chapter)) > 1500]
    held = documents[19::20]
    learnt = [document for place, document in enumerate(documents) if place % 20 != 19]
    for name in ("valid", "test"):
        articles: list[list[str]] = []
        for line in (data / "wikitext-2" / f"{name}.txt").read_text(encoding="utf-8").split("\n"):
            line = line.strip()
            if re.fullmatch(r"= [^=].* =", line):
                articles.append([])
            elif line and not line.startswith("=") and articles:
                articles[-1].append(line)
        whole = ["\n".join(article) for article in articles if article]
        held += whole[:6] if name == "valid" else []
        learnt += whole[6:] if name == "valid" else whole
    return learnt, held


def chinese(data: Path) -> tuple[list[str], list[str]]:
    """(training documents, evaluation documents), one for each context."""
    dev, trial = (
        [p["context"] for article in read_json(data / "cmrc2018" / f"cmrc2018_{part}.json")["data"]
         for p in article["paragraphs"]]
        for part in ("dev", "trial")
    )  # fmt: skip
    return dev + trial[64:], trial[:64]


def write_texts(out: Path, parts: tuple[Sequence[str], Sequence[str]]) -> tuple[Path, Path]:
    """learn.txt and held-out.txt. Existing files are not replaced, because a continued run expects the same files."""
    files = out / "learn.txt", out / "held-out.txt"
    out.mkdir(parents=True, exist_ok=True)
    for file, documents in zip(files, parts, strict=True):
        if not file.exists():
            file.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return files


# ---- what is learnt ------------------------------------------------------------------------------------------


def learn(args: argparse.Namespace) -> int:
    learnt, held = write_texts(args.out, chinese(args.data) if args.chinese else english(args.data))
    tokenizer = args.out / "tokenizer"
    if not args.init and not tokenizer.exists():
        train_tokenizer([learnt], args.vocab_size or (5000 if args.chinese else 4000))[0].save_pretrained(tokenizer)
    reports = []
    for seed in range(args.seeds):
        out = args.out / f"seed-{seed}"
        init = args.init and args.init.replace("{seed}", str(seed))
        request = Request(
            (str(learnt),), out, args.objective, "tiny", init, str(tokenizer), eval=(str(held),), dropout=0.0,
            steps=args.steps, batch_tokens=args.batch_tokens, memory_tokens=4096, lr=args.lr, seed=seed,
            evaluate_every=max(1, args.steps // EVALUATIONS), save_every=50, segmenter=args.segmenter,
            whole_words=args.whole_words, max_length=args.max_length, resume=True,
        )  # fmt: skip
        reports.append(pretrain(request, say))
    missed = []
    for name in reports[0]["scores"]:
        values = [report["scores"][name] for report in reports]
        definition = reports[0]["definitions"][name]
        print(f"{name}: median {statistics.median(values):.4f}, {min(values):.4f} to {max(values):.4f}; {definition}")
        if not all(expected(name, value, report) for value, report in zip(values, reports, strict=True)):
            missed.append(name)
    print(f"entropy of single words: {reports[0]['unigram entropy']:.4f} nats; seeds: {args.seeds}")
    print(f"missed: {', '.join(missed)}" if missed else "all as expected")
    write_json(args.out / "reports.json", {"reports": reports})
    draw(args.out, reports)
    return int(bool(missed))


def draw(out: Path, reports: Sequence[dict]) -> None:
    """scores.svg: the scores that have a goal over the steps, a line for each seed."""
    names = [name for name in reports[0]["scores"] if name in LEVELS]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(names)}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH * len(names)}" height="{HEIGHT}" fill="white"/>',
    ]
    for place, name in enumerate(names):
        curves = []
        for seed in range(len(reports)):
            lines = (out / f"seed-{seed}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            scored = [record for record in map(json.loads, lines) if "scores" in record]
            curves.append([(record["step"], record["scores"][name]) for record in scored])
        errors = [standard_error(report, name) if name in PAIRS else 0.0 for report in reports]
        level = reports[0]["unigram entropy"] if name == "masked_loss" else 0.5
        parts += panel(place * WIDTH, name, curves, errors, level)
    (out / "scores.svg").write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def panel(
    left: int, name: str, curves: Sequence[Sequence[tuple[int, float]]], errors: Sequence[float], level: float
) -> list[str]:
    """The SVG of one score. errors: a standard error for each curve, of which two are drawn at its last point."""
    last = max(step for curve in curves for step, _ in curve)
    values = [level, *(value for curve in curves for _, value in curve)]
    values += [curve[-1][1] + sign * 2 * error for curve, error in zip(curves, errors, strict=True) for sign in (-1, 1)]
    low, high = min(values), max(values)

    def x(step: float) -> float:
        return left + 60 + (WIDTH - 90) * step / last

    def y(value: float) -> float:
        return HEIGHT - 50 - (HEIGHT - 90) * (value - low) / ((high - low) or 1.0)

    parts = [
        f'<text x="{left + WIDTH / 2}" y="20" text-anchor="middle">{name.replace("_", " ")}</text>',
        f'<text x="{left + WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{last} steps</text>',
        f'<path d="M{x(0)} 40V{HEIGHT - 50}H{x(last)}" fill="none" stroke="#999"/>',
        f'<path d="M{x(0)} {y(level):.1f}H{x(last)}" stroke="#333" stroke-dasharray="3"/>',
        f'<text x="{x(last)}" y="{y(level) - 5:.1f}" text-anchor="end">{LEVELS[name]}</text>',
    ]
    parts += [
        f'<text x="{x(0) - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>' for value in (low, high)
    ]
    for seed, (curve, error) in enumerate(zip(curves, errors, strict=True)):
        colour = COLOURS[seed % len(COLOURS)]
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{x(0) + 10 + 60 * seed}" y="36" fill="{colour}">seed {seed}</text>')
        if error:
            value = curve[-1][1]
            ends = f"M{x(last) + 4 * seed + 4} {y(value - 2 * error):.1f}V{y(value + 2 * error):.1f}"
            parts.append(f'<path d="{ends}" stroke="{colour}" stroke-width="2"/>')
    return parts


def expected(name: str, value: float, report: dict) -> bool:
    """Whether a score reaches its goal; true for a score without a goal."""
    if name == "masked_loss":
        return value <= report["unigram entropy"] - MARGIN
    if name in PAIRS:
        return value > 0.5 + 2 * standard_error(report, name)
    return name != "detection_auc" or value >= AREA


def standard_error(report: dict, name: str) -> float:
    return float(report["definitions"][name].rpartition(" ")[2])


def say(record: dict, steps: int) -> None:
    if "scores" in record:
        words = ", ".join(f"{name} {shown(value)}" for name, value in record["scores"].items())
        print(f"step {record['step']} of {steps}: {words}", file=sys.stderr)


# ---- the data loader -----------------------------------------------------------------------------------------


def loader(args: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        learnt, _ = english(args.data)
        tokenizer, _ = train_tokenizer([write_texts(folder, (learnt, learnt[:1]))[0]], 4000)
        numbered = folder / "numbered.txt"
        repeat(numbered, learnt, args.megabytes * 10**6)
        corpus = tokenised(numbered, folder / "corpus", tokenizer, None)
        for objective in OBJECTIVES:
            compare(objective, objective, corpus, tokenizer, folder)
        contexts = folder / "contexts.txt"
        contexts.write_text("\n\n".join(chinese(args.data)[0]), encoding="utf-8")
        tokenizer, _ = train_tokenizer([contexts], 5000)
        corpus = tokenised(contexts, folder / "chinese", tokenizer, segmenter_of(args.segmenter))
        compare("Chinese whole words", "mlm", corpus, tokenizer, folder)
    return 0


def tokenised(file: Path, folder: Path, tokenizer: Tokenizer, segmenter: Segmenter | None) -> Corpus:
    """The corpus of a text. Prints tokens a second, and how much the process' peak of memory grew."""
    before, began = peak_memory(), time.process_time()
    corpus = build_corpus(folder, [file], tokenizer, longest_segment(LENGTH), segmenter=segmenter)
    rate = corpus.facts["tokens"] / (time.process_time() - began)
    grown = (peak_memory() - before) / 2**20
    print(f"{file.stat().st_size:,} bytes, {corpus.facts['tokens']:,} tokens: tokenised at {rate:,.0f} tokens/s")
    print(f"peak memory grew by {grown:,.0f} MiB", flush=True)
    return corpus


def repeat(file: Path, documents: Sequence[str], size: int) -> None:
    written = number = 0
    with open(file, "w", encoding="utf-8") as stream:
        while written < size:
            number += 1
            written += stream.write(f"Number {number}.\n{documents[number % len(documents)]}\n\n")


def compare(title: str, name: str, corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    """Prints tokens a second of the loader and of a training step, and the time of cutting an epoch's examples."""
    objective = OBJECTIVES[name]()
    before, began = peak_memory(), time.process_time()
    plan = PretrainingPlan(corpus, objective.pairs, LENGTH, 0, 4096, 4096)
    steps = plan.steps(0)
    cutting = time.process_time() - began
    grown = (peak_memory() - before) / 2**20
    load = Loader(plan, objective.masking(tokenizer), 0, 1, 0)
    request = Request((), folder, objective=name, dropout=0.0)
    settings = Settings(epochs=0, step_tokens=4096, batch_tokens=4096, lr=1e-3, dtype=torch.bfloat16)
    run = Pretraining(
        make_model(request, tokenizer), objective, plan, load, settings, 100, 100, folder,
        Processes(0, 1, torch.device("cpu")),
    )  # fmt: skip
    loading, computing = [], []  # seconds a token
    for step in steps[:: max(1, len(steps) // STEPS_MEASURED)][:STEPS_MEASURED]:
        tokens = plan.tokens(step)
        began = time.process_time()
        batches = load(step)
        loaded = time.process_time()
        run.loader = lambda _, made=batches: made
        run._gradients(step, 0)
        run.optimizer.step()
        run.optimizer.zero_grad()
        computing.append((time.process_time() - loaded) / tokens)
        loading.append((loaded - began) / tokens + cutting / sum(plan.epoch(0).plan.lengths))
    # The first steps allocate memory.
    loading, computing = loading[3:], computing[3:]
    loads, computes = statistics.median(loading), statistics.median(computing)
    ratios = sorted(b / a for a, b in zip(loading, computing, strict=True))
    print(
        f"{title}: loader {1 / loads:,.0f} tokens/s, cutting included; step of tiny {1 / computes:,.0f}: "
        f"{statistics.median(ratios):.0f} times ({ratios[0]:.0f} to {ratios[-1]:.0f} in {len(ratios)} turns); an epoch "
        f"of {len(plan.epoch(0).examples):,} examples is cut in {cutting:.1f} s, in {grown:,.0f} MiB",
        flush=True,
    )


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
