/* One tile of an online softmax over a vocabulary: see vectors.h. */

#include "vectors.h"

#include "math.h"

INLINE void cross_entropy_row(void *logits, float *maximum, float *total, float *factor, int64_t at,
    int64_t width, int bf16) {
    Floats tops = all(*maximum), sums = all(0);
    for (int64_t i = 0; i < width; i += LANES)
        tops = larger(padded(load(logits, at + i, width - i, bf16), width - i, -INFINITY), tops);
    float top = largest(tops);
    float base =
        top == -INFINITY ? 0 : top; /* only -inf so far: e^(-inf - 0), not e^(-inf + inf) */
    for (int64_t i = 0; i < width; i += LANES) {
        Floats e = exponential(load(logits, at + i, width - i, bf16) - base, bf16);
        sums += padded(e, width - i, 0);
        store(logits, at + i, width - i, e, bf16);
    }
    *factor = exponential_of(*maximum - base);
    *total = *total * *factor + sum(sums);
    *maximum = top;
}

/* One tile of an online softmax (Milakov & Gimelshein, arXiv 1805.02867): logits [tokens, width]
   become e^(logit - new maximum), and factors [tokens] e^(old maximum - new maximum). */
void cross_entropy_tile(void *logits, float *maxima, float *sums, float *factors, int64_t tokens,
    int64_t width, int64_t bf16, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * width > PARALLEL)
    for (int64_t token = 0; token < tokens; token++)
        BY_TYPE(cross_entropy_row, logits, maxima + token, sums + token, factors + token,
            token * width, width);
}
