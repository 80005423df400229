"""The machine under test: its description, installed packages, and the ceilings that it reaches in this run."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from .peer import version
from .timing import Clock

PACKAGES = (
    "torch triton transformers sentence-transformers onnxruntime openvino liger-kernel xformers flash-attn "
    "transformer-engine numpy"
).split()

# words in a processor's name -> its part of the name of a results folder
SLUGS = (
    ("h200", "h200"), ("h100", "h100"), ("a100", "a100"), ("b200", "b200"), ("l40", "l40"), ("4090", "rtx4090"),
)  # fmt: skip


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    return found | {name: v for name in PACKAGES if (v := version(name))}


def commit() -> str | None:
    """The commit of this checkout, with "+" if files differ from it; None outside of a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        return subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """The `device` of a result file."""
    facts = {
        "type": device.type, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "driver": None, "capability": None,
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name, "memory_bytes": properties.total_memory, "driver": _driver(),
            "capability": [properties.major, properties.minor],
        }  # fmt: skip
    else:
        facts |= {"name": _cpu_name(), "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    return facts | {"slug": _slug(facts["name"], device)}


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _cpu_info(key: str, text: str | None = None) -> str:
    """A value of /proc/cpuinfo, or of `text` in its place; "" where there is none."""
    if text is None:
        try:
            text = Path("/proc/cpuinfo").read_text()
        except OSError:
            text = ""
    found = re.search(rf"^{key}[ \t]*:[ \t]*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _slug(name: str, device: torch.device, cpuinfo: str | None = None) -> str:
    """The name of the results folder of this device."""
    plain = name.lower()
    if device.type == "cuda":
        return next((slug for word, slug in SLUGS if word in plain), _words(plain))
    maker = _cpu_info("vendor_id", cpuinfo)
    if maker == "AuthenticAMD" and "epyc" in plain:
        family, model = (_cpu_info(key, cpuinfo) for key in ("cpu family", "model"))
        if family.isdigit() and model.isdigit() and (zen := _zen(int(family), int(model))):
            return f"cpu-epyc-{zen}"
    short = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}.get(maker, "")
    return "cpu-" + _words(plain if short in plain else f"{short} {plain}")


def _zen(family: int, model: int) -> str | None:
    """AMD's generation, from numbers that virtual machines pass on even if they hide the model's name."""
    if family == 25:  # Zen 3 and Zen 4 share it
        return "zen4" if 0x10 <= model <= 0x1F or 0x60 <= model <= 0xAF else "zen3"
    return {23: "zen2" if model >= 0x30 else "zen1", 26: "zen5"}.get(family)


def _words(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text)).strip("-")


# ---- ceilings --------------------------------------------------------------------------------------------


def ceilings(device: torch.device, dtypes: list[torch.dtype], quick: bool = False) -> dict[str, Any]:
    """The fastest matrix product of each dtype and the fastest copy, over a few large sizes. Random data."""
    clock = Clock(device)
    large = device.type == "cuda"
    sizes = (4096, 8192) if large else (1024,) if quick else (1024, 2048)
    gemm = {str(d).removeprefix("torch."): max(_gemm(clock, d, n) for n in sizes) / 1e12 for d in dtypes}
    copies = (2**28, 2**30) if large else (2**26,) if quick else (2**26, 2**28)
    return {"gemm_tflops": gemm, "copy_gbs": max(_copy(clock, n) for n in copies) / 1e9}


def _best(clock: Clock, run, calls: int = 20) -> float:
    """The fastest call: a ceiling is what the machine can do, not what it does on average."""
    clock(run)
    return min(clock(run) for _ in range(calls))


def _gemm(clock: Clock, dtype: torch.dtype, n: int) -> float:
    a, b = (torch.randn(n, n, device=clock.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _best(clock, lambda: torch.mm(a, b.T, out=out))


def _copy(clock: Clock, size: int) -> float:
    """Bytes a second, read plus written."""
    source = torch.ones(size // 4, device=clock.device)
    target = torch.empty_like(source).zero_()
    return 2 * size / _best(clock, lambda: target.copy_(source))
