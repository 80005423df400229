// Whole encoder layers of few rows in one call, for inference: what happens between two operators costs as much as an
// operator, where a pass takes a millisecond. `_cpu.py` calls it.

#include "_cpu_simd.h"

#define DECLARE_FOR(T, name)                                                                                       \
    extern "C" int attention_##name(                                                                               \
        const T::Element*, const T::Element*, const T::Element*, T::Element*, float*, const int32_t*, int, int,    \
        int, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, const void*                         \
    );                                                                                                             \
    extern "C" void add_layer_norm_##name(                                                                         \
        const T::Element*, const T::Element*, const T::Element*, const T::Element*, T::Element*, int64_t, int,     \
        float                                                                                                      \
    );                                                                                                             \
    extern "C" void linear_of_few_rows_##name(                                                                     \
        const T::Element*, const T::Element*, const T::Element*, T::Element*, int, int, int, int                   \
    );

DECLARE_FOR(Float32, float32)
DECLARE_FOR(BFloat16, bfloat16)

namespace {

template <class E>
struct Linear {
    const E *weight, *bias;
};

template <class E>
struct Layer {
    Linear<E> query, key, value, output, norm, up, down, last_norm;
};

}  // namespace

#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int encoder_layers_##name(                                                                              \
        T::Element* x, const Layer<T::Element>* layers, int count, const int32_t* starts, int sequences, int rows, \
        int width, int inner, int heads, float eps                                                                 \
    ) {                                                                                                            \
        const int head_dim = width / heads;                                                                        \
        const int64_t size = (int64_t)rows * width;                                                                \
        if (!scratch.reserve(sizeof(T::Element) * (5 * size + (int64_t)rows * inner))) return 1;                   \
        T::Element *q = (T::Element*)scratch.memory, *k = q + size, *v = k + size, *o = v + size, *y = o + size,   \
                   *up = y + size;                                                                                 \
        for (const Layer<T::Element>* l = layers; l < layers + count; ++l) {                                       \
            linear_of_few_rows_##name(x, l->query.weight, l->query.bias, q, rows, width, width, 0);                \
            linear_of_few_rows_##name(x, l->key.weight, l->key.bias, k, rows, width, width, 0);                    \
            linear_of_few_rows_##name(x, l->value.weight, l->value.bias, v, rows, width, width, 0);                \
            if (attention_##name(q, k, v, o, nullptr, starts, sequences, heads, heads, head_dim, width, head_dim,  \
                                 width, head_dim, width, head_dim, 1 / std::sqrt((float)head_dim), nullptr))       \
                return 1;                                                                                          \
            linear_of_few_rows_##name(o, l->output.weight, l->output.bias, y, rows, width, width, 0);              \
            add_layer_norm_##name(y, x, l->norm.weight, l->norm.bias, x, rows, width, eps);                        \
            linear_of_few_rows_##name(x, l->up.weight, l->up.bias, up, rows, inner, width, 1);                     \
            linear_of_few_rows_##name(up, l->down.weight, l->down.bias, y, rows, width, inner, 0);                 \
            add_layer_norm_##name(y, x, l->last_norm.weight, l->last_norm.bias, x, rows, width, eps);              \
        }                                                                                                          \
        return 0;                                                                                                  \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
