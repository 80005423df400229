"""The GPU of this machine: its properties, the assemblers that support it, and its ceilings.

    python -m benchmarks.gpu_day.card --json FILE

The file is written as soon as the properties are known, and again with the ceilings: the fastest matrix product of each
dtype and the fastest copy, measured on random data.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastbert.storage import write_atomically

from ..harness import machine

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"
# The smallest program that shows whether an assembler supports an architecture.
NOTHING = ".version 8.0\n.target {target}\n.address_size 64\n.visible .entry nothing() {{ ret; }}\n"


def facts(device: torch.device) -> dict[str, Any]:
    found = {"device": machine.describe(device), "versions": machine.versions(), "clocks": _clocks(), "ceilings": None}
    capability = found["device"]["capability"] or [9, 0]
    found["arch"] = "sm_{}{}".format(*capability)
    found["multiprocessors"] = 4
    if device.type == "cuda":
        found["multiprocessors"] = torch.cuda.get_device_properties(device).multi_processor_count
    return found | {"assemblers": assemblers(found["arch"])}


def _clocks() -> dict[str, str]:
    try:
        query = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {}
    return dict(zip(CLOCKS.split(","), map(str.strip, line.split(",")), strict=False))


def assemblers(arch: str) -> list[dict[str, Any]]:
    """The assemblers in Triton's package: path, version, and whether each supports the architecture. The first is the
    one that Triton uses by default."""
    try:
        import triton
        from triton.backends.nvidia.compiler import get_ptxas
    except ImportError:
        return []
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    default = Path(get_ptxas(int(arch.removeprefix("sm_"))).path)
    paths = [folder / name for name in ("ptxas", "ptxas-blackwell") if (folder / name).is_file()]
    paths.sort(key=lambda path: path != default)
    return [{"path": str(path), "version": _version(path), "takes": _takes(path, arch)} for path in paths]


def _version(path: Path) -> str | None:
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"V([0-9.]+)", said)
    return found and found[1]


def _takes(path: Path, arch: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "nothing.ptx")
        source.write_text(NOTHING.format(target=arch), encoding="ascii")
        command = [path, f"-arch={arch}", source, "-o", Path(folder, "nothing.cubin")]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day.card",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="FILE", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    found = facts(device)

    def write() -> None:
        with write_atomically(args.json) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    write()
    dtypes = [torch.bfloat16, torch.float16, torch.float32]
    found["ceilings"] = machine.ceilings(device, dtypes[::2] if args.quick else dtypes, args.quick)
    found["clocks_after"] = _clocks()
    write()
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
