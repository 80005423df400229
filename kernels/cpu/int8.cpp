// What stands before and after a product of 8-bit integers, row by row. `operators.py` calls them.

#include "simd.h"

namespace {

// scale = max(|x|, least) / 127 of each row, q = round(x / scale) + 128; rows of `width` contiguous elements.
template <class T>
void quantise_rows(const typename T::Element* x, uint8_t* q, float* scales, int64_t rows, int width, float least) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * width;
        __m512 most = _mm512_set1_ps(least), odd = _mm512_setzero_ps();
        for (int i = 0; i < width; i += WIDTH) {
            const __m512 of_x = T::load(x + at + i);
            most = _mm512_max_ps(_mm512_abs_ps(of_x), most);
            odd = _mm512_fmadd_ps(of_x, _mm512_setzero_ps(), odd);  // NaN where x is NaN or infinite, else 0
        }
        const float scale = (_mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(odd)) / 127;
        scales[row] = scale;
        const __m512 factor = _mm512_set1_ps(1.0f / scale);
        for (int i = 0; i < width; i += WIDTH) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(T::load(x + at + i), factor));
            const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128)));
            _mm_storeu_si128((__m128i*)(q + at + i), bytes);
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
        const __m512 scale = _mm512_set1_ps(scales[row]);
        for (int i = 0; i < width; i += WIDTH) {
            const __m512 z = _mm512_fmadd_ps(
                _mm512_loadu_ps(sums + at + i), scale, bias ? T::load(bias + i) : _mm512_setzero_ps()
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
