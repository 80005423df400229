// What stands between the products of the masked-word loss: one pass over logits forward, one backward. Logits lie word
// by word, z[word][row], so that sums over the vocabulary go lane by lane. `loss.py` calls them.

#include "simd.h"

#include <cstring>

namespace {

constexpr int PANEL = 2;  // registers of rows at a time: a cache line in bfloat16

inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
}

// Of z = logits + bias, `words` words from `first` on, to what earlier words left: the greatest z of each row, the sum
// of exp(z - greatest), the sum of z, and the label's z. `rows` is a multiple of PANEL registers.
template <class T>
void sum_logits(
    const typename T::Element* logits, const typename T::Element* bias, const int32_t* labels, float* greatest,
    float* sums, float* totals, float* of_label, int first, int words, int rows
) {
#pragma omp parallel for schedule(static)
    for (int row = 0; row < rows; row += PANEL * WIDTH) {
        __m512 most[PANEL], sum[PANEL], total[PANEL], labelled[PANEL], before[PANEL];
        __m512i label[PANEL];
        auto z = [&](int word, int j) {
            const __m512 of_bias = bias ? _mm512_set1_ps(widen(bias[first + word])) : _mm512_setzero_ps();
            return _mm512_add_ps(T::load(logits + (int64_t)word * rows + row + j * WIDTH), of_bias);
        };
        for (int j = 0; j < PANEL; ++j) {
            most[j] = before[j] = _mm512_loadu_ps(greatest + row + j * WIDTH);
            labelled[j] = _mm512_loadu_ps(of_label + row + j * WIDTH);
            label[j] = _mm512_loadu_si512(labels + row + j * WIDTH);
            sum[j] = total[j] = _mm512_setzero_ps();
        }

        for (int word = 0; word < words; ++word)
            for (int j = 0; j < PANEL; ++j) most[j] = _mm512_max_ps(z(word, j), most[j]);  // NaN is left to the sum

        for (int word = 0; word < words; ++word)
            for (int j = 0; j < PANEL; ++j) {
                const __m512 of_word = z(word, j), below = _mm512_sub_ps(of_word, most[j]);
                sum[j] = _mm512_add_ps(sum[j], exp2_of_negative(_mm512_mul_ps(below, _mm512_set1_ps(LOG2_E))));
                total[j] = _mm512_add_ps(total[j], of_word);
                const __mmask16 here = _mm512_cmpeq_epi32_mask(label[j], _mm512_set1_epi32(first + word));
                labelled[j] = _mm512_mask_mov_ps(labelled[j], here, of_word);
            }

        for (int j = 0; j < PANEL; ++j) {
            const int at = row + j * WIDTH;
            const __m512 risen = _mm512_mul_ps(_mm512_sub_ps(before[j], most[j]), _mm512_set1_ps(LOG2_E));
            sum[j] = _mm512_fmadd_ps(_mm512_loadu_ps(sums + at), exp2_of_negative(risen), sum[j]);
            _mm512_storeu_ps(greatest + at, most[j]);
            _mm512_storeu_ps(sums + at, sum[j]);
            _mm512_storeu_ps(totals + at, _mm512_add_ps(_mm512_loadu_ps(totals + at), total[j]));
            _mm512_storeu_ps(of_label + at, labelled[j]);
        }
    }
}

// dz = (exp(z - lse) - (1 - smoothing) onehot(label) - a_word) * dloss, and dbias, its sums over rows.
template <class T>
void logit_gradients(
    const typename T::Element* logits, const typename T::Element* bias, const int32_t* labels, const float* lse,
    const float* dloss, typename T::Element* dz, float* dbias, int first, int words, int rows, float smoothing,
    float a_word
) {
#pragma omp parallel for schedule(static)
    for (int word = 0; word < words; ++word) {
        const __m512 of_bias = bias ? _mm512_set1_ps(widen(bias[first + word])) : _mm512_setzero_ps();
        const __m512i number = _mm512_set1_epi32(first + word);
        __m512 sum = _mm512_setzero_ps();
        for (int row = 0; row < rows; row += WIDTH) {
            const int64_t at = (int64_t)word * rows + row;
            const __m512 below = _mm512_sub_ps(_mm512_add_ps(T::load(logits + at), of_bias), _mm512_loadu_ps(lse + row));
            __m512 p = exp2_of_negative(_mm512_mul_ps(below, _mm512_set1_ps(LOG2_E)));
            const __mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(labels + row), number);
            p = _mm512_mask_sub_ps(p, here, p, _mm512_set1_ps(1.0f - smoothing));
            const __m512 d = _mm512_mul_ps(_mm512_sub_ps(p, _mm512_set1_ps(a_word)), _mm512_loadu_ps(dloss + row));
            sum = _mm512_add_ps(sum, d);
            T::store(dz + at, d);
        }
        dbias[first + word] = _mm512_reduce_add_ps(sum);
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
        const T::Element* logits, const T::Element* bias, const int32_t* labels, const float* lse, const float* dloss, \
        T::Element* dz, float* dbias, int first, int words, int rows, float smoothing, float a_word                   \
    ) {                                                                                                               \
        logit_gradients<T>(logits, bias, labels, lse, dloss, dz, dbias, first, words, rows, smoothing, a_word);       \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
