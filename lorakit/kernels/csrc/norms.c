/* RMS norm and layer norm, forward and backward, of x [rows, width]; weight and bias [width] are
   float32, and the bias may be NULL. See vectors.h. */

#include "dropout.h"

#include <math.h>

/* As in Llama, the normalised value is rounded to x's type before it is multiplied by the weight.
   */
INLINE void rms_norm_row(const void *x, const float *weight, void *y, float *rstd, int64_t at,
    int64_t width, float eps, int bf16) {
    Floats even = all(0), odd = all(0); /* two sums, to hide latency */
    for (int64_t i = 0; i < width; i += 2 * LANES) {
        Floats first = load(x, at + i, width - i, bf16),
               second = load(x, at + i + LANES, width - i - LANES, bf16);
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

void rms_norm(const void *x, const float *weight, void *y, float *rstd, int64_t rows, int64_t width,
    float eps, int64_t bf16, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(rms_norm_row, x, weight, y, rstd + row, row * width, width, eps);
}

INLINE void rms_norm_backward_row(const void *x, const float *weight, const void *grad_y,
    const void *residual, void *grad_x, float rstd, int64_t at, int64_t width, int bf16) {
    Floats dots = all(0);
    for (int64_t i = 0; i < width; i += LANES)
        dots += load(grad_y, at + i, width - i, bf16) * load(weight, i, width - i, 0) *
            load(x, at + i, width - i, bf16);
    float along = rstd * rstd * sum(dots) / width;
    for (int64_t i = 0; i < width; i += LANES) {
        Floats grad = load(grad_y, at + i, width - i, bf16) * load(weight, i, width - i, 0);
        Floats value = rstd * (grad - along * load(x, at + i, width - i, bf16));
        store(grad_x, at + i, width - i,
            residual ? value + load(residual, at + i, width - i, bf16) : value, bf16);
    }
}

/* residual is added to grad_x and may be NULL; grad_x may be grad_y. */
void rms_norm_backward(const void *x, const float *weight, const void *grad_y, const void *residual,
    void *grad_x, const float *rstd, int64_t rows, int64_t width, int64_t bf16, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(rms_norm_backward_row, x, weight, grad_y, residual, grad_x, rstd[row], row * width,
            width);
}

INLINE void layer_norm_row(const void *x, const float *weight, const float *bias, void *y,
    float *mean, float *rstd, int64_t at, int64_t width, float eps, int bf16) {
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
        Floats value =
            (load(x, at + i, width - i, bf16) - centre) * scale * load(weight, i, width - i, 0);
        store(y, at + i, width - i, bias ? value + load(bias, i, width - i, 0) : value, bf16);
    }
}

void layer_norm(const void *x, const float *weight, const float *bias, void *y, float *mean,
    float *rstd, int64_t rows, int64_t width, float eps, int64_t bf16, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(
            layer_norm_row, x, weight, bias, y, mean + row, rstd + row, row * width, width, eps);
}

INLINE void layer_norm_backward_row(const void *x, const float *weight, const void *grad_y,
    void *grad_x, float mean, float rstd, int64_t at, int64_t width, int bf16) {
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

void layer_norm_backward(const void *x, const float *weight, const void *grad_y, void *grad_x,
    const float *mean, const float *rstd, int64_t rows, int64_t width, int64_t bf16,
    int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++)
        BY_TYPE(layer_norm_backward_row, x, weight, grad_y, grad_x, mean[row], rstd[row],
            row * width, width);
}

/* The end of a block with a final norm: z = residual + dropout(x), and y is the norm of z. All are
   [rows, width]. */
void add_layer_norm(const void *x, const void *residual, const float *weight, const float *bias,
    void *z, void *y, float *mean, float *rstd, int64_t rows, int64_t width, float eps,
    uint64_t seed, int64_t dropped, float scale, int64_t bf16, int64_t threads) {
    Dropout how = {seed, dropped, scale};
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++) {
        BY_TYPE(dropout_row, x, residual, z, how, row, row * width, (row + 1) * width);
        BY_TYPE(
            layer_norm_row, z, weight, bias, y, mean + row, rstd + row, row * width, width, eps);
    }
}

/* grad_x is the gradient of x, before dropout; grad_z is that of z and the residual. They may be
   one buffer if nothing was dropped. */
void add_layer_norm_backward(const void *z, const float *weight, const void *grad_y, void *grad_z,
    void *grad_x, const float *mean, const float *rstd, int64_t rows, int64_t width, uint64_t seed,
    int64_t dropped, float scale, int64_t bf16, int64_t threads) {
    Dropout how = {seed, dropped, scale};
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * width > PARALLEL)
    for (int64_t row = 0; row < rows; row++) {
        BY_TYPE(layer_norm_backward_row, z, weight, grad_y, grad_z, mean[row], rstd[row],
            row * width, width);
        if (grad_x != grad_z)
            BY_TYPE(dropout_row, grad_z, NULL, grad_x, how, row, row * width, (row + 1) * width);
    }
}
