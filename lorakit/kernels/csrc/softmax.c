/* Softmax of attention scores, forward and backward, with dropout, and one tile of an online
   softmax over a vocabulary: see vectors.h. */

#include "dropout.h"

#include "math.h"

INLINE void zero(void *y, int64_t from, int64_t to, int bf16) {
    int64_t size = bf16 ? 2 : 4;
    if (from < to)
        memset((char *)y + from * size, 0, (to - from) * size);
}

/* The number of keys that a query sees; the first `real` of `longest` keys are real. */
INLINE int64_t seen_keys(
    int64_t query, int64_t queries, int64_t longest, int64_t real, int causal) {
    int64_t past = query + 1 + longest - queries;
    int64_t seen = causal && past < real ? past : real;
    return seen < 0 ? 0 : seen;
}

INLINE void softmax_row(void *scores, void *dropped, Dropout dropout, int64_t row, int64_t at,
    int64_t seen, int64_t longest, Floats *e, int bf16) {
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

/* Overwrites scores [batch, heads, queries, longest] with their softmax over the keys that each
   query sees, and writes the weights after dropout to `dropped_weights`, unless that is NULL. A
   query that sees no key gets zeros. */
void softmax_forward(void *scores, void *dropped_weights, const int32_t *keys, int64_t batch,
    int64_t heads, int64_t queries, int64_t longest, int64_t causal, uint64_t seed, int64_t dropped,
    float scale, int64_t bf16, int64_t threads) {
    Dropout how = {seed, dropped, scale};
    int64_t rows = batch * heads * queries;
#pragma omp parallel num_threads(threads) if (rows * longest > PARALLEL)
    {
        Floats e[longest / LANES + 1];
#pragma omp for schedule(static, 16) /* small chunks, as rows see different numbers of keys */
        for (int64_t row = 0; row < rows; row++) {
            int64_t seen =
                seen_keys(row % queries, queries, longest, keys[row / (heads * queries)], causal);
            BY_TYPE(
                softmax_row, scores, dropped_weights, how, row, row * longest, seen, longest, e);
        }
    }
}

INLINE void softmax_backward_row(const void *weights, void *grad, Dropout dropout, int64_t row,
    int64_t at, int64_t seen, int64_t longest, Floats *g, int bf16) {
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
        store(grad, at + i, seen - i, load(weights, at + i, seen - i, bf16) * (g[i / LANES] - dot),
            bf16);
    zero(grad, at + seen, at + longest, bf16);
}

/* Overwrites the gradient of the weights after dropout with that of the scores; `weights` are those
 * before dropout. */
void softmax_backward(const void *weights, void *grad, const int32_t *keys, int64_t batch,
    int64_t heads, int64_t queries, int64_t longest, int64_t causal, uint64_t seed, int64_t dropped,
    float scale, int64_t bf16, int64_t threads) {
    Dropout how = {seed, dropped, scale};
    int64_t rows = batch * heads * queries;
#pragma omp parallel num_threads(threads) if (rows * longest > PARALLEL)
    {
        Floats g[longest / LANES + 1];
#pragma omp for schedule(static, 16)
        for (int64_t row = 0; row < rows; row++) {
            int64_t seen =
                seen_keys(row % queries, queries, longest, keys[row / (heads * queries)], causal);
            BY_TYPE(softmax_backward_row, weights, grad, how, row, row * longest, seen, longest, g);
        }
    }
}

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
