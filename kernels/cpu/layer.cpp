// Whole encoder layers in one call, for inference. In a pass of about a millisecond, the Python code between two
// operators takes as long as an operator. No copies of weights are made. `operators.py` calls this.

#include "simd.h"
#include "team.h"

namespace {

constexpr int UP_ROWS = 1024;  // rows of the widest matrix that are computed at a time, UP_ROWS in library.py

}  // namespace

// `work` is memory for 4 [rows, width] and one [at most UP_ROWS rows, inner].
#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int encoder_layers_##name(                                                                              \
        T::Element* x, const Layer<T::Element>* layers, int count, const int32_t* starts, int sequences, int rows, \
        int width, int inner, int heads, int activation, float eps, int in_one_way, T::Element* work               \
    ) {                                                                                                            \
        if (!are_sequences(starts, sequences, rows)) return NOT_SEQUENCES;                                         \
        const int head_dim = width / heads;                                                                        \
        const int64_t size = (int64_t)rows * width;                                                                \
        T::Element *q = work, *k = q + size, *v = k + size, *o = v + size, *up = o + size, *y = q;                 \
        int failed = 0;                                                                                            \
        Team::in_one_region([&] {                                                                                  \
        for (const Layer<T::Element>* l = layers; l < layers + count && !failed; ++l) {                            \
            const Linear<T::Element> inputs[] = {l->query, l->key, l->value};                                      \
            failed |= linears_##name(x, inputs, 3, q, size, width, rows, width, width, 0, in_one_way);             \
            failed |= attention_##name(q, k, v, o, nullptr, starts, starts, sequences, rows, rows, heads, heads, head_dim, \
                                       width, head_dim, width, head_dim, width, head_dim, UNBOUNDED, UNBOUNDED,    \
                                       1 / std::sqrt((float)head_dim), nullptr);                                   \
            failed |= linear_##name(o, l->output.weight, l->output.bias, y, width, rows, width, width, 0, in_one_way); \
            add_layer_norm_##name(y, x, l->norm.weight, l->norm.bias, x, rows, width, eps);                        \
            for (int first = 0; first < rows; first += UP_ROWS) {                                                  \
                const int n = std::min(UP_ROWS, rows - first);                                                     \
                const int64_t at = (int64_t)first * width;                                                         \
                failed |= linear_##name(x + at, l->up.weight, l->up.bias, up, inner, n, inner, width, activation,  \
                                        in_one_way);                                                               \
                failed |= linear_##name(up, l->down.weight, l->down.bias, y + at, width, n, width, inner, 0, in_one_way); \
            }                                                                                                      \
            add_layer_norm_##name(y, x, l->last_norm.weight, l->last_norm.bias, x, rows, width, eps);              \
        }                                                                                                          \
        });                                                                                                        \
        return failed;                                                                                             \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
