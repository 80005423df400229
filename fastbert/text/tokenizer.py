"""Words to ids and back: BERT's WordPiece, on the `tokenizers` library, with the same ids as transformers.

Nothing is ever padded: a batch is packed, so `input_ids` is a list of lists of different lengths.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import Encoding, models, normalizers, pre_tokenizers

from ..formats import opened
from ..formats.detect import find_source
from ..formats.sentence_folder import encoder_in
from ..formats.source import Source
from ..storage import CheckpointError, make_folder, write_atomically, write_json
from .calling import encoded
from .cutting import Cutter
from .fast import IdsOf, fast_ids
from .folder import SPECIAL_TOKENS, bert_backend, has_tokenizer, read_folder, read_vocab, settings_of

Truncation = Literal["longest_first", "only_first", "only_second"]
TRUNCATIONS = ("longest_first", "only_first", "only_second")

_NO_LIMIT = 10**9  # transformers writes 1e30 where a model has no maximum length
_KEPT_TRUNCATIONS = 8
# Tokens of a text by which it is compared with the other one of a pair.
_COMPARED = 8_192
# Texts in one call from which on `fast_ids` is set up, which costs as much as tokenising 2,000 short texts.
_WORTH_FAST_IDS = 256
# Texts in one call from which on a truncating copy of the backend is made, in 20 ms, even if no text is too long.
_WORTH_TRUNCATING = 64


class Encoded:
    """A batch of token sequences, one per text (with `overflow`, one per window). Each list is made on first access."""

    def __init__(self, encodings: list[Encoding], text_index: list[int]) -> None:
        self.encodings = encodings
        self.text_index = text_index  # which text each sequence is of

    def __len__(self) -> int:
        return len(self.encodings)

    @cached_property
    def input_ids(self) -> list[list[int]]:
        return [e.ids for e in self.encodings]

    @cached_property
    def token_type_ids(self) -> list[list[int]]:
        """0 for the first text with its [CLS] and [SEP], 1 for the second with its [SEP]."""
        return [e.type_ids for e in self.encodings]

    @cached_property
    def offsets(self) -> list[list[tuple[int, int]]]:
        """(start, end) of each token in its text, in characters; (0, 0) for special tokens."""
        return [e.offsets for e in self.encodings]

    @cached_property
    def special_tokens_mask(self) -> list[list[int]]:
        """1 for tokens that are of no text: [CLS] and [SEP]."""
        return [e.special_tokens_mask for e in self.encodings]

    @cached_property
    def word_ids(self) -> list[list[int | None]]:
        """The number of each token's word in its text; None for special tokens."""
        return [e.word_ids for e in self.encodings]

    @cached_property
    def sequence_ids(self) -> list[list[int | None]]:
        """0 for tokens of the first text, 1 for tokens of the second; None for special tokens."""
        return [e.sequence_ids for e in self.encodings]


class Tokenizer:
    """BERT's tokenizer. Safe to share among threads: no call changes it.

        tokenizer = Tokenizer.from_pretrained("bert-base-uncased")
        ids = tokenizer.input_ids(["one text", "another"], max_length=128)
        pair = tokenizer(["a question"], ["its context"], max_length=384, truncation="only_second")

    Make one with `from_pretrained` or `from_vocab`.
    """

    unk_token: str
    sep_token: str
    pad_token: str
    cls_token: str
    mask_token: str

    def __init__(
        self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None, *, is_bounded: bool = False
    ) -> None:
        """backend: does the work; config: the content of tokenizer_config.json, kept and written back.

        is_bounded: whether a very long text of which only tokens up to a maximum length are wanted is refused with
            UncutError, a ValueError, where the whole of it would have to be tokenised.
        """
        backend.no_truncation()  # truncation and padding in a tokenizer.json are left over from the job that saved it
        backend.no_padding()
        self.config = dict(config or {})
        backend.encode_special_tokens = self._splits_special_tokens
        self._backend = backend
        self._cutter = Cutter(backend, is_bounded)
        self._truncating: dict[tuple, tokenizers.Tokenizer] = {}
        for role, default in SPECIAL_TOKENS.items():
            setattr(self, role, self.config.get(role) or default)
        absent = [t for t in (self.unk_token, self.cls_token, self.sep_token) if backend.token_to_id(t) is None]
        if absent:
            raise ValueError(f"the vocabulary must hold {', '.join(absent)}")

    @classmethod
    def from_pretrained(cls, id_or_path: str | os.PathLike) -> Tokenizer:
        """From a model's folder or hub id, read as transformers 5 reads it (see `fastbert.text.folder`), or from the
        vocabulary of another format that `fastbert.formats` reads.

        Warns in one line if transformers 4 gives other ids. Raises: CheckpointError, in one line.
        """
        with opened(id_or_path) as path:
            source = find_source(path)
            if source is not None:
                return cls._from_source(source)
            return cls._from_folder(path if has_tokenizer(path) else encoder_in(path))

    @classmethod
    def _from_source(cls, source: Source) -> Tokenizer:
        if not source.words:
            raise CheckpointError(f"{source.path} has no vocabulary")
        if source.lower_case is None:
            raise CheckpointError(
                f"{source.path} does not say whether its tokenizer lower-cases: "
                "fastbert convert has --lower-case and --no-lower-case"
            )
        try:
            return cls.from_words(source.words, source.lower_case)
        except CheckpointError as error:
            raise CheckpointError(f"{source.path}: {error}") from error

    @classmethod
    def _from_folder(cls, folder: Path) -> Tokenizer:
        backend, config, notes = read_folder(folder)
        if notes:
            warnings.warn(f"{folder}: {'; '.join(notes)}", stacklevel=3)
        try:
            return cls(backend, config)
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error

    @classmethod
    def from_vocab(
        cls,
        vocab_file: str | os.PathLike,
        lowercase: bool = True,
        strip_accents: bool | None = None,
        tokenize_chinese_chars: bool = True,
        *,
        model_max_length: int | None = 512,
    ) -> Tokenizer:
        """From a vocab.txt, one token a line.

        Args:
            lowercase: of an uncased model.
            strip_accents: None means the same as lowercase.
            tokenize_chinese_chars: each CJK ideograph is a word.
        """
        config: dict[str, Any] = {
            "do_lower_case": lowercase,
            "strip_accents": strip_accents,
            "tokenize_chinese_chars": tokenize_chinese_chars,
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        vocab_file = Path(vocab_file)
        return cls._from_vocab_and_config(read_vocab(vocab_file), config, vocab_file)

    @classmethod
    def from_words(cls, words: Sequence[str], lowercase: bool, *, model_max_length: int | None = 512) -> Tokenizer:
        """From a vocabulary in the order of the ids; else as `from_vocab`. Raises CheckpointError."""
        config: dict[str, Any] = {"do_lower_case": lowercase, "strip_accents": None, "tokenize_chinese_chars": True}
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        # If a word occurs twice, its last id counts, as in a vocab.txt.
        return cls._from_vocab_and_config({word: i for i, word in enumerate(words)}, config, "the vocabulary")

    @classmethod
    def _from_vocab_and_config(cls, vocab: dict[str, int], config: dict[str, Any], vocab_file: Path | str) -> Tokenizer:
        """vocab_file: name of the vocabulary in error messages."""
        return cls(bert_backend(vocab, settings_of(config | SPECIAL_TOKENS), str(vocab_file)), config)

    def __reduce__(self):
        # Unpickling calls __init__, because the library does not pickle `encode_special_tokens`.
        return type(self), (self._backend, self.config)

    # ---- to ids ------------------------------------------------------------------------------------------

    def __call__(
        self,
        texts: Sequence[str],
        pairs: Sequence[str] | None = None,
        *,
        max_length: int | None = None,
        truncation: Truncation | None = "longest_first",
        add_special_tokens: bool = True,
        overflow: bool = False,
        stride: int = 0,
    ) -> Encoded:
        """Tokens of texts, or of pairs of texts, with their segments, offsets and words.

        Only the beginning of a text much longer than max_length is tokenised, unless `overflow` is set.

        Args:
            texts, pairs: lists of the same length; pair i becomes [CLS] texts[i] [SEP] pairs[i] [SEP].
            max_length: most tokens of a sequence, special tokens included; None for no limit.
            truncation: which text of a pair loses tokens; None does not truncate.
            overflow: make further sequences of the tokens that were cut off; see `Encoded.text_index`.
            stride: with `overflow`, tokens that a sequence repeats from the one before.

        Raises:
            ValueError: if the tokenised part of a text has a lone surrogate, or a text cannot be truncated as asked.
            TypeError: if texts is not a sequence of str.
        """
        texts = _strings("texts", texts)
        if pairs is not None:
            pairs = _strings("pairs", pairs)
            if len(texts) != len(pairs):
                raise ValueError(f"texts and pairs must have one length, got {len(texts)} and {len(pairs)}")
        if truncation is not None and truncation not in TRUNCATIONS:
            raise ValueError(f"truncation must be one of {TRUNCATIONS} or None, got {truncation!r}")
        if stride and not overflow:
            raise ValueError("stride needs overflow=True")
        backend = self._backend
        if max_length is not None and truncation is not None:
            special = backend.num_special_tokens_to_add(pairs is not None) if add_special_tokens else 0
            backend = self._backend_for(max_length, truncation, stride, special)
            kept = max_length - special
            if self._keeps_beginnings and not overflow and pairs is None:
                texts = self._cutter.texts(texts, kept)
            elif self._keeps_beginnings and not overflow and pairs is not None:
                cut = [self._cutter.pair(a, b, kept, truncation) for a, b in zip(texts, pairs, strict=True)]
                texts, pairs = [a for a, _ in cut], [b for _, b in cut]

        inputs = texts if pairs is None else list(zip(texts, pairs, strict=True))
        encodings = encoded(backend.encode_batch, inputs, add_special_tokens=add_special_tokens)
        if not overflow:
            return Encoded(encodings, list(range(len(encodings))))
        windows = [(i, window) for i, e in enumerate(encodings) for window in (e, *e.overflowing)]
        return Encoded([window for _, window in windows], [i for i, _ in windows])

    def input_ids(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """The ids of `self(texts, max_length=max_length)`, faster, because no offsets are tracked."""
        texts = _strings("texts", texts)
        special = self._backend.num_special_tokens_to_add(False)
        if max_length is not None:
            _expect_lengths(max_length, 0, special)
            if self._keeps_beginnings:
                texts = self._cutter.texts(texts, max_length - special, shorten=True)
            else:
                texts = [self._cutter.ending(text, max_length - special, shorten=True) for text in texts]
        is_made = "_fast_ids" in self.__dict__
        if (is_made or len(texts) >= _WORTH_FAST_IDS) and self._fast_ids is not None:
            return encoded(self._fast_ids, texts, max_length=max_length, side=self._truncation_side)
        backend = self._backend
        if max_length is not None:
            if len(texts) < _WORTH_TRUNCATING and (max_length, "longest_first", 0) not in self._truncating:
                ids = [e.ids for e in encoded(backend.encode_batch_fast, texts, add_special_tokens=True)]
                if all(len(one) <= max_length for one in ids):
                    return ids
            backend = self._backend_for(max_length, "longest_first", 0, special)
        return [e.ids for e in encoded(backend.encode_batch_fast, texts, add_special_tokens=True)]

    @cached_property
    def _fast_ids(self) -> IdsOf | None:
        return fast_ids(self._backend)

    def beginning(self, text: str, tokens: int) -> str:
        """A text with the same first `tokens` ids, and at least one more if this text has more. Places may differ."""
        return self._cutter.text(text, tokens, shorten=True)

    def shortened(self, text: str, max_length: int) -> str:
        """A text with the same ids in every pair that is cut to `max_length` tokens, at other places; a text of
        megabytes takes milliseconds.

        The middle of gaps, and of words that are [UNK] because they are too long, is left out, and what truncation cuts
        off. Truncation of a pair compares the texts' numbers of tokens, so of each 8,192 remain or more. If both texts
        have more, and `max_length` leaves an odd number, it may be the other text that keeps one token more.
        """
        return self._cutter.alone(text, max(max_length, _COMPARED), not self._keeps_beginnings)

    def located(self, text: str, tokens: int) -> tuple[str, Sequence[int] | np.ndarray]:
        """(a text with the same `tokens` ids that truncation keeps, and at least one more if this text has more; the
        place in this text of each of its characters)."""
        return self._cutter.located(text, tokens, not self._keeps_beginnings)

    def shortened_pair(self, first: str, second: str, max_length: int) -> tuple[str, str]:
        """A pair of texts that is cut to the same `max_length` tokens."""
        kept = max_length - self._backend.num_special_tokens_to_add(True)
        return self._cutter.pair(first, second, kept, "longest_first", not self._keeps_beginnings)

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text, without special tokens."""
        (encoding,) = encoded(self._backend.encode_batch, _strings("texts", [text]), add_special_tokens=False)
        return encoding.tokens

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of these ids; case and spacing that the vocabulary does not hold are lost."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def _keeps_beginnings(self) -> bool:
        """Whether truncation keeps the beginning of a text, and not its end."""
        return self._truncation_side == "right"

    @property
    def _truncation_side(self) -> str:
        return self.config.get("truncation_side", "right")

    @property
    def _splits_special_tokens(self) -> bool:
        """Whether "[MASK]" in a text is cut into its pieces like any other word."""
        return bool(self.config.get("split_special_tokens"))

    def _backend_for(self, max_length: int, strategy: str, stride: int, special: int) -> tokenizers.Tokenizer:
        """A copy of the backend with this truncation. A copy, because truncation is a setting of the backend object,
        which several threads share."""
        _expect_lengths(max_length, stride, special)
        key = (max_length, strategy, stride)
        backend = self._truncating.get(key)
        if backend is None:
            if len(self._truncating) >= _KEPT_TRUNCATIONS:
                self._truncating.clear()
            backend = copy.deepcopy(self._backend)
            backend.encode_special_tokens = self._splits_special_tokens  # the library does not copy this setting
            side = self._truncation_side
            backend.enable_truncation(max_length, stride=stride, strategy=strategy, direction=side)
            self._truncating[key] = backend
        return backend

    def lowercased(self) -> Tokenizer:
        """A copy that lower-cases a text first, except for added tokens in it.

        sentence-transformers does the same for its setting `do_lower_case`.
        """
        backend = copy.deepcopy(self._backend)
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])
        return Tokenizer(backend, self.config)

    def truncating(self, side: Literal["left", "right"], *, is_bounded: bool = False) -> Tokenizer:
        """A copy that cuts long texts on this side: "right" removes their ends, "left" their beginnings."""
        config = self.config | {"truncation_side": side}
        return Tokenizer(self._backend, config, is_bounded=is_bounded)

    # ---- facts -------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; an embedding table needs at least as many rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Each token's id."""
        return self._backend.get_vocab(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        return self._backend.id_to_token(index)

    @property
    def pad_token_id(self) -> int | None:
        return self._backend.token_to_id(self.pad_token)

    @property
    def cls_token_id(self) -> int:
        return self._known_id(self.cls_token)

    @property
    def sep_token_id(self) -> int:
        return self._known_id(self.sep_token)

    @property
    def mask_token_id(self) -> int | None:
        return self._backend.token_to_id(self.mask_token)

    @property
    def unk_token_id(self) -> int:
        return self._known_id(self.unk_token)

    def _known_id(self, token: str) -> int:
        index = self._backend.token_to_id(token)
        assert index is not None, f"{token} is in every vocabulary that __init__ accepts"
        return index

    @property
    def special_ids(self) -> set[int]:
        """The ids of [CLS], [SEP] and the other special tokens that are in the vocabulary."""
        ids = (self._backend.token_to_id(getattr(self, role)) for role in SPECIAL_TOKENS)
        return {index for index in ids if index is not None}

    @property
    def model_max_length(self) -> int | None:
        """Most tokens that the model takes, from tokenizer_config.json; None if it does not say."""
        length = self.config.get("model_max_length", self.config.get("max_len"))
        return int(length) if isinstance(length, (int, float)) and 0 < length < _NO_LIMIT else None

    # ---- to files ----------------------------------------------------------------------------------------

    def definition(self) -> str:
        """All that decides a text's ids: the content of tokenizer.json."""
        return self._backend.to_str()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes tokenizer.json, tokenizer_config.json and (for WordPiece) vocab.txt, which transformers reads."""
        folder, backend = make_folder(folder), self._backend
        roles = {role: getattr(self, role) for role in SPECIAL_TOKENS}
        config = self.config | {role: t for role, t in roles.items() if backend.token_to_id(t) is not None}
        # BERT's classes read only the words from the files, and build everything else themselves.
        is_bert = (
            isinstance(backend.model, models.WordPiece)
            and isinstance(backend.normalizer, normalizers.BertNormalizer)
            and isinstance(backend.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        )
        config["tokenizer_class"] = config.get("tokenizer_class") or (
            "BertTokenizer" if is_bert else "PreTrainedTokenizerFast"
        )
        if isinstance(backend.normalizer, normalizers.BertNormalizer):
            config["do_lower_case"] = backend.normalizer.lowercase
            config["strip_accents"] = backend.normalizer.strip_accents
            config["tokenize_chinese_chars"] = backend.normalizer.handle_chinese_chars
        config["added_tokens_decoder"] = {
            str(index): token.__getstate__() for index, token in backend.get_added_tokens_decoder().items()
        }
        try:
            with write_atomically(folder / "tokenizer.json") as temporary:
                backend.save(str(temporary))
            vocab = backend.get_vocab(with_added_tokens=False)
            # A vocab.txt numbers its lines, so it cannot hold a vocabulary with gaps between its ids.
            if isinstance(backend.model, models.WordPiece) and max(vocab.values()) == len(vocab) - 1:
                with write_atomically(folder / "vocab.txt") as temporary:
                    lines = "".join(f"{token}\n" for token in sorted(vocab, key=vocab.__getitem__))
                    temporary.write_text(lines, encoding="utf-8", newline="\n")
            write_json(folder / "tokenizer_config.json", config)
        except OSError as error:
            raise CheckpointError(str(error)) from error


def _strings(name: str, texts: Sequence[str]) -> list[str]:
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"{name} must be a list of str, got one {type(texts).__name__}; put it into a list")
    texts = list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] must be str, got {type(text).__name__}")
    return texts


def _expect_lengths(max_length: int, stride: int, special: int) -> None:
    if max_length < special or max_length < 0:
        raise ValueError(f"max_length must be at least {special}, the special tokens, got {max_length}")
    if not 0 <= stride < max(max_length - special, 1):
        raise ValueError(f"stride must be in [0, {max(max_length - special, 1)}), got {stride}")
