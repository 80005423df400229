// Registers of 16 lanes of 32 bits and their operations with AVX-512, products of bfloat16 with AVX512-BF16. Operators
// use only these names, WIDTH and the sizes of a block, so another instruction set needs one more header. Floats also
// have + - * /, and Ints + * & | ^ << >>.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int WIDTH = 16;  // lanes of a register
constexpr int BLOCK_ROWS = 6, BLOCK_REGISTERS = 4;  // 32 registers: 24 sums, 4 right, 1 left operands

using Floats = __m512;
typedef uint32_t Ints __attribute__((vector_size(64)));
using Mask = __mmask16;

inline Floats floats(float x) { return _mm512_set1_ps(x); }
inline Ints ints(uint32_t x) { return (Ints)_mm512_set1_epi32((int)x); }
inline Ints lane_numbers() { return Ints{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
inline Floats as_floats(Ints x) { return _mm512_castsi512_ps((__m512i)x); }
inline Ints as_ints(Floats x) { return (Ints)_mm512_castps_si512(x); }

inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline Ints load_ints(const void* from) { return (Ints)_mm512_loadu_si512(from); }
inline void store_ints(void* to, Ints x) { _mm512_storeu_si512(to, (__m512i)x); }
// Loads the lanes of the mask; the others are zero, and their memory is not read.
inline Ints load_ints(const void* from, Mask mask) { return (Ints)_mm512_maskz_loadu_epi32(mask, from); }
// Stores the low byte of each lane.
inline void store_bytes(uint8_t* to, Ints x) { _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x)); }

// Stores the lanes of four registers as bytes, each limited to 0 to 255.
inline void store_bytes(uint8_t* to, const Ints (&x)[4]) {
    const __m512i low = _mm512_packus_epi32((__m512i)x[0], (__m512i)x[1]);
    const __m512i high = _mm512_packus_epi32((__m512i)x[2], (__m512i)x[3]);
    // packing keeps each quarter of a register apart
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
}

// a b + c, a b - c and c - a b, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fms(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b if one is NaN
inline Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // b if one is NaN
inline Floats absolute(Floats x) { return _mm512_abs_ps(x); }
inline Floats square_root(Floats x) { return _mm512_sqrt_ps(x); }
// x - floor(x), zero for an infinite x.
inline Floats fraction(Floats x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline Ints to_ints(Floats x) { return (Ints)_mm512_cvtps_epi32(x); }  // rounded to nearest
inline Floats times_power_of_2(Floats x, Floats power) { return _mm512_scalef_ps(x, power); }  // x 2^floor(power)
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline float maximum_of(Floats x) { return _mm512_reduce_max_ps(x); }
inline float minimum_of(Floats x) { return _mm512_reduce_min_ps(x); }

inline Mask first_lanes(int n) { return (Mask)((1u << n) - 1); }
inline Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }  // false if one is NaN
inline Mask at_least(Ints a, Ints b) { return _mm512_cmpge_epu32_mask((__m512i)a, (__m512i)b); }
inline Mask not_at_most(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }  // true if one is NaN
inline Mask are_equal(Ints a, Ints b) { return _mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b); }
inline Floats keep(Mask mask, Floats x) { return _mm512_maskz_mov_ps(mask, x); }  // the other lanes are zero
inline Floats choose(Mask mask, Floats x, Floats other) { return _mm512_mask_mov_ps(other, mask, x); }

// ---- bfloat16: `from` and `to` are WIDTH contiguous elements ---------------------------------------------

inline Ints widen(const uint16_t* from) {
    return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
}
inline Floats load(const uint16_t* from) { return as_floats(widen(from) << 16); }
inline void store(uint16_t* to, Floats x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }
inline Floats rounded_to_bfloat16(Floats x) {
    return as_floats((Ints)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)) << 16);
}
// Two bfloat16 in each lane: all of `first`, then all of `second`.
inline Ints to_bfloat16(Floats first, Floats second) { return (Ints)_mm512_cvtne2ps_pbh(second, first); }
// Two bfloat16 in each lane: the first of `first` and the first of `second`, and so on.
inline Ints to_pairs(Floats first, Floats second) {
    alignas(64) static const uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (Ints)_mm512_permutexvar_epi16(_mm512_load_si512(ORDER), (__m512i)to_bfloat16(first, second));
}
// sum + both products of bfloat16 in each lane of a and b.
inline Floats add_pairs(Floats sum, Floats a, Floats b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
// add_pairs in PAIR_PARTS steps: sum = add_part(sum, part_of_pairs<PART>(a), part_of_pairs<PART>(b)).
constexpr int PAIR_PARTS = 1;
template <int PART>
inline Floats part_of_pairs(Floats x) { return x; }
inline Floats add_part(Floats sum, Floats a, Floats b) { return add_pairs(sum, a, b); }

// ---- between lanes ---------------------------------------------------------------------------------------

// Transposes WIDTH rows, one in each register: each register then has one lane of all rows.
inline void transpose(Ints rows[WIDTH]) {
    __m512i r[WIDTH], t[WIDTH];
    for (int i = 0; i < WIDTH; i += 2) {
        t[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
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
        rows[i] = (Ints)_mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        rows[i + 8] = (Ints)_mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// The sums of the lanes of WIDTH registers, in one register. The registers of a caller's array stay registers only where
// the loops are unrolled early.
inline Floats sums_of_lanes(const Floats of[WIDTH]) {
    Floats t[WIDTH / 2], u[WIDTH / 4];
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH / 2; ++i)
        t[i] = _mm512_unpacklo_ps(of[2 * i], of[2 * i + 1]) + _mm512_unpackhi_ps(of[2 * i], of[2 * i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < WIDTH / 4; ++i) {
        const __m512d low = _mm512_castps_pd(t[2 * i]), high = _mm512_castps_pd(t[2 * i + 1]);
        u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)) + _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
    const auto add = [](Floats a, Floats b) {
        return _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xdd);
    };
    return add(add(u[0], u[1]), add(u[2], u[3]));
}

// WIDTH / 4 elements, repeated four times.
inline Floats load_quarter(const float* from) { return _mm512_broadcast_f32x4(_mm_loadu_ps(from)); }
inline Floats load_quarter(const uint16_t* from) {
    const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)from));
    return _mm512_broadcast_f32x4(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
}

}  // namespace
