/* The backward pass of attention by AMX (attention_tiles.c). */

#pragma once
#include "attention_blocks.h"

#ifdef HAVE_AMX

typedef struct {
    bf16 *keys, *values,
        *transposed; /* in blocks [keys][width]; keys transposed in blocks [width][keys] */
    float *grad_keys, *grad_values;         /* in blocks [keys][width] */
    bf16 *queries, *grads;        /* of a chunk of queries: panels [width × 32] of each block */
    bf16 *query_rows, *grad_rows; /* the same, panels [queries × 32] of each block of the width */
    float *sums, *means;                    /* of a chunk of queries */
    uint32_t *hashes;                       /* of a chunk of queries */
    float *grad_queries; /* of a chunk of queries, in blocks [queries][width], each [width ×
                            queries] */
    bf16 *weights, *slopes;                 /* of a chunk of each, in blocks [keys][queries] */
    bf16 *panel; /* slopes of one chunk of keys and one block of queries, [keys × 32] */
    float *scores, *grad_weights;           /* [32 × 32] */
} Backward;

/* Weights and slopes (gradients of scores) of one block: both as left operands [keys × queries],
   the slopes as a right operand too. scores and grad_weights are [keys × queries]. The gradients
   are divided by dropout's factor and by the scaling. */
INLINE void slope_block(bf16 *weights, bf16 *slopes, bf16 *panel, const float *scores,
    const float *grad_weights, const float *sums, const float *means, int64_t first, int64_t keys,
    const Row *row, const uint32_t *hashes, int diagonal, int halves, int drops) {
    const __m512i low = interleaved(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512 scale = _mm512_set1_ps(row->scale), sum[2], mean[2];
    for (int half = 0; half < halves; half++)
        sum[half] = _mm512_load_ps(sums + half * TILE),
        mean[half] = _mm512_load_ps(means + half * TILE);
    for (int64_t k = 0; k < keys; k += 2, scores += 2 * BLOCK, grad_weights += 2 * BLOCK) {
        __m512i slope[2];
        for (int odd = 0; odd < 2; odd++) {
            __m512 kept_weight[2], own_slope[2];
            for (int half = 0; half < 2; half++) {
                kept_weight[half] = own_slope[half] = _mm512_setzero_ps();
                if (half < halves) {
                    __mmask16 seen = k + odd < keys ? seeing(diagonal, k + odd, half) : 0;
                    __m512 weight = rough_power_of_two(
                        _mm512_load_ps(scores + odd * BLOCK + half * TILE) * scale - sum[half],
                        seen);
                    __m512 grad = _mm512_load_ps(grad_weights + odd * BLOCK + half * TILE);
                    kept_weight[half] = weight;
                    if (drops) {
                        __mmask16 stays = kept(first + k + odd,
                            _mm512_load_si512(hashes + half * TILE), row->threshold);
                        kept_weight[half] = _mm512_maskz_mov_ps(stays, weight);
                        grad = _mm512_maskz_mov_ps(stays, grad);
                    }
                    own_slope[half] = _mm512_maskz_mul_ps(seen, weight, grad - mean[half]);
                }
            }
            slope[odd] = narrowed_32(own_slope[0], own_slope[1]);
            _mm512_store_si512(
                weights + (k + odd) * BLOCK, narrowed_32(kept_weight[0], kept_weight[1]));
            _mm512_store_si512(slopes + (k + odd) * BLOCK, slope[odd]);
        }
        _mm512_store_si512(panel + k * TILE, _mm512_permutex2var_epi16(slope[0], low, slope[1]));
        if (halves == 2)
            _mm512_store_si512(
                panel + k * TILE + TILE_SIZE, _mm512_permutex2var_epi16(slope[0], high, slope[1]));
    }
    clear_keys(panel, keys);
}

/* means[query] = sum over width of y · grad_y, divided by dropout's factor: the mean of the
   weights' gradients, weighted by the weights. */
INLINE void mean_grads(float *means, const bf16 *y, const bf16 *grad_y, int64_t stride,
    int64_t width, int64_t count, float factor) {
    for (int half = 0; half < 2;
        half++, count -= TILE, y += TILE * stride, grad_y += TILE * stride) {
        __m512i square[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            __m512 sum = _mm512_setzero_ps();
            if (i < count)
                for (int64_t w = 0; w < width; w += BLOCK)
                    sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(y + i * stride + w),
                        (__m512bh)_mm512_loadu_si512(grad_y + i * stride + w));
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

/* One head, with queries of blocks q_from to q_to and keys of blocks k_from to k_to. anew: the
   keys' gradients are empty so far. */
INLINE void backward_chunk(const Row *row, const Backward *at, int64_t q_from, int64_t q_to,
    int64_t k_from, int64_t k_to, int anew, int drops) {
    int64_t wide = row->blocks_wide, wide_size = wide * STEP_SIZE;
    for (int64_t b = q_from; b < q_to; b++) {
        int64_t own = b - q_from, last = row->causal ? least(k_to, b + 1) : k_to;
        int few = tokens_of(row, b) <= TILE;
        for (int64_t c = k_from; c < last; c++) {
            int64_t keys = tokens_of(row, c), place = ((c - k_from) * CHUNK + own) * STEP_SIZE;
            int diagonal = row->causal && c == b;
            bf16 *weights = at->weights + place, *slopes = at->slopes + place,
                 *panel = at->panel + (c - k_from) * STEP_SIZE;
            const float *sums = at->sums + own * BLOCK, *means = at->means + own * BLOCK;
            const uint32_t *hashes = at->hashes + own * BLOCK;
            multiply(at->scores, at->keys + c * wide_size, at->queries + own * wide_size, wide, 0,
                keys <= TILE, few);
            multiply(at->grad_weights, at->values + c * wide_size, at->grads + own * wide_size,
                wide, 0, keys <= TILE, few);
#define SLOPES(diagonal, halves)                                                                   \
    slope_block(weights, slopes, panel, at->scores, at->grad_weights, sums, means, c *BLOCK, keys, \
        row, hashes, diagonal, halves, drops)
            if (diagonal)
                few ? SLOPES(1, 1) : SLOPES(1, 2);
            else
                few ? SLOPES(0, 1) : SLOPES(0, 2);
#undef SLOPES
        }
        for (int64_t w = 0; w < wide; w++)
            multiply(at->grad_queries + own * wide_size + w * STEP_SIZE,
                at->transposed + (w * row->blocks + k_from) * STEP_SIZE, at->panel, last - k_from,
                k_from > 0, 0, few);
    }
    for (int64_t c = k_from; c < k_to; c++) {
        int64_t from = row->causal && c > q_from ? c - q_from : 0,
                place = ((c - k_from) * CHUNK + from) * STEP_SIZE;
        int few = tokens_of(row, c) <= TILE;
        for (int64_t w = 0; w < wide; w++) {
            int64_t panel = (w * CHUNK + from) * STEP_SIZE, sum = c * wide_size + w * STEP_SIZE;
            multiply(at->grad_values + sum, at->weights + place, at->grad_rows + panel,
                q_to - q_from - from, !anew, few, 0);
            multiply(at->grad_keys + sum, at->slopes + place, at->query_rows + panel,
                q_to - q_from - from, !anew, few, 0);
        }
    }
}

/* Processes `heads` heads from `first` on, which share one key-value head, and leaves its gradients
   in at->grad_keys and at->grad_values. */
static void backward_task(const AttentionCall *p, const bf16 *q, const bf16 *k, const bf16 *v,
    const bf16 *y, const bf16 *grad_y, const float *sums, bf16 *grad_q, int64_t number,
    int64_t first, int64_t heads, const Backward *at) {
    Row row = row_of(p, number);
    int64_t wide = row.blocks_wide, kv = first / (p->heads / p->kv_heads),
            y_token = p->heads * p->width;
    float keep = factor_of_kept(p), scaling = (float)p->scaling * keep;
    __m512 factors[2] = {_mm512_set1_ps(scaling), _mm512_set1_ps(scaling)};
    for (int64_t b = 0; b < row.blocks; b++)
        for (int64_t w = 0; w < wide; w++) {
            int64_t token = row.first + b * BLOCK, count = tokens_of(&row, b),
                    place = (b * wide + w) * STEP_SIZE;
            const bf16 *own = k + token * p->k_token + kv * p->k_head + w * BLOCK;
            copy_block(at->keys + place, own, p->k_token, count, row.flip);
            transpose_block(
                at->transposed + (w * row.blocks + b) * STEP_SIZE, own, p->k_token, count);
            copy_block(at->values + place, v + token * p->v_token + kv * p->v_head + w * BLOCK,
                p->v_token, count, _mm512_setzero_si512());
        }
    for (int64_t head = first; head < first + heads; head++)
        for (int64_t from = 0; from < row.blocks; from += CHUNK) {
            int64_t to = least(from + CHUNK, row.blocks), last = row.causal ? to : row.blocks;
            for (int64_t b = from; b < to; b++) {
                int64_t token = row.first + b * BLOCK, count = tokens_of(&row, b), own = b - from;
                const bf16 *queries = q + token * p->q_token + head * p->q_head,
                           *grads = grad_y + token * y_token + head * p->width;
                for (int64_t w = 0; w < wide; w++) {
                    int64_t columns = (own * wide + w) * STEP_SIZE,
                            rows = (w * CHUNK + own) * STEP_SIZE;
                    pack_block(at->queries + columns, queries + w * BLOCK, p->q_token, count);
                    pack_rows(at->query_rows + rows, queries + w * BLOCK, p->q_token, count, BLOCK);
                    pack_block(at->grads + columns, grads + w * BLOCK, y_token, count);
                    pack_rows(at->grad_rows + rows, grads + w * BLOCK, y_token, count, BLOCK);
                }
                mean_grads(at->means + own * BLOCK, y + token * y_token + head * p->width, grads,
                    y_token, p->width, count, 1 / keep);
                for (int half = 0; half < 2; half++) {
                    const float *head_sums = sums + head * p->firsts[p->rows] + token + half * TILE;
                    _mm512_store_ps(at->sums + own * BLOCK + half * TILE,
                        _mm512_maskz_loadu_ps(first_of_16(count - half * TILE), head_sums));
                }
                if (row.threshold)
                    hash_queries(at->hashes + own * BLOCK, p, &row, b, head);
            }
            for (int64_t key = 0; key < last; key += CHUNK) {
                int anew = head == first && from == (row.causal ? key : 0);
                if (row.threshold)
                    backward_chunk(&row, at, from, to, key, least(key + CHUNK, last), anew, 1);
                else
                    backward_chunk(&row, at, from, to, key, least(key + CHUNK, last), anew, 0);
            }
            for (int64_t b = from; b < to; b++)
                for (int64_t w = 0; w < wide; w++)
                    write_transpose(grad_q + (row.first + b * BLOCK) * p->grad_token +
                            head * p->width + w * BLOCK,
                        p->grad_token, tokens_of(&row, b),
                        at->grad_queries + ((b - from) * wide + w) * STEP_SIZE, factors);
        }
}

/* Writes the gradients of one block of keys: the sum of `parts` parts, `part` floats apart. */
static void write_keys(const AttentionCall *p, bf16 *grad_k, bf16 *grad_v, int64_t number,
    int64_t block, int64_t kv, float *grad_keys, float *grad_values, int64_t parts, int64_t part) {
    Row row = row_of(p, number);
    float keep = factor_of_kept(p), scaling = (float)p->scaling * keep;
    for (int64_t w = 0; w < row.blocks_wide; w++) {
        int64_t place = (row.first + block * BLOCK) * p->grad_token + kv * p->width + w * BLOCK;
        int64_t own = (block * row.blocks_wide + w) * STEP_SIZE;
        for (int64_t other = own + part; other < own + parts * part; other += part)
            for (int64_t i = 0; i < STEP_SIZE; i++)
                grad_keys[own + i] += grad_keys[other + i],
                    grad_values[own + i] += grad_values[other + i];
        write_block(
            grad_k + place, p->grad_token, tokens_of(&row, block), grad_keys + own, scaling);
        write_block(grad_v + place, p->grad_token, tokens_of(&row, block), grad_values + own, keep);
    }
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

#endif
