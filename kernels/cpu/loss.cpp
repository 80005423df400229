// The passes over logits between the products of the masked-word loss, one forward and one backward. Logits are stored as
// z[word][row], so that each SIMD lane sums over the vocabulary for one row. `loss.py` calls them.

#include "simd.h"

#include <cstring>

namespace {

constexpr int PANEL = 2;  // registers of rows that are processed at a time, a cache line in bfloat16

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// Updates the statistics of earlier words with z = logits + bias of `words` words from `first` on: the maximum of each
// row, the sum of exp(z - greatest), the sum of z, and the label's z. `rows` is a multiple of PANEL registers.
template <class T>
void sum_logits(
    const typename T::Element* logits, const typename T::Element* bias, const int32_t* labels, float* greatest,
    float* sums, float* totals, float* of_label, int first, int words, int rows
) {
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row += PANEL * WIDTH) {
        Floats most[PANEL], sum[PANEL], total[PANEL], labelled[PANEL], before[PANEL];
        Ints label[PANEL];
        auto z = [&](int word, int j) {
            const Floats of_bias = bias ? floats(widen(bias[first + word])) : floats(0.0f);
            return T::load(logits + (int64_t)word * rows + row + j * WIDTH) + of_bias;
        };
        for (int j = 0; j < PANEL; ++j) {
            most[j] = before[j] = load(greatest + row + j * WIDTH);
            labelled[j] = load(of_label + row + j * WIDTH);
            label[j] = load_ints(labels + row + j * WIDTH);
            sum[j] = total[j] = floats(0.0f);
        }

        for (int word = 0; word < words; ++word)
            for (int j = 0; j < PANEL; ++j) most[j] = maximum(z(word, j), most[j]);  // ignores NaN, which reaches the sum

        for (int word = 0; word < words; ++word)
            for (int j = 0; j < PANEL; ++j) {
                const Floats of_word = z(word, j), below = of_word - most[j];
                sum[j] += exp2_of(below * floats(LOG2_E));
                total[j] += of_word;
                const Mask here = are_equal(label[j], ints(first + word));
                labelled[j] = choose(here, of_word, labelled[j]);
            }

        for (int j = 0; j < PANEL; ++j) {
            const int at = row + j * WIDTH;
            const Floats risen = (before[j] - most[j]) * floats(LOG2_E);
            sum[j] = fma(load(sums + at), exp2_of(risen), sum[j]);
            store(greatest + at, most[j]);
            store(sums + at, sum[j]);
            store(totals + at, load(totals + at) + total[j]);
            store(of_label + at, labelled[j]);
        }
    }
}

// dz = (exp(z - greatest) / sum - (1 - smoothing) onehot(label) - a_word) * dloss; dbias is its sum over rows.
template <class T>
void logit_gradients(
    const typename T::Element* logits, const typename T::Element* bias, const int32_t* labels, const float* greatest,
    const float* log2_sums, const float* dloss, typename T::Element* dz, float* dbias, int first, int words, int rows,
    float smoothing, float a_word
) {
#pragma omp parallel for schedule(static)
    for (int word = 0; word < words; ++word) {
        const Floats of_bias = bias ? floats(widen(bias[first + word])) : floats(0.0f);
        const Ints number = ints(first + word);
        Floats sum = floats(0.0f);
        for (int row = 0; row < rows; row += WIDTH) {
            const int64_t at = (int64_t)word * rows + row;
            const Floats below = T::load(logits + at) + of_bias - load(greatest + row);
            Floats p = exp2_of(fms(below, floats(LOG2_E), load(log2_sums + row)));
            const Mask here = are_equal(load_ints(labels + row), number);
            p = choose(here, p - floats(1.0f - smoothing), p);
            const Floats d = (p - floats(a_word)) * load(dloss + row);
            sum += d;
            T::store(dz + at, d);
        }
        dbias[first + word] = sum_of(sum);
    }
}

}  // namespace

#define EXPORT_FOR(T, name)                                                                                           \
    EXPORT void sum_logits_##name(                                                                                    \
        const T::Element* logits, const T::Element* bias, const int32_t* labels, float* greatest, float* sums,        \
        float* totals, float* of_label, int first, int words, int rows                                                \
    ) {                                                                                                               \
        sum_logits<T>(logits, bias, labels, greatest, sums, totals, of_label, first, words, rows);                    \
    }                                                                                                                 \
    EXPORT void logit_gradients_##name(                                                                               \
        const T::Element* logits, const T::Element* bias, const int32_t* labels, const float* greatest,                \
        const float* log2_sums, const float* dloss, T::Element* dz, float* dbias, int first, int words, int rows,     \
        float smoothing, float a_word                                                                                 \
    ) {                                                                                                               \
        logit_gradients<T>(                                                                                           \
            logits, bias, labels, greatest, log2_sums, dloss, dz, dbias, first, words, rows, smoothing, a_word        \
        );                                                                                                            \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
