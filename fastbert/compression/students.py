"""Students: their sizes and initial weights. A student is given as

    a number N            the teacher's sizes with N layers
    a .json, or a name    other sizes, as in `fastbert pretrain --config`
    a folder, a hub id    a model with weights

The first two are new models. Their weights are copied from chosen layers of the teacher, come through a bottleneck from
a wider teacher, or are drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..config import BertConfig
from ..models.head import BertHead, expecting_new_weights
from ..packing import PackedBatch
from ..pretraining.sizes import SIZES, config_of
from ..storage import read_json
from ..text.files import InputError
from ..text.tokenizer import Tokenizer
from .bottleneck import fill_through_bottleneck
from .layer_maps import chosen_layers
from .prune_shapes import of_layers

NEW, BOTTLENECK = "new", "bottleneck"
# the fields of a config that describe the head's task
_OF_THE_TASK = ("id2label", "label2id", "problem_type")
_SHAPES = ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings", "type_vocab_size")


def is_new(given: str) -> bool:
    """Whether a student is made from the teacher and sizes, and is not a model with weights."""
    return given.isdecimal() or given in SIZES or given.endswith(".json")


def make_student(
    given: str, init: str | None, teacher: BertHead, tokenizer: Tokenizer, texts: PackedBatch, seed: int,
    impl: str | None,
) -> BertHead:  # fmt: skip
    """A student of the teacher's class, in evaluation mode on the teacher's device.

    given, init: the options --student and --init. By default init is skip for a teacher of the same width, bottleneck
        for a wider one, and new for a narrower one.
    texts: some texts of the training data, on the teacher's device, to which a bottleneck is fitted.

    Raises: InputError or CheckpointError if student and teacher do not fit.
    """
    if not is_new(given):
        if init is not None:
            raise InputError(f"--init is for a student that is made, and {given} brings its own weights")
        return _loaded(given, teacher, tokenizer, seed, impl)
    config = _config(given, teacher.config)
    if init is None:
        init = "skip" if config.hidden_size == teacher.config.hidden_size else BOTTLENECK
        init = NEW if config.hidden_size > teacher.config.hidden_size else init
    torch.manual_seed(seed)
    if init == NEW:
        return _started(type(teacher)(config, impl).to(teacher.device), teacher)
    layers = chosen_layers(
        "skip" if init == BOTTLENECK else init, "--init", config.num_hidden_layers, teacher.config.num_hidden_layers
    )
    if init == BOTTLENECK:
        student = type(teacher)(config, impl).to(teacher.device)
        fill_through_bottleneck(student, teacher, layers, texts)
        return student.eval()
    for name in _SHAPES:
        if getattr(config, name) != getattr(teacher.config, name):
            raise InputError(
                f"--init {init} copies layers, and the student's {name} is {getattr(config, name)}, the teacher's "
                f"{getattr(teacher.config, name)}: --init {BOTTLENECK} and {NEW} take other sizes"
            )
    pruned = teacher.config.pruned_heads or {}
    config.pruned_heads = {new: pruned[old] for new, old in enumerate(layers) if old in pruned} or None
    student = type(teacher)(config, impl)
    student.load_state_dict(of_layers(teacher.state_dict(), layers))
    return student.to(teacher.device).eval()


def _config(given: str, teacher: BertConfig) -> BertConfig:
    """The config of a new student, with the teacher's vocabulary, token types and labels."""
    data = teacher.to_dict()
    if given.isdecimal():
        if int(given) == 0:
            raise InputError("--student 0: a student needs at least one layer")
        data |= {"num_hidden_layers": int(given), "pruned_heads": None}
        return BertConfig.from_dict(data)
    if given.endswith(".json"):
        words = read_json(Path(given)).get("vocab_size", teacher.vocab_size)
        _expect_words(given, words, teacher)
    made = config_of(
        given, teacher.vocab_size, teacher.max_position_embeddings, 1, teacher.hidden_dropout_prob
    )  # fmt: skip
    for name in (*_OF_THE_TASK, "pad_token_id", "type_vocab_size"):
        setattr(made, name, getattr(teacher, name))
    return made


def _expect_words(given: str, words: int, teacher: BertConfig) -> None:
    if words != teacher.vocab_size:
        raise InputError(
            f"{given} has a vocabulary of {words:,}, the teacher one of {teacher.vocab_size:,}: both must be equal"
        )


def _loaded(given: str, teacher: BertHead, tokenizer: Tokenizer, seed: int, impl: str | None) -> BertHead:
    """An existing model, with a new head if it has none like the teacher's."""
    config = BertConfig.from_pretrained(given)
    _expect_words(given, config.vocab_size, teacher.config)
    expect_same_words(given, Tokenizer.from_pretrained(given), tokenizer)
    changes = _changes(teacher)
    own = type(teacher).__name__ in (config.architectures or ())
    if own and changes and config.id2label != teacher.config.id2label:
        names = [", ".join(c.id2label[i] for i in sorted(c.id2label)) for c in (config, teacher.config)]
        raise InputError(f"the student {given} has the labels {names[0]}, the teacher {names[1]}")
    with expecting_new_weights():
        student = type(teacher).from_pretrained(
            given, dtype=torch.float32, device=teacher.device, impl=impl, seed=seed,
            new_head=bool(changes) and not own, **changes,
        )  # fmt: skip
    return _started(student, teacher) if student.initialised else student


def _changes(teacher: BertHead) -> dict[str, Any]:
    """The fields of a student's config that it takes from the teacher, if the head has labels."""
    if not hasattr(teacher, "num_labels") and not hasattr(teacher, "qa_outputs"):
        return {}
    return {name: getattr(teacher.config, name) for name in _OF_THE_TASK}


def _started(student: BertHead, teacher: BertHead) -> BertHead:
    """The student with the biases of the teacher's last linear layer, one for each label or word, so that a new head's
    outputs begin near the mean of the teacher's."""
    with torch.no_grad():
        for name in ("classifier.bias", "qa_outputs.bias", "cls.predictions.bias"):
            if name in teacher.state_dict():
                student.get_parameter(name).copy_(teacher.get_parameter(name))
    return student.eval()


def expect_same_words(given: str, own: Tokenizer, tokenizer: Tokenizer) -> None:
    """Raises: InputError if two tokenizers give different ids for a text."""
    ours, theirs = own.get_vocab(), tokenizer.get_vocab()
    if ours != theirs:
        other = next((word for word in theirs if ours.get(word) != theirs[word]), None)
        what = (
            f"{len(ours):,} words beside {len(theirs):,}" if other is None else f"the word {other!r} is another number"
        )
        raise InputError(f"{given} has another vocabulary than the teacher ({what}): their tokens cannot be compared")
    known = [word.upper() for word in theirs if word.isalpha()]
    probe = " ".join(["Ünïcödé, don't; 北京", *known[:99]])
    if own.input_ids([probe]) != tokenizer.input_ids([probe]):
        raise InputError(f"{given} prepares text in another way than the teacher, such as its letters' case")
