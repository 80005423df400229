"""Draws the pictures of docs/pictures: `python docs/draw.py`.

Text stands in boxes of its own colour, or is a grey that can be read on white and on black.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

PICTURES = Path(__file__).resolve().parent / "pictures"
GREY, INK = "#7b7b7b", "#14181f"
COLOURS = ("#8ecae6", "#ffb703", "#95d5b2", "#f4978e")  # a text each
OPERATOR, TENSOR = "#a9c7f7", "#ffe08a"


class Svg:
    """Shapes of one picture, in pixels from the top left corner."""

    def __init__(self, width: int, height: int, title: str):
        self.head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'font-family="Helvetica, Arial, sans-serif" role="img">\n<title>{escape(title)}</title>\n'
        )
        self.shapes: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, words: str = "", size: int = 14,
        corner: int = 3, bold: bool = False,
    ) -> None:  # fmt: skip
        self.shapes.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{corner}" fill="{fill}" stroke="{GREY}"/>'
        )
        if words:
            self.words(x + width / 2, y + height / 2 + size * 0.35, words, size, INK, "middle", bold)

    def words(
        self, x: float, y: float, words: str, size: int = 14, fill: str = GREY, anchor: str = "start",
        bold: bool = False,
    ) -> None:  # fmt: skip
        style = f'font-size="{size}" fill="{fill}" text-anchor="{anchor}"' + (' font-weight="bold"' if bold else "")
        self.shapes.append(f'<text x="{x}" y="{y:g}" {style}>{escape(words)}</text>')

    def path(self, steps: str, arrow: bool = False) -> None:
        head = ' marker-end="url(#arrow)"' if arrow else ""
        self.shapes.append(f'<path d="{steps}" fill="none" stroke="{GREY}" stroke-width="2"{head}/>')

    def __str__(self) -> str:
        arrow = (
            '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{GREY}"/></marker></defs>\n'
        )
        return self.head + arrow + "\n".join(self.shapes) + "\n</svg>\n"


def packing() -> Svg:
    """Four texts as a padded batch, and as a packed one."""
    texts = [
        "[CLS] a short text [SEP]".split(),
        "[CLS] yes [SEP]".split(),
        "[CLS] this one is the longest of four [SEP]".split(),
        "[CLS] good day [SEP]".split(),
    ]
    longest, total = max(map(len, texts)), sum(map(len, texts))
    left, cell, high = 20, 46, 28
    svg = Svg(left * 2 + total * cell, 330, "Four texts as a padded batch and as a packed batch")
    svg.words(
        left, 26, f"padded: {len(texts)} texts of {longest} positions, {len(texts) * longest} computed", 16, bold=True
    )
    for row, (text, colour) in enumerate(zip(texts, COLOURS, strict=True)):
        for column in range(longest):
            x, y = left + column * cell, 40 + row * (high + 4)
            if column < len(text):
                svg.box(x, y, cell, high, colour, text[column], 11)
            else:
                svg.box(x, y, cell, high, "none")
                svg.path(f"M{x} {y + high}L{x + cell} {y}")
    svg.words(left + longest * cell + 16, 58, "crossed out: padding, computed in every layer and thrown away")
    svg.words(left, 216, f"packed: the same {total} tokens end to end, and nothing else", 16, bold=True)
    column, starts = 0, [0]
    for text, colour in zip(texts, COLOURS, strict=True):
        for word in text:
            svg.box(left + column * cell, 230, cell, high, colour, word, 11)
            column += 1
        starts.append(column)
    for start in starts:
        svg.path(f"M{left + start * cell} 262L{left + start * cell} 272")
        svg.words(left + start * cell, 288, str(start), 14, GREY, "middle")
    svg.words(left, 314, f"cu_seqlens = {starts}: where each text begins and ends. Attention stays within a text.")
    return svg


def layer() -> Svg:
    """A post-norm layer: tensors and the operators between them, from top to bottom."""
    steps = [
        ("linear", "qkv  [T, 3C]", "one product makes query, key and value"),
        ("attention", "o  [T, C]", "softmax(scale · q kᵀ) v within each text; scores stay on the chip"),
        ("linear", "[T, C]", "output projection"),
        ("add_layer_norm", "x  [T, C]", "dropout, + residual, LayerNorm, in one pass"),
        ("feed_forward", "[T, C]", "product to [T, F], GELU in its epilogue, product back"),
        ("add_layer_norm", "x  [T, C]", "dropout, + residual, LayerNorm, in one pass"),
    ]
    middle, wide, high, gap = 230, 180, 34, 22
    svg = Svg(760, 20 + (high + gap) * 13, "One post-norm layer of BERT: operators and the tensors between them")
    y = 14
    svg.box(middle - wide / 2, y, wide, high, TENSOR, "x  [T, C]", corner=17)
    residual = y
    for operator, tensor, note in steps:
        svg.path(f"M{middle} {y + high}L{middle} {y + high + gap}", arrow=True)
        y += high + gap
        svg.box(middle - wide / 2, y, wide, high, OPERATOR, operator, bold=True)
        svg.words(middle + wide / 2 + 16, y + high / 2 + 5, note)
        if operator == "add_layer_norm":
            x = middle - wide / 2
            svg.path(f"M{x} {residual + high / 2}H{x - 60}V{y + high / 2}H{x}", arrow=True)
            svg.words(x - 68, (residual + y + high) / 2, "residual", anchor="end")
        svg.path(f"M{middle} {y + high}L{middle} {y + high + gap}", arrow=True)
        y += high + gap
        svg.box(middle - wide / 2, y, wide, high, TENSOR, tensor, corner=17)
        if operator == "add_layer_norm":
            residual = y
    return svg


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for draw in (packing, layer):
        (PICTURES / f"{draw.__name__}.svg").write_text(str(draw()), encoding="utf-8")
