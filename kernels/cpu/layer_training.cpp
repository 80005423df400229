// A post-norm encoder layer for training: one call forward and one backward, which run the operators of other files.
// `encoder_layer.py` calls them. x, y [T, C]; attention has width A, the feed-forward network F.
//
//     qkv = x Wqkv^T + bqkv  [T, 3A];   o = attention(qkv);   z1 = o Wout^T
//     x1 = LayerNorm(dropout(z1 + bout) + x)
//     h = x1 Wup^T + bup  [T, F];   a = act(h);   z2 = a Wdown^T
//     y = LayerNorm(dropout(z2 + bdown) + x1)
//
// Backward. A LayerNorm has two inputs: dr is the gradient of the residual, dz that of the product.
//
//     dr2, dz2 from dy;   dh, a from dz2 Wdown and h;   dx1 = dr2 + dh Wup
//     dr1, dz1 from dx1;  do = dz1 Wout;  dqkv from do;  dx = dr1 + dqkv Wqkv
//
// The forward pass saves qkv, o, z1, h and z2 in the products' dtype, x1 in that of x, attention's softmax_stats, and the
// rows' dropout keys. dr, dx1 and dx use the memory of dx one after another.

#include "attention.h"

namespace {

// The operators of one dtype.
template <class T>
struct Operators;
#define OPERATORS_OF(T, name)                                                                                  \
    template <>                                                                                                \
    struct Operators<T> {                                                                                      \
        static constexpr auto linear_forward = linear_forward_##name;                                          \
        static constexpr auto input_gradient = linear_input_gradient_##name;                                   \
        static constexpr auto weight_gradient = linear_weight_gradient_##name;                                 \
        static constexpr auto attention = attention_##name;                                                    \
        static constexpr auto attention_backward = attention_backward_##name;                                  \
        static constexpr auto norm = dropout_add_layer_norm_##name;                                            \
        static constexpr auto norm_backward = add_layer_norm_backward_##name;                                  \
    };
OPERATORS_OF(Float32, float32)
OPERATORS_OF(BFloat16, bfloat16)

// Indices of a layer's tensors in `LayerWeights`; each weight is followed by its bias.
enum Place { QUERY = 0, KEY = 2, VALUE = 4, OUT = 6, OUT_NORM = 8, UP = 10, DOWN = 12, DOWN_NORM = 14, PLACES = 16 };

// Divides memory into pieces, each aligned to 64 bytes. Without memory it only counts.
struct Pieces {
    char* memory;
    int64_t bytes = 0;

    template <class E>
    E* take(int64_t count) {
        E* piece = memory ? (E*)(memory + bytes) : nullptr;
        bytes += (count * (int64_t)sizeof(E) + 63) / 64 * 64;
        return piece;
    }
};

// The tensors that the forward pass saves for the backward pass.
template <class T>
struct Saved {
    using Element = typename T::Element;
    Element *qkv, *o, *z1, *h, *z2;
    char* x1;
    float* softmax_stats;
    uint64_t *out_keys, *down_keys;  // null without dropout
    int64_t bytes;

    Saved(const TrainedLayer& l, void* memory) {
        Pieces pieces{(char*)memory};
        const int64_t rows = l.rows, size = rows * l.width;
        qkv = pieces.take<Element>(rows * 3 * l.attended), o = pieces.take<Element>(rows * l.attended);
        z1 = pieces.take<Element>(size), h = pieces.take<Element>(rows * l.inner), z2 = pieces.take<Element>(size);
        x1 = pieces.take<char>(size * (l.wide ? sizeof(float) : sizeof(Element)));
        softmax_stats = pieces.take<float>(2 * rows * l.heads);
        out_keys = l.out_threshold ? pieces.take<uint64_t>(rows) : nullptr;
        down_keys = l.down_threshold ? pieces.take<uint64_t>(rows) : nullptr;
        bytes = pieces.bytes;
    }
};

template <class T>
struct ForwardMemory {
    typename T::Element *narrow, *a;  // narrow: x, then x1, in the products' dtype
    int64_t bytes;

    ForwardMemory(const TrainedLayer& l, void* memory) {
        Pieces pieces{(char*)memory};
        narrow = pieces.take<typename T::Element>(l.wide ? (int64_t)l.rows * l.width : 0);
        a = pieces.take<typename T::Element>((int64_t)l.rows * l.inner);
        bytes = pieces.bytes;
    }
};

template <class T>
struct BackwardMemory {
    using Element = typename T::Element;
    Element *dz, *dh, *a;
    Element *d_o, *dqkv;  // in the memory of dh and a, which are no longer needed then
    float* parts;         // partial sums of the gradients of LayerNorm's parameters
    int64_t of_parts;
    int64_t bytes;

    BackwardMemory(const TrainedLayer& l, void* memory) {
        Pieces pieces{(char*)memory};
        const int64_t rows = l.rows;
        dz = pieces.take<Element>(rows * l.width);
        dh = d_o = pieces.take<Element>(rows * std::max(l.inner, l.attended));
        a = dqkv = pieces.take<Element>(rows * std::max(l.inner, 3 * l.attended));
        of_parts = std::max<int64_t>(1, (rows + NORM_BLOCK - 1) / NORM_BLOCK) * 3 * l.width;
        parts = pieces.take<float>(of_parts);
        bytes = pieces.bytes;
    }
};

// x, or if x is float32 and the products are not, x rounded into `to`.
template <class T>
const typename T::Element* narrowed(const void* x, int64_t count, bool wide, typename T::Element* to) {
    if (!wide) return (const typename T::Element*)x;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i += WIDTH) T::store(to + i, load((const float*)x + i));
    return to;
}

inline Dropout of_probabilities(const TrainedLayer& l) {
    return {l.sequence_ids, l.seed, l.probs_stream, l.probs_threshold, l.probs_scale};
}

inline void fill_keys(const TrainedLayer& l, uint64_t stream, uint64_t* keys) {
    if (keys)
        for (int64_t row = 0; row < l.rows; ++row) keys[row] = key_of(l.seed, stream, (uint64_t)l.row_ids[row]);
}

template <class T>
int forward(
    const TrainedLayer& l, const void* x, const void* const* weights, void* y, void* memory, void* work
) {
    using Do = Operators<T>;
    if (!are_sequences(l.starts, l.sequences, l.rows)) return NOT_SEQUENCES;
    const Saved<T> saved(l, memory);
    const ForwardMemory<T> own(l, work);
    const int rows = l.rows, width = l.width, attended = l.attended, head_dim = attended / l.heads, all = 3 * attended;
    const int64_t size = (int64_t)rows * width;
    int failed = 0;

    const auto* narrow = narrowed<T>(x, size, l.wide, own.narrow);
    for (int i : {QUERY, KEY, VALUE})
        failed |= Do::linear_forward(
            narrow, weights[i], weights[i + 1], l.wide, saved.qkv + i / 2 * attended, all, nullptr, rows, attended, width, 0
        );
    const Dropout dropout = of_probabilities(l);
    failed |= Do::attention(
        saved.qkv, saved.qkv + attended, saved.qkv + 2 * attended, saved.o, saved.softmax_stats, l.starts, l.starts,
        l.sequences, rows, rows, l.heads, l.heads, head_dim, all, head_dim, all, head_dim, all, head_dim,
        UNBOUNDED, UNBOUNDED, l.attention_scale, dropout.threshold ? &dropout : nullptr
    );
    failed |= Do::linear_forward(saved.o, weights[OUT], nullptr, l.wide, saved.z1, width, nullptr, rows, width, attended, 0);
    fill_keys(l, l.out_stream, saved.out_keys);
    Do::norm(
        saved.z1, weights[OUT + 1], x, saved.out_keys, weights[OUT_NORM], weights[OUT_NORM + 1], saved.x1, l.wide, rows,
        width, l.out_eps, l.out_threshold, l.out_scale
    );

    narrow = narrowed<T>(saved.x1, size, l.wide, own.narrow);
    failed |= Do::linear_forward(
        narrow, weights[UP], weights[UP + 1], l.wide, own.a, l.inner, saved.h, rows, l.inner, width, l.activation
    );
    failed |= Do::linear_forward(own.a, weights[DOWN], nullptr, l.wide, saved.z2, width, nullptr, rows, width, l.inner, 0);
    fill_keys(l, l.down_stream, saved.down_keys);
    Do::norm(
        saved.z2, weights[DOWN + 1], saved.x1, saved.down_keys, weights[DOWN_NORM], weights[DOWN_NORM + 1], y, l.wide,
        rows, width, l.down_eps, l.down_threshold, l.down_scale
    );
    return failed ? NO_MEMORY : DONE;
}

inline void copy_vector(const float* from, int width, float* to) {
    if (to) std::copy_n(from, width, to);
}

// gradients: those of the layer's tensors; null for those not wanted. dx is also working memory.
template <class T>
int backward(
    const TrainedLayer& l, const void* dy, const void* x, const void* const* weights, const void* memory,
    float* const* gradients, void* dx, bool want_dx, void* work
) {
    using Do = Operators<T>;
    const auto wanted = [&](int from, int to) {
        return std::any_of(gradients + from, gradients + to, [](const float* gradient) { return gradient; });
    };
    // whether a gradient is wanted at or before attention, the first LayerNorm, the feed-forward network
    const bool to_attention = want_dx || wanted(QUERY, OUT), to_norm = to_attention || wanted(OUT, UP);
    const bool to_feed_forward = to_norm || wanted(UP, DOWN + 1);
    const Saved<T> saved(l, (void*)memory);
    const BackwardMemory<T> own(l, work);
    const int rows = l.rows, width = l.width, inner = l.inner, attended = l.attended, head_dim = attended / l.heads;
    int failed = 0;

    const auto norm_backward = [&](const void* upstream, const auto* z, const void* residual, const uint64_t* keys,
                                   Place norm, Place product, float eps, uint32_t threshold, float scale) {
        std::fill_n(own.parts, own.of_parts, 0.0f);
        Do::norm_backward(
            z, weights[product + 1], residual, keys, weights[norm], upstream, own.dz, dx, own.parts, l.wide, rows, width,
            eps, threshold, scale
        );
        copy_vector(own.parts, width, gradients[norm]);
        copy_vector(own.parts + width, width, gradients[norm + 1]);
        copy_vector(own.parts + 2 * width, width, gradients[product + 1]);
    };
    // the gradient of one weight: dz^T or dh^T times the weight's input
    const auto weight_gradient = [&](const auto* d, int columns, const void* of, int wide, int of_width, float* dweight,
                                     float* dbias) {
        if (dweight || dbias)
            failed |= Do::weight_gradient(d, columns, of, wide, &dweight, &dbias, 1, rows, columns, of_width);
    };

    norm_backward(
        dy, saved.z2, saved.x1, saved.down_keys, DOWN_NORM, DOWN, l.down_eps, l.down_threshold, l.down_scale
    );
    if (!to_feed_forward) return DONE;

    failed |= Do::input_gradient(
        own.dz, width, weights + DOWN, 1, l.wide, own.dh, false, false, saved.h, own.a, rows, width, inner, l.activation
    );
    weight_gradient(own.dz, width, own.a, false, inner, gradients[DOWN], nullptr);
    weight_gradient(own.dh, inner, saved.x1, l.wide, width, gradients[UP], gradients[UP + 1]);
    if (!to_norm) return failed ? NO_MEMORY : DONE;

    failed |= Do::input_gradient(
        own.dh, inner, weights + UP, 1, l.wide, dx, l.wide, true, nullptr, nullptr, rows, inner, width, 0
    );
    norm_backward(dx, saved.z1, x, saved.out_keys, OUT_NORM, OUT, l.out_eps, l.out_threshold, l.out_scale);
    weight_gradient(own.dz, width, saved.o, false, attended, gradients[OUT], nullptr);
    if (!to_attention) return failed ? NO_MEMORY : DONE;

    failed |= Do::input_gradient(
        own.dz, width, weights + OUT, 1, l.wide, own.d_o, false, false, nullptr, nullptr, rows, width, attended, 0
    );
    const Dropout dropout = of_probabilities(l);
    const int all = 3 * attended;
    failed |= Do::attention_backward(
        own.d_o, saved.qkv, saved.qkv + attended, saved.qkv + 2 * attended, saved.o, saved.softmax_stats, own.dqkv,
        own.dqkv + attended, own.dqkv + 2 * attended, all, all, l.starts, l.starts, l.sequences, rows, rows, l.heads,
        l.heads, head_dim, attended, head_dim, all, head_dim, all, head_dim, all, head_dim, UNBOUNDED,
        UNBOUNDED, l.attention_scale,
        dropout.threshold ? &dropout : nullptr
    );
    if (wanted(QUERY, OUT)) {
        float* const dweights[] = {gradients[QUERY], gradients[KEY], gradients[VALUE]};
        float* const dbiases[] = {gradients[QUERY + 1], gradients[KEY + 1], gradients[VALUE + 1]};
        failed |= Do::weight_gradient(own.dqkv, all, x, l.wide, dweights, dbiases, 3, rows, attended, width);
    }
    if (want_dx) {
        const void* const of_qkv[] = {weights[QUERY], weights[KEY], weights[VALUE]};
        failed |= Do::input_gradient(
            own.dqkv, all, of_qkv, 3, l.wide, dx, l.wide, true, nullptr, nullptr, rows, attended, width, 0
        );
    }
    return failed ? NO_MEMORY : DONE;
}

}  // namespace

// what: 0 the bytes of `saved`, 1 of forward's `work`, 2 of backward's.
#define EXPORT_FOR(T, name)                                                                                     \
    EXPORT int64_t encoder_layer_bytes_##name(const TrainedLayer* layer, int what) {                            \
        if (what == 0) return Saved<T>(*layer, nullptr).bytes;                                                  \
        return what == 1 ? ForwardMemory<T>(*layer, nullptr).bytes : BackwardMemory<T>(*layer, nullptr).bytes;  \
    }                                                                                                           \
    EXPORT int encoder_layer_forward_##name(                                                                    \
        const TrainedLayer* layer, const void* x, const void* const* weights, void* y, void* saved, void* work  \
    ) {                                                                                                         \
        return forward<T>(*layer, x, weights, y, saved, work);                                                  \
    }                                                                                                           \
    EXPORT int encoder_layer_backward_##name(                                                                   \
        const TrainedLayer* layer, const void* dy, const void* x, const void* const* weights, const void* saved, \
        float* const* gradients, void* dx, int want_dx, void* work                                              \
    ) {                                                                                                         \
        return backward<T>(*layer, dy, x, weights, saved, gradients, dx, want_dx, work);                        \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
