// Are Python's objects still the ones that they were? Only pointers are compared: no reference is taken, so that of an
// object little more than its first cache line is read, and nothing of it is written.
//
// Left out where Python's headers are missing, and where there is no lock that keeps other threads from its objects.

#if __has_include(<Python.h>)
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#endif

#include "operators.h"

#if defined(Py_PYTHON_H) && !defined(Py_GIL_DISABLED)

namespace {

struct Object {
    PyObject* object;
    PyTypeObject* type;
};

// A dictionary or a class, of which `count` pairs stay the same. `version` is the one that it had when they were last
// seen to be, and 0 before: Python gives it another one with every change.
struct Holder {
    PyObject* object;
    uint64_t version;
    int64_t count;
};

// What lies under a key of a dictionary, or under a name of a class; null if nothing.
struct Pair {
    PyObject *key, *value;
};

// The order of the parts in memory, as `objects.py` puts them there; pairs are those of all holders, in their order.
// Of `places` the pairs stay what they are, of `tables` no other ones come in besides.
struct Counts {
    int64_t objects, places, classes, tables, empty;
};

template <class Record>
Record* take(char*& memory, int64_t count) {
    auto records = reinterpret_cast<Record*>(memory);
    memory += count * sizeof(Record);
    return records;
}

// 0: not known. Dictionaries have none from Python 3.12 on. A class has a new one, or none, after a change to itself or
// to a class that it is derived from.
uint64_t version_of_dictionary(PyObject* dictionary) {
#if PY_VERSION_HEX < 0x030C0000
    return reinterpret_cast<PyDictObject*>(dictionary)->ma_version_tag;
#else
    return 0;
#endif
}

uint64_t version_of_class(PyObject* cls) { return reinterpret_cast<PyTypeObject*>(cls)->tp_version_tag; }

bool are_places(PyObject* dictionary, const Pair* pairs, int64_t count) {
    for (auto pair = pairs; pair != pairs + count; pair++) {
        PyObject* value = PyDict_GetItemWithError(dictionary, pair->key);
        if (value != pair->value || (value == nullptr && PyErr_Occurred())) return false;
    }
    return true;
}

bool are_attributes(PyObject* cls, const Pair* pairs, int64_t count) {
    for (auto pair = pairs; pair != pairs + count; pair++) {
        PyObject* value = PyObject_GetAttr(cls, pair->key);
        if (value == nullptr && PyErr_ExceptionMatches(PyExc_AttributeError)) PyErr_Clear();
        bool same = value == pair->value && !PyErr_Occurred();
        Py_XDECREF(value);
        if (!same) return false;
    }
    return true;
}

bool is_table(PyObject* dictionary, const Pair* pairs, int64_t count) {
    if (PyDict_Size(dictionary) != count) return false;
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dictionary, &at, &key, &value); pairs++)
        if (key != pairs->key || value != pairs->value) return false;
    return true;
}

template <class Version, class Same>
bool all_same(Holder* holders, int64_t count, const Pair*& pairs, Version version_of, Same are_same) {
    for (Holder* it = holders; it != holders + count; pairs += it->count, it++) {
        uint64_t version = version_of(it->object);
        if (version != 0 && version == it->version) continue;
        if (!are_same(it->object, pairs, it->count)) return false;
        it->version = version_of(it->object);
    }
    return true;
}

}  // namespace

// 1 if all is the same, 0 if not; called with Python's lock held. What a comparison raises stays set.
EXPORT int same_objects(char* memory) {
    const Counts counts = *take<Counts>(memory, 1);
    auto objects = take<const Object>(memory, counts.objects);
    auto places = take<Holder>(memory, counts.places);
    auto classes = take<Holder>(memory, counts.classes);
    auto tables = take<Holder>(memory, counts.tables);
    auto empty = take<PyObject* const>(memory, counts.empty);
    auto pairs = reinterpret_cast<const Pair*>(memory);

    for (int64_t i = 0; i < counts.objects; i++)
        if (Py_TYPE(objects[i].object) != objects[i].type) return 0;
    for (int64_t i = 0; i < counts.empty; i++)
        if (PyDict_Size(empty[i]) != 0) return 0;
    return all_same(places, counts.places, pairs, version_of_dictionary, are_places) &&
           all_same(classes, counts.classes, pairs, version_of_class, are_attributes) &&
           all_same(tables, counts.tables, pairs, version_of_dictionary, is_table);
}

#endif
