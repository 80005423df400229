// AdamW for many tensors in one call, which reads and writes each element once; and the norm of many gradients.
//
//     g = scale * gradient              m += (1 - beta1) (g - m)         v = beta2 v + (1 - beta2) g g
//     p = (1 - rate * decay) p - rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Loshchilov and Hutter, arXiv:1711.05101, as torch.optim.AdamW computes it. `adamw.py` calls them.
//
// In a word table most rows have no gradient in a step, and many have never had one. Such a row has m = v = 0, so only p
// can change. A byte for each row says that m and v are zero; then, while the row's gradient is zero too, m and v are
// neither read nor written. Where it is known which rows have a gradient, those of the others are not read either.
//
// The decay of a row at rest may be deferred: in each step it is applied to every eighth row, for the steps since. A second
// byte for each row counts these steps, and `settle` applies what is left. The products are those of the single steps.

#include <vector>

#include "simd.h"

namespace {

constexpr int DEFERRED = 8;  // most steps by which the decay of a row at rest is late

// The scalars of one tensor's update at one step, in the order in which `adamw.py` writes them.
struct Numbers {
    float scale, keep;           // factor of the gradient; factor of p, 1 - rate * decay
    float of_m, beta2, of_v;     // 1 - beta1, beta2, 1 - beta2
    float step, of_root, eps;    // rate / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    float kept[DEFERRED];        // `keep` of the last steps, that of this step last
};

// n elements from an address, n at most WIDTH, followed by zeros.
template <class T>
inline Floats load_first(const typename T::Element* from, int64_t n) {
    if (n >= WIDTH) return T::load(from);
    typename T::Element some[WIDTH] = {};
    std::copy_n(from, n, some);
    return T::load(some);
}
template <class T>
inline void store_first(typename T::Element* to, int64_t n, Floats x) {
    if (n >= WIDTH) return T::store(to, x);
    typename T::Element some[WIDTH];
    T::store(some, x);
    std::copy_n(some, n, to);
}

// Whether any of n elements is not zero; NaN is not zero.
template <class T>
bool has_any(const typename T::Element* x, int64_t n) {
    Floats sum = floats(0.0f);
    for (int64_t i = 0; i < n; i += WIDTH) sum = sum + absolute(load_first<T>(x + i, n - i));
    return sum_of(sum) != 0.0f;
}

constexpr int AHEAD = 1024;  // bytes; the processor itself prefetches fewer streams, and none into the next page

// Multiplies n elements of p with the `late` factors before `end`, one after another.
template <class T>
void decay(typename T::Element* p, int64_t n, const float* end, int late) {
    for (int64_t i = 0; i < n; i += WIDTH) {
        Floats x = load_first<T>(p + i, n - i);
        for (const float* factor = end - late; factor < end; ++factor) {
            x = floats(*factor) * x;
            if constexpr (sizeof(typename T::Element) < sizeof(float)) x = rounded_to_bfloat16(x);
        }
        store_first<T>(p + i, n - i, x);
    }
}

// Updates n elements. at_rest: null, or a byte that says whether all of their m and v are zero. has_gradient: false if the
// gradient is known to be zero. late: null, or the number of steps whose decay was deferred; is_due: whether it is applied.
template <class T>
void update(
    typename T::Element* p, const typename T::Element* gradient, typename T::Element* m, typename T::Element* v,
    uint8_t* at_rest, bool has_gradient, uint8_t* late, bool is_due, int64_t n, const Numbers& by
) {
    const Floats keep = floats(by.keep);
    if (at_rest && *at_rest && !(has_gradient && has_any<T>(gradient, n))) {
        const int steps = late ? ++*late : 1;
        if (late && !is_due) return;
        if (late) *late = 0;
        if (steps > 1 || by.keep != 1.0f) decay<T>(p, n, by.kept + DEFERRED, steps);
        return;
    }
    if (late && *late) {
        decay<T>(p, n, by.kept + DEFERRED - 1, *late);
        *late = 0;
    }
    Floats moved = floats(0.0f);
    for (int64_t i = 0; i < n; i += WIDTH) {
        const int64_t left = n - i;
        for (const void* of : {(const void*)(p + i), (const void*)(gradient + i), (const void*)(m + i), (const void*)(v + i)})
            fetch_near((const char*)of + AHEAD);
        const Floats g = floats(by.scale) * load_first<T>(gradient + i, left);
        const Floats before = load_first<T>(m + i, left);
        const Floats mean = fma(floats(by.of_m), g - before, before);
        const Floats square = fma(floats(by.of_v) * g, g, floats(by.beta2) * load_first<T>(v + i, left));
        const Floats root = fma(square_root(square), floats(by.of_root), floats(by.eps));
        store_first<T>(m + i, left, mean);
        store_first<T>(v + i, left, square);
        store_first<T>(p + i, left, fnma(floats(by.step), mean / root, keep * load_first<T>(p + i, left)));
        moved = moved + absolute(mean) + square;
    }
    if (at_rest) *at_rest = sum_of(moved) == 0.0f;
}

// pointers: for each tensor p, gradient, m, v; a byte for each block, whether it is at rest, or null; a byte for each
// block, whether its gradient may be other than zero, or null; the count of its steps; a byte for each block, by how many
// steps its decay is late, or null. sizes: its elements, those of a block, and the index of its Numbers.
template <class T>
void step(const void* const* pointers, const int64_t* sizes, const Numbers* numbers, int count) {
    using Element = typename T::Element;
    for (int tensor = 0; tensor < count; ++tensor) *(float*)pointers[8 * tensor + 6] += 1.0f;
#pragma omp parallel
    for (int tensor = 0; tensor < count; ++tensor) {
        const void* const* of = pointers + 8 * tensor;
        const int64_t size = sizes[3 * tensor], block = sizes[3 * tensor + 1];
        const Numbers& by = numbers[sizes[3 * tensor + 2]];
        Element *p = (Element*)of[0], *m = (Element*)of[2], *v = (Element*)of[3];
        const uint8_t* touched = (const uint8_t*)of[5];
        uint8_t* late = (uint8_t*)of[7];
        const auto turn = (int64_t)*(const float*)of[6];
        // Rows at rest take less time, and are often adjacent, so blocks are scheduled dynamically.
#pragma omp for schedule(dynamic, 16) nowait
        for (int64_t first = 0; first < size; first += block)
            update<T>(
                p + first, (const Element*)of[1] + first, m + first, v + first,
                of[4] ? (uint8_t*)of[4] + first / block : nullptr, !touched || touched[first / block],
                late ? late + first / block : nullptr, (first / block + turn) % DEFERRED == 0,
                std::min(block, size - first), by
            );
    }
}

// Applies the deferred decay of the `count` rows `ids`, or of all rows if ids is null. p has `size` elements; only its last
// row may have fewer than `width`. kept: of the last DEFERRED steps.
template <class T>
void settle(
    typename T::Element* p, uint8_t* late, const int64_t* ids, int64_t count, int64_t size, int64_t width,
    const float* kept
) {
    const auto settle_row = [&](int64_t row) {
        if (late[row]) decay<T>(p + row * width, std::min(width, size - row * width), kept + DEFERRED, late[row]);
        late[row] = 0;
    };
    if (ids) {  // by one thread, since an id may be there twice
        for (int64_t i = 0; i < count; ++i) settle_row(ids[i]);
        return;
    }
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < (size + width - 1) / width; ++row) settle_row(row);
}

constexpr int64_t BLOCK = 1024;  // one thread sums the squares of this many elements, so the order is always the same
constexpr int64_t SHORT = 128;   // elements that are summed in float32; longer sums would be less exact
constexpr int AT_ONCE = 4;       // such sums that are computed at the same time, since each addition waits for the last

// The sum of the squares of all elements. pointers: for each tensor its elements; a byte for each row, whether it may be
// other than zero, or null. sizes: its elements, and those of a row.
template <class T>
double sum_squares(const void* const* pointers, const int64_t* sizes, int count) {
    std::vector<int64_t> first(count + 1);  // number of each tensor's first block
    for (int i = 0; i < count; ++i) first[i + 1] = first[i] + (sizes[2 * i] + BLOCK - 1) / BLOCK;
    std::vector<double> parts(first[count]);
#pragma omp parallel
    for (int tensor = 0; tensor < count; ++tensor) {
        const auto* x = (const typename T::Element*)pointers[2 * tensor];
        const auto* touched = (const uint8_t*)pointers[2 * tensor + 1];
        const int64_t size = sizes[2 * tensor], row = sizes[2 * tensor + 1];
#pragma omp for schedule(static) nowait
        for (int64_t from = 0; from < size; from += BLOCK) {
            const int64_t end = std::min(from + BLOCK, size);
            double of_block = 0.0;
            if (touched && std::none_of(touched + from / row, touched + (end - 1) / row + 1, [](uint8_t t) { return t; })) {
                parts[first[tensor] + from / BLOCK] = 0.0;
                continue;
            }
            int64_t start = from;
            for (; start + AT_ONCE * SHORT <= end; start += AT_ONCE * SHORT) {
                Floats sums[AT_ONCE] = {};
                for (int64_t i = start; i < start + SHORT; i += WIDTH)
                    for (int n = 0; n < AT_ONCE; ++n) {
                        const Floats g = T::load(x + i + n * SHORT);
                        sums[n] = fma(g, g, sums[n]);
                    }
                for (const Floats& sum : sums) of_block += sum_of(sum);
            }
            for (; start < end; start += SHORT) {
                Floats sum = floats(0.0f);
                for (int64_t i = start; i < std::min(start + SHORT, end); i += WIDTH) {
                    const Floats g = load_first<T>(x + i, end - i);
                    sum = fma(g, g, sum);
                }
                of_block += sum_of(sum);
            }
            parts[first[tensor] + from / BLOCK] = of_block;
        }
    }
    double total = 0.0;
    for (double part : parts) total += part;
    return total;
}

}  // namespace

#define EXPORT_FOR(T, name)                                                                                            \
    EXPORT void adamw_##name(const void* const* pointers, const int64_t* sizes, const float* numbers, int count) {     \
        step<T>(pointers, sizes, (const Numbers*)numbers, count);                                                      \
    }                                                                                                                  \
    EXPORT void adamw_settle_##name(                                                                                   \
        T::Element* p, uint8_t* late, const int64_t* ids, int64_t count, int64_t size, int64_t width,                  \
        const float* kept                                                                                              \
    ) {                                                                                                                \
        settle<T>(p, late, ids, count, size, width, kept);                                                             \
    }                                                                                                                  \
    EXPORT void sum_squares_##name(                                                                                    \
        const void* const* pointers, const int64_t* sizes, int count, double* sum                                      \
    ) {                                                                                                                \
        *sum = sum_squares<T>(pointers, sizes, count);                                                                 \
    }

EXPORT_FOR(Float32, float32)
EXPORT_FOR(BFloat16, bfloat16)
