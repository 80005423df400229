// What the forward and the backward of disentangled attention share: the table of distances of one head, and its products
// with rows of queries or keys.
//
// A score looks at the row of the table for i - j, so that along a row of scores these rows follow one another: entry
// `middle` + (j - i) of `pk`, laid out by j - i, and entry `middle` + (i - j) of `pq`, laid out by i - j. A few rows of
// queries with a few more entries than there are keys make all their products at once, and each row reads its own
// scores from another start. Distances that share a row of the table are entries of their own.

#pragma once

#include "attention.h"

namespace {

constexpr int BLOCK = 16 * BLOCK_ROWS;  // rows of queries, or of keys, that are laid out at a time
constexpr int MARGIN = 32;              // empty entries on either side: tiles reach past the distances that there are
constexpr int BAND = BLOCK + 32;        // a row of products of a block

// `longest`: of how many tokens a sequence is at most.
struct Entries {
    int longest, middle, count;
    explicit Entries(int longest) : longest(longest), middle(MARGIN + longest - 1) {
        count = round_up(2 * longest - 1 + 2 * MARGIN, WIDTH);
        if (count % 1024 == 0) count += WIDTH;  // rows of columns 4 KB apart would share lines of the cache
    }
};

// The rows of one head of a table, `stride` elements apart -> the entries as rows [count, head_dim], zero past the
// distances that there are. `sign` is 1 where entries are laid out by i - j, -1 where by j - i.
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

// Products of M rows of x with N registers of entries: columns [lanes, count of entries] -> to [M, N registers].
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

// The same with `wanted` entries, and those that fill the last register.
template <class T, int M>
void band_of_rows(
    const typename T::Element* x, int64_t stride, const float* columns, int count, int lanes, int wanted, float* to,
    int64_t to_stride
) {
    over_registers<BLOCK_REGISTERS>(round_up(wanted, WIDTH), [&](auto registers, int column) {
        band_tile<T, M, registers>(x, stride, columns + column, count, lanes, to + column, to_stride);
    });
}

// Rows [rows, columns] of float32 or lanes -> [columns, rows]. What lies past them, up to a whole register, is moved too,
// but for rows of `to` past `columns`.
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

// Are they rows of a table, and sequences of at most `longest` tokens?
inline bool fit(const int32_t* lut, int longest, int rows, const int32_t* starts, int sequences, int64_t tokens) {
    if (!are_sequences(starts, sequences, tokens)) return false;
    for (int i = 0; i < sequences; ++i)
        if (starts[i + 1] - starts[i] > longest) return false;
    for (int i = 0; rows && i < 2 * longest - 1; ++i)
        if (lut[i] < 0 || lut[i] >= rows) return false;
    return true;
}

// The longest of these sequences.
inline int longest_of(const int32_t* starts, int sequences) {
    int longest = 1;
    for (int i = 0; i < sequences; ++i) longest = std::max(longest, starts[i + 1] - starts[i]);
    return longest;
}

}  // namespace
