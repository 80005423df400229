"""The picture of a run: the places of its lines, and its labels."""

import json
import re
from xml.etree import ElementTree

import pytest

from fastbert.training.curve import BOTTOM, HEIGHT, LEFT, POINTS, RIGHT, TOP, WIDTH, draw

pytestmark = pytest.mark.once

SVG = "{http://www.w3.org/2000/svg}"


def drawn(tmp_path, records):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    draw(tmp_path / "metrics.jsonl", tmp_path / "curve.svg", "f1 < 1")
    return ElementTree.parse(tmp_path / "curve.svg").getroot()


def lines(picture):
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in picture.iter(f"{SVG}polyline")
    ]


def test_loss_and_metric_lie_between_their_least_and_greatest(tmp_path):
    losses = [{"step": step, "loss": loss} for step, loss in ((1, 4.0), (2, 3.0), (3, 2.0), (4, 2.5))]
    scores = [{"step": 2, "scores": {"f1 < 1": 0.5}}, {"step": 4, "scores": {"f1 < 1": None}}]
    picture = drawn(tmp_path, [*losses[:2], scores[0], *losses[2:], scores[1]])
    loss, metric = lines(picture)
    width, bottom = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM
    assert [x for x, _ in loss] == [LEFT + width * step / 4 for step in (1, 2, 3, 4)]
    assert [y for _, y in loss] == [TOP, (TOP + bottom) / 2, bottom, TOP + (bottom - TOP) * 0.75]
    assert metric == [(LEFT + width / 2, bottom)]  # a score that is NaN is not drawn
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert {"loss", "f1 < 1", "optimiser steps, 4 in all", "4", "2", "0.5"} <= set(texts)


def test_without_an_evaluation_no_metric_is_named(tmp_path):
    picture = drawn(tmp_path, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    assert len(lines(picture)) == 1
    assert not any(re.search("f1", text.text) for text in picture.iter(f"{SVG}text"))


def test_losses_of_many_steps_are_means_of_neighbours(tmp_path):
    picture = drawn(tmp_path, [{"step": step, "loss": float(step % 2)} for step in range(1, 4 * POINTS + 1)])
    [loss] = lines(picture)
    assert len(loss) == POINTS
    assert len({y for _, y in loss}) == 1  # of each four steps two are 1 and two are 0
