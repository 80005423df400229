// Registers of 8 lanes of 32 bits and their operations with AVX2 and FMA, under the names of avx512.h. A product of
// bfloat16 pairs is two products of float32, and rounding to bfloat16 is integer arithmetic.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int WIDTH = 8;  // lanes of a register
constexpr int BLOCK_ROWS = 6, BLOCK_REGISTERS = 2;  // 16 registers: 12 sums, 2 right, 1 left operands

using Floats = __m256;
typedef uint32_t Ints __attribute__((vector_size(32)));
typedef int32_t Mask __attribute__((vector_size(32)));  // -1 in selected lanes, 0 in the others

inline Floats floats(float x) { return _mm256_set1_ps(x); }
inline Ints ints(uint32_t x) { return (Ints)_mm256_set1_epi32((int)x); }
inline Ints lane_numbers() { return Ints{0, 1, 2, 3, 4, 5, 6, 7}; }
inline Floats as_floats(Ints x) { return _mm256_castsi256_ps((__m256i)x); }
inline Ints as_ints(Floats x) { return (Ints)_mm256_castps_si256(x); }

inline Floats load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Floats x) { _mm256_storeu_ps(to, x); }
inline Ints load_ints(const void* from) { return (Ints)_mm256_loadu_si256((const __m256i*)from); }
inline void store_ints(void* to, Ints x) { _mm256_storeu_si256((__m256i*)to, (__m256i)x); }
// Loads the lanes of the mask; the others are zero, and their memory is not read.
inline Ints load_ints(const void* from, Mask mask) { return (Ints)_mm256_maskload_epi32((const int*)from, (__m256i)mask); }
// Stores the low byte of each lane.
inline void store_bytes(uint8_t* to, Ints x) {
    const __m256i low = (__m256i)(x & ints(255));
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storel_epi64((__m128i*)to, _mm_packus_epi16(words, words));
}

// a b + c, a b - c and c - a b, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fms(Floats a, Floats b, Floats c) { return _mm256_fmsub_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
inline Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }  // b if one is NaN
inline Floats square_root(Floats x) { return _mm256_sqrt_ps(x); }
inline Floats absolute(Floats x) { return _mm256_andnot_ps(floats(-0.0f), x); }
inline Floats floor(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
// x - floor(x); zero for x below -200, where 2^x is zero.
inline Floats fraction(Floats x) {
    x = maximum(floats(-200.0f), x);
    return x - floor(x);
}
inline Ints to_ints(Floats x) { return (Ints)_mm256_cvtps_epi32(x); }  // rounded to nearest
// x 2^floor(power) for powers below 128, zero for powers below -126; NaN if x or power is.
inline Floats times_power_of_2(Floats x, Floats power) {
    return x * as_floats((to_ints(floor(maximum(floats(-127.0f), power))) + 127) << 23);
}
inline float sum_of(Floats x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline float maximum_of(Floats x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

inline Mask first_lanes(int n) { return (Mask)lane_numbers() < (Mask)ints(n); }
inline Mask at_least(Floats a, Floats b) { return (Mask)_mm256_cmp_ps(a, b, _CMP_GE_OQ); }  // false if one is NaN
inline Mask at_least(Ints a, Ints b) { return a >= b; }
inline Mask not_at_most(Floats a, Floats b) { return (Mask)_mm256_cmp_ps(a, b, _CMP_NLE_UQ); }  // true if one is NaN
inline Mask are_equal(Ints a, Ints b) { return a == b; }
inline Floats keep(Mask mask, Floats x) { return as_floats((Ints)mask & as_ints(x)); }  // the other lanes are zero
inline Floats choose(Mask mask, Floats x, Floats other) { return _mm256_blendv_ps(other, x, (__m256)mask); }

// ---- bfloat16: `from` and `to` are WIDTH contiguous elements ---------------------------------------------

inline Ints widen(const uint16_t* from) { return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)); }
inline Floats load(const uint16_t* from) { return as_floats(widen(from) << 16); }
// Rounds to nearest, ties to even; NaN stays NaN. The low half of each lane is zero.
inline Floats rounded_to_bfloat16(Floats x) {
    const Ints bits = as_ints(x), rounded = bits + ((bits >> 16 & ints(1)) + ints(0x7fff));
    const Floats quiet = as_floats(bits | ints(0x400000));
    const Mask is_nan = (Mask)_mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return as_floats(as_ints(choose(is_nan, quiet, as_floats(rounded))) & ints(0xffff0000));
}
inline void store(uint16_t* to, Floats x) {
    const __m256i high = (__m256i)(as_ints(rounded_to_bfloat16(x)) >> 16);
    _mm_storeu_si128((__m128i*)to, _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}
// Two bfloat16 in each lane: all of `first`, then all of `second`.
inline Ints to_bfloat16(Floats first, Floats second) {
    const Ints a = as_ints(rounded_to_bfloat16(first)) >> 16, b = as_ints(rounded_to_bfloat16(second)) >> 16;
    return (Ints)_mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)a, (__m256i)b), 0xd8);
}
// Two bfloat16 in each lane: the first of `first` and the first of `second`, and so on.
inline Ints to_pairs(Floats first, Floats second) {
    return as_ints(rounded_to_bfloat16(first)) >> 16 | as_ints(rounded_to_bfloat16(second));
}
// The low or the high bfloat16 of each lane, as float32.
template <int PART>
inline Floats part_of_pairs(Floats x) {
    return as_floats(PART == 0 ? as_ints(x) << 16 : as_ints(x) & ints(0xffff0000));
}
// sum + both products of bfloat16 in each lane of a and b.
inline Floats add_pairs(Floats sum, Floats a, Floats b) {
    sum = fma(part_of_pairs<0>(a), part_of_pairs<0>(b), sum);
    return fma(part_of_pairs<1>(a), part_of_pairs<1>(b), sum);
}
// add_pairs in PAIR_PARTS steps, sum = add_part(sum, part_of_pairs<PART>(a), part_of_pairs<PART>(b)), so that only one
// part of an operand is in a register at a time.
constexpr int PAIR_PARTS = 2;
inline Floats add_part(Floats sum, Floats a, Floats b) { return fma(a, b, sum); }

// ---- between lanes ---------------------------------------------------------------------------------------

// Transposes WIDTH rows, one in each register: each register then has one lane of all rows.
inline void transpose(Ints rows[WIDTH]) {
    __m256i r[WIDTH], t[WIDTH];
    for (int i = 0; i < WIDTH; i += 2) {
        t[i] = _mm256_unpacklo_epi32((__m256i)rows[i], (__m256i)rows[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32((__m256i)rows[i], (__m256i)rows[i + 1]);
    }
    for (int i = 0; i < WIDTH; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm256_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm256_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i) {
        rows[i] = (Ints)_mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
        rows[i + 4] = (Ints)_mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
}

// The sums of the lanes of WIDTH registers, in one register.
inline Floats sums_of_lanes(const Floats of[WIDTH]) {
    const Floats first = _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
    const Floats second = _mm256_hadd_ps(_mm256_hadd_ps(of[4], of[5]), _mm256_hadd_ps(of[6], of[7]));
    return _mm256_permute2f128_ps(first, second, 0x20) + _mm256_permute2f128_ps(first, second, 0x31);
}

// WIDTH / 4 elements, repeated four times.
inline Floats load_quarter(const float* from) { return _mm256_castpd_ps(_mm256_broadcast_sd((const double*)from)); }
inline Floats load_quarter(const uint16_t* from) {
    uint32_t two;
    std::memcpy(&two, from, sizeof two);
    const Floats both = as_floats(ints(two));
    return _mm256_blend_ps(part_of_pairs<0>(both), part_of_pairs<1>(both), 0xaa);
}

}  // namespace
