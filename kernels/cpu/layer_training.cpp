// Post-norm encoder layers for training: one call forward and one backward, which run the operators of other files.
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
// The forward pass saves q, k, v, o, z1, h and z2 in the products' dtype, x1 in that of x, attention's softmax_stats, and
// the rows' dropout keys. dr, dx1 and dx use the memory of dx one after another.
//
// With `first_only` the output has R = B rows, of each sequence's first token, else R = T. Only k and v are then computed
// for all rows; the first rows of x are saved too, and their gradient is added to that of x at the end. The row of a
// sequence without tokens is zero.

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

// R, the rows of the output.
inline int rows_of_output(const TrainedLayer& l) { return l.first_only ? l.sequences : l.rows; }

// Bytes of an element of x.
template <class T>
size_t size_of_x(const TrainedLayer& l) { return l.wide ? sizeof(float) : sizeof(typename T::Element); }

// Pieces for q [R, A], k and v [T, A] or for their gradients. Where R = T they are joined, [T, 3A].
template <class T>
struct Projections {
    typename T::Element *q, *k, *v;
    int of_q, of_k;  // elements from one row to the next in q, and in k and v
    int64_t bytes;

    Projections(const TrainedLayer& l, Pieces&& pieces) {
        using Element = typename T::Element;
        const int64_t rows = l.rows, attended = l.attended;
        if (l.first_only) {
            q = pieces.take<Element>(l.sequences * attended), k = pieces.take<Element>(rows * 2 * attended);
            of_q = l.attended, of_k = 2 * l.attended;
        } else {
            q = pieces.take<Element>(rows * 3 * attended), k = q + attended;
            of_q = of_k = 3 * l.attended;
        }
        v = k + attended;
        bytes = pieces.bytes;
    }
};

// The tensors that the forward pass saves for the backward pass.
template <class T>
struct Saved {
    using Element = typename T::Element;
    Projections<T> qkv;
    Element *o, *z1, *h, *z2;
    char *x1, *first_x;
    float* softmax_stats;
    uint64_t *out_keys, *down_keys;  // null without dropout
    int32_t* first_starts;           // 0 to B: as queries the first rows are sequences of one token
    int64_t bytes;

    Saved(const TrainedLayer& l, void* memory) : qkv(l, Pieces{(char*)memory}) {
        Pieces pieces{(char*)memory};
        pieces.take<char>(qkv.bytes);
        const int64_t rows = rows_of_output(l), size = rows * l.width, bytes_of_x = size * size_of_x<T>(l);
        o = pieces.take<Element>(rows * l.attended);
        z1 = pieces.take<Element>(size), h = pieces.take<Element>(rows * l.inner), z2 = pieces.take<Element>(size);
        x1 = pieces.take<char>(bytes_of_x);
        softmax_stats = pieces.take<float>(2 * rows * l.heads);
        out_keys = l.out_threshold ? pieces.take<uint64_t>(rows) : nullptr;
        down_keys = l.down_threshold ? pieces.take<uint64_t>(rows) : nullptr;
        first_x = l.first_only ? pieces.take<char>(bytes_of_x) : nullptr;
        first_starts = l.first_only ? pieces.take<int32_t>(rows + 1) : nullptr;
        bytes = pieces.bytes;
    }
};

template <class T>
struct ForwardMemory {
    typename T::Element *narrow, *a;  // narrow: x, then x1, in the products' dtype
    int64_t bytes;

    ForwardMemory(const TrainedLayer& l, void* memory) {
        Pieces pieces{(char*)memory};
        const int64_t most = std::max(l.rows, rows_of_output(l));  // there may be more sequences than tokens
        narrow = pieces.take<typename T::Element>(l.wide ? most * l.width : 0);
        a = pieces.take<typename T::Element>((int64_t)rows_of_output(l) * l.inner);
        bytes = pieces.bytes;
    }
};

template <class T>
struct BackwardMemory {
    using Element = typename T::Element;
    Projections<T> dqkv;
    Element *a;                 // in the memory of dqkv, which is written when a is no longer needed
    Element *dz, *dh, *d_o;     // d_o in the memory of dh
    char *first_dx, *first_dy;  // with `first_only`: the gradients of the first rows; dy is zero without tokens
    float* parts;               // partial sums of the gradients of LayerNorm's parameters
    int64_t of_parts;
    int64_t bytes;

    BackwardMemory(const TrainedLayer& l, void* memory) : dqkv(l, Pieces{(char*)memory}) {
        Pieces pieces{(char*)memory};
        const int64_t rows = rows_of_output(l), bytes_of_x = rows * l.width * size_of_x<T>(l);
        a = (Element*)pieces.take<char>(std::max(dqkv.bytes, rows * l.inner * (int64_t)sizeof(Element)));
        dz = pieces.take<Element>(rows * l.width);
        dh = d_o = pieces.take<Element>(rows * std::max(l.inner, l.attended));
        first_dx = l.first_only ? pieces.take<char>(bytes_of_x) : nullptr;
        first_dy = l.first_only ? pieces.take<char>(bytes_of_x) : nullptr;
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

// The row of x for a row of the output. A sequence without tokens has that of the next one, or the last row; -1 if x has
// no row.
inline int64_t row_of_x(const TrainedLayer& l, int64_t row) {
    return l.first_only ? std::min(l.starts[row], l.rows - 1) : row;
}

inline void fill_keys(const TrainedLayer& l, uint64_t stream, uint64_t* keys) {
    if (keys)
        for (int64_t row = 0; row < rows_of_output(l); ++row)
            keys[row] = l.rows ? key_of(l.seed, stream, (uint64_t)l.row_ids[row_of_x(l, row)]) : 0;
}

inline bool has_tokens(const TrainedLayer& l, int64_t sequence) { return l.starts[sequence + 1] > l.starts[sequence]; }

// Sets the rows [B, C] of sequences without tokens to zero.
template <class T>
void clear_without_tokens(const TrainedLayer& l, char* rows) {
    const size_t bytes = l.width * size_of_x<T>(l);
    for (int64_t row = 0; row < l.sequences; ++row)
        if (!has_tokens(l, row)) std::memset(rows + row * bytes, 0, bytes);
}

template <class T>
int forward(
    const TrainedLayer& l, const void* x, const void* const* weights, void* y, void* memory, void* work
) {
    using Do = Operators<T>;
    if (!are_sequences(l.starts, l.sequences, l.rows)) return NOT_SEQUENCES;
    const Saved<T> saved(l, memory);
    const ForwardMemory<T> own(l, work);
    const Projections<T>& qkv = saved.qkv;
    const int all_rows = l.rows, rows = rows_of_output(l), width = l.width, attended = l.attended;
    const int head_dim = attended / l.heads;
    const int64_t size = (int64_t)rows * width;
    const auto project = [&](Place place, const auto* from, auto* to, int stride, int count) {
        return Do::linear_forward(
            from, weights[place], weights[place + 1], l.wide, to, stride, nullptr, count, attended, width, 0
        );
    };
    int failed = 0;

    const auto* narrow = narrowed<T>(x, (int64_t)all_rows * width, l.wide, own.narrow);
    failed |= project(KEY, narrow, qkv.k, qkv.of_k, all_rows);
    failed |= project(VALUE, narrow, qkv.v, qkv.of_k, all_rows);
    if (l.first_only) {
        const size_t bytes = width * size_of_x<T>(l);
        for (int64_t row = 0; row < rows; ++row)
            if (all_rows) std::memcpy(saved.first_x + row * bytes, (const char*)x + row_of_x(l, row) * bytes, bytes);
            else std::memset(saved.first_x + row * bytes, 0, bytes);
        for (int row = 0; row <= rows; ++row) saved.first_starts[row] = row;
        x = saved.first_x;
        narrow = narrowed<T>(x, size, l.wide, own.narrow);
    }
    failed |= project(QUERY, narrow, qkv.q, qkv.of_q, rows);
    const Dropout dropout = of_probabilities(l);
    failed |= Do::attention(
        qkv.q, qkv.k, qkv.v, saved.o, saved.softmax_stats, l.first_only ? saved.first_starts : l.starts, l.starts,
        l.sequences, rows, all_rows, l.heads, l.heads, head_dim, qkv.of_q, head_dim, qkv.of_k, head_dim, qkv.of_k,
        head_dim, UNBOUNDED, UNBOUNDED, l.attention_scale, dropout.threshold ? &dropout : nullptr
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
    if (l.first_only) clear_without_tokens<T>(l, (char*)y);
    return failed ? NO_MEMORY : DONE;
}

template <class E>
void add_row(E* to, const E* from, int width) {
    for (int i = 0; i < width; i += WIDTH) store(to + i, load(to + i) + load(from + i));
}

inline void copy_vector(const float* from, int width, float* to) {
    if (to) std::copy_n(from, width, to);
}

// gradients: those of the layer's tensors; null for those not wanted. squares: null, or for each of these tensors the sum
// of its gradient's squares, -1 where it is not computed. dx is also working memory.
template <class T>
int backward(
    const TrainedLayer& l, const void* dy, const void* x, const void* const* weights, const void* memory,
    float* const* gradients, double* squares, void* dx, bool want_dx, void* work
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
    const int all_rows = l.rows, rows = rows_of_output(l), width = l.width, inner = l.inner, attended = l.attended;
    const int head_dim = attended / l.heads;
    const void* const all_x = x;
    void* const all_dx = dx;
    if (l.first_only) {
        x = saved.first_x;
        dx = own.first_dx;
        std::memcpy(own.first_dy, dy, rows * width * size_of_x<T>(l));
        clear_without_tokens<T>(l, own.first_dy);
        dy = own.first_dy;
    }
    int failed = 0;
    if (squares) std::fill_n(squares, (int)PLACES, -1.0);

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
    const auto weight_gradient = [&](Place place, const auto* d, int columns, const void* of, int wide, int of_width,
                                     float* dbias) {
        if (gradients[place] || dbias)
            failed |= Do::weight_gradient(
                d, columns, of, wide, gradients + place, &dbias, squares ? squares + place : nullptr, 1, rows, columns,
                of_width
            );
    };

    norm_backward(
        dy, saved.z2, saved.x1, saved.down_keys, DOWN_NORM, DOWN, l.down_eps, l.down_threshold, l.down_scale
    );
    if (!to_feed_forward) return DONE;

    failed |= Do::input_gradient(
        own.dz, width, weights + DOWN, 1, l.wide, own.dh, false, false, saved.h, own.a, rows, width, inner, l.activation
    );
    weight_gradient(DOWN, own.dz, width, own.a, false, inner, nullptr);
    weight_gradient(UP, own.dh, inner, saved.x1, l.wide, width, gradients[UP + 1]);
    if (!to_norm) return failed ? NO_MEMORY : DONE;

    failed |= Do::input_gradient(
        own.dh, inner, weights + UP, 1, l.wide, dx, l.wide, true, nullptr, nullptr, rows, inner, width, 0
    );
    norm_backward(dx, saved.z1, x, saved.out_keys, OUT_NORM, OUT, l.out_eps, l.out_threshold, l.out_scale);
    weight_gradient(OUT, own.dz, width, saved.o, false, attended, nullptr);
    if (!to_attention) return failed ? NO_MEMORY : DONE;

    failed |= Do::input_gradient(
        own.dz, width, weights + OUT, 1, l.wide, own.d_o, false, false, nullptr, nullptr, rows, width, attended, 0
    );
    const Dropout dropout = of_probabilities(l);
    const Projections<T>&qkv = saved.qkv, &dqkv = own.dqkv;
    failed |= Do::attention_backward(
        own.d_o, qkv.q, qkv.k, qkv.v, saved.o, saved.softmax_stats, dqkv.q, dqkv.k, dqkv.v, dqkv.of_q, dqkv.of_k,
        l.first_only ? saved.first_starts : l.starts, l.starts, l.sequences, rows, all_rows, l.heads, l.heads, head_dim,
        attended, head_dim, qkv.of_q, head_dim, qkv.of_k, head_dim, qkv.of_k, head_dim, UNBOUNDED, UNBOUNDED,
        l.attention_scale, dropout.threshold ? &dropout : nullptr
    );
    // The gradients from `count` projections, beginning with `first`, of which d [count_of_rows] is the gradient.
    const auto projected = [&](Place first, int count, const auto* d, int stride, const void* from, void* into, bool adds,
                               int count_of_rows) {
        const void* of[3];
        float *dweights[3], *dbiases[3];
        for (int i = 0; i < count; ++i) {
            of[i] = weights[first + 2 * i];
            dweights[i] = gradients[first + 2 * i], dbiases[i] = gradients[first + 2 * i + 1];
        }
        double of_weights[3] = {-1.0, -1.0, -1.0};
        if (wanted(first, first + 2 * count))
            failed |= Do::weight_gradient(
                d, stride, from, l.wide, dweights, dbiases, squares ? of_weights : nullptr, count, count_of_rows,
                attended, width
            );
        for (int i = 0; squares && i < count; ++i) squares[first + 2 * i] = of_weights[i];
        if (want_dx)
            failed |= Do::input_gradient(
                d, stride, of, count, l.wide, into, l.wide, adds, nullptr, nullptr, count_of_rows, attended, width, 0
            );
    };
    if (!l.first_only) {
        projected(QUERY, 3, dqkv.q, dqkv.of_q, x, dx, true, rows);
        return failed ? NO_MEMORY : DONE;
    }
    projected(KEY, 2, dqkv.k, dqkv.of_k, all_x, all_dx, false, all_rows);
    projected(QUERY, 1, dqkv.q, dqkv.of_q, x, dx, true, rows);
    for (int64_t row = 0; want_dx && row < rows; ++row)
        if (has_tokens(l, row)) {
            const int64_t to = row_of_x(l, row) * width, from = row * width;
            if (l.wide) add_row((float*)all_dx + to, (const float*)dx + from, width);
            else add_row((typename T::Element*)all_dx + to, (const typename T::Element*)dx + from, width);
        }
    return failed ? NO_MEMORY : DONE;
}

}  // namespace

// bytes: for each layer those of `saved`, of forward's `work` and of backward's.
// xs: the input of each layer, and after the last its output; each pointer of `weights` and `gradients` has its PLACES.
// Backward writes the gradients of xs into two buffers in turn: that of layer i into dx[(count - 1 - i) % 2].
#define EXPORT_FOR(T, name)                                                                                         \
    EXPORT void trained_layers_bytes_##name(const TrainedLayer* layers, int count, int64_t* bytes) {                \
        for (int i = 0; i < count; ++i, bytes += 3) {                                                               \
            bytes[0] = Saved<T>(layers[i], nullptr).bytes;                                                          \
            bytes[1] = ForwardMemory<T>(layers[i], nullptr).bytes;                                                  \
            bytes[2] = BackwardMemory<T>(layers[i], nullptr).bytes;                                                 \
        }                                                                                                           \
    }                                                                                                               \
    EXPORT int trained_layers_forward_##name(                                                                       \
        const TrainedLayer* layers, int count, const void* const* weights, void* const* xs, void* const* saved,     \
        void* work                                                                                                  \
    ) {                                                                                                             \
        int outcome = DONE;                                                                                         \
        for (int i = 0; i < count && outcome == DONE; ++i)                                                          \
            outcome = forward<T>(layers[i], xs[i], weights + i * PLACES, xs[i + 1], saved[i], work);                \
        return outcome;                                                                                             \
    }                                                                                                               \
    EXPORT int trained_layers_backward_##name(                                                                      \
        const TrainedLayer* layers, int count, const void* dy, const void* const* weights, const void* const* xs,   \
        const void* const* saved, float* const* gradients, double* squares, void* const* dx, int want_dx,           \
        void* work                                                                                                  \
    ) {                                                                                                             \
        int outcome = DONE;                                                                                         \
        for (int i = count - 1; i >= 0 && outcome == DONE; dy = dx[(count - 1 - i) % 2], --i)                       \
            outcome = backward<T>(                                                                                  \
                layers[i], dy, xs[i], weights + i * PLACES, saved[i], gradients + i * PLACES,                       \
                squares ? squares + i * PLACES : nullptr, dx[(count - 1 - i) % 2], i || want_dx, work               \
            );                                                                                                      \
        return outcome;                                                                                             \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
