// Products with 8-bit integer weights by AVX512-VNNI, which multiplies four integers at once and adds the products.
//
//     z = x * factors                                              [rows, inner]    in float32
//     low = min z of a row, step = (max z of a group - low) / 255  [rows], [rows, groups]
//     q = round((z - low) / step)                                  [rows, inner]    uint8
//     y = sum over groups of step * scales * (q Q^T) + low * sums + bias            q Q^T exact, in int32
//
// Q [columns, inner] int8 is laid out once by `int8.py`, in panels of PANEL columns with four adjacent elements of a
// column together. A row's result does not depend on the other rows.

#pragma once

#include <omp.h>

#include "simd.h"

namespace {

constexpr int ROWS = BLOCK_ROWS, PANEL = BLOCK_REGISTERS * WIDTH, QUAD = 4;
constexpr float LEAST_EXTENT = 1e-30f;  // if max z - low of a group is less, all of its elements are quantised to 0

// x(i) returns 16 elements of a row from i on, in float32. Fills q [width] and range [1 + groups]: low, then the step of
// each group. If an element is not finite, low is NaN, and so is the whole row of a product.
template <class X>
inline void quantise_row(const X& x, const float* factors, uint8_t* q, float* range, int width, int group) {
    const Floats infinite = floats(std::numeric_limits<float>::infinity());
    Floats most_negated = floats(0.0f) - infinite, odd = floats(0.0f);
    float* steps = range + 1;
    for (int first = 0; first < width; first += group) {
        Floats most = floats(0.0f) - infinite;
        for (int i = first; i < first + group; i += WIDTH) {
            const Floats z = x(i) * load(factors + i);
            most = maximum(z, most);
            most_negated = maximum(floats(0.0f) - z, most_negated);
            odd = fma(z, floats(0.0f), odd);  // NaN if z is NaN or infinite, else 0
        }
        steps[first / group] = maximum_of(most);
    }
    const float low = -maximum_of(most_negated);
    range[0] = low + sum_of(odd);
    for (int first = 0; first < width; first += group) {
        float& step = steps[first / group];
        const float extent = step - low;
        const bool varies = extent > LEAST_EXTENT;
        step = varies ? extent / 255 : 0.0f;
        const Floats per_step = floats(varies ? 255 / extent : 0.0f);
        for (int i = first; i < first + group; i += WIDTH) {
            const Floats z = x(i) * load(factors + i);
            store_bytes(q + i, to_ints((z - floats(low)) * per_step));
        }
    }
}

// Adds the product of one group of M rows of q with one panel, without low, to out [M, PANEL]; FIRST overwrites. This is
// a separate function because, inlined into its caller, the compiler kept the sums of this loop in memory.
template <int M, bool FIRST>
[[gnu::noinline, gnu::target("avx512vnni")]] void int8_tile(
    const uint8_t* q, int64_t q_stride, const float* step, int64_t step_stride, const int8_t* panel, int quads,
    const float* scales, float (*out)[PANEL]
) {
    __m512i sum[M][BLOCK_REGISTERS];
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < BLOCK_REGISTERS; ++j) sum[i][j] = _mm512_setzero_si512();
    for (int quad = 0; quad < quads; ++quad, q += QUAD, panel += QUAD * PANEL) {
        __m512i of_panel[BLOCK_REGISTERS];
#pragma GCC unroll 4
        for (int j = 0; j < BLOCK_REGISTERS; ++j) of_panel[j] = _mm512_loadu_si512(panel + j * QUAD * WIDTH);
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) {
            const __m512i of_row = (__m512i)as_ints(broadcast_lane(q + i * q_stride));
#pragma GCC unroll 4
            for (int j = 0; j < BLOCK_REGISTERS; ++j)
                sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], of_row, of_panel[j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < BLOCK_REGISTERS; ++j) asm("" : "+v"(sum[i][j]));  // keeps the sums in registers
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
        const Floats of_row = floats(step[i * step_stride]);
#pragma GCC unroll 4
        for (int j = 0; j < BLOCK_REGISTERS; ++j) {
            float* to = out[i] + j * WIDTH;
            const Floats z = _mm512_cvtepi32_ps(sum[i][j]) * load(scales + j * WIDTH);
            store(to, FIRST ? z * of_row : fma(z, of_row, load(to)));
        }
    }
}

// Calls put(row, column, y) for every 16 elements of y: rows of q [rows, inner] times the panels `first` to `end`.
template <class Put>
void int8_multiply(
    const uint8_t* q, const float* ranges, int rows, int inner, const Int8Weight& weight, int columns, int first, int end,
    const Put& put
) {
    const int groups = inner / weight.group, quads = weight.group / QUAD;
    const int64_t of_panel = (int64_t)PANEL * inner, of_group = (int64_t)PANEL * weight.group;
    for (int p = first; p < end; ++p) {
        const int column = p * PANEL, registers = std::min(PANEL, columns - column) / WIDTH;
        const int8_t* panel = weight.panels + p * of_panel;
        const float* scales = weight.scales + (int64_t)p * groups * PANEL;
        for (int row = 0; row < rows; row += ROWS) {
            const int n = std::min(ROWS, rows - row);
            if (p + 1 < end)  // prefetches the next panel, a part of it with each group of rows
                for (int64_t at = of_panel * row / rows / 64 * 64; at < of_panel * (row + n) / rows; at += 64)
                    fetch(panel + of_panel + at);
            alignas(64) float out[ROWS][PANEL];
            const uint8_t* of_rows = q + (int64_t)row * inner;
            const float* range = ranges + (int64_t)row * (1 + groups);
            switch (n) {
#define OF_ROWS(M)                                                                                                 \
    case M:                                                                                                        \
        int8_tile<M, true>(of_rows, inner, range + 1, 1 + groups, panel, quads, scales, out);                      \
        for (int group = 1; group < groups; ++group)                                                               \
            int8_tile<M, false>(of_rows + group * weight.group, inner, range + 1 + group, 1 + groups,              \
                                panel + group * of_group, quads, scales + group * PANEL, out);                     \
        break;
                OF_ROWS(6) OF_ROWS(5) OF_ROWS(4) OF_ROWS(3) OF_ROWS(2) OF_ROWS(1)
#undef OF_ROWS
            }
            for (int j = 0; j < registers; ++j) {
                const int at = column + j * WIDTH;
                const Floats sums = load(weight.sums + at), bias = load(weight.bias + at);
                for (int i = 0; i < n; ++i) {
                    const Floats low = floats(range[i * (1 + groups)]);
                    put(row + i, at, load(out[i] + j * WIDTH) + fma(low, sums, bias));
                }
            }
        }
    }
}

// max(x, 0) - GELU(x) is |x| times the normal distribution's tail beyond |x|. The table has a parabola of |x| for each of
// 32 intervals, through the values at three Chebyshev points, with an error of at most 2e-5. Beyond the last interval
// the difference counts as zero.
struct GeluTable {
    static constexpr int COUNT = 32;
    static constexpr float PER_ONE = 6;
    alignas(64) float coefficients[3][COUNT];
    GeluTable() {
        for (int interval = 0; interval < COUNT; ++interval) {
            double x[3], f[3];
            for (int i = 0; i < 3; ++i) {
                x[i] = (interval + 0.5 + 0.5 * std::cos(M_PI * (2 * i + 1) / 6)) / PER_ONE;
                f[i] = x[i] * 0.5 * std::erfc(x[i] / std::sqrt(2.0));
            }
            const double slope = (f[1] - f[0]) / (x[1] - x[0]);
            const double curve = ((f[2] - f[0]) / (x[2] - x[0]) - slope) / (x[2] - x[1]);
            coefficients[0][interval] = f[0] - slope * x[0] + curve * x[0] * x[1];
            coefficients[1][interval] = slope - curve * (x[0] + x[1]);
            coefficients[2][interval] = curve;
        }
    }
};
const GeluTable gelu_table;

inline Floats gelu_for_8_bits(Floats x) {
    const Floats end = floats(GeluTable::COUNT / GeluTable::PER_ONE * 0.9999f);
    const Floats u = _mm512_min_ps(absolute(x), end);
    const __m512i interval = _mm512_cvttps_epi32(u * floats(GeluTable::PER_ONE));
    const auto coefficient = [&](int degree) {
        const float* of = gelu_table.coefficients[degree];
        return _mm512_permutex2var_ps(load(of), interval, load(of + WIDTH));
    };
    const Floats lack = fma(fma(coefficient(2), u, coefficient(1)), u, coefficient(0));
    return maximum(floats(0.0f), x) - lack;
}

inline Floats activate_for_8_bits(Floats x, int activation) {
    return activation == 1 ? gelu_for_8_bits(x) : activate(x, activation);
}

}  // namespace
