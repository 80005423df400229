// Products with a bias and an activation, for inference, without a copy of the weight. `operators.py` calls them.
//
// With few rows, the weight is read once and in order, and multiplied along the inner dimension; lanes are summed at the
// end. With groups of about WIDTH rows, x is transposed, so that a lane is a row, and is multiplied with one element of the
// weight at a time. With many rows, panels of columns are transposed into the core's own cache (panel.h).

#include "panel.h"

namespace {

// Rows of the products for few rows and for groups of rows.
constexpr int MOST_FEW_ROWS = 64, LEAST_GROUPED_ROWS = 9, MOST_GROUPED_ROWS = 96;
constexpr int LONG_LANES = 2048;  // lanes of a row of the weight from which on groups prefetch nothing
constexpr int AHEAD = 16384;  // bytes of the weight that are prefetched, at least a tile
constexpr int TILES = 4;  // tiles that share a pass of bias and activation; a single one would wait for each instruction
constexpr int TILE_ROWS = 4;  // rows of x in a tile
constexpr int TILE_COLUMNS = WIDTH / 4;  // rows of the weight in a tile, whose sums fill a register
constexpr int LEAST_TILES = 8, LEAST_GROUP_TILES = 2;  // tiles of columns that a thread takes at a time, at least

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

// The least rows of the last group, of WIDTH lanes, with which linear_of_row_groups is faster than linear_of_few_rows.
template <class T>
constexpr int LEAST_OF_GROUP = T::PER_LANE == 1 ? WIDTH / 2 + 1 : WIDTH - 3;

// sums [WIDTH columns, WIDTH rows] = WIDTH rows of the weight times x [lanes, WIDTH rows]. Meanwhile the rows `first` to
// `end` of the next tile of the weight are prefetched, unless they are so long that the processor does this better. A
// separate function, so that the sums stay in registers.
template <class T>
[[gnu::noinline]] void tile_of_group(
    const typename T::Element* weight, int inner, const float* x, int lanes, int first, int end, float (*sums)[WIDTH]
) {
    // Each register of the weight is copied before its elements are used one after another: rows of the weight that are
    // a multiple of 4 KB apart share a place in the first cache and would drive each other out.
    alignas(64) float copies[2][WIDTH][WIDTH];
    const auto copy = [&](int lane) {
        const typename T::Element* from = weight + (int64_t)lane * T::PER_LANE;
#pragma GCC unroll 16
        for (int j = 0; j < WIDTH; ++j) store_ints(copies[lane / WIDTH % 2][j], load_ints(from + (int64_t)j * inner));
    };
    copy(0);
    for (int chunk = 0; chunk < lanes; chunk += CHUNK) {
        Floats sum[WIDTH];
#pragma GCC unroll 16
        for (int j = 0; j < WIDTH; ++j) sum[j] = floats(0.0f);
        const int chunk_end = std::min(chunk + CHUNK, lanes);
        for (int lane = chunk; lane < chunk_end; lane += WIDTH) {
            if (lane + WIDTH < lanes) copy(lane + WIDTH);
            if (lanes < LONG_LANES)
                for (int j = first; j < end; ++j)
                    __builtin_prefetch(weight + (int64_t)(WIDTH + j) * inner + lane * T::PER_LANE, 0, 3);
            const float (*of_weight)[WIDTH] = copies[lane / WIDTH % 2];
#pragma GCC unroll 4
            for (int i = 0; i < WIDTH; ++i) {
                const Floats of_x = load(x + (int64_t)(lane + i) * WIDTH);
#pragma GCC unroll 16
                for (int j = 0; j < WIDTH; ++j) sum[j] = T::multiply_add(sum[j], of_x, broadcast_lane(&of_weight[j][i]));
            }
        }
#pragma GCC unroll 16
        for (int j = 0; j < WIDTH; ++j) store(sums[j], chunk ? sum[j] + load(sums[j]) : sum[j]);
    }
}

// The same as linear_of_few_rows; columns is a multiple of WIDTH. Each thread transposes x for itself. Returns 1 if there
// is no memory for that.
template <class T>
int linear_of_row_groups(
    const typename T::Element* x, const typename T::Element* weight, const typename T::Element* bias,
    typename T::Element* y, int64_t y_stride, int rows, int columns, int inner, int activation
) {
    const int lanes = inner / T::PER_LANE, groups = (rows + WIDTH - 1) / WIDTH;
    const int64_t of_group = (int64_t)lanes * WIDTH;
    static std::atomic<uint64_t> calls{0};
    const uint64_t call = ++calls;
    std::atomic<bool> failed{false};
    Team::share_range(columns / WIDTH, LEAST_GROUP_TILES, [&](int64_t first_tile, int64_t end_tile) {
        thread_local uint64_t transposed_call = 0;
        if (!scratch.reserve(sizeof(float) * groups * of_group)) {
            failed = true;
            return;
        }
        float* transposed = Parts(scratch).floats(groups * of_group);
        if (call != transposed_call)
            for (int group = 0; group < groups; ++group)
                for (int lane = 0; lane < lanes; lane += WIDTH) {
                    Ints r[WIDTH];
                    for (int i = 0; i < WIDTH; ++i) {
                        const int row = group * WIDTH + i;
                        r[i] = row < rows ? load_ints(x + (int64_t)row * inner + lane * T::PER_LANE) : ints(0);
                    }
                    transpose(r);
                    for (int i = 0; i < WIDTH; ++i)
                        store_ints(transposed + group * of_group + (int64_t)(lane + i) * WIDTH, r[i]);
                }
        transposed_call = call;
        for (int64_t column = first_tile * WIDTH; column < end_tile * WIDTH; column += WIDTH) {
            const Floats of_bias = bias ? T::load(bias + column) : floats(0.0f);
            for (int group = 0; group < groups; ++group) {
                alignas(64) float sums[WIDTH][WIDTH];
                tile_of_group<T>(
                    weight + column * inner, inner, transposed + group * of_group, lanes, group * WIDTH / groups,
                    (group + 1) * WIDTH / groups, sums
                );
                Ints r[WIDTH];
                for (int j = 0; j < WIDTH; ++j) r[j] = load_ints(sums[j]);
                transpose(r);
                for (int i = 0; i < WIDTH; ++i) store_ints(sums[i], r[i]);
                for (int i = 0; i < std::min(WIDTH, rows - group * WIDTH); ++i)
                    T::store(
                        y + (group * WIDTH + i) * y_stride + column, activate(load(sums[i]) + of_bias, activation)
                    );
            }
        }
    });
    return failed;
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

// in_one_way: always use the product for many rows, so that a row's bits do not depend on the number of rows.
template <class T>
int linear(
    const typename T::Element* x, const typename T::Element* weight, const typename T::Element* bias,
    typename T::Element* y, int64_t y_stride, int rows, int columns, int inner, int activation, bool in_one_way
) {
    if (columns % WIDTH == 0) {
        const bool fill_groups = rows >= LEAST_GROUPED_ROWS && rows <= MOST_GROUPED_ROWS
            && (rows - 1) % WIDTH + 1 >= LEAST_OF_GROUP<T>;
        if (in_one_way || (rows > MOST_FEW_ROWS && !fill_groups))
            return linear_of_many_rows<T>(x, weight, bias, y, y_stride, rows, columns, inner, activation);
        if (fill_groups)
            return linear_of_row_groups<T>(x, weight, bias, y, y_stride, rows, columns, inner, activation);
    }
    linear_of_few_rows<T>(x, weight, bias, y, y_stride, rows, columns, inner, activation);
    return 0;
}

}  // namespace

#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int linear_##name(                                                                                      \
        const T::Element* x, const T::Element* weight, const T::Element* bias, T::Element* y, int64_t y_stride,    \
        int rows, int columns, int inner, int activation, int in_one_way                                            \
    ) {                                                                                                            \
        return linear<T>(x, weight, bias, y, y_stride, rows, columns, inner, activation, in_one_way);              \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
