// Shared by the backward passes of attention: products that accumulate in float32, and laying out rows for them.

#pragma once

#include "attention.h"

namespace {

constexpr int ROWS = BLOCK_ROWS;  // rows of a product that are computed at a time

// c [M, N registers] += a [M, lanes] b [lanes, N registers]
template <class T, int M, int N>
inline void add_tile(
    const typename T::Element* a, int64_t a_stride, const float* b, int64_t b_stride, int lanes, float* c,
    int64_t c_stride
) {
    Floats sum[M][N];
    multiply<T, M, N>(a, a_stride, b, b_stride, lanes, sum);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            float* to = c + i * c_stride + j * WIDTH;
            store(to, load(to) + sum[i][j]);
        }
}

template <class T, int M>
inline void add_rows(
    const typename T::Element* a, int64_t a_stride, const float* b, int64_t b_stride, int lanes, float* c,
    int64_t c_stride, int columns
) {
    over_registers<BLOCK_REGISTERS>(columns, [&](auto registers, int column) {
        add_tile<T, M, registers>(a, a_stride, b + column, b_stride, lanes, c + column, c_stride);
    });
}

// c [rows, columns] += a [rows, lanes] b [lanes, columns]; rows are even.
template <class T>
void add_product(
    const typename T::Element* a, int64_t a_stride, const float* b, int64_t b_stride, int lanes, float* c,
    int64_t c_stride, int rows, int columns
) {
    int row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        add_rows<T, ROWS>(a + row * a_stride, a_stride, b, b_stride, lanes, c + row * c_stride, c_stride, columns);
    for (; row < rows; row += 2)
        add_rows<T, 2>(a + row * a_stride, a_stride, b, b_stride, lanes, c + row * c_stride, c_stride, columns);
}

// Rounds the sums of one head [rows, head_dim] and stores them to rows with this stride.
template <class T>
void store_rows(const float* sums, int rows, int head_dim, float scale, typename T::Element* to, int64_t stride) {
    for (int row = 0; row < rows; ++row)
        for (int column = 0; column < head_dim; column += WIDTH)
            T::store(
                to + row * stride + column,
                load(sums + row * head_dim + column) * floats(scale)
            );
}

// Rows as lanes of adjacent rows; in float32 these are the rows themselves.
inline void lay_out_rows(const uint16_t* x, int64_t stride, int length, int head_dim, float* to) {
    pair_rows(x, stride, length, head_dim, to);
}
inline void lay_out_rows(const float* x, int64_t stride, int length, int head_dim, float* to) {
    for (int row = 0; row < length; ++row) copy_row(x + row * stride, head_dim, to + (int64_t)row * head_dim);
}

}  // namespace
