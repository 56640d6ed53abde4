/* What a training step does between its matrix products, in one pass each over bfloat16 or float32 values, computed in float32.

   `bf16` says which of the two the buffers hold, `threads` how many threads may share the work; no result depends on it. All
   whole numbers that an exported function takes are int64_t, so that the caller needs no table of types.

   The kernels are written once, over vectors of floats. What GCC's vector operators can not say is in the first section, once for
   AVX-512, with sixteen floats, and once for everything else, with eight, as AVX2 has them. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define AVX512
#define LANES 16
#define LANE_NUMBERS {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#else
#define LANES 8
#define LANE_NUMBERS {0, 1, 2, 3, 4, 5, 6, 7}
#endif

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

enum {
    SPAN = 4096,      /* elements that one thread takes at a time where there are no rows */
    PARALLEL = 32768, /* elements from which a second thread pays */
};

/* Calls f with a constant last argument, so that its loops do not ask for the type. */
#define BY_TYPE(f, ...)        \
    do {                       \
        if (bf16)              \
            f(__VA_ARGS__, 1); \
        else                   \
            f(__VA_ARGS__, 0); \
    } while (0)

/* ---- vectors ---- */

INLINE Floats all(float x) { return x - (Floats){}; }

INLINE Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

/* To the nearest bfloat16, ties to even, in the upper half of each word. A NaN stays one: its payload is never all ones here. */
INLINE Words rounded_words(Floats x) { return ((Words)x + 0x7fff + ((Words)x >> 16 & 1)) & 0xffff0000; }

#ifdef AVX512

/* Told apart by a branch: a mask for each load would cost as much as the load. */
INLINE int is_whole(int64_t count) { return __builtin_expect(count >= LANES, 1); }

INLINE __mmask16 first(int64_t count) { return is_whole(count) ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

/* Elements i to i + LANES of x, of which the first `count` exist; 0 for the others. */
INLINE Floats load(const void *x, int64_t i, int64_t count, int bf16) {
    if (!bf16)
        return is_whole(count) ? _mm512_loadu_ps((const float *)x + i) : _mm512_maskz_loadu_ps(first(count), (const float *)x + i);
    const uint16_t *from = (const uint16_t *)x + i;
    __m256i halves = is_whole(count) ? _mm256_loadu_si256((const void *)from) : _mm256_maskz_loadu_epi16(first(count), from);
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

INLINE __m256i to_halves(Floats x) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    return _mm512_cvtepi32_epi16((__m512i)(rounded_words(x) >> 16));
#endif
}

INLINE void store(void *y, int64_t i, int64_t count, Floats x, int bf16) {
    if (bf16 && is_whole(count))
        _mm256_storeu_si256((void *)((uint16_t *)y + i), to_halves(x));
    else if (bf16)
        _mm256_mask_storeu_epi16((uint16_t *)y + i, first(count), to_halves(x));
    else if (is_whole(count))
        _mm512_storeu_ps((float *)y + i, x);
    else
        _mm512_mask_storeu_ps((float *)y + i, first(count), x);
}

/* The first `count` of x, then the filler. */
INLINE Floats padded(Floats x, int64_t count, float filler) { return _mm512_mask_mov_ps(all(filler), first(count), x); }

/* These two give a NaN where x is one. */
INLINE Floats at_least(Floats x, float limit) { return _mm512_max_ps(all(limit), x); }

INLINE Floats at_most(Floats x, float limit) { return _mm512_min_ps(all(limit), x); }

INLINE Floats larger(Floats x, Floats y) { return _mm512_max_ps(x, y); }

INLINE Floats if_positive(Floats x, Floats yes, Floats no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(x, all(0), _CMP_GT_OQ), yes);
}

INLINE Floats if_not_below(Words x, Words limit, Floats yes) {
    return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask((__m512i)x, (__m512i)limit), yes);
}

INLINE Floats whole(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* x 2^n for whole n, both within the normal numbers. */
INLINE Floats scaled(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

/* 0 where x < limit; a NaN is not. */
INLINE Floats unless_below(Floats x, float limit, Floats yes) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(limit), _CMP_NLT_UQ), yes);
}

/* 1 / x for ordinary x > 0, relative error 2e-7, or 6e-5 for bfloat16. */
INLINE Floats reciprocal(Floats x, int bf16) {
    Floats y = _mm512_rcp14_ps(x);
    return bf16 ? y : y + y * (1 - x * y);
}

INLINE float sum(Floats x) { return _mm512_reduce_add_ps(x); }

INLINE float largest(Floats x) { return _mm512_reduce_max_ps(x); }

#else

INLINE Floats either(Ints mask, Floats yes, Floats no) { return (Floats)(((Ints)yes & mask) | ((Ints)no & ~mask)); }

INLINE Floats load(const void *x, int64_t i, int64_t count, int bf16) {
    Floats values = {};
    Halves halves = {};
    if (bf16 && count >= LANES)
        memcpy(&halves, (const uint16_t *)x + i, sizeof halves);
    else if (bf16 && count > 0)
        memcpy(&halves, (const uint16_t *)x + i, count * 2);
    else if (count >= LANES)
        memcpy(&values, (const float *)x + i, sizeof values);
    else if (count > 0)
        memcpy(&values, (const float *)x + i, count * 4);
    return bf16 ? (Floats)(__builtin_convertvector(halves, Words) << 16) : values;
}

INLINE void store(void *y, int64_t i, int64_t count, Floats x, int bf16) {
    Halves halves = __builtin_convertvector(rounded_words(x) >> 16, Halves);
    if (bf16 && count >= LANES)
        memcpy((uint16_t *)y + i, &halves, sizeof halves);
    else if (bf16 && count > 0)
        memcpy((uint16_t *)y + i, &halves, count * 2);
    else if (count >= LANES)
        memcpy((float *)y + i, &x, sizeof x);
    else if (count > 0)
        memcpy((float *)y + i, &x, count * 4);
}

INLINE Floats padded(Floats x, int64_t count, float filler) {
    const Ints lane = LANE_NUMBERS;
    return count >= LANES ? x : either(lane < (int32_t)count, x, all(filler));
}

INLINE Floats at_least(Floats x, float limit) { return either(x < limit, all(limit), x); }

INLINE Floats at_most(Floats x, float limit) { return either(x > limit, all(limit), x); }

INLINE Floats larger(Floats x, Floats y) { return either(x > y, x, y); }

INLINE Floats if_positive(Floats x, Floats yes, Floats no) { return either(x > 0, yes, no); }

INLINE Floats if_not_below(Words x, Words limit, Floats yes) { return (Floats)((Ints)yes & (x >= limit)); }

#define SHIFT 12582912.0f /* 1.5 * 2^23: a sum with it has no fraction, and the whole number in its lowest bits */

INLINE Floats whole(Floats x) { return x + SHIFT - SHIFT; }

INLINE Floats scaled(Floats x, Floats n) { return (Floats)((Ints)x + ((Ints)(n + SHIFT) << 23)); }

INLINE Floats unless_below(Floats x, float limit, Floats yes) { return (Floats)((Ints)yes & ~(x < limit)); }

INLINE Floats reciprocal(Floats x, __attribute__((unused)) int bf16) { return 1 / x; }

INLINE float sum(Floats x) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++)
            x[i] += x[i + half];
    return x[0];
}

INLINE float largest(Floats x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++)
        top = x[i] > top ? x[i] : top;
    return top;
}

#endif

/* 2^r for r in [-1/2, 1/2], to 1e-5. */
INLINE Floats power_of_fraction(Floats r) {
    Floats p = r * 0.00957010001f + 0.0559178602f;
    p = p * r + 0.240247449f;
    p = p * r + 0.693121815f;
    return p * r + 0.999999261f;
}

/* e^x for x <= 0; 0 below the normal numbers, which processors are slow at. The relative error is 2e-7, with the polynomial of
   expf in Cephes (S. Moshier), and 1e-5 for bfloat16, whose own is 2e-3, with one fitted to 2^r on [-1/2, 1/2]. */
INLINE Floats exponential(Floats x, int bf16) {
    const float smallest = -87.3f, log2_of_e = 1.44269504f;
    Floats bounded = at_least(x, smallest), n, p;
    if (bf16) {
        Floats exponent = bounded * log2_of_e;
        n = whole(exponent);
        p = power_of_fraction(exponent - n);
    } else {
        n = whole(bounded * log2_of_e);
        Floats r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
        p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * (r * r) + (r + 1);
    }
    return unless_below(x, smallest, scaled(p, n));
}

INLINE float exponential_of(float x) { return exponential(all(x), 0)[0]; }

/* ---- activations ---- */

/* Phi(-a) = e^(-a^2/2) t Q(t), t = 1 / (1 + c a), for 0 <= a <= 13: the form of Abramowitz & Stegun 26.2.17, Q fitted for the
   relative error, 2e-7 or, for bfloat16, 1e-4. Returns e^(-a^2/2) too, which the density needs. */
typedef struct {
    Floats tail, bell;
} Normal;

INLINE Normal normal(Floats a, int bf16) {
    Floats t, q;
    if (bf16) {
        t = reciprocal(1 + 0.25f * a, bf16);
        q = t * 0.241929031f - 0.104684215f;
        q = q * t + 0.181089104f;
        q = q * t + 0.080267815f;
        q = q * t + 0.101380297f;
    } else {
        t = reciprocal(1 + 0.3f * a, bf16);
        q = t * 0.0354238595f - 0.156158936f;
        q = q * t + 0.20455757f;
        q = q * t - 0.0520346846f;
        q = q * t + 0.127692095f;
        q = q * t + 0.100175859f;
        q = q * t + 0.120712149f;
        q = q * t + 0.119632006f;
    }
    Floats bell = exponential(a * a * -0.5f, bf16);
    return (Normal){bell * (q * t), bell};
}

INLINE Floats gelu_value(Floats x, int bf16) {
    Floats a = at_most(magnitude(x), 13);
    return at_least(x, 0) - a * normal(a, bf16).tail;
}

INLINE Floats gelu_slope(Floats x, int bf16) {
    Floats a = at_most(magnitude(x), 13);
    Normal n = normal(a, bf16);
    Floats negative = n.tail - a * n.bell * 0.398942280f; /* Phi(-a) - a phi(a), the slope at -a */
    return if_positive(x, 1 - negative, negative);
}

/* The logistic function of x and of -x, each to full relative precision. */
typedef struct {
    Floats plus, minus;
} Logistic;

INLINE Logistic logistic(Floats x, int bf16) {
#ifdef AVX512
    if (bf16) { /* half the instructions; 2^126 is near what is the largest, and its inverse near the smallest number */
        Floats exponent = at_most(x * -1.44269504f, 126);
        Floats e = scaled(power_of_fraction(exponent - whole(exponent)), whole(exponent)), plus = reciprocal(1 + e, bf16);
        return (Logistic){plus, e * plus};
    }
#endif
    Floats e = exponential(-magnitude(x), bf16);
    Floats large = reciprocal(1 + e, bf16), small = e * large;
    return (Logistic){if_positive(x, large, small), if_positive(x, small, large)};
}

/* x (1 + tanh u) / 2 = x logistic(2u), u = sqrt(2/pi) (x + 0.044715 x^3). */
INLINE Floats gelu_tanh_value(Floats x, int bf16) { return x * logistic(x * (1.59576912f + 0.0713548163f * (x * x)), bf16).plus; }

INLINE Floats gelu_tanh_slope(Floats x, int bf16) {
    Floats square = x * x;
    Logistic s = logistic(x * (1.59576912f + 0.0713548163f * square), bf16);
    return s.plus * (1 + s.minus * (x * (1.59576912f + 0.214064449f * square)));
}

INLINE Floats silu_value(Floats x, int bf16) { return x * logistic(x, bf16).plus; }

INLINE Floats silu_slope(Floats x, int bf16) {
    Logistic s = logistic(x, bf16);
    return s.plus * (1 + x * s.minus);
}

#define ACTIVATION(name)                                                                                                    \
    INLINE void name##_span(const void *x, void *y, int64_t from, int64_t to, int bf16) {                                   \
        for (int64_t i = from; i < to; i += LANES)                                                                          \
            store(y, i, to - i, name##_value(load(x, i, to - i, bf16), bf16), bf16);                                        \
    }                                                                                                                       \
    INLINE void name##_backward_span(const void *x, const void *grad_y, void *grad_x, int64_t from, int64_t to, int bf16) { \
        for (int64_t i = from; i < to; i += LANES) {                                                                        \
            Floats grad = load(grad_y, i, to - i, bf16);                                                                    \
            store(grad_x, i, to - i, grad * name##_slope(load(x, i, to - i, bf16), bf16), bf16);                            \
        }                                                                                                                   \
    }                                                                                                                       \
    void name(const void *x, void *y, int64_t count, int64_t bf16, int64_t threads) {                                       \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (count > PARALLEL)")                             \
        for (int64_t from = 0; from < count; from += SPAN)                                                                  \
            BY_TYPE(name##_span, x, y, from, MIN(from + SPAN, count));                                                      \
    }                                                                                                                       \
    void name##_backward(const void *x, const void *grad_y, void *grad_x, int64_t count, int64_t bf16, int64_t threads) {   \
        _Pragma("omp parallel for schedule(static) num_threads(threads) if (count > PARALLEL)")                             \
        for (int64_t from = 0; from < count; from += SPAN)                                                                  \
            BY_TYPE(name##_backward_span, x, grad_y, grad_x, from, MIN(from + SPAN, count));                                \
    }

ACTIVATION(gelu)
ACTIVATION(gelu_tanh)
ACTIVATION(silu)

INLINE void silu_mul_row(const void *gate, const void *up, void *y, int64_t g, int64_t u, int64_t at, int64_t width, int bf16) {
    for (int64_t i = 0; i < width; i += LANES) {
        Floats value = silu_value(load(gate, g + i, width - i, bf16), bf16) * load(up, u + i, width - i, bf16);
        store(y, at + i, width - i, value, bf16);
    }
}

/* silu(gate) * up: gate and up [rows, width] with their row strides in elements, y contiguous. */
void silu_mul(const void *gate, const void *up, void *y, int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride,
              int64_t bf16, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(silu_mul_row, gate, up, y, row * gate_stride, row * up_stride, row * width, width);
}

INLINE void silu_mul_backward_row(const void *gate, const void *up, const void *grad_y, void *grad_gate, void *grad_up, int64_t g,
                                  int64_t u, int64_t at, int64_t out, int64_t width, int bf16) {
    for (int64_t i = 0; i < width; i += LANES) {
        Floats x = load(gate, g + i, width - i, bf16), grad = load(grad_y, at + i, width - i, bf16);
        Logistic s = logistic(x, bf16);
        Floats of_up = grad * s.plus;
        store(grad_gate, out + i, width - i, of_up * load(up, u + i, width - i, bf16) * (1 + x * s.minus), bf16);
        store(grad_up, out + i, width - i, of_up * x, bf16);
    }
}

/* The gradients' rows are grad_stride elements apart. */
void silu_mul_backward(const void *gate, const void *up, const void *grad_y, void *grad_gate, void *grad_up, int64_t rows,
                       int64_t width, int64_t gate_stride, int64_t up_stride, int64_t grad_stride, int64_t bf16, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(silu_mul_backward_row, gate, up, grad_y, grad_gate, grad_up, row * gate_stride, row * up_stride, row * width,
                row * grad_stride, width);
}

/* ---- rotary position embeddings ---- */

INLINE void rotary_token(const void *x, void *y, const void *cosine, const void *sine, int64_t from, int64_t to, int64_t table,
                         int64_t half, int64_t back, int bf16) {
    for (int64_t i = 0; i < half; i += LANES) {
        Floats first = load(x, from + i, half - i, bf16), second = load(x, from + half + i, half - i, bf16);
        Floats sine1 = load(sine, table + i, half - i, bf16), sine2 = load(sine, table + half + i, half - i, bf16);
        Floats turn1 = back ? sine2 : -sine1, turn2 = back ? -sine1 : sine2;
        store(y, to + i, half - i, first * load(cosine, table + i, half - i, bf16) + second * turn1, bf16);
        store(y, to + half + i, half - i, second * load(cosine, table + half + i, half - i, bf16) + first * turn2, bf16);
    }
}

/* x and y [tokens, heads, 2 half] with their strides, which may be one and the same; cosine and sine [tokens, 2 half]; back: the
   gradient's way. */
void rotary(const void *x, void *y, const void *cosine, const void *sine, int64_t tokens, int64_t heads, int64_t half,
            int64_t token_stride, int64_t head_stride, int64_t y_token_stride, int64_t y_head_stride, int64_t back, int64_t bf16,
            int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * heads * half > PARALLEL)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++)
            BY_TYPE(rotary_token, x, y, cosine, sine, token * token_stride + head * head_stride,
                    token * y_token_stride + head * y_head_stride, token * 2 * half, half, back);
}

/* ---- dropout ---- */

/* An element of a row is dropped where its 16 random bits, a function of seed, row and place alone, are below `dropped`. */
typedef struct {
    uint64_t seed;
    uint32_t dropped; /* of 65536 */
    float scale;      /* of what is kept */
} Dropout;

/* A row's key is SplitMix64 of seed and row (Steele et al., OOPSLA 2014). */
INLINE uint64_t row_key(Dropout dropout, int64_t row) {
    uint64_t key = dropout.seed + (uint64_t)(row + 1) * 0x9e3779b97f4a7c15;
    key = (key ^ key >> 30) * 0xbf58476d1ce4e5b9;
    key = (key ^ key >> 27) * 0x94d049bb133111eb;
    return key ^ key >> 31;
}

/* The bits of the 2 LANES elements from i, a multiple of that: the lower halves are of the first LANES. This is C. Wellons'
   lowbias32 of a counter, with half of the key added in its middle so that two rows do not walk through the same numbers. */
INLINE Words draw(uint64_t key, int64_t i) {
    const Words lane = LANE_NUMBERS;
    Words h = lane + (uint32_t)key + (uint32_t)(i / 2);
    h = (h ^ h >> 16) * 0x7feb352d;
    h = ((h ^ h >> 15) + (uint32_t)(key >> 32)) * 0x846ca68b;
    return h ^ h >> 16;
}

INLINE Floats keep(Floats x, Words bits, int upper, Dropout dropout) {
    Words own = upper ? bits >> 16 : bits & 0xffff;
    return if_not_below(own, dropout.dropped + (Words){}, x * dropout.scale);
}

INLINE void dropout_row(const void *x, const void *residual, void *y, Dropout dropout, int64_t row, int64_t at, int64_t to,
                        int bf16) {
    uint64_t key = dropout.dropped ? row_key(dropout, row) : 0;
    for (int64_t pair = at; pair < to; pair += 2 * LANES) {
        Words bits = dropout.dropped ? draw(key, pair - at) : (Words){};
        for (int upper = 0; upper < 2; upper++) {
            int64_t i = pair + upper * LANES;
            Floats value = keep(load(x, i, to - i, bf16), bits, upper, dropout);
            store(y, i, to - i, residual ? value + load(residual, i, to - i, bf16) : value, bf16);
        }
    }
}

/* Rows are `length` long, the last may be shorter. */
void dropout(const void *x, void *y, int64_t count, int64_t length, uint64_t seed, int64_t dropped,
             float scale, int64_t bf16, int64_t threads) {
    Dropout how = {seed, dropped, scale};
#pragma omp parallel for schedule(static) num_threads(threads) if (count > PARALLEL)
    for (int64_t row = 0; row < (count + length - 1) / length; row++)
        BY_TYPE(dropout_row, x, NULL, y, how, row, row * length, MIN((row + 1) * length, count));
}

/* ---- softmax of attention scores ---- */

INLINE void zero(void *y, int64_t from, int64_t to, int bf16) {
    int64_t size = bf16 ? 2 : 4;
    if (from < to)
        memset((char *)y + from * size, 0, (to - from) * size);
}

/* How many keys a query sees, of which the first `real` of `longest` are real. */
INLINE int64_t seen_keys(int64_t query, int64_t queries, int64_t longest, int64_t real, int causal) {
    int64_t past = query + 1 + longest - queries;
    int64_t seen = causal && past < real ? past : real;
    return seen < 0 ? 0 : seen;
}

INLINE void softmax_row(void *scores, void *dropped, Dropout dropout, int64_t row, int64_t at, int64_t seen, int64_t longest,
                        Floats *e, int bf16) {
    Floats tops = all(-INFINITY), sums = all(0);
    for (int64_t i = 0; i < seen; i += LANES) {
        e[i / LANES] = padded(load(scores, at + i, seen - i, bf16), seen - i, -INFINITY);
        tops = larger(e[i / LANES], tops);
    }
    float top = largest(tops);
    if (top == -INFINITY)
        seen = 0;
    for (int64_t i = 0; i < seen; i += LANES) {
        e[i / LANES] = padded(exponential(e[i / LANES] - top, bf16), seen - i, 0);
        sums += e[i / LANES];
    }
    float scale = 1 / sum(sums);
    uint64_t key = dropout.dropped ? row_key(dropout, row) : 0;
    for (int64_t pair = 0; pair < seen; pair += 2 * LANES) {
        Words bits = dropout.dropped ? draw(key, pair) : (Words){};
        for (int upper = 0; upper < 2 && pair + upper * LANES < seen; upper++) {
            int64_t i = pair + upper * LANES;
            Floats weights = e[i / LANES] * scale;
            store(scores, at + i, seen - i, weights, bf16);
            if (dropped)
                store(dropped, at + i, seen - i, keep(weights, bits, upper, dropout), bf16);
        }
    }
    zero(scores, at + seen, at + longest, bf16);
    if (dropped)
        zero(dropped, at + seen, at + longest, bf16);
}

/* Overwrites scores [batch, heads, queries, longest] with their softmax over the keys that each query sees, and writes the
   weights after dropout to `dropped_weights`, unless that is NULL. A query that sees no key gets zeros. */
void softmax_forward(void *scores, void *dropped_weights, const int32_t *keys, int64_t batch, int64_t heads, int64_t queries,
                     int64_t longest, int64_t causal, uint64_t seed, int64_t dropped, float scale, int64_t bf16,
                     int64_t threads) {
    Dropout how = {seed, dropped, scale};
    int64_t rows = batch * heads * queries;
#pragma omp parallel num_threads(threads) if (rows * longest > PARALLEL)
    {
        Floats e[longest / LANES + 1];
#pragma omp for schedule(static, 16) /* dealt out in turns, as rows differ in what they see */
        for (int64_t row = 0; row < rows; row++) {
            int64_t seen = seen_keys(row % queries, queries, longest, keys[row / (heads * queries)], causal);
            BY_TYPE(softmax_row, scores, dropped_weights, how, row, row * longest, seen, longest, e);
        }
    }
}

INLINE void softmax_backward_row(const void *weights, void *grad, Dropout dropout, int64_t row, int64_t at, int64_t seen,
                                 int64_t longest, Floats *g, int bf16) {
    Floats dots = all(0);
    uint64_t key = dropout.dropped ? row_key(dropout, row) : 0;
    for (int64_t pair = 0; pair < seen; pair += 2 * LANES) {
        Words bits = dropout.dropped ? draw(key, pair) : (Words){};
        for (int upper = 0; upper < 2 && pair + upper * LANES < seen; upper++) {
            int64_t i = pair + upper * LANES;
            g[i / LANES] = keep(load(grad, at + i, seen - i, bf16), bits, upper, dropout);
            dots += g[i / LANES] * load(weights, at + i, seen - i, bf16);
        }
    }
    float dot = sum(dots);
    for (int64_t i = 0; i < seen; i += LANES)
        store(grad, at + i, seen - i, load(weights, at + i, seen - i, bf16) * (g[i / LANES] - dot), bf16);
    zero(grad, at + seen, at + longest, bf16);
}

/* Overwrites the gradient of the weights after dropout with that of the scores; `weights` are those before dropout. */
void softmax_backward(const void *weights, void *grad, const int32_t *keys, int64_t batch, int64_t heads, int64_t queries,
                      int64_t longest, int64_t causal, uint64_t seed, int64_t dropped, float scale, int64_t bf16,
                     int64_t threads) {
    Dropout how = {seed, dropped, scale};
    int64_t rows = batch * heads * queries;
#pragma omp parallel num_threads(threads) if (rows * longest > PARALLEL)
    {
        Floats g[longest / LANES + 1];
#pragma omp for schedule(static, 16)
        for (int64_t row = 0; row < rows; row++) {
            int64_t seen = seen_keys(row % queries, queries, longest, keys[row / (heads * queries)], causal);
            BY_TYPE(softmax_backward_row, weights, grad, how, row, row * longest, seen, longest, g);
        }
    }
}

/* ---- norms: x [rows, width], weight and bias [width] in float32, the bias may be NULL ---- */

/* As Llama's: the normalised value is rounded to x's type before the weight is applied. */
INLINE void rms_norm_row(const void *x, const float *weight, void *y, float *rstd, int64_t at, int64_t width, float eps,
                         int bf16) {
    Floats even = all(0), odd = all(0); /* two, as a sum waits for the one before it */
    for (int64_t i = 0; i < width; i += 2 * LANES) {
        Floats first = load(x, at + i, width - i, bf16), second = load(x, at + i + LANES, width - i - LANES, bf16);
        even += first * first, odd += second * second;
    }
    float scale = *rstd = 1 / sqrtf(sum(even + odd) / width + eps);
    for (int64_t i = 0; i < width; i += LANES) {
        Floats normed = load(x, at + i, width - i, bf16) * scale;
        if (bf16)
            normed = (Floats)rounded_words(normed);
        store(y, at + i, width - i, load(weight, i, width - i, 0) * normed, bf16);
    }
}

void rms_norm(const void *x, const float *weight, void *y, float *rstd, int64_t rows, int64_t width, float eps, int64_t bf16,
              int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(rms_norm_row, x, weight, y, rstd + row, row * width, width, eps);
}

INLINE void rms_norm_backward_row(const void *x, const float *weight, const void *grad_y, const void *residual, void *grad_x, float rstd,
                                  int64_t at, int64_t width, int bf16) {
    Floats dots = all(0);
    for (int64_t i = 0; i < width; i += LANES)
        dots += load(grad_y, at + i, width - i, bf16) * load(weight, i, width - i, 0) * load(x, at + i, width - i, bf16);
    float along = rstd * rstd * sum(dots) / width;
    for (int64_t i = 0; i < width; i += LANES) {
        Floats grad = load(grad_y, at + i, width - i, bf16) * load(weight, i, width - i, 0);
        Floats value = rstd * (grad - along * load(x, at + i, width - i, bf16));
        store(grad_x, at + i, width - i, residual ? value + load(residual, at + i, width - i, bf16) : value, bf16);
    }
}

/* residual, added to grad_x, may be missing; grad_x may be grad_y. */
void rms_norm_backward(const void *x, const float *weight, const void *grad_y, const void *residual, void *grad_x, const float *rstd,
                       int64_t rows, int64_t width, int64_t bf16, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(rms_norm_backward_row, x, weight, grad_y, residual, grad_x, rstd[row], row * width, width);
}

INLINE void layer_norm_row(const void *x, const float *weight, const float *bias, void *y, float *mean, float *rstd, int64_t at,
                           int64_t width, float eps, int bf16) {
    Floats sums = all(0), squares = all(0);
    for (int64_t i = 0; i < width; i += LANES)
        sums += load(x, at + i, width - i, bf16);
    float centre = *mean = sum(sums) / width;
    for (int64_t i = 0; i < width; i += LANES) {
        Floats value = padded(load(x, at + i, width - i, bf16) - centre, width - i, 0);
        squares += value * value;
    }
    float scale = *rstd = 1 / sqrtf(sum(squares) / width + eps);
    for (int64_t i = 0; i < width; i += LANES) {
        Floats value = (load(x, at + i, width - i, bf16) - centre) * scale * load(weight, i, width - i, 0);
        store(y, at + i, width - i, bias ? value + load(bias, i, width - i, 0) : value, bf16);
    }
}

void layer_norm(const void *x, const float *weight, const float *bias, void *y, float *mean, float *rstd, int64_t rows,
                int64_t width, float eps, int64_t bf16, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(layer_norm_row, x, weight, bias, y, mean + row, rstd + row, row * width, width, eps);
}

INLINE void layer_norm_backward_row(const void *x, const float *weight, const void *grad_y, void *grad_x, float mean, float rstd,
                                    int64_t at, int64_t width, int bf16) {
    Floats sums = all(0), dots = all(0);
    for (int64_t i = 0; i < width; i += LANES) {
        Floats grad = load(grad_y, at + i, width - i, bf16) * load(weight, i, width - i, 0);
        sums += grad;
        dots += grad * (load(x, at + i, width - i, bf16) - mean);
    }
    float shift = sum(sums) / width, along = rstd * rstd * sum(dots) / width;
    for (int64_t i = 0; i < width; i += LANES) {
        Floats grad = load(grad_y, at + i, width - i, bf16) * load(weight, i, width - i, 0);
        Floats from_mean = load(x, at + i, width - i, bf16) - mean;
        store(grad_x, at + i, width - i, rstd * (grad - shift - along * from_mean), bf16);
    }
}

void layer_norm_backward(const void *x, const float *weight, const void *grad_y, void *grad_x, const float *mean,
                         const float *rstd, int64_t rows, int64_t width, int64_t bf16, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(layer_norm_backward_row, x, weight, grad_y, grad_x, mean[row], rstd[row], row * width, width);
}

/* The end of a block whose norm comes last: z = residual + dropout(x), y its norm. All [rows, width]. */
void add_layer_norm(const void *x, const void *residual, const float *weight, const float *bias, void *z, void *y, float *mean,
                    float *rstd, int64_t rows, int64_t width, float eps, uint64_t seed, int64_t dropped, float scale, int64_t bf16,
                    int64_t threads) {
    Dropout how = {seed, dropped, scale};
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++) {
        BY_TYPE(dropout_row, x, residual, z, how, row, row * width, (row + 1) * width);
        BY_TYPE(layer_norm_row, z, weight, bias, y, mean + row, rstd + row, row * width, width, eps);
    }
}

/* grad_x is the gradient before dropout, grad_z that of z and the residual; one and the same where nothing was dropped. */
void add_layer_norm_backward(const void *z, const float *weight, const void *grad_y, void *grad_z, void *grad_x, const float *mean,
                             const float *rstd, int64_t rows, int64_t width, uint64_t seed, int64_t dropped, float scale,
                             int64_t bf16, int64_t threads) {
    Dropout how = {seed, dropped, scale};
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++) {
        BY_TYPE(layer_norm_backward_row, z, weight, grad_y, grad_z, mean[row], rstd[row], row * width, width);
        if (grad_x != grad_z)
            BY_TYPE(dropout_row, grad_z, NULL, grad_x, how, row, row * width, (row + 1) * width);
    }
}

/* ---- cross-entropy ---- */

INLINE void cross_entropy_row(void *logits, float *maximum, float *total, float *factor, int64_t at, int64_t width, int bf16) {
    Floats tops = all(*maximum), sums = all(0);
    for (int64_t i = 0; i < width; i += LANES)
        tops = larger(padded(load(logits, at + i, width - i, bf16), width - i, -INFINITY), tops);
    float top = largest(tops);
    float base = top == -INFINITY ? 0 : top; /* nothing but -inf so far: e^-inf, not e^(inf - inf) */
    for (int64_t i = 0; i < width; i += LANES) {
        Floats e = exponential(load(logits, at + i, width - i, bf16) - base, bf16);
        sums += padded(e, width - i, 0);
        store(logits, at + i, width - i, e, bf16);
    }
    *factor = exponential_of(*maximum - base);
    *total = *total * *factor + sum(sums);
    *maximum = top;
}

/* One tile of an online softmax (Milakov & Gimelshein, arXiv 1805.02867): logits [tokens, width] become e^(logit - new maximum),
   and factors [tokens] e^(old maximum - new maximum). */
void cross_entropy_tile(void *logits, float *maxima, float *sums, float *factors, int64_t tokens, int64_t width, int64_t bf16,
                        int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * width > PARALLEL)
    for (int64_t token = 0; token < tokens; token++)
        BY_TYPE(cross_entropy_row, logits, maxima + token, sums + token, factors + token, token * width, width);
}
