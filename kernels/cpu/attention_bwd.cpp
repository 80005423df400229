// The gradients of packed attention, one head at a time:
//     p = exp(scale q k^T - shift) factor   dv = dropout(p)^T do,   shift and factor: softmax_stats of the forward
//     dp = dropout'(do v^T)                 ds = p * (dp - delta),  delta = rowsum(do * o)
//     dq = scale ds k                       dk = scale ds^T q
// delta is also rowsum(p * dp). With few keys it is computed in that way: if one key has nearly all of the probability,
// dp and delta are nearly equal, and the rounding error of o would dominate ds.
// Everything is computed transposed, with a row for each key and a column for each query. So shift, factor and delta
// are along a register, and p^T and ds^T are left operands of dv and dk without a transposition. Queries are laid out in
// blocks; for each, all blocks of keys are processed, and the results of two blocks stay in the core's own cache. dk and
// dv are summed in float32 over all queries, and over all heads that share them.

#include "attention_gradients.h"

namespace {

constexpr int QUERIES = 64;  // queries of a block
constexpr int KEYS = 96;     // keys of a block, a multiple of ROWS

// Memory for one head. Rows of elements are in T, all else is float32 or lanes of T.
template <class T>
struct Memory {
    using Element = typename T::Element;
    Element *k, *v;           // [keys, head_dim], zero past the last
    float* k_columns;         // [head_dim, key lanes]
    float *dk, *dv;           // [keys, head_dim]
    float *q, *d_o;           // a block, transposed [lanes, QUERIES]
    float *q_pairs, *do_pairs;  // [query lanes, head_dim]
    float* dq;                // transposed [head_dim, QUERIES]
    float *shift, *factor, *delta;  // [QUERIES]; the first two are softmax_stats
    uint32_t *low, *high;     // [QUERIES] halves of the rows' keys, for dropout
    Element *p, *ds;          // of a block of keys and one of queries: [KEYS, QUERIES]
    float* ds_pairs;          // [key lanes, QUERIES]
    int64_t key_lanes;        // length of a row of k_columns

    bool reserve(int length, int head_dim) {
        const size_t keys = round_up(length, ROWS), lanes = head_dim / T::PER_LANE;
        key_lanes = round_up((length + T::PER_LANE - 1) / T::PER_LANE, WIDTH);
        const size_t block = QUERIES * lanes, of_both = KEYS * QUERIES / T::PER_LANE;
        const size_t floats = 2 * keys * lanes + key_lanes * head_dim + 2 * keys * head_dim + 4 * block
            + (size_t)head_dim * QUERIES + 5 * QUERIES + 3 * of_both;
        if (!scratch.reserve(sizeof(float) * floats)) return false;
        Parts parts(scratch);
        const auto take = [&](size_t n) { return parts.floats(n); };
        k = (Element*)take(keys * lanes), v = (Element*)take(keys * lanes);
        k_columns = take(key_lanes * head_dim);
        dk = take(keys * head_dim), dv = take(keys * head_dim);
        q = take(block), d_o = take(block), q_pairs = take(block), do_pairs = take(block);
        dq = take((size_t)head_dim * QUERIES);
        shift = take(QUERIES), factor = take(QUERIES), delta = take(QUERIES);
        low = (uint32_t*)take(QUERIES), high = (uint32_t*)take(QUERIES);
        p = (Element*)take(of_both), ds = (Element*)take(of_both);
        ds_pairs = T::PER_LANE == 2 ? take(of_both) : (float*)ds;
        return true;
    }
};

// Stores two rows of ds, to their rows and as lanes of both.
inline void store_pair(Floats first, Floats second, uint16_t* rows, float* pairs) {
    store(rows, first);
    store(rows + QUERIES, second);
    store_ints(pairs, to_pairs(first, second));
}

// p^T and ds^T of ROWS keys, of which `real` exist, and N registers of queries from the block's query `column` on, which
// is number `query` of its sequence. whole: these are all keys of the sequence.
template <class T, int N, bool BOUNDED>
void tile(
    const Memory<T>& m, int key, int real, bool whole, int row, int column, int query, int lanes, Window window,
    float scale_log2, const Dropout* dropout
) {
    using Element = typename T::Element;
    const int head_dim = lanes * T::PER_LANE;
    Element* of_p = m.p + row * QUERIES + column;
    Element* of_ds = m.ds + row * QUERIES + column;
    float* of_pairs = m.ds_pairs + row / T::PER_LANE * QUERIES + column;
    alignas(64) float p[ROWS][N * WIDTH];
    Mask kept[ROWS][N];
    Floats sum[ROWS][N];

    if (dropout)
        for (int j = 0; j < N; ++j) {
            const Ints low = load_ints(m.low + column + j * WIDTH), high = load_ints(m.high + column + j * WIDTH);
            for (int i = 0; i < ROWS; ++i)
                kept[i][j] = keep_mask(low, high, ints(key + i), dropout->threshold);
        }

    multiply<T, ROWS, N>(m.k + (int64_t)key * head_dim, head_dim, m.q + column, QUERIES, lanes, sum);
    const Floats scale = floats(scale_log2);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            Floats x = exp2_of(fms(sum[i][j], scale, load(m.shift + column + j * WIDTH)));
            x = x * load(m.factor + column + j * WIDTH);
            if (i >= real) x = floats(0.0f);
            if constexpr (BOUNDED)
                x = keep(window.sees(ints(key + i - query - j * WIDTH) - lane_numbers()), x);
            store(p[i] + j * WIDTH, x);
            T::store(of_p + i * QUERIES + j * WIDTH, dropout ? keep(kept[i][j], x) : x);
        }

    multiply<T, ROWS, N>(m.v + (int64_t)key * head_dim, head_dim, m.d_o + column, QUERIES, lanes, sum);
    const Floats scale_kept = floats(dropout ? dropout->scale : 1.0f);
    if (dropout)
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sum[i][j] = keep(kept[i][j], sum[i][j] * scale_kept);
    if (whole)
        for (int j = 0; j < N; ++j) {
            Floats delta = floats(0.0f);
            for (int i = 0; i < ROWS; ++i) delta = fma(load(p[i] + j * WIDTH), sum[i][j], delta);
            store(m.delta + column + j * WIDTH, delta);
        }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
            sum[i][j] = load(p[i] + j * WIDTH) * (sum[i][j] - load(m.delta + column + j * WIDTH));
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i += T::PER_LANE)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
            if constexpr (T::PER_LANE == 2)
                store_pair(
                    sum[i][j], sum[i + 1][j], of_ds + i * QUERIES + j * WIDTH, of_pairs + i / 2 * QUERIES + j * WIDTH
                );
            else
                store(of_ds + i * QUERIES + j * WIDTH, sum[i][j]);
}

// Rounds the sums [head_dim, QUERIES] of one head and stores them, transposed, to rows with this stride.
template <class T>
void store_columns(const float* sums, int rows, int head_dim, float scale, typename T::Element* to, int64_t stride) {
    for (int row = 0; row < rows; row += WIDTH)
        for (int column = 0; column < head_dim; column += WIDTH) {
            Ints r[WIDTH];
            for (int i = 0; i < WIDTH; ++i) r[i] = load_ints(sums + (column + i) * QUERIES + row);
            transpose(r);
            for (int i = 0; i < std::min(WIDTH, rows - row); ++i)
                T::store(
                    to + (row + i) * stride + column, as_floats(r[i]) * floats(scale)
                );
        }
}

// Copies keys and values of one head [length, head_dim] into memory, and sets their gradients to zero.
template <class T>
void lay_out_keys(
    Memory<T>& m, const typename T::Element* k, int64_t k_token, const typename T::Element* v, int64_t v_token,
    int length, int head_dim
) {
    const int keys = round_up(length, ROWS), lanes = (length + T::PER_LANE - 1) / T::PER_LANE;
    for (int key = 0; key < keys; ++key)
        if (key < length) {
            copy_row(k + key * k_token, head_dim, m.k + (int64_t)key * head_dim);
            copy_row(v + key * v_token, head_dim, m.v + (int64_t)key * head_dim);
        } else {
            std::fill_n(m.k + (int64_t)key * head_dim, head_dim, typename T::Element(0));
            std::fill_n(m.v + (int64_t)key * head_dim, head_dim, typename T::Element(0));
        }
    lay_out_rows(m.k, head_dim, length, head_dim, m.dk);  // the memory of dk is still unused
    transpose_rows<Float32>(m.dk, head_dim, lanes, m.key_lanes, head_dim, m.k_columns);
    std::fill_n(m.dk, (int64_t)keys * head_dim, 0.0f);
    std::fill_n(m.dv, (int64_t)keys * head_dim, 0.0f);
}

// Computes dq of one block of queries, from number `query` on, and adds to dk and dv. q, do, o, dq, shifts and factors
// are those of the block's rows.
template <class T>
void block_of_queries(
    Memory<T>& m, const typename T::Element* q, int64_t q_token, const typename T::Element* d_o, int64_t do_token,
    const typename T::Element* o, int64_t o_token, typename T::Element* dq, int64_t dq_token, const float* shifts,
    const float* factors, int queries, int query, int length, int head_dim, Window window, float scale,
    const Dropout* dropout
) {
    const int columns = round_up(queries, WIDTH), lanes = head_dim / T::PER_LANE;
    const int query_lanes = (queries + T::PER_LANE - 1) / T::PER_LANE;
    transpose_rows<T>(q, q_token, queries, QUERIES, head_dim, m.q);
    transpose_rows<T>(d_o, do_token, queries, QUERIES, head_dim, m.d_o);
    lay_out_rows(q, q_token, queries, head_dim, m.q_pairs);
    lay_out_rows(d_o, do_token, queries, head_dim, m.do_pairs);
    for (int i = 0; i < queries; ++i) {
        Floats sum = floats(0.0f);
        for (int c = 0; c < head_dim; c += WIDTH)
            sum = fma(T::load(d_o + i * do_token + c), T::load(o + i * o_token + c), sum);
        m.delta[i] = sum_of(sum);
        m.shift[i] = shifts[i], m.factor[i] = factors[i];
    }
    // past the last query p is exp(-infinity) = 0
    std::fill(m.delta + queries, m.delta + columns, 0.0f);
    std::fill(m.shift + queries, m.shift + columns, std::numeric_limits<float>::infinity());
    std::fill(m.factor + queries, m.factor + columns, 1.0f);
    std::fill_n(m.dq, head_dim * QUERIES, 0.0f);

    // only keys that at least one of these queries sees
    const int begin = std::max(0, query - window.left) / KEYS * KEYS, end = std::min(length, query + queries + window.right);
    const auto tiles = [&](auto bounded, int first, int keys, int rows) {
        for (int row = 0; row < rows; row += ROWS)
            over_registers<BLOCK_REGISTERS>(columns, [&](auto registers, int column) {
                tile<T, registers, bounded>(
                    m, first + row, keys - row, length <= ROWS, row, column, query + column, lanes, window,
                    scale * LOG2_E, dropout
                );
            });
    };
    for (int first = begin; first < end; first += KEYS) {
        const int keys = std::min(KEYS, length - first), rows = round_up(keys, ROWS);
        if (window.is_bounded())
            tiles(std::true_type(), first, keys, rows);
        else
            tiles(std::false_type(), first, keys, rows);
        float* dv = m.dv + (int64_t)first * head_dim;
        float* dk = m.dk + (int64_t)first * head_dim;
        add_product<T>(m.p, QUERIES, m.do_pairs, head_dim, query_lanes, dv, head_dim, rows, head_dim);
        add_product<T>(m.ds, QUERIES, m.q_pairs, head_dim, query_lanes, dk, head_dim, rows, head_dim);
        add_product<T>(
            (const typename T::Element*)(m.k_columns + first / T::PER_LANE), m.key_lanes * T::PER_LANE, m.ds_pairs,
            QUERIES, (keys + T::PER_LANE - 1) / T::PER_LANE, m.dq, QUERIES, head_dim, columns
        );
    }
    store_columns<T>(m.dq, queries, head_dim, scale, dq, dq_token);
}

template <class T>
int backward(
    const typename T::Element* d_o, const typename T::Element* q, const typename T::Element* k,
    const typename T::Element* v, const typename T::Element* o, const float* softmax_stats,  // in
    typename T::Element* dq, typename T::Element* dk, typename T::Element* dv,                         // out
    int64_t dq_token, int64_t dk_token, const int32_t* starts, const int32_t* starts_k, int sequences, int64_t tokens,
    int64_t tokens_k, int heads, int kv_heads, int head_dim, int64_t do_token, int64_t do_head, int64_t q_token,
    int64_t q_head, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, Window window, float scale,
    const Dropout* dropout
) {
    if (!are_sequences(starts, sequences, tokens) || !are_sequences(starts_k, sequences, tokens_k))
        return NOT_SEQUENCES;
    const int64_t o_token = (int64_t)heads * head_dim;
    const int group = heads / kv_heads;
    bool failed = false;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int sequence = 0; sequence < sequences; ++sequence)
        for (int kv_head = 0; kv_head < kv_heads; ++kv_head) {
            const int64_t start = starts[sequence], start_k = starts_k[sequence];
            const int rows = starts[sequence + 1] - starts[sequence];
            const int length = starts_k[sequence + 1] - starts_k[sequence];
            Memory<T> m;
            if (rows == 0 && length == 0) continue;
            if (!m.reserve(length, head_dim)) {
                failed = true;
                continue;
            }
            lay_out_keys(
                m, k + start_k * k_token + kv_head * k_head, k_token, v + start_k * v_token + kv_head * v_head, v_token,
                length, head_dim
            );
            for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
                for (int row = 0; row < rows; row += QUERIES) {
                    const int queries = std::min(QUERIES, rows - row);
                    const int64_t token = start + row, of_head = (int64_t)head * head_dim;
                    const float* shifts = softmax_stats + head * tokens + token;
                    if (dropout)
                        for (int i = 0; i < queries; ++i) {
                            const uint64_t key = row_key(*dropout, sequence, head, row + i);
                            m.low[i] = (uint32_t)key, m.high[i] = (uint32_t)(key >> 32);
                        }
                    block_of_queries(
                        m, q + token * q_token + head * q_head, q_token, d_o + token * do_token + head * do_head,
                        do_token, o + token * o_token + of_head, o_token, dq + token * dq_token + of_head, dq_token, shifts,
                        shifts + heads * tokens, queries, row, length, head_dim, window, scale, dropout
                    );
                }
            const int64_t of_k = start_k * dk_token + (int64_t)kv_head * head_dim;
            store_rows<T>(m.dk, length, head_dim, scale, dk + of_k, dk_token);
            store_rows<T>(m.dv, length, head_dim, dropout ? dropout->scale : 1.0f, dv + of_k, dk_token);
        }
    return failed ? NO_MEMORY : DONE;
}

}  // namespace

// dq_token, dk_token: the row stride of dq, and that of dk and dv.
#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int attention_backward_##name(                                                                          \
        const T::Element* d_o, const T::Element* q, const T::Element* k, const T::Element* v, const T::Element* o, \
        const float* softmax_stats, T::Element* dq, T::Element* dk, T::Element* dv, int64_t dq_token,              \
        int64_t dk_token, const int32_t* starts, const int32_t* starts_k, int sequences, int64_t tokens,           \
        int64_t tokens_k, int heads, int kv_heads, int head_dim, int64_t do_token, int64_t do_head,                \
        int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head,         \
        int left, int right, float scale, const Dropout* dropout                                                   \
    ) {                                                                                                            \
        return backward<T>(d_o, q, k, v, o, softmax_stats, dq, dk, dv, dq_token, dk_token, starts, starts_k,       \
                           sequences, tokens, tokens_k, heads, kv_heads, head_dim, do_token, do_head, q_token,     \
                           q_head, k_token, k_head, v_token, v_head, Window{left, right}, scale, dropout);         \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
