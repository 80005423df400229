// Shared by the forward and backward pass of disentangled attention: the table of distances of one head, and its
// products with rows of queries or keys.
//
// A score uses the row of the table for i - j, so along a row of scores successive rows are used. The table is laid out
// as entries, one for each distance, even if several distances have the same row of the table: `pk` by j - i, with entry
// `middle` + (j - i), and `pq` by i - j, with entry `middle` + (i - j). One product of a few rows of queries with a few
// more entries than keys has all scores of these rows; each row reads them from a start of its own.

#pragma once

#include "attention.h"

namespace {

constexpr int BLOCK = 16 * BLOCK_ROWS;  // rows of queries, or of keys, that are laid out at a time
constexpr int MARGIN = 32;              // empty entries on both sides, because tiles extend past the existing distances
constexpr int BAND = BLOCK + 32;        // length of a row of products of a block

// longest: the most tokens of a sequence.
struct Entries {
    int longest, middle, count;
    explicit Entries(int longest) : longest(longest), middle(MARGIN + longest - 1) {
        count = round_up(2 * longest - 1 + 2 * MARGIN, WIDTH);
        if (count % 1024 == 0) count += WIDTH;  // rows of columns 4 KB apart would share lines of the cache
    }
};

// Lays out the rows of one head of a table, with this stride, as entries [count, head_dim], zero past the existing
// distances. sign: 1 for entries by i - j, -1 for entries by j - i.
template <class T>
void lay_out_entries(
    const typename T::Element* table, int64_t stride, const int32_t* lut, const Entries& entries, int sign,
    int head_dim, typename T::Element* to
) {
    for (int entry = 0; entry < entries.count; ++entry) {
        const int distance = sign * (entry - entries.middle);
        typename T::Element* row = to + (int64_t)entry * head_dim;
        if (distance <= -entries.longest || distance >= entries.longest)
            std::fill_n(row, head_dim, typename T::Element(0));
        else
            std::copy_n(table + lut[entries.longest - 1 + distance] * stride, head_dim, row);
    }
}

// to [M, N registers] = M rows of x times N registers of entries; columns [lanes, number of entries].
template <class T, int M, int N>
inline void band_tile(
    const typename T::Element* x, int64_t stride, const float* columns, int count, int lanes, float* to,
    int64_t to_stride
) {
    Floats sum[M][N];
    multiply<T, M, N>(x, stride, columns, count, lanes, sum);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) store(to + i * to_stride + j * WIDTH, sum[i][j]);
}

// The products with `wanted` entries, and with those that fill the last register.
template <class T, int M>
void band_of_rows(
    const typename T::Element* x, int64_t stride, const float* columns, int count, int lanes, int wanted, float* to,
    int64_t to_stride
) {
    over_registers<BLOCK_REGISTERS>(round_up(wanted, WIDTH), [&](auto registers, int column) {
        band_tile<T, M, registers>(x, stride, columns + column, count, lanes, to + column, to_stride);
    });
}

// Transposes [rows, columns] of float32 or lanes to [columns, rows]. Elements past the last row, up to a whole register,
// are copied too; rows of `to` past `columns` are not written.
inline void transpose_block(const float* x, int64_t stride, int rows, int columns, float* to, int64_t to_stride) {
    for (int row = 0; row < rows; row += WIDTH)
        for (int column = 0; column < columns; column += WIDTH) {
            Ints r[WIDTH];
            for (int i = 0; i < WIDTH; ++i) r[i] = load_ints(x + (row + i) * stride + column);
            transpose(r);
            for (int i = 0; i < std::min(WIDTH, columns - column); ++i)
                store_ints(to + (column + i) * to_stride + row, r[i]);
        }
}

// Whether lut has only rows of the table, and starts describe sequences of at most `longest` tokens.
inline bool fit(const int32_t* lut, int longest, int rows, const int32_t* starts, int sequences, int64_t tokens) {
    if (!are_sequences(starts, sequences, tokens)) return false;
    for (int i = 0; i < sequences; ++i)
        if (starts[i + 1] - starts[i] > longest) return false;
    for (int i = 0; rows && i < 2 * longest - 1; ++i)
        if (lut[i] < 0 || lut[i] >= rows) return false;
    return true;
}

// The length of the longest sequence.
inline int longest_of(const int32_t* starts, int sequences) {
    int longest = 1;
    for (int i = 0; i < sequences; ++i) longest = std::max(longest, starts[i + 1] - starts[i]);
    return longest;
}

}  // namespace
