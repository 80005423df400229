// dropout + add + LayerNorm, and its gradients; and dropout alone. Without dropout the forward pass saves nothing. `norm.py` calls them.
//
//     z = dropout(x + x_bias) + residual,  xhat = (z - mean) * rstd,  y = xhat * weight + bias
//     g = dy * weight,  dz = rstd * (g - mean(g) - xhat * mean(g * xhat)) = dresidual,  dx = dz where kept, scaled
//     dweight, dbias, dx_bias = sums over rows of dy * xhat, of dy and of dx
//
// Under autocast x is the bfloat16 result of a product and all else is float32.
// The backward pass computes statistics and masks again, while the row is in the first-level cache.

#include <vector>

#include "attention.h"
#include "team.h"

namespace {

constexpr int LEAST_ELEMENTS = 8192;  // elements whose sum and LayerNorm a thread computes at a time, at least

// y = LayerNorm(x + residual) for rows of `width` contiguous elements.
template <class T>
void add_layer_norm(
    const typename T::Element* x, const typename T::Element* residual, const typename T::Element* weight,
    const typename T::Element* bias, typename T::Element* y, int64_t rows, int width, float eps
) {
    Team::share_range(rows, LEAST_ELEMENTS / width + 1, [&](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; ++row) {
            const int64_t at = row * width;
            auto z = [&](int i) { return T::load(x + at + i) + T::load(residual + at + i); };
            layer_norm_of_row<T>(z, weight, bias, y + at, width, eps);
        }
    });
}

// y = x / kept where the row's key keeps an element, else 0. kept: the share of elements that are.
template <class T>
void dropout(
    const typename T::Element* x, const uint64_t* keys, typename T::Element* y, int64_t rows, int width,
    uint32_t threshold, float kept
) {
    Team::share_range(rows, LEAST_ELEMENTS / width + 1, [&](int64_t first, int64_t end) {
        for (int64_t row = first; row < end; ++row) {
            const Ints low = ints(keys[row]), high = ints(keys[row] >> 32);
            for (int i = 0; i < width; i += WIDTH) {
                const Mask mask = keep_mask(low, high, lane_numbers() + ints(i), threshold);
                T::store(y + row * width + i, keep(mask, T::load(x + row * width + i) / floats(kept)));
            }
        }
    });
}

// Rows of `width` contiguous elements of x, in T, and of a residual, in R; x_bias may be null. Dropout of x is drawn by
// the row's key; without keys there is no dropout.
template <class T, class R>
struct Sums {
    const typename T::Element* x;
    const typename R::Element *x_bias, *residual;
    const uint64_t* keys;
    int width;
    float eps;
    uint32_t threshold;
    float scale;

    Mask kept(int64_t row, int i) const {
        if (!keys) return first_lanes(WIDTH);
        return keep_mask(ints(keys[row]), ints(keys[row] >> 32), lane_numbers() + ints(i), threshold);
    }

    // Computes xhat of this row and the keep mask of x; returns rstd.
    float normalise(int64_t row, float* xhat, Mask* mask) const {
        const int64_t at = row * width;
        for (int i = 0; i < width; i += WIDTH) {
            mask[i / WIDTH] = kept(row, i);
            Floats of_x = T::load(x + at + i);
            if (x_bias) of_x += R::load(x_bias + i);
            of_x = keep(mask[i / WIDTH], of_x * floats(scale));
            store(xhat + i, of_x + R::load(residual + at + i));
        }
        const Moments m = moments_of_row([&](int i) { return load(xhat + i); }, width, eps);
        for (int i = 0; i < width; i += WIDTH) {
            const Floats centred = load(xhat + i) - m.mean - m.rest;
            store(xhat + i, centred * floats(m.rstd));
        }
        return m.rstd;
    }
};

template <class T, class R>
void forward(
    const Sums<T, R>& sums, const typename R::Element* weight, const typename R::Element* bias, typename R::Element* y,
    int64_t rows
) {
    const int width = sums.width;
#pragma omp parallel
    {
        std::vector<float> xhat(width);
        std::vector<Mask> mask(width / WIDTH);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            sums.normalise(row, xhat.data(), mask.data());
            for (int i = 0; i < width; i += WIDTH)
                R::store(
                    y + row * width + i,
                    fma(load(&xhat[i]), R::load(weight + i), R::load(bias + i))
                );
        }
    }
}

// parts [blocks of rows, 3, width] must be zeros; its first block becomes (dweight, dbias, dx_bias), of which dx_bias is
// not written without x_bias. dx may be null if it is equal to dresidual.
template <class T, class R>
void backward(
    const Sums<T, R>& sums, const typename R::Element* weight, const typename R::Element* dy, typename T::Element* dx,
    typename R::Element* dresidual, float* parts, int64_t rows
) {
    const int width = sums.width;
    const int64_t blocks = (rows + NORM_BLOCK - 1) / NORM_BLOCK;
    const Floats scale = floats(sums.scale);
#pragma omp parallel
    {
        std::vector<float> xhat(width);
        std::vector<Mask> mask(width / WIDTH);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            float *dweight = parts + block * 3 * width, *dbias = dweight + width, *dx_bias = dbias + width;
            for (int64_t row = block * NORM_BLOCK; row < std::min(rows, (block + 1) * NORM_BLOCK); ++row) {
                const int64_t at = row * width;
                const Floats rstd = floats(sums.normalise(row, xhat.data(), mask.data()));

                Floats sum = floats(0.0f), with_xhat = floats(0.0f);
                for (int i = 0; i < width; i += WIDTH) {
                    const Floats d = R::load(dy + at + i), h = load(&xhat[i]);
                    const Floats g = d * R::load(weight + i);
                    sum += g;
                    with_xhat = fma(g, h, with_xhat);
                    store(dweight + i, fma(d, h, load(dweight + i)));
                    store(dbias + i, d + load(dbias + i));
                }
                const Floats mean = floats(sum_of(sum) / width);
                const Floats slope = floats(sum_of(with_xhat) / width);

                for (int i = 0; i < width; i += WIDTH) {
                    const Floats g = R::load(dy + at + i) * R::load(weight + i);
                    const Floats left = fnma(load(&xhat[i]), slope, g - mean);
                    const Floats dz = left * rstd;
                    R::store(dresidual + at + i, dz);
                    const Floats of_x = keep(mask[i / WIDTH], dz * scale);
                    if (dx) T::store(dx + at + i, of_x);
                    if (sums.x_bias)
                        store(dx_bias + i, of_x + load(dx_bias + i));
                }
            }
        }
#pragma omp for schedule(static)
        for (int i = 0; i < 3 * width; i += WIDTH) {
            Floats sum = load(parts + i);
            for (int64_t block = 1; block < blocks; ++block)
                sum += load(parts + block * 3 * width + i);
            store(parts + i, sum);
        }
    }
}

}  // namespace

// wide: everything except x and dx is float32. Row keys do not depend on T.
#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT void row_keys_##name(                                                                                   \
        uint64_t seed, uint64_t stream, const int64_t* names, uint64_t* keys, int64_t rows                         \
    ) {                                                                                                            \
        for (int64_t row = 0; row < rows; ++row) keys[row] = key_of(seed, stream, (uint64_t)names[row]);           \
    }                                                                                                              \
    EXPORT void dropout_##name(                                                                                    \
        const T::Element* x, const uint64_t* keys, T::Element* y, int64_t rows, int width, uint32_t threshold,     \
        float kept                                                                                                 \
    ) {                                                                                                            \
        dropout<T>(x, keys, y, rows, width, threshold, kept);                                                      \
    }                                                                                                              \
    EXPORT void add_layer_norm_##name(                                                                             \
        const T::Element* x, const T::Element* residual, const T::Element* weight, const T::Element* bias,         \
        T::Element* y, int64_t rows, int width, float eps                                                          \
    ) {                                                                                                            \
        add_layer_norm<T>(x, residual, weight, bias, y, rows, width, eps);                                         \
    }                                                                                                              \
    EXPORT void dropout_add_layer_norm_##name(                                                                     \
        const T::Element* x, const void* x_bias, const void* residual, const uint64_t* keys, const void* weight,   \
        const void* bias, void* y, int wide, int64_t rows, int width, float eps, uint32_t threshold, float scale   \
    ) {                                                                                                            \
        const auto of = [&](auto r) {                                                                              \
            using R = decltype(r);                                                                                 \
            using E = typename R::Element;                                                                         \
            const Sums<T, R> sums{x, (const E*)x_bias, (const E*)residual, keys, width, eps, threshold, scale};    \
            forward(sums, (const E*)weight, (const E*)bias, (E*)y, rows);                                          \
        };                                                                                                         \
        wide ? of(Float32()) : of(T());                                                                            \
    }                                                                                                              \
    EXPORT void add_layer_norm_backward_##name(                                                                    \
        const T::Element* x, const void* x_bias, const void* residual, const uint64_t* keys, const void* weight,   \
        const void* dy, T::Element* dx, void* dresidual, float* parts, int wide, int64_t rows, int width,          \
        float eps, uint32_t threshold, float scale                                                                 \
    ) {                                                                                                            \
        const auto of = [&](auto r) {                                                                              \
            using R = decltype(r);                                                                                 \
            using E = typename R::Element;                                                                         \
            const Sums<T, R> sums{x, (const E*)x_bias, (const E*)residual, keys, width, eps, threshold, scale};    \
            backward(sums, (const E*)weight, (const E*)dy, dx, (E*)dresidual, parts, rows);                        \
        };                                                                                                         \
        wide ? of(Float32()) : of(T());                                                                            \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
