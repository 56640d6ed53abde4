/* Vectors of floats: loaded from bfloat16 or float32, computed with in float32, and stored.

   `bf16` tells which type the buffers have, and `threads` how many threads may share the work; no
   result depends on `threads`. All integer arguments of exported functions are int64_t.

   Kernels are written once, with GCC's vector extensions. Operations that these lack are defined
   here twice: for AVX-512, with sixteen floats, and for AVX2, with eight. */

#pragma once
#include "common.h"
#include <immintrin.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define AVX512
#define LANES 16
#define LANE_NUMBERS {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#else
#define LANES 8
#define LANE_NUMBERS {0, 1, 2, 3, 4, 5, 6, 7}
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

enum {
    SPAN = 4096,      /* elements that one thread takes at a time where rows do not matter */
    PARALLEL = 32768, /* fewest elements for which a second thread pays */
};

/* Calls f with a constant last argument, so that its loops do not test the type. */
#define BY_TYPE(f, ...)        \
    do {                       \
        if (bf16)              \
            f(__VA_ARGS__, 1); \
        else                   \
            f(__VA_ARGS__, 0); \
    } while (0)

/* A vector at an address that need not be aligned. */
INLINE Floats vector_at(const float *x) {
    Floats values;
    memcpy(&values, x, sizeof values);
    return values;
}

INLINE void put(float *y, Floats x) { memcpy(y, &x, sizeof x); }

INLINE Floats all(float x) { return x - (Floats){}; }

INLINE Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

/* Rounds to the nearest bfloat16, ties to even, in the upper half of each word. A NaN stays NaN,
   since its payload is never all ones here. */
INLINE Words rounded_words(Floats x) {
    return ((Words)x + 0x7fff + ((Words)x >> 16 & 1)) & 0xffff0000;
}

#ifdef AVX512

/* A branch, since masking each load would cost as much as the load. */
INLINE int is_whole(int64_t count) { return __builtin_expect(count >= LANES, 1); }

INLINE __mmask16 first(int64_t count) {
    return is_whole(count) ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

/* Elements i to i + LANES of x, of which the first `count` exist; the others are 0. */
INLINE Floats load(const void *x, int64_t i, int64_t count, int bf16) {
    if (!bf16)
        return is_whole(count) ? _mm512_loadu_ps((const float *)x + i)
                               : _mm512_maskz_loadu_ps(first(count), (const float *)x + i);
    const uint16_t *from = (const uint16_t *)x + i;
    __m256i halves = is_whole(count) ? _mm256_loadu_si256((const void *)from)
                                     : _mm256_maskz_loadu_epi16(first(count), from);
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

/* The first `count` elements of x, followed by the filler. */
INLINE Floats padded(Floats x, int64_t count, float filler) {
    return _mm512_mask_mov_ps(all(filler), first(count), x);
}

/* Both give NaN where x is NaN. */
INLINE Floats at_least(Floats x, float limit) { return _mm512_max_ps(all(limit), x); }

INLINE Floats at_most(Floats x, float limit) { return _mm512_min_ps(all(limit), x); }

INLINE Floats larger(Floats x, Floats y) { return _mm512_max_ps(x, y); }

INLINE Floats if_positive(Floats x, Floats yes, Floats no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(x, all(0), _CMP_GT_OQ), yes);
}

INLINE Floats if_not_below(Words x, Words limit, Floats yes) {
    return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask((__m512i)x, (__m512i)limit), yes);
}

INLINE Floats whole(Floats x) {
    return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* x 2^n for integer n; x and the result are normal numbers. */
INLINE Floats scaled(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }

/* 0 where x < limit, else `yes`; a NaN is not below the limit. */
INLINE Floats unless_below(Floats x, float limit, Floats yes) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(limit), _CMP_NLT_UQ), yes);
}

/* 1 / x for normal x > 0, with relative error 2e-7, or 6e-5 for bfloat16. */
INLINE Floats reciprocal(Floats x, int bf16) {
    Floats y = _mm512_rcp14_ps(x);
    return bf16 ? y : y + y * (1 - x * y);
}

INLINE float sum(Floats x) { return _mm512_reduce_add_ps(x); }

INLINE float largest(Floats x) { return _mm512_reduce_max_ps(x); }

#else

INLINE Floats either(Ints mask, Floats yes, Floats no) {
    return _mm256_blendv_ps(no, yes, (Floats)mask);
}

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
    /* GCC makes five instructions of __builtin_convertvector here. */
    return bf16 ? (Floats)((Words)_mm256_cvtepu16_epi32((__m128i)halves) << 16) : values;
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

INLINE Floats at_least(Floats x, float limit) { return _mm256_max_ps(all(limit), x); }

INLINE Floats at_most(Floats x, float limit) { return _mm256_min_ps(all(limit), x); }

INLINE Floats larger(Floats x, Floats y) { return _mm256_max_ps(x, y); }

INLINE Floats if_positive(Floats x, Floats yes, Floats no) { return either(x > 0, yes, no); }

INLINE Floats if_not_below(Words x, Words limit, Floats yes) {
    return (Floats)((Ints)yes & (x >= limit));
}

#define SHIFT                                                                                    \
    12582912.0f /* 1.5 * 2^23: a sum with it has no fraction, and the whole number in its lowest \
                   bits */

INLINE Floats whole(Floats x) { return x + SHIFT - SHIFT; }

INLINE Floats scaled(Floats x, Floats n) { return (Floats)((Ints)x + ((Ints)(n + SHIFT) << 23)); }

INLINE Floats unless_below(Floats x, float limit, Floats yes) {
    return (Floats)((Ints)yes & ~(x < limit));
}

INLINE Floats reciprocal(Floats x, __attribute__((unused)) int bf16) { return 1 / x; }

INLINE float sum(Floats x) {
    const Ints lane = LANE_NUMBERS;
#pragma GCC unroll 3
    for (int half = LANES / 2; half; half /= 2)
        x += __builtin_shuffle(x, lane ^ half);
    return x[0];
}

INLINE float largest(Floats x) {
    const Ints lane = LANE_NUMBERS;
#pragma GCC unroll 3
    for (int half = LANES / 2; half; half /= 2)
        x = larger(x, __builtin_shuffle(x, lane ^ half));
    return x[0];
}

#endif

/* Transposes a square of LANES vectors: swaps the off-diagonal quarters of all squares of 2 step
   vectors. */
INLINE void transpose(Floats square[LANES]) {
    const Ints lane = LANE_NUMBERS;
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step <<= 1) {
        Ints own = (lane & step) == 0;
        Ints upper = (own & lane) | (~own & ((lane ^ step) + LANES)),
             lower = (own & (lane | step)) | (~own & (lane + LANES));
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & step)) {
                Floats first = square[i], second = square[i | step];
                square[i] = __builtin_shuffle(first, second, upper);
                square[i | step] = __builtin_shuffle(first, second, lower);
            }
    }
}
