/* Rotary position embeddings, forward and backward: see vectors.h. */

#include "vectors.h"

INLINE void rotary_token(const void *x, void *y, const void *cosine, const void *sine, int64_t from,
    int64_t to, int64_t table, int64_t half, int64_t back, int bf16) {
    for (int64_t i = 0; i < half; i += LANES) {
        Floats first = load(x, from + i, half - i, bf16),
               second = load(x, from + half + i, half - i, bf16);
        Floats sine1 = load(sine, table + i, half - i, bf16),
               sine2 = load(sine, table + half + i, half - i, bf16);
        Floats turn1 = back ? sine2 : -sine1, turn2 = back ? -sine1 : sine2;
        store(y, to + i, half - i, first * load(cosine, table + i, half - i, bf16) + second * turn1,
            bf16);
        store(y, to + half + i, half - i,
            second * load(cosine, table + half + i, half - i, bf16) + first * turn2, bf16);
    }
}

/* x and y [tokens, heads, 2 half] with their strides; y may be x. cosine and sine [tokens, 2 half].
   back: rotates backwards, as the gradient needs. */
void rotary(const void *x, void *y, const void *cosine, const void *sine, int64_t tokens,
    int64_t heads, int64_t half, int64_t token_stride, int64_t head_stride, int64_t y_token_stride,
    int64_t y_head_stride, int64_t back, int64_t bf16, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * heads * half > PARALLEL)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++)
            BY_TYPE(rotary_token, x, y, cosine, sine, token * token_stride + head * head_stride,
                    token * y_token_stride + head * y_head_stride, token * 2 * half, half, back);
}
