// Products of many rows: a panel of columns at a time, 64 with AVX-512, is laid out in the core's own cache, and six rows
// at a time go through them: 24 sums stay in registers, and 10 loads serve 24 multiplications. What the columns are laid out from, and what
// becomes of the sums, is the caller's.

#pragma once

#include <omp.h>

#include "simd.h"

namespace {

constexpr int ROWS = BLOCK_ROWS;  // rows at a time,
constexpr int REGISTERS = BLOCK_REGISTERS;  // with so many registers of columns: a panel
constexpr int PANEL = REGISTERS * WIDTH;
constexpr int CHUNK = 256;  // lanes that are summed in one go: shorter sums are more exact
constexpr int LEAST_ROWS = 48;  // that are worth a panel of their own: laying it out costs as much as multiplying by 5

// 16 lanes of T of a row whose elements are W: T's own, or float32 that are rounded to bfloat16.
template <class T, class W>
inline Ints lanes_of(const W* from) {
    if constexpr (sizeof(W) == sizeof(typename T::Element))
        return load_ints(from);
    else
        return to_bfloat16(load(from), load(from + WIDTH));
}

// 16 elements of a row as lanes of T: float32 as they are, bfloat16 each beside its neighbour in the next row, `stride`
// elements on, or beside zero where there is none.
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

// rows [up to PANEL, width] of W -> panel [lanes of width, PANEL]; of the registers of columns only the first
// `registers` are there.
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

// rows [count, stride] of W, of which up to PANEL columns are meant -> panel [lanes of count, PANEL].
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

// sums [M, PANEL] of M rows of x [M, lanes], x_stride elements apart, with panel [lanes, PANEL]. A function of its own:
// within its caller the compiler has kept constants of an activation in registers, and the sums of this loop in memory.
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

// Into how many parts the rows go, each with a panel of its own, so that there is work for all threads.
inline int parts_of(int rows, int panels) {
    const int threads = omp_get_max_threads();
    int parts = 1;
    while (panels * parts % threads && panels * parts < 4 * threads && rows >= (parts + 1) * LEAST_ROWS) ++parts;
    return parts;
}

// x [rows, lanes], x_stride elements apart, times the panels of so many columns, a multiple of WIDTH.
//     fill(column, registers, panel)  lays out the columns from `column` on
//     fetch(column, from, to, of)     starts to bring in the same share of what those columns are made of
//     put(row, column, sums)          takes a register of sums
// Returns 1 where there is no memory for a panel. A row's sums do not depend on the other rows.
template <class T, class Fill, class Fetch, class Put>
int multiply_rows(
    const typename T::Element* x, int64_t x_stride, int rows, int columns, int lanes, const Fill& fill,
    const Fetch& fetch, const Put& put
) {
    const int panels = (columns + PANEL - 1) / PANEL, parts = parts_of(rows, panels);
    const int of_part = round_up((rows + parts - 1) / parts, ROWS);
    bool failed = false;
#pragma omp parallel
    {
        int laid_out = -1;
        float* panel = scratch.reserve(sizeof(float) * PANEL * lanes) ? (float*)scratch.memory : nullptr;
        if (!panel) failed = true;
#pragma omp for collapse(2) schedule(static)
        for (int p = 0; p < panels; ++p)
            for (int part = 0; part < parts; ++part) {
                if (!panel) continue;
                const int column = p * PANEL, registers = std::min(PANEL, columns - column) / WIDTH;
                if (p != laid_out) fill(column, registers, panel);
                laid_out = p;
                const int first = part * of_part, end = std::min(first + of_part, rows);
                const bool is_followed = column + 2 * PANEL <= columns;
                for (int row = first; row < end; row += ROWS) {
                    if (is_followed) fetch(column + PANEL, row - first, std::min(row + ROWS, end) - first, end - first);
                    alignas(64) float sums[ROWS][PANEL];
                    const int n = std::min(ROWS, end - row);
                    switch (n) {
#define OF_ROWS(M) case M: tile<T, M>(x + row * x_stride, x_stride, panel, lanes, sums); break;
                        OF_ROWS(6) OF_ROWS(5) OF_ROWS(4) OF_ROWS(3) OF_ROWS(2) OF_ROWS(1)
#undef OF_ROWS
                    }
                    for (int j = 0; j < registers; ++j)
                        for (int i = 0; i < n; ++i)
                            put(row + i, column + j * WIDTH, load(sums[i] + j * WIDTH));
                }
            }
    }
    return failed;
}

// Brings in a share, as `fetch` above, of `bytes` that lie one after another.
inline void fetch_share(const void* what, int64_t bytes, int from, int to, int of) {
    for (int64_t at = bytes * from / of / 64 * 64; at < bytes * to / of; at += 64)
        fetch((const char*)what + at);
}

}  // namespace
