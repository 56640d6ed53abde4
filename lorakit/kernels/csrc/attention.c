/* Attention of packed rows of any length, forward and backward, without AMX.

   Tokens of all rows are concatenated; a token attends to those of its own row. Everything is
   computed in float32, for blocks of at most BLOCK queries and as many keys of one head, which stay
   in the processor's nearest caches (attention_products.h). Forward, a query's sums over keys are
   corrected where a later block has a larger score; backward, the weights are computed again from
   the logarithms of their sums (Dao et al., arXiv 2205.14135, algorithms 1 and 4).

   A unit of work is one block of queries of one head, or, where a row is a single block, all heads
   that share keys. Threads take units in a fixed order. The keys and values of rows of several
   blocks are first read into slots that all threads share. Backward, the gradients of a block of
   keys get their parts from one unit after another, in that order (`turns`), so no result depends
   on the number of threads. No thread waits forever: the first unit that is not finished never has
   to wait. */

#include "attention_products.h"
#include <omp.h>
#include <sched.h>

SIZE_OF(AttentionCall)

enum {
    SPINS = 1000, /* checks of a turn before a waiting thread offers its core to others */
    UNITS = 16,   /* wanted for each thread, so that all end at about the same time */
};

/* A row of `blocks` blocks of `size` tokens, the last of which may be shorter. place: the index of
   the first one among those of all rows of several blocks. */
typedef struct {
    int64_t first, tokens, size, blocks, place;
} Row;

/* A block of queries of `heads` heads from `head` on. */
typedef struct {
    int64_t row, block, head, heads;
} Unit;

/* The slots of a block of keys; forward, only the first two exist. */
enum { KEY_COLUMNS, VALUES, FORWARD_SLOTS, VALUE_COLUMNS = VALUES, KEYS, KEY_GRADS, VALUE_GRADS };
enum { BACKWARD_SLOTS = VALUE_GRADS + 1 };

/* Queries, keys, values, results and the gradients of each. */
typedef struct {
    View q, k, v, y, grad_y, grad_q, grad_k, grad_v;
    float *sums; /* [tokens, heads] the logarithms of the softmaxes' sums */
} Tensors;

/* What threads share, and what belongs to each: `own` floats of `memory`. shared [blocks][kv_heads]
   [slots][slot]: for rows of several blocks. turns [blocks][kv_heads]: the number of units that
   have added to the gradients of a block of keys. next: the unit that is taken next. */
typedef struct {
    const AttentionCall *call;
    Row *rows;
    Unit *units;
    float *shared, *memory;
    int32_t *turns;
    int64_t unit_count, blocks, slots, slot, own, next;
} Plan;

/* ---- units ---------------------------------------------------------------------------------- */

/* Lists rows and units. Rows come in their order, the longest first; the last blocks of a row,
   which see most keys if attention is causal, come before its first ones. Units of a row of one
   block have `together` heads that share keys. */
static void list_units(Plan *plan) {
    const AttentionCall *p = plan->call;
    int64_t group = p->heads / p->kv_heads,
            together = least(1 + p->rows * p->kv_heads / (UNITS * p->threads), p->kv_heads);
    Unit *next = plan->units;
    for (int64_t number = 0; number < p->rows; number++) {
        int64_t first = p->firsts[number], tokens = p->firsts[number + 1] - first,
                blocks = (tokens + BLOCK - 1) / BLOCK;
        Row row = {first, tokens, blocks ? whole_panels((tokens + blocks - 1) / blocks) : 0, blocks,
            plan->blocks};
        plan->rows[number] = row;
        if (blocks > 1)
            plan->blocks += blocks;
        if (blocks == 1)
            for (int64_t kv = 0; kv < p->kv_heads; kv += together)
                *next++ = (Unit){
                    number, 0, kv * group, least(together, p->kv_heads - kv) * group};
        else
            for (int64_t member = 0; member < group; member++)
                for (int64_t block = blocks - 1; block >= 0; block--)
                    for (int64_t kv = 0; kv < p->kv_heads; kv++)
                        *next++ = (Unit){number, block, kv * group + member, 1};
    }
    plan->unit_count = next - plan->units;
}

static void end_plan(Plan *plan) {
    free(plan->rows), free(plan->units), free(plan->shared), free(plan->memory), free(plan->turns);
}

/* Allocates everything; `floats` of each thread's own memory come after the slots of one block.
   Returns 0, or 1 if memory is missing. */
static int64_t begin_plan(Plan *plan, const AttentionCall *p, int64_t slots, int64_t floats) {
    int64_t most = 0;
    for (int64_t row = 0; row < p->rows; row++)
        most += (p->firsts[row + 1] - p->firsts[row] + BLOCK - 1) / BLOCK * p->heads;
    int64_t slot = slot_size(p->width), own = slots * slot + floats;
    *plan = (Plan){.call = p, .slots = slots, .slot = slot, .own = own};
    plan->rows = aligned_memory(p->rows * sizeof(Row));
    plan->units = aligned_memory(most * sizeof(Unit));
    if (!plan->rows || !plan->units)
        return 1;
    list_units(plan);
    int64_t keys = plan->blocks * p->kv_heads;
    plan->shared = aligned_memory(keys * slots * slot * sizeof(float));
    plan->memory = aligned_memory(p->threads * own * sizeof(float));
    plan->turns = calloc(keys + 1, sizeof(int32_t));
    return !plan->shared || !plan->memory || !plan->turns;
}

/* The next unit, or NULL. */
static const Unit *next_unit(Plan *plan) {
    int64_t number = __atomic_fetch_add(&plan->next, 1, __ATOMIC_RELAXED);
    return number < plan->unit_count ? plan->units + number : NULL;
}

/* The number of tokens in the row's block. */
INLINE int64_t tokens_of(const Row *row, int64_t block) {
    return least(row->size, row->tokens - block * row->size);
}

INLINE int64_t place_of(const Plan *plan, const Row *row, int64_t block, int64_t kv) {
    return (row->place + block) * plan->call->kv_heads + kv;
}

/* The slots of a block of keys: shared, or, for a row of one block, the thread's own. */
INLINE float *slots_of(
    const Plan *plan, const Row *row, int64_t block, int64_t kv, float *memory) {
    return row->blocks == 1
        ? memory
        : plan->shared + place_of(plan, row, block, kv) * plan->slots * plan->slot;
}

/* Reads a block of keys and values of one head. */
INLINE void read_keys(const Plan *plan, float *slots, const Tensors *t, const Row *row,
    int64_t block, int64_t kv, int bf16) {
    const AttentionCall *p = plan->call;
    int64_t token = row->first + block * row->size, count = tokens_of(row, block);
    read_columns(slots + KEY_COLUMNS * plan->slot, t->k, token, kv, count, p->width, bf16);
    if (plan->slots == FORWARD_SLOTS) {
        read_rows(slots + VALUES * plan->slot, t->v, token, kv, count, p->width, 1, bf16);
        return;
    }
    read_columns(slots + VALUE_COLUMNS * plan->slot, t->v, token, kv, count, p->width, bf16);
    read_rows(slots + KEYS * plan->slot, t->k, token, kv, count, p->width, (float)p->scaling, bf16);
}

/* Reads all blocks of rows of several blocks, by all threads. */
INLINE void read_shared(const Plan *plan, const Tensors *t, int bf16) {
    const AttentionCall *p = plan->call;
    for (const Row *row = plan->rows; row < plan->rows + p->rows; row++)
        if (row->blocks > 1)
#pragma omp for schedule(static) nowait
            for (int64_t number = 0; number < row->blocks * p->kv_heads; number++) {
                int64_t block = number / p->kv_heads, kv = number % p->kv_heads;
                read_keys(plan, slots_of(plan, row, block, kv, NULL), t, row, block, kv, bf16);
            }
#pragma omp barrier
}

/* ---- weights -------------------------------------------------------------------------------- */

/* The first `count` of a vector of keys whose weights dropout keeps; zeros in place of others. */
INLINE Floats kept(Floats x, int64_t key, uint32_t query, int32_t threshold) {
    const Words lane = LANE_NUMBERS;
    Words hash = weight_hash(lane + (uint32_t)key, (Words){} + query);
    return (Floats)((Ints)x & ((Ints)hash >= threshold));
}

/* The state of the softmaxes of a block of queries: each one's largest score so far, the sums of
   weights relative to it, and the factor for what was summed before the newest block of keys. */
typedef struct {
    Floats totals[BLOCK];
    float most[BLOCK], factors[BLOCK];
} Softmax;

/* Turns the scores of query number `query` and `seen` keys from key `first` on into weights, before
   their division by the sum. */
INLINE void weigh(float *scores, Softmax *softmax, int64_t query, int64_t seen, int64_t first,
    uint32_t hash, int32_t threshold, int fresh) {
    Floats tops = all(fresh ? -INFINITY : softmax->most[query]), totals = {};
    for (int64_t key = 0; key < seen; key += LANES)
        tops = larger(padded(vector_at(scores + key), seen - key, -INFINITY), tops);
    float most = largest(tops);
    if (!fresh) {
        float factor = exponential_of(softmax->most[query] - most);
        softmax->factors[query] = factor, totals = softmax->totals[query] * factor;
    }
    for (int64_t key = 0; key < seen; key += LANES) {
        Floats weight = exponential(vector_at(scores + key) - most, 0);
        weight = padded(weight, seen - key, 0), totals += weight;
        put(scores + key, threshold ? kept(weight, first + key, hash, threshold) : weight);
    }
    softmax->most[query] = most, softmax->totals[query] = totals;
}

/* Turns the scores of such a query into its weights after dropout, and the gradients of the latter
   into those of scores. mean: the sum over all keys of weight times gradient. */
INLINE void weigh_backward(float *scores, float *grads, int64_t seen, int64_t first, float log_sum,
    float mean, uint32_t hash, int32_t threshold) {
    for (int64_t key = 0; key < seen; key += LANES) {
        Floats weight = exponential(at_most(vector_at(scores + key) - log_sum, 0), 0),
               grad = vector_at(grads + key);
        weight = padded(weight, seen - key, 0);
        if (threshold)
            grad = kept(grad, first + key, hash, threshold);
        put(grads + key, padded(weight * (grad - mean), seen - key, 0));
        put(scores + key, threshold ? kept(weight, first + key, hash, threshold) : weight);
    }
}

/* Clears weights on the diagonal that products read with those of other queries of a tile. */
INLINE void clear_unseen(float *weights, int64_t query) {
    for (int64_t key = (query + LANES) / LANES * LANES; key < least(query + TILE, BLOCK);
         key += LANES)
        put(weights + key, (Floats){});
}

/* ---- forward -------------------------------------------------------------------------------- */

/* Each thread's memory, in floats: queries, their results, scores, and Softmax. */
#define FORWARD_FLOATS(slot) \
    (2 * (slot) + BLOCK * BLOCK + (int64_t)(sizeof(Softmax) / sizeof(float)))

INLINE void forward_unit(
    const Plan *plan, const Unit *unit, const Tensors *t, float *memory, int bf16) {
    const AttentionCall *p = plan->call;
    const Row *row = plan->rows + unit->row;
    int64_t count = tokens_of(row, unit->block), token = row->first + unit->block * row->size,
            width = p->width, group = p->heads / p->kv_heads;
    float *queries = memory + plan->slots * plan->slot, *out = queries + plan->slot,
          *scores = out + plan->slot;
    Softmax *softmax = (Softmax *)(scores + BLOCK * BLOCK);
    int32_t threshold = (int32_t)threshold_of(p);
    if (row->blocks == 1) {
        touch(t->q, token, unit->head, count, unit->heads, width, bf16);
        touch(t->k, token, unit->head / group, count, unit->heads / group, width, bf16);
        touch(t->v, token, unit->head / group, count, unit->heads / group, width, bf16);
    }
    for (int64_t head = unit->head; head < unit->head + unit->heads; head++) {
        if (row->blocks == 1 && head % group == 0)
            read_keys(plan, memory, t, row, 0, head / group, bf16);
        read_rows(queries, t->q, token, head, count, width, (float)p->scaling, bf16);
        for (int64_t block = 0; block < (p->causal ? unit->block + 1 : row->blocks); block++) {
            const float *slots = slots_of(plan, row, block, head / group, memory);
            int64_t keys = tokens_of(row, block);
            int diagonal = p->causal && block == unit->block, fresh = block == 0;
            multiply(scores, queries, count, slots + KEY_COLUMNS * plan->slot, keys, width,
                diagonal);
            for (int64_t query = 0; query < count; query++) {
                float *own = scores + query * BLOCK;
                uint32_t hash = threshold ? query_hash(p, token + query, head) : 0;
                weigh(own, softmax, query, diagonal ? query + 1 : keys, block * row->size, hash,
                    threshold, fresh);
                if (diagonal)
                    clear_unseen(own, query);
            }
            add_weighted(out, scores, slots + VALUES * plan->slot, count, keys, width, diagonal,
                softmax->factors, fresh);
        }
        for (int64_t query = 0; query < count; query++) {
            float total = sum(softmax->totals[query]);
            t->sums[(token + query) * p->heads + head] = softmax->most[query] + logf(total);
            softmax->factors[query] = factor_of_kept(p) / total;
        }
        write_rows(t->y, token, head, out, count, width, softmax->factors, bf16);
    }
}

/* ---- backward ------------------------------------------------------------------------------- */

/* Each thread's memory, in floats: queries, the gradients of results and of queries, weights and
   their gradients, and two values of each query. */
#define BACKWARD_FLOATS(slot) (3 * (slot) + 2 * BLOCK * BLOCK + 2 * BLOCK)

/* Fills the logarithm of each query's sum, and the sum over its keys of weight times gradient,
   which is that of its result times the result's gradient. */
INLINE void read_sums(const AttentionCall *p, const Tensors *t, float *log_sums, float *means,
    int64_t token, int64_t count, int64_t head, int bf16) {
    for (int64_t query = 0; query < count; query++) {
        int64_t place = (token + query) * p->heads + head;
        Floats mean = {};
        for (int64_t c = 0; c < p->width; c += LANES)
            mean += load(t->y.x, place * p->width + c, LANES, bf16) *
                load(t->grad_y.x, place * p->width + c, LANES, bf16);
        log_sums[query] = t->sums[place], means[query] = sum(mean);
    }
}

/* Waits until `count` units have added to a block of keys. */
static void wait_for(const int32_t *turn, int32_t count) {
    for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != count; spins++)
        if (spins > SPINS)
            sched_yield();
        else
            __builtin_ia32_pause();
}

INLINE void backward_unit(
    const Plan *plan, const Unit *unit, const Tensors *t, float *memory, int bf16) {
    const AttentionCall *p = plan->call;
    const Row *row = plan->rows + unit->row;
    int64_t slot = plan->slot, count = tokens_of(row, unit->block),
            token = row->first + unit->block * row->size, width = p->width,
            group = p->heads / p->kv_heads;
    float *queries = memory + plan->slots * slot, *grads = queries + slot, *out = grads + slot,
          *scores = out + slot, *slopes = scores + BLOCK * BLOCK,
          *log_sums = slopes + BLOCK * BLOCK, *means = log_sums + BLOCK;
    int32_t threshold = (int32_t)threshold_of(p);
    if (row->blocks == 1) {
        touch(t->q, token, unit->head, count, unit->heads, width, bf16);
        touch(t->k, token, unit->head / group, count, unit->heads / group, width, bf16);
        touch(t->v, token, unit->head / group, count, unit->heads / group, width, bf16);
        touch(t->y, token, unit->head, count, unit->heads, width, bf16);
        touch(t->grad_y, token, unit->head, count, unit->heads, width, bf16);
    }
    for (int64_t head = unit->head; head < unit->head + unit->heads; head++) {
        if (row->blocks == 1 && head % group == 0)
            read_keys(plan, memory, t, row, 0, head / group, bf16);
        read_rows(queries, t->q, token, head, count, width, (float)p->scaling, bf16);
        read_rows(grads, t->grad_y, token, head, count, width, factor_of_kept(p), bf16);
        read_sums(p, t, log_sums, means, token, count, head, bf16);
        for (int64_t block = 0; block < (p->causal ? unit->block + 1 : row->blocks); block++) {
            float *slots = slots_of(plan, row, block, head / group, memory);
            int64_t keys = tokens_of(row, block);
            int diagonal = p->causal && block == unit->block;
            multiply(scores, queries, count, slots + KEY_COLUMNS * slot, keys, width, diagonal);
            multiply(slopes, grads, count, slots + VALUE_COLUMNS * slot, keys, width, diagonal);
            for (int64_t query = 0; query < count; query++) {
                float *own = scores + query * BLOCK, *slope = slopes + query * BLOCK;
                uint32_t hash = threshold ? query_hash(p, token + query, head) : 0;
                weigh_backward(own, slope, diagonal ? query + 1 : keys, block * row->size,
                    log_sums[query], means[query], hash, threshold);
                if (diagonal)
                    clear_unseen(own, query), clear_unseen(slope, query);
            }
            add_weighted(out, slopes, slots + KEYS * slot, count, keys, width, diagonal, NULL,
                block == 0);
            /* the number of blocks of queries that see these keys, and how many units add to their
               gradients before this one */
            int64_t seeing = p->causal ? row->blocks - block : row->blocks,
                    before = head % group * seeing + row->blocks - 1 - unit->block;
            int32_t *turn = plan->turns + place_of(plan, row, block, head / group);
            if (row->blocks > 1)
                wait_for(turn, (int32_t)before);
            add_gathered(slots + VALUE_GRADS * slot, scores, grads, count, keys, width, diagonal,
                before == 0);
            add_gathered(slots + KEY_GRADS * slot, slopes, queries, count, keys, width, diagonal,
                before == 0);
            if (before + 1 == group * seeing) {
                int64_t first = row->first + block * row->size, kv = head / group;
                write_rows(
                    t->grad_k, first, kv, slots + KEY_GRADS * slot, keys, width, NULL, bf16);
                write_rows(
                    t->grad_v, first, kv, slots + VALUE_GRADS * slot, keys, width, NULL, bf16);
            }
            if (row->blocks > 1)
                __atomic_store_n(turn, (int32_t)before + 1, __ATOMIC_RELEASE);
        }
        write_rows(t->grad_q, token, head, out, count, width, NULL, bf16);
    }
}

/* ---- calls ---------------------------------------------------------------------------------- */

INLINE void work(Plan *plan, const Tensors *t, int bf16) {
    float *memory = plan->memory + omp_get_thread_num() * plan->own;
    read_shared(plan, t, bf16);
    for (const Unit *unit; (unit = next_unit(plan));)
        if (plan->slots == FORWARD_SLOTS)
            forward_unit(plan, unit, t, memory, bf16);
        else
            backward_unit(plan, unit, t, memory, bf16);
}

/* Returns 0, or 1 if memory is missing. */
static int64_t run(const AttentionCall *p, const Tensors *t, int64_t slots, int64_t floats) {
    Plan plan;
    int64_t failed = begin_plan(&plan, p, slots, floats);
    if (!failed)
#pragma omp parallel num_threads(p->threads)
    {
        if (p->bf16)
            work(&plan, t, 1);
        else
            work(&plan, t, 0);
    }
    end_plan(&plan);
    return failed;
}

/* The tensors of a call; y and its gradient are contiguous, and the gradients of queries, keys and
   values have tokens grad_token elements apart. */
static Tensors tensors_of(const AttentionCall *p, const void *q, const void *k, const void *v,
    const void *y, const float *sums) {
    int64_t token = p->heads * p->width;
    return (Tensors){.q = {(void *)q, p->q_token, p->q_head},
        .k = {(void *)k, p->k_token, p->k_head},
        .v = {(void *)v, p->v_token, p->v_head},
        .y = {(void *)y, token, p->width},
        .grad_y = {NULL, token, p->width},
        .grad_q = {NULL, p->grad_token, p->width},
        .grad_k = {NULL, p->grad_token, p->width},
        .grad_v = {NULL, p->grad_token, p->width},
        .sums = (float *)sums};
}

/* q, k, v: as AttentionCall says. y [tokens, heads, width]; sums [tokens, heads]: the logarithms of
   the softmaxes' sums. */
int64_t attention_forward(
    const AttentionCall *p, const void *q, const void *k, const void *v, void *y, float *sums) {
    Tensors tensors = tensors_of(p, q, k, v, y, sums);
    return run(p, &tensors, FORWARD_SLOTS, FORWARD_FLOATS(slot_size(p->width)));
}

/* grad_y and y [tokens, heads, width]; grad_q [tokens, heads, width]; grad_k and grad_v [tokens, kv
   heads, width]. */
int64_t attention_backward(const AttentionCall *p, const void *q, const void *k, const void *v,
    const void *y, const void *grad_y, const float *sums, void *grad_q, void *grad_k,
    void *grad_v) {
    Tensors tensors = tensors_of(p, q, k, v, y, sums);
    tensors.grad_y.x = (void *)grad_y, tensors.grad_q.x = grad_q;
    tensors.grad_k.x = grad_k, tensors.grad_v.x = grad_v;
    return run(p, &tensors, BACKWARD_SLOTS, BACKWARD_FLOATS(slot_size(p->width)));
}
