"""Checkpoints: find a model's folder, read its weights, put them into a module, write them back.

    hub id or path --resolve--> folder --load_state_dict--> {name: tensor} --load_into--> module
    module.state_dict() --save_state_dict--> folder

Names follow transformers' BERT; old spellings of the same names are understood. A file is written whole or not at
all (`storage.write_atomically`). What goes wrong with a checkpoint is a CheckpointError whose message fits one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .storage import CheckpointError as CheckpointError
from .storage import make_folder as make_folder
from .storage import read_json as read_json
from .storage import write_atomically as write_atomically
from .storage import write_json as write_json

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

# A folder holds a model, or at least its tokenizer, when one of these is in it.
MARKERS = ("config.json", "modules.json", "tokenizer.json", "vocab.txt")
_DESCRIPTIONS = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "modules.json", "config_sentence_transformers.json", "sentence_*_config.json",
)  # fmt: skip
_WEIGHTS = (SAFETENSORS, SAFETENSORS_INDEX, "model-*-of-*.safetensors")
_PICKLED_WEIGHTS = (PICKLE, PICKLE_INDEX, "pytorch_model-*-of-*.bin")
# What `fastbert.formats` reads. Not GGUF: such a repository holds the same model a dozen times.
_OTHER_WEIGHTS = (
    "*.index", "*.data-*-of-*", "checkpoint", "*_config.json", "*vocab*.txt", "*.model", "variables/*", "assets/*",
    "*.pdparams", "model.weights.h5", "metadata.json",
)  # fmt: skip
# Where sentence-transformers keeps the transformer in place of the root: old versions in 0_Transformer, and a Router
# in query_0_Transformer or the like.
_SUBFOLDERS = ("0_*/", "*_0_Transformer/")
# Of sentence-transformers' other modules (1_Pooling, 2_Dense, document_1_Dense): small files.
_MODULE_FILES = (
    "router_config.json",
    *(
        f"{folder}_*/{name}"
        for folder in ("[1-9]", "[1-9][0-9]", "*_[1-9]", "*_[1-9][0-9]")
        for name in ("config.json", "router_config.json", SAFETENSORS, PICKLE)
    ),
)

_LEGACY_ENDINGS = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_NOT_WEIGHTS = ("*embeddings.position_ids", "*embeddings.token_type_ids")  # buffers that old transformers saved
_SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_NAMES_IN_A_MESSAGE = 10


# ---- from a name to a folder -----------------------------------------------------------------------------


def resolve(id_or_path: str | os.PathLike, *, revision: str | None = None) -> Path:
    """The local folder of a model: the path itself where it is a folder, else a download (or the cache) of a hub id.

    From the hub come only the configuration, the tokenizer and the safetensors weights; the pickled weights come
    where there are no safetensors, and other frameworks' where there are neither.

    Raises: CheckpointError, in one line, for a folder that holds no model, an unknown id, or no network.
    """
    path = Path(id_or_path).expanduser()
    if path.is_dir():
        if not any((path / marker).is_file() for marker in MARKERS):
            raise CheckpointError(f"{path} is not a model folder: it has none of {', '.join(MARKERS)}")
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; expected a model's folder or a hub id")
    model_id = os.fspath(id_or_path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model_id) or model_id.startswith("."):
        raise CheckpointError(f"{model_id!r} is neither an existing folder nor a hub id (name or owner/name)")
    folder = _download(model_id, revision, (*_DESCRIPTIONS, *_WEIGHTS))
    if not _has_any(folder, "*.safetensors"):
        folder = _download(model_id, revision, (*_DESCRIPTIONS, *_PICKLED_WEIGHTS))
        if not _has_any(folder, "*.bin"):
            folder = _download(model_id, revision, (*_DESCRIPTIONS, *_OTHER_WEIGHTS))
            if any(found for pattern in _OTHER_WEIGHTS for found in folder.glob(pattern)):
                return folder
    if not any((folder / marker).is_file() for marker in MARKERS):
        raise CheckpointError(f"{model_id} on the hub is not a model: it has none of {', '.join(MARKERS)}")
    return folder


def _has_any(folder: Path, pattern: str) -> bool:
    return any(found for inside in ("", *_SUBFOLDERS) for found in folder.glob(inside + pattern))


def _download(model_id: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import errors, snapshot_download  # slow to import, and of no use for local folders

    patterns += (*(folder + pattern for folder in _SUBFOLDERS for pattern in patterns), *_MODULE_FILES)
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=list(patterns)))
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{model_id} is gated: ask for access on its page and log in") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"unknown model {model_id!r}: no such folder here and no such model on the hub"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{model_id} has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"cannot get {model_id!r}: there is no such folder here, the hub cannot be reached, "
            "and the model is not in the local cache"
        ) from error
    except Exception as error:  # of the HTTP library that this version of the hub's client uses
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"cannot get {model_id!r} from the hub: {reason}") from error


# ---- reading weights -------------------------------------------------------------------------------------


def load_state_dict(folder: str | os.PathLike) -> dict[str, Tensor]:
    """The weights in a model's folder, on the CPU, memory-mapped where the format allows.

    Looks for model.safetensors, then its shards, then pytorch_model.bin, then its shards. Pickled files are read
    with weights_only=True, so they can hold tensors and no code.

    Raises: CheckpointError naming the file that is missing, truncated or corrupt.
    """
    folder = Path(folder)
    formats = ((SAFETENSORS, SAFETENSORS_INDEX, _read_safetensors), (PICKLE, PICKLE_INDEX, _read_pickle))
    for name, index, read in formats:
        if (folder / name).is_file():
            return read(folder / name)
        if (folder / index).is_file():
            return _read_shards(folder / index, read)
    raise CheckpointError(f"{folder} has no weights: expected {SAFETENSORS} or {PICKLE}, whole or in shards")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError  # here, so that whatever loads no checkpoint does without it
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error})") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    # Only the zip format (torch 1.6 and later) can be mapped.
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        # torch's own words advise to load without weights_only, which runs whatever code the file names
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {wanted[1]}, and what a pickle names is run" if wanted else "it is not a pickle of tensors"
        raise CheckpointError(f"{path} is truncated or not a file of plain tensors ({reason})") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{path} is truncated or not a file of plain tensors ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} must hold a dict of tensors (a state_dict), got something else")
    return dict(state)


def _read_shards(index: Path, read) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of names to files")
    state: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names a shard outside its folder: {shard!r}")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index.parent} lacks the shard {shard} that {index.name} names")
        state.update(read(index.parent / shard))
    if absent := sorted(weight_map.keys() - state.keys()):
        raise CheckpointError(f"the shards of {index} lack {listed(absent)}")
    return state


# ---- writing weights -------------------------------------------------------------------------------------


def save_state_dict(
    folder: str | os.PathLike, state: dict[str, Tensor], max_shard_size: int | str = "5GB"
) -> list[Path]:
    """Writes model.safetensors, or shards with an index where the tensors take more than max_shard_size bytes.

    Of several names for one tensor (tied weights) the first is written, as transformers does. One file replaces its
    predecessor in one step. Several files cannot: there the old weights are taken away first, once all the new
    bytes are on disk, so that an interruption leaves old weights, new weights or none, never a mixture.

    Returns: the files written. Raises: CheckpointError where the folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = make_folder(folder)
    tensors = _without_aliases(state)
    shards = _split(tensors, _size_in_bytes(max_shard_size))
    stale = {path for pattern in _WEIGHTS for path in folder.glob(pattern)}
    if len(shards) == 1:
        names = [SAFETENSORS]
    else:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    try:
        with contextlib.ExitStack() as stack:
            if len(shards) > 1:
                # Entered first, so it takes its name last: without an index the shards are not a model.
                index = stack.enter_context(write_atomically(folder / SAFETENSORS_INDEX))
                total = sum(t.nbytes for t in tensors.values())
                weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
                content = {"metadata": {"total_size": total}, "weight_map": weight_map}
                index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            for name, shard in zip(names, shards, strict=True):
                temporary = stack.enter_context(write_atomically(folder / name))
                save_file({key: _owned(t) for key, t in shard.items()}, temporary, metadata={"format": "pt"})
            if len(shards) > 1:
                for name in (SAFETENSORS_INDEX, SAFETENSORS):
                    (folder / name).unlink(missing_ok=True)
        written = [folder / name for name in names] + [folder / SAFETENSORS_INDEX] * (len(shards) > 1)
        for path in stale - set(written):
            path.unlink(missing_ok=True)
    except SafetensorError as error:
        raise CheckpointError(f"cannot write weights to {folder}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot write weights to {folder}: {error.strerror or error}") from error
    return written


def _identity(t: Tensor) -> tuple:
    """Equal for two tensors that are the same memory seen the same way."""
    return t.device, t.dtype, t.data_ptr(), tuple(t.shape), t.stride()


def _without_aliases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors, seen = {}, set()
    for name, t in state.items():
        key = _identity(t)
        if t.numel() and key in seen:
            continue
        seen.add(key)
        tensors[name] = t.detach()
    return tensors


def _owned(t: Tensor) -> Tensor:
    """On the CPU, contiguous, and alone in its storage: what safetensors can write."""
    t = t.cpu().contiguous()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def _split(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """In order, each shard at most `limit` bytes unless one tensor alone is larger. At least one shard."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, t in tensors.items():
        if shards[-1] and size + t.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = t
        size += t.nbytes
    return shards


def _size_in_bytes(size: int | str) -> int:
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", size.upper())
        if not match:
            raise ValueError(f"max_shard_size must be bytes or a text such as '5GB', got {size!r}")
        size = int(float(match[1]) * _SIZE_UNITS[match[2]])
    if size <= 0:
        raise ValueError(f"max_shard_size must be positive, got {size}")
    return size


# ---- into a module ---------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """What `load_into` left alone: names the module has and the checkpoint has not, and the reverse."""

    missing: list[str]
    unexpected: list[str]


def load_into(
    module: nn.Module,
    state: dict[str, Tensor],
    *,
    strict: bool = True,
    ignore_missing: Iterable[str] = (),
    ignore_unexpected: Iterable[str] = (),
    assign: bool = False,
    source: str | os.PathLike = "the checkpoint",
) -> Loaded:
    """Puts a checkpoint's tensors into a module, cast to its dtype and device.

    The `bert.` prefix is added or taken away where that makes a name fit; LayerNorm.gamma and beta mean weight and
    bias; saved position_ids are ignored. A name that is tied in the module to one that was loaded is not missing.

    Args:
        strict: raise on missing and unexpected names too; a wrong shape raises always.
        ignore_missing, ignore_unexpected: shell patterns ("cls.*") of names that may be so even when strict,
            in the module's spelling and in the checkpoint's.
        assign: make the checkpoint's tensors the module's own instead of copying (for a module on the meta device;
            tied weights must be tied again after that).
        source: what a message calls the checkpoint.

    Returns: the missing and the unexpected names. Raises: CheckpointError that lists them.
    """
    own = module.state_dict(keep_vars=True)
    fitting, unexpected = _fit_names(own, state)
    names_of = defaultdict(list)  # one tensor -> its names in the module
    for name, t in own.items():
        names_of[id(t)].append(name)

    missing = [name for name in own if not any(alias in fitting for alias in names_of[id(own[name])])]
    misfits = [f"{name}: {why}" for name, t in fitting.items() if (why := _why_not(t, own[name]))]
    untied = []
    for aliases in names_of.values():
        first, *others = [name for name in aliases if name in fitting] or [None]
        for name in others:
            if strict and not misfits and not torch.equal(fitting[name], fitting[first]):
                untied.append(f"{name} and {first}")
            del fitting[name]

    problems = []
    if strict:
        problems += _problem("missing", [n for n in missing if not _matches(n, ignore_missing)])
        problems += _problem("unexpected", [n for n in unexpected if not _matches(n, ignore_unexpected)])
    problems += _problem("that do not fit", misfits)
    problems += _problem("tied in the module but different in the file", untied)
    if problems:
        raise CheckpointError(f"{source} does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(fitting, strict=False, assign=assign)
    return Loaded(missing, unexpected)


def _fit_names(own: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors under the module's own names, the names that are none of its own)."""
    fitting: dict[str, Tensor] = {}
    unexpected = []
    # Names that are exactly right go first: where a file has both `x` and `bert.x`, the exact one wins.
    for name in sorted(state, key=lambda name: name not in own):
        modern = current_name(name)
        for candidate in (modern, modern.removeprefix("bert."), f"bert.{modern}"):
            if candidate in own and candidate not in fitting:
                fitting[candidate] = state[name]
                break
        else:
            if not _matches(name, _NOT_WEIGHTS):
                unexpected.append(name)
    return {name: fitting[name] for name in own if name in fitting}, unexpected


def current_name(name: str) -> str:
    """A weight's name with LayerNorm.weight and bias, whichever way the file spells them."""
    for old, new in _LEGACY_ENDINGS.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _why_not(t: Tensor, own: Tensor) -> str | None:
    if t.shape != own.shape:
        return f"{list(t.shape)} in the file, {list(own.shape)} in the module"
    if t.is_floating_point() != own.is_floating_point():  # for one, int8 weights that need their scales
        return f"{t.dtype} in the file, {own.dtype} in the module"
    return None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _problem(kind: str, names: list[str]) -> list[str]:
    return [f"{len(names)} {kind} ({listed(names)})"] if names else []


def listed(names: list[str]) -> str:
    """Names for a message, the first of them where there are many."""
    more = len(names) - _NAMES_IN_A_MESSAGE
    return ", ".join(names[:_NAMES_IN_A_MESSAGE]) + (f" and {more} more" if more > 0 else "")
