// Packed attention, add + LayerNorm, products of few rows, and what stands before and after a product of 8-bit
// integers, for x86 CPUs with AVX-512, inference only. `_cpu.py` calls them.
//
// Attention goes head by head: K of one head is transposed once (16 keys side by side in a register), then six rows of
// queries at a time get all their scores, a softmax in place, and their product with V. Everything a head needs stays
// in the core's own cache. bfloat16 goes two elements at a time (vdpbf16ps), float32 one (vfmadd), through the same
// code: a "lane" is 32 bits of a row, of which a register holds 16.
//
// Threads are OpenMP's. The library is not linked with an OpenMP of its own: it finds the one that torch has loaded.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>

namespace {

constexpr int WIDTH = 16;     // 32-bit lanes of a register
constexpr int ROWS = 6;       // query rows at a time: 6 x 4 accumulators, 4 registers of keys, 4 to spare
constexpr int MOST_KEYS = 4;  // registers of keys at a time

struct Float32 {
    using Element = float;
    static constexpr int PER_LANE = 1;
    static __m512 multiply_add(__m512 sum, __m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, sum); }
    static __m512 load(const float* from) { return _mm512_loadu_ps(from); }
    static void store(float* to, __m512 x) { _mm512_storeu_ps(to, x); }
};

struct BFloat16 {
    using Element = uint16_t;
    static constexpr int PER_LANE = 2;
    static __m512 multiply_add(__m512 sum, __m512 a, __m512 b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
    }
    static __m512 load(const uint16_t* from) {
        const __m256i bits = _mm256_loadu_si256((const __m256i*)from);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    static void store(uint16_t* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }
};

inline __m512 broadcast_lane(const void* from) {
    return _mm512_castsi512_ps(_mm512_set1_epi32(*(const int32_t*)from));
}

// 2^x for x <= 0, to 2e-9 of itself; NaN stays NaN.
inline __m512 exp2_of_negative(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // of two operands one of which is NaN, the second
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(1.534579869e-4f);
    for (float c : {1.339993111e-3f, 9.618489007e-3f, 5.550328777e-2f, 0.2402264689f, 0.6931472057f, 1.0f})
        y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(y, whole);
}

// x times the normal distribution's share below x. That beyond |x| is exp(-z^2) times a polynomial in 1 / (1 + 0.55 z),
// z = |x| / sqrt(2), fitted for the least error of the share: 9e-9.
inline __m512 gelu(__m512 x) {
    const __m512 z = _mm512_abs_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)));
    const __m512 one = _mm512_set1_ps(1.0f);
    const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(z, _mm512_set1_ps(0.55f), one));
    __m512 y = _mm512_set1_ps(0.053667795f);
    for (float c : {-0.259041805f, 0.37989395f, -0.02074261f, 0.19543282f, 0.150789855f})
        y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(c));
    const __m512 e = exp2_of_negative(_mm512_mul_ps(_mm512_mul_ps(z, z), _mm512_set1_ps(-1.442695041f)));
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(y, t), e);  // the share beyond |x|
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ);
    return _mm512_mul_ps(x, _mm512_mask_sub_ps(tail, positive, one, tail));
}

// Lanes of 16 rows, one row a register, into one lane of all rows a register.
inline void transpose(__m512i r[WIDTH]) {
    __m512i t[WIDTH];
    for (int i = 0; i < WIDTH; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < WIDTH; i += 4)
        for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 8; ++i) {
        const int a = i / 4 * 8 + i % 4;
        t[a] = _mm512_shuffle_i32x4(r[a], r[a + 4], 0x88);
        t[a + 4] = _mm512_shuffle_i32x4(r[a], r[a + 4], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// Memory of one thread, grown when needed and kept.
struct Scratch {
    char* memory = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(memory); }
    bool reserve(size_t bytes) {
        if (bytes <= size) return true;
        std::free(memory);
        size = (bytes + 63) / 64 * 64;
        memory = (char*)std::aligned_alloc(64, size);
        if (!memory) size = 0;
        return memory;
    }
};
thread_local Scratch scratch;

// sum[i][j] = row i of a [M rows, lanes], times columns 16 j to 16 j + 15 of b [lanes, columns].
template <class T, int M, int N>
inline void multiply(
    const typename T::Element* a, int64_t a_stride, const float* b, int64_t b_stride, int lanes, __m512 (&sum)[M][N]
) {
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = _mm512_setzero_ps();
    for (int lane = 0; lane < lanes; ++lane) {
        __m512 of_b[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) of_b[j] = _mm512_loadu_ps(b + lane * b_stride + j * WIDTH);
#pragma GCC unroll 6
        for (int i = 0; i < M; ++i) {
            const __m512 of_a = broadcast_lane(a + i * a_stride + lane * T::PER_LANE);
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sum[i][j] = T::multiply_add(sum[i][j], of_a, of_b[j]);
        }
    }
}

// Scores of M rows with N x 16 keys: q rows apart by q_stride elements, keys [lanes, keys] -> scores [M, keys].
template <class T, int M, int N>
inline void score_tile(
    const typename T::Element* q, int64_t q_stride, const float* k, int lanes, int keys, float* scores
) {
    __m512 sum[M][N];
    multiply<T, M, N>(q, q_stride, k, keys, lanes, sum);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) _mm512_store_ps(scores + i * keys + j * WIDTH, sum[i][j]);
}

// Scores of one row -> p = exp(scale * (score - maximum)) in T, zero past `length`; returns 1 / sum(p).
template <class T>
inline float softmax(float* scores, typename T::Element* p, int length, int keys, float scale_log2) {
    const __mmask16 tail = (__mmask16)((1u << (length - (keys - WIDTH))) - 1);
    const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    float* last = scores + keys - WIDTH;
    _mm512_store_ps(last, _mm512_mask_mov_ps(nothing, tail, _mm512_load_ps(last)));
    __m512 most = nothing;
    for (int j = 0; j < keys; j += WIDTH) most = _mm512_max_ps(most, _mm512_load_ps(scores + j));
    const __m512 scale = _mm512_set1_ps(scale_log2);
    const __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(most) * scale_log2);
    __m512 sum = _mm512_setzero_ps();
    for (int j = 0; j < keys; j += WIDTH) {
        const __m512 x = exp2_of_negative(_mm512_fmsub_ps(_mm512_load_ps(scores + j), scale, shift));
        sum = _mm512_add_ps(sum, x);
        T::store(p + j, x);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
}

// M rows of p [M, keys] times N x 16 columns of v [lanes, stride] -> o, each row times its factor.
template <class T, int M, int N>
inline void value_tile(
    const typename T::Element* p, int keys, const float* v, int64_t stride, int lanes, const float* factor,
    typename T::Element* o, int64_t o_stride
) {
    __m512 sum[M][N];
    multiply<T, M, N>(p, keys, v, stride, lanes, sum);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
            T::store(o + i * o_stride + j * WIDTH, _mm512_mul_ps(sum[i][j], _mm512_set1_ps(factor[i])));
}

template <class T, int M>
void rows_of_head(
    const typename T::Element* q, int64_t q_stride, const float* k, const float* v, int64_t v_stride, int length,
    int keys, int head_dim, float scale_log2, float* scores, typename T::Element* p, typename T::Element* o,
    int64_t o_stride
) {
    const int lanes = head_dim / T::PER_LANE;
    int key = 0;
    for (; key + MOST_KEYS * WIDTH <= keys; key += MOST_KEYS * WIDTH)
        score_tile<T, M, MOST_KEYS>(q, q_stride, k + key, lanes, keys, scores + key);
    switch ((keys - key) / WIDTH) {
        case 3: score_tile<T, M, 3>(q, q_stride, k + key, lanes, keys, scores + key); break;
        case 2: score_tile<T, M, 2>(q, q_stride, k + key, lanes, keys, scores + key); break;
        case 1: score_tile<T, M, 1>(q, q_stride, k + key, lanes, keys, scores + key); break;
    }
    float factor[M];
    for (int i = 0; i < M; ++i)
        factor[i] = softmax<T>(scores + i * keys, p + i * keys, length, keys, scale_log2);
    const int pairs = (length + T::PER_LANE - 1) / T::PER_LANE;
    int column = 0;
    for (; column + 4 * WIDTH <= head_dim; column += 4 * WIDTH)
        value_tile<T, M, 4>(p, keys, v + column, v_stride, pairs, factor, o + column, o_stride);
    for (; column + 2 * WIDTH <= head_dim; column += 2 * WIDTH)
        value_tile<T, M, 2>(p, keys, v + column, v_stride, pairs, factor, o + column, o_stride);
    if (column < head_dim) value_tile<T, M, 1>(p, keys, v + column, v_stride, pairs, factor, o + column, o_stride);
}

// K of one head [length, head_dim] -> [lanes, keys], zero past `length`.
template <class T>
void transpose_keys(const typename T::Element* k, int64_t stride, int length, int keys, int head_dim, float* to) {
    const int lanes = head_dim / T::PER_LANE;
    for (int key = 0; key < keys; key += WIDTH)
        for (int lane = 0; lane < lanes; lane += WIDTH) {
            const int n = std::min(WIDTH, lanes - lane);
            const __mmask16 real = (__mmask16)((1u << n) - 1);
            __m512i r[WIDTH];
            for (int i = 0; i < WIDTH; ++i)
                r[i] = key + i < length
                    ? _mm512_maskz_loadu_epi32(real, k + (key + i) * stride + lane * T::PER_LANE)
                    : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < n; ++i) _mm512_store_si512(to + (lane + i) * keys + key, r[i]);
        }
}

// V of one head [length, head_dim] -> [length / 2, head_dim] lanes of two neighbouring keys, zeros past the last.
void pair_values(const uint16_t* v, int64_t stride, int length, int head_dim, float* to) {
    for (int key = 0; key < length; key += 2)
        for (int column = 0; column < head_dim; column += WIDTH) {
            const uint16_t* from = v + key * stride + column;
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
            const __m512i high = key + 1 < length
                ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + stride)))
                : _mm512_setzero_si512();
            _mm512_store_si512(
                to + key / 2 * head_dim + column, _mm512_or_si512(low, _mm512_slli_epi32(high, 16))
            );
        }
}

template <class T>
int attention(
    const typename T::Element* q, const typename T::Element* k, const typename T::Element* v, typename T::Element* o,
    const int32_t* starts, int sequences, int heads, int kv_heads, int head_dim,
    int64_t q_token, int64_t q_head, int64_t k_token, int64_t k_head, int64_t v_token, int64_t v_head, float scale
) {
    using Element = typename T::Element;
    const float scale_log2 = scale * 1.4426950408889634f;
    const int64_t o_token = (int64_t)heads * head_dim;
    bool failed = false;
#pragma omp parallel for collapse(2) schedule(dynamic)
    for (int sequence = 0; sequence < sequences; ++sequence)
        for (int head = 0; head < heads; ++head) {
            const int64_t start = starts[sequence];
            const int length = starts[sequence + 1] - starts[sequence];
            if (length == 0) continue;
            const int keys = (length + WIDTH - 1) / WIDTH * WIDTH, kv_head = head / (heads / kv_heads);
            const size_t of_keys = (size_t)keys * head_dim / T::PER_LANE;  // floats; as many of the paired values
            if (!scratch.reserve(sizeof(float) * (2 * of_keys + head_dim + 2 * ROWS * (size_t)keys))) {
                failed = true;
                continue;
            }
            float* keys_transposed = (float*)scratch.memory;
            float* values_paired = keys_transposed + of_keys;
            float* scores = values_paired + (T::PER_LANE == 2 ? of_keys : 0);
            Element* p = (Element*)(scores + ROWS * keys);

            transpose_keys<T>(k + start * k_token + kv_head * k_head, k_token, length, keys, head_dim, keys_transposed);
            const Element* of_head = v + start * v_token + kv_head * v_head;
            const float* values = (const float*)of_head;
            int64_t v_stride = v_token;
            if constexpr (T::PER_LANE == 2) {
                pair_values(of_head, v_token, length, head_dim, values_paired);
                values = values_paired;
                v_stride = head_dim;
            }
            const Element* rows = q + start * q_token + head * q_head;
            Element* out = o + start * o_token + (int64_t)head * head_dim;
            int row = 0;
#define OF_ROWS(M)                                                                                                 \
    rows_of_head<T, M>(rows + row * q_token, q_token, keys_transposed, values, v_stride, length, keys, head_dim,  \
                       scale_log2, scores, p, out + row * o_token, o_token)
            for (; row + ROWS <= length; row += ROWS) OF_ROWS(ROWS);
            switch (length - row) {
                case 5: OF_ROWS(5); break;
                case 4: OF_ROWS(4); break;
                case 3: OF_ROWS(3); break;
                case 2: OF_ROWS(2); break;
                case 1: OF_ROWS(1); break;
            }
#undef OF_ROWS
        }
    return failed ? 1 : 0;
}

// y = (z - mean) / sqrt(var + eps) * weight + bias of z = x + residual, rows of `width` contiguous elements.
template <class T>
void add_layer_norm(
    const typename T::Element* x, const typename T::Element* residual, const typename T::Element* weight,
    const typename T::Element* bias, typename T::Element* y, int64_t rows, int width, float eps
) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * width;
        auto z = [&](int i) {
            const __m512 of_x = T::load(x + at + i);
            return residual ? _mm512_add_ps(of_x, T::load(residual + at + i)) : of_x;
        };
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int i = 0; i < width; i += WIDTH) sum = _mm512_add_ps(sum, z(i));
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
        for (int i = 0; i < width; i += WIDTH) {
            const __m512 centred = _mm512_sub_ps(z(i), mean);
            squares = _mm512_fmadd_ps(centred, centred, squares);
        }
        const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps));
        for (int i = 0; i < width; i += WIDTH) {
            const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(_mm512_sub_ps(z(i), mean), factor), T::load(weight + i));
            T::store(y + at + i, _mm512_add_ps(scaled, T::load(bias + i)));
        }
    }
}

// scale = max(|x|, least) / 127 of each row, q = round(x / scale) + 128; rows of `width` contiguous elements.
template <class T>
void quantise_rows(const typename T::Element* x, uint8_t* q, float* scales, int64_t rows, int width, float least) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * width;
        __m512 most = _mm512_set1_ps(least), odd = _mm512_setzero_ps();
        for (int i = 0; i < width; i += WIDTH) {
            const __m512 of_x = T::load(x + at + i);
            most = _mm512_max_ps(_mm512_abs_ps(of_x), most);
            odd = _mm512_fmadd_ps(of_x, _mm512_setzero_ps(), odd);  // NaN where x is NaN or infinite, else 0
        }
        const float scale = (_mm512_reduce_max_ps(most) + _mm512_reduce_add_ps(odd)) / 127;
        scales[row] = scale;
        const __m512 factor = _mm512_set1_ps(1.0f / scale);
        for (int i = 0; i < width; i += WIDTH) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(T::load(x + at + i), factor));
            const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_add_epi32(whole, _mm512_set1_epi32(128)));
            _mm_storeu_si128((__m128i*)(q + at + i), bytes);
        }
    }
}

// y = sums * scales[row] + bias, or GELU of it; rows of `width` contiguous elements, bias null for none.
template <class T>
void scale_rows(
    const float* sums, const float* scales, const typename T::Element* bias, typename T::Element* y, int64_t rows,
    int width, int with_gelu
) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * width;
        const __m512 scale = _mm512_set1_ps(scales[row]);
        for (int i = 0; i < width; i += WIDTH) {
            const __m512 z = _mm512_fmadd_ps(
                _mm512_loadu_ps(sums + at + i), scale, bias ? T::load(bias + i) : _mm512_setzero_ps()
            );
            T::store(y + at + i, with_gelu ? gelu(z) : z);
        }
    }
}

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

constexpr int AHEAD = 16384;  // bytes of the weight that are on their way from memory
constexpr int TILE = 4;  // rows of x and rows of the weight at a time: 16 accumulators, 8 loads for 16 multiplications

// y = x weight^T + bias, or GELU of it: x [rows, inner], weight [columns, inner] as it is, y [rows, columns].
// For few rows, where much of the time goes into reading the weight: it is read once and in order, AHEAD of its use.
template <class T>
void linear_of_few_rows(
    const typename T::Element* x, const typename T::Element* weight, const typename T::Element* bias,
    typename T::Element* y, int rows, int columns, int inner, int with_gelu
) {
    using Element = typename T::Element;
    constexpr int STEP = WIDTH * T::PER_LANE;
    constexpr __mmask16 ONE_OF_EACH = 0x000f;
    auto lanes = [](const Element* from) { return _mm512_castsi512_ps(_mm512_loadu_si512(from)); };
#pragma omp parallel for schedule(static)
    for (int column = 0; column < columns; column += TILE) {
        const Element* w = weight + (int64_t)column * inner;
        for (int row = 0; row < rows; row += TILE) {
            const int first = row * TILE / rows, end = std::min(row + TILE, rows) * TILE / rows;  // to fetch meanwhile
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
                        _mm_prefetch((const char*)(w + (int64_t)j * inner + k) + AHEAD, _MM_HINT_T1);
                }
#pragma GCC unroll 4
                for (int i = 0; i < TILE; ++i) {
                    const __m512 a = lanes(of_row[i] + k);
#pragma GCC unroll 4
                    for (int j = 0; j < TILE; ++j)
                        sum[i * TILE + j] = T::multiply_add(sum[i * TILE + j], a, of_column[j]);
                }
            }
            alignas(64) float z[TILE * TILE];
            __m512 of_bias = _mm512_setzero_ps();
            if (bias) {
                alignas(64) Element four[WIDTH] = {};
                std::copy(bias + column, bias + column + TILE, four);
                of_bias = T::load(four);
                of_bias = _mm512_broadcast_f32x4(_mm512_castps512_ps128(of_bias));
            }
            const __m512 result = _mm512_add_ps(sums_of_lanes(sum), of_bias);
            _mm512_store_ps(z, with_gelu ? gelu(result) : result);
            for (int i = 0; i < std::min(TILE, rows - row); ++i) {
                Element four[WIDTH];
                T::store(four, _mm512_maskz_loadu_ps(ONE_OF_EACH, z + i * TILE));
                std::copy(four, four + TILE, y + (int64_t)(row + i) * columns + column);
            }
        }
    }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define EXPORT_FOR(T, name)                                                                                        \
    EXPORT int attention_##name(                                                                                   \
        const T::Element* q, const T::Element* k, const T::Element* v, T::Element* o, const int32_t* starts,       \
        int sequences, int heads, int kv_heads, int head_dim, int64_t q_token, int64_t q_head, int64_t k_token,    \
        int64_t k_head, int64_t v_token, int64_t v_head, float scale                                               \
    ) {                                                                                                            \
        return attention<T>(q, k, v, o, starts, sequences, heads, kv_heads, head_dim, q_token, q_head, k_token,    \
                            k_head, v_token, v_head, scale);                                                       \
    }                                                                                                              \
    EXPORT void add_layer_norm_##name(                                                                             \
        const T::Element* x, const T::Element* residual, const T::Element* weight, const T::Element* bias,         \
        T::Element* y, int64_t rows, int width, float eps                                                          \
    ) {                                                                                                            \
        add_layer_norm<T>(x, residual, weight, bias, y, rows, width, eps);                                         \
    }                                                                                                              \
    EXPORT void quantise_rows_##name(                                                                              \
        const T::Element* x, uint8_t* q, float* scales, int64_t rows, int width, float least                       \
    ) {                                                                                                            \
        quantise_rows<T>(x, q, scales, rows, width, least);                                                        \
    }                                                                                                              \
    EXPORT void scale_rows_##name(                                                                                 \
        const float* sums, const float* scales, const T::Element* bias, T::Element* y, int64_t rows, int width,    \
        int with_gelu                                                                                              \
    ) {                                                                                                            \
        scale_rows<T>(sums, scales, bias, y, rows, width, with_gelu);                                              \
    }                                                                                                              \
    EXPORT void linear_of_few_rows_##name(                                                                         \
        const T::Element* x, const T::Element* weight, const T::Element* bias, T::Element* y, int rows,            \
        int columns, int inner, int with_gelu                                                                      \
    ) {                                                                                                            \
        linear_of_few_rows<T>(x, weight, bias, y, rows, columns, inner, with_gelu);                                \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
