// Shared by the passes of attention: laying out rows for products, dropout, softmax, and the product with v.

#pragma once

#include "simd.h"

namespace {

// Transposes rows of one head [length, head_dim] with this stride to [lanes, padded], zero past `length`.
template <class T>
void transpose_rows(const typename T::Element* x, int64_t stride, int length, int padded, int head_dim, float* to) {
    const int lanes = head_dim / T::PER_LANE;
    for (int row = 0; row < padded; row += WIDTH)
        for (int lane = 0; lane < lanes; lane += WIDTH) {
            const int n = std::min(WIDTH, lanes - lane);
            const Mask real = first_lanes(n);
            Ints r[WIDTH];
            for (int i = 0; i < WIDTH; ++i)
                r[i] = row + i < length
                    ? load_ints(x + (row + i) * stride + lane * T::PER_LANE, real)
                    : ints(0);
            transpose(r);
            for (int i = 0; i < n; ++i) store_ints(to + (lane + i) * padded + row, r[i]);
        }
}

// Pairs rows of one head [length, head_dim]: [length / 2, head_dim] lanes of two adjacent rows, zeros past the last.
inline void pair_rows(const uint16_t* x, int64_t stride, int length, int head_dim, float* to) {
    for (int row = 0; row < length; row += 2)
        for (int column = 0; column < head_dim; column += WIDTH) {
            const uint16_t* from = x + row * stride + column;
            const Ints low = widen(from);
            const Ints high = row + 1 < length
                ? widen(from + stride)
                : ints(0);
            store_ints(
                to + row / 2 * head_dim + column, low | high << 16
            );
        }
}

// Attention's window: row i sees the keys from i - left to i + right.
struct Window {
    int left, right;

    bool is_bounded() const { return std::min(left, right) < UNBOUNDED; }
    // key_less_row: keys minus the row (or the key minus rows). Unsigned numbers need only one comparison.
    Mask sees(Ints key_less_row) const { return at_least(ints(left + right), key_less_row + ints(left)); }
};

inline uint64_t mix64(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

inline uint64_t key_of(uint64_t seed, uint64_t stream, uint64_t name) {
    return mix64(mix64(seed + 0x9E3779B97F4A7C15 * (stream + 1)) ^ name);
}

inline uint64_t row_key(const Dropout& dropout, int sequence, int head, int row) {
    const uint64_t name = (uint64_t)dropout.sequence_ids[sequence] << 32 | (uint64_t)row;
    return key_of(dropout.seed, dropout.stream * 65536 + head, name);
}

// Dropout's keep mask of a register. low and high: the halves of the rows' keys.
inline Mask keep_mask(Ints low, Ints high, Ints column, uint32_t threshold) {
    Ints x = column ^ low;
    x = (x ^ x >> 16) * ints(0x21F0AAAD);
    x = (x ^ x >> 15) + high;
    x = x * ints(0xD35A2D97);
    x = x ^ x >> 15;
    return at_least(x, ints(threshold));
}

// p = exp(scale * (score - maximum)) of one row in T, zero past the keys, by a polynomial of DEGREE. `most`: the maximum
// of each lane. The backward pass computes p from *shift, the maximum times scale_log2, and from the result, 1 / sum(p).
template <class T, int DEGREE>
inline float softmax(
    const float* scores, Floats most, typename T::Element* p, int keys, Mask tail, float scale_log2, float* shift
) {
    *shift = maximum_of(most) * scale_log2;
    const Floats scale = floats(scale_log2), greatest = floats(*shift);
    Floats sum = floats(0.0f);
    int j = 0;
    for (; j < keys - WIDTH; j += WIDTH) {
        const Floats x = exp2_of<DEGREE>(fms(load(scores + j), scale, greatest));
        sum += x;
        T::store(p + j, x);
    }
    // with scale 0 the scores past the keys, minus infinity, become NaN
    const Floats last = keep(tail, exp2_of<DEGREE>(fms(load(scores + j), scale, greatest)));
    T::store(p + j, last);
    return 1.0f / sum_of(sum + last);
}

// Sets dropped elements of p [keys] to zero. first: the number of the first key; the row has the dropout key low, high.
template <class T>
inline void drop(typename T::Element* p, int keys, int first, uint64_t key, uint32_t threshold) {
    const Ints low = ints(key), high = ints(key >> 32);
    Ints column = lane_numbers() + ints(first);
    for (int j = 0; j < keys; j += WIDTH) {
        T::store(p + j, keep(keep_mask(low, high, column, threshold), T::load(p + j)));
        column += WIDTH;
    }
}

// o = p v, each row times its factor: M rows of p [M, keys], N registers of columns of v [lanes, stride].
template <class T, int M, int N>
[[gnu::noinline]] void value_tile(
    const typename T::Element* p, int keys, const float* v, int64_t stride, int lanes, const float* factor,
    typename T::Element* o, int64_t o_stride
) {
    Floats sum[M][N];
    multiply<T, M, N>(p, keys, v, stride, lanes, sum);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
            T::store(o + i * o_stride + j * WIDTH, sum[i][j] * floats(factor[i]));
}

}  // namespace
