"""Maps a student's layers to a teacher's. Layers are counted from 0, as in the names of their weights."""

from __future__ import annotations

from ..text.files import InputError

NAMES = ("skip", "last", "first")


def chosen_layers(given: str, option: str, students: int, teachers: int) -> list[int]:
    """The teacher's layer for each of the student's.

    given: skip (evenly spread, up to the last one), last, first, or one number for each layer, between commas.

    Raises: InputError on another number of layers than the student has, a layer that the teacher does not have, and
        other words.
    """
    if given in NAMES:
        if students > teachers:
            raise InputError(
                f"{option} {given} gives each of the student's layers one of the teacher's, and the student has "
                f"{students}, the teacher {teachers}: name the layers"
            )
        return {
            "skip": [(i + 1) * teachers // students - 1 for i in range(students)],
            "last": list(range(teachers - students, teachers)),
            "first": list(range(students)),
        }[given]
    layers = [_number(part, given, option) for part in given.split(",")]
    if len(layers) != students:
        raise InputError(f"{option} {given} has {len(layers)} layers, and the student has {students}")
    for layer in layers:
        _expect_layer(layer, "teacher", teachers, given, option)
    return layers


def layer_pairs(given: str, option: str, students: int, teachers: int) -> list[tuple[int, int]]:
    """(layer of the student, layer of the teacher that it is compared with). given: as in `chosen_layers`, or
    STUDENT:TEACHER,... for some of the student's layers. Raises: InputError."""
    if ":" not in given:
        return list(enumerate(chosen_layers(given, option, students, teachers)))
    pairs = []
    for part in given.split(","):
        student, _, teacher = part.partition(":")
        pairs.append((_number(student, given, option), _number(teacher, given, option)))
        _expect_layer(pairs[-1][0], "student", students, given, option)
        _expect_layer(pairs[-1][1], "teacher", teachers, given, option)
    if len(set(pairs)) != len(pairs):
        raise InputError(f"{option} {given} names a pair of layers twice")
    return pairs


def _number(text: str, given: str, option: str) -> int:
    if not text.strip().isdecimal():
        raise InputError(
            f"{option} is {', '.join(NAMES)}, or numbers of layers between commas such as 1,3,5, got {given!r}"
        )
    return int(text)


def _expect_layer(layer: int, whose: str, layers: int, given: str, option: str) -> None:
    if layer >= layers:
        raise InputError(f"{option} {given}: the {whose} has the layers 0 to {layers - 1}, and no layer {layer}")
