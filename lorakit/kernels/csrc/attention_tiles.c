/* Attention of packed rows of any length in bfloat16, forward and backward, by the tiles of AMX (amx.h).

   Tokens of all rows stand one after the other; a token attends to those of its own row. Everything is done for blocks of 32 keys and
   32 queries, and transposed: scores are [keys × queries], so that what belongs to a query (the largest of its scores, the sum of its
   weights, …) is a lane of a vector. Weights are rounded to bfloat16 for the products, all else is float32. Keys are taken CHUNK
   blocks at a time, so that scores stay in the cache, with the sums over them corrected when a larger score is met (Dao et al.,
   arXiv 2205.14135, algorithm 1); the backward pass computes the weights again (its algorithm 4).

   A task is one row, one key-value head with all heads that share it and, forward, at most FORWARD blocks of queries. Which tasks
   there are does not depend on the number of threads, and no task adds to what another one does, so neither does any result.

   Matrices for products are kept in blocks of 32 × 32 bfloat16 (STEP_SIZE): the left one's as two tiles, one below the other, the
   right one's as a step of a panel. Blocks that follow each other along the sum of a product do so in memory. What lies beyond a
   row's end is zero in all that is read along a sum. */

#include "attention.h"

#include "amx.h"
#include <stdlib.h>

#ifdef HAVE_AMX

enum { BLOCK = 32, CHUNK = 8, FORWARD = 16 }; /* tokens of a block; blocks */
/* Heads that share keys are tasks of their own, backward, where tasks were fewer than FEW_TASKS, for MOST_BYTES of memory at most. */
enum { FEW_TASKS = 8, MOST_BYTES = 1 << 28 };

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* -- blocks ---------------------------------------------------------------------------------------------------------- */

/* out [32 × 32] = a · b, or out + a · b, over `steps` blocks of each; with few_rows or few_columns only the first 16. */
INLINE void multiply(float *out, const bf16 *a, const bf16 *b, int64_t steps, int add, int few_rows, int few_columns) {
    written();
    if (add) {
        _tile_loadd(0, out, 128);
        _tile_loadd(1, out + TILE, 128);
        _tile_loadd(2, out + TILE * BLOCK, 128);
        _tile_loadd(3, out + TILE * BLOCK + TILE, 128);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step++, a += STEP_SIZE, b += STEP_SIZE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (!few_columns) {
            _tile_loadd(7, b + TILE_SIZE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (!few_rows) {
            _tile_loadd(5, a + TILE_SIZE, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (!few_columns)
                _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, 128);
    if (!few_columns)
        _tile_stored(1, out + TILE, 128);
    if (!few_rows) {
        _tile_stored(2, out + TILE * BLOCK, 128);
        if (!few_columns)
            _tile_stored(3, out + TILE * BLOCK + TILE, 128);
    }
}

/* A block on the left: 32 rows x[i * stride + ·], zero beyond those that are there; each bit xor those of `flip`. */
INLINE void copy_block(bf16 *out, const bf16 *x, int64_t stride, int64_t rows, __m512i flip) {
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; i++)
        _mm512_store_si512(out + i * 32, i < rows ? _mm512_xor_si512(_mm512_loadu_si512(x + i * stride), flip) : _mm512_setzero_si512());
}

/* The same block's transpose, on the left too. */
INLINE void transpose_block(bf16 *out, const bf16 *x, int64_t stride, int64_t rows) {
    pack_rows(out, x, stride, rows, BLOCK);
    for (int half = 0; half < 2; half++, out += TILE_SIZE) {
        __m512i square[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            square[i] = _mm512_load_si512(out + 32 * i);
        transpose_words(square);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            _mm512_store_si512(out + 32 * i, square[i]);
    }
}

/* A block on the right: the transpose of 32 rows of x. */
INLINE void pack_block(bf16 *out, const bf16 *x, int64_t stride, int64_t rows) {
    pack_columns(out, x, stride, rows);
    if (rows > TILE)
        pack_columns(out + TILE_SIZE, x + TILE * stride, stride, rows - TILE);
}

/* y[row * stride + ·], for 32 columns and `rows` rows = the transpose of x [32 × 32], each row times its lane of `factors`. */
INLINE void write_transpose(bf16 *y, int64_t stride, int64_t rows, const float *x, const __m512 *factors) {
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
                                           3, 18, 2, 17, 1, 16, 0);
    for (int half = 0; half * TILE < rows; half++, x += TILE, y += TILE * stride) {
        __m512i square[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            __m512 low = _mm512_load_ps(x + 2 * i * BLOCK) * factors[half], high = _mm512_load_ps(x + (2 * i + 1) * BLOCK) * factors[half];
            square[i] = _mm512_permutexvar_epi16(pairs, narrowed_32(low, high));
        }
        transpose_words(square);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if (half * TILE + i < rows)
                _mm512_storeu_si512(y + i * stride, square[i]);
    }
}

/* y[row * stride + ·], for 32 columns and `rows` rows = x [32 × 32] times `factor`. */
INLINE void write_block(bf16 *y, int64_t stride, int64_t rows, const float *x, float factor) {
    for (int64_t i = 0; i < rows; i++, x += BLOCK, y += stride)
        _mm512_storeu_si512(y, narrowed_32(_mm512_load_ps(x) * factor, _mm512_load_ps(x + TILE) * factor));
}

/* -- weights --------------------------------------------------------------------------------------------------------- */

/* 2^x to 3e-6: 2^floor(x) times a polynomial in the rest, of the least largest relative error; 0 in lanes that are not `wanted`. */
INLINE __m512 power_of_two(__m512 x, __mmask16 wanted) {
    __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 y = _mm512_set1_ps(1.353416792e-02f) * rest + 5.201146061e-02f;
    y = y * rest + 2.414427569e-01f;
    y = y * rest + 6.930038345e-01f;
    y = y * rest + 1.000002593f;
    return _mm512_maskz_scalef_ps(wanted, y, x);
}

/* log2(x) for x > 0: its exponent and, for m in [1, 2), log2(m) = 1/2 + 2 / ln(2) artanh((m - √2) / (m + √2)). */
INLINE __m512 logarithm_of_two(__m512 x) {
    __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero), root = _mm512_set1_ps(1.41421356f);
    __m512 t = (m - root) / (m + root), square = t * t;
    __m512 y = square * (2.885390082f / 9) + 2.885390082f / 7;
    y = y * square + 2.885390082f / 5;
    y = y * square + 2.885390082f / 3;
    y = y * square + 2.885390082f;
    return _mm512_getexp_ps(x) + 0.5f + y * t;
}

/* Of 32 queries and a key, those whose weight dropout keeps. */
INLINE __mmask16 kept(int64_t key, __m512i query_hashes, uint32_t threshold) {
    uvec hash = weight_hash((uvec){0} + (uint32_t)key, (uvec)query_hashes);
    return _mm512_cmpge_epu32_mask((__m512i)hash, _mm512_set1_epi32((int32_t)threshold));
}

/* Of 32 queries, half by half, those that see key number `key` of the block on the diagonal. */
INLINE __mmask16 seeing(int diagonal, int64_t key, int half) { return diagonal ? (__mmask16)(~0u << key >> half * TILE) : 0xffff; }

/* Zeros into a step of a panel, from key number `keys` on, or the next one if its neighbour is another. */
INLINE void clear_keys(bf16 *step, int64_t keys) {
    for (int64_t k = (keys + 1) / 2 * 2; k < BLOCK; k += 2) {
        _mm512_store_si512(step + k * TILE, _mm512_setzero_si512());
        _mm512_store_si512(step + k * TILE + TILE_SIZE, _mm512_setzero_si512());
    }
}

/* A row, and what its tasks need to know. */
typedef struct {
    int64_t first, tokens, blocks; /* blocks: of 32 tokens, rounded up */
    int64_t width, blocks_wide, head, causal;
    float scale; /* what scores are multiplied with before they are exponents of two; without its sign, which keys are multiplied with */
    __m512i flip;
    uint32_t threshold;
} Row;

static Row row_of(const Problem *p, int64_t number) {
    int64_t first = p->firsts[number], tokens = p->firsts[number + 1] - first;
    Row row = {.first = first, .tokens = tokens, .blocks = (tokens + BLOCK - 1) / BLOCK, .width = p->width, .blocks_wide = p->width / BLOCK};
    row.causal = p->causal, row.threshold = threshold_of(p);
    row.scale = (float)((p->scaling < 0 ? -p->scaling : p->scaling) * 1.4426950408889634);
    row.flip = _mm512_set1_epi16(p->scaling < 0 ? (int16_t)0x8000 : 0);
    return row;
}

/* Tokens of the block, at most 32. */
INLINE int64_t tokens_of(const Row *row, int64_t block) { return smaller(row->tokens - block * BLOCK, BLOCK); }

/* 32 hashes of the block's queries. */
static void hash_queries(uint32_t *hashes, const Problem *p, const Row *row, int64_t block, int64_t head) {
    for (int i = 0; i < BLOCK; i++)
        hashes[i] = query_hash(p, row->first + block * BLOCK + i, head);
}

/* -- forward --------------------------------------------------------------------------------------------------------- */

/* Of a block of queries: the largest score, and the sum of the weights relative to it. */
typedef struct {
    __m512 most[2], total[2];
} Softmax;

/* Raises `most` to the largest of the scores [keys × 32]. */
INLINE void find_most(Softmax *softmax, const float *scores, int64_t keys, int diagonal, int halves) {
    for (int half = 0; half < halves; half++) {
        __m512 even = softmax->most[half], odd = even;
        const float *own = scores + half * TILE;
        for (int64_t k = 0; k + 1 < keys; k += 2, own += 2 * BLOCK) {
            even = _mm512_mask_max_ps(even, seeing(diagonal, k, half), even, _mm512_load_ps(own));
            odd = _mm512_mask_max_ps(odd, seeing(diagonal, k + 1, half), odd, _mm512_load_ps(own + BLOCK));
        }
        if (keys % 2)
            even = _mm512_mask_max_ps(even, seeing(diagonal, keys - 1, half), even, _mm512_load_ps(own));
        softmax->most[half] = _mm512_max_ps(even, odd);
    }
}

/* Weights of `keys` keys, the first at place `first` of the row and of a block, into the panel [keys, rounded up to 32, × 32]. */
INLINE void weigh(bf16 *panel, Softmax *softmax, const float *scores, int64_t first, int64_t keys, const Row *row, const uint32_t *hashes,
                  int diagonal, int halves, int drops) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                                         34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512 scale = _mm512_set1_ps(row->scale), shift[2], total[2], weights[2][2] = {{_mm512_setzero_ps()}};
    for (int half = 0; half < halves; half++)
        shift[half] = softmax->most[half] * scale, total[half] = softmax->total[half];
    for (int64_t k = 0; k < keys; k += 2, scores += 2 * BLOCK) {
        for (int odd = 0; odd < 2; odd++)
            for (int half = 0; half < 2; half++) {
                __m512 weight = _mm512_setzero_ps();
                if (half < halves) {
                    __mmask16 seen = k + odd < keys ? seeing(diagonal, k + odd, half) : 0;
                    weight = power_of_two(_mm512_load_ps(scores + odd * BLOCK + half * TILE) * scale - shift[half], seen);
                    total[half] += weight;
                    if (drops)
                        weight = _mm512_maskz_mov_ps(kept(first + k + odd, _mm512_load_si512(hashes + half * TILE), row->threshold), weight);
                }
                weights[odd][half] = weight;
            }
        __m512i even = narrowed_32(weights[0][0], weights[0][1]), odd = narrowed_32(weights[1][0], weights[1][1]);
        bf16 *pair = panel + k / BLOCK * STEP_SIZE + k % BLOCK * TILE;
        _mm512_store_si512(pair, _mm512_permutex2var_epi16(even, low, odd));
        if (halves == 2)
            _mm512_store_si512(pair + TILE_SIZE, _mm512_permutex2var_epi16(even, high, odd));
    }
    if (keys % BLOCK)
        clear_keys(panel + keys / BLOCK * STEP_SIZE, keys % BLOCK);
    for (int half = 0; half < halves; half++)
        softmax->total[half] = total[half];
}

typedef struct {
    bf16 *keys, *values; /* keys in blocks [keys][width], values transposed in blocks [width][keys] */
    bf16 *queries, *weights; /* panels [width × 32] and [keys of a chunk × 32] */
    float *scores, *result; /* [keys of a chunk × 32], [width × 32] */
    uint32_t *hashes;
} Forward;

/* One block of queries of one head. */
INLINE void forward_block(const Problem *p, const Row *row, const Forward *at, const bf16 *q, bf16 *y, float *sums, int64_t block,
                          int64_t head, int64_t key_blocks, int halves, int drops) {
    int64_t count = tokens_of(row, block), wide = row->blocks_wide, token = row->first + block * BLOCK;
    int64_t seen = row->causal ? block + 1 : row->blocks;
    for (int64_t w = 0; w < wide; w++)
        pack_block(at->queries + w * STEP_SIZE, q + token * p->q_token + head * p->q_head + w * BLOCK, p->q_token, count);
    if (drops)
        hash_queries(at->hashes, p, row, block, head);
    Softmax softmax = {{_mm512_set1_ps(-1e38f), _mm512_set1_ps(-1e38f)}, {_mm512_setzero_ps(), _mm512_setzero_ps()}};
    for (int64_t from = 0; from < seen; from += CHUNK) {
        int64_t to = smaller(from + CHUNK, seen), keys = smaller(row->tokens - from * BLOCK, (to - from) * BLOCK);
        int64_t whole = row->causal && to == seen ? (to - 1 - from) * BLOCK : keys; /* keys that all queries see */
        for (int64_t b = from; b < to; b++)
            multiply(at->scores + (b - from) * STEP_SIZE, at->keys + b * wide * STEP_SIZE, at->queries, wide, 0, tokens_of(row, b) <= TILE,
                     halves == 1);
        Softmax before = softmax;
        find_most(&softmax, at->scores, whole, 0, halves);
        if (whole < keys)
            find_most(&softmax, at->scores + whole * BLOCK, keys - whole, 1, halves);
        if (from)
            for (int half = 0; half < halves; half++) {
                __m512 less = power_of_two((before.most[half] - softmax.most[half]) * row->scale, 0xffff);
                softmax.total[half] *= less;
                for (int64_t i = 0; i < row->width; i++) {
                    float *own = at->result + i * BLOCK + half * TILE;
                    _mm512_store_ps(own, _mm512_load_ps(own) * less);
                }
            }
        weigh(at->weights, &softmax, at->scores, from * BLOCK, whole, row, at->hashes, 0, halves, drops);
        if (whole < keys)
            weigh(at->weights + whole * BLOCK, &softmax, at->scores + whole * BLOCK, from * BLOCK + whole, keys - whole, row, at->hashes, 1,
                  halves, drops);
        for (int64_t w = 0; w < wide; w++)
            multiply(at->result + w * STEP_SIZE, at->values + (w * key_blocks + from) * STEP_SIZE, at->weights, to - from, from > 0, 0,
                     halves == 1);
    }
    __m512 factors[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    float keep = factor_of_kept(p);
    for (int half = 0; half < halves; half++) {
        __m512 sum = softmax.most[half] * row->scale + logarithm_of_two(softmax.total[half]);
        factors[half] = keep / softmax.total[half];
        _mm512_mask_storeu_ps(sums + token + half * TILE, first_of_16(count - half * TILE), sum);
    }
    for (int64_t w = 0; w < wide; w++)
        write_transpose(y + (token * p->heads + head) * p->width + w * BLOCK, p->heads * p->width, count, at->result + w * STEP_SIZE, factors);
}

static void forward_task(const Problem *p, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *y, float *sums, int64_t number, int64_t part,
                         int64_t kv, const Forward *at) {
    Row row = row_of(p, number);
    int64_t from = part * FORWARD, to = smaller(from + FORWARD, row.blocks), group = p->heads / p->kv_heads, wide = row.blocks_wide;
    int64_t seen = row.causal ? to : row.blocks;
    if (from >= to)
        return;
    for (int64_t b = 0; b < seen; b++)
        for (int64_t w = 0; w < wide; w++) {
            int64_t token = row.first + b * BLOCK;
            copy_block(at->keys + (b * wide + w) * STEP_SIZE, k + token * p->k_token + kv * p->k_head + w * BLOCK, p->k_token,
                       tokens_of(&row, b), row.flip);
            transpose_block(at->values + (w * seen + b) * STEP_SIZE, v + token * p->v_token + kv * p->v_head + w * BLOCK, p->v_token,
                            tokens_of(&row, b));
        }
    for (int64_t head = kv * group; head < (kv + 1) * group; head++)
        for (int64_t b = from; b < to; b++) {
            float *own = sums + head * p->firsts[p->rows];
            int few = tokens_of(&row, b) <= TILE;
            if (row.threshold)
                few ? forward_block(p, &row, at, q, y, own, b, head, seen, 1, 1) : forward_block(p, &row, at, q, y, own, b, head, seen, 2, 1);
            else
                few ? forward_block(p, &row, at, q, y, own, b, head, seen, 1, 0) : forward_block(p, &row, at, q, y, own, b, head, seen, 2, 0);
        }
}

/* -- backward -------------------------------------------------------------------------------------------------------- */

typedef struct {
    bf16 *keys, *values, *transposed;       /* in blocks [keys][width]; keys transposed in blocks [width][keys] */
    float *grad_keys, *grad_values;         /* in blocks [keys][width] */
    bf16 *queries, *grads;                  /* of a chunk of queries: panels [width × 32] of each block */
    bf16 *query_rows, *grad_rows;           /* the same, panels [queries × 32] of each block of the width */
    float *sums, *means;                    /* of a chunk of queries */
    uint32_t *hashes;                       /* of a chunk of queries */
    float *grad_queries;                    /* of a chunk of queries, in blocks [queries][width], each [width × queries] */
    bf16 *weights, *slopes;                 /* of a chunk of each, in blocks [keys][queries] */
    bf16 *panel;                            /* slopes of a chunk of keys and a block of queries, [keys × 32] */
    float *scores, *grad_weights;           /* [32 × 32] */
} Backward;

/* Weights and the gradients of scores of one block: each on the left [keys × queries], the latter on the right too. scores and
   grad_weights [keys × queries]. The gradients are divided by what dropout multiplies with, and by the scaling. */
INLINE void slope_block(bf16 *weights, bf16 *slopes, bf16 *panel, const float *scores, const float *grad_weights, const float *sums,
                        const float *means, int64_t first, int64_t keys, const Row *row, const uint32_t *hashes, int diagonal, int halves,
                        int drops) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3,
                                         34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512 scale = _mm512_set1_ps(row->scale), sum[2], mean[2];
    for (int half = 0; half < halves; half++)
        sum[half] = _mm512_load_ps(sums + half * TILE), mean[half] = _mm512_load_ps(means + half * TILE);
    for (int64_t k = 0; k < keys; k += 2, scores += 2 * BLOCK, grad_weights += 2 * BLOCK) {
        __m512i slope[2];
        for (int odd = 0; odd < 2; odd++) {
            __m512 kept_weight[2], own_slope[2];
            for (int half = 0; half < 2; half++) {
                kept_weight[half] = own_slope[half] = _mm512_setzero_ps();
                if (half < halves) {
                    __mmask16 seen = k + odd < keys ? seeing(diagonal, k + odd, half) : 0;
                    __m512 weight = power_of_two(_mm512_load_ps(scores + odd * BLOCK + half * TILE) * scale - sum[half], seen);
                    __m512 grad = _mm512_load_ps(grad_weights + odd * BLOCK + half * TILE);
                    kept_weight[half] = weight;
                    if (drops) {
                        __mmask16 stays = kept(first + k + odd, _mm512_load_si512(hashes + half * TILE), row->threshold);
                        kept_weight[half] = _mm512_maskz_mov_ps(stays, weight);
                        grad = _mm512_maskz_mov_ps(stays, grad);
                    }
                    own_slope[half] = _mm512_maskz_mul_ps(seen, weight, grad - mean[half]);
                }
            }
            slope[odd] = narrowed_32(own_slope[0], own_slope[1]);
            _mm512_store_si512(weights + (k + odd) * BLOCK, narrowed_32(kept_weight[0], kept_weight[1]));
            _mm512_store_si512(slopes + (k + odd) * BLOCK, slope[odd]);
        }
        _mm512_store_si512(panel + k * TILE, _mm512_permutex2var_epi16(slope[0], low, slope[1]));
        if (halves == 2)
            _mm512_store_si512(panel + k * TILE + TILE_SIZE, _mm512_permutex2var_epi16(slope[0], high, slope[1]));
    }
    clear_keys(panel, keys);
}

/* means[query] = sum over width of y · grad_y, divided by what dropout multiplies with: the mean, by weights, of their gradients. */
INLINE void mean_grads(float *means, const bf16 *y, const bf16 *grad_y, int64_t stride, int64_t width, int64_t count, float factor) {
    for (int half = 0; half < 2; half++, count -= TILE, y += TILE * stride, grad_y += TILE * stride) {
        __m512i square[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            __m512 sum = _mm512_setzero_ps();
            if (i < count)
                for (int64_t w = 0; w < width; w += BLOCK)
                    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(y + i * stride + w), (__m512bh)_mm512_loadu_si512(grad_y + i * stride + w));
            square[i] = (__m512i)sum;
        }
        transpose_words(square);
        __m512 total = (__m512)square[0];
#pragma GCC unroll 16
        for (int i = 1; i < 16; i++)
            total += (__m512)square[i];
        _mm512_store_ps(means + half * TILE, total * factor);
    }
}

/* One head, queries of blocks q_from to q_to, keys of blocks k_from to k_to. anew: nothing was added to the keys' gradients yet. */
INLINE void backward_chunk(const Row *row, const Backward *at, int64_t q_from, int64_t q_to, int64_t k_from, int64_t k_to, int anew,
                           int drops) {
    int64_t wide = row->blocks_wide, wide_size = wide * STEP_SIZE;
    for (int64_t b = q_from; b < q_to; b++) {
        int64_t own = b - q_from, last = row->causal ? smaller(k_to, b + 1) : k_to;
        int few = tokens_of(row, b) <= TILE;
        for (int64_t c = k_from; c < last; c++) {
            int64_t keys = tokens_of(row, c), place = ((c - k_from) * CHUNK + own) * STEP_SIZE;
            int diagonal = row->causal && c == b;
            bf16 *weights = at->weights + place, *slopes = at->slopes + place, *panel = at->panel + (c - k_from) * STEP_SIZE;
            const float *sums = at->sums + own * BLOCK, *means = at->means + own * BLOCK;
            const uint32_t *hashes = at->hashes + own * BLOCK;
            multiply(at->scores, at->keys + c * wide_size, at->queries + own * wide_size, wide, 0, keys <= TILE, few);
            multiply(at->grad_weights, at->values + c * wide_size, at->grads + own * wide_size, wide, 0, keys <= TILE, few);
#define SLOPES(diagonal, halves) \
    slope_block(weights, slopes, panel, at->scores, at->grad_weights, sums, means, c * BLOCK, keys, row, hashes, diagonal, halves, drops)
            if (diagonal)
                few ? SLOPES(1, 1) : SLOPES(1, 2);
            else
                few ? SLOPES(0, 1) : SLOPES(0, 2);
#undef SLOPES
        }
        for (int64_t w = 0; w < wide; w++)
            multiply(at->grad_queries + own * wide_size + w * STEP_SIZE, at->transposed + (w * row->blocks + k_from) * STEP_SIZE, at->panel,
                     last - k_from, k_from > 0, 0, few);
    }
    for (int64_t c = k_from; c < k_to; c++) {
        int64_t from = row->causal && c > q_from ? c - q_from : 0, place = ((c - k_from) * CHUNK + from) * STEP_SIZE;
        int few = tokens_of(row, c) <= TILE;
        for (int64_t w = 0; w < wide; w++) {
            int64_t panel = (w * CHUNK + from) * STEP_SIZE, sum = c * wide_size + w * STEP_SIZE;
            multiply(at->grad_values + sum, at->weights + place, at->grad_rows + panel, q_to - q_from - from, !anew, few, 0);
            multiply(at->grad_keys + sum, at->slopes + place, at->query_rows + panel, q_to - q_from - from, !anew, few, 0);
        }
    }
}

/* `heads` heads from `first` on, all of one key-value head, whose gradients are left in at->grad_keys and at->grad_values. */
static void backward_task(const Problem *p, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *y, const bf16 *grad_y, const float *sums,
                          bf16 *grad_q, int64_t number, int64_t first, int64_t heads, const Backward *at) {
    Row row = row_of(p, number);
    int64_t wide = row.blocks_wide, kv = first / (p->heads / p->kv_heads), y_token = p->heads * p->width;
    float keep = factor_of_kept(p), scaling = (float)p->scaling * keep;
    __m512 factors[2] = {_mm512_set1_ps(scaling), _mm512_set1_ps(scaling)};
    for (int64_t b = 0; b < row.blocks; b++)
        for (int64_t w = 0; w < wide; w++) {
            int64_t token = row.first + b * BLOCK, count = tokens_of(&row, b), place = (b * wide + w) * STEP_SIZE;
            const bf16 *own = k + token * p->k_token + kv * p->k_head + w * BLOCK;
            copy_block(at->keys + place, own, p->k_token, count, row.flip);
            transpose_block(at->transposed + (w * row.blocks + b) * STEP_SIZE, own, p->k_token, count);
            copy_block(at->values + place, v + token * p->v_token + kv * p->v_head + w * BLOCK, p->v_token, count, _mm512_setzero_si512());
        }
    for (int64_t head = first; head < first + heads; head++)
        for (int64_t from = 0; from < row.blocks; from += CHUNK) {
            int64_t to = smaller(from + CHUNK, row.blocks), last = row.causal ? to : row.blocks;
            for (int64_t b = from; b < to; b++) {
                int64_t token = row.first + b * BLOCK, count = tokens_of(&row, b), own = b - from;
                const bf16 *queries = q + token * p->q_token + head * p->q_head, *grads = grad_y + token * y_token + head * p->width;
                for (int64_t w = 0; w < wide; w++) {
                    int64_t columns = (own * wide + w) * STEP_SIZE, rows = (w * CHUNK + own) * STEP_SIZE;
                    pack_block(at->queries + columns, queries + w * BLOCK, p->q_token, count);
                    pack_rows(at->query_rows + rows, queries + w * BLOCK, p->q_token, count, BLOCK);
                    pack_block(at->grads + columns, grads + w * BLOCK, y_token, count);
                    pack_rows(at->grad_rows + rows, grads + w * BLOCK, y_token, count, BLOCK);
                }
                mean_grads(at->means + own * BLOCK, y + token * y_token + head * p->width, grads, y_token, p->width, count, 1 / keep);
                for (int half = 0; half < 2; half++) {
                    const float *head_sums = sums + head * p->firsts[p->rows] + token + half * TILE;
                    _mm512_store_ps(at->sums + own * BLOCK + half * TILE, _mm512_maskz_loadu_ps(first_of_16(count - half * TILE), head_sums));
                }
                if (row.threshold)
                    hash_queries(at->hashes + own * BLOCK, p, &row, b, head);
            }
            for (int64_t key = 0; key < last; key += CHUNK) {
                int anew = head == first && from == (row.causal ? key : 0);
                if (row.threshold)
                    backward_chunk(&row, at, from, to, key, smaller(key + CHUNK, last), anew, 1);
                else
                    backward_chunk(&row, at, from, to, key, smaller(key + CHUNK, last), anew, 0);
            }
            for (int64_t b = from; b < to; b++)
                for (int64_t w = 0; w < wide; w++)
                    write_transpose(grad_q + (row.first + b * BLOCK) * p->grad_token + head * p->width + w * BLOCK, p->grad_token,
                                    tokens_of(&row, b), at->grad_queries + ((b - from) * wide + w) * STEP_SIZE, factors);
        }
}

/* One block of keys: the sum of `parts` parts, each `part` floats after the one before it. */
static void write_keys(const Problem *p, bf16 *grad_k, bf16 *grad_v, int64_t number, int64_t block, int64_t kv, float *grad_keys,
                       float *grad_values, int64_t parts, int64_t part) {
    Row row = row_of(p, number);
    float keep = factor_of_kept(p), scaling = (float)p->scaling * keep;
    for (int64_t w = 0; w < row.blocks_wide; w++) {
        int64_t place = (row.first + block * BLOCK) * p->grad_token + kv * p->width + w * BLOCK;
        int64_t own = (block * row.blocks_wide + w) * STEP_SIZE;
        for (int64_t other = own + part; other < own + parts * part; other += part)
            for (int64_t i = 0; i < STEP_SIZE; i++)
                grad_keys[own + i] += grad_keys[other + i], grad_values[own + i] += grad_values[other + i];
        write_block(grad_k + place, p->grad_token, tokens_of(&row, block), grad_keys + own, scaling);
        write_block(grad_v + place, p->grad_token, tokens_of(&row, block), grad_values + own, keep);
    }
}

/* -- a call ---------------------------------------------------------------------------------------------------------- */

/* Takes parts off the memory from `*next` on, which each start at a cache line. With NULL in the beginning: counts. */
INLINE void *part_of(char **next, int64_t bytes) {
    void *part = *next;
    *next += (bytes + 63) / 64 * 64;
    return part;
}

static Forward forward_parts(char **next, int64_t blocks, int64_t width) {
    int64_t size = STEP_SIZE * sizeof(bf16), wide = width / BLOCK;
    Forward at;
    at.keys = part_of(next, blocks * wide * size);
    at.values = part_of(next, blocks * wide * size);
    at.queries = part_of(next, wide * size);
    at.weights = part_of(next, CHUNK * size);
    at.scores = part_of(next, CHUNK * 2 * size);
    at.result = part_of(next, wide * 2 * size);
    at.hashes = part_of(next, BLOCK * sizeof(uint32_t));
    return at;
}

static Backward backward_parts(char **next, int64_t blocks, int64_t width) {
    int64_t size = STEP_SIZE * sizeof(bf16), wide = width / BLOCK;
    Backward at;
    at.keys = part_of(next, blocks * wide * size);
    at.values = part_of(next, blocks * wide * size);
    at.transposed = part_of(next, blocks * wide * size);
    at.grad_keys = part_of(next, blocks * wide * 2 * size);
    at.grad_values = part_of(next, blocks * wide * 2 * size);
    at.queries = part_of(next, CHUNK * wide * size);
    at.grads = part_of(next, CHUNK * wide * size);
    at.query_rows = part_of(next, CHUNK * wide * size);
    at.grad_rows = part_of(next, CHUNK * wide * size);
    at.sums = part_of(next, CHUNK * BLOCK * sizeof(float));
    at.means = part_of(next, CHUNK * BLOCK * sizeof(float));
    at.hashes = part_of(next, CHUNK * BLOCK * sizeof(uint32_t));
    at.grad_queries = part_of(next, CHUNK * wide * 2 * size);
    at.weights = part_of(next, CHUNK * CHUNK * size);
    at.slopes = part_of(next, CHUNK * CHUNK * size);
    at.panel = part_of(next, CHUNK * size);
    at.scores = part_of(next, 2 * size);
    at.grad_weights = part_of(next, 2 * size);
    return at;
}

/* Tiles, and no denormal numbers, which cost a hundred cycles each where a weight vanishes; returns the mode to leave with. */
INLINE unsigned enter(void) {
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | _MM_FLUSH_ZERO_ON | 0x40); /* 0x40: denormals are zero */
    use_tiles();
    return mode;
}

INLINE void leave(unsigned mode) {
    _tile_release();
    _mm_setcsr(mode);
}

/* How many tasks a thread takes at once: of many, neighbours, which are heads of one row, side by side in memory. */
static int64_t at_once(const Problem *p, int64_t tasks) { return 1 + tasks / (16 * p->threads); }

static int64_t most_blocks(const Problem *p) {
    int64_t most = 0;
    for (int64_t row = 0; row < p->rows; row++)
        most = p->firsts[row + 1] - p->firsts[row] > most ? p->firsts[row + 1] - p->firsts[row] : most;
    return (most + BLOCK - 1) / BLOCK;
}

/* q, k, v: as Problem says. y [tokens, heads, width] contiguous. sums [heads, tokens of the rows]: the logarithms, to base two, of the
   softmax's sums. */
int64_t attention_forward(const Problem *p, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *y, float *sums) {
    int64_t blocks = most_blocks(p), parts = (blocks + FORWARD - 1) / FORWARD, tasks = p->rows * parts * p->kv_heads, failed = 0;
#pragma omp parallel num_threads(p->threads)
    {
        char *bytes = NULL;
        forward_parts(&bytes, blocks, p->width);
        char *memory = aligned_alloc(64, (int64_t)bytes), *next = memory;
        Forward at = forward_parts(&next, blocks, p->width);
        if (!memory)
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        unsigned mode = enter();
#pragma omp for schedule(dynamic, at_once(p, tasks))
        for (int64_t task = 0; task < tasks; task++)
            if (memory)
                forward_task(p, q, k, v, y, sums, task / p->kv_heads / parts, parts - 1 - task / p->kv_heads % parts, task % p->kv_heads, &at);
        leave(mode);
        free(memory);
    }
    return failed;
}

/* The row's first block, where those of all rows follow each other. */
static int64_t first_block(const Problem *p, int64_t row) {
    int64_t blocks = 0;
    for (int64_t other = 0; other < row; other++)
        blocks += row_of(p, other).blocks;
    return blocks;
}

/* The sums of the gradients of keys and values of each head, for all rows, where heads that share them are tasks of their own: where
   tasks would be few for the threads that a machine may have. Its size, in floats for the keys of one head, goes to *part; 0: none. */
static float *parts_by_head(const Problem *p, int64_t *part) {
    *part = first_block(p, p->rows) * BLOCK * p->width;
    int64_t bytes = 2 * p->heads * *part * (int64_t)sizeof(float);
    if (p->heads == p->kv_heads || p->rows * p->kv_heads >= FEW_TASKS || bytes > MOST_BYTES)
        return *part = 0, NULL;
    return aligned_alloc(64, bytes);
}

/* grad_y and y [tokens, heads, width] contiguous; grad_q [tokens, heads, width], grad_k and grad_v [tokens, kv heads, width], with
   tokens grad_token elements apart. */
int64_t attention_backward(const Problem *p, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *y, const bf16 *grad_y,
                           const float *sums, bf16 *grad_q, bf16 *grad_k, bf16 *grad_v) {
    int64_t blocks = most_blocks(p), group = p->heads / p->kv_heads, part, failed = 0;
    float *parts = parts_by_head(p, &part);
    int64_t heads = part ? 1 : group, tasks = p->rows * (p->heads / heads); /* heads: of a task */
    if (part && !parts)
        return 1;
#pragma omp parallel num_threads(p->threads)
    {
        char *bytes = NULL;
        backward_parts(&bytes, blocks, p->width);
        char *memory = aligned_alloc(64, (int64_t)bytes), *next = memory;
        Backward at = backward_parts(&next, blocks, p->width);
        if (!memory)
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
        unsigned mode = enter();
#pragma omp for schedule(dynamic, at_once(p, tasks))
        for (int64_t task = 0; task < tasks; task++)
            if (memory) {
                int64_t row = task / (p->heads / heads), head = task % (p->heads / heads) * heads;
                if (part) {
                    at.grad_keys = parts + 2 * head * part + first_block(p, row) * BLOCK * p->width;
                    at.grad_values = at.grad_keys + part;
                }
                backward_task(p, q, k, v, y, grad_y, sums, grad_q, row, head, heads, &at);
                if (!part)
                    for (int64_t b = 0; b < row_of(p, row).blocks; b++)
                        write_keys(p, grad_k, grad_v, row, b, head / group, at.grad_keys, at.grad_values, 1, 0);
            }
        if (part)
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < p->rows * p->kv_heads * blocks; task++) {
                int64_t row = task / blocks / p->kv_heads, kv = task / blocks % p->kv_heads;
                float *own = parts + 2 * kv * group * part + first_block(p, row) * BLOCK * p->width;
                if (task % blocks < row_of(p, row).blocks)
                    write_keys(p, grad_k, grad_v, row, task % blocks, kv, own, own + part, group, 2 * part);
            }
        leave(mode);
        free(memory);
    }
    free(parts);
    return failed;
}

#endif
