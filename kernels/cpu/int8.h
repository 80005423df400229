// Products with 8-bit integer weights by AVX512-VNNI, which multiplies four integers at once and adds the products.
//
//     z = x * factors                                              [rows, inner]    in float32
//     low = min z of a row, step = (max z of a group - low) / 255  [rows], [rows, groups]
//     q = round((z - low) / step)                                  [rows, inner]    uint8
//     y = sum over groups of step * scales * (q Q^T) + low * sums + bias            q Q^T exact, in int32
//
// An activation has a least value that is known beforehand. Its results are quantised as soon as a group is complete:
//
//     z = (activation(h) - least) * factors, step = max z of a group / 255, q = round(z / step)
//     y = sum over groups of step * scales * (q Q^T) + least * raised + bias        raised: sums of Q * scales * factors
//
// Q [columns, inner] int8 is laid out once by `int8.py`, in panels of PANEL columns with four adjacent elements of a
// column together. A row's result does not depend on the other rows.

#pragma once

#include <omp.h>

#include <type_traits>

#include "simd.h"

namespace {

constexpr int ROWS = BLOCK_ROWS, PANEL = BLOCK_REGISTERS * WIDTH, QUAD = 4;
constexpr int SUMMED = 7 * ROWS;  // rows whose sums stay in the first-level cache
constexpr int MOST_TOGETHER = 4;  // most panels in a group whose products are quantised as soon as they are complete
constexpr float LEAST_EXTENT = 1e-30f;  // if max z - low of a group is less, all of its elements are quantised to 0

// Sets the step of a group of this extent, and returns 1 / step, or 0 for a step of 0. The step is NaN if extent is NaN.
inline float per_step(float extent, float& step) {
    const bool varies = extent > LEAST_EXTENT;
    step = varies ? extent / 255 : extent * 0.0f;
    return varies ? 255 / extent : 0.0f;
}

// z_of(i) returns 16 elements of z from i on. Fills q [width] and range [1 + groups]: low, then the step of each group. If
// an element is not finite, low is NaN, and so is the whole row of a product.
template <class Z>
inline void quantise_row(const Z& z_of, uint8_t* q, float* range, int width, int group) {
    const Floats infinite = floats(std::numeric_limits<float>::infinity());
    Floats least = infinite, odd = floats(0.0f);
    float* steps = range + 1;
    for (int first = 0; first < width; first += group) {
        Floats most = floats(0.0f) - infinite;
        for (int i = first; i < first + group; i += WIDTH) {
            const Floats z = z_of(i);
            most = maximum(z, most);
            least = minimum(z, least);
            odd = fma(z, floats(0.0f), odd);  // NaN if z is NaN or infinite, else 0
        }
        steps[first / group] = maximum_of(most);
    }
    const float low = minimum_of(least);
    range[0] = low + sum_of(odd);
    for (int first = 0; first < width; first += group) {
        float& step = steps[first / group];
        const Floats of_group = floats(per_step(step - low, step));
        const auto quantised = [&](int i) { return to_ints((z_of(i) - floats(low)) * of_group); };
        int i = first;
        for (; i + PANEL <= first + group; i += PANEL)
            store_bytes(q + i, {quantised(i), quantised(i + WIDTH), quantised(i + 2 * WIDTH), quantised(i + 3 * WIDTH)});
        for (; i < first + group; i += WIDTH) store_bytes(q + i, quantised(i));
    }
}

// Calls put(i, j, before(i, j) + y) for M rows of q and each register of a panel; y: the products of one group. The rows'
// steps are `range_stride` apart. This is a separate function because, inlined into its caller, the compiler kept the
// sums of this loop in memory.
template <int M, class Before, class Put>
[[gnu::noinline, gnu::target("avx512vnni")]] void int8_tile(
    const uint8_t* q, int64_t q_stride, const float* steps, int64_t range_stride, const int8_t* panel, int quads,
    const float* scales, Before before, Put put
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
            for (int j = 0; j < BLOCK_REGISTERS; ++j) sum[i][j] = _mm512_dpbusd_epi32(sum[i][j], of_row, of_panel[j]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < BLOCK_REGISTERS; ++j) asm("" : "+v"(sum[i][j]));  // keeps the sums in registers
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
        const Floats step = floats(steps[i * range_stride]);
#pragma GCC unroll 4
        for (int j = 0; j < BLOCK_REGISTERS; ++j) {
            const Floats z = _mm512_cvtepi32_ps(sum[i][j]) * load(scales + j * WIDTH);
            put(i, j, fma(z, step, before(i, j)));
        }
    }
}

struct Nothing {};

// Multiplies rows of q [rows, inner] with the panels `first` to `end`, `together` at a time (at most MOST_TOGETHER).
// of_low: what low is multiplied with. Full panels are passed to `to`, unless it is Nothing, and all others to `put`:
//     to(row, column)(i, j, y)               y: register j, from `column` on, of row + i
//     put(row, n, column, registers, out)    out [together][ROWS][PANEL]: n rows and `registers` registers from there on
//
// A panel's part for one group, 8 KiB for 128 elements, is read from the second-level cache once for SUMMED rows.
template <class To, class Put>
void int8_multiply(
    const uint8_t* q, const float* ranges, int rows, int inner, const Int8Weight& weight, const float* of_low,
    int columns, int first, int end, int together, const To& to, const Put& put
) {
    const int group = weight.group, groups = inner / group, quads = group / QUAD, range_stride = 1 + groups;
    const int64_t of_panel = (int64_t)PANEL * inner;
    for (int p = first; p < end; p += together) {
        const int column = p * PANEL, panels = std::min(together, end - p), last = p + panels;
        const int registers = (std::min(columns, last * PANEL) - column) / WIDTH;
        const bool direct = !std::is_same_v<To, Nothing> && registers == BLOCK_REGISTERS;
        const int64_t next = of_panel * std::min(together, end - last);  // bytes to prefetch
        const int64_t tiles = (int64_t)(rows + ROWS - 1) / ROWS * panels * groups;
        int64_t tile = 0, fetched = 0;
        for (int from = 0; from < rows; from += SUMMED) {
            const int end_of_rows = std::min(from + SUMMED, rows);
            alignas(64) float out[SUMMED / ROWS][MOST_TOGETHER][ROWS][PANEL];
            for (int t = 0; t < panels; ++t)
                for (int g = 0; g < groups; ++g)
                    for (int row = from; row < end_of_rows; row += ROWS) {
                        // a part of the next panels with each tile
                        for (++tile; fetched < next * tile / tiles; fetched += 64)
                            fetch(weight.panels + last * of_panel + fetched);
                        const int64_t at = (int64_t)(p + t) * PANEL;
                        const float* steps = ranges + (int64_t)row * range_stride + 1 + g;
                        float (*sums)[PANEL] = out[(row - from) / ROWS][t];
                        const auto from_low = [=, a = of_low + at, b = weight.bias + at](int i, int j) {
                            return fma(floats(steps[i * range_stride - 1]), load(a + j * WIDTH), load(b + j * WIDTH));
                        };
                        const auto from_out = [=](int i, int j) { return load(sums[i] + j * WIDTH); };
                        const auto to_out = [=](int i, int j, Floats z) { store(sums[i] + j * WIDTH, z); };
                        const auto multiply = [&](auto before, auto put) {
                            switch (std::min(ROWS, end_of_rows - row)) {
#define OF_ROWS(M)                                                                                                     \
    case M:                                                                                                            \
        int8_tile<M>(q + (int64_t)row * inner + g * group, inner, steps, range_stride,                                 \
                     weight.panels + at * inner + (int64_t)g * group * PANEL, quads,                                   \
                     weight.scales + at * groups + g * PANEL, before, put);                                            \
        break;
                                OF_ROWS(6) OF_ROWS(5) OF_ROWS(4) OF_ROWS(3) OF_ROWS(2) OF_ROWS(1)
#undef OF_ROWS
                            }
                        };
                        if constexpr (!std::is_same_v<To, Nothing>)
                            if (direct && g == groups - 1) {
                                g ? multiply(from_out, to(row, column)) : multiply(from_low, to(row, column));
                                continue;
                            }
                        g ? multiply(from_out, to_out) : multiply(from_low, to_out);
                    }
            for (int row = from; row < end_of_rows && !direct; row += ROWS)
                put(row, std::min(ROWS, end_of_rows - row), column, registers, out[(row - from) / ROWS]);
        }
    }
}

// max(x, 0) - GELU(x) is |x| times the normal distribution's tail beyond |x|. The table has a parabola of |x| for each of
// 16 intervals around multiples of 1 / PER_ONE, through the values at three Chebyshev points, with an error of at most
// 6e-5. Beyond the last interval the difference stays as it is at its end, 2e-4.
struct GeluTable {
    static constexpr int COUNT = WIDTH;
    static constexpr float PER_ONE = 4;
    alignas(64) float coefficients[3][COUNT];
    GeluTable() {
        for (int interval = 0; interval < COUNT; ++interval) {
            double x[3], f[3];
            for (int i = 0; i < 3; ++i) {
                x[i] = (interval + 0.5 * std::cos(M_PI * (2 * i + 1) / 6)) / PER_ONE;
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
    const Floats u = minimum(absolute(x), floats((GeluTable::COUNT - 0.5f) / GeluTable::PER_ONE * 0.9999f));
    // adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits
    const Ints interval = as_ints(fma(u, floats(GeluTable::PER_ONE), floats(12582912.0f)));
    const auto coefficient = [&](int degree) {
        return _mm512_permutexvar_ps((__m512i)interval, load(gelu_table.coefficients[degree]));
    };
    const Floats lack = fma(fma(coefficient(2), u, coefficient(1)), u, coefficient(0));
    return maximum(floats(0.0f), x) - lack;
}

inline Floats activate_for_8_bits(Floats x, int activation) {
    return activation == 1 ? gelu_for_8_bits(x) : activate(x, activation);
}

// No activation of the feed-forward block is less than this; GELU's minimum is -0.16997, by tanh -0.17004.
inline float least_of(int activation) { return activation == 3 ? 0.0f : -0.1701f; }

// Quantises the activation of one group of columns, out [panels][ROWS][PANEL], which is overwritten. factors, q and steps
// begin with those of the first row and column. A row's step is not finite if one of its elements is not.
template <int ACTIVATION>
void activate_and_quantise(
    float (*out)[ROWS][PANEL], int rows, int panels, const float* factors, uint8_t* q, int64_t q_stride, float* steps,
    int64_t step_stride
) {
    const Floats least = floats(least_of(ACTIVATION));
    float of_row[ROWS];
    for (int i = 0; i < rows; ++i) {
        __m512i most = _mm512_setzero_si512();
        for (int p = 0; p < panels; ++p)
#pragma GCC unroll 4
            for (int j = 0; j < BLOCK_REGISTERS; ++j) {
                float* at = out[p][i] + j * WIDTH;
                const Floats y = activate_for_8_bits(load(at), ACTIVATION);
                const Floats z = absolute((y - least) * load(factors + p * PANEL + j * WIDTH));
                store(at, z);
                most = _mm512_max_epi32(most, (__m512i)as_ints(z));  // as integers NaN is greater than all numbers
            }
        const int32_t bits = _mm512_reduce_max_epi32(most);
        float extent;
        std::memcpy(&extent, &bits, sizeof extent);
        of_row[i] = per_step(extent, steps[i * step_stride]);
    }
    for (int i = 0; i < rows; ++i) {
        const Floats per = floats(of_row[i]);
        for (int p = 0; p < panels; ++p) {
            const auto quantised = [&](int j) { return to_ints(load(out[p][i] + j * WIDTH) * per); };
            store_bytes(q + i * q_stride + p * PANEL, {quantised(0), quantised(1), quantised(2), quantised(3)});
        }
    }
}

}  // namespace
