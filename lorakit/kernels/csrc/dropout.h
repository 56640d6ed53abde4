/* Dropout by a hash, so that nothing is saved for the backward pass. */

#pragma once
#include "vectors.h"

/* An element of a row is dropped if its 16 random bits, a function of seed, row and position only,
   are below `dropped`. */
typedef struct {
    uint64_t seed;
    uint32_t dropped; /* out of 65536 */
    float scale;      /* of kept elements */
} Dropout;

/* The key of a row: SplitMix64 of seed and row (Steele et al., OOPSLA 2014). */
INLINE uint64_t row_key(Dropout dropout, int64_t row) {
    uint64_t key = dropout.seed + (uint64_t)(row + 1) * 0x9e3779b97f4a7c15;
    key = (key ^ key >> 30) * 0xbf58476d1ce4e5b9;
    key = (key ^ key >> 27) * 0x94d049bb133111eb;
    return key ^ key >> 31;
}

/* The random bits of 2 LANES elements from i, a multiple of that number; the lower halves belong to
   the first LANES elements. This is C. Wellons' lowbias32 of a counter, with half of the key added
   in the middle, so that no two rows run through the same numbers. */
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

INLINE void dropout_row(const void *x, const void *residual, void *y, Dropout dropout, int64_t row,
    int64_t at, int64_t to, int bf16) {
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
