"""The commands that print information: help, info, verify, bench, and a command that a test adds."""

import re
import subprocess
import sys

import pytest
import torch

import fastbert.cli
from fastbert import BertConfig, info
from fastbert.cli.main import commands_found, main

pytestmark = pytest.mark.once


def test_help_needs_no_torch():
    code = (
        "import sys; from fastbert.cli.main import main\n"
        "for words in (['--help'], ['encode', '--help'], ['encode']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'triton'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert "examples:" in result.stdout


def test_info_counts_the_heads_that_are_left():
    def heads(**pruned):
        return info._heads(BertConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, **pruned))

    assert heads() == "4 of 12"
    assert heads(pruned_heads={0: [1, 2]}) == "2 to 4 of 12"
    assert heads(pruned_heads={0: [1, 2], 1: [0, 3]}) == "2 of 12"


def test_info(folder, capsys):
    assert main(["info"]) == 0
    plain = capsys.readouterr().out
    assert f"torch                {torch.__version__}" in plain
    for operator in ("attention", "add_layer_norm", "feed_forward", "embedding_layer_norm", "pool"):
        assert f"\n  {operator} " in plain
    assert main(["info", str(folder)]) == 0
    assert "32 tokens; the rest of a longer one is cut off" in capsys.readouterr().out


def test_verify_is_a_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["verify", "--op", "nonsense"])
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch("fastbert: error: .*nonsense.*\n", said.err)


def test_a_command_is_found_without_being_listed(tmp_path, monkeypatch, capsys):
    (tmp_path / "greet.py").write_text(
        'ORDER, SUMMARY = 9, "say good day"\n'
        'def add_arguments(parser): parser.add_argument("name")\n'
        'def run(args): print("good day,", args.name); return 3\n'
    )
    monkeypatch.setattr("fastbert.cli.__path__", [*fastbert.cli.__path__, str(tmp_path)])
    assert main(["greet", "you"]) == 3
    assert capsys.readouterr().out == "good day, you\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "say good day" in capsys.readouterr().out


def test_no_two_commands_have_the_same_place_in_help():
    """Two commands with one ORDER would stand in `--help` in an order that differs between file systems."""
    places = [command.ORDER for command in commands_found()]
    assert places == sorted(set(places))
    assert len(places) >= 16


BENCH = {  # words -> exit code, and output: the benchmarks' own, from any folder
    "help": (["--help"], 0, "Time fastbert and the alternatives to it on this machine"),
    "wrong_usage": (["--suite", "nothing"], 2, "fastbert: error: argument --suite"),
    "failed": (["--out", "nowhere/a.json", "--suite", "cold"], 1, "fastbert: error: no folder 'nowhere'"),
}


@pytest.mark.parametrize(("words", "code", "message"), BENCH.values(), ids=BENCH)
def test_bench_passes_everything_on(words, code, message, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise AssertionError('of somebody else')\n")
    command = [sys.executable, "-m", "fastbert", "bench", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert (done.returncode, message in done.stdout + done.stderr) == (code, True), done.stderr


def test_bench_outside_of_a_checkout(monkeypatch, capsys):
    monkeypatch.setattr("fastbert.cli.bench._checkout", lambda: None)
    assert main(["bench", "--quick"]) == 1
    assert "fastbert: error: the benchmarks are in fastbert's repository" in capsys.readouterr().err
