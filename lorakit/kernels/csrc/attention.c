/* Attention of packed rows, forward and backward, for rows so short that their products are too
   small for a library.

   Tokens of all rows are concatenated; a token attends to those of its own row. Everything is
   computed in float32, four queries at a time against all keys that they see. The backward pass
   recomputes the weights from the logarithms of their sums (Dao et al., arXiv 2205.14135,
   algorithms 1 and 4, with all keys as one block). A task is one row and one key-value head; no
   result depends on the number of threads. Vectors have sixteen floats; the compiler splits them
   where the processor's are shorter. */

#include "attention.h"
#include <stdlib.h>
#include <string.h>

SIZE_OF(AttentionCall)

typedef uint16_t half __attribute__((vector_size(32)));
typedef float vec_any __attribute__((vector_size(64), aligned(4)));
typedef half half_any __attribute__((aligned(2)));

enum { WIDE = 16, QUERIES = 4 };

INLINE vec widened(const void *x, int64_t at, int bf16) {
    if (!bf16)
        return *(const vec_any *)((const float *)x + at);
    uvec bits = __builtin_convertvector(*(const half_any *)((const uint16_t *)x + at), uvec) << 16;
    return (vec)bits;
}

INLINE void narrowed(void *y, int64_t at, vec x, int bf16) {
    if (bf16) {
        uvec bits = (uvec)x;
        *(half_any *)((uint16_t *)y + at) =
            __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, half);
    } else
        *(vec_any *)((float *)y + at) = x;
}

INLINE float sum(vec x) {
    float total = 0;
    for (int lane = 0; lane < WIDE; lane++)
        total += x[lane];
    return total;
}

INLINE float maximum(vec x) {
    float most = x[0];
    for (int lane = 1; lane < WIDE; lane++)
        most = x[lane] > most ? x[lane] : most;
    return most;
}

/* A mask of sixteen keys: all ones where dropout keeps the weight of the query and the key. */
INLINE ivec kept(uint32_t query, int key, uint32_t threshold) {
    uvec keys = (uvec){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + (uint32_t)key;
    return (ivec)weight_hash(keys, (uvec){0} + query) >= (ivec){0} + (int32_t)threshold;
}

/* out[query][key] = sum over width of x[query][i] * table[i][key], for keys up to `keys`, a
 * multiple of WIDE. */
INLINE void against(vec *out, const float *x, const vec *table, int width, int keys, int stride) {
    int vectors = keys / WIDE, all = stride / WIDE;
    for (int k = 0; k < vectors; k++) {
        vec a = {0}, b = {0}, c = {0}, d = {0};
        for (int i = 0; i < width; i++) {
            vec t = table[i * all + k];
            a += x[i] * t, b += x[width + i] * t, c += x[2 * width + i] * t,
                d += x[3 * width + i] * t;
        }
        out[k] = a, out[all + k] = b, out[2 * all + k] = c, out[3 * all + k] = d;
    }
}

/* out[query][·] = sum over keys of weights[query][key] * values[key][·]. */
INLINE void along(
    vec *out, const float *weights, const vec *values, int width, int keys, int stride) {
    for (int k = 0; k < width / WIDE; k++) {
        vec a = {0}, b = {0}, c = {0}, d = {0};
        for (int j = 0; j < keys; j++) {
            vec v = values[j * (width / WIDE) + k];
            a += weights[j] * v, b += weights[stride + j] * v, c += weights[2 * stride + j] * v,
                d += weights[3 * stride + j] * v;
        }
        out[k] = a, out[width / WIDE + k] = b, out[2 * (width / WIDE) + k] = c,
        out[3 * (width / WIDE) + k] = d;
    }
}

/* sums[key][·] += sum over the four queries of weights[query][key] * x[query][·]. */
INLINE void into(vec *sums, const float *weights, const vec *x, int width, int keys, int stride) {
    int vectors = width / WIDE;
    for (int j = 0; j < keys; j++)
        for (int k = 0; k < vectors; k++)
            sums[j * vectors + k] += weights[j] * x[k] + weights[stride + j] * x[vectors + k] +
                weights[2 * stride + j] * x[2 * vectors + k] +
                weights[3 * stride + j] * x[3 * vectors + k];
}

/* Transposes a square of sixteen vectors. */
INLINE void transpose(vec square[WIDE]) {
#ifdef __AVX512F__
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
    for (int step = 1; step < WIDE;
        step <<= 1) { /* swaps the off-diagonal quarters of all squares of 2 step vectors */
        ivec own = (lane & step) == 0;
        ivec upper = (own & lane) | (~own & ((lane ^ step) + WIDE)),
             lower = (own & (lane | step)) | (~own & (lane + WIDE));
#pragma GCC unroll 16
        for (int i = 0; i < WIDE; i++)
            if (!(i & step)) {
                vec first = square[i], second = square[i | step];
                square[i] = __builtin_shuffle(first, second, upper);
                square[i | step] = __builtin_shuffle(first, second, lower);
            }
    }
#else
    for (int i = 0; i < WIDE; i++)
        for (int j = 0; j < i; j++) {
            float x = square[i][j];
            square[i][j] = square[j][i], square[j][i] = x;
        }
#endif
}

/* Reads rows[token][·] of one head in float32, and with `columns` also their transpose [·][token],
   which is zero beyond the tokens. */
INLINE void read_head(float *rows, float *columns, const void *x, int64_t at, int64_t token,
    int tokens, int width, int stride, int bf16) {
    for (int first = 0; first < stride; first += WIDE)
        for (int k = 0; k < width; k += WIDE) {
            vec square[WIDE];
#pragma GCC unroll 16
            for (int t = 0; t < WIDE; t++)
                square[t] =
                    first + t < tokens ? widened(x, at + (first + t) * token + k, bf16) : (vec){0};
            if (rows)
#pragma GCC unroll 16
                for (int t = 0; t < WIDE; t++)
                    *(vec *)(rows + (first + t) * width + k) = square[t];
            if (columns) {
                transpose(square);
#pragma GCC unroll 16
                for (int i = 0; i < WIDE; i++)
                    *(vec *)(columns + (k + i) * stride + first) = square[i];
            }
        }
}

/* Reads four queries; queries beyond the row are zero. */
INLINE void read_queries(float *out, const void *x, int64_t at, int64_t token, int count, int width,
    float factor, int bf16) {
    for (int b = 0; b < QUERIES; b++)
        for (int k = 0; k < width; k += WIDE)
            *(vec *)(out + b * width + k) =
                b < count ? widened(x, at + b * token + k, bf16) * factor : (vec){0};
}

typedef struct {
    int first, tokens, stride; /* of the row; stride: its tokens rounded up to a multiple of WIDE */
    uint32_t threshold;
    float keep;
} Row;

static Row row_of(const AttentionCall *p, int64_t row) {
    int first = p->firsts[row], tokens = p->firsts[row + 1] - first;
    return (Row){
        first, tokens, (tokens + WIDE - 1) / WIDE * WIDE, threshold_of(p), factor_of_kept(p)};
}

INLINE int seen_by(const AttentionCall *p, const Row *row, int query) {
    return p->causal ? query + 1 : row->tokens;
}

static float *scratch(int64_t floats) {
    return aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
}

INLINE void forward_task(const AttentionCall *p, const void *q, const void *k, const void *v,
    void *y, float *sums, int64_t row_number, int kv, float *memory, int bf16) {
    Row row = row_of(p, row_number);
    int width = p->width, stride = row.stride, group = p->heads / p->kv_heads;
    float *keys = memory, *values = keys + width * stride, *queries = values + width * stride;
    float *weights = queries + QUERIES * width, *result = weights + QUERIES * stride;
    read_head(NULL, keys, k, row.first * p->k_token + kv * p->k_head, p->k_token, row.tokens, width,
        stride, bf16);
    read_head(values, NULL, v, row.first * p->v_token + kv * p->v_head, p->v_token, row.tokens,
        width, stride, bf16);
    for (int head = kv * group; head < (kv + 1) * group; head++)
        for (int i = 0; i < row.tokens; i += QUERIES) {
            int count = row.tokens - i < QUERIES ? row.tokens - i : QUERIES;
            int seen = seen_by(p, &row, i + count - 1), padded = (seen + WIDE - 1) / WIDE * WIDE;
            read_queries(queries, q, (row.first + i) * p->q_token + head * p->q_head, p->q_token,
                count, width, p->scaling, bf16);
            against((vec *)weights, queries, (const vec *)keys, width, padded, stride);
            for (int b = 0; b < QUERIES; b++) {
                float *own = weights + b * stride;
                int own_seen = b < count ? seen_by(p, &row, i + b) : 0, token = row.first + i + b;
                for (int j = own_seen; j < padded; j++)
                    own[j] = -INFINITY;
                if (!own_seen) {
                    memset(own, 0, sizeof(float) * padded);
                    continue;
                }
                vec most = *(vec *)own, total = {0};
                for (int j = WIDE; j < padded; j += WIDE) {
                    vec w = *(vec *)(own + j);
                    most = chosen(w > most, w, most);
                }
                float highest = maximum(most);
                for (int j = 0; j < padded; j += WIDE) {
                    vec w = exp_of_16(*(vec *)(own + j) - highest);
                    total += w;
                    *(vec *)(own + j) = w;
                }
                float whole = sum(total), factor = 1.0f / whole;
                sums[(int64_t)token * p->heads + head] = highest + logf(whole);
                uint32_t hash = row.threshold ? query_hash(p, token, head) : 0;
                for (int j = 0; j < padded; j += WIDE) {
                    vec w = *(vec *)(own + j) * factor;
                    if (row.threshold)
                        w = chosen(kept(hash, j, row.threshold), w * row.keep, splat(0));
                    *(vec *)(own + j) = w;
                }
            }
            along((vec *)result, weights, (const vec *)values, width, seen, stride);
            for (int b = 0; b < count; b++)
                for (int c = 0; c < width; c += WIDE)
                    narrowed(y, ((int64_t)(row.first + i + b) * p->heads + head) * width + c,
                        *(vec *)(result + b * width + c), bf16);
        }
}

INLINE void backward_task(const AttentionCall *p, const void *q, const void *k, const void *v,
    const void *y, const void *grad_y, const float *sums, void *grad_q, void *grad_k, void *grad_v,
    int64_t row_number, int kv, float *memory, int bf16) {
    Row row = row_of(p, row_number);
    int width = p->width, stride = row.stride, group = p->heads / p->kv_heads,
        size = width * stride;
    float *keys = memory, *key_rows = keys + size, *values = key_rows + size,
          *key_sums = values + size, *value_sums = key_sums + size;
    float *queries = value_sums + size, *grads = queries + QUERIES * width,
          *result = grads + QUERIES * width;
    float *weights = result + QUERIES * width, *dropped = weights + QUERIES * stride,
          *grad = dropped + QUERIES * stride;
    read_head(key_rows, keys, k, row.first * p->k_token + kv * p->k_head, p->k_token, row.tokens,
        width, stride, bf16);
    read_head(NULL, values, v, row.first * p->v_token + kv * p->v_head, p->v_token, row.tokens,
        width, stride, bf16);
    memset(key_sums, 0, sizeof(float) * 2 * size);
    for (int head = kv * group; head < (kv + 1) * group; head++)
        for (int i = 0; i < row.tokens; i += QUERIES) {
            int count = row.tokens - i < QUERIES ? row.tokens - i : QUERIES;
            int seen = seen_by(p, &row, i + count - 1), padded = (seen + WIDE - 1) / WIDE * WIDE;
            int64_t place = ((int64_t)(row.first + i) * p->heads + head) * width;
            read_queries(queries, q, (row.first + i) * p->q_token + head * p->q_head, p->q_token,
                count, width, p->scaling, bf16);
            read_queries(grads, grad_y, place, p->heads * width, count, width, 1.0f, bf16);
            read_queries(result, y, place, p->heads * width, count, width, 1.0f, bf16);
            against((vec *)weights, queries, (const vec *)keys, width, padded, stride);
            against((vec *)grad, grads, (const vec *)values, width, padded, stride);
            for (int b = 0; b < QUERIES; b++) {
                float *w = weights + b * stride, *d = dropped + b * stride, *g = grad + b * stride;
                int own_seen = b < count ? seen_by(p, &row, i + b) : 0, token = row.first + i + b;
                for (int j = own_seen; j < padded; j++)
                    w[j] = -INFINITY;
                vec mean = {0}; /* sum over keys of weight · gradient = result · its gradient */
                for (int c = 0; c < width; c += WIDE)
                    mean += *(vec *)(grads + b * width + c) * *(vec *)(result + b * width + c);
                float mean_sum = sum(mean),
                      log_sum = own_seen ? sums[(int64_t)token * p->heads + head] : 0;
                uint32_t hash = row.threshold ? query_hash(p, token, head) : 0;
                for (int j = 0; j < padded; j += WIDE) {
                    vec x = *(vec *)(w + j) - log_sum;
                    vec weight = exp_of_16(chosen(x > splat(0), splat(0), x)),
                        slope = *(vec *)(g + j), after = weight;
                    if (row.threshold) {
                        ivec stays = kept(hash, j, row.threshold);
                        slope = chosen(stays, slope * row.keep, splat(0));
                        after = chosen(stays, weight * row.keep, splat(0));
                    }
                    *(vec *)(d + j) = after;
                    *(vec *)(g + j) = weight * (slope - mean_sum);
                }
            }
            into((vec *)value_sums, dropped, (const vec *)grads, width, seen, stride);
            into((vec *)key_sums, grad, (const vec *)queries, width, seen,
                stride); /* the queries already contain the scaling */
            along((vec *)result, grad, (const vec *)key_rows, width, seen, stride);
            for (int b = 0; b < count; b++)
                for (int c = 0; c < width; c += WIDE)
                    narrowed(grad_q, (row.first + i + b) * p->grad_token + head * width + c,
                        *(vec *)(result + b * width + c) * (float)p->scaling, bf16);
        }
    for (int t = 0; t < row.tokens; t++)
        for (int c = 0; c < width; c += WIDE) {
            int64_t at = (row.first + t) * p->grad_token + kv * width + c;
            narrowed(grad_k, at, *(vec *)(key_sums + t * width + c), bf16);
            narrowed(grad_v, at, *(vec *)(value_sums + t * width + c), bf16);
        }
}

/* q, k, v: as AttentionCall says. y [tokens, heads, width] contiguous; sums [tokens, heads]: the
 * logarithms of the softmax's sums. */
int64_t attention_forward(
    const AttentionCall *p, const void *q, const void *k, const void *v, void *y, float *sums) {
    int64_t stride = longest_row(p, WIDE), tasks = p->rows * p->kv_heads, failed = 0;
#pragma omp parallel num_threads(p->threads)
    {
        float *memory = scratch(2 * p->width * stride + QUERIES * (2 * p->width + stride));
        if (!memory)
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            if (!memory)
                continue;
            if (p->bf16)
                forward_task(
                    p, q, k, v, y, sums, task / p->kv_heads, task % p->kv_heads, memory, 1);
            else
                forward_task(
                    p, q, k, v, y, sums, task / p->kv_heads, task % p->kv_heads, memory, 0);
        }
        free(memory);
    }
    return failed;
}

/* grad_y and y [tokens, heads, width] are contiguous; grad_q [tokens, heads, width], and grad_k and
   grad_v [tokens, kv heads, width], have tokens grad_token elements apart. */
int64_t attention_backward(const AttentionCall *p, const void *q, const void *k, const void *v,
    const void *y, const void *grad_y, const float *sums, void *grad_q, void *grad_k,
    void *grad_v) {
    int64_t stride = longest_row(p, WIDE), tasks = p->rows * p->kv_heads, failed = 0;
#pragma omp parallel num_threads(p->threads)
    {
        float *memory = scratch(5 * p->width * stride + QUERIES * (3 * p->width + 3 * stride));
        if (!memory)
            __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
            if (!memory)
                continue;
            if (p->bf16)
                backward_task(p, q, k, v, y, grad_y, sums, grad_q, grad_k, grad_v,
                    task / p->kv_heads, task % p->kv_heads, memory, 1);
            else
                backward_task(p, q, k, v, y, grad_y, sums, grad_q, grad_k, grad_v,
                    task / p->kv_heads, task % p->kv_heads, memory, 0);
        }
        free(memory);
    }
    return failed;
}
