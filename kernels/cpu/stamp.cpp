// What this library was built of, for `_cpu_library.py` to compare; `setup.py` defines both.

#include "_cpu_simd.h"

EXPORT const char* sources_stamp() { return SOURCES_STAMP; }
EXPORT const char* interface_stamp() { return INTERFACE_STAMP; }
