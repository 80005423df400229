// Packed attention, one head at a time. K of a head is transposed once, in blocks of KEYS keys, so that a register has the
// same element of several keys. Then, for six rows of queries at a time, all scores, the softmax in place, dropout and the
// product with V are computed. All data of a head stays in the core's own cache. `attention.py` calls this.
//
// softmax_stats [2, heads, tokens] lets the backward pass compute a row's probabilities from its scores: the maximum of
// the scaled scores in log2 units, and 1 / the sum of exp2(score - maximum). One number, lse, would be rounded like the
// scores: at scores of 10,000 all probabilities of a row would be wrong by 5e-4.

#include "attention.h"
#include "team.h"

namespace {

constexpr int ROWS = BLOCK_ROWS;  // query rows that are computed at a time
constexpr int KEYS = BLOCK_REGISTERS * WIDTH;  // keys whose scores are computed at a time
// Length from which on float32 values are copied, so that they are contiguous: every six rows of queries read all of them.
constexpr int FAR_APART = 640;

// scores [M, keys] of M rows of q, with stride q_stride, and N registers of keys, k [lanes, k_stride]. most: updated with
// the maximum of each row and lane. tail: which lanes of the last register are keys. This and `value_tile` are separate
// functions because, inlined into their caller, the compiler kept constants of the softmax in registers and the sums of
// these loops in memory.
template <class T, int M, int N>
[[gnu::noinline]] void score_tile(
    const typename T::Element* q, int64_t q_stride, const float* k, int64_t k_stride, int lanes, int keys,
    float* scores, bool is_last, Mask tail, Floats (&most)[M]
) {
    Floats sum[M][N];
    multiply<T, M, N>(q, q_stride, k, k_stride, lanes, sum);
    if (is_last)
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i)
            sum[i][N - 1] = choose(tail, sum[i][N - 1], floats(-std::numeric_limits<float>::infinity()));
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            store(scores + i * keys + j * WIDTH, sum[i][j]);
            most[i] = maximum(most[i], sum[i][j]);
        }
}

// Replaces the scores [keys] that this row does not see with minus infinity; returns the maximum of each lane. first: the
// number of the first key.
inline Floats keep_seen(float* scores, int keys, int first, int row, Window window) {
    const Floats none = floats(-std::numeric_limits<float>::infinity());
    Floats most = none;
    Ints key_less_row = lane_numbers() + ints(first - row);
    for (int j = 0; j < keys; j += WIDTH) {
        const Floats x = choose(window.sees(key_less_row), load(scores + j), none);
        store(scores + j, x);
        most = maximum(most, x);
        key_less_row += WIDTH;
    }
    return most;
}

// M rows from `row` on with `length` keys from `first` on, a multiple of WIDTH. k: all keys of the sequence, k_count with
// the zeros behind them; v begins with key `first`.
template <class T, int M>
void rows_of_head(
    const typename T::Element* q, int64_t q_stride, const float* k, int k_count, const float* v,
    int64_t v_stride, int row, int first, int length, int head_dim, Window window, float scale_log2,
    const Dropout* dropout, const uint64_t* row_keys, float* scores, typename T::Element* p, typename T::Element* o,
    int64_t o_stride, float* shifts, float* factors
) {
    const int keys = round_up(length, WIDTH);
    const int lanes = head_dim / T::PER_LANE;
    const Mask tail = first_lanes(length - (keys - WIDTH));
    Floats most[M];
    for (int i = 0; i < M; ++i) most[i] = floats(-std::numeric_limits<float>::infinity());
    const auto scores_of = [&](auto registers, int key) {
        const int block = (first + key) / KEYS * KEYS;
        score_tile<T, M, registers>(
            q, q_stride, k + (int64_t)block * lanes + (first + key - block), std::min(KEYS, k_count - block), lanes, keys,
            scores + key, key + registers * WIDTH == keys, tail, most
        );
    };
    const int before = std::min((KEYS - first % KEYS) % KEYS, keys);  // keys before the first whole block
    over_registers<BLOCK_REGISTERS>(before, scores_of);
    over_registers<BLOCK_REGISTERS>(keys - before, [&](auto registers, int key) { scores_of(registers, before + key); });
    if (window.is_bounded())
        for (int i = 0; i < M; ++i) most[i] = keep_seen(scores + i * keys, keys, first, row + i, window);
    float factor[M];
    for (int i = 0; i < M; ++i) {
        float shift;
        if (T::PER_LANE == 2 && !shifts)  // all results are rounded to bfloat16
            factor[i] = softmax<T, 3>(scores + i * keys, most[i], p + i * keys, keys, tail, scale_log2, &shift);
        else
            factor[i] = softmax<T, 6>(scores + i * keys, most[i], p + i * keys, keys, tail, scale_log2, &shift);
        if (shifts) shifts[i] = shift, factors[i] = factor[i];
        if (dropout) {
            drop<T>(p + i * keys, keys, first, row_keys[i], dropout->threshold);
            factor[i] *= dropout->scale;
        }
    }
    const int pairs = (length + T::PER_LANE - 1) / T::PER_LANE;
    over_registers<BLOCK_REGISTERS>(head_dim, [&](auto registers, int column) {
        value_tile<T, M, registers>(p, keys, v + column, v_stride, pairs, factor, o + column, o_stride);
    });
}

template <class T>
int attention(
    const typename T::Element* q, const typename T::Element* k, const typename T::Element* v, typename T::Element* o,
    float* softmax_stats, const int32_t* starts, const int32_t* starts_k, int sequences, int64_t tokens,
    int64_t tokens_k, int heads, int kv_heads, int head_dim, int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head,
    int64_t v_token, int64_t v_head, Window window, float scale, const Dropout* dropout
) {
    using Element = typename T::Element;
    if (!are_sequences(starts, sequences, tokens) || !are_sequences(starts_k, sequences, tokens_k))
        return NOT_SEQUENCES;
    const int64_t o_token = (int64_t)heads * head_dim;
    std::atomic<bool> failed{false};
    Team::share(sequences * heads, [&](int chunk) {
        const int sequence = chunk / heads, head = chunk % heads;
        const int64_t start = starts[sequence], start_k = starts_k[sequence];
        const int queries = starts[sequence + 1] - starts[sequence];
        const int length = starts_k[sequence + 1] - starts_k[sequence];
        Element* out = o + start * o_token + (int64_t)head * head_dim;
        if (length == 0)  // no keys
            for (int row = 0; row < queries; ++row) std::fill_n(out + row * o_token, head_dim, Element(0));
        if (queries == 0 || length == 0) return;
        const int keys = round_up(length, WIDTH), kv_head = head / (heads / kv_heads);
        const int lanes = head_dim / T::PER_LANE;
        const size_t of_keys = (size_t)keys * lanes;  // floats of the keys, and of the values
        if (!scratch.reserve(sizeof(float) * (2 * of_keys + head_dim + 2 * ROWS * (size_t)keys))) {
            failed = true;
            return;
        }
        Parts parts(scratch);
        float* keys_transposed = parts.floats(of_keys);
        const bool copies = T::PER_LANE == 2 || length >= FAR_APART;
        float* values_copied = parts.floats(copies ? of_keys : 0);
        float* scores = parts.floats(ROWS * (size_t)keys);
        // float32 probabilities take the place of their scores
        Element* p = T::PER_LANE == 1 ? (Element*)scores : (Element*)parts.floats(ROWS * (size_t)keys / T::PER_LANE);

        const Element* keys_of_head = k + start_k * k_token + kv_head * k_head;
        for (int key = 0; key < length; key += KEYS)
            transpose_rows<T>(
                keys_of_head + key * k_token, k_token, std::min(KEYS, length - key), std::min(KEYS, keys - key), head_dim,
                keys_transposed + (int64_t)key * lanes
            );
        const Element* of_head = v + start_k * v_token + kv_head * v_head;
        const float* values = (const float*)of_head;
        int64_t v_stride = v_token;
        if (copies) {
            if constexpr (T::PER_LANE == 2)
                pair_rows(of_head, v_token, length, head_dim, values_copied);
            else
                for (int i = 0; i < length; ++i)
                    std::copy_n(of_head + i * v_token, head_dim, values_copied + (int64_t)i * head_dim);
            values = values_copied;
            v_stride = head_dim;
        }
        const Element* rows = q + start * q_token + head * q_head;
        // Meanwhile the next head, which this thread probably takes too, is prefetched.
        const int next = head + 1, next_kv = next / (heads / kv_heads);
        uint64_t row_keys[ROWS];
        for (int row = 0; row < queries; row += ROWS) {
            const int n = std::min(ROWS, queries - row);
            if (next < heads)
                for (int i = row; i < row + n; ++i)
                    for (int column = 0; column < head_dim; column += 64 / (int)sizeof(Element)) {
                        fetch(rows + i * q_token + q_head + column);
                        if (i >= length) continue;
                        fetch(keys_of_head + i * k_token + (next_kv - kv_head) * k_head + column);
                        fetch(of_head + i * v_token + (next_kv - kv_head) * v_head + column);
                    }
            // only keys that at least one of these rows sees
            const int first = std::max(0, row - window.left) / WIDTH * WIDTH;
            const int of_rows = std::min(length, row + n + window.right) - first;
            float* shifts = softmax_stats ? softmax_stats + head * tokens + start + row : nullptr;
            float* factors = softmax_stats ? shifts + heads * tokens : nullptr;
            if (dropout)
                for (int i = 0; i < n; ++i) row_keys[i] = row_key(*dropout, sequence, head, row + i);
#define OF_ROWS(M)                                                                                                 \
    case M:                                                                                                        \
        rows_of_head<T, M>(rows + row * q_token, q_token, keys_transposed, keys,                                   \
                       values + first / T::PER_LANE * v_stride, v_stride, row, first, of_rows, head_dim,       \
                       window, scale * LOG2_E, dropout, row_keys, scores, p, out + row * o_token, o_token,     \
                       shifts, factors);                                                                       \
        break;
            switch (n) { OF_ROWS(6) OF_ROWS(5) OF_ROWS(4) OF_ROWS(3) OF_ROWS(2) OF_ROWS(1) }
#undef OF_ROWS
        }
    });
    return failed ? NO_MEMORY : DONE;
}

}  // namespace

#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int attention_##name(                                                                                   \
        const T::Element* q, const T::Element* k, const T::Element* v, T::Element* o, float* softmax_stats,        \
        const int32_t* starts, const int32_t* starts_k, int sequences, int64_t tokens, int64_t tokens_k,           \
        int heads, int kv_heads, int head_dim, int64_t q_token, int64_t q_head, int64_t k_token,                   \
        int64_t k_head, int64_t v_token, int64_t v_head, int left, int right,                                      \
        float scale, const Dropout* dropout                                                                        \
    ) {                                                                                                            \
        return attention<T>(q, k, v, o, softmax_stats, starts, starts_k, sequences, tokens, tokens_k, heads,       \
                            kv_heads, head_dim, q_token, q_head, k_token, k_head, v_token, v_head,                 \
                            Window{left, right}, scale, dropout);                                                  \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
