"""The suite of pre-training: which scores reach their goal, and the picture of several seeds."""

import json
from xml.etree import ElementTree

import pytest

from benchmarks.suites.pretraining import draw, expected

pytestmark = pytest.mark.once

SVG = "{http://www.w3.org/2000/svg}"


def report_of(accuracy: float) -> dict:
    return {
        "scores": {"masked_loss": 5.9, "perplexity": 365.0, "next_sentence_accuracy": accuracy},
        "definitions": {
            "next_sentence_accuracy": "of 700 pairs, half of which are right; one standard error is 0.0200"
        },
        "unigram entropy": 6.25,
    }


def test_goals_of_scores():
    report = report_of(0.6)
    assert expected("masked_loss", 5.95, report)
    assert not expected("masked_loss", 5.96, report)
    assert expected("next_sentence_accuracy", 0.541, report)
    assert not expected("next_sentence_accuracy", 0.539, report), "chance and two standard errors are 0.54"
    assert not expected("detection_auc", 0.59, report)
    assert expected("perplexity", 1e9, report)


def test_a_picture_of_two_seeds(tmp_path):
    """A line for each seed and score, within the picture; bars for pairs only."""
    reports = [report_of(0.6), report_of(0.7)]
    for seed, report in enumerate(reports):
        (tmp_path / f"seed-{seed}").mkdir()
        records = [{"step": 1, "loss": 9.0}]
        for step in (4, 8):
            records.append({"step": step, "scores": {**report["scores"], "masked_loss": 6.3 - step / 20}})
        (tmp_path / f"seed-{seed}" / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    draw(tmp_path, reports)
    picture = ElementTree.parse(tmp_path / "scores.svg").getroot()
    lines = [line.get("points") for line in picture.iter(f"{SVG}polyline")]
    assert len(lines) == 4
    for line in lines:
        for point in line.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= float(picture.get("width"))
            assert 0 <= y <= float(picture.get("height"))
    # Falling losses go down in the picture, where y grows.
    first, last = (float(point.split(",")[1]) for point in lines[0].split())
    assert last > first
    assert len([path for path in picture.iter(f"{SVG}path") if path.get("stroke-width") == "2"]) == 2
    assert "masked loss" in "".join(picture.itertext())
