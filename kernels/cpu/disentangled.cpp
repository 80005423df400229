// Disentangled attention of packed sequences, one head at a time:
//     s[i, j] = scale (q[i] k[j] + q[i] pk[lut[i - j]] + k[j] pq[lut[i - j]])     o = dropout(softmax(s)) v
// The method is that of attention.cpp, with the same softmax, dropout and product with v. The products of keys with pq
// have a row for each key, so they are computed for a block of queries, transposed, and added to the scores; those of
// queries with pk are computed for the same few rows as the scores. `disentangled.py` calls this.

#include "disentangled.h"

namespace {

constexpr int ROWS = BLOCK_ROWS;  // rows of queries, or of keys, that are computed at a time

// The tables of all heads as columns [heads, lanes, entries]; null without that table.
struct Tables {
    float *keys = nullptr, *queries = nullptr;
    ~Tables() { std::free(keys), std::free(queries); }
};

// Lays out one table for all heads. Returns false if there is no memory.
template <class T>
bool columns_of(
    const typename T::Element* table, const int32_t* lut, const Entries& entries, int sign, int heads, int head_dim,
    float** columns
) {
    if (!table) return true;
    const int64_t lanes = head_dim / T::PER_LANE, of_head = lanes * entries.count;
    *columns = (float*)std::aligned_alloc(64, (sizeof(float) * of_head * heads + 63) / 64 * 64);
    bool failed = !*columns;
    if (failed) return false;
#pragma omp parallel for schedule(dynamic) reduction(|| : failed)
    for (int head = 0; head < heads; ++head) {
        if (!scratch.reserve(sizeof(float) * of_head)) {
            failed = true;
            continue;
        }
        auto* rows = (typename T::Element*)Parts(scratch).floats(of_head);
        lay_out_entries<T>(table + head * head_dim, (int64_t)heads * head_dim, lut, entries, sign, head_dim, rows);
        transpose_rows<T>(rows, head_dim, entries.count, entries.count, head_dim, *columns + head * of_head);
    }
    return !failed;
}

// The inputs for the rows of one head of a sequence, and memory for their results.
template <class T>
struct Head {
    using Element = typename T::Element;
    const Element *q, *k;          // rows with strides q_token and k_token
    int64_t q_token, k_token;
    const float *of_keys, *of_queries;  // columns of the tables, or null
    float *keys_transposed;        // [lanes, keys]
    const float* values;           // pairs of rows with stride v_stride
    int64_t v_stride;
    float *scores, *band, *added, *turned;  // [ROWS, keys], [ROWS, keys + 2 WIDTH], [BLOCK, keys], [BLOCK, BLOCK]
    Element* p;                    // [ROWS, keys]
    int length, keys, head_dim;    // keys: the length, rounded up to whole registers
};

// h.added [rows, keys] = k[j] pq[lut[i - j]] for `rows` queries from `row` on, computed for ROWS keys at a time.
template <class T>
void add_of_keys(const Head<T>& h, const Entries& entries, int row, int rows) {
    const int lanes = h.head_dim / T::PER_LANE;
    alignas(64) float band[ROWS * BAND];
    for (int first = 0; first < h.length; first += BLOCK) {
        const int keys = std::min(BLOCK, h.length - first);
        const auto tile = [&](auto m, int key) {
            constexpr int M = m;
            const int entry = entries.middle + row - (first + key + M - 1);
            band_of_rows<T, M>(
                h.k + (first + key) * h.k_token, h.k_token, h.of_queries + entry, entries.count, lanes, rows + M - 1,
                band, BAND
            );
            for (int i = 0; i < M; ++i)
                for (int j = 0; j < rows; j += WIDTH)
                    store(h.turned + (key + i) * BLOCK + j, load(band + i * BAND + j + M - 1 - i));
        };
        int key = 0;
        for (; key + ROWS <= keys; key += ROWS) tile(std::integral_constant<int, ROWS>(), key);
        for (; key < keys; ++key) tile(std::integral_constant<int, 1>(), key);
        transpose_block(h.turned, BLOCK, keys, rows, h.added + first, h.keys);
    }
}

// Scores of M rows with N registers of keys from `key` on, and the maximum of each row and lane. added: for these rows.
template <class T, int M, int N>
[[gnu::noinline]] void score_tile(
    const Head<T>& h, const typename T::Element* q, int key, const float* added, bool is_last, Mask tail,
    Floats (&most)[M]
) {
    Floats sum[M][N];
    multiply<T, M, N>(q, h.q_token, h.keys_transposed + key, h.keys, h.head_dim / T::PER_LANE, sum);
    if (h.of_keys)
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j)
                sum[i][j] += load(h.band + i * (h.keys + 2 * WIDTH) + key + j * WIDTH + M - 1 - i);
    if (added)
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sum[i][j] += load(added + i * h.keys + key + j * WIDTH);
    if (is_last)
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i)
            sum[i][N - 1] = choose(tail, sum[i][N - 1], floats(-std::numeric_limits<float>::infinity()));
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            store(h.scores + i * h.keys + key + j * WIDTH, sum[i][j]);
            most[i] = maximum(most[i], sum[i][j]);
        }
}

// o of M queries from `row` on. added: for these rows, or null.
template <class T, int M>
void rows_of_head(
    const Head<T>& h, const Entries& entries, int row, const float* added, float scale_log2, const Dropout* dropout,
    const uint64_t* row_keys, typename T::Element* o, int64_t o_stride, float* shifts, float* factors
) {
    const int keys = h.keys, lanes = h.head_dim / T::PER_LANE;
    const typename T::Element* q = h.q + row * h.q_token;
    if (h.of_keys)
        band_of_rows<T, M>(
            q, h.q_token, h.of_keys + entries.middle - (row + M - 1), entries.count, lanes, h.length + M - 1, h.band,
            keys + 2 * WIDTH
        );
    const Mask tail = first_lanes(h.length - (keys - WIDTH));
    Floats most[M];
    for (int i = 0; i < M; ++i) most[i] = floats(-std::numeric_limits<float>::infinity());
    over_registers<BLOCK_REGISTERS>(keys, [&](auto registers, int key) {
        score_tile<T, M, registers>(h, q, key, added, key + registers * WIDTH == keys, tail, most);
    });
    float factor[M];
    for (int i = 0; i < M; ++i) {
        float shift;
        if (T::PER_LANE == 2 && !shifts)  // all results are rounded to bfloat16
            factor[i] = softmax<T, 3>(h.scores + i * keys, most[i], h.p + i * keys, keys, tail, scale_log2, &shift);
        else
            factor[i] = softmax<T, 6>(h.scores + i * keys, most[i], h.p + i * keys, keys, tail, scale_log2, &shift);
        if (shifts) shifts[i] = shift, factors[i] = factor[i];
        if (dropout) {
            drop<T>(h.p + i * keys, keys, 0, row_keys[i], dropout->threshold);
            factor[i] *= dropout->scale;
        }
    }
    const int pairs = (h.length + T::PER_LANE - 1) / T::PER_LANE;
    over_registers<BLOCK_REGISTERS>(h.head_dim, [&](auto registers, int column) {
        value_tile<T, M, registers>(h.p, keys, h.values + column, h.v_stride, pairs, factor, o + column, o_stride);
    });
}

template <class T>
int disentangled_attention(
    const typename T::Element* q, const typename T::Element* k, const typename T::Element* v,
    const typename T::Element* pk, const typename T::Element* pq, const int32_t* lut,  // in
    typename T::Element* o, float* softmax_stats,                                      // out
    const int32_t* starts, int sequences, int64_t tokens, int heads, int head_dim, int reach, int table_rows,
    int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, float scale,
    const Dropout* dropout
) {
    using Element = typename T::Element;
    if (!fit(lut, reach, table_rows, starts, sequences, tokens)) return NOT_SEQUENCES;
    const Entries entries(longest_of(starts, sequences));
    lut += reach - entries.longest;  // now begins with the least distance that occurs
    Tables tables;
    if (!columns_of<T>(pk, lut, entries, -1, heads, head_dim, &tables.keys)
        || !columns_of<T>(pq, lut, entries, 1, heads, head_dim, &tables.queries))
        return NO_MEMORY;
    const int64_t o_token = (int64_t)heads * head_dim, of_head = (int64_t)head_dim / T::PER_LANE * entries.count;
    bool failed = false;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int sequence = 0; sequence < sequences; ++sequence)
        for (int head = 0; head < heads; ++head) {
            const int64_t start = starts[sequence];
            const int length = starts[sequence + 1] - starts[sequence];
            if (length == 0) continue;
            const int keys = round_up(length, WIDTH);
            const size_t of_keys = (size_t)keys * head_dim / T::PER_LANE, band = ROWS * (size_t)(keys + 2 * WIDTH);
            const size_t added = pq ? BLOCK * (size_t)keys : 0, turned = pq ? BLOCK * BLOCK : 0;
            if (!scratch.reserve(sizeof(float) * (2 * of_keys + 2 * ROWS * (size_t)keys + band + added + turned))) {
                failed = true;
                continue;
            }
            Head<T> h{q + start * q_token + head * q_head, k + start * k_token + head * k_head, q_token, k_token};
            h.of_keys = pk ? tables.keys + head * of_head : nullptr;
            h.of_queries = pq ? tables.queries + head * of_head : nullptr;
            h.length = length, h.keys = keys, h.head_dim = head_dim;
            Parts parts(scratch);
            const auto take = [&](size_t n) { return parts.floats(n); };
            h.keys_transposed = take(of_keys);
            float* values_paired = take(of_keys);
            h.scores = take(ROWS * (size_t)keys), h.p = (Element*)take(ROWS * (size_t)keys);
            h.band = take(band), h.added = take(added), h.turned = take(turned);

            transpose_rows<T>(h.k, k_token, length, keys, head_dim, h.keys_transposed);
            const Element* of_values = v + start * v_token + head * v_head;
            h.values = (const float*)of_values, h.v_stride = v_token;
            if constexpr (T::PER_LANE == 2) {
                pair_rows(of_values, v_token, length, head_dim, values_paired);
                h.values = values_paired, h.v_stride = head_dim;
            }
            Element* out = o + start * o_token + (int64_t)head * head_dim;
            uint64_t row_keys[ROWS];
            for (int row = 0; row < length; row += ROWS) {
                const int n = std::min(ROWS, length - row);
                if (pq && row % BLOCK == 0) add_of_keys(h, entries, row, std::min(BLOCK, length - row));
                const float* of_rows = pq ? h.added + row % BLOCK * keys : nullptr;
                float* shifts = softmax_stats ? softmax_stats + head * tokens + start + row : nullptr;
                float* factors = softmax_stats ? shifts + heads * tokens : nullptr;
                if (dropout)
                    for (int i = 0; i < n; ++i) row_keys[i] = row_key(*dropout, sequence, head, row + i);
#define OF_ROWS(M)                                                                                                 \
    case M:                                                                                                        \
        rows_of_head<T, M>(h, entries, row, of_rows, scale * LOG2_E, dropout, row_keys, out + row * o_token,       \
                           o_token, shifts, factors);                                                              \
        break;
                switch (n) { OF_ROWS(6) OF_ROWS(5) OF_ROWS(4) OF_ROWS(3) OF_ROWS(2) OF_ROWS(1) }
#undef OF_ROWS
            }
        }
    return failed ? NO_MEMORY : DONE;
}

}  // namespace

#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int disentangled_attention_##name(                                                                      \
        const T::Element* q, const T::Element* k, const T::Element* v, const T::Element* pk, const T::Element* pq, \
        const int32_t* lut, T::Element* o, float* softmax_stats, const int32_t* starts, int sequences,             \
        int64_t tokens, int heads, int head_dim, int reach, int table_rows, int64_t q_token, int64_t q_head,       \
        int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, float scale, const Dropout* dropout      \
    ) {                                                                                                            \
        return disentangled_attention<T>(q, k, v, pk, pq, lut, o, softmax_stats, starts, sequences, tokens, heads, \
                                         head_dim, reach, table_rows, q_token, q_head, k_token, k_head, v_token,   \
                                         v_head, scale, dropout);                                                  \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
