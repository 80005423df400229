// Operators before and after the layers, for inference: three look-ups, their sum and LayerNorm; the mean of each
// sequence. `operators.py` calls them.

#include "simd.h"

namespace {

// y = LayerNorm(word[ids] + segment[types] + position[places]), with the sum in float32; tables have `width` contiguous
// columns. Returns 1, without computing, if an index is outside of its table of sizes[0], [1] or [2] rows.
template <class T>
int embedding_layer_norm(
    const int64_t* ids, const int64_t* types, const int64_t* places, const typename T::Element* word,
    const typename T::Element* segment, const typename T::Element* position, const typename T::Element* weight,
    const typename T::Element* bias, typename T::Element* y, int64_t rows, const int64_t* sizes, int width, float eps
) {
    for (int64_t row = 0; row < rows; ++row)
        if ((uint64_t)ids[row] >= (uint64_t)sizes[0] || (uint64_t)types[row] >= (uint64_t)sizes[1] ||
            (uint64_t)places[row] >= (uint64_t)sizes[2])
            return 1;
#pragma omp parallel for schedule(static) if (rows > 64)
    for (int64_t row = 0; row < rows; ++row) {
        const auto *a = word + ids[row] * width, *b = segment + types[row] * width, *c = position + places[row] * width;
        auto z = [&](int i) { return T::load(a + i) + T::load(b + i) + T::load(c + i); };
        layer_norm_of_row<T>(z, weight, bias, y + row * width, width, eps);
    }
    return 0;
}

// y [sequences, width] = the mean of each sequence's rows of x, summed in float32; zeros for an empty sequence.
template <class T>
int mean_of_sequences(
    const typename T::Element* x, const int32_t* starts, typename T::Element* y, int sequences, int64_t rows, int width
) {
    if (!are_sequences(starts, sequences, rows)) return NOT_SEQUENCES;
#pragma omp parallel for schedule(static) if (rows > 64)
    for (int i = 0; i < sequences; ++i)
        for (int column = 0; column < width; column += WIDTH) {
            Floats sum = floats(0.0f);
            for (int64_t row = starts[i]; row < starts[i + 1]; ++row)
                sum += T::load(x + row * width + column);
            const Floats count = floats(std::max(starts[i + 1] - starts[i], 1));
            T::store(y + (int64_t)i * width + column, sum / count);
        }
    return DONE;
}

}  // namespace

#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int embedding_layer_norm_##name(                                                                        \
        const int64_t* ids, const int64_t* types, const int64_t* places, const T::Element* word,                   \
        const T::Element* segment, const T::Element* position, const T::Element* weight, const T::Element* bias,   \
        T::Element* y, int64_t rows, const int64_t* sizes, int width, float eps                                    \
    ) {                                                                                                            \
        return embedding_layer_norm<T>(ids, types, places, word, segment, position, weight, bias, y, rows, sizes,  \
                                       width, eps);                                                                \
    }                                                                                                              \
    EXPORT int mean_of_sequences_##name(                                                                           \
        const T::Element* x, const int32_t* starts, T::Element* y, int sequences, int64_t rows, int width          \
    ) {                                                                                                            \
        return mean_of_sequences<T>(x, starts, y, sequences, rows, width);                                         \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
