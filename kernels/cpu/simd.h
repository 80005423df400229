// What the operators of the `*.cpp` here share: 16 lanes of 32 bits a register, one float32 or two bfloat16 each.
//
// bfloat16 goes two elements at a time (vdpbf16ps), float32 one (vfmadd), through the same code: a "lane" is 32 bits of
// a row. Threads are OpenMP's. The library is not linked with an OpenMP of its own: it finds the one that torch has
// loaded.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#include "operators.h"

namespace {

constexpr int WIDTH = 16;  // 32-bit lanes of a register
constexpr float LOG2_E = 1.4426950408889634f;
// From this share of a row's variance on, the square of what its mean was rounded by is taken out of the variance.
constexpr float MEAN_MATTERS = 1e-8f;

// What an operator returns: it is done, or nothing was computed, and `operators.py` raises why.
enum Outcome { DONE = 0, NO_MEMORY = 1, NOT_SEQUENCES = 2 };

// Are starts [sequences + 1] those of sequences that follow one another from row 0 to the last of `rows`?
inline bool are_sequences(const int32_t* starts, int sequences, int64_t rows) {
    bool fit = starts[0] == 0 && starts[sequences] == rows;
    for (int i = 0; i < sequences; ++i) fit &= starts[i] <= starts[i + 1];
    return fit;
}

struct Float32 {
    using Element = float;
    static constexpr int PER_LANE = 1;
    static __m512 multiply_add(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
    static __m512 load(const float* from) { return _mm512_loadu_ps(from); }
    static __m512 load_four(const float* from) { return _mm512_broadcast_f32x4(_mm_loadu_ps(from)); }
    static void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
};

struct BFloat16 {
    using Element = uint16_t;
    static constexpr int PER_LANE = 2;
    static __m512 multiply_add(__m512 sum, __m512 a, __m512 b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
    }
    static __m512 load(const uint16_t* from) {
        const __m256i bits = _mm256_loadu_si256((const __m256i*)from);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static __m512 load_four(const uint16_t* from) {
        const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from));
        return _mm512_broadcast_f32x4(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
    }
    static void store(uint16_t* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }
};

// 16 elements of either type in float32, and back.
inline __m512 load(const float* from) { return Float32::load(from); }
inline __m512 load(const uint16_t* from) { return BFloat16::load(from); }
inline void store(float* to, __m512 x) { Float32::store(to, x); }
inline void store(uint16_t* to, __m512 x) { BFloat16::store(to, x); }

// The halves of a register of 32 bfloat16 each, lane by lane: the first of one, the first of the other, and so on.
inline __m512i alternate(__m512i both) {
    alignas(64) static const uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both);
}

inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

inline __m512 broadcast_lane(const void* from) {
    int32_t lane;
    std::memcpy(&lane, from, sizeof lane);  // of bfloat16 a lane may lie at any even address
    return _mm512_castsi512_ps(_mm512_set1_epi32(lane));
}

// 2^x for x <= 0, to 2e-9 of itself; NaN stays NaN.
inline __m512 exp2_of_negative(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // of two operands one of which is NaN, the second
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.534579869e-4f);
    for (float c : {1.339993111e-3f, 9.618489007e-3f, 5.550328777e-2f, 0.2402264689f, 0.6931472057f, 1.0f})
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, whole);
}

// The normal distribution's share below x, and exp(-x^2 / 2). The share beyond |x| is exp(-z^2) times a polynomial in
// 1 / (1 + 0.55 z), z = |x| / sqrt(2), fitted for the least error of the share: 9e-9.
struct Normal {
    __m512 share, e;
};
inline Normal normal(__m512 x) {
    const __m512 z = _mm512_abs_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)));
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.55f), one));
    __m512 y = _mm512_set1_ps(0.053667795f);
    for (float c : {-0.259041805f, 0.37989395f, -0.02074261f, 0.19543282f, 0.150789855f})
        y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(c));
    const __m512 e = exp2_of_negative(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-1.442695041f)));
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(y, t), e);  // the share beyond |x|
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
    return {_mm512_mask_sub_ps(tail, positive, one, tail), e};
}

inline __m512 gelu(__m512 x) { return _mm512_mul_ps(x, normal(x).share); }

// The logistic function of 2 sqrt(2 / pi) (x + 0.044715 x^3).
inline __m512 share_tanh(__m512 x) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    const __m512 z = _mm512_mul_ps(
        _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x), _mm512_set1_ps(2.3022082f)  // 2 sqrt(2 / pi) log2(e)
    );
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 e = exp2_of_negative(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(z)));
    const __m512 share = _mm512_div_ps(one, _mm512_add_ps(one, e));
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
    return _mm512_mask_mul_ps(share, _knot_mask16(positive), share, e);
}

// x times that, which is 0.5 x (1 + tanh(half of its argument)).
inline __m512 gelu_tanh(__m512 x) { return _mm512_mul_ps(x, share_tanh(x)); }

// Numbered as in ACTIVATION_NUMBERS of operators.py.
inline __m512 activate(__m512 x, int activation) {
    switch (activation) {
        case 1: return gelu(x);
        case 2: return gelu_tanh(x);
        case 3: return _mm512_max_ps(_mm512_setzero_ps(), x);  // of two operands one of which is NaN, the second
        default: return x;
    }
}

// An activation of x, and its slope there.
struct Activated {
    __m512 y, slope;
};
inline Activated activate_with_slope(__m512 x, int activation) {
    const __m512 one = _mm512_set1_ps(1.0f);
    if (activation == 1) {
        const Normal n = normal(x);
        const __m512 density = _mm512_mul_ps(n.e, _mm512_set1_ps(0.39894228f));  // 1 / sqrt(2 pi)
        return {_mm512_mul_ps(x, n.share), _mm512_fmadd_ps(x, density, n.share)};
    }
    if (activation == 2) {
        const __m512 share = share_tanh(x), y = _mm512_mul_ps(x, share);
        const __m512 rise = _mm512_mul_ps(  // of the argument of `share`
            _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.134145f), one), _mm512_set1_ps(1.5957691f)
        );
        return {y, _mm512_fmadd_ps(_mm512_mul_ps(y, _mm512_sub_ps(one, share)), rise, share)};
    }
    if (activation == 3) {
        const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ);  // NaN is let through
        return {activate(x, activation), _mm512_maskz_mov_ps(positive, one)};
    }
    return {x, one};
}

// Rows whose gradients of a LayerNorm's weight and bias one thread sums, so that the order is always the same.
constexpr int NORM_BLOCK = 64;

// The mean of a row is mean + rest: `rest` is what rounding to float32 left out of `mean`.
struct Moments {
    __m512 mean, rest;
    float rstd;
};

// Moments of one row, whose z(i) gives 16 elements from i on in float32. A row whose elements are nearly equal would
// have its rounded mean for its greatest deviation, so the mean of the deviations is taken off them again.
template <class Z>
inline Moments moments_of_row(const Z& z, int width, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int i = 0; i < width; i += WIDTH) sum = _mm512_add_ps(sum, z(i));
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
    __m512 deviations = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int i = 0; i < width; i += WIDTH) {
        const __m512 centred = _mm512_sub_ps(z(i), mean);
        deviations = _mm512_add_ps(deviations, centred);
        squares = _mm512_fmadd_ps(centred, centred, squares);
    }
    const float left = _mm512_reduce_add_ps(deviations) / width;
    const __m512 rest = _mm512_set1_ps(left);
    float variance = _mm512_reduce_add_ps(squares) / width;
    if (left * left > MEAN_MATTERS * variance) {
        squares = _mm512_setzero_ps();
        for (int i = 0; i < width; i += WIDTH) {
            const __m512 centred = _mm512_sub_ps(_mm512_sub_ps(z(i), mean), rest);
            squares = _mm512_fmadd_ps(centred, centred, squares);
        }
        variance = _mm512_reduce_add_ps(squares) / width;
    }
    return {mean, rest, 1.0f / std::sqrt(variance + eps)};
}

// y = (z - mean) / sqrt(var + eps) * weight + bias of one row.
template <class T, class Z>
inline void layer_norm_of_row(
    const Z& z, const typename T::Element* weight, const typename T::Element* bias, typename T::Element* y, int width,
    float eps
) {
    const Moments m = moments_of_row(z, width, eps);
    const __m512 rstd = _mm512_set1_ps(m.rstd);
    for (int i = 0; i < width; i += WIDTH) {
        const __m512 centred = _mm512_sub_ps(_mm512_sub_ps(z(i), m.mean), m.rest);
        const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(centred, rstd), T::load(weight + i));
        T::store(y + i, _mm512_add_ps(scaled, T::load(bias + i)));
    }
}

// Lanes of 16 rows, one row a register, into one lane of all rows a register.
inline void transpose(__m512i r[WIDTH]) {
    __m512i t[WIDTH];
    for (int i = 0; i < WIDTH; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < WIDTH; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 8; ++i) {
        const int a = i / 4 * 8 + i % 4;
        t[a] = _mm512_shuffle_i32x4(r[a], r[a + 4], 0x88);
        t[a + 4] = _mm512_shuffle_i32x4(r[a], r[a + 4], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Memory of one thread, grown when needed and kept.
struct Scratch {
    char* memory = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(memory); }
    bool reserve(size_t bytes) {
        if (bytes <= size) return true;
        std::free(memory);
        size = (bytes + 63) / 64 * 64;
        memory = (char*)std::aligned_alloc(64, size);
        if (!memory) size = 0;
        return memory;
    }
};
thread_local Scratch scratch;

// sum[i][j] = row i of a [M rows, lanes], times columns 16 j to 16 j + 15 of b [lanes, columns].
template <class T, int M, int N>
inline void multiply(
    const typename T::Element* a, int64_t a_stride, const float* b, int64_t b_stride, int lanes, __m512 (&sum)[M][N]
) {
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = _mm512_setzero_ps();
    for (int lane = 0; lane < lanes; ++lane) {
        __m512 of_b[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) of_b[j] = _mm512_loadu_ps(b + lane * b_stride + j * WIDTH);
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) {
            const __m512 of_a = broadcast_lane(a + i * a_stride + lane * T::PER_LANE);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sum[i][j] = T::multiply_add(sum[i][j], of_a, of_b[j]);
        }
    }
}

}  // namespace
