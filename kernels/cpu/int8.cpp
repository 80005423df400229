// What stands before and after a product of 8-bit integers, row by row. `operators.py` calls them.

#include "simd.h"

namespace {

// scale = max(|x|, least) / 127 of each row, q = round(x / scale) + 128; rows of `width` contiguous elements.
template <class T>
void quantise_rows(const typename T::Element* x, uint8_t* q, float* scales, int64_t rows, int width, float least) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * width;
        Floats most = floats(least), odd = floats(0.0f);
        for (int i = 0; i < width; i += WIDTH) {
            const Floats of_x = T::load(x + at + i);
            most = maximum(absolute(of_x), most);
            odd = fma(of_x, floats(0.0f), odd);  // NaN where x is NaN or infinite, else 0
        }
        const float scale = (maximum_of(most) + sum_of(odd)) / 127;
        scales[row] = scale;
        const Floats factor = floats(1.0f / scale);
        for (int i = 0; i < width; i += WIDTH) {
            store_bytes(q + at + i, to_ints(T::load(x + at + i) * factor) + 128);
        }
    }
}

// y = sums * scales[row] + bias, or GELU of it; rows of `width` contiguous elements, bias null for none.
template <class T>
void scale_rows(
    const float* sums, const float* scales, const typename T::Element* bias, typename T::Element* y, int64_t rows,
    int width, int with_gelu
) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * width;
        const Floats scale = floats(scales[row]);
        for (int i = 0; i < width; i += WIDTH) {
            const Floats z = fma(
                load(sums + at + i), scale, bias ? T::load(bias + i) : floats(0.0f)
            );
            T::store(y + at + i, with_gelu ? gelu(z) : z);
        }
    }
}

}  // namespace

#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT void quantise_rows_##name(                                                                              \
        const T::Element* x, uint8_t* q, float* scales, int64_t rows, int width, float least                       \
    ) {                                                                                                            \
        quantise_rows<T>(x, q, scales, rows, width, least);                                                        \
    }                                                                                                              \
    EXPORT void scale_rows_##name(                                                                                 \
        const float* sums, const float* scales, const T::Element* bias, T::Element* y, int64_t rows, int width,    \
        int with_gelu                                                                                              \
    ) {                                                                                                            \
        scale_rows<T>(sums, scales, bias, y, rows, width, with_gelu);                                              \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
