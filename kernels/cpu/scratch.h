// A thread's own memory for intermediate results. It is kept between calls, and each call cuts it into parts.
//
// AddressSanitizer knows allocations but not parts of them. In its builds (FASTBERT_SANITIZE=1) the parts lie apart and
// all else is poisoned, so that an access past the end of a part, or to a part of an earlier call, is reported.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#define HAS_ADDRESS_SANITIZER
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define HAS_ADDRESS_SANITIZER
#endif
#endif
#if defined(HAS_ADDRESS_SANITIZER)
#include <sanitizer/asan_interface.h>
#endif

namespace {

inline size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }  // a line of the cache has 64 bytes

#if !defined(HAS_ADDRESS_SANITIZER)

// Memory of one thread, which grows when needed and is kept.
struct Scratch {
    char* memory = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(memory); }
    bool reserve(size_t bytes) {
        if (bytes <= size) return true;
        std::free(memory);
        size = whole_lines(bytes);
        memory = (char*)std::aligned_alloc(64, size);
        if (!memory) size = 0;
        return memory;
    }
};

// The parts of what was reserved, one after another.
struct Parts {
    char* next;
    explicit Parts(const Scratch& scratch) : next(scratch.memory) {}
    float* floats(size_t count) { return (float*)std::exchange(next, next + sizeof(float) * count); }
    // A part after which another one begins with a new line of the cache.
    char* lines(size_t bytes) { return std::exchange(next, next + whole_lines(bytes)); }
};

#else

constexpr size_t GAP_BYTES = 4096, MOST_PARTS = 64;

struct Scratch {
    char* memory = nullptr;
    size_t size = 0, reserved = 0;
    ~Scratch() { std::free(memory); }
    bool reserve(size_t bytes) {
        const size_t with_gaps = whole_lines(bytes) + MOST_PARTS * (GAP_BYTES + 64);
        if (with_gaps > size) {
            std::free(memory);
            memory = (char*)std::aligned_alloc(64, size = with_gaps);
            if (!memory) size = 0;
        }
        if (memory) ASAN_POISON_MEMORY_REGION(memory, size);
        reserved = bytes;
        return memory;
    }
};

struct Parts {
    char* next;
    size_t left;
    int count = 0;
    explicit Parts(const Scratch& scratch) : next(scratch.memory), left(scratch.reserved) {}
    float* floats(size_t count) { return (float*)part(sizeof(float) * count, sizeof(float) * count); }
    char* lines(size_t bytes) { return part(bytes, whole_lines(bytes)); }

    char* part(size_t bytes, size_t with_rest) {
        if (++count > (int)MOST_PARTS || bytes > left) {
            std::fprintf(stderr, "part %d of a scratch memory has %zu bytes, and %zu are left\n", count, bytes, left);
            std::abort();
        }
        left -= with_rest < left ? with_rest : left;
        ASAN_UNPOISON_MEMORY_REGION(next, bytes);
        return std::exchange(next, next + whole_lines(bytes) + GAP_BYTES);
    }
};

#endif

thread_local Scratch scratch;

}  // namespace
