// Declares every function of the library, for float32 and for bfloat16. The compiler checks the definitions against it,
// and when the library is built, `library.py` reads the argument types for ctypes from it.

#pragma once

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// A side of attention's window without a bound; its sum with a position does not overflow an int.
constexpr int UNBOUNDED = 1 << 29;

// Dropout with the same random bits as `_random.py`; `attention.py` fills this in.
struct Dropout {
    const int64_t* sequence_ids;  // [sequences]
    uint64_t seed, stream;
    uint32_t threshold;
    float scale;  // factor of kept elements, 1 / (1 - p)
};

template <class E>
struct Linear {
    const E *weight, *bias;
};

template <class E>
struct Layer {
    Linear<E> query, key, value, output, norm, up, down, last_norm;
};

// A weight [columns, inner] in 8-bit integers in the layout of int8.h; columns are padded to whole panels.
struct Int8Weight {
    const int8_t* panels;  // [panels, inner / 4, columns of a panel, 4]
    const float* scales;   // [panels, groups, columns of a panel]
    const float* sums;     // [columns], sums of the integers times their scales
    const float* bias;     // [columns]
    const float* factors;  // [inner], factors of x
    const float* raised;   // [columns], sums of the integers times their scales and their columns' factors
    int64_t group;         // how many adjacent elements of a row share a scale
};

template <class E>
struct Int8Layer {
    Int8Weight query, key, value, output, up, down;
    Linear<E> norm, last_norm;
    int64_t heads;  // fewer than width / head_dim if heads were pruned
};

// Sizes, lengths and dropout options of a post-norm layer in training. wide: x, y, their gradients and all parameters
// are float32, even if products are bfloat16. first_only: the output has only each sequence's first row.
// `encoder_layer.py` fills this in.
struct TrainedLayer {
    const int32_t* starts;               // [sequences + 1]
    const int64_t *sequence_ids, *row_ids;  // [sequences], [rows], for dropout; null without dropout
    uint64_t seed, probs_stream, out_stream, down_stream;
    uint32_t probs_threshold, out_threshold, down_threshold;  // 0: no dropout there
    float probs_scale, out_scale, down_scale, out_eps, down_eps, attention_scale;
    int sequences, rows, width, attended, inner, heads, activation, wide, first_only;  // attended: heads times head_dim
};

#define DECLARE(Element, name)                                                                                 \
    EXPORT int attention_##name(                                                                               \
        const Element* q, const Element* k, const Element* v, Element* o, float* softmax_stats,                \
        const int32_t* starts, const int32_t* starts_k, int sequences, int64_t tokens, int64_t tokens_k,       \
        int heads, int kv_heads, int head_dim, int64_t q_token, int64_t q_head, int64_t k_token,               \
        int64_t k_head, int64_t v_token, int64_t v_head, int left, int right, float scale,                     \
        const Dropout* dropout                                                                                 \
    );                                                                                                         \
    EXPORT int attention_backward_##name(                                                                      \
        const Element* d_o, const Element* q, const Element* k, const Element* v, const Element* o,            \
        const float* softmax_stats, Element* dq, Element* dk, Element* dv, int64_t dq_token,                   \
        int64_t dk_token, const int32_t* starts, const int32_t* starts_k, int sequences, int64_t tokens,       \
        int64_t tokens_k, int heads, int kv_heads, int head_dim, int64_t do_token, int64_t do_head,            \
        int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head,     \
        int left, int right, float scale, const Dropout* dropout                                               \
    );                                                                                                         \
    EXPORT int disentangled_attention_##name(                                                                  \
        const Element* q, const Element* k, const Element* v, const Element* pk, const Element* pq,            \
        const int32_t* lut, Element* o, float* softmax_stats, const int32_t* starts, int sequences,            \
        int64_t tokens, int heads, int head_dim, int reach, int table_rows, int64_t q_token, int64_t q_head,   \
        int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, float scale, const Dropout* dropout  \
    );                                                                                                         \
    EXPORT int disentangled_attention_backward_##name(                                                         \
        const Element* d_o, const Element* q, const Element* k, const Element* v, const Element* pk,           \
        const Element* pq, const int32_t* lut, const float* softmax_stats, Element* dq,                        \
        Element* dk, Element* dv, Element* dpk, Element* dpq, const int32_t* starts, int sequences,            \
        int64_t tokens, int heads, int head_dim, int reach, int table_rows, int64_t do_token,                  \
        int64_t do_head, int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head, int64_t v_token,    \
        int64_t v_head, float scale, const Dropout* dropout                                                    \
    );                                                                                                         \
    EXPORT void add_layer_norm_##name(                                                                         \
        const Element* x, const Element* residual, const Element* weight, const Element* bias, Element* y,     \
        int64_t rows, int width, float eps                                                                     \
    );                                                                                                         \
    EXPORT int int8_linear_##name(                                                                             \
        const Element* x, const Int8Weight* weight, Element* y, int64_t y_stride, int rows, int columns, int inner,\
        int activation                                                                                         \
    );                                                                                                         \
    EXPORT int int8_layers_##name(                                                                             \
        Element* x, const Int8Layer<Element>* layers, int count, const int32_t* starts, int sequences, int rows,\
        int width, int inner, int head_dim, int activation, float eps, Element* work                           \
    );                                                                                                         \
    EXPORT void row_keys_##name(                                                                               \
        uint64_t seed, uint64_t stream, const int64_t* names, uint64_t* keys, int64_t rows                     \
    );                                                                                                         \
    EXPORT void dropout_##name(                                                                                \
        const Element* x, const uint64_t* keys, Element* y, int64_t rows, int width, uint32_t threshold,       \
        float kept                                                                                             \
    );                                                                                                         \
    EXPORT void dropout_add_layer_norm_##name(                                                                 \
        const Element* x, const void* x_bias, const void* residual, const uint64_t* keys, const void* weight,  \
        const void* bias, void* y, int wide, int64_t rows, int width, float eps, uint32_t threshold,           \
        float scale                                                                                            \
    );                                                                                                         \
    EXPORT void add_layer_norm_backward_##name(                                                                \
        const Element* x, const void* x_bias, const void* residual, const uint64_t* keys, const void* weight,  \
        const void* dy, Element* dx, void* dresidual, float* parts, int wide, int64_t rows, int width,         \
        float eps, uint32_t threshold, float scale                                                             \
    );                                                                                                         \
    EXPORT void rms_norm_##name(                                                                               \
        const Element* x, const void* weight, int wide, Element* y, int64_t rows, int width, float eps         \
    );                                                                                                         \
    EXPORT void rms_norm_backward_##name(                                                                      \
        const Element* x, const void* weight, int wide, const Element* dy, Element* dx, float* parts,          \
        int64_t rows, int width, float eps                                                                     \
    );                                                                                                         \
    EXPORT int linear_##name(                                                                                  \
        const Element* x, const Element* weight, const Element* bias, Element* y, int64_t y_stride, int rows,  \
        int columns, int inner, int activation, int in_one_way                                                 \
    );                                                                                                         \
    EXPORT int linears_##name(                                                                                 \
        const Element* x, const Linear<Element>* products, int count, Element* y, int64_t y_step,              \
        int64_t y_stride, int rows, int columns, int inner, int activation, int in_one_way                     \
    );                                                                                                         \
    EXPORT int linear_forward_##name(                                                                          \
        const Element* x, const void* weight, const void* bias, int wide, Element* y, int64_t y_stride,        \
        Element* h, int rows, int columns, int inner, int activation                                           \
    );                                                                                                         \
    EXPORT int linear_input_gradient_##name(                                                                   \
        const Element* dy, int64_t dy_stride, const void* const* weights, int count, int wide, void* dx,       \
        int wide_dx, int adds, const Element* h, Element* a, int rows, int columns, int inner, int activation  \
    );                                                                                                         \
    EXPORT int linear_weight_gradient_##name(                                                                  \
        const Element* dy, int64_t dy_stride, const void* x, int wide_x, float* const* dweights,               \
        float* const* dbiases, double* squares, int count, int rows, int columns, int inner                    \
    );                                                                                                         \
    EXPORT void adamw_##name(                                                                                  \
        const void* const* pointers, const int64_t* sizes, const float* numbers, int count                     \
    );                                                                                                         \
    EXPORT void adamw_settle_##name(                                                                           \
        Element* p, uint8_t* late, const int64_t* ids, int64_t count, int64_t size, int64_t width,             \
        const float* kept                                                                                      \
    );                                                                                                         \
    EXPORT void sum_squares_##name(                                                                            \
        const void* const* pointers, const int64_t* sizes, int count, double* sum                              \
    );                                                                                                         \
    EXPORT void sum_logits_##name(                                                                             \
        const Element* logits, const Element* bias, const int32_t* labels, float* greatest, float* sums,       \
        float* totals, float* of_label, int first, int words, int rows                                         \
    );                                                                                                         \
    EXPORT void logit_gradients_##name(                                                                        \
        const Element* logits, const Element* bias, const int32_t* labels, const float* greatest,              \
        const float* log2_sums,                                                                                \
        const float* dloss, Element* dz, float* dbias, int first, int words, int rows, float smoothing,        \
        float a_word                                                                                           \
    );                                                                                                         \
    EXPORT int embedding_layer_norm_##name(                                                                    \
        const int64_t* ids, const int64_t* types, const int64_t* places, const Element* word,                  \
        const Element* segment, const Element* position, const Element* weight, const Element* bias,           \
        Element* y, int64_t rows, const int64_t* sizes, int width, float eps                                   \
    );                                                                                                         \
    EXPORT int embedding_training_##name(                                                                      \
        const int64_t* ids, const int64_t* types, const int64_t* places, const Element* word,                  \
        const Element* segment, const Element* position, const Element* weight, const Element* bias,           \
        const uint64_t* keys, Element* y, int64_t rows, const int64_t* sizes, int width, float eps,            \
        uint32_t threshold, float scale                                                                        \
    );                                                                                                         \
    EXPORT int embedding_backward_##name(                                                                      \
        const int64_t* ids, const int64_t* types, const int64_t* places, const Element* word,                  \
        const Element* segment, const Element* position, const Element* weight, const uint64_t* keys,          \
        const Element* dy, float* dz, float* parts, float* dword, float* dsegment, float* dposition,           \
        uint8_t* touched, int64_t rows, const int64_t* sizes, int64_t padding_idx, int width, float eps,       \
        uint32_t threshold, float scale                                                                        \
    );                                                                                                         \
    EXPORT int mean_of_sequences_##name(                                                                       \
        const Element* x, const int32_t* starts, Element* y, int sequences, int64_t rows, int width            \
    );                                                                                                         \
    EXPORT int encoder_layers_##name(                                                                          \
        Element* x, const Layer<Element>* layers, int count, const int32_t* starts, int sequences, int rows,   \
        int width, int inner, int heads, int activation, float eps, int in_one_way, Element* work              \
    );                                                                                                         \
    EXPORT void trained_layers_bytes_##name(const TrainedLayer* layers, int count, int64_t* bytes);            \
    EXPORT int trained_layers_forward_##name(                                                                  \
        const TrainedLayer* layers, int count, const void* const* weights, void* const* xs,                    \
        void* const* saved, void* work                                                                         \
    );                                                                                                         \
    EXPORT int trained_layers_backward_##name(                                                                 \
        const TrainedLayer* layers, int count, const void* dy, const void* const* weights,                     \
        const void* const* xs, const void* const* saved, float* const* gradients, double* squares,             \
        void* const* dx, int want_dx, void* work                                                               \
    );

DECLARE(float, float32)
DECLARE(uint16_t, bfloat16)
