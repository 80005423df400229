"""The modules in a folder of sentence-transformers: modules.json and Routers' routes, as versions 2 to 6 write them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..checkpoint import PICKLE, SAFETENSORS
from ..storage import CheckpointError, read_json
from .source import parse_json

MODULES = "modules.json"
LIBRARY = "config_sentence_transformers.json"
ROUTER = "router_config.json"
ROUTERS = ("Router", "Asym")  # the name since version 5, and before
# The first of these files that exists and is not empty is read. Versions before 1 named the file after the model.
TRANSFORMER_SETTINGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# Types in modules.json: old versions wrote only the class, later ones module and class; the modules moved twice.
_OWN_TYPE = re.compile(
    r"sentence_transformers\.(?:models|sentence_transformer\.modules|base\.modules)(?:\.\w+)?\.(\w+)"
)


@dataclass(frozen=True)
class Listed:
    """An entry of a list of modules: its kind (the name of its class) and its folder, relative to the model's."""

    kind: str
    path: PurePosixPath


def has_modules(folder: Path) -> bool:
    return (folder / MODULES).is_file()


def listed_modules(folder: Path) -> list[Listed]:
    """The entries of modules.json, at least one. Raises CheckpointError, in one line, also for modules of other
    packages."""
    file = folder / MODULES
    modules = parse_json(file.read_text(encoding="utf-8", errors="replace"), str(file))
    texts = ("type", "path")
    if not (modules and isinstance(modules, list)) or not all(
        isinstance(module, dict) and all(isinstance(module.get(key), str) for key in texts) for module in modules
    ):
        raise CheckpointError(f"{file} must list one module or more, each with a type and a path")
    paths = [path_inside(folder, module["path"], file) for module in modules]
    for module in modules:
        for key in module.keys() - {"idx", "name", *texts}:
            if key != "kwargs" or module[key]:
                raise CheckpointError(f"{file}: the setting {key!r} of a module is not known")
    return [Listed(kind_of_type(module["type"], file), path) for module, path in zip(modules, paths, strict=True)]


def path_inside(folder: Path, path: str, file: Path) -> PurePosixPath:
    """A module's path from `file`. Raises CheckpointError if it leads out of the folder."""
    if not Path(os.path.normpath(folder / path)).is_relative_to(os.path.normpath(folder)):
        raise CheckpointError(f"{file}: the path {path!r} leads out of the folder")
    return PurePosixPath(path)


def kind_of_type(name: str, file: Path) -> str:
    """The class name of a type of sentence-transformers, without the module if that is a known one.

    Raises: CheckpointError for a class of another package, even if its name is a known one: it may compute anything.
    """
    if not name.startswith("sentence_transformers."):
        raise CheckpointError(f"{file}: the module {name!r} is not of sentence-transformers, so its code is not known")
    found = _OWN_TYPE.fullmatch(name)
    return found[1] if found else name


@dataclass(frozen=True)
class Routes:
    """A Router's file, its content, and the modules of each route in order, with folders relative to the model's.

    All methods raise CheckpointError, in one line.
    """

    file: Path
    content: dict[str, Any]
    modules: dict[str, list[Listed]]

    @classmethod
    def read(cls, folder: Path, router: Listed) -> Routes:
        """Reads a Router's file. folder: the model's."""
        inside = folder / router.path
        file = inside / ROUTER if (inside / ROUTER).is_file() else inside / "config.json"
        content = read_json(file)
        types, structure = content.get("types"), content.get("structure")
        if not isinstance(types, dict) or not all(isinstance(of, str) for of in types.values()):
            raise CheckpointError(f"{file} must have types, the class of each module by its folder")
        paths = {name: router.path / path_inside(inside, name, file) for name in types}
        if any(os.path.normpath(path) == os.path.normpath(router.path) for path in paths.values()):
            raise CheckpointError(f"{file}: a module's path is the Router's own folder, so reading it would never end")
        modules = {name: Listed(kind_of_type(of, file), paths[name]) for name, of in types.items()}
        if not (structure and isinstance(structure, dict)) or not all(
            isinstance(names, list) and all(isinstance(name, str) and name in modules for name in names)
            for names in structure.values()
        ):
            raise CheckpointError(
                f"{file} must have the structure of its routes, each a list of modules of which it has the types"
            )
        return cls(file, content, {route: [modules[name] for name in names] for route, names in structure.items()})

    def encoder(self) -> Listed:
        """The Transformer with which every route begins. No route may have another one."""
        first = {modules[0] if modules else None for modules in self.modules.values()}
        (found, *others) = first
        if others or found is None or found.kind != "Transformer":
            kinds = ", ".join(sorted(str(module and module.path) for module in first))
            raise CheckpointError(
                f"{self.file}: the routes must begin with one Transformer, and they begin with {kinds}"
            )
        for route, (_, *after) in self.modules.items():
            if found in after:
                raise CheckpointError(f"{self.file}: the route {route!r} has the Transformer {found.path} twice")
        return found


def encoder_in(folder: Path) -> Path:
    """The folder of BERT and its tokenizer: that of the first module in modules.json, or of a Router's Transformer;
    without modules.json the folder itself. Raises CheckpointError."""
    first = listed_modules(folder)[0] if has_modules(folder) else None
    if first is not None and first.kind == "Transformer":
        return folder / first.path
    if first is not None and first.kind in ROUTERS:
        return folder / Routes.read(folder, first).encoder().path
    return folder


def folder_of_config(folder: Path) -> Path:
    """The folder if it has a config.json, else the folder of BERT in it. Raises CheckpointError."""
    return folder if (folder / "config.json").is_file() else encoder_in(folder)


def home_of_encoder(folder: Path) -> str:
    """Where a converted folder holds BERT, as a relative path: at its root, or, with a Router, in the original
    subfolder."""
    if has_modules(folder) and listed_modules(folder)[0].kind in ROUTERS:
        return encoder_in(folder).relative_to(folder).as_posix()
    return ""


def files_of_modules(folder: Path) -> dict[str, Path]:
    """The files outside BERT's folder that sentence-transformers reads: name in the model's folder -> path. Empty if
    there is no modules.json.

    Raises: CheckpointError for an invalid list, for a second encoder, and for other modules at the root.
    """
    if not has_modules(folder):
        return {}
    files = {name: folder / name for name in (MODULES, LIBRARY)}
    first, *modules = listed_modules(folder)
    if first.kind in ROUTERS:
        routes = Routes.read(folder, first)
        encoder = routes.encoder()
        files[routes.file.relative_to(folder).as_posix()] = routes.file
        modules += [module for route in routes.modules.values() for module in route if module != encoder]
    for module in modules:
        if not module.path.parts or module.kind == "Transformer":
            raise CheckpointError(
                f"{folder / MODULES}: {module.kind} in {str(module.path)!r} comes after the encoder, "
                "where it is not converted"
            )
        for file in sorted((folder / module.path).rglob("*")):
            if file.suffix == ".json" or file.name in (SAFETENSORS, PICKLE):
                files[file.relative_to(folder).as_posix()] = file
    return {name: file for name, file in files.items() if file.is_file()}


def put_encoder_at_root(file: Path) -> None:
    """Rewrites a modules.json so that the folder of its first module is the root."""
    modules = parse_json(file.read_text(encoding="utf-8"), str(file))
    if modules and modules[0]["path"]:
        modules[0]["path"] = ""
        file.write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")


def read_transformer_settings(folder: Path) -> tuple[Path, dict]:
    """(file, content) of a Transformer module's settings; the content is empty if there is no file."""
    for name in TRANSFORMER_SETTINGS:
        if (folder / name).is_file() and (found := read_json(folder / name)):
            return folder / name, found
    return folder / TRANSFORMER_SETTINGS[0], {}
