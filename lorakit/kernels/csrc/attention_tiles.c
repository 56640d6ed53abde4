/* Attention of packed rows of any length in bfloat16, forward and backward, by AMX (amx.h).

   Tokens of all rows are concatenated; a token attends to those of its own row. Everything is
   computed for blocks of 32 keys and 32 queries, and transposed: scores are [keys × queries], so
   that the values of a query (the largest of its scores, the sum of its weights, …) are in one lane
   of a vector. Weights are rounded to bfloat16 for the products; everything else is float32. Keys
   are processed CHUNK blocks at a time, so that scores stay in the cache; sums over keys are
   corrected when a larger score appears (Dao et al., arXiv 2205.14135, algorithm 1). The backward
   pass recomputes the weights (its algorithm 4).

   A task is one row and one key-value head with all heads that share it; forward, it has at most
   FORWARD blocks of queries. The set of tasks does not depend on the number of threads, and no task
   adds to another's result, so results do not depend on it either.

   Operands of products are stored in blocks of 32 × 32 bfloat16 (STEP_SIZE): left operands as two
   tiles, one below the other, right operands as one step of a panel. Blocks that are consecutive
   along a product's sum are consecutive in memory. Elements beyond a row's end are zero in
   everything that is summed over. */

#include "attention_tiles_forward.h"

#include "attention_tiles_backward.h"
#include <stdlib.h>

SIZE_OF(AttentionCall)

#ifdef HAVE_AMX

/* In the backward pass, each of the heads that share keys is a task of its own if there would be
   fewer than FEW_TASKS tasks otherwise, and if this takes at most MOST_BYTES of memory. */
enum { FEW_TASKS = 8, MOST_BYTES = 1 << 28 };

/* Configures tiles and turns denormal numbers off, which cost a hundred cycles each where a weight
   vanishes. Returns the former mode, to restore later. */
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

/* The number of tasks that a thread takes at once. With many tasks it takes several neighbours,
   which are heads of one row, side by side in memory. */
static int64_t at_once(const AttentionCall *p, int64_t tasks) {
    return 1 + tasks / (16 * p->threads);
}

/* q, k, v: as AttentionCall says. y [tokens, heads, width] contiguous. sums [heads, tokens of the
   rows]: the logarithms, to base two, of the softmax's sums. */
int64_t attention_forward(
    const AttentionCall *p, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *y, float *sums) {
    int64_t blocks = longest_row(p, BLOCK) / BLOCK, parts = (blocks + FORWARD - 1) / FORWARD,
            tasks = p->rows * parts * p->kv_heads, failed = 0;
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
                forward_task(p, q, k, v, y, sums, task / p->kv_heads / parts,
                    parts - 1 - task / p->kv_heads % parts, task % p->kv_heads, &at);
        leave(mode);
        free(memory);
    }
    return failed;
}

/* The index of the row's first block if the blocks of all rows are concatenated. */
static int64_t first_block(const AttentionCall *p, int64_t row) {
    int64_t blocks = 0;
    for (int64_t other = 0; other < row; other++)
        blocks += row_of(p, other).blocks;
    return blocks;
}

/* Allocates sums of the gradients of keys and values for each head and all rows, if heads that
   share keys are tasks of their own, because tasks would otherwise be few for the threads a machine
   may have. *part gets the size of one head's sums for keys, in floats; 0 if heads are not
   separate. */
static float *parts_by_head(const AttentionCall *p, int64_t *part) {
    *part = first_block(p, p->rows) * BLOCK * p->width;
    int64_t bytes = 2 * p->heads * *part * (int64_t)sizeof(float);
    if (p->heads == p->kv_heads || p->rows * p->kv_heads >= FEW_TASKS || bytes > MOST_BYTES)
        return *part = 0, NULL;
    return aligned_alloc(64, bytes);
}

/* grad_y and y [tokens, heads, width] are contiguous; grad_q [tokens, heads, width], and grad_k and
   grad_v [tokens, kv heads, width], have tokens grad_token elements apart. */
int64_t attention_backward(const AttentionCall *p, const bf16 *q, const bf16 *k, const bf16 *v,
    const bf16 *y, const bf16 *grad_y, const float *sums, bf16 *grad_q, bf16 *grad_k,
    bf16 *grad_v) {
    int64_t blocks = longest_row(p, BLOCK) / BLOCK, group = p->heads / p->kv_heads, part,
            failed = 0;
    float *parts = parts_by_head(p, &part);
    int64_t heads = part ? 1 : group, tasks = p->rows * (p->heads / heads); /* heads of a task */
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
                        write_keys(p, grad_k, grad_v, row, b, head / group, at.grad_keys,
                            at.grad_values, 1, 0);
            }
        if (part)
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < p->rows * p->kv_heads * blocks; task++) {
                int64_t row = task / blocks / p->kv_heads, kv = task / blocks % p->kv_heads;
                float *own = parts + 2 * kv * group * part + first_block(p, row) * BLOCK * p->width;
                if (task % blocks < row_of(p, row).blocks)
                    write_keys(p, grad_k, grad_v, row, task % blocks, kv, own, own + part, group,
                        2 * part);
            }
        leave(mode);
        free(memory);
    }
    free(parts);
    return failed;
}

#endif
