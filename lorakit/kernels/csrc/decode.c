/* One decoding step of a Llama-like decoder (lorakit/inference/decode_step.py). Weights, factors,
   keys and values are bfloat16 or float32, everything else is float32.

   A step reads every weight once and computes little with it, so it is bound by memory bandwidth.
   It is one parallel region, in which threads meet at barriers. Every row of a matrix is one
   stream, read with prefetching. Measured over 265 MB in huge pages on two cores: 29 to 31 GB/s,
   the same as plain reading; dot products in bfloat16 (AVX512-BF16) reached 27, so computing in
   float32 costs nothing. Rows are divided equally among threads, and the order of summation does
   not depend on the number of threads. */

#include "vectors.h"

#include "math.h"
#include <omp.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    AHEAD = 2048,    /* bytes by which prefetching is ahead */
    SPINS = 2000,    /* checks of a barrier before a thread sleeps, about 100 microseconds */
    MIN_KEYS = 128,  /* fewest keys of a part of the attention */
    MAX_PARTS = 32,  /* most such parts */
    TILE = 64,       /* keys that are converted to float32 at a time */
    BLOCK = 32,      /* tokens of an int4 block; BLOCK in lorakit/inference/kv/slots.py */
};

/* Adds b [stop - start, last - first] times components [first, last) to outputs [start, stop) of a
   group. */
typedef struct {
    const void *b;
    int64_t stride;
    int32_t start, stop, first, last;
} Up;

/* Linear layers that read the same input, at one tier: their weights [out, in] and their As
   [components, in], each row next to the one before. */
typedef struct {
    const void *weight, *a;
    const float *bias; /* [out], or NULL */
    const Up *ups;
    const int32_t *place; /* [components]: index with each layer's components side by side */
    const int32_t *block; /* [components]: the component's block; 0: it always acts */
    int32_t in, out, components, ups_count;
    int32_t bf16, factors_bf16; /* types of the weights, and of As and Bs */
} Group;

typedef struct {
    const float *norm, *feed_forward_norm,
        *head_norm; /* head_norm [heads + kv heads, width], or NULL */
    Group qkv, o, gate_up, down;
    float scaling;
} Layer;

typedef struct {
    const float *norm; /* [hidden] */
    const Layer *layers;
    Group head;
    int32_t layer_count, hidden, feed_forward, heads, kv_heads, width; /* width: of a head */
    int32_t most_components;                                          /* most in a group */
    float eps;
} Model;

/* The cache of lorakit/inference/kv/storage.py. Each tensor is [keys | values, layers, kv heads,
   room, ...]; the `used` fields count the slots in use. */
typedef struct {
    void *full;             /* [..., width] */
    const int8_t *codes8;   /* [..., width] */
    const float *scales8;   /* [...] */
    const uint8_t *codes4;  /* [..., BLOCK, width / 2] */
    const uint16_t *keys4;  /* [minimum | step, layers, kv heads, room, width], float16 */
    const uint16_t *values4; /* [minimum | step, layers, kv heads, room, BLOCK] */
    int64_t full_room, room8, room4;
    int32_t full_used, used8, used4; /* used4 in blocks */
    int32_t slot;                    /* the slot of `full` for the new token */
    int32_t bf16;                    /* type of `full` */
} Cache;

SIZE_OF(Up)
SIZE_OF(Group)
SIZE_OF(Layer)
SIZE_OF(Model)
SIZE_OF(Cache)

/* -- vectors ----------------------------------------------------------------------------------- */

/* n rounded up to a multiple of LANES. */
static inline int in_vectors(int n) { return (int)rounded_up(n, LANES); }

/* The address of element i. */
INLINE const void *at(const void *x, int64_t i, int bf16) {
    return (const char *)x + i * (bf16 ? 2 : 4);
}

INLINE float element(const void *x, int64_t i, int bf16) {
    return bf16 ? of_bits((uint32_t)((const uint16_t *)x)[i] << 16) : ((const float *)x)[i];
}

/* Converts a finite float16. A multiplication adjusts the exponent, which also handles denormals.
   */
static inline float of_f16(uint16_t value) {
    float magnitude = of_bits((uint32_t)(value & 0x7fff) << 13) * 0x1p112f;
    return value & 0x8000 ? -magnitude : magnitude;
}

INLINE float dot(const void *w, const float *x, int n, int bf16) {
    Floats a = {}, b = {}, c = {}, d = {};
    int i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        const char *here = at(w, i, bf16);
        for (int line = 0; line < 4 * LANES * (bf16 ? 2 : 4); line += 64)
            _mm_prefetch(here + line + AHEAD, _MM_HINT_T0);
        a += load(w, i, LANES, bf16) * load(x, i, LANES, 0);
        b += load(w, i + LANES, LANES, bf16) * load(x, i + LANES, LANES, 0);
        c += load(w, i + 2 * LANES, LANES, bf16) * load(x, i + 2 * LANES, LANES, 0);
        d += load(w, i + 3 * LANES, LANES, bf16) * load(x, i + 3 * LANES, LANES, 0);
    }
    for (; i + LANES <= n; i += LANES) a += load(w, i, LANES, bf16) * load(x, i, LANES, 0);
    float y = sum((a + b) + (c + d));
    for (; i < n; i++) y += element(w, i, bf16) * x[i];
    return y;
}

/* The product of row `row` of w, whose rows are `stride` elements apart, with x [n]. */
static inline float row_dot(
    const void *w, int64_t row, int64_t stride, const float *x, int n, int bf16) {
    return bf16 ? dot(at(w, row * stride, 1), x, n, 1) : dot(at(w, row * stride, 0), x, n, 0);
}

/* -- threads ----------------------------------------------------------------------------------- */

typedef struct {
    atomic_int arrived, generation, asleep;
} Barrier;

typedef struct {
    int id, count;
    Barrier *barrier;
} Team;

/* A waiting thread first spins, since most waits take microseconds. Then it sleeps, so that the
   thread it waits for gets the core: measured on two cores with one busy neighbour, 34 ms a token
   instead of 64 with sched_yield. */
static void wait_for_all(Team team) {
    Barrier *b = team.barrier;
    if (team.count == 1) return;
    int generation = atomic_load(&b->generation);
    if (atomic_fetch_add(&b->arrived, 1) == team.count - 1) {
        atomic_store(&b->arrived, 0);
        atomic_store(&b->generation, generation + 1);
        if (atomic_load(&b->asleep))
            syscall(SYS_futex, &b->generation, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
        return;
    }
    for (int spins = 0; spins < SPINS; spins++) {
        if (atomic_load(&b->generation) != generation) return;
        _mm_pause();
    }
    atomic_fetch_add(&b->asleep, 1);
    while (atomic_load(&b->generation) == generation)
        syscall(SYS_futex, &b->generation, FUTEX_WAIT_PRIVATE, generation, NULL, NULL, 0);
    atomic_fetch_sub(&b->asleep, 1);
}

/* The first and the last + 1 of a thread's part of n. */
static inline int from_of(Team team, int n) { return (int)((int64_t)n * team.id / team.count); }
static inline int until_of(Team team, int n) {
    return (int)((int64_t)n * (team.id + 1) / team.count);
}

/* -- parts of a layer -------------------------------------------------------------------------- */

/* RMSNorm (arXiv 1910.07467); out may be x. */
static void norm(const float *x, const float *weight, int n, float eps, float *out) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int i = 0; i < n; i++) squares += x[i] * x[i];
    float scale = 1.0f / sqrtf(squares / n + eps);
    for (int i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

/* Computes low [components] = m * (A x) of a group, by all threads. m: the share of each
   component's block; all 1 if shares is NULL. */
static void lower(const Group *g, const float *x, const float *shares, float *low, Team team) {
    if (g->components == 0) return;
    for (int c = from_of(team, g->components); c < until_of(team, g->components); c++)
        low[g->place[c]] = (shares ? shares[g->block[c]] : 1.0f) *
            row_dot(g->a, c, g->in, x, g->in, g->factors_bf16);
    wait_for_all(team);
}

/* One output of a group: W x + bias + B low. */
static inline float output(const Group *g, const float *x, const float *low, int row) {
    float y = row_dot(g->weight, row, g->in, x, g->in, g->bf16);
    if (g->bias) y += g->bias[row];
    for (const Up *up = g->ups; up < g->ups + g->ups_count; up++)
        if (up->start <= row && row < up->stop)
            y += row_dot(up->b, row - up->start, up->stride, low + up->first, up->last - up->first,
                g->factors_bf16);
    return y;
}

/* Applies a head's norm, if it has one, and its rotary embedding (arXiv 2104.09864), which pairs
   halves. */
static void rotate(
    float *head, const float *weight, const float *cos, const float *sin, int width, float eps) {
    if (weight) norm(head, weight, width, eps, head);
    for (int i = 0, half = width / 2; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* Reads a key (part 0) or value (part 1) of a head [width]. Keys are numbered: first those of
   `full`, then int8, then int4. */
static void state(
    const Cache *cache, const Model *m, int part, int layer, int head, int key, float *out) {
    int64_t row = ((int64_t)part * m->layer_count + layer) * m->kv_heads + head;
    int width = m->width, half = width / 2;
    if (key < cache->full_used) {
        int64_t held = (row * cache->full_room + key) * width;
        if (!cache->bf16) memcpy(out, at(cache->full, held, 0), width * sizeof *out);
        else for (int i = 0; i < width; i++) out[i] = element(cache->full, held + i, 1);
        return;
    }
    key -= cache->full_used;
    if (key < cache->used8) {
        const int8_t *codes = cache->codes8 + (row * cache->room8 + key) * width;
        float scale = cache->scales8[row * cache->room8 + key];
        for (int i = 0; i < width; i++) out[i] = codes[i] * scale;
        return;
    }
    key -= cache->used8;
    const uint8_t *codes = cache->codes4 + (row * cache->room4 * BLOCK + key) * half;
    for (int i = 0; i < half; i++) {
        out[i] = codes[i] & 15;
        out[i + half] = codes[i] >> 4;
    }
    int64_t ranges = (int64_t)m->layer_count * m->kv_heads *
        cache->room4; /* distance from the minima to the steps, in blocks */
    int64_t block = ((int64_t)layer * m->kv_heads + head) * cache->room4 + key / BLOCK;
    if (part == 0) {
        const uint16_t *low = cache->keys4 + block * width, *step = low + ranges * width;
        for (int i = 0; i < width; i++) out[i] = of_f16(low[i]) + of_f16(step[i]) * out[i];
    } else {
        const uint16_t *low = cache->values4 + block * BLOCK + key % BLOCK,
                       *step = low + ranges * BLOCK;
        float minimum = of_f16(*low), width_of_step = of_f16(*step);
        for (int i = 0; i < width; i++) out[i] = minimum + width_of_step * out[i];
    }
}

/* Attention of one part of the keys for the queries of a kv head [group, padded]. For each query:
   the weighted sum of values [padded], the largest score, and the sum of exp(score - largest)
   (Flash-Decoding: softmax in parts). Keys and values are converted to float32 a tile at a time,
   with rows padded with zeros to whole vectors. */
static void attend_part(const Cache *cache, const Model *m, int layer, int head,
    const float *queries, float scaling, int start, int stop, float *out) {
    int padded = in_vectors(m->width), group = m->heads / m->kv_heads, keys = stop - start;
    float scores[group][keys], tile[TILE][padded];
    for (int key = 0; key < TILE; key++)
        memset(tile[key] + m->width, 0, (padded - m->width) * sizeof(float));
    for (int from = 0; from < keys; from += TILE) {
        int until = from + TILE < keys ? from + TILE : keys;
        for (int key = from; key < until; key++)
            state(cache, m, 0, layer, head, start + key, tile[key - from]);
        for (int g = 0; g < group; g++)
            for (int key = from; key < until; key++) {
                Floats score = {};
                for (int i = 0; i < padded; i += LANES)
                    score += load(queries, g * padded + i, LANES, 0) *
                        load(tile[key - from], i, LANES, 0);
                scores[g][key] = sum(score) * scaling;
            }
    }
    for (int g = 0; g < group; g++) {
        float *part = out + g * (padded + 2), largest = -INFINITY, total = 0.0f;
#pragma omp simd reduction(max : largest)
        for (int key = 0; key < keys; key++)
            largest = scores[g][key] > largest ? scores[g][key] : largest;
#pragma omp simd reduction(+ : total)
        for (int key = 0; key < keys; key++)
            total += scores[g][key] = exp_of_float(scores[g][key] - largest);
        memset(part, 0, padded * sizeof *part);
        part[padded] = largest;
        part[padded + 1] = total;
    }
    for (int from = 0; from < keys; from += TILE) {
        int until = from + TILE < keys ? from + TILE : keys;
        for (int key = from; key < until; key++)
            state(cache, m, 1, layer, head, start + key, tile[key - from]);
        for (int g = 0; g < group; g++)
            for (int i = 0; i < padded; i += LANES) {
                float *part = out + g * (padded + 2);
                Floats even = load(part, i, LANES, 0), odd = {}; /* two sums, to hide latency */
                int key = from;
                for (; key + 2 <= until; key += 2) {
                    even += scores[g][key] * load(tile[key - from], i, LANES, 0);
                    odd += scores[g][key + 1] * load(tile[key - from + 1], i, LANES, 0);
                }
                if (key < until) even += scores[g][key] * load(tile[key - from], i, LANES, 0);
                store(part, i, LANES, even + odd, 0);
            }
    }
}

/* Combines the parts [padded + 2] of one query, `stride` floats apart, into its attention [width].
   */
static void join(const float *parts, int count, int64_t stride, int width, float *out) {
    int padded = in_vectors(width);
    float largest = -INFINITY, total = 0.0f;
    for (int p = 0; p < count; p++) largest = fmaxf(largest, parts[p * stride + padded]);
    memset(out, 0, width * sizeof *out);
    for (int p = 0; p < count; p++) {
        const float *part = parts + p * stride;
        float weight = exp_of_float(part[padded] - largest);
        total += weight * part[padded + 1];
        for (int i = 0; i < width; i++) out[i] += weight * part[i];
    }
    for (int i = 0; i < width; i++) out[i] /= total;
}

/* -- the step ---------------------------------------------------------------------------------- */

/* Buffers through which threads exchange results. */
typedef struct {
    float *x, *low, *qkv, *queries, *hidden,
        *parts; /* queries [heads, in_vectors(width)]; hidden: feed-forward part */
} Shared;

static void layer_forward(const Model *m, int number, const Cache *cache, const float *cos,
    const float *sin, const float *shares, Shared s, float *input, Team team) {
    const Layer *layer = m->layers + number;
    int width = m->width, padded = in_vectors(width), group = m->heads / m->kv_heads;

    norm(s.x, layer->norm, m->hidden, m->eps, input);
    lower(&layer->qkv, input, shares, s.low, team);
    for (int row = from_of(team, layer->qkv.out); row < until_of(team, layer->qkv.out); row++)
        s.qkv[row] = output(&layer->qkv, input, s.low, row);
    wait_for_all(team);

    int rotated = m->heads + m->kv_heads;
    for (int head = from_of(team, rotated); head < until_of(team, rotated); head++) {
        float *key = s.qkv + head * width, *value = key + m->kv_heads * width;
        rotate(key, layer->head_norm ? layer->head_norm + head * width : NULL, cos, sin, width,
            m->eps);
        if (head < m->heads) {
            memcpy(s.queries + head * padded, key, width * sizeof *key);
            continue;
        }
        int64_t row = (int64_t)number * m->kv_heads + head - m->heads,
                values = (int64_t)m->layer_count * m->kv_heads;
        int64_t new_key = (row * cache->full_room + cache->slot) * width,
                new_value = new_key + values * cache->full_room * width;
        for (int i = 0; i < width; i += LANES) {
            store(cache->full, new_key + i, width - i, load(key, i, width - i, 0), cache->bf16);
            store(cache->full, new_value + i, width - i, load(value, i, width - i, 0),
                cache->bf16);
        }
    }
    wait_for_all(team);

    int keys = cache->full_used + cache->used8 + cache->used4 * BLOCK;
    int size = (keys + MAX_PARTS - 1) / MAX_PARTS;
    if (size < MIN_KEYS) size = MIN_KEYS;
    int parts = (keys + size - 1) / size;
    int64_t stride = (int64_t)group * (padded + 2);
    for (int task = from_of(team, m->kv_heads * parts); task < until_of(team, m->kv_heads * parts);
        task++) {
        int head = task / parts, start = task % parts * size,
            stop = start + size < keys ? start + size : keys;
        attend_part(cache, m, number, head, s.queries + head * group * padded, layer->scaling,
            start, stop, s.parts + task * stride);
    }
    wait_for_all(team);
    for (int head = 0; head < m->heads; head++)
        join(s.parts + head / group * parts * stride + head % group * (padded + 2), parts, stride,
            width, input + head * width);

    lower(&layer->o, input, shares, s.low, team);
    for (int row = from_of(team, m->hidden); row < until_of(team, m->hidden); row++)
        s.x[row] += output(&layer->o, input, s.low, row);
    wait_for_all(team);

    norm(s.x, layer->feed_forward_norm, m->hidden, m->eps, input);
    lower(&layer->gate_up, input, shares, s.low, team);
    for (int row = from_of(team, m->feed_forward); row < until_of(team, m->feed_forward); row++) {
        float gate = output(&layer->gate_up, input, s.low, row);
        float up = output(&layer->gate_up, input, s.low, m->feed_forward + row);
        s.hidden[row] = gate / (1.0f + exp_of_float(-gate)) * up; /* SiLU */
    }
    wait_for_all(team);

    lower(&layer->down, s.hidden, shares, s.low, team);
    for (int row = from_of(team, m->hidden); row < until_of(team, m->hidden); row++)
        s.x[row] += output(&layer->down, s.hidden, s.low, row);
    wait_for_all(team);
}

/* Computes logits [vocabulary] of a token, x [hidden] its embedding, and adds its keys and values
   to the cache. cos and sin [width] are those of its position. shares [blocks + 1]: the weight of
   each block of components, first that of those that always act; NULL if all are 1. Returns 0, or
   -1 if memory is missing. */
int64_t decode(const Model *m, const Cache *cache, const float *x, const float *cos,
    const float *sin, const float *shares, float *logits, int64_t threads) {
    int attended = m->heads * m->width, wide = attended > m->hidden ? attended : m->hidden;
    int padded = in_vectors(m->width);
    int64_t queries = (int64_t)m->heads * padded,
            parts = (int64_t)m->heads * MAX_PARTS * (padded + 2);
    int64_t inputs = threads * (wide + LANES); /* spaced, so that threads share no cache line */
    int64_t total = m->hidden + m->most_components + m->layers[0].qkv.out + queries +
        m->feed_forward + parts + inputs;
    float *scratch = malloc(total * sizeof *scratch);
    if (!scratch) return -1;
    Shared s;
    s.x = scratch;
    s.low = s.x + m->hidden;
    s.qkv = s.low + m->most_components;
    s.queries = s.qkv + m->layers[0].qkv.out;
    s.hidden = s.queries + queries;
    s.parts = s.hidden + m->feed_forward;
    float *first_input = s.parts + parts;
    memset(s.queries, 0, queries * sizeof *s.queries);
    memcpy(s.x, x, m->hidden * sizeof *x);
    Barrier barrier = {0};
#pragma omp parallel num_threads(threads)
    {
        Team team = {omp_get_thread_num(), omp_get_num_threads(), &barrier};
        float *input = first_input + (int64_t)team.id * (wide + LANES);
        for (int number = 0; number < m->layer_count; number++)
            layer_forward(m, number, cache, cos, sin, shares, s, input, team);
        norm(s.x, m->norm, m->hidden, m->eps, input);
        lower(&m->head, input, NULL, s.low, team);
        for (int row = from_of(team, m->head.out); row < until_of(team, m->head.out); row++)
            logits[row] = output(&m->head, input, s.low, row);
    }
    free(scratch);
    return 0;
}
