// Products of many rows. A panel of columns, 64 with AVX-512, is laid out in the core's own cache and multiplied with
// six rows at a time: 24 sums stay in registers, and 10 loads serve 24 multiplications. The caller lays out the columns
// and stores the sums.

#pragma once

#include "simd.h"
#include "team.h"

namespace {

constexpr int ROWS = BLOCK_ROWS;  // rows that are multiplied at a time
constexpr int REGISTERS = BLOCK_REGISTERS;  // registers of columns in a panel
constexpr int PANEL = REGISTERS * WIDTH;
constexpr int CHUNK = 256;  // lanes of a partial sum; shorter sums are more exact
constexpr int LEAST_ROWS = 48;  // least rows for a panel; laying a panel out takes as long as multiplying 5 rows

// 16 lanes of T from a row with elements W: either T's elements, or float32, which is rounded to bfloat16.
template <class T, class W>
inline Ints lanes_of(const W* from) {
    if constexpr (sizeof(W) == sizeof(typename T::Element))
        return load_ints(from);
    else
        return to_bfloat16(load(from), load(from + WIDTH));
}

// 16 elements of a row as lanes of T. In bfloat16 a lane has an element and the element below it in the next row, which
// is `stride` elements further, or zero if there is no next row.
template <class T, class W>
inline Ints lanes_of_rows(const W* from, int64_t stride, bool has_next) {
    if constexpr (T::PER_LANE == 1) return load_ints(from);
    else if constexpr (sizeof(W) == sizeof(float)) {
        const Floats next = has_next ? load(from + stride) : floats(0.0f);
        return to_pairs(load(from), next);
    } else {
        const Ints low = widen(from);
        if (!has_next) return low;
        const Ints high = widen(from + stride);
        return low | high << 16;
    }
}

// Transposes rows [up to PANEL, width] of W to panel [lanes of width, PANEL]; only the first `registers` registers of
// columns are filled.
template <class T, class W>
void lay_out_transposed(const W* rows, int width, int registers, float* panel) {
    const int lanes = width / T::PER_LANE;
    for (int j = 0; j < REGISTERS; ++j)
        for (int lane = 0; lane < lanes; lane += WIDTH) {
            Ints r[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                r[i] = j < registers
                    ? lanes_of<T>(rows + (int64_t)(j * WIDTH + i) * width + lane * T::PER_LANE)
                    : ints(0);
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                store_ints(panel + (int64_t)(lane + i) * PANEL + j * WIDTH, r[i]);
        }
}

// Lays out up to PANEL columns of rows [count, stride] of W as panel [lanes of count, PANEL].
template <class T, class W>
void lay_out(const W* rows, int64_t stride, int count, int registers, float* panel) {
    for (int row = 0; row < count; row += T::PER_LANE, panel += PANEL)
#pragma GCC unroll 4
        for (int j = 0; j < REGISTERS; ++j)
            store_ints(
                panel + j * WIDTH,
                j < registers ? lanes_of_rows<T>(rows + row * stride + j * WIDTH, stride, row + 1 < count)
                              : ints(0)
            );
}

// sums [M, PANEL] = M rows of x [M, lanes], with stride x_stride, times panel [lanes, PANEL]. This is a separate function
// because, inlined into its caller, the compiler kept an activation's constants in registers and these sums in memory.
template <class T, int M>
[[gnu::noinline]] void tile(
    const typename T::Element* x, int64_t x_stride, const float* panel, int lanes, float (*sums)[PANEL]
) {
    for (int lane = 0; lane < lanes; lane += CHUNK) {
        Floats sum[M][REGISTERS];
        multiply<T, M, REGISTERS>(
            x + lane * T::PER_LANE, x_stride, panel + (int64_t)lane * PANEL, PANEL, std::min(CHUNK, lanes - lane), sum
        );
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < REGISTERS; ++j) {
                float* to = sums[i] + j * WIDTH;
                store(to, lane ? sum[i][j] + load(to) : sum[i][j]);
            }
    }
}

// The number of parts into which rows are divided, each with its own panel, so that all threads have work.
inline int parts_of(int rows, int panels) {
    const int threads = omp_get_max_threads();
    int parts = 1;
    while (panels * parts % threads && panels * parts < 4 * threads && rows >= (parts + 1) * LEAST_ROWS) ++parts;
    return parts;
}

struct NothingAhead {
    void operator()(int, int) const {}
};
struct NothingAfter {
    void operator()(int, int, int, int, const float (*)[PANEL]) const {}
};

// Multiplies x [rows, lanes], with stride x_stride, with the panels of `columns` columns, a multiple of WIDTH.
//     fill(column, registers, panel)  lays out the columns from `column` on
//     fetch(column, from, to, of)     prefetches the parts `from` to `to`, of `of`, of the data for these columns
//     put(row, column, sums)          stores a register of sums; should capture by value, see `put_here`
//     ahead(row, column)              prefetches what `put` will read in a row of a panel
//     after(row, n, column, registers, sums)  gets the sums [n, PANEL] of n rows; row is a multiple of ROWS
// Returns 1 if there is no memory for a panel. A row's sums do not depend on the other rows.
template <class T, class Fill, class Fetch, class Put, class Ahead = NothingAhead, class After = NothingAfter>
int multiply_rows(
    const typename T::Element* x, int64_t x_stride, int rows, int columns, int lanes, const Fill& fill,
    const Fetch& fetch, const Put& put, const Ahead& ahead = Ahead(), const After& after = After()
) {
    const int panels = (columns + PANEL - 1) / PANEL, parts = parts_of(rows, panels);
    const int of_part = round_up((rows + parts - 1) / parts, ROWS);
    static std::atomic<uint64_t> calls{0};
    const uint64_t call = ++calls;
    std::atomic<bool> failed{false};
    Team::share(panels * parts, [&](int chunk) {
        const Put put_here = put;  // a local object, so that stores through pointers cannot change what it captured
        thread_local uint64_t call_of_panel = 0;
        thread_local int laid_out = -1;
        const int p = chunk / parts, first = chunk % parts * of_part, end = std::min(first + of_part, rows);
        const int column = p * PANEL, registers = std::min(PANEL, columns - column) / WIDTH;
        if (!scratch.reserve(sizeof(float) * PANEL * lanes)) {
            failed = true;
            return;
        }
        float* panel = Parts(scratch).floats((size_t)PANEL * lanes);  // a thread's panel keeps its place and content
        if (call != call_of_panel || p != laid_out) fill(column, registers, panel);
        call_of_panel = call;
        laid_out = p;
        const bool is_followed = column + 2 * PANEL <= columns;
        for (int row = first; row < end; row += ROWS) {
            if (is_followed) fetch(column + PANEL, row - first, std::min(row + ROWS, end) - first, end - first);
            alignas(64) float sums[ROWS][PANEL];
            const int n = std::min(ROWS, end - row);
            for (int i = 0; i < n; ++i) ahead(row + i, column);
            switch (n) {
#define OF_ROWS(M) case M: tile<T, M>(x + row * x_stride, x_stride, panel, lanes, sums); break;
                OF_ROWS(6) OF_ROWS(5) OF_ROWS(4) OF_ROWS(3) OF_ROWS(2) OF_ROWS(1)
#undef OF_ROWS
            }
            for (int j = 0; j < registers; ++j)
                for (int i = 0; i < n; ++i)
                    put_here(row + i, column + j * WIDTH, load(sums[i] + j * WIDTH));
            after(row, n, column, registers, sums);
        }
    });
    return failed;
}

// Prefetches a row of a panel of elements of E.
template <class E>
inline void fetch_row(const E* row) {
    for (size_t byte = 0; byte < sizeof(E) * PANEL; byte += 64) fetch_near((const char*)row + byte);
}

// Prefetches parts, as `fetch` above, of `bytes` contiguous bytes.
inline void fetch_share(const void* what, int64_t bytes, int from, int to, int of) {
    for (int64_t at = bytes * from / of / 64 * 64; at < bytes * to / of; at += 64)
        fetch((const char*)what + at);
}

}  // namespace
