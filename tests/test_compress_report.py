"""`fastbert compress-report`: every number is what its name says. No test asserts a time."""

import json
import math
from dataclasses import asdict
from xml.etree import ElementTree

import pytest

import fastbert
from command_line import run
from compression_models import needs_products, table, tuned
from fastbert.checkpoint import load_state_dict
from fastbert.compression import report as report_module
from fastbert.compression.report import compare, memory_of, parties
from fastbert.compression.report_picture import picture
from fastbert.compression.report_picture import table as lines_of
from fastbert.storage import write_json
from fastbert.training.pipeline import SPEC_FILE
from fastbert.training.tasks import Spec

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(folder of the first model, of a pruned one, the examples)."""
    folder = tmp_path_factory.mktemp("made")
    first, small = tuned(folder / "first"), folder / "small"
    assert run("prune", first, "-o", small, "--heads", "0:1,3;1:0,1,2,3", "-q") == 0
    return first, small, table(folder / "dev.tsv", 30)


def test_a_report(folders, tmp_path, capsys):
    first, small, data = folders
    out = ["--json", tmp_path / "r.json", "--picture", tmp_path / "r.svg"]
    assert run(
        "compress-report", first, small, "--data", data, "--rounds", 3, "--texts", 8, "--impl", "native", *out, "-q"
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    whole, cut = report["rows"]
    assert (whole["model"], cut["model"], cut["steps"]) == (str(first), str(small), ["prune"])
    assert (whole["heads of layers"], cut["heads of layers"]) == ([4, 4, 4], [2, 0, 4])
    for folder, row in ((first, whole), (small, cut)):
        ready = fastbert.pipeline(folder, device="cpu", dtype="float32", impl="native")
        examples = ready.task.read(data)
        labels = [record["label"] for record in ready.records(examples, False)]
        right = sum(label == example.label for label, example in zip(labels, examples, strict=True))
        assert row["scores"]["accuracy"] == right / 30
        assert row["bytes on disk"] == (folder / "model.safetensors").stat().st_size
        assert row["bytes in memory"] == sum(t.nbytes for t in load_state_dict(folder).values())
    assert whole["times as many tokens per second"] == {"median": 1.0, "lowest": 1.0, "highest": 1.0}
    ratio = cut["times as many tokens per second"]
    assert ratio["lowest"] <= ratio["median"] <= ratio["highest"]
    assert (report["rounds"], report["timed examples"], report["baseline"]) == (3, 8, f"{first} float32")
    assert "accuracy: share of examples whose label is right" in said
    assert said.splitlines()[1].split()[:3] == [str(first), "float32", f"{whole['scores']['accuracy']:.4f}"]
    drawn = ElementTree.parse(tmp_path / "r.svg").getroot()
    circles = [e for e in drawn.iter() if e.tag.endswith("circle")]
    radii = [float(circle.get("r")) for circle in circles]
    assert radii[0] == 16.0 > radii[1]
    assert (float(circles[0].get("cx")) < float(circles[1].get("cx"))) == (ratio["median"] > 1.0)


def test_ratios_are_larger_where_a_model_is_faster(folders, monkeypatch):
    """With made-up measurements: twice the tokens per second, and a quarter of the time for a text."""
    found = parties([str(folder) for folder in folders[:2]], ["float32"], "native")
    times = [[100.0, 50.0, 80.0], [200.0, 150.0, 160.0]], [[4.0, 6.0, 8.0], [1.0, 2.0, 1.0]]
    monkeypatch.setattr(report_module, "_timed", lambda *arguments: times)
    small = compare(found, str(folders[2]), rounds=3, texts=4, batch_tokens=100)["rows"][1]
    assert small["times as many tokens per second"] == {"median": 2.0, "lowest": 2.0, "highest": 3.0}
    assert small["times faster for one text"] == {"median": 4.0, "lowest": 3.0, "highest": 8.0}
    assert (small["tokens per second"], small["milliseconds for one text"]) == (160.0, 1.0)


def test_rounds_take_turns_and_the_first_does_not_count(folders, monkeypatch):
    found = parties([str(folder) for folder in (*folders[:2], folders[0])], ["float32"], "native")
    order, outputs_of = [], report_module.outputs_of

    def noted(model, task, windows, *others):
        if len(windows) == 4:  # the batch, not a single text
            order.append(next(place for place, party in enumerate(found) if party.ready.model is model))
        return outputs_of(model, task, windows, *others)

    monkeypatch.setattr(report_module, "outputs_of", noted)
    whole, single = report_module._timed(found, found[0].ready.task.read(folders[2])[:4], 3, 100, lambda line: None)
    rounds = [order[start : start + 3] for start in range(0, 12, 3)]
    assert all(sorted(places) == [0, 1, 2] for places in rounds)
    assert {places[0] for places in rounds} == {0, 1, 2}, "each model is first once"
    assert [len(values) for values in (*whole, *single)] == [3] * 6


def test_scores_that_are_undefined(folders, tmp_path, monkeypatch):
    """A correlation of a constant, for example, is null in JSON and has no circle in the picture."""
    of_model = report_module._scored

    def scored(party, *others):
        found = of_model(party, *others)
        return {**found, "scores": {"accuracy": math.nan}} if party.name.endswith("small") else found

    monkeypatch.setattr(report_module, "_scored", scored)
    options = ["--data", folders[2], "--rounds", 1, "--texts", 2, "--impl", "native", "-q"]
    files = ["--json", tmp_path / "r.json", "--picture", tmp_path / "r.svg"]
    assert run("compress-report", *folders[:2], *options, *files) == 0
    assert json.loads((tmp_path / "r.json").read_text())["rows"][1]["scores"] == {"accuracy": None}
    drawn = (tmp_path / "r.svg").read_text()
    assert drawn.count("<circle") == 1
    assert "nan" not in drawn


@needs_products
def test_a_folder_in_8_bits_counts_its_integers_and_is_run_once(folders, tmp_path):
    first, _, data = folders
    small = tmp_path / "int8"
    assert run("quantize", first, "-o", small, "--data", data, "-q") == 0
    found = parties([str(first), str(small)], ["float32", "bfloat16"], "native")
    assert [party.dtype for party in found] == ["float32", "bfloat16", "int8"]
    assert found[2].memory < 0.5 * found[0].memory == 0.5 * memory_of(found[0].ready.model)
    report = compare(found, str(data), rounds=1, texts=4, batch_tokens=100)
    lines = lines_of(report)
    assert [line.split()[1] for line in lines[1:4]] == ["float32", "bfloat16", "int8"]
    assert picture(report).count("<circle") == 3


def test_models_that_cannot_be_compared_are_refused(folders, tmp_path, capsys):
    first, _small, data = folders
    other = tuned(tmp_path / "other", id2label={0: "a", 1: "b"})
    pairs, plain, half = tuned(tmp_path / "pairs"), tuned(tmp_path / "plain"), tuned(tmp_path / "half")
    write_json(pairs / SPEC_FILE, asdict(Spec("pair", "accuracy", ("a", "b", "label"), 28)))
    (plain / SPEC_FILE).unlink()
    (half / "model.safetensors").write_bytes((half / "model.safetensors").read_bytes()[:900])
    for folder, message in (
        (other, "is for sentence by accuracy with the labels a, b, and"),
        (pairs, "is for pair by accuracy"),
        (plain, f"has no {SPEC_FILE}"),
        (half, "is truncated"),
        (tmp_path / "nowhere", "nowhere"),
    ):
        assert run("compress-report", first, folder, "--data", data, "--impl", "native", "-q") == 1
        said = capsys.readouterr().err
        assert message in said, said
        assert said.count("\n") == 1
    assert run("compress-report", first, "--data", data, "--json", tmp_path / "no" / "r.json") == 2
    assert run("compress-report", first, "--data", data, "--picture", tmp_path) == 2
    assert f"{tmp_path} is a folder: give the name of a file" in capsys.readouterr().err
    same = tmp_path / "r"
    assert run("compress-report", first, "--data", data, "--json", same, "--picture", same) == 2
    assert f"--json and --picture are both {same}" in capsys.readouterr().err
    assert run("compress-report", first, "--data", data, "--dtype", "int8") == 2
    assert "expected some of auto" in capsys.readouterr().err
