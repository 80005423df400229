// What attention's forward and backward share: rows laid out for products, and dropout.

#pragma once

#include "simd.h"

namespace {

// Rows of one head [length, head_dim], `stride` elements apart -> [lanes, padded], zero past `length`.
template <class T>
void transpose_rows(const typename T::Element* x, int64_t stride, int length, int padded, int head_dim, float* to) {
    const int lanes = head_dim / T::PER_LANE;
    for (int row = 0; row < padded; row += WIDTH)
        for (int lane = 0; lane < lanes; lane += WIDTH) {
            const int n = std::min(WIDTH, lanes - lane);
            const __mmask16 real = (__mmask16)((1u << n) - 1);
            __m512i r[WIDTH];
            for (int i = 0; i < WIDTH; ++i)
                r[i] = row + i < length
                    ? _mm512_maskz_loadu_epi32(real, x + (row + i) * stride + lane * T::PER_LANE)
                    : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < n; ++i) _mm512_store_si512(to + (lane + i) * padded + row, r[i]);
        }
}

// Rows of one head [length, head_dim] -> [length / 2, head_dim] lanes of two neighbouring rows, zeros past the last.
inline void pair_rows(const uint16_t* x, int64_t stride, int length, int head_dim, float* to) {
    for (int row = 0; row < length; row += 2)
        for (int column = 0; column < head_dim; column += WIDTH) {
            const uint16_t* from = x + row * stride + column;
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
            const __m512i high = row + 1 < length
                ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + stride)))
                : _mm512_setzero_si512();
            _mm512_store_si512(
                to + row / 2 * head_dim + column, _mm512_or_si512(low, _mm512_slli_epi32(high, 16))
            );
        }
}

inline uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

inline uint64_t row_key(const Dropout& dropout, int sequence, int head, int row) {
    const uint64_t stream = dropout.stream * 65536 + head;
    const uint64_t name = (uint64_t)dropout.sequence_ids[sequence] << 32 | (uint64_t)row;
    return mix64(mix64(dropout.seed + 0x9E3779B97F4A7C15 * (stream + 1)) ^ name);
}

// Which of 16 elements stay: low and high are the halves of their rows' keys.
inline __mmask16 keep_mask(__m512i low, __m512i high, __m512i column, uint32_t threshold) {
    __m512i x = _mm512_xor_si512(column, low);
    x = _mm512_mullo_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 16)), _mm512_set1_epi32(0x21F0AAAD));
    x = _mm512_add_epi32(_mm512_xor_si512(x, _mm512_srli_epi32(x, 15)), high);
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32((int)0xD35A2D97));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
    return _mm512_cmpge_epu32_mask(x, _mm512_set1_epi32((int)threshold));
}

}  // namespace
