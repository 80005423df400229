// Products with 8-bit integer weights, and whole encoder layers of such products in one call, for inference. All else in
// a layer is computed as in layer.cpp. `int8.py` calls both.

#include "simd.h"

#if defined(__AVX512F__)

#include "int8.h"
#include "team.h"

namespace {

constexpr int MOST_ROWS = 96;  // most rows of x that are multiplied with the panels together
constexpr int LEAST_ELEMENTS = 8192;  // elements that a thread quantises at a time, at least
constexpr int BLOCK_BYTES = 576 << 10;  // most bytes of a block of rows: integers, and sums of `width` columns

// Memory for `rows` rows of q and their ranges, from the thread's scratch memory.
struct Quantised {
    uint8_t* q;
    float* ranges;
    static size_t bytes(size_t rows, int inner, int groups) {
        return whole_lines(rows * inner) + whole_lines(sizeof(float) * rows * (1 + groups));
    }
    Quantised(Parts& parts, size_t rows, int inner, int groups)
        : q((uint8_t*)parts.lines(rows * inner)),
          ranges((float*)parts.lines(sizeof(float) * rows * (1 + groups))) {}
};

// Quantises one row of x, in T, to row `to`.
template <class T>
inline void quantise(
    const typename T::Element* x, const Int8Weight& weight, const Quantised& into, int64_t to, int inner
) {
    const float* factors = weight.factors;  // The compiler would read the member again after each store.
    quantise_row(
        [=](int i) { return T::load(x + i) * load(factors + i); }, into.q + to * inner,
        into.ranges + to * (1 + inner / weight.group), inner, weight.group
    );
}

// Calls to(row, column)(i, j, y) for every 16 elements of the products that int8_multiply passes on.
template <class To>
auto by_registers(const To& to) {
    return [=](int row, int n, int column, int registers, float (*out)[ROWS][PANEL]) {
        const auto put = to(row, column);
        for (int i = 0; i < n; ++i)
            if (registers == BLOCK_REGISTERS)
#pragma GCC unroll 4
                for (int j = 0; j < BLOCK_REGISTERS; ++j) put(i, j, load(out[0][i] + j * WIDTH));
            else
                for (int j = 0; j < registers; ++j) put(i, j, load(out[0][i] + j * WIDTH));
    };
}

template <class T>
int int8_linear(
    const typename T::Element* x, const Int8Weight& weight, typename T::Element* y, int64_t y_stride, int rows,
    int columns, int inner, int activation
) {
    const int groups = inner / weight.group, panels = (columns + PANEL - 1) / PANEL;
    if (!scratch.reserve(Quantised::bytes(rows, inner, groups))) return NO_MEMORY;
    Parts parts(scratch);
    const Quantised quantised(parts, rows, inner, groups);
    Team::in_one_region([&] {
        Team::share_range(rows, LEAST_ELEMENTS / inner + 1, [&](int64_t from, int64_t end) {
            for (int64_t row = from; row < end; ++row) quantise<T>(x + row * inner, weight, quantised, row, inner);
        });
        Team::share((rows + MOST_ROWS - 1) / MOST_ROWS * panels, [&](int chunk) {
            const int first = chunk / panels * MOST_ROWS, panel = chunk % panels;
            int8_multiply(
                quantised.q + (int64_t)first * inner, quantised.ranges + (int64_t)first * (1 + groups),
                std::min(MOST_ROWS, rows - first), inner, weight, weight.sums, columns, panel, panel + 1, 1,
                Nothing(), by_registers([=](int row, int column) {
                    return [=, to = y + (first + row) * y_stride + column](int i, int j, Floats z) {
                        T::store(to + i * y_stride + j * WIDTH, activate(z, activation));
                    };
                })
            );
        });
    });
    return DONE;
}

// The row-wise parts of a layer, for a block of rows that stays in a core's own cache.
template <class T>
struct Rows {
    using Element = typename T::Element;
    int rows, width, inner, activation;
    float eps;
    Quantised narrow, wide;  // [rows, width], [rows, inner]
    float* sum;              // [rows, width]
    Element* up;             // [rows, inner], where the activation is not quantised at once

    static size_t bytes(size_t rows, int width, int inner, int groups) {
        return Quantised::bytes(rows, width, groups) + Quantised::bytes(rows, inner, groups) +
               whole_lines(rows * inner * sizeof(Element)) + rows * width * sizeof(float);
    }

    Rows(Parts parts, int rows, int width, int inner, int groups, int activation, float eps)
        : rows(rows), width(width), inner(inner), activation(activation), eps(eps), narrow(parts, rows, width, groups),
          wide(parts, rows, inner, groups), sum(parts.floats((size_t)rows * width)),
          up((Element*)parts.lines((size_t)rows * inner * sizeof(Element))) {}

    // Quantises x [rows, from], contiguous, for products with this weight.
    void read(const Element* x, const Int8Weight& weight, int from, const Quantised& into) const {
        for (int row = 0; row < rows; ++row) quantise<T>(x + (int64_t)row * from, weight, into, row, from);
    }

    template <class To, class Put>
    void multiply(
        const Quantised& x, const Int8Weight& weight, const float* of_low, int from, int columns, int together,
        const To& to, const Put& put
    ) const {
        int8_multiply(
            x.q, x.ranges, rows, from, weight, of_low, columns, 0, (columns + PANEL - 1) / PANEL, together, to, put
        );
    }
    template <class To>
    void multiply(
        const Quantised& x, const Int8Weight& weight, const float* of_low, int from, int columns, const To& to
    ) const {
        multiply(x, weight, of_low, from, columns, 1, to, by_registers(to));
    }

    // q, k, v [rows, inside]; inside: the width of all heads
    void query_key_value(
        const Element* x, const Int8Layer<Element>& layer, int inside, Element* q, Element* k, Element* v
    ) const {
        read(x, layer.query, width, narrow);  // query, key and value have the same factors
        for (const auto& [weight, y] : {std::pair{&layer.query, q}, {&layer.key, k}, {&layer.value, v}})
            multiply(narrow, *weight, weight->sums, width, inside, [y = y, inside](int row, int column) {
                return [to = y + (int64_t)row * inside + column, inside](int i, int j, Floats z) {
                    T::store(to + (int64_t)i * inside + j * WIDTH, z);
                };
            });
    }

    // x = LayerNorm(x + the product of `of` with weight). If `next` is not null, `narrow` becomes x quantised for products
    // with it.
    void add_norm(
        const Quantised& of, Element* x, const Int8Weight& weight, const float* of_low, const Linear<Element>& norm,
        int from, const Int8Weight* next
    ) const {
        multiply(of, weight, of_low, from, width, [x, sum = sum, width = width](int row, int column) {
            const int64_t at = (int64_t)row * width + column;
            return [residual = x + at, to = sum + at, width](int i, int j, Floats z) {
                const int64_t at = (int64_t)i * width + j * WIDTH;
                store(to + at, z + T::load(residual + at));
            };
        });
        for (int row = 0; row < rows; ++row) {
            float* of_row = sum + (int64_t)row * width;
            Element* y = x + (int64_t)row * width;
            const auto z = [=](int i) { return load(of_row + i); };
            if (!next) {
                layer_norm_of_row<T>(z, norm.weight, norm.bias, y, width, eps);
                continue;
            }
            const Moments m = moments_of_row(z, width, eps);
            const Floats rstd = floats(m.rstd);
            const Element *scale = norm.weight, *shift = norm.bias;
            const float* factors = next->factors;
            for (int i = 0, count = width; i < count; i += WIDTH) {
                const Floats scaled = (z(i) - m.mean - m.rest) * rstd * T::load(scale + i);
                const Floats normed = scaled + T::load(shift + i);
                T::store(y + i, normed);
                store(of_row + i, normed * load(factors + i));
            }
            quantise_row(z, narrow.q + (int64_t)row * width, narrow.ranges + row * (1 + width / next->group), width,
                         next->group);
        }
    }

    // Whether the activation can be quantised at once: the groups of `down` are a few whole panels of `up`.
    bool quantises_at_once(const Int8Layer<Element>& layer) const {
        return activation && layer.down.group % PANEL == 0 && layer.down.group <= MOST_TOGETHER * PANEL;
    }

    // wide = activation(the product of narrow with `up`), quantised for products with `down`.
    template <int ACTIVATION>
    void feed_up(const Int8Layer<Element>& layer) const {
        const int group = layer.down.group, groups = inner / group;
        for (int row = 0; row < rows; ++row) wide.ranges[row * (1 + groups)] = least_of(ACTIVATION);
        multiply(narrow, layer.up, layer.up.sums, width, inner, group / PANEL, Nothing(),
                 [&](int row, int n, int column, int, float (*out)[ROWS][PANEL]) {
            activate_and_quantise<ACTIVATION>(
                out, n, group / PANEL, layer.down.factors + column, wide.q + (int64_t)row * inner + column, inner,
                wide.ranges + row * (1 + groups) + 1 + column / group, 1 + groups
            );
        });
    }

    void after_attention(const Element* o, const Int8Layer<Element>& layer, int inside, Element* x) const {
        read(o, layer.output, inside, narrow);
        add_norm(narrow, x, layer.output, layer.output.sums, layer.norm, inside, &layer.up);
        if (quantises_at_once(layer)) {
            activation == 1 ? feed_up<1>(layer) : activation == 2 ? feed_up<2>(layer) : feed_up<3>(layer);
            return add_norm(wide, x, layer.down, layer.down.raised, layer.last_norm, inner, nullptr);
        }
        multiply(narrow, layer.up, layer.up.sums, width, inner, 1, Nothing(),
                 by_registers([up = up, inner = inner, activation = activation](int row, int column) {
            return [=, to = up + (int64_t)row * inner + column](int i, int j, Floats z) {
                T::store(to + (int64_t)i * inner + j * WIDTH, activate_for_8_bits(z, activation));
            };
        }));
        read(up, layer.down, inner, wide);
        add_norm(wide, x, layer.down, layer.down.sums, layer.last_norm, inner, nullptr);
    }
};

template <class T, auto attend>
int int8_layers(
    typename T::Element* x, const Int8Layer<typename T::Element>* layers, int count, const int32_t* starts,
    int sequences, int rows, int width, int inner, int head_dim, int activation, float eps, typename T::Element* work
) {
    using Element = typename T::Element;
    if (!are_sequences(starts, sequences, rows)) return NOT_SEQUENCES;
    const int64_t size = (int64_t)rows * width;
    Element *q = work, *k = q + size, *v = k + size, *o = v + size;
    const int threads = omp_get_max_threads();
    const auto inside = [&](int number) { return (int)layers[number].heads * head_dim; };  // at most width
    const int groups = std::max(width, inner) / WIDTH;  // an upper bound
    const int most = std::max(ROWS, BLOCK_BYTES / (width + inner + width * (int)sizeof(float)) / ROWS * ROWS);
    // The blocks differ by ROWS at most, so that all threads have the same work.
    const int64_t tiles = (rows + ROWS - 1) / ROWS;
    const int blocks = (int)std::min<int64_t>(tiles, round_up((rows + most - 1) / most, threads));
    std::atomic<bool> failed{false};
    Team::in_one_region([&] {
        for (int number = 0; number <= count && !failed; ++number) {
            Team::share(blocks, [&](int block) {
                const int first = (int)(tiles * block / blocks) * ROWS;
                const int n = std::min(rows, (int)(tiles * (block + 1) / blocks) * ROWS) - first;
                if (!scratch.reserve(Rows<T>::bytes(n, width, inner, groups))) {
                    failed = true;
                    return;
                }
                const Rows<T> of_rows(Parts(scratch), n, width, inner, groups, activation, eps);
                Element* of_x = x + (int64_t)first * width;
                if (number > 0) {
                    const int from = inside(number - 1);
                    of_rows.after_attention(o + (int64_t)first * from, layers[number - 1], from, of_x);
                }
                if (number < count) {
                    const int to = inside(number);
                    const int64_t at = (int64_t)first * to;
                    of_rows.query_key_value(of_x, layers[number], to, q + at, k + at, v + at);
                }
            });
            if (number < count && !failed) {
                const int heads = (int)layers[number].heads, token = inside(number);
                if (attend(q, k, v, o, nullptr, starts, starts, sequences, rows, rows, heads, heads, head_dim, token,
                           head_dim, token, head_dim, token, head_dim, UNBOUNDED, UNBOUNDED,
                           1 / std::sqrt((float)head_dim), nullptr))
                    failed = true;
            }
        }
    });
    return failed ? NO_MEMORY : DONE;
}

}  // namespace

#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int int8_linear_##name(                                                                                 \
        const T::Element* x, const Int8Weight* weight, T::Element* y, int64_t y_stride, int rows, int columns,     \
        int inner, int activation                                                                                  \
    ) {                                                                                                            \
        return int8_linear<T>(x, *weight, y, y_stride, rows, columns, inner, activation);                          \
    }                                                                                                              \
    EXPORT int int8_layers_##name(                                                                                 \
        T::Element* x, const Int8Layer<T::Element>* layers, int count, const int32_t* starts, int sequences,       \
        int rows, int width, int inner, int head_dim, int activation, float eps, T::Element* work                  \
    ) {                                                                                                            \
        return int8_layers<T, attention_##name>(x, layers, count, starts, sequences, rows, width, inner, head_dim, \
                                                activation, eps, work);                                            \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)

#else  // `int8.py` calls these functions only in the AVX-512 library

#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int int8_linear_##name(const T::Element*, const Int8Weight*, T::Element*, int64_t, int, int, int, int) { \
        return NO_INSTRUCTIONS;                                                                                    \
    }                                                                                                              \
    EXPORT int int8_layers_##name(                                                                                 \
        T::Element*, const Int8Layer<T::Element>*, int, const int32_t*, int, int, int, int, int, int, float,       \
        T::Element*                                                                                                \
    ) {                                                                                                            \
        return NO_INSTRUCTIONS;                                                                                    \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)

#endif
