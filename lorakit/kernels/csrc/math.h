/* e^x, 2^x and the logistic function, in several forms for the vectors and the accuracy that the
   kernels need. The form of Cephes' expf (S. Moshier) is 2^n times a polynomial on [-ln 2 / 2, ln 2
   / 2]. */

#pragma once
#include "common.h"
#include <math.h>
#include <string.h>

#define LOG2_E 1.44269504f

/* x - n ln 2. The upper part of ln 2 has few bits, so that its product with n is exact. */
#define WITHOUT_POWER(x, n) ((x) - (n) * 0.693359375f + (n) * 2.12194440e-4f)

/* (e^r - 1 - r) / r^2 */
#define CEPHES(r) \
    ((((((r) * 1.9875691500e-4f + 1.3981999507e-3f) * (r) + 8.3334519073e-3f) * (r) + \
       4.1665795894e-2f) * (r) + 1.6666665459e-1f) * (r) + 5.0000001201e-1f)

/* ---- one float, in a form that compilers vectorise ---- */

INLINE float of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* e^x to 2 units in the last place, with x clamped to [-87, 88]. */
INLINE float exp_of_float(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * LOG2_E);
    float r = WITHOUT_POWER(x, n);
    float p = CEPHES(r);
    p = p * r * r + r + 1.0f;
    return p * of_bits((uint32_t)((int32_t)n + 127) << 23);
}

/* ---- by type; only if vectors.h was included before ---- */

#ifdef LANES

/* 2^r for r in [-1/2, 1/2], to 1e-5. */
INLINE Floats power_of_fraction(Floats r) {
    Floats p = r * 0.00957010001f + 0.0559178602f;
    p = p * r + 0.240247449f;
    p = p * r + 0.693121815f;
    return p * r + 0.999999261f;
}

/* e^x for x <= 0; results below the normal numbers, which are slow on processors, become 0. The
   relative error is 2e-7, with the polynomial of expf in Cephes (S. Moshier). For bfloat16, whose
   own error is 2e-3, it is 1e-5, with a polynomial fitted to 2^r on [-1/2, 1/2]. */
INLINE Floats exponential(Floats x, int bf16) {
    const float smallest = -87.3f;
    Floats bounded = at_least(x, smallest), n, p;
    if (bf16) {
        Floats exponent = bounded * LOG2_E;
        n = whole(exponent);
        p = power_of_fraction(exponent - n);
    } else {
        n = whole(bounded * LOG2_E);
        Floats r = WITHOUT_POWER(bounded, n);
        p = CEPHES(r) * (r * r) + (r + 1);
    }
    return unless_below(x, smallest, scaled(p, n));
}

INLINE float exponential_of(float x) { return exponential(all(x), 0)[0]; }

/* The logistic function of x and of -x, each to full relative precision. */
typedef struct {
    Floats plus, minus;
} Logistic;

INLINE Logistic logistic(Floats x, int bf16) {
#ifdef AVX512
    if (bf16) { /* half the instructions; 2^126 and its inverse are near the range's ends */
        Floats exponent = at_most(x * -LOG2_E, 126);
        Floats e = scaled(power_of_fraction(exponent - whole(exponent)), whole(exponent)),
               plus = reciprocal(1 + e, bf16);
        return (Logistic){plus, e * plus};
    }
#endif
    Floats e = exponential(-magnitude(x), bf16);
    Floats large = reciprocal(1 + e, bf16), small = e * large;
    return (Logistic){if_positive(x, large, small), if_positive(x, small, large)};
}

#endif

/* ---- 2^x by AVX-512: 2^floor(x) times a minimax polynomial in the fraction ---- */

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>

INLINE __m512 above_floor(__m512 x) {
    return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

/* Relative error 2e-7. */
INLINE __m512 power_of_two(__m512 x) {
    __m512 rest = above_floor(x);
    __m512 y = _mm512_set1_ps(1.877576675e-3f) * rest + 8.989340091e-3f;
    y = y * rest + 5.582631805e-2f;
    y = y * rest + 2.401536170e-1f;
    y = y * rest + 6.931530732e-1f;
    y = y * rest + 9.999999251e-1f;
    return _mm512_scalef_ps(y, x);
}

/* Relative error 3e-6, for results that are rounded to bfloat16; 0 in lanes that are not `wanted`.
   */
INLINE __m512 rough_power_of_two(__m512 x, __mmask16 wanted) {
    __m512 rest = above_floor(x);
    __m512 y = _mm512_set1_ps(1.353416792e-02f) * rest + 5.201146061e-02f;
    y = y * rest + 2.414427569e-01f;
    y = y * rest + 6.930038345e-01f;
    y = y * rest + 1.000002593f;
    return _mm512_maskz_scalef_ps(wanted, y, x);
}

#endif
