"""The steps of a run on a GPU, most important first: commands, time limits, and replacements for a rehearsal."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import PTXAS_VARIABLES

CORES = os.cpu_count() or 1
SANITIZER = "compute-sanitizer"
SLOWLY = 300.0  # seconds that a step of the rehearsal may take on a machine busy with other work


@dataclass(frozen=True)
class Step:
    """`command(results folder, seconds, record so far)` gives the command. The step needs at least `least` seconds."""

    name: str
    limit: float
    command: Callable[[Path, float, Any], list[str]]
    least: float = 12.0
    needs: str | None = None  # a program that has to be installed
    environment: Callable[[Any], dict[str, str]] = lambda record: {}
    unless: Callable[[], str | None] = lambda: None

    def why_not(self) -> str | None:
        """The reason why the step cannot run here, or None."""
        if self.needs is not None and shutil.which(self.needs) is None:
            return f"{self.needs} is not installed"
        return self.unless()


def day(python: str, rehearsal: bool) -> list[list[Step]]:
    """The waves of steps; all steps of a wave run at the same time."""
    return _rehearsal(python) if rehearsal else _day(python)


def _verify(python: str, step: str, *arguments: str) -> Callable:
    def command(results: Path, seconds: float, record: Any) -> list[str]:
        # the last two seconds are for writing the table
        lines = ["--json-lines", str(results / f"{step}.jsonl"), "--case-seconds", "60"]
        return [python, "-m", "fastbert", "verify", *arguments, *lines]

    return command


def _recording(python: str, *arguments: str) -> Callable:
    def command(results: Path, seconds: float, record: Any) -> list[str]:
        verify = _verify(python, "record", "--shapes", "small", "--dtype", "bf16", *arguments)(results, seconds, record)
        return [*verify, "--record", str(results / "recording.safetensors")]

    return command


def _no_safetensors() -> str | None:
    try:
        found = importlib.util.find_spec("safetensors")
    except ImportError:
        found = None
    return "safetensors is not installed" if found is None else None


def _bench(python: str, step: str, *arguments: str, spare: float = 8.0) -> Callable:
    def command(results: Path, seconds: float, record: Any) -> list[str]:
        minutes = max(0.05, (seconds - spare) / 60)  # a case that begins at the limit can end in the spare time
        files = ["--out", str(results / f"{step}.json"), "--ceilings", str(results / "card.json")]
        return [python, "-m", "fastbert", "bench", *arguments, "--budget-minutes", f"{minutes:.2f}", *files]

    return command


def _other_assembler(record: Any) -> dict[str, str]:
    """The assembler in Triton's package that is not its default, if it supports the GPU. Which of the variables Triton
    reads depends on its version."""
    path = record.other_assembler()
    return {} if path is None else dict.fromkeys(PTXAS_VARIABLES, path)


def _better_assembler(record: Any) -> dict[str, str]:
    """The newer assembler, if attention passed with it and failed with Triton's default."""
    return _other_assembler(record) if record.newer_is_better() else {}


def _day(python: str) -> list[list[Step]]:
    module = [python, "-m"]
    jobs = str(CORES)
    without_compile = ("--peers", "auto,-torch.compile")
    operators = "add_layer_norm,feed_forward,linear_cross_entropy,embedding_layer_norm,pool"

    def card(results: Path, seconds: float, record: Any) -> list[str]:
        return [*module, "benchmarks.gpu_day.card", "--json", str(results / "card.json")]

    def precompile(results: Path, seconds: float, record: Any) -> list[str]:
        return [
            *module, "benchmarks.gpu_day.precompile", "--card", str(results / "card.json"), "--both-assemblers",
            "--json-lines", str(results / "precompile.jsonl"), "--jobs", jobs, "--seconds", f"{seconds - 3:.0f}",
        ]  # fmt: skip

    def timed(name: str, limit: float, *arguments: str, **more: Any) -> Step:
        command = _bench(python, name, "--device", "cuda", *arguments)
        return Step(name, limit, command, environment=_better_assembler, **more)

    def sanitizer(tool: str, ops: Sequence[str], limit: float) -> Step:
        chosen = [word for op in ops for word in ("--op", op)]

        def command(results: Path, seconds: float, record: Any) -> list[str]:
            checked = _verify(python, tool, "--shapes", "small", "--dtype", "bf16", *chosen)(results, seconds, record)
            return [SANITIZER, "--tool", tool, "--error-exitcode", "9", *checked]

        # With torch's cache, an access past a tensor could stay within a larger block and go unnoticed.
        memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Step(tool, limit, command, needs=SANITIZER, environment=lambda record: memory)

    products = ("attention", "linear_act", "feed_forward")
    return [
        [Step("card", 40, card)],
        [Step("precompile", 130, precompile)],
        [Step("verify", 110, _verify(python, "verify", "--jobs", jobs, *_dtypes()))],
        [Step("verify-newer", 50, _verify(python, "verify-newer", "--jobs", jobs, *_dtypes(), "--op", "attention",
                                          "--op", "attention_padded"), environment=_other_assembler)],
        [Step("record", 30, _recording(python), unless=_no_safetensors)],
        [timed("encoder", 70, "--suite", "encoder,latency", *without_compile)],
        [timed("attention", 80, "--suite", "kernels", "--operator", "attention", *without_compile)],
        [timed("training", 45, "--suite", "training", *without_compile)],
        [timed("operators", 55, "--suite", "kernels", "--operator", operators, *without_compile)],
        [timed("cold", 40, "--suite", "cold", "--quick", *without_compile)],
        [timed("compile", 50, "--suite", "encoder,training", "--workload", "base_natural", "--peers", "torch.compile")],
        [sanitizer("memcheck", products, 40)],
        [sanitizer("racecheck", products[:2], 60)],
    ]  # fmt: skip


def _dtypes() -> list[str]:
    return [word for dtype in ("bf16", "fp16", "fp32") for word in ("--dtype", dtype)]


def _rehearsal(python: str) -> list[list[Step]]:
    """The same steps, by name and order, on a CPU: kernels are interpreted or only bound, and two are compiled."""
    module = [python, "-m"]
    interpreted = {"TRITON_INTERPRET": "1"}

    def card(results: Path, seconds: float, record: Any) -> list[str]:
        return [*module, "benchmarks.gpu_day.card", "--device", "cpu", "--quick", "--json", str(results / "card.json")]

    def precompile(results: Path, seconds: float, record: Any) -> list[str]:
        return [
            *module, "benchmarks.gpu_day.precompile", "--card", str(results / "card.json"), "--both-assemblers",
            "--quick", "--most", "2", "--json-lines", str(results / "precompile.jsonl"), "--jobs", "2",
        ]  # fmt: skip

    def verify(name: str, *arguments: str) -> Step:
        command = _verify(python, name, "--device", "cpu", "--shapes", "small", *arguments)
        return Step(name, SLOWLY, command, environment=lambda record: interpreted)

    def timed(name: str, *arguments: str) -> Step:
        # only a very busy machine reaches this limit; the rehearsal ends when everything is measured
        command = _bench(python, name, "--device", "cpu", "--dtype", "float32", "--quick", *arguments)
        return Step(name, SLOWLY, command)

    minilm = ("--workload", "minilm_natural")
    return [
        [Step("card", SLOWLY, card)],
        [Step("precompile", SLOWLY, precompile)],
        [verify("verify", "--jobs", "2", "--op", "pool", "--op", "add_rms_norm", *_dtypes())],
        [verify("verify-newer", "--jobs", "1", "--op", "attention_padded", "--dtype", "fp16")],
        [Step("record", SLOWLY, _recording(python, "--device", "cpu", "--op", "add_rms_norm"), unless=_no_safetensors,
              environment=lambda record: interpreted)],
        [timed("encoder", "--suite", "encoder", *minilm, "--peers", "none")],
        [timed("attention", "--suite", "kernels", "--operator", "attention", "--peers", "torch")],
        [timed("training", "--suite", "training", *minilm, "--peers", "torch")],
        [timed("operators", "--suite", "kernels", "--operator", "add_layer_norm,pool", "--peers", "torch")],
        [timed("cold", "--suite", "cold", "--peers", "none")],
        [timed("compile", "--suite", "kernels", "--operator", "pool", "--peers", "torch.compile")],
        [verify("memcheck", "--dtype", "bf16", "--op", "add_rms_norm")],
        [verify("racecheck", "--dtype", "bf16", "--op", "add_rms_norm")],
    ]  # fmt: skip


# ---- the second run --------------------------------------------------------------------------------------

# kernels, and seconds for them
TUNED = (("attention", 150), ("gemm", 150), ("layer_norm", 50), ("embedding,pool,cross_entropy", 70))


def tune(python: str, rehearsal: bool) -> list[list[Step]]:
    """The GPU's properties, then the searches of benchmarks.tuning.tune one after the other, with the remaining
    time."""

    def search(kernels: str, limit: float) -> Step:
        name = f"tune-{kernels.split(',')[0]}"

        def command(results: Path, seconds: float, record: Any) -> list[str]:
            tiny = ["--rehearse", "--most", "1"] if rehearsal else []
            minutes = f"{max(0.05, (seconds - 15) / 60):.2f}"
            out = ["--budget-minutes", minutes, "--out", str(results / f"{name}.json")]
            return [python, "-m", "benchmarks.tuning.tune", "--kernel", kernels, *tiny, *out]

        return Step(name, limit, command)

    first = day(python, rehearsal)[0]
    chosen = (("pool", 120),) if rehearsal else TUNED
    return [first, *([search(kernels, limit)] for kernels, limit in chosen)]
