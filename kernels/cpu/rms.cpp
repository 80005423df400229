// RMSNorm of rows, and its gradients. `norm.py` calls them.
//
//     rstd = 1 / sqrt(mean(x^2) + eps),  xhat = x * rstd,  y = xhat * weight
//     g = dy * weight,  dx = rstd * (g - xhat * mean(g * xhat)),  dweight = sum over rows of dy * xhat
//
// The forward pass saves nothing; the backward pass computes statistics again while the row is in the first-level cache.

#include "simd.h"

namespace {

template <class T>
Floats rstd_of(const typename T::Element* x, int width, float eps) {
    Floats squares = floats(0.0f);
    for (int i = 0; i < width; i += WIDTH) {
        const Floats z = T::load(x + i);
        squares = fma(z, z, squares);
    }
    return floats(1.0f / std::sqrt(sum_of(squares) / width + eps));
}

// x and y are in T, the weight in W.
template <class T, class W>
void forward(
    const typename T::Element* x, const typename W::Element* weight, typename T::Element* y, int64_t rows, int width,
    float eps
) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * width;
        const Floats rstd = rstd_of<T>(x + at, width, eps);
        for (int i = 0; i < width; i += WIDTH)
            T::store(y + at + i, T::load(x + at + i) * rstd * W::load(weight + i));
    }
}

// parts [blocks of rows, width] must be zeros; its first block becomes dweight.
template <class T, class W>
void backward(
    const typename T::Element* x, const typename W::Element* weight, const typename T::Element* dy,
    typename T::Element* dx, float* parts, int64_t rows, int width, float eps
) {
    const int64_t blocks = (rows + NORM_BLOCK - 1) / NORM_BLOCK;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            float* dweight = parts + block * width;
            for (int64_t row = block * NORM_BLOCK; row < std::min(rows, (block + 1) * NORM_BLOCK); ++row) {
                const int64_t at = row * width;
                const Floats rstd = rstd_of<T>(x + at, width, eps);
                Floats with_xhat = floats(0.0f);
                for (int i = 0; i < width; i += WIDTH) {
                    const Floats d = T::load(dy + at + i), xhat = T::load(x + at + i) * rstd;
                    with_xhat = fma(d * W::load(weight + i), xhat, with_xhat);
                    store(dweight + i, fma(d, xhat, load(dweight + i)));
                }
                const Floats slope = floats(sum_of(with_xhat) / width);
                for (int i = 0; i < width; i += WIDTH) {
                    const Floats g = T::load(dy + at + i) * W::load(weight + i);
                    T::store(dx + at + i, fnma(T::load(x + at + i) * rstd, slope, g) * rstd);
                }
            }
        }
#pragma omp for schedule(static)
        for (int i = 0; i < width; i += WIDTH) {
            Floats sum = load(parts + i);
            for (int64_t block = 1; block < blocks; ++block) sum += load(parts + block * width + i);
            store(parts + i, sum);
        }
    }
}

}  // namespace

// wide: the weight is float32.
#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT void rms_norm_##name(                                                                                   \
        const T::Element* x, const void* weight, int wide, T::Element* y, int64_t rows, int width, float eps       \
    ) {                                                                                                            \
        if (wide)                                                                                                  \
            forward<T, Float32>(x, (const float*)weight, y, rows, width, eps);                                     \
        else                                                                                                       \
            forward<T, T>(x, (const T::Element*)weight, y, rows, width, eps);                                      \
    }                                                                                                              \
    EXPORT void rms_norm_backward_##name(                                                                          \
        const T::Element* x, const void* weight, int wide, const T::Element* dy, T::Element* dx, float* parts,     \
        int64_t rows, int width, float eps                                                                         \
    ) {                                                                                                            \
        if (wide)                                                                                                  \
            backward<T, Float32>(x, (const float*)weight, dy, dx, parts, rows, width, eps);                        \
        else                                                                                                       \
            backward<T, T>(x, (const T::Element*)weight, dy, dx, parts, rows, width, eps);                         \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
