// Shared by the operators of the `*.cpp` files here. A lane is 32 bits of a register or of a row: one float32, or two
// bfloat16, which are multiplied at once by the same code.
//
// Threads are OpenMP's. The library is not linked with OpenMP, but uses the one that torch has loaded.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>

#include "operators.h"
#include "scratch.h"

#if defined(__AVX512BF16__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "avx2.h"
#else
#error "the operators are written for AVX-512 with BF16 and for AVX2 with FMA"
#endif

namespace {

constexpr float LOG2_E = 1.4426950408889634f;
// If the square of the mean's rounding error is at least this share of a row's variance, the variance is corrected by it.
constexpr float MEAN_MATTERS = 1e-8f;

// The result of an operator. Unless it is DONE nothing was computed, and the Python caller raises an error.
enum Outcome { DONE = 0, NO_MEMORY = 1, NOT_SEQUENCES = 2, NO_INSTRUCTIONS = 3 };

// Whether starts [sequences + 1] rise from 0 to `rows`.
inline bool are_sequences(const int32_t* starts, int sequences, int64_t rows) {
    bool fit = starts[0] == 0 && starts[sequences] == rows;
    for (int i = 0; i < sequences; ++i) fit &= starts[i] <= starts[i + 1];
    return fit;
}

struct Float32 {
    using Element = float;
    static constexpr int PER_LANE = 1;
    static constexpr int PARTS = 1;
    template <int PART>
    static Floats part(Floats x) { return x; }
    static Floats add_part(Floats sum, Floats a, Floats b) { return fma(a, b, sum); }
    static Floats multiply_add(Floats sum, Floats a, Floats b) { return fma(a, b, sum); }
    static Floats load(const float* from) { return ::load(from); }
    static void store(float* to, Floats x) { ::store(to, x); }
};

struct BFloat16 {
    using Element = uint16_t;
    static constexpr int PER_LANE = 2;
    static constexpr int PARTS = PAIR_PARTS;
    template <int PART>
    static Floats part(Floats x) { return part_of_pairs<PART>(x); }
    static Floats add_part(Floats sum, Floats a, Floats b) { return ::add_part(sum, a, b); }
    static Floats multiply_add(Floats sum, Floats a, Floats b) { return add_pairs(sum, a, b); }
    static Floats load(const uint16_t* from) { return ::load(from); }
    static void store(uint16_t* to, Floats x) { ::store(to, x); }
};

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

inline Floats broadcast_lane(const void* from) {
    int32_t lane;
    std::memcpy(&lane, from, sizeof lane);  // a lane of bfloat16 may have any even address
    return as_floats(ints(lane));
}

// 2^x for x < 128, exactly 1 for 0; NaN stays NaN. The polynomial for the fraction of x has an error of 2e-9; that of
// DEGREE 3, for results that are rounded to bfloat16, has 9e-5.
template <int DEGREE = 6>
inline Floats exp2_of(Floats x) {
    static_assert(DEGREE == 3 || DEGREE == 6);
    const Floats f = fraction(x);
    const auto polynomial = [&](std::initializer_list<float> coefficients) {
        Floats y = floats(*coefficients.begin());
        for (auto c = coefficients.begin() + 1; c != coefficients.end(); ++c) y = fma(y, f, floats(*c));
        return y;
    };
    const Floats y = DEGREE == 3
        ? polynomial({0.07706705f, 0.22764498f, 0.6951168f, 1.0f})
        : polynomial({2.1612917e-4f, 1.2467846e-3f, 9.6754516e-3f, 0.055485282f, 0.24022931f, 0.69314706f, 1.0f});
    return times_power_of_2(y, x);
}

// The normal distribution function of x, and exp(-x^2 / 2). The tail beyond |x| is exp(-z^2) times a polynomial in
// 1 / (1 + 0.55 z), z = |x| / sqrt(2), fitted for the least error of the tail, 9e-9.
struct Normal {
    Floats share, e;
};
inline Normal normal(Floats x) {
    const Floats z = absolute(x * floats(0.70710678f));
    const Floats one = floats(1.0f);
    const Floats t = one / fma(z, floats(0.55f), one);
    Floats y = floats(0.053667795f);
    for (float c : {-0.259041805f, 0.37989395f, -0.02074261f, 0.19543282f, 0.150789855f})
        y = fma(y, t, floats(c));
    const Floats e = exp2_of(z * z * floats(-1.442695041f));
    const Floats tail = y * t * e;  // the tail beyond |x|
    return {choose(at_least(x, floats(0.0f)), one - tail, tail), e};
}

inline Floats gelu(Floats x) { return x * normal(x).share; }

// The logistic function of 2 sqrt(2 / pi) (x + 0.044715 x^3).
inline Floats share_tanh(Floats x) {
    const Floats cube = x * x * x;
    const Floats z = fma(cube, floats(0.044715f), x) * floats(2.3022082f);  // 2 sqrt(2 / pi) log2(e)
    const Floats one = floats(1.0f);
    const Floats e = exp2_of(floats(0.0f) - absolute(z));
    const Floats share = one / (one + e);
    return choose(at_least(x, floats(0.0f)), share, share * e);
}

// GELU by tanh: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
inline Floats gelu_tanh(Floats x) { return x * share_tanh(x); }

// The activation with this number in ACTIVATION_NUMBERS of operators.py.
inline Floats activate(Floats x, int activation) {
    switch (activation) {
        case 1: return gelu(x);
        case 2: return gelu_tanh(x);
        case 3: return maximum(floats(0.0f), x);  // returns NaN if x is NaN
        default: return x;
    }
}

// An activation of x, and its derivative.
struct Activated {
    Floats y, slope;
};
inline Activated activate_with_slope(Floats x, int activation) {
    const Floats one = floats(1.0f);
    if (activation == 1) {
        const Normal n = normal(x);
        const Floats density = n.e * floats(0.39894228f);  // 1 / sqrt(2 pi)
        return {x * n.share, fma(x, density, n.share)};
    }
    if (activation == 2) {
        const Floats share = share_tanh(x), y = x * share;
        const Floats rise = fma(x * x, floats(0.134145f), one) * floats(1.5957691f);  // derivative of `share`'s argument
        return {y, fma(y * (one - share), rise, share)};
    }
    if (activation == 3) {
        return {activate(x, activation), keep(not_at_most(x, floats(0.0f)), one)};  // NaN for NaN
    }
    return {x, one};
}

// One thread sums a LayerNorm's gradients of weight and bias over this many rows, so the order is always the same.
constexpr int NORM_BLOCK = 64;

// The mean of a row is mean + rest, where rest is the rounding error of mean.
struct Moments {
    Floats mean, rest;
    float rstd;
};

// The moments of one row; z(i) returns a register of elements from i on, in float32. In a row of nearly equal elements
// the rounding error of the mean could exceed the deviations, so the mean of the deviations is subtracted too.
template <class Z>
inline Moments moments_of_row(const Z& z, int width, float eps) {
    Floats sum = floats(0.0f);
    for (int i = 0; i < width; i += WIDTH) sum += z(i);
    const Floats mean = floats(sum_of(sum) / width);
    Floats deviations = floats(0.0f), squares = floats(0.0f);
    for (int i = 0; i < width; i += WIDTH) {
        const Floats centred = z(i) - mean;
        deviations += centred;
        squares = fma(centred, centred, squares);
    }
    const float left = sum_of(deviations) / width;
    const Floats rest = floats(left);
    float variance = sum_of(squares) / width;
    if (left * left > MEAN_MATTERS * variance) {
        squares = floats(0.0f);
        for (int i = 0; i < width; i += WIDTH) {
            const Floats centred = z(i) - mean - rest;
            squares = fma(centred, centred, squares);
        }
        variance = sum_of(squares) / width;
    }
    return {mean, rest, 1.0f / std::sqrt(variance + eps)};
}

// y = (z - mean) / sqrt(var + eps) * weight + bias for one row.
template <class T, class Z>
inline void layer_norm_of_row(
    const Z& z, const typename T::Element* weight, const typename T::Element* bias, typename T::Element* y, int width,
    float eps
) {
    const Moments m = moments_of_row(z, width, eps);
    const Floats rstd = floats(m.rstd);
    for (int i = 0; i < width; i += WIDTH) {
        const Floats centred = z(i) - m.mean - m.rest;
        const Floats scaled = centred * rstd * T::load(weight + i);
        T::store(y + i, scaled + T::load(bias + i));
    }
}

// Copies a row whose length is a multiple of 16 elements. std::copy_n is a call, which takes longer than a short row.
template <class E>
inline void copy_row(const E* from, int count, E* to) {
    for (size_t byte = 0; byte < count * sizeof(E); byte += 32) __builtin_memcpy((char*)to + byte, (const char*)from + byte, 32);
}

// Prefetches the address into the second-level cache, and into the first-level cache. In assembler, because GCC 12.2 takes a
// function that only calls __builtin_prefetch for one without effects, and removed the calls.
inline void fetch(const void* what) { asm volatile("prefetcht1 %a0" : : "p"(what)); }
inline void fetch_near(const void* what) { asm volatile("prefetcht0 %a0" : : "p"(what)); }

// Calls take(registers, column) for blocks of MOST registers of columns, and for the remaining, smaller block.
template <int MOST, class Take>
inline void over_registers(int columns, const Take& take) {
    const int in_blocks = columns / (MOST * WIDTH) * (MOST * WIDTH), left = (columns - in_blocks) / WIDTH;
    for (int column = 0; column < in_blocks; column += MOST * WIDTH)
        take(std::integral_constant<int, MOST>(), column);
    if constexpr (MOST > 3)
        if (left == 3) take(std::integral_constant<int, 3>(), in_blocks);
    if constexpr (MOST > 2)
        if (left == 2) take(std::integral_constant<int, 2>(), in_blocks);
    if (left == 1) take(std::integral_constant<int, 1>(), in_blocks);
}
static_assert(BLOCK_REGISTERS <= 4);

// Adds the products of one part of a lane, for M rows of a and N registers of b.
template <class T, int M, int N, int PART>
inline void add_products(const typename T::Element* a, int64_t a_stride, const float* b, Floats (&sum)[M][N]) {
    Floats of_b[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) of_b[j] = T::template part<PART>(load(b + j * WIDTH));
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
        const Floats of_a = T::template part<PART>(broadcast_lane(a + i * a_stride));
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = T::add_part(sum[i][j], of_a, of_b[j]);
    }
}

// sum[i][j] = row i of a [M rows, lanes] times the columns in register j of b [lanes, columns].
template <class T, int M, int N>
inline void multiply(
    const typename T::Element* a, int64_t a_stride, const float* b, int64_t b_stride, int lanes, Floats (&sum)[M][N]
) {
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = floats(0.0f);
    for (int lane = 0; lane < lanes; ++lane) {
        add_products<T, M, N, 0>(a + lane * T::PER_LANE, a_stride, b + lane * b_stride, sum);
        if constexpr (T::PARTS == 2)
            add_products<T, M, N, 1>(a + lane * T::PER_LANE, a_stride, b + lane * b_stride, sum);
    }
}

}  // namespace
