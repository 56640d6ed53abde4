/* Cross-entropy of a frozen linear head, and its gradient, without storing the logits; in bfloat16
   by AMX (see cross_entropy.py).

   All threads together pack the head's rows, one chunk of words at a time, as the right operand of
   both products, logits = hidden · Wᵀ and sums += weights · W. Then each thread takes some blocks
   of 32 targets, and computes the first product for all of them, then the second. Logits are
   float32 and never leave the L1 cache: every 32 words of them become weights in bfloat16, 2^(logit
   · log2(e) - exponent), and are summed.

   Each target has an integer exponent near that of its largest weight, as in online softmax
   (Milakov and Gimelshein, arXiv 1805.02867, algorithm 3). It is raised only when weights exceed
   2^12, so almost never after the first words. Sums so far are then multiplied by a power of two,
   which is exact. No result depends on the number of threads. */

#include "amx_products.h"

#include "math.h"
#include <omp.h>

/* The caller's arguments, in the order of `CrossEntropyCall` in cross_entropy.py. Strides count
   elements. */
typedef struct {
    int64_t targets, width, words, threads, hidden_stride, weight_stride;
    const void *hidden, *weight,
        *bias; /* [targets, width], [words, width], [words] or NULL */
    const int64_t *right;               /* [targets] the target words */
} CrossEntropyCall;

SIZE_OF(CrossEntropyCall)

enum { NO_MEMORY = 1, NO_WORD = 2 };

#ifdef HAVE_AMX
/* A chunk of the head: bytes of both packed forms, and the fewest words, since sums are read and
   written once for each chunk. Each form should stay in the L2 cache while up to BLOCKS blocks of
   targets use it. */
enum { CHUNK_BYTES = 5 << 18, FEWEST_WORDS = 256, BLOCKS = 8 };
/* Targets whose sums are in memory during one pass over the head, and additional bytes of sums that
   are allowed. */
enum { TARGETS = 1024, MORE_BYTES = 2 << 20 };

static const float MOST = 4096, LEAST_EXPONENT = -1e30f;

/* Memory shared by all threads; sums, exponents and so on are those of one pass's targets. */
typedef struct {
    int64_t words, targets;      /* words of a chunk, targets of a pass; multiples of 32 */
    int64_t tasks, blocks; /* tasks of a pass; most blocks of 32 targets in one task */
    bf16 *for_logits, *for_sums; /* panels of 32 words, and of 32 of the width */
    float *shifts;               /* [words] bias, and -inf beyond the last word */
    float *sums;                 /* [targets, width], 32 × 32 at a time */
    float *totals; /* [targets, 16] sums of each target's weights, lane by lane */
    float *exponents, *logits;   /* [targets]; logits: those of the target words */
    int32_t *right;              /* [targets] the target word, or -1 beyond the last target */
    char *memory; /* per thread: the last block of hidden, weights of a task, 32 × 32 logits */
    int64_t own;                 /* bytes of `memory` per thread */
} Shared;

/* Allocates the memory. Returns 0 on failure; the caller must free it in either case. */
static int take_shared(Shared *s, const CrossEntropyCall *p, int with_grad) {
    int64_t words = CHUNK_BYTES / (2 * p->width * (int64_t)sizeof(bf16)) / PANEL * PANEL,
            line = p->width * (int64_t)sizeof(float);
    s->words = least(rounded(p->words), words < FEWEST_WORDS ? FEWEST_WORDS : words);
    int64_t most = MORE_BYTES + TARGETS * line, passes = (p->targets * line + most - 1) / most;
    s->targets = rounded((p->targets + passes - 1) / passes);
    int64_t blocks = s->targets / STEP, at_once = BLOCKS * p->threads;
    s->tasks = (blocks + at_once - 1) / at_once * p->threads,
    s->blocks = (blocks + s->tasks - 1) / s->tasks;
    s->for_logits = aligned_memory(s->words * p->width * sizeof(bf16));
    s->for_sums = aligned_memory(with_grad * s->words * p->width * sizeof(bf16));
    s->shifts = aligned_memory(s->words * sizeof(float));
    s->sums = aligned_memory(with_grad * s->targets * line);
    s->totals = aligned_memory(s->targets * TILE * sizeof(float));
    s->exponents = aligned_memory(3 * s->targets * sizeof(float));
    s->logits = s->exponents + s->targets, s->right = (int32_t *)(s->logits + s->targets);
    s->own = STEP * (p->width + s->blocks * s->words) * sizeof(bf16) + STEP_SIZE * sizeof(float);
    s->memory = aligned_memory(s->own * p->threads);
    return s->for_logits && s->for_sums && s->shifts && s->sums && s->totals && s->exponents &&
        s->memory;
}

static void give_back(Shared *s) {
    free(s->for_logits), free(s->for_sums), free(s->shifts), free(s->sums), free(s->totals),
        free(s->exponents), free(s->memory);
}

/* Rounds to bfloat16. */
INLINE __m512 rounded_16(__m512 x) {
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

/* The weight of a logit, where the target's exponent is `exponent`. */
INLINE __m512 weight_of(__m512 logit, __m512 exponent) {
    return power_of_two(_mm512_fmsub_ps(logit, _mm512_set1_ps(LOG2_E), exponent));
}

/* Packs one chunk of the head, `words` rows from `first` on, by all threads. */
static void pack_head(
    const CrossEntropyCall *p, const Shared *s, int64_t first, int64_t words, int with_grad) {
    int64_t steps = p->width / STEP, stride = p->weight_stride;
#pragma omp for schedule(static)
    for (int64_t at = 0; at < words; at += PANEL) {
        const bf16 *rows = (const bf16 *)p->weight + (first + at) * stride;
        bf16 *panel = s->for_logits + at * p->width;
        for (int half = 0; half < 2; half++)
            for (int64_t step = 0; step < steps; step++)
                pack_columns(panel + step * STEP_SIZE + half * TILE_SIZE,
                    rows + half * TILE * stride + step * STEP, stride, words - at - half * TILE);
        for (int64_t step = 0; with_grad && step < steps; step++)
            pack_rows(s->for_sums + step * s->words * PANEL + at * STEP, rows + step * STEP, stride,
                words - at, PANEL);
        for (int64_t i = 0; i < PANEL; i++) {
            union {
                uint32_t bits;
                float value;
            } bias = {p->bias && at + i < words
                    ? (uint32_t)((const bf16 *)p->bias)[first + at + i] << 16
                    : 0};
            s->shifts[at + i] = at + i < words ? bias.value : -INFINITY;
        }
    }
}

/* A block of 32 targets. */
typedef struct {
    float *sums, *totals, *exponents, *logits;
    const int32_t *right;
    bf16 *weights;
    int64_t panels; /* panels of sums so far; 0: none yet, or none wanted */
} Block;

static Block block_of(
    const CrossEntropyCall *p, const Shared *s, int64_t number, bf16 *weights, int with_sums) {
    int64_t at = number * STEP;
    return (Block){s->sums + at * p->width, s->totals + at * TILE, s->exponents + at,
        s->logits + at, s->right + at, weights, with_sums ? p->width / PANEL : 0};
}

/* Raises the exponents of targets to that of the largest of 32 logits; `before`: the number of
   panels of weights so far. */
static __attribute__((noinline, cold)) void raise(
    const Block *b, int64_t row, __m512 low, __m512 high, int64_t before) {
    float most = _mm512_reduce_max_ps(_mm512_max_ps(low, high)), exponent = floorf(most * LOG2_E);
    __m512 change = _mm512_set1_ps(b->exponents[row] - exponent);
    b->exponents[row] = exponent;
    float *total = b->totals + row * TILE;
    _mm512_store_ps(total, _mm512_scalef_ps(_mm512_load_ps(total), change));
    for (int64_t i = 0; i < before; i++)
        for (int side = 0; side < STEP; side += TILE) {
            bf16 *weight = b->weights + i * STEP_SIZE + row * STEP + side;
            _mm256_store_si256((void *)weight,
                (__m256i)_mm512_cvtneps_pbh(_mm512_scalef_ps(widened_16(weight), change)));
        }
    for (int64_t i = 0; i < b->panels; i++)
        for (int side = 0; side < 2; side++) {
            float *sum = b->sums + i * STEP_SIZE + row_of_sums(row) + side * 256;
            _mm512_store_ps(sum, _mm512_scalef_ps(_mm512_load_ps(sum), change));
        }
}

/* Computes panel `number` of weights, and adds it to the totals, from logits [32 × 32] in four
   tiles. */
INLINE void weigh(const Block *b, const float *logits, int64_t number, const float *shifts) {
    __m512 low_shift = _mm512_setzero_ps(), high_shift = low_shift;
    if (shifts)
        low_shift = _mm512_loadu_ps(shifts), high_shift = _mm512_loadu_ps(shifts + TILE);
    for (int64_t row = 0; row < STEP; row++) {
        const float *at = logits + row_of_sums(row);
        __m512 low = _mm512_load_ps(at), high = _mm512_load_ps(at + 256);
        if (shifts)
            low += low_shift, high += high_shift;
        __m512 exponent = _mm512_set1_ps(b->exponents[row]);
        __m512 x = weight_of(low, exponent), z = weight_of(high, exponent);
        if (__builtin_expect(_mm512_cmp_ps_mask(x + z, _mm512_set1_ps(MOST), _CMP_GT_OQ), 0)) {
            raise(b, row, low, high, number);
            exponent = _mm512_set1_ps(b->exponents[row]);
            x = weight_of(low, exponent), z = weight_of(high, exponent);
        }
        _mm512_store_ps(b->totals + row * TILE, _mm512_load_ps(b->totals + row * TILE) + (x + z));
        _mm512_store_si512(b->weights + number * STEP_SIZE + row * STEP, narrowed_32(x, z));
    }
}

/* A mask of 32 targets: those whose target word is among the 32 words from `first` on. */
INLINE __mmask32 right_among(const Block *b, int64_t first) {
    __m512i low = _mm512_sub_epi32(_mm512_loadu_si512(b->right), _mm512_set1_epi32((int32_t)first));
    __m512i high = _mm512_sub_epi32(
                _mm512_loadu_si512(b->right + TILE), _mm512_set1_epi32((int32_t)first)),
            end = _mm512_set1_epi32(PANEL);
    return _mm512_cmplt_epu32_mask(low, end) |
        (__mmask32)_mm512_cmplt_epu32_mask(high, end) << TILE;
}

/* Computes the weights of 32 targets and a chunk of `words` words from `first` on, and adds them to
   the totals. */
static void add_weights(const CrossEntropyCall *p, const Shared *s, const Block *b,
    const bf16 *hidden, int64_t stride, float *logits, int64_t first, int64_t words) {
    int64_t steps = p->width / STEP;
    for (int64_t panel = 0; panel * PANEL < words; panel++) {
        const float *shifts =
            p->bias || words < (panel + 1) * PANEL ? s->shifts + panel * PANEL : NULL;
        load_sums(NULL, 1);
        add_steps(hidden, stride, STEP, steps, s->for_logits + panel * steps * STEP_SIZE);
        store_sums(logits);
        if (shifts)
            weigh(b, logits, panel, shifts);
        else
            weigh(b, logits, panel, NULL);
        for (__mmask32 found = right_among(b, first + panel * PANEL); found; found &= found - 1) {
            int64_t row = __builtin_ctz(found), word = b->right[row] - first - panel * PANEL;
            b->logits[row] = logits[row_of_sums(row) + word / TILE * 256 + word % TILE] +
                (shifts ? shifts[word] : 0);
        }
    }
    written();
}

/* Adds the product of these weights and the head's rows to the sums. */
static void add_sums(
    const CrossEntropyCall *p, const Shared *s, const Block *b, int64_t first, int64_t words) {
    for (int64_t panel = 0; panel * PANEL < p->width; panel++) {
        float *sums = b->sums + panel * STEP_SIZE;
        load_sums(sums, first == 0);
        add_steps(b->weights, STEP, STEP_SIZE, rounded(words) / STEP,
            s->for_sums + panel * s->words * PANEL);
        store_sums(sums);
    }
}

/* Computes the losses of 32 targets, and their gradients: the mean row of the head under the
   weights, minus the target word's row. The target word's weight is used unrounded, so that the
   gradient vanishes for a target of which the model is certain. */
static void finish(
    const CrossEntropyCall *p, const Block *b, int64_t first, float *losses, bf16 *grad) {
    for (int64_t row = 0; row < least(STEP, p->targets - first); row++) {
        float total = _mm512_reduce_add_ps(_mm512_load_ps(b->totals + row * TILE));
        losses[first + row] = (float)(b->exponents[row] * M_LN2 + log(total) - b->logits[row]);
        __m512 weight =
            weight_of(_mm512_set1_ps(b->logits[row]), _mm512_set1_ps(b->exponents[row]));
        float lost = _mm512_cvtss_f32(weight - rounded_16(weight));
        __m512 factor = _mm512_set1_ps(1 / total), rest = _mm512_set1_ps(1 - lost / total);
        const bf16 *own = (const bf16 *)p->weight + b->right[row] * p->weight_stride;
        for (int64_t i = 0; grad && i < p->width; i += STEP) {
            const float *sum = b->sums + i * PANEL + row_of_sums(row);
            __m512 x = _mm512_fmsub_ps(_mm512_load_ps(sum), factor, widened_16(own + i) * rest);
            __m512 z = _mm512_fmsub_ps(
                _mm512_load_ps(sum + 256), factor, widened_16(own + i + TILE) * rest);
            _mm512_storeu_si512(grad + (first + row) * p->width + i, narrowed_32(x, z));
        }
    }
}

/* Copies 32 rows, of which only the first `rows` exist; the others become zero. */
static void copy_rows(bf16 *out, const bf16 *x, int64_t stride, int64_t rows, int64_t width) {
    memset(out, 0, STEP * width * sizeof(bf16));
    for (int64_t row = 0; row < rows; row++)
        memcpy(out + row * width, x + row * stride, width * sizeof(bf16));
    written();
}

/* Processes the targets from `first` on that share one pass over the head, by all threads. */
static void one_pass(
    const CrossEntropyCall *p, const Shared *s, char *memory, int64_t first, float *losses,
    bf16 *grad) {
    int64_t count = least(s->targets, p->targets - first), blocks = rounded(count) / STEP;
    bf16 *last = (bf16 *)memory, *weights = last + STEP * p->width;
    float *logits = (float *)(weights + s->blocks * STEP * s->words);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < s->targets; i++) {
        s->right[i] = i < count ? (int32_t)p->right[first + i] : -1;
        s->exponents[i] = LEAST_EXPONENT;
        _mm512_store_ps(s->totals + i * TILE, _mm512_setzero_ps());
    }
    for (int64_t word = 0; word < p->words; word += s->words) {
        int64_t words = least(s->words, p->words - word);
        pack_head(p, s, word, words, grad != NULL);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < s->tasks; task++) {
            int64_t from = task * blocks / s->tasks, to = (task + 1) * blocks / s->tasks;
            for (int64_t block = from; block < to; block++) {
                Block b =
                    block_of(p, s, block, weights + (block - from) * STEP * s->words, grad && word);
                int64_t start = first + block * STEP;
                const bf16 *hidden = (const bf16 *)p->hidden + start * p->hidden_stride;
                if (start + STEP > p->targets) {
                    copy_rows(last, hidden, p->hidden_stride, p->targets - start, p->width);
                    add_weights(p, s, &b, last, p->width, logits, word, words);
                } else
                    add_weights(p, s, &b, hidden, p->hidden_stride, logits, word, words);
            }
            for (int64_t block = from; block < to; block++) {
                Block b =
                    block_of(p, s, block, weights + (block - from) * STEP * s->words, grad && word);
                if (grad)
                    add_sums(p, s, &b, word, words);
                if (word + words == p->words)
                    finish(p, &b, first + block * STEP, losses, grad);
            }
        }
    }
}

/* Fills losses [targets] and, unless it is NULL, grad [targets, width]: the gradient of each
   target's own loss by its hidden state. */
int64_t cross_entropy(const CrossEntropyCall *p, float *losses, bf16 *grad) {
    for (int64_t i = 0; i < p->targets; i++)
        if (p->right[i] < 0 || p->right[i] >= p->words)
            return NO_WORD;
    Shared s;
    int64_t failed = take_shared(&s, p, grad != NULL) ? 0 : NO_MEMORY;
    if (!failed)
#pragma omp parallel num_threads(p->threads)
    {
        unsigned mode = _mm_getcsr();
        _mm_setcsr(mode |
            _MM_FLUSH_ZERO_ON); /* denormal numbers cost a hundred cycles each */
        use_tiles();
        for (int64_t first = 0; first < p->targets; first += s.targets)
            one_pass(p, &s, s.memory + omp_get_thread_num() * s.own, first, losses, grad);
        _tile_release();
        _mm_setcsr(mode);
    }
    give_back(&s);
    return failed;
}
#endif
