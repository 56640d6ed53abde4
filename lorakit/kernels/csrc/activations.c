/* GELU, SiLU and the gated SiLU, forward and backward: see vectors.h. */

#include "vectors.h"

#include "math.h"

/* Phi(-a) = e^(-a^2/2) t Q(t) with t = 1 / (1 + c a), for 0 <= a <= 13, in the form of Abramowitz &
   Stegun 26.2.17; Q is fitted to a relative error of 2e-7 or, for bfloat16, 1e-4. Returns
   e^(-a^2/2) too, which the density needs. */
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

/* x (1 + tanh u) / 2 = x logistic(2u), u = sqrt(2/pi) (x + 0.044715 x^3). */
INLINE Floats gelu_tanh_value(Floats x, int bf16) {
    return x * logistic(x * (1.59576912f + 0.0713548163f * (x * x)), bf16).plus;
}

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

#define ACTIVATION(name)                                                                         \
    INLINE void name##_span(const void *x, void *y, int64_t from, int64_t to, int bf16) {        \
        for (int64_t i = from; i < to; i += LANES)                                               \
            store(y, i, to - i, name##_value(load(x, i, to - i, bf16), bf16), bf16);             \
    }                                                                                            \
    INLINE void name##_backward_span(                                                            \
        const void *x, const void *grad_y, void *grad_x, int64_t from, int64_t to, int bf16) {   \
        for (int64_t i = from; i < to; i += LANES) {                                             \
            Floats grad = load(grad_y, i, to - i, bf16);                                         \
            store(grad_x, i, to - i, grad * name##_slope(load(x, i, to - i, bf16), bf16), bf16); \
        }                                                                                        \
    }                                                                                            \
    void name(const void *x, void *y, int64_t count, int64_t bf16, int64_t threads) {            \
        _Pragma("omp parallel for num_threads(threads) if (count > PARALLEL)")                   \
        for (int64_t from = 0; from < count; from += SPAN)                                       \
            BY_TYPE(name##_span, x, y, from, least(from + SPAN, count));                         \
    }                                                                                            \
    void name##_backward(const void *x, const void *grad_y, void *grad_x, int64_t count,         \
        int64_t bf16, int64_t threads) {                                                         \
        _Pragma("omp parallel for num_threads(threads) if (count > PARALLEL)")                   \
        for (int64_t from = 0; from < count; from += SPAN)                                       \
            BY_TYPE(name##_backward_span, x, grad_y, grad_x, from, least(from + SPAN, count));   \
    }

ACTIVATION(gelu)
ACTIVATION(gelu_tanh)
ACTIVATION(silu)

INLINE void silu_mul_row(const void *gate, const void *up, void *y, int64_t g, int64_t u,
    int64_t at, int64_t width, int bf16) {
    for (int64_t i = 0; i < width; i += LANES) {
        Floats value =
            silu_value(load(gate, g + i, width - i, bf16), bf16) * load(up, u + i, width - i, bf16);
        store(y, at + i, width - i, value, bf16);
    }
}

/* silu(gate) * up, for gate and up [rows, width] with row strides in elements; y is contiguous. */
void silu_mul(const void *gate, const void *up, void *y, int64_t rows, int64_t width,
    int64_t gate_stride, int64_t up_stride, int64_t bf16, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(silu_mul_row, gate, up, y, row * gate_stride, row * up_stride, row * width, width);
}

INLINE void silu_mul_backward_row(const void *gate, const void *up, const void *grad_y,
    void *grad_gate, void *grad_up, int64_t g, int64_t u, int64_t at, int64_t out, int64_t width,
    int bf16) {
    for (int64_t i = 0; i < width; i += LANES) {
        Floats x = load(gate, g + i, width - i, bf16), grad = load(grad_y, at + i, width - i, bf16);
        Logistic s = logistic(x, bf16);
        Floats of_up = grad * s.plus;
        store(grad_gate, out + i, width - i,
            of_up * load(up, u + i, width - i, bf16) * (1 + x * s.minus), bf16);
        store(grad_up, out + i, width - i, of_up * x, bf16);
    }
}

/* Rows of the gradients are grad_stride elements apart. */
void silu_mul_backward(const void *gate, const void *up, const void *grad_y, void *grad_gate,
    void *grad_up, int64_t rows, int64_t width, int64_t gate_stride, int64_t up_stride,
    int64_t grad_stride, int64_t bf16, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(silu_mul_backward_row, gate, up, grad_y, grad_gate, grad_up, row * gate_stride,
            row * up_stride, row * width, row * grad_stride, width);
}
