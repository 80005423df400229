// The stamps of the library's sources and interface, and its functions' signatures, for `library.py`. `setup.py` defines
// all three.

#include "simd.h"

EXPORT const char* sources_stamp() { return SOURCES_STAMP; }
EXPORT const char* interface_stamp() { return INTERFACE_STAMP; }
EXPORT const char* signatures() { return SIGNATURES; }
