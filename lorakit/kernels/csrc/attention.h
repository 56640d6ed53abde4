/* Definitions shared by the two kernels of attention over packed rows: their arguments, and the
   hash for dropout of weights. */

#pragma once
#include "vectors.h"

#include "math.h"

/* The caller's arguments, in the order of `AttentionCall` in packed_attention.py. Strides count
   elements. */
typedef struct {
    int64_t rows, heads, kv_heads, width, bf16, causal, threads, seed;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head, grad_token;
    double scaling, dropout;
    const int64_t *firsts; /* [rows + 1] the first token of each row */
} AttentionCall;

INLINE uint32_t hashed(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return (uint32_t)(x ^ x >> 31);
}

INLINE uint32_t query_hash(const AttentionCall *p, int64_t token, int64_t head) {
    return hashed((uint64_t)p->seed + ((uint64_t)token * p->heads + head) * 0x9e3779b97f4a7c15ull);
}

/* A hash of 24 bits for each weight, from the position of its key in the row and the hash of its
   query (lowbias32, C. Wellons). The weight is dropped if the hash is below `threshold_of(p)`. */
INLINE Words weight_hash(Words key, Words query) {
    Words x = key * 0x9e3779b9u ^ query;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return (x ^ x >> 16) >> 8;
}

INLINE uint32_t threshold_of(const AttentionCall *p) {
    return (uint32_t)(p->dropout * 16777216.0 + 0.5);
}
INLINE float factor_of_kept(const AttentionCall *p) { return 1.0f / (1.0f - (float)p->dropout); }

/* The tokens of the longest row, rounded up to whole blocks. */
INLINE int64_t longest_row(const AttentionCall *p, int64_t block) {
    int64_t most = 0;
    for (int64_t row = 0; row < p->rows; row++)
        most =
            p->firsts[row + 1] - p->firsts[row] > most ? p->firsts[row + 1] - p->firsts[row] : most;
    return (most + block - 1) / block * block;
}
