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

// What a dictionary has under a key, null if nothing.
struct Place {
    PyObject *dictionary, *key, *value;
};

// `version` is that of the class when `count` attributes of it were last seen to be the same, and 0 before. Python gives
// a class another version when the class, or one that it is derived from, changes.
struct Class {
    PyTypeObject* type;
    int64_t version, count;
};

// What a class has under a name, null if nothing.
struct Attribute {
    PyObject *name, *value;
};

// A dictionary that has something in it.
struct Table {
    PyObject* dictionary;
    int64_t size;
};

struct Entry {
    PyObject *key, *value;
};

// The order of the parts in memory, as `objects.py` puts them there.
struct Counts {
    int64_t objects, places, classes, attributes, empty, tables;
};

// So many records before one is looked at, its object is asked for, since most lie in no cache when a model is called
// again; and half as many before, the memory in which a dictionary keeps what it has.
constexpr int64_t AHEAD = 16;

template <class Record>
Record* take(char*& memory, int64_t count) {
    auto records = reinterpret_cast<Record*>(memory);
    memory += count * sizeof(Record);
    return records;
}

template <class Record>
void fetch_dictionary(const Record* records, int64_t at, int64_t count) {
    if (at + AHEAD < count) __builtin_prefetch(records[at + AHEAD].dictionary);
    if (at + AHEAD / 2 >= count) return;
    auto next = reinterpret_cast<const PyDictObject*>(records[at + AHEAD / 2].dictionary);
    __builtin_prefetch(next->ma_keys);
    __builtin_prefetch(next->ma_values);
}

bool has(PyTypeObject* type, const Attribute& attribute) {
    PyObject* value = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), attribute.name);
    if (value == nullptr && PyErr_ExceptionMatches(PyExc_AttributeError)) PyErr_Clear();
    bool same = value == attribute.value && !PyErr_Occurred();
    Py_XDECREF(value);
    return same;
}

}  // namespace

// 1 if all is the same, 0 if not; called with Python's lock held. What a comparison raises stays set.
EXPORT int same_objects(char* memory) {
    const Counts counts = *take<Counts>(memory, 1);
    auto objects = take<const Object>(memory, counts.objects);
    auto places = take<const Place>(memory, counts.places);
    auto classes = take<Class>(memory, counts.classes);
    auto attribute = take<const Attribute>(memory, counts.attributes);
    auto empty = take<PyObject* const>(memory, counts.empty);
    auto tables = take<const Table>(memory, counts.tables);
    auto entry = reinterpret_cast<const Entry*>(memory);

    for (int64_t i = 0; i < counts.classes; i++) __builtin_prefetch(&classes[i].type->tp_version_tag);
    for (int64_t i = 0; i < counts.objects; i++) {
        if (i + AHEAD < counts.objects) __builtin_prefetch(objects[i + AHEAD].object);
        if (Py_TYPE(objects[i].object) != objects[i].type) return 0;
    }
    for (int64_t i = 0; i < counts.empty; i++) {
        if (i + AHEAD < counts.empty) __builtin_prefetch(empty[i + AHEAD]);
        if (PyDict_Size(empty[i]) != 0) return 0;
    }
    for (int64_t i = 0; i < counts.places; i++) {
        fetch_dictionary(places, i, counts.places);
        PyObject* value = PyDict_GetItemWithError(places[i].dictionary, places[i].key);
        if (value != places[i].value || (value == nullptr && PyErr_Occurred())) return 0;
    }
    for (int64_t i = 0; i < counts.tables; i++) {
        fetch_dictionary(tables, i, counts.tables);
        if (PyDict_Size(tables[i].dictionary) != tables[i].size) return 0;
        PyObject *key, *value;
        for (Py_ssize_t at = 0; PyDict_Next(tables[i].dictionary, &at, &key, &value); entry++)
            if (key != entry->key || value != entry->value) return 0;
    }
    for (Class* it = classes; it != classes + counts.classes; attribute += it->count, it++) {
        if (it->version != 0 && it->version == it->type->tp_version_tag) continue;
        for (int64_t i = 0; i < it->count; i++)
            if (!has(it->type, attribute[i])) return 0;
        it->version = it->type->tp_version_tag;
    }
    return 1;
}

#endif
