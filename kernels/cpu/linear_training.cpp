// A linear layer for training: x [T, K], weight [N, K] without a copy, T tokens. `products.py` calls these functions.
//
//     h = x weight^T + bias      y = activation(h)                                      [T, N]
//     dx = dy weight             times activation'(h), if x is the activation of h     [T, K]
//     dweight = dy^T x  [N, K]   dbias = sums of dy over tokens  [N]
//
// Weights may be float32 when products are bfloat16 (autocast): a weight is rounded when its panel is laid out, so there
// is no rounded copy. dweight and dbias are float32 sums, not rounded.

#include <vector>

#include "panel.h"

namespace {

// Memory for data between two parallel regions of a call, owned by the calling thread.
thread_local Scratch transposed;

// x rounded to T.
template <class T>
inline Floats as_stored(Floats x) {
    if constexpr (T::PER_LANE == 1) return x;
    else return rounded_to_bfloat16(x);
}

// h may be null. Otherwise h is stored, and the activation is applied to the stored, rounded h.
template <class T, class W>
int forward(
    const typename T::Element* x, const W* weight, const W* bias, typename T::Element* y, int64_t y_stride,
    typename T::Element* h, int rows, int columns, int inner, int activation
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
            Floats z = bias ? sums + load(bias + column) : sums;
            if (h) {
                z = as_stored<T>(z);
                T::store(h + (int64_t)row * columns + column, z);
            }
            T::store(y + row * y_stride + column, activate(z, activation));
        }
    );
}

// dy [rows, count * columns] has the columns of each of `count` weights [columns, inner]. D: the type of dx. adds: dx is
// added to, not overwritten. h [rows, inner], or null without an activation; with h, a gets activation(h) unless null.
template <class T, class W, class D>
int input_gradient(
    const typename T::Element* dy, int64_t dy_stride, const void* const* weights, int count, D* dx, bool adds,
    const typename T::Element* h, typename T::Element* a, int rows, int columns, int inner, int activation
) {
    auto weight = [&](int i) { return (const W*)weights[i]; };
    return multiply_rows<T>(
        dy, dy_stride, rows, inner, count * columns / T::PER_LANE,
        [&](int column, int registers, float* panel) {
            for (int i = 0; i < count; ++i)
                lay_out<T>(
                    weight(i) + column, inner, columns, registers, panel + (int64_t)i * columns / T::PER_LANE * PANEL
                );
        },
        [](int, int, int, int) {},  // a prefetch of the next panel's weights takes 1% of a step's time
        [=](int row, int column, Floats sums) {
            const int64_t at = (int64_t)row * inner + column;
            if (h) {
                const Activated activated = activate_with_slope(T::load(h + at), activation);
                if (a) T::store(a + at, activated.y);
                sums *= activated.slope;
            }
            store(dx + at, adds ? load(dx + at) + sums : sums);
        },
        [=](int row, int column) {
            const int64_t at = (int64_t)row * inner + column;
            if (h) fetch_row(h + at);
            if (adds) fetch_row(dx + at);
        }
    );
}

constexpr int TOKEN_LANES = 512;  // lanes that are multiplied at a time; their panel stays in the second-level cache

// dy [rows, count * columns] has the columns of each of `count` weights [columns, inner]; any dweight and dbias may be
// null. x [rows, inner] in X is contiguous. A sum is computed by one thread, so its order is always the same.
// squares: null, or for each weight the sum of the squares of dweight; -1 where it is not known.
template <class T, class X>
int weight_gradient(
    const typename T::Element* dy, int64_t dy_stride, const X* x, float* const* dweights, float* const* dbiases,
    double* squares, int count, int rows, int columns, int inner
) {
    using Element = typename T::Element;
    constexpr int TOKENS = TOKEN_LANES * T::PER_LANE;  // tokens of a block
    const int most = std::min(TOKENS, round_up(rows, WIDTH * T::PER_LANE)) / T::PER_LANE;
    const int64_t stride = most + WIDTH;  // lanes; with a power of two all rows would map to the same sets of the cache
    const int all = count * columns;
    if (!transposed.reserve(sizeof(float) * all * stride)) return NO_MEMORY;
    float* of_columns = Parts(transposed).floats(all * stride);  // dy^T of a block [columns, lanes], shared by all threads
    bool failed = false;
    if (squares) std::fill_n(squares, count, rows > TOKENS ? -1.0 : 0.0);
    if (rows > TOKENS) squares = nullptr;
    for (int first = 0; first < rows; first += TOKENS) {
        const int tokens = std::min(TOKENS, rows - first), lanes = (tokens + T::PER_LANE - 1) / T::PER_LANE;
        const Element* of_dy = dy + first * dy_stride;
        const X* of_x = x + (int64_t)first * inner;
#pragma omp parallel for schedule(static)
        for (int column = 0; column < all; column += WIDTH) {
            float* dbias = dbiases[column / columns];
            if (dbias) dbias += column % columns;
            Floats total = first && dbias ? load(dbias) : floats(0.0f);
            for (int lane = 0; lane < lanes; lane += WIDTH) {
                Ints r[WIDTH];
                Floats part = floats(0.0f);
                for (int i = 0; i < WIDTH; ++i) {
                    const int token = (lane + i) * T::PER_LANE;
                    r[i] = token < tokens
                        ? lanes_of_rows<T>(of_dy + token * dy_stride + column, dy_stride, token + 1 < tokens)
                        : ints(0);
                    if constexpr (T::PER_LANE == 2) {
                        const Ints second = r[i] & ints(0xffff0000);
                        part += as_floats(r[i] << 16);
                        part += as_floats(second);
                    } else {
                        part += as_floats(r[i]);
                    }
                }
                total += part;
                transpose(r);
                for (int i = 0; i < WIDTH; ++i) store_ints(of_columns + (column + i) * stride + lane, r[i]);
            }
            if (dbias) store(dbias, total);
        }
        for (int i = 0; i < count; ) {
            // adjacent weights that all need a gradient are multiplied with the panels together
            int end = i;
            while (end < count && dweights[end]) ++end;
            if (end > i) {
                // For each weight, panel and ROWS rows: these do not depend on the number of threads, so the sum does not.
                const int panels = (inner + PANEL - 1) / PANEL, blocks = ((end - i) * columns + ROWS - 1) / ROWS;
                std::vector<double> of_blocks(squares ? (size_t)(end - i) * panels * blocks : 0);
                failed |= multiply_rows<T>(
                    (const Element*)(of_columns + (int64_t)i * columns * stride), stride * T::PER_LANE,
                    (end - i) * columns, inner, lanes,
                    [&](int column, int registers, float* panel) {
                        lay_out<T>(of_x + column, inner, tokens, registers, panel);
                    },
                    [](int, int, int, int) {},
                    [=](int row, int column, Floats sums) {
                        int of = i;
                        for (; row >= columns; row -= columns) ++of;
                        float* to = dweights[of] + (int64_t)row * inner + column;
                        store(to, first ? load(to) + sums : sums);
                    },
                    NothingAhead(),
                    [&](int row, int n, int column, int registers, const float (*sums)[PANEL]) {
                        if (!squares) return;
                        for (int j = 0; j < n; ) {
                            const int of = (row + j) / columns;
                            Floats sum = floats(0.0f);
                            for (; j < n && (row + j) / columns == of; ++j)
                                for (int r = 0; r < registers; ++r) {
                                    const Floats g = load(sums[j] + r * WIDTH);
                                    sum = fma(g, g, sum);
                                }
                            of_blocks[((size_t)of * panels + column / PANEL) * blocks + row / ROWS] = sum_of(sum);
                        }
                    }
                );
                for (size_t block = 0; block < of_blocks.size(); ++block)
                    squares[i + block / ((size_t)panels * blocks)] += of_blocks[block];
            }
            i = end + 1;
        }
    }
    return failed ? NO_MEMORY : DONE;
}

}  // namespace

// wide: the weight and its bias are float32; wide_dx, wide_x: dx or x is.
#define EXPORT_FOR(T, name)                                                                                            \
    EXPORT int linear_forward_##name(                                                                                  \
        const T::Element* x, const void* weight, const void* bias, int wide, T::Element* y, int64_t y_stride,          \
        T::Element* h, int rows, int columns, int inner, int activation                                                \
    ) {                                                                                                                \
        if (wide)                                                                                                      \
            return forward<T>(x, (const float*)weight, (const float*)bias, y, y_stride, h, rows, columns, inner,       \
                              activation);                                                                             \
        return forward<T>(x, (const T::Element*)weight, (const T::Element*)bias, y, y_stride, h, rows, columns, inner, \
                          activation);                                                                                 \
    }                                                                                                                  \
    EXPORT int linear_input_gradient_##name(                                                                           \
        const T::Element* dy, int64_t dy_stride, const void* const* weights, int count, int wide, void* dx,            \
        int wide_dx, int adds, const T::Element* h, T::Element* a, int rows, int columns, int inner, int activation    \
    ) {                                                                                                                \
        const auto of = [&](auto like_weight, auto like_dx) {                                                          \
            return input_gradient<T, decltype(like_weight)>(                                                           \
                dy, dy_stride, weights, count, (decltype(like_dx)*)dx, adds, h, a, rows, columns, inner, activation    \
            );                                                                                                         \
        };                                                                                                             \
        if (wide) return wide_dx ? of(float(), float()) : of(float(), T::Element());                                   \
        return wide_dx ? of(T::Element(), float()) : of(T::Element(), T::Element());                                   \
    }                                                                                                                  \
    EXPORT int linear_weight_gradient_##name(                                                                          \
        const T::Element* dy, int64_t dy_stride, const void* x, int wide_x, float* const* dweights,                    \
        float* const* dbiases, double* squares, int count, int rows, int columns, int inner                            \
    ) {                                                                                                                \
        const auto of = [&](const auto* narrow_or_wide) {                                                              \
            return weight_gradient<T>(                                                                                 \
                dy, dy_stride, narrow_or_wide, dweights, dbiases, squares, count, rows, columns, inner                 \
            );                                                                                                         \
        };                                                                                                             \
        return wide_x ? of((const float*)x) : of((const T::Element*)x);                                                \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
