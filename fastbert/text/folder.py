"""A tokenizer's folder, read as transformers 5 reads it.

    vocab.txt, or the vocabulary in tokenizer.json      the words
    tokenizer_config.json                               everything else, for BERT's classes of tokenizers
    special_tokens_map.json, added_tokens.json          what tokenizer_config.json may lack, in folders before 2023

BERT's classes take from tokenizer.json only the words and, if tokenizer_config.json names none, the added tokens; they
build normalizer, pre-tokenizer and post-processor themselves. Every other class uses tokenizer.json unchanged.
transformers 4 used it unchanged for all classes; `notes` lists where the two versions give different ids for a folder.
The ids here are those of version 5.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Encoding, decoders, models, normalizers, pre_tokenizers, processors

from ..storage import CheckpointError, read_json

CONFIG = "tokenizer_config.json"
_WORDS, _WHOLE = "vocab.txt", "tokenizer.json"
# The tokens that BERT's classes have even where no file names them.
SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_NEEDED = ("unk_token", "cls_token", "sep_token")
# In the order in which transformers adds them to the vocabulary.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# transformers' tokenizer classes that use a vocabulary as BERT does; BertJapaneseTokenizer, for one, does not.
_BERT_CLASSES = (
    "Bert", "ConvBert", "DistilBert", "DPRContextEncoder", "DPRQuestionEncoder", "Electra", "LayoutLM", "Lxmert",
    "MobileBert", "SqueezeBert",
)  # fmt: skip
_NORMALIZER = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}
# The keys of tokenizer_config.json that change ids, and are read here or in `Tokenizer`.
_HONOURED = frozenset((
    *_NORMALIZER, "tokenizer_class", "model_max_length", "max_len", "truncation_side", "split_special_tokens",
    "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens",
))  # fmt: skip
# Keys that change no id in transformers 5: paths of files, padding of batches, saved options of single calls, settings
# of decoding or chats, and settings of transformers 4's tokenizers written in Python.
_HARMLESS = frozenset((
    "name_or_path", "vocab_file", "tokenizer_file", "full_tokenizer_file", "special_tokens_map_file", "files_loaded",
    "cache_dir", "revision", "subfolder", "token", "use_auth_token", "force_download", "resume_download", "proxies",
    "local_files_only", "is_local", "trust_remote_code", "use_fast", "from_slow", "backend", "processor_class",
    "model_type", "dtype", "torch_dtype", "device", "device_map", "verbose", "errors", "language", "tokenizer_type",
    "model_input_names", "padding", "padding_side", "pad_to_multiple_of", "pad_token_type_id", "pad_token_id",
    "truncation", "truncation_strategy", "max_length", "stride", "return_token_type_ids", "return_tensors",
    "clean_up_tokenization_spaces", "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "chat_template", "chat_control_tokens", "response_template", "response_schema", "wordpieces_prefix",
    "add_bos_token", "add_eos_token", "do_basic_tokenize", "never_split", "do_word_tokenize", "do_subword_tokenize",
    "word_tokenizer_type", "subword_tokenizer_type", "sp_model_kwargs", "legacy",
))  # fmt: skip
_PROPERTIES = frozenset(("__type", "content", "single_word", "lstrip", "rstrip", "normalized", "special"))


@dataclass
class Settings:
    """The settings in the files of a folder, apart from the words.

    Attributes:
        config: the content of tokenizer_config.json.
        named: role ("mask_token", or a special token's own name) -> token, for each role that a file names; None for a
            role that a file sets to null.
        extra: further special tokens, in the order of their ids.
        added: id -> token, for tokens whose ids a file gives.
        notes: sentences about ids that differ in transformers 4.
    """

    config: dict[str, Any]
    named: dict[str, str | AddedToken | None]
    extra: list[str | AddedToken]
    added: dict[int, AddedToken]
    notes: list[str]


def read_folder(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any], list[str]]:
    """The tokenizer in a folder; its config, with roles that other files name; and notes, see `Settings`.

    Raises: CheckpointError that names the file or setting that cannot be used.
    """
    words, whole = folder / _WORDS, folder / _WHOLE
    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder} has no tokenizer: expected tokenizer.json or vocab.txt")
    config = _read_where_there(folder / CONFIG)
    _refuse_unknown_keys(folder / CONFIG, config)
    name = config.get("tokenizer_class") or _read_where_there(folder / "config.json").get("tokenizer_class")
    config["tokenizer_class"] = name = name or "BertTokenizer"
    kind = name.removesuffix("Fast").removesuffix("Tokenizer")
    old = _read_backend(whole) if whole.is_file() else None
    if old is not None and old.truncation is not None:
        config.setdefault("truncation_side", old.truncation["direction"])
        old.no_truncation()

    special_tokens_map = _read_where_there(folder / "special_tokens_map.json")
    added_tokens = _read_where_there(folder / "added_tokens.json")
    settings = settings_of(config, special_tokens_map, added_tokens, old, what=str(folder))
    if kind in _BERT_CLASSES:
        backend = _of_berts_class(words if old is None else whole, old, settings)
    elif old is None:
        raise CheckpointError(f"{folder} needs a tokenizer.json: {kind}Tokenizer is not plain WordPiece")
    else:
        backend = old
        before = backend.get_added_tokens_decoder()
        _add_tokens(backend, settings, str(whole))
        if _lost(before, backend):
            settings.notes.append(
                "transformers 4 uses the properties of added_tokens in tokenizer.json, and 5 does not"
            )
    roles = {role: str(token) for role, token in settings.named.items() if role in _ROLES and token is not None}
    return backend, config | roles, settings.notes


def has_tokenizer(folder: Path) -> bool:
    return (folder / _WHOLE).is_file() or (folder / _WORDS).is_file()


def bert_backend(words: dict[str, int] | models.WordPiece, settings: Settings, what: str) -> tokenizers.Tokenizer:
    """The tokenizer that BERT's classes build from a vocabulary, or from a model that has it. Raises CheckpointError,
    which calls the vocabulary `what`."""
    named = settings.named
    model = words if isinstance(words, models.WordPiece) else models.WordPiece(words, unk_token=str(named["unk_token"]))
    if absent := [str(named[role] or role) for role in _NEEDED if model.token_to_id(str(named[role])) is None]:
        raise CheckpointError(f"{what} is not a BERT vocabulary: it lacks {', '.join(absent)}")
    backend = tokenizers.Tokenizer(model)
    options = {theirs: settings.config.get(key, default) for key, (theirs, default) in _NORMALIZER.items()}
    backend.normalizer = normalizers.BertNormalizer(clean_text=True, **options)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    _add_tokens(backend, settings, what)
    cls_token, sep_token = str(named["cls_token"]), str(named["sep_token"])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls_token}:0 $A:0 {sep_token}:0",
        pair=f"{cls_token}:0 $A:0 {sep_token}:0 $B:1 {sep_token}:1",
        special_tokens=[(token, model.token_to_id(token)) for token in (cls_token, sep_token)],
    )
    return backend


def read_vocab(path: Path) -> dict[str, int]:
    """Token -> id of a vocab.txt. Raises CheckpointError."""
    try:
        return models.WordPiece.read_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"cannot read {path} as a vocabulary ({error})") from error


# ---- settings from the files -----------------------------------------------------------------------------


def _read_where_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} is truncated or not a tokenizer ({error})") from error


def _refuse_unknown_keys(path: Path, config: dict[str, Any]) -> None:
    known = _HONOURED | _HARMLESS
    if unknown := sorted(k for k, v in config.items() if k not in known and not k.endswith("_token") and v):
        raise CheckpointError(f"{path} has settings that fastbert does not know: {', '.join(unknown)}")
    if not isinstance(config.get("tokenizer_class"), (str, type(None))):
        raise CheckpointError(f"{path}: tokenizer_class must be a name, got {json.dumps(config['tokenizer_class'])}")
    for key, (_, default) in _NORMALIZER.items():
        value = config.get(key, default)
        if not isinstance(value, bool) and value is not default:
            raise CheckpointError(f"{path}: {key} must be true or false, got {json.dumps(value)}")
    if (side := config.get("truncation_side", "right")) not in ("left", "right"):
        raise CheckpointError(f"{path}: truncation_side must be left or right, got {json.dumps(side)}")
    for key in ("model_max_length", "max_len"):
        if not isinstance(config.get(key), (int, float, type(None))):
            raise CheckpointError(f"{path}: {key} must be a number, got {json.dumps(config[key])}")


def settings_of(
    config: dict[str, Any],
    special_tokens_map: dict[str, Any] | None = None,
    added_tokens: dict[str, int] | None = None,
    old: tokenizers.Tokenizer | None = None,
    what: str = "the settings",
) -> Settings:
    """The settings that transformers 5 takes from the contents of tokenizer_config.json, special_tokens_map.json and
    added_tokens.json. old: the tokenizer in tokenizer.json. Raises CheckpointError about `what`."""
    try:
        return _settings_of(dict(config), special_tokens_map or {}, added_tokens or {}, old)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{what}: a special or added token is invalid ({error})") from error


def _settings_of(
    values: dict[str, Any],
    special_tokens_map: dict[str, Any],
    added_tokens: dict[str, int],
    old: tokenizers.Tokenizer | None,
) -> Settings:
    config, notes = dict(values), []
    if "additional_special_tokens" in values and not values.get("extra_special_tokens"):
        values["extra_special_tokens"] = values.pop("additional_special_tokens")
    own = {key: values.pop(key) for key, value in config.items() if _is_own(key) and isinstance(value, str)}
    only_in_5 = dict(own)
    own |= values.get("model_specific_special_tokens") or {}
    if isinstance(values.get("extra_special_tokens"), dict):
        own |= values.pop("extra_special_tokens")
    numbered_otherwise = own.keys() - only_in_5.keys() and values.get("additional_special_tokens")

    if "added_tokens_decoder" in config:  # in folders with this key, the older files only repeat it
        added = {int(index): _token(token) for index, token in config["added_tokens_decoder"].items()}
    else:
        for key, value in special_tokens_map.items():
            if key == "extra_special_tokens" and isinstance(value, list):
                value = [*(values.get(key) or []), *value]
            if key == "additional_special_tokens" and values.get("extra_special_tokens"):
                notes.append("transformers 4 takes additional_special_tokens of special_tokens_map.json too")
            values[key] = value
        if isinstance(values.get("extra_special_tokens"), dict):
            own |= values.pop("extra_special_tokens")
        special = {str(_token(values[role])) for role in _ROLES if values.get(role)}
        special |= {str(_token(token)) for token in values.get("extra_special_tokens") or ()}
        added = {
            index: AddedToken(content, normalized=content not in special, special=content in special)
            for content, index in added_tokens.items()
        }
        unlisted = {str(_token(token)) for token in values.get("additional_special_tokens") or ()} - special
        if both := sorted(unlisted & added_tokens.keys()):
            notes.append(f"transformers 4 does not change the case of {', '.join(both)}")
        added |= {} if old is None else old.get_added_tokens_decoder()

    numbered = {token.content for token in added.values()}
    if names := [name for name, token in only_in_5.items() if token not in numbered]:
        notes.append(f"transformers 4 knows no special token {', '.join(names)}")
    if numbered_otherwise and not numbered >= {str(_token(t)) for t in (*own.values(), *numbered_otherwise)}:
        notes.append("transformers 4 numbers additional_special_tokens before extra_special_tokens")
    named = {role: _token(values[role]) for role in _ROLES if role in values}
    named |= {key: _token(value) for key, value in values.items() if _is_own(key) and isinstance(value, (str, dict))}
    named |= {key: _token(value) for key, value in own.items()}
    extra = values.get("extra_special_tokens", values.get("additional_special_tokens")) or []
    return Settings(config, named, [_token(token) for token in extra], added, notes)


def _is_own(key: str) -> bool:
    """Whether a key names a special token outside the usual roles."""
    return key.endswith("_token") and key not in _ROLES


def _token(value: Any) -> str | AddedToken | None:
    """A token from a file, where it is a text, or an object of properties (with a "__type" in old files)."""
    if isinstance(value, dict):
        if unknown := value.keys() - _PROPERTIES:
            raise TypeError(f"it has the properties {', '.join(sorted(unknown))}")
        value = AddedToken(**{key: property_ for key, property_ in value.items() if key != "__type"})
    elif value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r} is neither a text nor its properties")
    return value


# ---- the tokenizer ---------------------------------------------------------------------------------------


def _of_berts_class(path: Path, old: tokenizers.Tokenizer | None, settings: Settings) -> tokenizers.Tokenizer:
    settings.named = SPECIAL_TOKENS | settings.named
    if old is None:
        return bert_backend(read_vocab(path), settings, str(path))
    if not isinstance(old.model, models.WordPiece):
        kind = settings.config["tokenizer_class"]
        raise CheckpointError(f"{path} holds a model of {type(old.model).__name__}, and {kind} is one of WordPiece")
    # A model with the settings of BERT's classes is used as it is, which takes half the time.
    as_is = _model_settings(old.model) == (str(settings.named["unk_token"]), "##", 100)
    words = old.model if as_is else old.get_vocab(with_added_tokens=False)
    backend = bert_backend(words, settings, str(path))
    if unused := _unused(old, backend):
        settings.notes.append(f"transformers 4 uses {', '.join(unused)} of tokenizer.json, and 5 does not")
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, settings: Settings, what: str) -> None:
    """Adds first the tokens with given ids, then special tokens that are not in the vocabulary yet.

    Raises: CheckpointError if a token gets another id than the given one.
    """
    tokens = [token for _, token in sorted(settings.added.items())]
    known = {token.content for token in (*backend.get_added_tokens_decoder().values(), *tokens)}
    names = {str(token) for token in settings.named.values()}
    by_role = [settings.named[role] for role in _ROLES if role in settings.named]
    others = [token for key, token in settings.named.items() if key not in _ROLES]
    for token in (*by_role, *others, *settings.extra):
        if token is not None and str(token) not in known:
            known.add(str(token))
            tokens.append(AddedToken(token, special=True) if isinstance(token, str) else token)
    for token in tokens:
        token.special = token.special or token.content in names
    backend.add_tokens(tokens)
    for index, token in settings.added.items():
        if (given := backend.token_to_id(token.content)) != index:
            raise CheckpointError(
                f"{what} does not fit the settings: {token.content} has id {given} there, not {index}"
            )


def _unused(old: tokenizers.Tokenizer, new: tokenizers.Tokenizer) -> list[str]:
    """Names of the parts of tokenizer.json that BERT's class replaces by different ones. The three settings of case and
    accents do not count."""
    kept, made = _state(old.normalizer), _state(new.normalizer)
    for _, (name, _default) in _NORMALIZER.items():
        kept.pop(name, None)
        made.pop(name)
    old.no_padding()
    words = new.encode("a", add_special_tokens=False)
    differs = {
        "the normalizer": kept != made,
        "the pre_tokenizer": _state(old.pre_tokenizer) != _state(new.pre_tokenizer),
        "the post_processor": _framed(old, words) != _framed(new, words),
        "the model's settings": _model_settings(old.model) != _model_settings(new.model),
        "added_tokens": _lost(old.get_added_tokens_decoder(), new),
    }
    return [part for part, is_different in differs.items() if is_different]


def _model_settings(model: models.WordPiece) -> tuple[str, str, int]:
    return model.unk_token, model.continuing_subword_prefix, model.max_input_chars_per_word


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else json.loads(part.__getstate__())


def _framed(backend: tokenizers.Tokenizer, words: Encoding) -> list[tuple[list[int], list[int]]]:
    """(ids, segments) with special tokens, of a text and of a pair of texts that all consist of `words`."""
    return [(e.ids, e.type_ids) for e in (backend.post_process(words), backend.post_process(words, words))]


def _lost(before: dict[int, AddedToken], backend: tokenizers.Tokenizer) -> bool:
    """Whether an added token of `before` is missing in the backend, or has other properties there."""
    now = {token.content: token.__getstate__() for token in backend.get_added_tokens_decoder().values()}
    return any(now.get(token.content) != token.__getstate__() for token in before.values())
