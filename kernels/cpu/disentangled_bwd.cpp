// The gradients of disentangled attention, one head at a time, with all sequences of a head one after another:
//     p, dp, ds as in attention_bwd.cpp, with both terms of distances in the scores
//     dq[i] = scale sum_j ds[i, j] (k[j] + pk[lut[i - j]])      dpk[r] = scale sum of ds[i, j] q[i], lut[i - j] = r
//     dk[j] = scale sum_i ds[i, j] (q[i] + pq[lut[i - j]])      dpq[r] = scale sum of ds[i, j] k[j], lut[i - j] = r
// delta is the mean of dp over the keys, weighted by p, from a pass of its own before the gradients. It is not computed
// as rowsum(do * o): if dp hardly differs between keys, the rounding error of o would dominate ds.
// A block of ds is stored twice, with a row for each key and with a row for each query. Its rows have zeros on both
// sides. So the same memory, read with a row stride that is one element larger, is the block arranged by entries of a
// table (see disentangled.h). The term of dk with pq is that matrix times the entries of pq, and the block's part of dpq
// is its transpose times k; the same holds for dq and dpk.
// Gradients of entries are summed in float32 over all sequences, and then over the distances that share a row of the
// table. One thread processes all of a head, so results do not depend on the number of threads.

#include "attention_gradients.h"
#include "disentangled.h"

namespace {

constexpr int GAP = 16;                // zeros on both sides of a row of ds
constexpr int DS_ROW = BLOCK + 2 * GAP;

// The entries of one head of a table. Rows of elements are in T, all else is float32 or lanes of T.
template <class T>
struct Table {
    typename T::Element* rows;  // [entries, head_dim]
    float *columns, *pairs;     // [lanes, entries], [entries / 2, head_dim]; in float32 `pairs` are the rows
    float* sums;                // [entries, head_dim], sums of the gradient
};

template <class T>
struct Memory {
    using Element = typename T::Element;
    Table<T> pk, pq;
    float* of_rows;             // [rows of a table, head_dim], sums of a gradient
    Element *k, *v;             // [keys, head_dim], zero past the last
    float* k_pairs;             // [key lanes, head_dim]
    float *dk, *dv;             // [keys, head_dim]
    Element* q_rows;            // a block [BLOCK, head_dim], zero past the last
    float *q, *d_o;             // a block, transposed [lanes, BLOCK]
    float *q_pairs, *do_pairs;  // [query lanes, head_dim]
    float* dq;                  // [BLOCK, head_dim]
    float *shift, *factor, *delta, *total;  // [BLOCK]: softmax_stats, and sums of p dp and of p
    uint32_t *low, *high;       // [BLOCK] halves of the rows' keys, for dropout
    Element* p;                 // a block of keys and one of queries: [BLOCK, BLOCK], a row for each key
    Element *ds, *ds_of_queries;  // [BLOCK, DS_ROW], with a row for each key, and for each query
    float* ds_pairs;            // [key lanes, BLOCK]
    float* sheared;             // [lanes, DS_ROW], pairs of rows of ds
    float *band, *turned, *added;  // [BLOCK_ROWS, BAND], [BLOCK, BLOCK], [BLOCK, BLOCK]: products with entries

    bool reserve(const Entries& entries, int table_rows, int head_dim) {
        const size_t keys = round_up(entries.longest, ROWS), lanes = head_dim / T::PER_LANE, width = head_dim;
        const size_t count = entries.count, square = BLOCK * BLOCK, ds_floats = (BLOCK + 1) * (size_t)DS_ROW;
        const size_t floats = 2 * (3 * count * lanes + count * width) + table_rows * width + 3 * keys * lanes + width
            + 2 * keys * width + 5 * BLOCK * lanes + width + BLOCK * width + 6 * BLOCK + 4 * square + 3 * ds_floats
            + BLOCK_ROWS * BAND + 64;
        if (!scratch.reserve(sizeof(float) * floats)) return false;
        Parts parts(scratch);
        const auto take = [&](size_t n) { return parts.floats(n); };
        for (Table<T>* t : {&pk, &pq}) {
            t->rows = (Element*)take(count * lanes), t->columns = take(count * lanes);
            t->pairs = T::PER_LANE == 2 ? take(count * lanes) : (float*)t->rows;
            t->sums = take(count * width);
        }
        of_rows = take(table_rows * width);
        k = (Element*)take(keys * lanes), v = (Element*)take(keys * lanes);
        k_pairs = take(keys * lanes + width);  // width more, because an odd last row has a lane of its own
        dk = take(keys * width), dv = take(keys * width);
        q_rows = (Element*)take(BLOCK * lanes);
        q = take(BLOCK * lanes), d_o = take(BLOCK * lanes);
        q_pairs = take(BLOCK * lanes), do_pairs = take(BLOCK * lanes);
        dq = take(BLOCK * width);
        shift = take(BLOCK), factor = take(BLOCK), delta = take(BLOCK), total = take(BLOCK);
        low = (uint32_t*)take(BLOCK), high = (uint32_t*)take(BLOCK);
        p = (Element*)take(square), ds_pairs = take(square), turned = take(square), added = take(square);
        ds = (Element*)take(ds_floats), ds_of_queries = (Element*)take(ds_floats), sheared = take(ds_floats);
        band = take(BLOCK_ROWS * BAND);
        std::fill_n((float*)ds, ds_floats, 0.0f), std::fill_n((float*)ds_of_queries, ds_floats, 0.0f);
        return true;
    }
};

template <class T>
void lay_out_table(
    Table<T>& t, const typename T::Element* table, int64_t stride, const int32_t* lut, const Entries& entries,
    int sign, int head_dim
) {
    lay_out_entries<T>(table, stride, lut, entries, sign, head_dim, t.rows);
    transpose_rows<T>(t.rows, head_dim, entries.count, entries.count, head_dim, t.columns);
    if constexpr (T::PER_LANE == 2) pair_rows(t.rows, head_dim, entries.count, head_dim, t.pairs);
    std::fill_n(t.sums, (int64_t)entries.count * head_dim, 0.0f);
}

inline void store_ds(Floats first, Floats second, uint16_t* rows, float* pairs) {
    store(rows, first);
    store(rows + DS_ROW, second);
    store_ints(pairs, to_pairs(first, second));
}
inline void store_ds(Floats first, Floats second, float* rows, float* pairs) {
    store(rows, first), store(rows + DS_ROW, second);
    store(pairs, first), store(pairs + BLOCK, second);
}

// p^T and ds^T of ROWS keys, of which `real` exist, and N registers of queries from the block's query `column` on.
// of_keys: m.band has k pq of these keys. of_queries: m.added has q pk, with a row for each key. With OF_DELTA, p dp and p
// are added to delta and total, and nothing else is stored.
template <class T, bool OF_DELTA, int N>
void tile(
    const Memory<T>& m, int key, int real, int row, int column, int lanes, float scale_log2, const Dropout* dropout,
    bool of_keys, bool of_queries
) {
    using Element = typename T::Element;
    const int head_dim = lanes * T::PER_LANE;
    Element* of_p = m.p + row * BLOCK + column;
    Element* of_ds = m.ds + row * DS_ROW + GAP + column;
    float* of_pairs = m.ds_pairs + row / T::PER_LANE * BLOCK + column;
    alignas(64) float p[ROWS][N * WIDTH];
    Mask kept[ROWS][N];
    Floats sum[ROWS][N];

    if (dropout)
        for (int j = 0; j < N; ++j) {
            const Ints low = load_ints(m.low + column + j * WIDTH), high = load_ints(m.high + column + j * WIDTH);
            for (int i = 0; i < ROWS; ++i)
                kept[i][j] = keep_mask(low, high, ints(key + i), dropout->threshold);
        }

    multiply<T, ROWS, N>(m.k + (int64_t)key * head_dim, head_dim, m.q + column, BLOCK, lanes, sum);
    if (of_keys)
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sum[i][j] += load(m.band + i * BAND + column + j * WIDTH + ROWS - 1 - i);
    if (of_queries)
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sum[i][j] += load(m.added + (row + i) * BLOCK + column + j * WIDTH);
    const Floats scale = floats(scale_log2);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            Floats x = exp2_of(fms(sum[i][j], scale, load(m.shift + column + j * WIDTH)));
            x = x * load(m.factor + column + j * WIDTH);
            if (i >= real) x = floats(0.0f);
            store(p[i] + j * WIDTH, x);
            if constexpr (!OF_DELTA) T::store(of_p + i * BLOCK + j * WIDTH, dropout ? keep(kept[i][j], x) : x);
        }

    multiply<T, ROWS, N>(m.v + (int64_t)key * head_dim, head_dim, m.d_o + column, BLOCK, lanes, sum);
    if (dropout) {
        const Floats scale_kept = floats(dropout->scale);
#pragma GCC unroll 6
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sum[i][j] = keep(kept[i][j], sum[i][j] * scale_kept);
    }
    if constexpr (OF_DELTA) {
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            Floats delta = load(m.delta + column + j * WIDTH), total = load(m.total + column + j * WIDTH);
#pragma GCC unroll 6
            for (int i = 0; i < ROWS; ++i) {
                const Floats x = load(p[i] + j * WIDTH);
                delta = fma(x, sum[i][j], delta), total = total + x;
            }
            store(m.delta + column + j * WIDTH, delta), store(m.total + column + j * WIDTH, total);
        }
        return;
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
            sum[i][j] = load(p[i] + j * WIDTH) * (sum[i][j] - load(m.delta + column + j * WIDTH));
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; i += 2)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
            store_ds(
                sum[i][j], sum[i + 1][j], of_ds + i * DS_ROW + j * WIDTH, of_pairs + i / T::PER_LANE * BLOCK + j * WIDTH
            );
}

// Pairs adjacent rows of ds in lanes, the second row shifted by one column, so that a lane has one entry of the table.
inline const float* shear(const uint16_t* ds, int rows, int columns, float* to) {
    for (int row = 0; row < rows; row += 2)
        for (int column = 0; column < 2 * GAP + round_up(columns, WIDTH); column += WIDTH) {
            const uint16_t* from = ds + row * DS_ROW + column;
            store_ints(to + row / 2 * DS_ROW + column, widen(from) | widen(from + DS_ROW + 1) << 16);
        }
    return to;
}
inline const float* shear(const float* ds, int, int, float*) { return ds; }

// c [ROWS, N registers] += a^T b, with a [lanes, ROWS] of stride a_stride and b [lanes, N registers].
template <class T, int N>
void add_transposed_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int lanes, float* c) {
    Floats sum[ROWS][N];
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = floats(0.0f);
    for (int lane = 0; lane < lanes; ++lane) {
        const auto* of_a = (const typename T::Element*)(a + lane * a_stride);
        add_products<T, ROWS, N, 0>(of_a, T::PER_LANE, b + lane * b_stride, sum);
        if constexpr (T::PARTS == 2) add_products<T, ROWS, N, 1>(of_a, T::PER_LANE, b + lane * b_stride, sum);
    }
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) {
            float* to = c + i * b_stride + j * WIDTH;
            store(to, load(to) + sum[i][j]);
        }
}

// Adds the products of a block of ds [rows, columns]. `gradient`, that of its rows, gets the products with x_pairs, the
// inputs of its columns, and with the entries of the table. The gradient of the table gets the products with y_pairs, the
// inputs of its rows. entry: the entry of its first row and column. rows is even, and ds is surrounded by zeros.
template <class T>
void add_gradients(
    const typename T::Element* ds, int rows, int columns, const float* x_pairs, const float* y_pairs,
    const Table<T>* table, int entry, int head_dim, float* gradient, float* sheared
) {
    constexpr int PER_LANE = T::PER_LANE;
    ds += GAP;
    add_product<T>(
        ds, DS_ROW, x_pairs, head_dim, (columns + PER_LANE - 1) / PER_LANE, gradient, head_dim, rows, head_dim
    );
    if (!table) return;

    const auto of_entries = [&](auto m, int row) {
        constexpr int M = m;
        const int first = entry - (row + M - 1), odd = first % PER_LANE;  // a lane begins with an even entry
        const int lanes = (columns + M - 1 + odd + PER_LANE - 1) / PER_LANE;
        add_rows<T, M>(
            ds + row * DS_ROW - (M - 1) - odd, DS_ROW + 1, table->pairs + (int64_t)(first - odd) / PER_LANE * head_dim,
            head_dim, lanes, gradient + row * head_dim, head_dim, head_dim
        );
    };
    int row = 0;
    for (; row + ROWS <= rows; row += ROWS) of_entries(std::integral_constant<int, ROWS>(), row);
    for (; row < rows; row += 2) of_entries(std::integral_constant<int, 2>(), row);

    const float* lanes = shear(ds - GAP, rows, columns, sheared) + GAP;
    for (int step = 1 - rows; step < columns; step += ROWS) {  // distance from `entry`
        const int begin = std::max(0, 1 - ROWS - step) / PER_LANE;  // first row whose column is in the block
        const int end = (std::min(rows, columns - step) + PER_LANE - 1) / PER_LANE;
        float* sums = table->sums + (int64_t)(entry + step) * head_dim;
        over_registers<BLOCK_REGISTERS>(head_dim, [&](auto registers, int column) {
            add_transposed_tile<T, registers>(
                lanes + step + begin * (DS_ROW + PER_LANE), DS_ROW + PER_LANE,
                y_pairs + (int64_t)begin * head_dim + column, head_dim, end - begin, sums + column
            );
        });
    }
}

// Copies keys and values of one head [length, head_dim] into memory, and sets their gradients to zero.
template <class T>
void lay_out_keys(
    Memory<T>& m, const typename T::Element* k, int64_t k_token, const typename T::Element* v, int64_t v_token,
    int length, int head_dim
) {
    const int64_t keys = round_up(length, ROWS), real = (int64_t)length * head_dim;
    for (int key = 0; key < length; ++key) {
        copy_row(k + key * k_token, head_dim, m.k + (int64_t)key * head_dim);
        copy_row(v + key * v_token, head_dim, m.v + (int64_t)key * head_dim);
    }
    for (auto* to : {m.k, m.v}) std::fill(to + real, to + keys * head_dim, typename T::Element(0));
    lay_out_rows(m.k, head_dim, (int)keys, head_dim, m.k_pairs);
    std::fill_n(m.dk, keys * head_dim, 0.0f);
    std::fill_n(m.dv, keys * head_dim, 0.0f);
}

// Sets the rows of ds past `columns` to zero, as far as `add_gradients` reads them.
template <class E>
void clear_after(E* ds, int rows, int columns) {
    if (columns < BLOCK)
        for (int row = 0; row < rows; ++row) std::fill_n(ds + row * DS_ROW + GAP + columns, GAP, E(0));
}

// Computes dq of one block of queries of one sequence, from `row` on, and adds to dk, dv and the tables' gradients. q,
// d_o, dq, shifts and factors are those of the block's rows.
template <class T>
void block_of_queries(
    Memory<T>& m, const Entries& entries, const typename T::Element* q, int64_t q_token,
    const typename T::Element* d_o, int64_t do_token, typename T::Element* dq, int64_t o_token, const float* shifts, const float* factors, int row, int queries, int length, int head_dim,
    float scale, const Dropout* dropout, bool has_pk, bool has_pq
) {
    using Element = typename T::Element;
    const int columns = round_up(queries, WIDTH), lanes = head_dim / T::PER_LANE, even = round_up(queries, 2);
    for (int i = 0; i < queries; ++i) copy_row(q + i * q_token, head_dim, m.q_rows + i * head_dim);
    std::fill(m.q_rows + queries * head_dim, m.q_rows + BLOCK * head_dim, Element(0));
    transpose_rows<T>(q, q_token, queries, BLOCK, head_dim, m.q);
    transpose_rows<T>(d_o, do_token, queries, BLOCK, head_dim, m.d_o);
    lay_out_rows(m.q_rows, head_dim, even, head_dim, m.q_pairs);
    lay_out_rows(d_o, do_token, queries, head_dim, m.do_pairs);
    for (int i = 0; i < queries; ++i) m.shift[i] = shifts[i], m.factor[i] = factors[i];
    // past the last query p is exp(-infinity) = 0
    std::fill_n(m.delta, columns, 0.0f), std::fill_n(m.total, columns, 0.0f);
    std::fill(m.shift + queries, m.shift + columns, std::numeric_limits<float>::infinity());
    std::fill(m.factor + queries, m.factor + columns, 1.0f);
    std::fill_n(m.dq, even * head_dim, 0.0f);

    const auto tiles = [&](auto is_of_delta, int first) {  // processes the keys of a block, from `first` on
        constexpr bool of_delta = is_of_delta;
        const int keys = std::min(BLOCK, length - first), rows = round_up(keys, ROWS);
        if (has_pk) {
            for (int i = 0; i < columns; i += ROWS) {
                band_of_rows<T, ROWS>(
                    m.q_rows + i * head_dim, head_dim, m.pk.columns + entries.middle + first - (row + i + ROWS - 1),
                    entries.count, lanes, rows + ROWS - 1, m.band, BAND
                );
                for (int t = 0; t < ROWS; ++t)
                    for (int j = 0; j < rows; j += WIDTH)
                        store(m.turned + (i + t) * BLOCK + j, load(m.band + t * BAND + j + ROWS - 1 - t));
            }
            transpose_block(m.turned, BLOCK, columns, rows, m.added, BLOCK);  // to a row for each key
        }
        for (int key = 0; key < rows; key += ROWS) {
            if (has_pq)
                band_of_rows<T, ROWS>(
                    m.k + (int64_t)(first + key) * head_dim, head_dim,
                    m.pq.columns + entries.middle + row - (first + key + ROWS - 1), entries.count, lanes,
                    columns + ROWS - 1, m.band, BAND
                );
            over_registers<BLOCK_REGISTERS>(columns, [&](auto registers, int column) {
                tile<T, of_delta, registers>(
                    m, first + key, keys - key, key, column, lanes, scale * LOG2_E, dropout, has_pq, has_pk
                );
            });
        }
    };
    for (int first = 0; first < length; first += BLOCK) tiles(std::true_type(), first);
    for (int i = 0; i < queries; ++i) m.delta[i] /= m.total[i];  // the sum of p is 1, except for rounding
    for (int first = 0; first < length; first += BLOCK) {
        const int keys = std::min(BLOCK, length - first), rows = round_up(keys, ROWS);
        tiles(std::false_type(), first);
        clear_after(m.ds, rows, columns);
        // a row for each query, with lanes of adjacent keys; keys past the last are zero
        const int key_lanes = rows / T::PER_LANE, all_lanes = round_up(key_lanes, WIDTH);
        std::fill(m.ds_pairs + key_lanes * BLOCK, m.ds_pairs + all_lanes * BLOCK, 0.0f);
        transpose_block(
            m.ds_pairs, BLOCK, key_lanes, columns, (float*)(m.ds_of_queries + GAP), DS_ROW / T::PER_LANE
        );
        clear_after(m.ds_of_queries, columns, all_lanes * T::PER_LANE);

        const int64_t of_keys = (int64_t)first * head_dim, key_pairs = of_keys / T::PER_LANE;
        add_product<T>(
            m.p, BLOCK, m.do_pairs, head_dim, (queries + T::PER_LANE - 1) / T::PER_LANE, m.dv + of_keys, head_dim,
            rows, head_dim
        );
        add_gradients<T>(
            m.ds, rows, queries, m.q_pairs, m.k_pairs + key_pairs, has_pq ? &m.pq : nullptr,
            entries.middle + row - first, head_dim, m.dk + of_keys, m.sheared
        );
        add_gradients<T>(
            m.ds_of_queries, even, rows, m.k_pairs + key_pairs, m.q_pairs, has_pk ? &m.pk : nullptr,
            entries.middle + first - row, head_dim, m.dq, m.sheared
        );
    }
    store_rows<T>(m.dq, queries, head_dim, scale, dq, o_token);
}

// The gradient of one head of a table: the gradients of entries are summed for each row of the table.
template <class T>
void store_table(
    const Table<T>& t, const int32_t* lut, const Entries& entries, int sign, int rows, int head_dim, float scale,
    float* of_rows, typename T::Element* to, int64_t stride
) {
    std::fill_n(of_rows, (int64_t)rows * head_dim, 0.0f);
    for (int distance = 1 - entries.longest; distance < entries.longest; ++distance) {
        const float* sums = t.sums + (int64_t)(entries.middle + sign * distance) * head_dim;
        float* row = of_rows + (int64_t)lut[entries.longest - 1 + distance] * head_dim;
        for (int column = 0; column < head_dim; column += WIDTH)
            store(row + column, load(row + column) + load(sums + column));
    }
    store_rows<T>(of_rows, rows, head_dim, scale, to, stride);
}

template <class T>
int backward(
    const typename T::Element* d_o, const typename T::Element* q, const typename T::Element* k,
    const typename T::Element* v, const typename T::Element* pk, const typename T::Element* pq, const int32_t* lut,
    const float* softmax_stats,                                                                     // in
    typename T::Element* dq, typename T::Element* dk, typename T::Element* dv, typename T::Element* dpk,
    typename T::Element* dpq,                                                                       // out
    const int32_t* starts, int sequences, int64_t tokens, int heads, int head_dim, int reach, int table_rows,
    int64_t do_token, int64_t do_head, int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head,
    int64_t v_token, int64_t v_head, float scale, const Dropout* dropout
) {
    if (!fit(lut, reach, table_rows, starts, sequences, tokens)) return NOT_SEQUENCES;
    const Entries entries(longest_of(starts, sequences));
    lut += reach - entries.longest;
    const int64_t o_token = (int64_t)heads * head_dim;
    bool failed = false;
#pragma omp parallel for schedule(dynamic)
    for (int head = 0; head < heads; ++head) {
        Memory<T> m;
        if (!m.reserve(entries, table_rows, head_dim)) {
            failed = true;
            continue;
        }
        const int64_t of_head = (int64_t)head * head_dim;
        if (pk) lay_out_table(m.pk, pk + of_head, o_token, lut, entries, -1, head_dim);
        if (pq) lay_out_table(m.pq, pq + of_head, o_token, lut, entries, 1, head_dim);
        for (int sequence = 0; sequence < sequences; ++sequence) {
            const int64_t start = starts[sequence];
            const int length = starts[sequence + 1] - starts[sequence];
            lay_out_keys(m, k + start * k_token + head * k_head, k_token, v + start * v_token + head * v_head, v_token,
                         length, head_dim);
            for (int row = 0; row < length; row += BLOCK) {
                const int queries = std::min(BLOCK, length - row);
                const int64_t token = start + row, of_o = token * o_token + of_head;
                const float* shifts = softmax_stats + head * tokens + token;
                if (dropout)
                    for (int i = 0; i < queries; ++i) {
                        const uint64_t key = row_key(*dropout, sequence, head, row + i);
                        m.low[i] = (uint32_t)key, m.high[i] = (uint32_t)(key >> 32);
                    }
                block_of_queries(
                    m, entries, q + token * q_token + head * q_head, q_token, d_o + token * do_token + head * do_head,
                    do_token, dq + of_o, o_token, shifts, shifts + heads * tokens, row, queries, length,
                    head_dim, scale, dropout, pk != nullptr, pq != nullptr
                );
            }
            store_rows<T>(m.dk, length, head_dim, scale, dk + start * o_token + of_head, o_token);
            store_rows<T>(
                m.dv, length, head_dim, dropout ? dropout->scale : 1.0f, dv + start * o_token + of_head, o_token
            );
        }
        if (pk)
            store_table(m.pk, lut, entries, -1, table_rows, head_dim, scale, m.of_rows, dpk + of_head, o_token);
        if (pq)
            store_table(m.pq, lut, entries, 1, table_rows, head_dim, scale, m.of_rows, dpq + of_head, o_token);
    }
    return failed ? NO_MEMORY : DONE;
}

}  // namespace

#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int disentangled_attention_backward_##name(                                                             \
        const T::Element* d_o, const T::Element* q, const T::Element* k, const T::Element* v, const T::Element* pk,\
        const T::Element* pq, const int32_t* lut, const float* softmax_stats, T::Element* dq,                      \
        T::Element* dk, T::Element* dv, T::Element* dpk, T::Element* dpq, const int32_t* starts, int sequences,    \
        int64_t tokens, int heads, int head_dim, int reach, int table_rows, int64_t do_token, int64_t do_head,     \
        int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head,         \
        float scale, const Dropout* dropout                                                                        \
    ) {                                                                                                            \
        return backward<T>(d_o, q, k, v, pk, pq, lut, softmax_stats, dq, dk, dv, dpk, dpq, starts, sequences,   \
                           tokens, heads, head_dim, reach, table_rows, do_token, do_head, q_token, q_head, k_token,\
                           k_head, v_token, v_head, scale, dropout);                                               \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
