// Products with a bias and an activation, for inference, without a copy of the weight. `operators.py` calls them.
//
// With few rows, the weight is read once and in order, and multiplied along the inner dimension; lanes are summed at the
// end. With groups of about WIDTH rows, x is transposed, so that a lane is a row, and is multiplied with one element of the
// weight at a time. With many rows, panels of columns are transposed into the core's own cache (panel.h).

#include "panel.h"

namespace {

// Rows of the products for few rows and for groups of rows.
constexpr int MOST_FEW_ROWS = 64, MOST_GROUPED_ROWS = 96;
constexpr int LONG_LANES = 2048;  // lanes of a row of the weight from which on groups prefetch nothing
constexpr int TILE_ROWS = 4;  // rows of x in a tile
constexpr int TILE_COLUMNS = WIDTH / 4;  // rows of the weight in a tile, whose sums fill a register
constexpr int LEAST_TILES = 4, LEAST_GROUP_TILES = 2;  // tiles of columns that a thread takes at a time, at least
constexpr int BLOCK_TILES = 32 / TILE_COLUMNS;  // tiles of columns that are multiplied with one part of x
constexpr int AHEAD_BYTES = 12288;  // of the weight that are prefetched into the first cache

// Bytes of a part of a row. The same part of all rows of x, and what is prefetched, fit into the first cache.
inline int bytes_of_part(int rows) {
    if (rows <= 8 || WIDTH == 8) return 3072;
    return rows <= 48 ? std::max(16384 / rows, 1024) : 1536;
}

// The sums of a tile over `width` elements: as many lanes for a row of x [TILE_ROWS, width] as there are rows of the weight.
// Meanwhile COUNT rows of the weight are prefetched.
template <class T, int COUNT>
inline Floats tile_of_few_rows(
    const typename T::Element* x, const typename T::Element* weight, int64_t inner, int64_t width,
    const typename T::Element* ahead
) {
    auto lanes = [](const typename T::Element* from) { return as_floats(load_ints(from)); };
    Floats sum[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) sum[i] = floats(0.0f);
    for (int64_t k = 0; k < width; k += WIDTH * T::PER_LANE) {
        Floats of_column[TILE_COLUMNS];
#pragma GCC unroll 4
        for (int j = 0; j < TILE_COLUMNS; ++j) of_column[j] = lanes(weight + j * inner + k);
#pragma GCC unroll 4
        for (int j = 0; j < COUNT; ++j) fetch_near(ahead + j * inner + k);
#pragma GCC unroll 4
        for (int i = 0; i < TILE_ROWS; ++i) {
            const Floats a = lanes(x + i * width + k);
#pragma GCC unroll 4
            for (int j = 0; j < TILE_COLUMNS; ++j)
                sum[i * TILE_COLUMNS + j] = T::multiply_add(sum[i * TILE_COLUMNS + j], a, of_column[j]);
        }
    }
    return sums_of_lanes(sum);
}

// Tiles for all rows of a part of x [TILE_ROWS tiles, width], added to `sums` unless the part is the first one. The
// prefetches of the weight's rows `ahead` are spread over the tiles: a tile has the rows up to its number in `shares`.
template <class T>
[[gnu::noinline]] void tiles_of_few_rows(
    const typename T::Element* x, int tiles, const typename T::Element* weight, int64_t inner, int64_t width,
    const typename T::Element* ahead, const int* shares, bool is_first, Floats* sums
) {
    for (int tile = 0, first = 0; tile < tiles; first = shares[tile], ++tile, x += TILE_ROWS * width) {
        const typename T::Element* from = ahead + first * inner;
        const int count = shares[tile] - first;
        const Floats sum = count == 0 ? tile_of_few_rows<T, 0>(x, weight, inner, width, from)
            : count == 1 ? tile_of_few_rows<T, 1>(x, weight, inner, width, from)
            : count == 2 ? tile_of_few_rows<T, 2>(x, weight, inner, width, from)
                         : tile_of_few_rows<T, 4>(x, weight, inner, width, from);
        sums[tile] = is_first ? sum : sums[tile] + sum;
    }
}

// Products of one x with `count` weights, whose results are y_step elements apart.
template <class E>
struct Products {
    const Linear<E>* of;
    int count;
    E* y;
    int64_t y_step;
};

// y = activation(x weight^T + bias): x [rows, inner], weight [columns, inner], y [rows, columns] with row stride y_stride.
// For few rows, where reading the weight takes much of the time: it is read once. The processor drops prefetches when too
// many are under way, so they are spread evenly over the multiplications. Long rows are multiplied in parts. Each thread
// copies x, so that a part is contiguous: rows that are a multiple of 4 KB apart would share a place in the cache. Returns
// 1 if there is no memory for that.
template <class T>
int linear_of_few_rows(
    const typename T::Element* x, Products<typename T::Element> products, int64_t y_stride, int rows, int columns,
    int inner, int activation
) {
    using Element = typename T::Element;
    constexpr int SIZE = sizeof(Element);
    const int parts = std::max(1, (inner * SIZE + bytes_of_part(rows) / 2) / bytes_of_part(rows));
    const int part = round_up((inner + parts - 1) / parts, WIDTH * T::PER_LANE);
    const int ahead = std::max(1, AHEAD_BYTES / (TILE_COLUMNS * part * SIZE));  // tiles
    const int row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, filled = row_tiles * TILE_ROWS;
    int shares[MOST_FEW_ROWS / TILE_ROWS];
    for (int i = 0; i < row_tiles; ++i) shares[i] = (i + 1) * TILE_COLUMNS / row_tiles;
    static std::atomic<uint64_t> calls{0};
    const uint64_t call = ++calls;
    std::atomic<bool> failed{false};
    const int64_t of_weight = columns / TILE_COLUMNS, all_tiles = of_weight * products.count;
    Team::share_range(all_tiles, LEAST_TILES, [&](int64_t first_tile, int64_t end_tile) {
        thread_local uint64_t copied_call = 0;
        if (!scratch.reserve(sizeof(Element) * filled * inner)) {
            failed = true;
            return;
        }
        Element* copy = (Element*)Parts(scratch).lines(sizeof(Element) * filled * inner);
        if (call != copied_call)
            for (int from = 0; from < inner; from += part) {
                const int width = std::min(part, inner - from);
                for (int row = 0; row < filled; ++row)  // past the last row the same row again, which is not stored
                    std::memcpy(
                        copy + (int64_t)from * filled + row * width,
                        x + (int64_t)std::min(row, rows - 1) * inner + from, SIZE * width
                    );
            }
        copied_call = call;
        for (int64_t block = first_tile, tiles; block < end_tile; block += tiles) {
            const int64_t number = block / of_weight, in_weight = block % of_weight, of_tile = (int64_t)TILE_COLUMNS * inner;
            tiles = std::min<int64_t>(BLOCK_TILES, std::min(end_tile - block, of_weight - in_weight));
            const Linear<Element> product = products.of[number];
            const Element* weight = product.weight + in_weight * of_tile;
            const bool is_last = in_weight + tiles == of_weight && number + 1 < products.count;
            const Element* next_block = is_last ? products.of[number + 1].weight : weight + tiles * of_tile;
            Floats sums[BLOCK_TILES * MOST_FEW_ROWS / TILE_ROWS];
            // what is prefetched: one tile after another, for each part of the rows
            const Element* next = weight;
            int64_t next_tile = 0, next_from = 0;
            const auto advance = [&] {
                if (++next_tile < tiles) return;
                next_tile = 0, next_from += part;
                if (next_from >= inner) next_from = 0, next = next_block;
            };
            for (int i = 0; i < ahead; ++i) advance();
            for (int from = 0; from < inner; from += part)
                for (int tile = 0; tile < tiles; ++tile, advance())
                    tiles_of_few_rows<T>(
                        copy + (int64_t)from * filled, row_tiles, weight + tile * of_tile + from, inner,
                        std::min(part, inner - from), next + next_tile * of_tile + next_from, shares, from == 0,
                        sums + tile * row_tiles
                    );
            for (int tile = 0; tile < tiles; ++tile) {
                const int64_t column = (in_weight + tile) * TILE_COLUMNS;
                const Floats of_bias = product.bias ? load_quarter(product.bias + column) : floats(0.0f);
                Element* y = products.y + number * products.y_step + column;
                for (int row = 0; row < rows; row += TILE_ROWS) {
                    alignas(64) Element z[WIDTH];
                    T::store(z, activate(sums[tile * row_tiles + row / TILE_ROWS] + of_bias, activation));
                    for (int i = 0; i < std::min(TILE_ROWS, rows - row); ++i)
                        std::memcpy(y + (row + i) * y_stride, z + i * TILE_COLUMNS, SIZE * TILE_COLUMNS);
                }
            }
        }
    });
    return failed;
}

// The least rows, and the least rows of the last group, with which linear_of_row_groups is faster than linear_of_few_rows.
template <class T>
constexpr int LEAST_GROUPED_ROWS = T::PER_LANE == 1 ? WIDTH + 1 : 9;
constexpr int LEAST_OF_GROUP = WIDTH - 3;

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

// The same as linear_of_few_rows; columns is a multiple of WIDTH. Each thread transposes x for itself.
template <class T>
int linear_of_row_groups(
    const typename T::Element* x, Products<typename T::Element> products, int64_t y_stride, int rows, int columns,
    int inner, int activation
) {
    const int lanes = inner / T::PER_LANE, groups = (rows + WIDTH - 1) / WIDTH;
    const int64_t of_group = (int64_t)lanes * WIDTH;
    static std::atomic<uint64_t> calls{0};
    const uint64_t call = ++calls;
    std::atomic<bool> failed{false};
    const int64_t of_weight = columns / WIDTH;
    Team::share_range(of_weight * products.count, LEAST_GROUP_TILES, [&](int64_t first_tile, int64_t end_tile) {
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
        for (int64_t tile = first_tile; tile < end_tile; ++tile) {
            const Linear<typename T::Element> product = products.of[tile / of_weight];
            const int64_t column = tile % of_weight * WIDTH;
            const Floats of_bias = product.bias ? T::load(product.bias + column) : floats(0.0f);
            auto* y = products.y + tile / of_weight * products.y_step + column;
            for (int group = 0; group < groups; ++group) {
                alignas(64) float sums[WIDTH][WIDTH];
                tile_of_group<T>(
                    product.weight + column * inner, inner, transposed + group * of_group, lanes, group * WIDTH / groups,
                    (group + 1) * WIDTH / groups, sums
                );
                Ints r[WIDTH];
                for (int j = 0; j < WIDTH; ++j) r[j] = load_ints(sums[j]);
                transpose(r);
                for (int i = 0; i < WIDTH; ++i) store_ints(sums[i], r[i]);
                for (int i = 0; i < std::min(WIDTH, rows - group * WIDTH); ++i)
                    T::store(
                        y + (group * WIDTH + i) * y_stride, activate(load(sums[i]) + of_bias, activation)
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
int linears(
    const typename T::Element* x, Products<typename T::Element> products, int64_t y_stride, int rows, int columns,
    int inner, int activation, bool in_one_way
) {
    int failed = 0;
    if (columns % WIDTH == 0) {
        const bool fill_groups = rows >= LEAST_GROUPED_ROWS<T> && rows <= MOST_GROUPED_ROWS
            && (rows - 1) % WIDTH + 1 >= LEAST_OF_GROUP;
        if (in_one_way || (rows > MOST_FEW_ROWS && !fill_groups)) {
            for (int i = 0; i < products.count; ++i)
                failed |= linear_of_many_rows<T>(
                    x, products.of[i].weight, products.of[i].bias, products.y + i * products.y_step, y_stride, rows,
                    columns, inner, activation
                );
            return failed;
        }
        if (fill_groups) return linear_of_row_groups<T>(x, products, y_stride, rows, columns, inner, activation);
    }
    for (int first = 0; first < rows; first += MOST_FEW_ROWS) {
        failed |= linear_of_few_rows<T>(
            x + (int64_t)first * inner, products, y_stride, std::min(MOST_FEW_ROWS, rows - first), columns, inner, activation
        );
        products.y += MOST_FEW_ROWS * y_stride;
    }
    return failed;
}

}  // namespace

#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int linear_##name(                                                                                      \
        const T::Element* x, const T::Element* weight, const T::Element* bias, T::Element* y, int64_t y_stride,    \
        int rows, int columns, int inner, int activation, int in_one_way                                            \
    ) {                                                                                                            \
        const Linear<T::Element> product = {weight, bias};                                                         \
        return linears<T>(x, {&product, 1, y, 0}, y_stride, rows, columns, inner, activation, in_one_way);         \
    }                                                                                                              \
    EXPORT int linears_##name(                                                                                     \
        const T::Element* x, const Linear<T::Element>* products, int count, T::Element* y, int64_t y_step,         \
        int64_t y_stride, int rows, int columns, int inner, int activation, int in_one_way                          \
    ) {                                                                                                            \
        return linears<T>(x, {products, count, y, y_step}, y_stride, rows, columns, inner, activation, in_one_way);\
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
