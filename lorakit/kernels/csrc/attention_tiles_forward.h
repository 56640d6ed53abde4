/* The forward pass of attention by AMX (attention_tiles.c). */

#pragma once
#include "attention_blocks.h"

#ifdef HAVE_AMX

/* The softmax of a block of queries: each query's largest score, and the sum of its weights
   relative to it. */
typedef struct {
    __m512 most[2], total[2];
} Softmax;

/* Updates `most` with the largest of the scores [keys × 32]. */
INLINE void find_most(
    Softmax *softmax, const float *scores, int64_t keys, int diagonal, int halves) {
    for (int half = 0; half < halves; half++) {
        __m512 even = softmax->most[half], odd = even;
        const float *own = scores + half * TILE;
        for (int64_t k = 0; k + 1 < keys; k += 2, own += 2 * BLOCK) {
            even = _mm512_mask_max_ps(even, seeing(diagonal, k, half), even, _mm512_load_ps(own));
            odd = _mm512_mask_max_ps(
                odd, seeing(diagonal, k + 1, half), odd, _mm512_load_ps(own + BLOCK));
        }
        if (keys % 2)
            even = _mm512_mask_max_ps(
                even, seeing(diagonal, keys - 1, half), even, _mm512_load_ps(own));
        softmax->most[half] = _mm512_max_ps(even, odd);
    }
}

/* Writes the weights of `keys` keys into the panel [keys, rounded up to 32, × 32]. The first key is
   at position `first` of the row, where a block starts. */
INLINE void weigh(bf16 *panel, Softmax *softmax, const float *scores, int64_t first, int64_t keys,
    const Row *row, const uint32_t *hashes, int diagonal, int halves, int drops) {
    const __m512i low = interleaved(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512 scale = _mm512_set1_ps(row->scale), shift[2], total[2],
           weights[2][2] = {{_mm512_setzero_ps()}};
    for (int half = 0; half < halves; half++)
        shift[half] = softmax->most[half] * scale, total[half] = softmax->total[half];
    for (int64_t k = 0; k < keys; k += 2, scores += 2 * BLOCK) {
        for (int odd = 0; odd < 2; odd++)
            for (int half = 0; half < 2; half++) {
                __m512 weight = _mm512_setzero_ps();
                if (half < halves) {
                    __mmask16 seen = k + odd < keys ? seeing(diagonal, k + odd, half) : 0;
                    weight = rough_power_of_two(
                        _mm512_load_ps(scores + odd * BLOCK + half * TILE) * scale - shift[half],
                        seen);
                    total[half] += weight;
                    if (drops)
                        weight = _mm512_maskz_mov_ps(
                            kept(first + k + odd, _mm512_load_si512(hashes + half * TILE),
                                row->threshold),
                            weight);
                }
                weights[odd][half] = weight;
            }
        __m512i even = narrowed_32(weights[0][0], weights[0][1]),
                odd = narrowed_32(weights[1][0], weights[1][1]);
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
    bf16 *keys,
        *values; /* keys in blocks [keys][width], values transposed in blocks [width][keys] */
    bf16 *queries, *weights; /* panels [width × 32] and [keys of a chunk × 32] */
    float *scores, *result; /* [keys of a chunk × 32], [width × 32] */
    uint32_t *hashes;
} Forward;

/* Processes one block of queries of one head. */
INLINE void forward_block(const AttentionCall *p, const Row *row, const Forward *at, const bf16 *q,
    bf16 *y, float *sums, int64_t block, int64_t head, int64_t key_blocks, int halves, int drops) {
    int64_t count = tokens_of(row, block), wide = row->blocks_wide,
            token = row->first + block * BLOCK;
    int64_t seen = row->causal ? block + 1 : row->blocks;
    for (int64_t w = 0; w < wide; w++)
        pack_block(at->queries + w * STEP_SIZE,
            q + token * p->q_token + head * p->q_head + w * BLOCK, p->q_token, count);
    if (drops)
        hash_queries(at->hashes, p, row, block, head);
    Softmax softmax = {{_mm512_set1_ps(-1e38f), _mm512_set1_ps(-1e38f)},
        {_mm512_setzero_ps(), _mm512_setzero_ps()}};
    for (int64_t from = 0; from < seen; from += CHUNK) {
        int64_t to = least(from + CHUNK, seen),
                keys = least(row->tokens - from * BLOCK, (to - from) * BLOCK);
        int64_t whole = row->causal && to == seen ? (to - 1 - from) * BLOCK
                                                  : keys; /* keys seen by all queries */
        for (int64_t b = from; b < to; b++)
            multiply(at->scores + (b - from) * STEP_SIZE, at->keys + b * wide * STEP_SIZE,
                at->queries, wide, 0, tokens_of(row, b) <= TILE, halves == 1);
        Softmax before = softmax;
        find_most(&softmax, at->scores, whole, 0, halves);
        if (whole < keys)
            find_most(&softmax, at->scores + whole * BLOCK, keys - whole, 1, halves);
        if (from)
            for (int half = 0; half < halves; half++) {
                __m512 less = rough_power_of_two(
                    (before.most[half] - softmax.most[half]) * row->scale, 0xffff);
                softmax.total[half] *= less;
                for (int64_t i = 0; i < row->width; i++) {
                    float *own = at->result + i * BLOCK + half * TILE;
                    _mm512_store_ps(own, _mm512_load_ps(own) * less);
                }
            }
        weigh(at->weights, &softmax, at->scores, from * BLOCK, whole, row, at->hashes, 0, halves,
            drops);
        if (whole < keys)
            weigh(at->weights + whole * BLOCK, &softmax, at->scores + whole * BLOCK,
                from * BLOCK + whole, keys - whole, row, at->hashes, 1, halves, drops);
        for (int64_t w = 0; w < wide; w++)
            multiply(at->result + w * STEP_SIZE, at->values + (w * key_blocks + from) * STEP_SIZE,
                at->weights, to - from, from > 0, 0, halves == 1);
    }
    __m512 factors[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    float keep = factor_of_kept(p);
    for (int half = 0; half < halves; half++) {
        __m512 sum = softmax.most[half] * row->scale + logarithm_of_two(softmax.total[half]);
        factors[half] = keep / softmax.total[half];
        _mm512_mask_storeu_ps(sums + token + half * TILE, first_of_16(count - half * TILE), sum);
    }
    for (int64_t w = 0; w < wide; w++)
        write_transpose(y + (token * p->heads + head) * p->width + w * BLOCK, p->heads * p->width,
            count, at->result + w * STEP_SIZE, factors);
}

static void forward_task(const AttentionCall *p, const bf16 *q, const bf16 *k, const bf16 *v,
    bf16 *y, float *sums, int64_t number, int64_t part, int64_t kv, const Forward *at) {
    Row row = row_of(p, number);
    int64_t from = part * FORWARD, to = least(from + FORWARD, row.blocks),
            group = p->heads / p->kv_heads, wide = row.blocks_wide;
    int64_t seen = row.causal ? to : row.blocks;
    if (from >= to)
        return;
    for (int64_t b = 0; b < seen; b++)
        for (int64_t w = 0; w < wide; w++) {
            int64_t token = row.first + b * BLOCK;
            copy_block(at->keys + (b * wide + w) * STEP_SIZE,
                k + token * p->k_token + kv * p->k_head + w * BLOCK, p->k_token, tokens_of(&row, b),
                row.flip);
            transpose_block(at->values + (w * seen + b) * STEP_SIZE,
                v + token * p->v_token + kv * p->v_head + w * BLOCK, p->v_token,
                tokens_of(&row, b));
        }
    for (int64_t head = kv * group; head < (kv + 1) * group; head++)
        for (int64_t b = from; b < to; b++) {
            float *own = sums + head * p->firsts[p->rows];
            int few = tokens_of(&row, b) <= TILE;
            if (row.threshold)
                few ? forward_block(p, &row, at, q, y, own, b, head, seen, 1, 1)
                    : forward_block(p, &row, at, q, y, own, b, head, seen, 2, 1);
            else
                few ? forward_block(p, &row, at, q, y, own, b, head, seen, 1, 0)
                    : forward_block(p, &row, at, q, y, own, b, head, seen, 2, 0);
        }
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

#endif
