// Products with a bias and an activation, for inference, without a copy of the weight. `operators.py` calls them.
//
// With few rows, the weight is read once and in order, and multiplied along the inner dimension; lanes are summed at the
// end. With many rows, panels of columns are transposed into the core's own cache (panel.h).

#include "panel.h"

namespace {

constexpr int ROWS_AS_THEY_LIE = 144;  // row limit up to which transposing x takes more time than it saves
constexpr int AHEAD = 16384;  // bytes of the weight that are prefetched, at least a tile
constexpr int TILES = 4;  // tiles that share a pass of bias and activation; a single one would wait for each instruction
constexpr int TILE_ROWS = 4;  // rows of x in a tile
constexpr int TILE_COLUMNS = WIDTH / 4;  // rows of the weight in a tile, whose sums fill a register
constexpr int LEAST_TILES = 8;  // tiles of columns that a thread takes at a time, at least

// y = activation(x weight^T + bias): x [rows, inner], weight [columns, inner], y [rows, columns] with row stride y_stride.
// For few rows, where reading the weight takes much of the time: it is read once, in order, and prefetched AHEAD.
template <class T>
void linear_of_few_rows(
    const typename T::Element* x, const typename T::Element* weight, const typename T::Element* bias,
    typename T::Element* y, int64_t y_stride, int rows, int columns, int inner, int activation
) {
    using Element = typename T::Element;
    constexpr int STEP = WIDTH * T::PER_LANE;
    auto lanes = [](const Element* from) { return as_floats(load_ints(from)); };
    const int ahead = std::max(AHEAD / (int)sizeof(Element), TILE_COLUMNS * inner);
    Team::share_range(columns / TILE_COLUMNS, LEAST_TILES, [&](int64_t first_tile, int64_t end_tile) {
        for (int column = (int)first_tile * TILE_COLUMNS; column < end_tile * TILE_COLUMNS; column += TILE_COLUMNS) {
            const Element* w = weight + (int64_t)column * inner;
            const Floats of_bias = bias ? load_quarter(bias + column) : floats(0.0f);
            for (int block = 0; block < rows; block += TILES * TILE_ROWS) {
                const int block_end = std::min(block + TILES * TILE_ROWS, rows);
                Floats result[TILES];
                for (int row = block; row < block_end; row += TILE_ROWS) {
                    // rows of the weight to prefetch meanwhile
                    const int first = row * TILE_COLUMNS / rows, end = std::min(row + TILE_ROWS, rows) * TILE_COLUMNS / rows;
                    const Element* of_row[TILE_ROWS];  // past the last row the same row again, which is not stored
                    for (int i = 0; i < TILE_ROWS; ++i) of_row[i] = x + (int64_t)std::min(row + i, rows - 1) * inner;
                    Floats sum[WIDTH];
#pragma GCC unroll 16
                    for (int i = 0; i < WIDTH; ++i) sum[i] = floats(0.0f);
                    for (int k = 0; k < inner; k += STEP) {
                        Floats of_column[TILE_COLUMNS];
#pragma GCC unroll 4
                        for (int j = 0; j < TILE_COLUMNS; ++j) {
                            of_column[j] = lanes(w + (int64_t)j * inner + k);
                            if (j >= first && j < end)
                                fetch(w + (int64_t)j * inner + k + ahead);
                        }
#pragma GCC unroll 4
                        for (int i = 0; i < TILE_ROWS; ++i) {
                            const Floats a = lanes(of_row[i] + k);
#pragma GCC unroll 4
                            for (int j = 0; j < TILE_COLUMNS; ++j)
                                sum[i * TILE_COLUMNS + j] = T::multiply_add(sum[i * TILE_COLUMNS + j], a, of_column[j]);
                        }
                    }
                    result[(row - block) / TILE_ROWS] = sums_of_lanes(sum) + of_bias;
                }
                for (int row = block; row < block_end; row += TILE_ROWS) {
                    const Floats of_tile = result[(row - block) / TILE_ROWS];
                    alignas(64) Element z[WIDTH];
                    T::store(z, activate(of_tile, activation));
                    for (int i = 0; i < std::min(TILE_ROWS, rows - row); ++i)
                        std::memcpy(y + (row + i) * y_stride + column, z + i * TILE_COLUMNS, sizeof(Element) * TILE_COLUMNS);
                }
            }
        }
    });
}

// The same as linear_of_few_rows; columns is a multiple of WIDTH. Returns 1 if there is no memory for a panel.
template <class T>
int linear_of_many_rows(
    const typename T::Element* x, const typename T::Element* weight, const typename T::Element* bias,
    typename T::Element* y, int64_t y_stride, int rows, int columns, int inner, int activation
) {
    return multiply_rows<T>(
        x, inner, rows, columns, inner / T::PER_LANE,
        [&](int column, int registers, float* panel) {
            lay_out_transposed<T>(weight + (int64_t)column * inner, inner, registers, panel);
        },
        [&](int column, int from, int to, int of) {
            fetch_share(weight + (int64_t)column * inner, (int64_t)sizeof *weight * PANEL * inner, from, to, of);
        },
        [=](int row, int column, Floats sums) {
            const Floats z = bias ? sums + T::load(bias + column) : sums;
            T::store(y + row * y_stride + column, activate(z, activation));
        }
    );
}

}  // namespace

// in_one_way: always use the product for many rows, so that a row's bits do not depend on the number of rows.
#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int linear_##name(                                                                                      \
        const T::Element* x, const T::Element* weight, const T::Element* bias, T::Element* y, int64_t y_stride,    \
        int rows, int columns, int inner, int activation, int in_one_way                                            \
    ) {                                                                                                            \
        if ((rows > ROWS_AS_THEY_LIE || in_one_way) && columns % WIDTH == 0)                                       \
            return linear_of_many_rows<T>(x, weight, bias, y, y_stride, rows, columns, inner, activation);          \
        linear_of_few_rows<T>(x, weight, bias, y, y_stride, rows, columns, inner, activation);                      \
        return 0;                                                                                                  \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
