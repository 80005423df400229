"""Tokenizers' folders of every age, contradictory ones too: the ids are those of transformers' AutoTokenizer.

`python tests/test_tokenizer_folders.py` prints as JSON what the AutoTokenizer of the installed transformers gives for
each folder, ids or an error. This is how 5.24.0 and 4.57.6 were compared for TRANSFORMERS_4.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from fastbert.checkpoint import CheckpointError
from fastbert.text.tokenizer import Tokenizer

pytestmark = pytest.mark.once

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *"abcdefghijklmnopqrstuvwxyz",
    *"ABCDE",
    *"0123.,!-[]<>'_#",
    "é",
    "É",
    "中",
    "文",
    "the",
    "The",
    "cafe",
    "Café",
]
VOCAB = [*SPECIAL, *PIECES, *(f"##{piece}" for piece in PIECES), "<s>", "</s>"]
SIZE = len(VOCAB)

TEXTS = [
    "", " ", "The café Café CAFÉ, 中文 the", "a [MASK]b [mask] [SEP] [CLS][PAD] [UNK]", "a neu b NEU aneub  neu  Neu.",
    "<e> a<e>b <E> <e>", "[E1] a[E1]b [e1] [E2][E1]", " [E1] <e> neu ", "x-y_z #a ##b", "e\u0301 a\u200db \x01c\ufffdd",
    "q" * 101 + " " + "a" * 99, "<s> a </s> <mask>", "the the. the'the", "foo bar Foo foobar", "a\u3000b\u00a0c\td",
]  # fmt: skip

Files = dict[str, Any]
NO_END = processors.TemplateProcessing(single="[CLS] $A", pair="[CLS] $A $B", special_tokens=[("[CLS]", 2)])


def backend(
    lowercase: bool = True, *, added: tuple[AddedToken, ...] = (), vocab: list[str] = VOCAB, **model: Any
) -> tokenizers.Tokenizer:
    """The tokenizer that BertTokenizerFast saves."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocab)}, unk_token="[UNK]", **model))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab.index("[CLS]")), ("[SEP]", vocab.index("[SEP]"))],
    )  # fmt: skip
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(list(added))
    return tokenizer


def saved(tokenizer: tokenizers.Tokenizer) -> str:
    return tokenizer.to_str()


def changed(**parts: Any) -> str:
    """The usual tokenizer.json with some parts replaced."""
    tokenizer = backend()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return saved(tokenizer)


UNIGRAM = saved(tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("the", -1.5)], 0)))


def edited(edit) -> str:
    data = json.loads(saved(backend()))
    edit(data)
    return json.dumps(data)


def token(content: str, **flags: bool) -> dict[str, Any]:
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content} | usual | flags


WORDS = "\n".join(VOCAB) + "\n"
CASED = {"do_lower_case": False}
BERT = {"tokenizer_class": "BertTokenizer"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
ROLES = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}


def old(settings: Files | None = None, **files: Any) -> Files:
    """A folder with vocab.txt and without tokenizer.json."""
    folder: Files = {"vocab.txt": WORDS}
    if settings is not None:
        folder["tokenizer_config.json"] = settings
    return folder | {f"{name}.json": content for name, content in files.items()}


def new(tokenizer: str, settings: Files | None = None, **files: Any) -> Files:
    """A folder with tokenizer.json and without vocab.txt."""
    folder: Files = {"tokenizer.json": tokenizer}
    if settings is not None:
        folder["tokenizer_config.json"] = settings
    return folder | {f"{name}.json": content for name, content in files.items()}


def _set_id(data: dict[str, Any]) -> None:
    data["added_tokens"].append({"id": SIZE + 7, **token("<e>")})
    data["model"]["vocab"] |= {f"gap{i}": SIZE + i for i in range(7)}


FOLDERS: dict[str, Files] = {
    # ---- vocab.txt -----------------------------------------------------------------------------------------
    "vocab alone": old(),
    "cased": old(BERT | CASED),
    "class is null": old({"tokenizer_class": None} | CASED),
    "class in config.json": old(CASED, config={"model_type": "bert", "tokenizer_class": "BertTokenizer"}),
    "max_len": old({"max_len": 128}),
    "max_len is beaten": old({"max_len": 128, "model_max_length": 64}),
    "max length is null": old({"max_len": 128, "model_max_length": None}),
    "accents kept": old({"strip_accents": False}),
    "accents stripped of cased": old(CASED | {"strip_accents": True}),
    "chinese as words": old({"tokenize_chinese_chars": False}),
    "added_tokens": old(added_tokens={"neu": SIZE, "<e>": SIZE + 1}),
    "added_tokens out of order": old(added_tokens={"<e>": SIZE + 1, "neu": SIZE}),
    "added_tokens that are special": old(
        added_tokens={"[E1]": SIZE, "neu": SIZE + 1}, special_tokens_map={"additional_special_tokens": ["[E1]"]}
    ),
    "added_tokens of the vocabulary": old(added_tokens={"the": VOCAB.index("the")}),
    "added_tokens and a decoder": old(
        {"added_tokens_decoder": {str(SIZE): token("<e>")}}, added_tokens={"neu": SIZE + 1}
    ),
    "added_tokens with a role": old({"mask_token": "<mask>"}, added_tokens={"<mask>": SIZE}),
    "decoder": old({"added_tokens_decoder": {str(SIZE): token("<e>"), str(SIZE + 1): token("neu", special=False)}}),
    "decoder, normalized": old({"added_tokens_decoder": {str(SIZE): token("neu", special=False, normalized=True)}}),
    "decoder, strips": old({"added_tokens_decoder": {str(SIZE): token("<e>", lstrip=True, rstrip=True)}}),
    "decoder, single word": old({"added_tokens_decoder": {str(SIZE): token("neu", single_word=True)}}),
    "decoder, few flags": old({"added_tokens_decoder": {str(SIZE): {"content": "neu"}}}),
    "decoder, special and few flags": old({"added_tokens_decoder": {str(SIZE): {"content": "neu", "special": True}}}),
    "decoder with roles": old(
        ROLES | {"added_tokens_decoder": {str(VOCAB.index(t)): token(t) for t in SPECIAL} | {str(SIZE): token("<e>")}}
    ),
    "decoder, mask takes spaces": old(
        ROLES | {"added_tokens_decoder": {str(VOCAB.index("[MASK]")): token("[MASK]", lstrip=True)}}
    ),
    "decoder, unordered": old({"added_tokens_decoder": {str(SIZE + 1): token("[E1]"), str(SIZE): token("<e>")}}),
    "decoder, a normal role": old({"added_tokens_decoder": {"4": token("[MASK]", special=False, normalized=True)}}),
    "decoder and an old map": old(
        {"added_tokens_decoder": {}}, special_tokens_map={"additional_special_tokens": ["[E1]"], "unk_token": "[PAD]"}
    ),
    "additional": old({"additional_special_tokens": ["[E1]", "<e>"]}),
    "additional, in the vocabulary": old({"additional_special_tokens": ["the"]}),
    "additional and decoder": old(
        {"additional_special_tokens": ["[E1]"], "added_tokens_decoder": {str(SIZE): token("[E1]", lstrip=True)}}
    ),
    "additional, typed": old({"additional_special_tokens": [{"__type": "AddedToken", **token("[E1]", rstrip=True)}]}),
    "additional is null": old({"additional_special_tokens": None}),
    "extra list": old({"extra_special_tokens": ["[E1]", "<e>"]}),
    "extra dict": old({"extra_special_tokens": {"ent": "<e>", "other_token": "[E1]"}}),
    "extra is empty": old({"extra_special_tokens": {}, "additional_special_tokens": ["[E1]"]}),
    "extra and additional": old({"extra_special_tokens": ["[E1]"], "additional_special_tokens": ["<e>"]}),
    "extra dict and additional": old({"extra_special_tokens": {"e": "[E1]"}, "additional_special_tokens": ["<e>"]}),
    "a token of its own": old({"ent_token": "<e>"}),
    "begin and end": old({"bos_token": "<s>", "eos_token": "</s>"}),
    "other roles": old({"cls_token": "<s>", "sep_token": "</s>"}),
    "another unknown": old({"unk_token": "[PAD]"}),
    "another mask": old({"mask_token": "<mask>"}),
    "typed mask": old({"mask_token": {"__type": "AddedToken", **token("[MASK]", lstrip=True)}}),
    "old map": old(special_tokens_map=ROLES),
    "old map, dicts": old(special_tokens_map=ROLES | {"mask_token": token("[MASK]", lstrip=True)}),
    "old map, additional": old(special_tokens_map=ROLES | {"additional_special_tokens": ["[E1]", "<e>"]}),
    "old map, additional twice": old(
        {"additional_special_tokens": ["<e>"]}, special_tokens_map={"additional_special_tokens": ["[E1]"]}
    ),
    "old map, extra": old(special_tokens_map={"extra_special_tokens": ["[E1]"]}),
    "old map and config, extra": old(
        {"extra_special_tokens": ["<e>"]}, special_tokens_map={"extra_special_tokens": ["[E1]"]}
    ),
    "another mask and additional": old({"mask_token": "<mask>", "additional_special_tokens": ["[E1]"]}),
    "split special, a normal role": old(
        {"split_special_tokens": True, "added_tokens_decoder": {"4": token("[MASK]", special=False)}}
    ),
    "old map against config": old({"cls_token": "[CLS]"}, special_tokens_map={"cls_token": "<s>"}),
    "split special": old({"split_special_tokens": True, "additional_special_tokens": ["[E1]"]}),
    "truncation side": old({"truncation_side": "left"}),
    "electra": old({"tokenizer_class": "ElectraTokenizer"}),
    "distilbert": old({"tokenizer_class": "DistilBertTokenizerFast"}),
    "dead keys": old(
        {
            "name_or_path": "x",
            "special_tokens_map_file": "y",
            "tokenizer_file": "z",
            "never_split": ["the"],
            "do_basic_tokenize": True,
            "max_length": 7,
            "stride": 2,
            "truncation_strategy": "only_first",
        }
    ),
    "no basic tokenizing": old({"do_basic_tokenize": False}),
    "vocabulary without a mask": {"vocab.txt": WORDS.replace("[MASK]", "zzz")},
    "vocabulary without a mask, named": {
        "vocab.txt": WORDS.replace("[MASK]", "zzz"),
        "tokenizer_config.json": {"mask_token": "[MASK]"},
    },
    # ---- tokenizer.json ------------------------------------------------------------------------------------
    "json alone": new(saved(backend())),
    "json alone, cased": new(saved(backend(False))),
    "json cased, config silent": new(saved(backend(False)), BERT),
    "json cased, config silent, fast": new(saved(backend(False)), FAST),
    "json uncased, config cased": new(saved(backend()), BERT | CASED),
    "json uncased, config cased, fast": new(saved(backend()), FAST | CASED),
    "json accents": new(changed(normalizer=normalizers.BertNormalizer(strip_accents=False)), BERT),
    "json control characters": new(changed(normalizer=normalizers.BertNormalizer(clean_text=False)), BERT),
    "json sequence": new(
        changed(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.BertNormalizer(lowercase=False)])), BERT
    ),
    "json sequence, fast": new(
        changed(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.BertNormalizer(lowercase=False)])), FAST
    ),
    "json without a normalizer": new(edited(lambda data: data.update(normalizer=None)), BERT),
    "json without a normalizer, fast": new(edited(lambda data: data.update(normalizer=None)), FAST),
    "json spaces": new(changed(pre_tokenizer=pre_tokenizers.WhitespaceSplit()), BERT),
    "json spaces, fast": new(changed(pre_tokenizer=pre_tokenizers.WhitespaceSplit()), FAST),
    "json without an end": new(
        changed(post_processor=NO_END),
        BERT,
    ),
    "json without an end, fast": new(
        changed(post_processor=NO_END),
        FAST,
    ),
    "json without a post-processor, fast": new(edited(lambda data: data.update(post_processor=None)), FAST),
    "json bert processing": new(changed(post_processor=processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))), BERT),
    "json long words": new(saved(backend(max_input_chars_per_word=200)), BERT),
    "json long words, fast": new(saved(backend(max_input_chars_per_word=200)), FAST),
    "json prefix": new(saved(backend(continuing_subword_prefix="#")), BERT),
    "json prefix, fast": new(saved(backend(continuing_subword_prefix="#")), FAST),
    "json truncates and pads": new(
        edited(
            lambda data: data.update(
                truncation={"direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
                padding={
                    "strategy": {"Fixed": 16},
                    "direction": "Right",
                    "pad_to_multiple_of": None,
                    "pad_id": 0,
                    "pad_type_id": 0,
                    "pad_token": "[PAD]",
                },
            )
        ),
        BERT,
    ),
    "json added": new(saved(backend(added=(AddedToken("<e>"), AddedToken("neu", normalized=True)))), BERT),
    "json added, fast": new(saved(backend(added=(AddedToken("<e>"), AddedToken("neu", normalized=True)))), FAST),
    "json added, config has none": new(saved(backend(added=(AddedToken("<e>"),))), BERT | {"added_tokens_decoder": {}}),
    "json added, config has none, fast": new(
        saved(backend(added=(AddedToken("<e>"),))), FAST | {"added_tokens_decoder": {}}
    ),
    "json added, config says otherwise": new(
        saved(backend(added=(AddedToken("<e>"),))),
        BERT | {"added_tokens_decoder": {str(SIZE): token("<e>", lstrip=True, rstrip=True)}},
    ),
    "json added, config says otherwise, fast": new(
        saved(backend(added=(AddedToken("<e>"),))),
        FAST | {"added_tokens_decoder": {str(SIZE): token("<e>", lstrip=True, rstrip=True)}},
    ),
    "json silent, config adds": new(saved(backend()), BERT | {"added_tokens_decoder": {str(SIZE): token("<e>")}}),
    "json silent, config adds, fast": new(saved(backend()), FAST | {"added_tokens_decoder": {str(SIZE): token("<e>")}}),
    "json and additional": new(saved(backend()), BERT | {"additional_special_tokens": ["[E1]"]}),
    "json and additional, fast": new(saved(backend()), FAST | {"additional_special_tokens": ["[E1]"]}),
    "json and extra dict": new(saved(backend()), BERT | {"extra_special_tokens": {"e": "[E1]"}}),
    "json and extra dict, fast": new(saved(backend()), FAST | {"extra_special_tokens": {"e": "[E1]"}}),
    "json and old files": new(
        saved(backend()), BERT, added_tokens={"<e>": SIZE}, special_tokens_map={"additional_special_tokens": ["[E1]"]}
    ),
    "json and old files, fast": new(
        saved(backend()), FAST, added_tokens={"<e>": SIZE}, special_tokens_map={"additional_special_tokens": ["[E1]"]}
    ),
    "json and other roles": new(saved(backend()), BERT | {"cls_token": "<s>", "sep_token": "</s>"}),
    "json and other roles, fast": new(saved(backend()), FAST | {"cls_token": "<s>", "sep_token": "</s>"}),
    "json splits special": new(saved(backend()), BERT | {"split_special_tokens": True}),
    "json splits special, fast": new(saved(backend()), FAST | {"split_special_tokens": True}),
    "json with a gap": new(edited(_set_id), BERT),
    "json and another vocab.txt": new(saved(backend()), BERT) | {"vocab.txt": "\n".join(reversed(VOCAB))},
    "json, class of our own": new(saved(backend(False)), {"tokenizer_class": "MyTokenizer"}),
    "json of another model, fast": new(UNIGRAM, FAST | {"cls_token": "a", "sep_token": "b", "unk_token": "<unk>"}),
    "json, class is null": new(saved(backend(False)), {"tokenizer_class": None}),
    "json, backend": new(saved(backend(False)), {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}),
}


def build(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ({"config.json": {"model_type": "bert"}} | files).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return folder


# The folders for which transformers 4.57.6 and 5.24.0 give different ids, and a part of our warning.
TRANSFORMERS_4 = {
    "added_tokens that are special": "transformers 4 does not change the case of [E1]",
    "extra dict and additional": "numbers additional_special_tokens before extra_special_tokens",
    "a token of its own": "knows no special token ent_token",
    "old map, additional twice": "takes additional_special_tokens of special_tokens_map.json too",
    "json control characters": "uses the normalizer of tokenizer.json",
    "json sequence": "uses the normalizer of tokenizer.json",
    "json without a normalizer": "uses the normalizer of tokenizer.json",
    "json spaces": "uses the pre_tokenizer of tokenizer.json",
    "json without an end": "uses the post_processor of tokenizer.json",
    "json long words": "uses the model's settings of tokenizer.json",
    "json prefix": "uses the model's settings of tokenizer.json",
    "json added, config has none": "uses added_tokens of tokenizer.json",
    "json added, config says otherwise": "uses added_tokens of tokenizer.json",
    "json added, config says otherwise, fast": "uses the properties of added_tokens in tokenizer.json",
    "json and other roles": "uses the post_processor of tokenizer.json",
}


def ids_of_transformers(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXTS, padding=False, truncation=False)["input_ids"]
    return ids + tokenizer(TEXTS, padding=False, truncation=True, max_length=6)["input_ids"]


def ids_of(tokenizer: Tokenizer) -> list[list[int]]:
    return tokenizer.input_ids(TEXTS) + tokenizer.input_ids(TEXTS, 6)


@pytest.fixture(scope="module")
def transformers_5():
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("the ids are those of transformers 5")


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_are_those_of_auto_tokenizer(name, tmp_path, transformers_5):
    """Also after saving. A warning explains where transformers 4 gives other ids; elsewhere there is no warning."""
    folder = build(tmp_path / "theirs", FOLDERS[name])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = Tokenizer.from_pretrained(folder)
    said = [str(warning.message) for warning in caught if "transformers 4" in str(warning.message)]
    assert len(said) == (name in TRANSFORMERS_4)
    assert all(TRANSFORMERS_4[name] in words and str(folder) in words for words in said)

    expected = ids_of_transformers(folder)
    assert ids_of(ours) == expected
    build(tmp_path / "saved", {})
    ours.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # for saved folders the two versions agree
        assert ids_of(Tokenizer.from_pretrained(tmp_path / "saved")) == expected
    assert ids_of_transformers(tmp_path / "saved") == expected


def test_a_copy_splits_special_tokens_too(tmp_path):
    """The tokenizers library copies and pickles its tokenizers without this setting."""
    ours = Tokenizer.from_pretrained(build(tmp_path, FOLDERS["split special"]))
    assert ids_of(pickle.loads(pickle.dumps(ours))) == ids_of(ours)


REFUSED = {
    "an unknown key": (old({"new_setting": 1, "other": "x"}), "does not know: new_setting, other"),
    "code of its own": (old({"auto_map": {"AutoTokenizer": ["x.Y", None]}}), "does not know: auto_map"),
    "another file by version": (new(saved(backend()), {"fast_tokenizer_files": ["tokenizer.4.0.json"]}),
                                "does not know: fast_tokenizer_files"),
    "ids that no one can give": (old({"added_tokens_decoder": {"3": token("<e>")}}), "<e> has id .* there, not 3"),
    "a gap": (old(added_tokens={"<e>": SIZE + 5}), f"<e> has id {SIZE} there, not {SIZE + 5}"),
    "no case": (old({"do_lower_case": None}), "do_lower_case must be true or false, got null"),
    "no side": (old({"truncation_side": None}), "truncation_side must be left or right, got null"),
    "a length in words": (old({"model_max_length": "512"}), 'model_max_length must be a number, got "512"'),
    "a case in words": (old({"strip_accents": "yes"}), 'strip_accents must be true or false, got "yes"'),
    "no first token": (old({"cls_token": None}), "is not a BERT vocabulary: it lacks cls_token"),
    "a token that is a number": (old({"mask_token": 5}), "a special or added token is invalid .5"),
    "an unknown property": (old({"added_tokens_decoder": {"4": token("[MASK]", new=True)}}), "added token is invalid"),
    "no tokens": (old({"added_tokens_decoder": None}), "a special or added token is invalid"),
    "a class in numbers": (old({"tokenizer_class": 5}), "tokenizer_class must be a name, got 5"),
    "another model": (new(UNIGRAM, BERT), "holds a model of Unigram, and BertTokenizer is one of WordPiece"),
    "another class": (old({"tokenizer_class": "BertJapaneseTokenizer"}), "Japanese.* not plain WordPiece"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "message"), REFUSED.values(), ids=REFUSED)
def test_unknown_or_invalid_settings_are_refused_by_name(files, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_pretrained(build(tmp_path, files))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("files", "text", "tokens"),
    [
        ({"added_tokens.json": {"neu": 8, "<e>": 9}}, "a neu <e> NEU", [5, 8, 9, 8]),
        (
            {"added_tokens.json": {"[E1]": 8}, "special_tokens_map.json": {"additional_special_tokens": ["[E1]"]}},
            "a [E1]b",
            [5, 8, 6],
        ),
        ({"tokenizer_config.json": {"extra_special_tokens": ["[E1]", "[E2]"]}}, "[E2] a [E1]", [9, 5, 8]),
        ({"tokenizer_config.json": {"extra_special_tokens": {"ent": "<e>"}}}, "<e>b", [8, 6]),
        ({"tokenizer_config.json": {"tokenizer_class": None, "max_len": 128}}, "a b", [5, 6]),
    ],
    ids=["added", "added_special", "extra_list", "extra_dict", "old_words"],
)
def test_tokens_beside_a_vocab_txt(files, text, tokens, tmp_path):
    """Added tokens are in other files than vocab.txt, in the spelling of their time. They were ignored without a word,
    and an entity marker became `[`, `e1` and `]`. The ids are those of transformers."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]) + "\n")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.input_ids([text]) == [[2, *tokens, 3]]
    assert tokenizer.model_max_length == files.get("tokenizer_config.json", {}).get("max_len")


def main() -> None:
    told = {}
    with tempfile.TemporaryDirectory() as root:
        for i, (name, files) in enumerate(FOLDERS.items()):
            try:
                told[name] = ids_of_transformers(build(Path(root) / str(i), files))
            except Exception as error:  # any error is a result
                told[name] = f"{type(error).__name__}: {error}"
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
