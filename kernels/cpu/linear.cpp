// Products with a bias and an activation, for inference, from the weight as it lies. `operators.py` calls them.
//
// Of few rows, every weight is read once and in order, and multiplied along the inner dimension: lanes are summed at the
// end. Of many rows, 64 columns at a time are transposed into the core's own cache, and six rows of x at a time go
// through them: 24 sums stay in registers, and 10 loads serve 24 multiplications.

#include <omp.h>

#include "simd.h"

namespace {

// Sums of the lanes of each of 16 registers, in one register.
inline __m512 sums_of_lanes(const __m512 of[WIDTH]) {
    __m512 t[WIDTH];
    for (int i = 0; i < WIDTH; i += 2)
        t[i / 2] = _mm512_add_ps(_mm512_unpacklo_ps(of[i], of[i + 1]), _mm512_unpackhi_ps(of[i], of[i + 1]));
    for (int i = 0; i < WIDTH / 2; i += 2) {
        const __m512d low = _mm512_castps_pd(t[i]), high = _mm512_castps_pd(t[i + 1]);
        t[i / 2] = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high))
        );
    }
    for (int n = WIDTH / 4; n > 1; n /= 2)
        for (int i = 0; i < n; i += 2)
            t[i / 2] = _mm512_add_ps(
                _mm512_shuffle_f32x4(t[i], t[i + 1], 0x88), _mm512_shuffle_f32x4(t[i], t[i + 1], 0xdd)
            );
    return t[0];
}

constexpr int ROWS_AS_THEY_LIE = 144;  // up to which transposing x does not pay
constexpr int AHEAD = 16384;  // bytes of the weight that are on their way from memory, a tile at least
constexpr int TILES = 4;  // of rows that share a pass of bias and activation: one alone would wait for each of its own steps
constexpr int TILE = 4;  // rows of x and rows of the weight at a time: 16 accumulators, 8 loads for 16 multiplications

// y = activation(x weight^T + bias): x [rows, inner], weight [columns, inner] as it is, y [rows, columns],
// its rows y_stride apart.
// For few rows, where much of the time goes into reading the weight: it is read once and in order, AHEAD of its use.
template <class T>
void linear_of_few_rows(
    const typename T::Element* x, const typename T::Element* weight, const typename T::Element* bias,
    typename T::Element* y, int64_t y_stride, int rows, int columns, int inner, int activation
) {
    using Element = typename T::Element;
    constexpr int STEP = WIDTH * T::PER_LANE;
    auto lanes = [](const Element* from) { return _mm512_castsi512_ps(_mm512_loadu_si512(from)); };
    const int ahead = std::max(AHEAD / (int)sizeof(Element), TILE * inner);
#pragma omp parallel for schedule(static)
    for (int column = 0; column < columns; column += TILE) {
        const Element* w = weight + (int64_t)column * inner;
        const __m512 of_bias = bias ? T::load_four(bias + column) : _mm512_setzero_ps();
        for (int block = 0; block < rows; block += TILES * TILE) {
            const int block_end = std::min(block + TILES * TILE, rows);
            __m512 result[TILES];
            for (int row = block; row < block_end; row += TILE) {
                // rows of the weight to fetch meanwhile
                const int first = row * TILE / rows, end = std::min(row + TILE, rows) * TILE / rows;
                const Element* of_row[TILE];  // past the last row its neighbour again, computed and not stored
                for (int i = 0; i < TILE; ++i) of_row[i] = x + (int64_t)std::min(row + i, rows - 1) * inner;
                __m512 sum[TILE * TILE];
#pragma GCC unroll 16
                for (int i = 0; i < TILE * TILE; ++i) sum[i] = _mm512_setzero_ps();
                for (int k = 0; k < inner; k += STEP) {
                    __m512 of_column[TILE];
#pragma GCC unroll 4
                    for (int j = 0; j < TILE; ++j) {
                        of_column[j] = lanes(w + (int64_t)j * inner + k);
                        if (j >= first && j < end)
                            _mm_prefetch((const char*)(w + (int64_t)j * inner + k + ahead), _MM_HINT_T1);
                    }
#pragma GCC unroll 4
                    for (int i = 0; i < TILE; ++i) {
                        const __m512 a = lanes(of_row[i] + k);
#pragma GCC unroll 4
                        for (int j = 0; j < TILE; ++j)
                            sum[i * TILE + j] = T::multiply_add(sum[i * TILE + j], a, of_column[j]);
                    }
                }
                result[(row - block) / TILE] = _mm512_add_ps(sums_of_lanes(sum), of_bias);
            }
            for (int row = block; row < block_end; row += TILE) {
                const __m512 of_tile = result[(row - block) / TILE];
                alignas(64) Element z[WIDTH];
                T::store(z, activate(of_tile, activation));
                for (int i = 0; i < std::min(TILE, rows - row); ++i)
                    std::memcpy(y + (row + i) * y_stride + column, z + i * TILE, sizeof(Element) * TILE);
            }
        }
    }
}

constexpr int ROWS = 6;  // rows of x at a time,
constexpr int REGISTERS = 4;  // with so many registers of columns: a panel
constexpr int PANEL = REGISTERS * WIDTH;
constexpr int CHUNK = 256;  // lanes that are summed in one go: shorter sums are more exact
constexpr int LEAST_ROWS = 48;  // that are worth a panel of their own: transposing costs as much as multiplying by 5

// weight [PANEL, inner] -> [lanes, PANEL]; of the registers of columns only the first `registers` are there.
template <class T>
void lay_out(const typename T::Element* weight, int inner, int registers, float* panel) {
    const int lanes = inner / T::PER_LANE;
    for (int j = 0; j < REGISTERS; ++j)
        for (int lane = 0; lane < lanes; lane += WIDTH) {
            __m512i r[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                r[i] = j < registers
                    ? _mm512_loadu_si512(weight + (int64_t)(j * WIDTH + i) * inner + lane * T::PER_LANE)
                    : _mm512_setzero_si512();
            transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                _mm512_store_si512(panel + (int64_t)(lane + i) * PANEL + j * WIDTH, r[i]);
        }
}

// y = activation(x panel + bias), of M rows.
template <class T, int M>
inline void tile(
    const typename T::Element* x, const float* panel, const typename T::Element* bias, typename T::Element* y,
    int64_t y_stride, int inner, int registers, int activation
) {
    const int lanes = inner / T::PER_LANE;
    __m512 sum[M][REGISTERS];
    multiply<T, M, REGISTERS>(x, inner, panel, PANEL, std::min(CHUNK, lanes), sum);
    if (lanes > CHUNK) {
        alignas(64) float total[M][REGISTERS][WIDTH];
        auto store = [&] {
#pragma GCC unroll 6
            for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < REGISTERS; ++j) _mm512_store_ps(total[i][j], sum[i][j]);
        };
        auto add = [&] {
#pragma GCC unroll 6
            for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < REGISTERS; ++j)
                    sum[i][j] = _mm512_add_ps(sum[i][j], _mm512_load_ps(total[i][j]));
        };
        for (int lane = CHUNK; lane < lanes; lane += CHUNK) {
            store();
            multiply<T, M, REGISTERS>(x + lane * T::PER_LANE, inner, panel + (int64_t)lane * PANEL, PANEL,
                                      std::min(CHUNK, lanes - lane), sum);
            add();
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < REGISTERS; ++j) {
        if (j >= registers) break;
        const __m512 of_bias = bias ? T::load(bias + j * WIDTH) : _mm512_setzero_ps();
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) {
            const __m512 z = _mm512_add_ps(sum[i][j], of_bias);
            T::store(y + i * y_stride + j * WIDTH, activate(z, activation));
        }
    }
}

// Into how many parts the rows go, each with a panel of its own, so that there is work for all threads.
inline int parts_of(int rows, int panels) {
    const int threads = omp_get_max_threads();
    int parts = 1;
    while (panels * parts % threads && panels * parts < 4 * threads && rows >= (parts + 1) * LEAST_ROWS) ++parts;
    return parts;
}

// As linear_of_few_rows, columns a multiple of 16. Returns 1 where there is no memory for a panel.
template <class T>
int linear_of_many_rows(
    const typename T::Element* x, const typename T::Element* weight, const typename T::Element* bias,
    typename T::Element* y, int64_t y_stride, int rows, int columns, int inner, int activation
) {
    using Element = typename T::Element;
    const int panels = (columns + PANEL - 1) / PANEL, parts = parts_of(rows, panels);
    const int of_part = round_up((rows + parts - 1) / parts, ROWS);
    const int64_t bytes = (int64_t)sizeof(Element) * PANEL * inner;
    bool failed = false;
#pragma omp parallel
    {
        int laid_out = -1;
        float* panel = scratch.reserve(bytes) ? (float*)scratch.memory : nullptr;
        if (!panel) failed = true;
#pragma omp for collapse(2) schedule(static)
        for (int p = 0; p < panels; ++p)
            for (int part = 0; part < parts; ++part) {
                if (!panel) continue;
                const int column = p * PANEL, registers = std::min(PANEL, columns - column) / WIDTH;
                if (p != laid_out) lay_out<T>(weight + (int64_t)column * inner, inner, registers, panel);
                laid_out = p;
                const int first = part * of_part, end = std::min(first + of_part, rows);
                // what the next panel is made of, fetched meanwhile into the second cache
                const char* next = (const char*)(weight + (int64_t)(column + PANEL) * inner);
                const int64_t to_fetch = column + 2 * PANEL <= columns ? bytes : 0;
                for (int row = first; row < end; row += ROWS) {
                    for (int64_t at = to_fetch * (row - first) / (end - first) / 64 * 64;
                         at < to_fetch * (row + ROWS - first) / (end - first); at += 64)
                        _mm_prefetch(next + at, _MM_HINT_T1);
#define OF_ROWS(M)                                                                                                 \
    case M:                                                                                                        \
        tile<T, M>(x + (int64_t)row * inner, panel, bias ? bias + column : nullptr,                                \
                   y + row * y_stride + column, y_stride, inner, registers, activation);                            \
        break;
                    switch (std::min(ROWS, end - row)) {
                        OF_ROWS(6) OF_ROWS(5) OF_ROWS(4) OF_ROWS(3) OF_ROWS(2) OF_ROWS(1)
                    }
#undef OF_ROWS
                }
            }
    }
    return failed;
}

}  // namespace

// in_one_way: a row's bits do not depend on the number of rows.
#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int linear_##name(                                                                                      \
        const T::Element* x, const T::Element* weight, const T::Element* bias, T::Element* y, int64_t y_stride,    \
        int rows, int columns, int inner, int activation, int in_one_way                                            \
    ) {                                                                                                            \
        if ((rows > ROWS_AS_THEY_LIE || in_one_way) && columns % WIDTH == 0)                                       \
            return linear_of_many_rows<T>(x, weight, bias, y, y_stride, rows, columns, inner, activation);          \
        linear_of_few_rows<T>(x, weight, bias, y, y_stride, rows, columns, inner, activation);                      \
        return 0;                                                                                                  \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
