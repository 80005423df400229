"""Snapshots of objects and dictionaries, compared in C++ and in Python: both notice each kind of change."""

import pytest

from fastbert.inference.snapshot import Snapshot
from fastbert.kernels.cpu.objects import find_same_objects


class Base:
    def method(self):
        return 1

    def other(self):
        return 2


class Derived(Base):
    def method(self):
        return 3


class Things:
    """Objects and their snapshot. There are many dictionaries, because the C++ prefetches some of them ahead."""

    def __init__(self, extra: dict | None = None):
        self.above = type("Above", (Base,), {"inherited": lambda self: 0})
        self.kind = type("Kind", (self.above,), {"method": lambda self: 4})
        self.objects = [self.kind() for _ in range(40)]
        for thing in self.objects:
            thing.scale, thing.nothing, thing.children = 0.5, None, {}
        self.last = self.objects[-1]
        self.last.children.update(query=Base(), key=Base(), value=Base())
        self.objects[0].children.update(dense=Base())
        if extra is not None:
            self.last.children = extra
        places = [(vars(thing), name) for thing in self.objects for name in ("scale", "nothing", "method")]
        attributes = [
            (Base, "other"),
            (self.kind, "method"),
            (self.kind, "other"),
            (self.kind, "absent"),
            (self.kind, "inherited"),
        ]
        self.snapshot = Snapshot(self.objects, places, attributes, [thing.children for thing in self.objects])


def other_class(things):
    things.last.__class__ = Derived


def other_value(things):
    things.last.scale = 0.25


def equal_value(things):
    """An equal object may behave differently, unless it is a number."""
    things.last.scale = float("0.5")


def none_is_gone(things):
    del things.last.nothing


def method_of_instance(things):
    things.last.method = lambda: 5


def method_of_instance_is_none(things):
    things.last.method = None


def method_of_class(things):
    things.kind.method = lambda self: 5


def class_without_its_method(things):
    del things.kind.method


def class_with_a_method_of_its_own(things):
    things.kind.other = lambda self: 5


def method_of_the_class_above(things):
    things.above.inherited = lambda self: 5


def method_that_was_absent(things):
    things.kind.absent = lambda self: 5


def other_child(things):
    things.last.children["value"] = Base()


def child_under_another_name(things):
    things.last.children["last"] = things.last.children.pop("value")


def children_in_another_order(things):
    things.last.children["query"] = things.last.children.pop("query")


def children_under_each_others_names(things):
    children = things.last.children
    children["key"], children["query"] = children["query"], children["key"]


def one_child_more(things):
    things.last.children["more"] = Base()


def one_child_less(things):
    del things.last.children["value"]


def no_child(things):
    things.last.children.clear()


def first_child(things):
    things.objects[20].children["first"] = Base()


def child_of_another(things):
    """The same children in the same order, but owned by other objects."""
    first, last = things.objects[0].children, things.last.children
    first["query"] = last.pop("query")


CHANGES = [
    other_class, other_value, equal_value, none_is_gone, method_of_instance, method_of_instance_is_none,
    method_of_class, class_without_its_method, class_with_a_method_of_its_own, method_of_the_class_above,
    method_that_was_absent, other_child, child_under_another_name, children_in_another_order,
    children_under_each_others_names, one_child_more, one_child_less, no_child, first_child, child_of_another,
]  # fmt: skip
IN_CPP = pytest.param(
    Snapshot.is_same,  # uses the C++ if it exists
    id="cpp",
    marks=pytest.mark.skipif(find_same_objects() is None, reason="the C++ is not there, or has no Python headers"),
)


@pytest.fixture(params=[IN_CPP, pytest.param(Snapshot.is_same_in_python, id="python")])
def is_same(request):
    return request.param


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change, is_same):
    things = Things()
    assert is_same(things.snapshot)
    change(things)
    assert not is_same(things.snapshot)
    assert not is_same(things.snapshot), "the second look finds what the first one found"


def test_what_is_not_part_of_the_snapshot_may_change(is_same):
    things = Things()
    for thing in things.objects:
        thing.calls = 1
    things.kind.more = lambda self: 5
    things.last.children["query"].scale = 2.0
    assert is_same(things.snapshot)
    assert is_same(Snapshot())
    things.kind.other = lambda self: 5
    assert not is_same(things.snapshot)


def test_an_undone_change_is_no_change(is_same):
    things = Things()
    for table, key in ((vars(things.last), "scale"), (things.last.children, "key")):
        before = table[key]
        table[key] = None
        assert not is_same(things.snapshot)
        table[key] = before
        assert is_same(things.snapshot)
    method = things.kind.method
    method_of_class(things)
    assert not is_same(things.snapshot)
    things.kind.method = method
    assert is_same(things.snapshot)


def test_writes_by_pythons_shortcuts_are_noticed(is_same):
    """A line that has run a few times writes to a dictionary directly; the C++ compares a version that this changes."""
    things = Things()
    kept, children = things.last.scale, things.last.children
    for round in range(100):
        for value, same in ((float(round), False), (kept, True)):
            things.last.scale = value
            assert is_same(things.snapshot) is same
        child, children["key"] = children["key"], None
        assert not is_same(things.snapshot)
        children["key"] = child
        assert is_same(things.snapshot)


def test_objects_of_a_snapshot_keep_their_addresses(is_same):
    """Addresses are compared, so an object must live as long as the snapshot, or another could get its address."""
    things = Things()
    for _ in range(100):
        things.last.children["value"] = None
        things.last.scale = None
        things.last.children["value"], things.last.scale = Base(), float("0.5")
        assert not is_same(things.snapshot)


def test_dictionaries_of_other_classes(is_same):
    """torch keeps hooks in an OrderedDict. A hook put in front changes its order."""
    from collections import OrderedDict

    table = OrderedDict(a=1, b=2, c=3)
    table.move_to_end("c", last=False)
    things = Things(table)
    assert is_same(things.snapshot)
    table["d"] = 4
    assert not is_same(things.snapshot)


def test_what_a_comparison_raises_is_raised(is_same):
    class Key:
        def __hash__(self):
            return hash("scale")

        def __eq__(self, other):
            raise ArithmeticError("no key like others")

    things = Things()
    del things.last.scale
    vars(things.last)[Key()] = None
    with pytest.raises(ArithmeticError, match="no key like others"):
        is_same(things.snapshot)
