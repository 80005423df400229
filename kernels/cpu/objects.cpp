// Checks that Python objects and their attributes are unchanged. Only pointers are compared. No references are taken, so
// little more than the first cache line of an object is read, and nothing is written.
//
// Not compiled without Python's headers, or for a Python without the GIL, which keeps other threads from the objects.

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

// A dictionary or a class, `count` of whose pairs must not change. `version` is its version tag at the last successful
// comparison, and 0 before that. Python changes the tag with every change.
struct Holder {
    PyObject* object;
    uint64_t version;
    int64_t count;
};

// The value of a dictionary's key, or of a class' attribute; null if there is none.
struct Pair {
    PyObject *key, *value;
};

// The order of the parts in memory, as written by `objects.py`; pairs are those of all holders, in order. The pairs of
// `places` must not change; in `tables`, also, no other pairs may be added.
struct Counts {
    int64_t objects, places, classes, tables, empty;
};

template <class Record>
Record* take(char*& memory, int64_t count) {
    auto records = reinterpret_cast<Record*>(memory);
    memory += count * sizeof(Record);
    return records;
}

// The version tag, 0 if not known. Dictionaries have no tags from Python 3.12 on. After a change of a class or of one of
// its base classes, the class has a new tag or none.
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

// Returns 1 if nothing has changed, else 0. Called with the GIL held. A Python error of a comparison stays set.
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
