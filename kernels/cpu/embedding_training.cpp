// Embeddings for training: three look-ups, their sum, LayerNorm and dropout, and the gradients of the tables. All
// gradients are float32. `embedding.py` calls them.
//
//     z = word[ids] + segment[types] + position[places],  xhat = (z - mean) * rstd
//     y = dropout(xhat * weight + bias)
//     d = dy where kept, scaled,  g = d * weight,  dz = rstd * (g - mean(g) - xhat * mean(g * xhat))
//     dweight, dbias = sums over rows of d * xhat and of d;  dword[ids] += dz, and so on
//
// Each thread computes the gradients of some columns of a table, one row after the other, so their bits do not depend
// on the number of threads.

#include <vector>

#include "attention.h"

namespace {

template <class T>
struct Lookups {
    using Element = typename T::Element;
    const int64_t *ids, *types, *places;
    const Element *word, *segment, *position, *weight;
    const uint64_t* keys;  // dropout keys of rows, or null without dropout
    int width;
    float eps;
    uint32_t threshold;
    float scale;

    Floats kept(int64_t row, int i, Floats x) const {
        if (!keys) return x;
        const Mask mask = keep_mask(ints(keys[row]), ints(keys[row] >> 32), lane_numbers() + ints(i), threshold);
        return keep(mask, x * floats(scale));
    }

    // Computes xhat of this row; returns rstd.
    float normalise(int64_t row, float* xhat) const {
        const Element *a = word + ids[row] * width, *b = segment + types[row] * width;
        const Element* c = position + places[row] * width;
        auto z = [&](int i) { return T::load(a + i) + T::load(b + i) + T::load(c + i); };
        const Moments m = moments_of_row(z, width, eps);
        for (int i = 0; i < width; i += WIDTH) {
            const Floats centred = z(i) - m.mean - m.rest;
            store(xhat + i, centred * floats(m.rstd));
        }
        return m.rstd;
    }
};

// Whether all indices are inside tables of sizes[0], [1] and [2] rows.
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
                const Floats x = fma(load(&xhat[i]), T::load(of.weight + i), T::load(bias + i));
                T::store(y + row * width + i, of.kept(row, i, x));
            }
        }
    }
    return 0;
}

// Sets a table of this many elements to zero. All threads of a parallel region call this; there is no barrier after it.
void clear(float* table, int64_t size) {
    constexpr int64_t PIECE = 1 << 16;
#pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < size; first += PIECE)
        std::memset(table + first, 0, sizeof(float) * std::min(PIECE, size - first));
}

// Sets those rows to zero that may be other than zero, and says so in `touched`. Called like `clear`.
void clear_touched(float* table, uint8_t* touched, int64_t rows, int width) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; ++row) {
        if (touched[row]) std::memset(table + row * width, 0, sizeof(float) * width);
        touched[row] = 0;
    }
}

// dz [rows, width] is working memory. parts [blocks, 2, width] must be zeros; its first block becomes (dweight, dbias).
// All elements of the tables' gradients are written; null for those not wanted. The row padding_idx of dword is zero.
// touched: null, or for each row of dword whether it may be other than zero, before and after; other rows are not written.
template <class T>
int backward(
    const Lookups<T>& of, const typename T::Element* dy, float* dz, float* parts, float* dword, float* dsegment,
    float* dposition, uint8_t* touched, int64_t rows, const int64_t* sizes, int64_t padding_idx
) {
    if (!lie_in_tables(of, rows, sizes)) return 1;
    const int width = of.width;
    const int64_t blocks = (rows + NORM_BLOCK - 1) / NORM_BLOCK;
    float* tables[] = {dword, dsegment, dposition};
#pragma omp parallel
    {
        for (int i = 0; i < 3; ++i) {
            if (tables[i] && i == 0 && touched) clear_touched(dword, touched, sizes[0], width);
            else if (tables[i]) clear(tables[i], sizes[i] * width);
        }
        std::vector<float> xhat(width);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < blocks; ++block) {
            float *dweight = parts + block * 2 * width, *dbias = dweight + width;
            const int64_t end = std::min(rows, (block + 1) * NORM_BLOCK);
            for (int64_t row = block * NORM_BLOCK; row < end; ++row) {
                float* to = dz + row * width;
                const Floats rstd = floats(of.normalise(row, xhat.data()));
                Floats sum = floats(0.0f), with_xhat = floats(0.0f);
                for (int i = 0; i < width; i += WIDTH) {
                    const Floats d = of.kept(row, i, T::load(dy + row * width + i)), h = load(&xhat[i]);
                    const Floats g = d * T::load(of.weight + i);
                    sum += g;
                    with_xhat = fma(g, h, with_xhat);
                    store(dweight + i, fma(d, h, load(dweight + i)));
                    store(dbias + i, d + load(dbias + i));
                    store(to + i, g);
                }
                const Floats mean = floats(sum_of(sum) / width);
                const Floats slope = floats(sum_of(with_xhat) / width);
                for (int i = 0; i < width; i += WIDTH) {
                    const Floats centred = load(to + i) - mean;
                    const Floats left = fnma(load(&xhat[i]), slope, centred);
                    store(to + i, left * rstd);
                }
            }
        }
#pragma omp for schedule(static)
        for (int i = 0; i < 2 * width; i += WIDTH) {
            Floats sum = load(parts + i);
            for (int64_t block = 1; block < blocks; ++block)
                sum += load(parts + block * 2 * width + i);
            store(parts + i, sum);
        }
#pragma omp single nowait
        for (int64_t row = 0; row < (touched ? rows : 0); ++row)
            if (of.ids[row] != padding_idx) touched[of.ids[row]] = 1;
        auto add = [&](float* table, const int64_t* indices, int64_t row, int i) {
            if (!table) return;
            float* to = table + indices[row] * width + i;
            store(to, load(to) + load(dz + row * width + i));
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
        uint8_t* touched, int64_t rows, const int64_t* sizes, int64_t padding_idx, int width, float eps,            \
        uint32_t threshold, float scale                                                                             \
    ) {                                                                                                             \
        return backward<T>({ids, types, places, word, segment, position, weight, keys, width, eps, threshold, scale}, \
                           dy, dz, parts, dword, dsegment, dposition, touched, rows, sizes, padding_idx);           \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
