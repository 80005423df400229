// Embeddings for training: three look-ups, their sum, LayerNorm and dropout, and the gradients of the tables. All
// gradients are float32. `embedding.py` calls them.
//
//     z = word[ids] + segment[types] + position[places],  xhat = (z - mean) * rstd
//     y = dropout(xhat * weight + bias)
//     d = dy where kept, scaled,  g = d * weight,  dz = rstd * (g - mean(g) - xhat * mean(g * xhat))
//     dweight, dbias = sums over rows of d * xhat and of d;  dword[ids] += dz, and so on
//
// The gradient of a table is added up row after row by the thread that owns some of its columns, so its bits do not
// depend on the number of threads.

#include <vector>

#include "attention.h"

namespace {

template <class T>
struct Lookups {
    using Element = typename T::Element;
    const int64_t *ids, *types, *places;
    const Element *word, *segment, *position, *weight;
    const uint64_t* keys;  // of rows, or null where nothing is dropped
    int width;
    float eps;
    uint32_t threshold;
    float scale;

    __m512 kept(int64_t row, int i, __m512 x) const {
        if (!keys) return x;
        const __m512i low = _mm512_set1_epi32((int)keys[row]), high = _mm512_set1_epi32((int)(keys[row] >> 32));
        const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __mmask16 mask = keep_mask(low, high, _mm512_add_epi32(lanes, _mm512_set1_epi32(i)), threshold);
        return _mm512_maskz_mul_ps(mask, x, _mm512_set1_ps(scale));
    }

    // xhat of this row; returns rstd.
    float normalise(int64_t row, float* xhat) const {
        const Element *a = word + ids[row] * width, *b = segment + types[row] * width;
        const Element* c = position + places[row] * width;
        auto z = [&](int i) { return _mm512_add_ps(_mm512_add_ps(T::load(a + i), T::load(b + i)), T::load(c + i)); };
        const Moments m = moments_of_row(z, width, eps);
        for (int i = 0; i < width; i += WIDTH) {
            const __m512 centred = _mm512_sub_ps(_mm512_sub_ps(z(i), m.mean), m.rest);
            _mm512_storeu_ps(xhat + i, _mm512_mul_ps(centred, _mm512_set1_ps(m.rstd)));
        }
        return m.rstd;
    }
};

// Do all indices lie in tables of sizes[0], [1] and [2] rows?
template <class T>
bool lie_in_tables(const Lookups<T>& of, int64_t rows, const int64_t* sizes) {
    bool fit = true;
    for (int64_t row = 0; row < rows; ++row)
        fit &= (uint64_t)of.ids[row] < (uint64_t)sizes[0] && (uint64_t)of.types[row] < (uint64_t)sizes[1] &&
            (uint64_t)of.places[row] < (uint64_t)sizes[2];
    return fit;
}

template <class T>
int forward(
    const Lookups<T>& of, const typename T::Element* bias, typename T::Element* y, int64_t rows, const int64_t* sizes
) {
    if (!lie_in_tables(of, rows, sizes)) return 1;
    const int width = of.width;
#pragma omp parallel
    {
        std::vector<float> xhat(width);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            of.normalise(row, xhat.data());
            for (int i = 0; i < width; i += WIDTH) {
                const __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(&xhat[i]), T::load(of.weight + i), T::load(bias + i));
                T::store(y + row * width + i, of.kept(row, i, x));
            }
        }
    }
    return 0;
}

// dz [rows, width] is for work; parts [blocks, 2, width] zeros, whose first block becomes (dweight, dbias); gradients of
// tables are zeros, or null where none is wanted. The row padding_idx of dword stays zero.
template <class T>
int backward(
    const Lookups<T>& of, const typename T::Element* dy, float* dz, float* parts, float* dword, float* dsegment,
    float* dposition, int64_t rows, const int64_t* sizes, int64_t padding_idx
) {
    if (!lie_in_tables(of, rows, sizes)) return 1;
    const int width = of.width;
    const int64_t blocks = (rows + NORM_BLOCK - 1) / NORM_BLOCK;
#pragma omp parallel
    {
        std::vector<float> xhat(width);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            float *dweight = parts + block * 2 * width, *dbias = dweight + width;
            const int64_t end = std::min(rows, (block + 1) * NORM_BLOCK);
            for (int64_t row = block * NORM_BLOCK; row < end; ++row) {
                float* to = dz + row * width;
                const __m512 rstd = _mm512_set1_ps(of.normalise(row, xhat.data()));
                __m512 sum = _mm512_setzero_ps(), with_xhat = _mm512_setzero_ps();
                for (int i = 0; i < width; i += WIDTH) {
                    const __m512 d = of.kept(row, i, T::load(dy + row * width + i)), h = _mm512_loadu_ps(&xhat[i]);
                    const __m512 g = _mm512_mul_ps(d, T::load(of.weight + i));
                    sum = _mm512_add_ps(sum, g);
                    with_xhat = _mm512_fmadd_ps(g, h, with_xhat);
                    _mm512_storeu_ps(dweight + i, _mm512_fmadd_ps(d, h, _mm512_loadu_ps(dweight + i)));
                    _mm512_storeu_ps(dbias + i, _mm512_add_ps(d, _mm512_loadu_ps(dbias + i)));
                    _mm512_storeu_ps(to + i, g);
                }
                const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
                const __m512 slope = _mm512_set1_ps(_mm512_reduce_add_ps(with_xhat) / width);
                for (int i = 0; i < width; i += WIDTH) {
                    const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(to + i), mean);
                    const __m512 left = _mm512_fnmadd_ps(_mm512_loadu_ps(&xhat[i]), slope, centred);
                    _mm512_storeu_ps(to + i, _mm512_mul_ps(left, rstd));
                }
            }
        }
#pragma omp for schedule(static)
        for (int i = 0; i < 2 * width; i += WIDTH) {
            __m512 sum = _mm512_loadu_ps(parts + i);
            for (int64_t block = 1; block < blocks; ++block)
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(parts + block * 2 * width + i));
            _mm512_storeu_ps(parts + i, sum);
        }
        auto add = [&](float* table, const int64_t* indices, int64_t row, int i) {
            if (!table) return;
            float* to = table + indices[row] * width + i;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_loadu_ps(dz + row * width + i)));
        };
#pragma omp for schedule(static)
        for (int i = 0; i < width; i += WIDTH)
            for (int64_t row = 0; row < rows; ++row) {
                if (of.ids[row] != padding_idx) add(dword, of.ids, row, i);
                add(dsegment, of.types, row, i);
                add(dposition, of.places, row, i);
            }
    }
    return 0;
}

}  // namespace

#define EXPORT_FOR(T, name)                                                                                         \
    EXPORT int embedding_training_##name(                                                                           \
        const int64_t* ids, const int64_t* types, const int64_t* places, const T::Element* word,                    \
        const T::Element* segment, const T::Element* position, const T::Element* weight, const T::Element* bias,    \
        const uint64_t* keys, T::Element* y, int64_t rows, const int64_t* sizes, int width, float eps,              \
        uint32_t threshold, float scale                                                                             \
    ) {                                                                                                             \
        return forward<T>({ids, types, places, word, segment, position, weight, keys, width, eps, threshold, scale}, \
                          bias, y, rows, sizes);                                                                    \
    }                                                                                                               \
    EXPORT int embedding_backward_##name(                                                                           \
        const int64_t* ids, const int64_t* types, const int64_t* places, const T::Element* word,                    \
        const T::Element* segment, const T::Element* position, const T::Element* weight, const uint64_t* keys,      \
        const T::Element* dy, float* dz, float* parts, float* dword, float* dsegment, float* dposition,             \
        int64_t rows, const int64_t* sizes, int64_t padding_idx, int width, float eps, uint32_t threshold,          \
        float scale                                                                                                 \
    ) {                                                                                                             \
        return backward<T>({ids, types, places, word, segment, position, weight, keys, width, eps, threshold, scale}, \
                           dy, dz, parts, dword, dsegment, dposition, rows, sizes, padding_idx);                    \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
