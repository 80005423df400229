"""The benchmark of distilling on small models: which runs it makes, and that it continues with the missing ones."""

import json

import pytest

import fastbert
from benchmarks.suites import distilling
from compression_models import table, tuned


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with small versions of SST-2's two files."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "sst2").mkdir()
    table(folder / "sst2" / "train.tsv", 40)
    table(folder / "sst2" / "dev.tsv", 30)
    return folder


def runs_in(path) -> list[dict]:
    return json.loads(path.read_text())["runs"]


@pytest.mark.once
def test_a_stopped_benchmark_continues_with_the_missing_runs(data, tmp_path, monkeypatch):
    """Seed by seed, so that finished rows form pairs. Other settings count as another run."""
    first, second = tuned(tmp_path / "first"), tuned(tmp_path / "second", initializer_range=0.1)
    out, left = tmp_path / "runs.json", iter(range(5))

    def measured(run, teacher, args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return {"score": 0.5}

    monkeypatch.setattr(distilling, "measured", measured)
    argv = [f"sst2={first}", f"sick={second}", "--data", str(data), "--json", str(out), "--seeds", "2"]
    with pytest.raises(KeyboardInterrupt):
        distilling.main(argv)
    stopped, left = runs_in(out), iter(range(5))
    distilling.main(argv)
    runs = runs_in(out)
    assert (len(stopped), len(runs), runs[:5]) == (5, 10, stopped)
    students = [(study, row, seed) for seed in (0, 1) for study in ("sst2", "sick") for row in ("distilled", "labels")]
    named = [(run["study"], run["row"], run["seed"]) for run in runs]
    assert named == [("sst2", "teacher", 0), ("sick", "teacher", 0), *students]
    left = iter(range(4))
    distilling.main([*argv, "--temperature", "3"])
    assert [run["row"] for run in runs_in(out)[10:]] == ["distilled"] * 4, "the labels alone have no temperature"
    old = [{name: value for name, value in run.items() if name not in distilling.BEFORE} for run in runs]
    distilling.write_json(out, {"runs": old})
    left = iter(range(0))
    distilling.main(argv)  # older records lack these options, and count as made with the defaults
    left = iter(range(4))
    distilling.main([*argv, "--longest", "--rows", "distilled"])
    assert [run["longest"] for run in runs_in(out)[10:]] == [True] * 4


@pytest.mark.once
def test_a_share_is_of_the_own_teacher():
    """Of two teachers in a file the last one once gave the shares of all students."""
    common = {"study": "sst2", "seed": 0, "losses": {"labels": 1.0}, "temperature": None, "examples": 9, "epochs": 1}
    runs = [
        {**common, "row": row, "teacher": teacher, "score": score, "lr": 0.1}
        for row, scores in (("teacher", (0.8, 0.5)), ("labels", (0.4, 0.4)))
        for teacher, score in zip("ab", scores, strict=True)
    ]
    lines = distilling.table(runs).splitlines()[2:]
    assert [line.split("|")[4:6] for line in lines] == [
        [" 0.8000 ", " 100.0% "], [" 0.5000 ", " 100.0% "], [" 0.4000 ", " 50.0% "], [" 0.4000 ", " 80.0% "]
    ]  # fmt: skip


@pytest.mark.once
def test_the_longest_examples_in_their_order(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("text\tlabel\nabc\t0\na\t1\nabcde\t1\nab\t0\n")
    assert distilling.longest(path, 2, tmp_path).read_text() == "text\tlabel\nabc\t0\nabcde\t1\n"
    with pytest.raises(ValueError, match="has 4 examples, not 5"):
        distilling.longest(path, 5, tmp_path)


@pytest.mark.cpp  # measurements use the C++ operators
def test_students_of_both_rows(data, tmp_path, capsys):
    teacher, out, kept = tuned(tmp_path / "teacher"), tmp_path / "runs.json", tmp_path / "kept"
    distilling.main(
        [f"sst2={teacher}", "--data", str(data), "--layers", "2", "--seeds", "1", "--examples", "24", "--turns", "2",
         "--json", str(out), "--keep", str(kept)]
    )  # fmt: skip
    of_teacher, *students = runs_in(out)
    assert [run["row"] for run in students] == ["distilled", "labels"]
    for run, folder in ((of_teacher, teacher), *((run, kept / f"sst2-{run['row']}-0") for run in students)):
        ready = fastbert.pipeline(folder, device="cpu")
        examples = ready.task.read(data / "sst2" / "dev.tsv")
        found = ready.records(examples, False)
        right = sum(record["label"] == example.label for record, example in zip(found, examples, strict=True))
        assert run["score"] == right / 30
        report = folder / "report.json"
        assert not report.exists() or json.loads(report.read_text())["examples"] == 24
    assert len(students[0]["speed"]["ratios"]) == 2
    assert students[1]["speed"] is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(f"| sst2 | teacher |  | {of_teacher['score']:.4f} | 100.0% |")
    assert "logits=1, hidden=3 at temperature 2; 24 examples, epochs: 3, rate 0.0002" in lines[3]
