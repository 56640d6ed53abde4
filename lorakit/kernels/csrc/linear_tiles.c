/* LoRA linear layers that read the same input, forward and backward, in bfloat16 with sums in
   float32 (see products.py); without components, a frozen layer.

   y = x Wᵀ + bias + h Bᵀ with h = x Aᵀ (Hu et al., arXiv 2106.09685, eq. 3). A has the rows of all
   layers' As, and B is block-diagonal with the layers' scaled Bs. The low-rank product is a few
   more steps of the dense one: [x h] [W B]ᵀ. Backward, with g = dy B, the gradient of x is [dy g]
   [W; A]. So the low-rank product needs no additional pass over memory, and every result is rounded
   once.

   All threads together pack the weights, one chunk of columns at a time; then each thread takes
   blocks of 32 tokens. Sums over tokens (gradients of A and B) are computed in strips of 64
   columns. A gate multiplies a row of A, and its gradient is computed from that row's. No result
   depends on the number of threads. */

#include "amx_products.h"
#include "linear.h"
#include <omp.h>

enum {
    CHUNK_BYTES = 1170 << 10,
    MOST_STEPS = 20
}; /* a chunk fits the L2 cache, a block of tokens the L1 cache */

SIZE_OF(LinearCall)

#ifdef HAVE_AMX

static bf16 *take(int64_t count) {
    return aligned_memory(count * sizeof(bf16));
}

/* Memory shared by all threads. Sizes are in elements; R and T are components and tokens rounded up
   to whole steps. */
typedef struct {
    int64_t R, T, columns; /* columns: of a chunk of the dense product */
    bf16 *a, *b;           /* the factors: A [R, in], B [out, R], zero off its diagonal blocks */
    bf16 *down;            /* panels of the product for `hidden` */
    bf16 *panels; /* panels of a chunk of the dense product, each ending with the low-rank steps */
    bf16 *hidden;          /* [T, R] as tiles */
    float *memory;         /* per thread: a block of tokens, its sums */
    int64_t own;           /* size of `memory` per thread */
} Shared;

/* Allocates the memory for a dense product [tokens, from] · [from, to]. Returns 0 on failure; the
   caller must free it in either case. */
static int take_shared(Shared *s, const LinearCall *p, int64_t from, int64_t to) {
    s->R = rounded(p->components), s->T = rounded(p->tokens);
    int64_t chunks = (to * (from + s->R) * (int64_t)sizeof(bf16) + CHUNK_BYTES - 1) / CHUNK_BYTES;
    s->columns = rounded((to + chunks - 1) / chunks);
    s->a = take(s->R * p->in), s->b = take(p->out * s->R), s->down = take(from * s->R),
    s->panels = take((from + s->R) * s->columns);
    s->own = MOST_STEPS * STEP_SIZE / 2 + (s->R + s->columns) * STEP;
    s->hidden = take(s->T * s->R), s->memory = (float *)take(2 * s->own * p->threads);
    return s->a && s->b && s->down && s->panels && s->hidden && s->memory;
}

static void give_back(Shared *s) {
    free(s->a), free(s->b), free(s->down), free(s->panels), free(s->hidden), free(s->memory);
}

/* Converts the layers' factors to bfloat16, by all threads. */
static void read_factors(const LinearCall *p, Shared *s) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < s->R; row++) {
        int64_t own = row, layer = layer_of(p, &own);
        if (layer == p->layers) {
            memset(s->a + row * p->in, 0, p->in * sizeof(bf16));
            continue;
        }
        const float *x = p->a[layer] + own * p->in;
        __m512 gate = _mm512_set1_ps(p->gates[layer] ? p->gates[layer][own] : 1);
        for (int64_t i = 0; i < p->in; i += STEP) {
            __m512 low = _mm512_mul_ps(_mm512_loadu_ps(x + i), gate),
                   high = _mm512_mul_ps(_mm512_loadu_ps(x + i + TILE), gate);
            _mm512_storeu_si512(s->a + row * p->in + i, narrowed_32(low, high));
        }
    }
    int64_t first_row = 0, first = 0;
    for (int64_t layer = 0; layer < p->layers;
        first_row += p->outs[layer], first += p->ranks[layer], layer++) {
        int64_t rank = p->ranks[layer];
        __m512 scale = _mm512_set1_ps((float)p->scales[layer]);
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < p->outs[layer]; row++) {
            bf16 *out = s->b + (first_row + row) * s->R;
            memset(out, 0, s->R * sizeof(bf16));
            for (int64_t i = 0; i < rank; i += 16) {
                __mmask16 mask = first_of_16(rank - i);
                __m512 x =
                    _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, p->b[layer] + row * rank + i), scale);
                _mm256_mask_storeu_epi16(out + first + i, mask, (__m256i)_mm512_cvtneps_pbh(x));
            }
        }
    }
#pragma omp barrier
}

/* Packs panels of `steps` steps, `size` elements apart, for `columns` columns of x from `column`
   on, by all threads. The product sums over the rows of x (`transposed`: over its columns). x is
   read along its rows. */
static void pack_panels(bf16 *panels, int64_t size, const bf16 *x, int64_t stride, int transposed,
    int64_t steps, int64_t column, int64_t columns) {
    if (transposed)
#pragma omp for schedule(static) nowait
        for (int64_t at = 0; at < columns; at += PANEL) {
            const bf16 *from = x + (column + at) * stride;
            bf16 *panel = panels + at / PANEL * size;
            for (int64_t step = 0; step < steps; step++, from += STEP, panel += STEP_SIZE) {
                pack_columns(panel, from, stride, columns - at);
                pack_columns(panel + TILE_SIZE, from + TILE * stride, stride, columns - at - TILE);
            }
        }
    else
#pragma omp for schedule(static) nowait
        for (int64_t step = 0; step < steps; step++)
            for (int64_t at = 0; at < columns; at += PANEL)
                pack_rows(panels + at / PANEL * size + step * STEP_SIZE,
                    x + step * STEP * stride + column + at, stride, STEP, columns - at);
}

/* Packs consecutive steps of 32 rows of x from `first` on as tiles of A; rows beyond the last are
   zero. */
INLINE void pack_block(
    bf16 *tiles, const bf16 *x, int64_t stride, int64_t first, int64_t rows, int64_t steps) {
    for (int64_t row = 0; row < STEP; row++)
        for (int64_t step = 0; step < steps; step++) {
            __m512i values = first + row < rows
                ? _mm512_loadu_si512(x + (first + row) * stride + step * STEP)
                : _mm512_setzero_si512();
            _mm512_store_si512(tiles + step * STEP_SIZE + row * STEP, values);
        }
}

/* Adds to sums [32 × 32] (to zero if `fresh`) the product of `steps` steps of tiles a and the
   panel, and the product of `more` steps of b and the rest of the panel. */
INLINE void add_product(float *sums, int fresh, const bf16 *a, int64_t steps, const bf16 *b,
    int64_t more, const bf16 *panel) {
    load_sums(sums, fresh);
    add_steps(a, STEP, STEP_SIZE, steps, panel);
    add_steps(b, STEP, STEP_SIZE, more, panel + steps * STEP_SIZE);
    store_sums(sums);
}

/* Stores the masked hidden values of 32 tokens: as tiles of A, and as columns of `transposed`
   [components, T], which the backward pass reads. */
INLINE void keep_hidden(const LinearCall *p, const Shared *s, const float *sums, bf16 *tiles,
    bf16 *transposed, int64_t first, int64_t component) {
    for (int64_t side = 0; side < PANEL; side += TILE)
        for (int64_t top = 0; top < STEP; top += TILE) {
            __m512i square[TILE];
            __mmask16 there = first_of_16(p->components - component - side);
            for (int row = 0; row < TILE; row++) {
                int64_t token = first + top + row;
                __m512 x = _mm512_load_ps(sums + row_of_sums(top + row) + side * TILE);
                if (p->mask) {
                    const bf16 *mask =
                        (const bf16 *)p->mask + token * p->components + component + side;
                    __m256i kept = _mm256_maskz_loadu_epi16(token < p->tokens ? there : 0, mask);
                    x = _mm512_mul_ps(x, widened(kept));
                }
                square[row] = _mm512_castps_si512(x);
                _mm256_store_si256(
                    (void *)(tiles + (top + row) * STEP + side), (__m256i)_mm512_cvtneps_pbh(x));
            }
            if (!there)
                continue;
            transpose_words(square);
            for (int i = 0; i < TILE && component + side + i < p->components; i++) {
                __m256i column = (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(square[i]));
                _mm256_storeu_si256(
                    (void *)(transposed + (component + side + i) * s->T + first + top), column);
            }
        }
}

/* Adds 32 values to the two halves of a row of sums. */
INLINE void add_32(__m512 *low, __m512 *high, __mmask32 mask, const bf16 *values) {
    __m512i both = _mm512_maskz_loadu_epi16(mask, values);
    *low = _mm512_add_ps(*low, widened(_mm512_castsi512_si256(both)));
    *high = _mm512_add_ps(*high, widened(_mm512_extracti64x4_epi64(both, 1)));
}

/* Writes sums [32 × 32] in four tiles to y, plus a bias and a residual with y's strides, either of
   which may be NULL. */
INLINE void keep_rows(bf16 *y, int64_t stride, const float *sums, const bf16 *bias,
    const bf16 *residual, int64_t rows, int64_t columns) {
    __mmask32 mask = first_of_32(columns);
    __m512 low = _mm512_setzero_ps(), high = low;
    if (bias)
        add_32(&low, &high, mask, bias);
    for (int64_t row = 0; row < least(rows, STEP); row++) {
        const float *tile = sums + row_of_sums(row);
        __m512 x = _mm512_add_ps(_mm512_load_ps(tile), low),
               z = _mm512_add_ps(_mm512_load_ps(tile + 256), high);
        if (residual)
            add_32(&x, &z, mask, residual + row * stride);
        _mm512_mask_storeu_epi16(y + row * stride, mask, narrowed_32(x, z));
    }
}

/* Computes hidden = x · down and, if y is wanted, y = [x hidden] · [weight; up] + bias + residual,
   by all threads. x [tokens, in]; down [in, R], up [R, out] and the weight [in, out], backward
   those of the transposed layer. `memory` belongs to this thread. */
static void low_rank_product(const LinearCall *p, const Shared *s, float *memory, const bf16 *x,
    int64_t x_stride, int64_t in, bf16 *hidden_transposed, const bf16 *residual, bf16 *y,
    int64_t y_stride, int64_t out, int backward) {
    int64_t steps = in / STEP, more = s->R / STEP, all = steps + more,
            parts = (steps + MOST_STEPS - 1) / MOST_STEPS;
    const bf16 *weight = p->weight, *bias = backward ? NULL : p->bias;
    bf16 *block = (bf16 *)memory;
    float *hidden_sums = memory + MOST_STEPS * STEP_SIZE / 2,
          *sums = hidden_sums + more * STEP_SIZE;
    pack_panels(s->down, steps * STEP_SIZE, backward ? s->b : s->a, backward ? s->R : p->in,
        !backward, steps, 0, s->R);
    for (int64_t from = 0; from < (y ? out : 1); from += s->columns) {
        int64_t columns = y ? least(s->columns, out - from) : 0,
                panels = (columns + PANEL - 1) / PANEL, size = all * STEP_SIZE;
        pack_panels(s->panels, size, weight, p->weight_stride,
            !backward != !!p->weight_is_transposed, steps, from, columns);
        pack_panels(s->panels + steps * STEP_SIZE, size, backward ? s->a : s->b,
            backward ? p->in : s->R, !backward, more, from, columns);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < p->tokens; first += STEP) {
            bf16 *hidden = s->hidden + first * s->R;
            for (int64_t part = 0; part < parts; part++) {
                int64_t start = part * steps / parts, count = (part + 1) * steps / parts - start;
                int last = part + 1 == parts;
                pack_block(block, x + start * STEP, x_stride, first, p->tokens, count);
                written();
                for (int64_t panel = 0; from == 0 && panel < more; panel++) {
                    add_product(hidden_sums + panel * STEP_SIZE, !part, block, count, NULL, 0,
                        s->down + (panel * steps + start) * STEP_SIZE);
                    if (last)
                        keep_hidden(p, s, hidden_sums + panel * STEP_SIZE,
                            hidden + panel * STEP_SIZE, hidden_transposed, first, panel * PANEL);
                }
                written();
                for (int64_t panel = 0; panel < panels; panel++) {
                    int64_t column = from + panel * PANEL;
                    float *own = parts == 1 ? sums : sums + panel * STEP_SIZE;
                    add_product(own, !part, block, count, hidden, last ? more : 0,
                        s->panels + (panel * all + start) * STEP_SIZE);
                    int64_t place = first * y_stride + column;
                    if (last)
                        keep_rows(y + place, y_stride, own, bias ? bias + column : NULL,
                            residual ? residual + place : NULL, p->tokens - first, out - column);
                }
            }
        }
    }
}

/* Fills y [tokens, out], and hidden_transposed [components + 32, T] for the backward pass.
   residual, with y's strides, is added to y and may be NULL. Returns 0, or 1 if memory is missing.
   */
int64_t lora_forward(
    const LinearCall *p, const bf16 *x, bf16 *y, bf16 *hidden_transposed, const bf16 *residual) {
    Shared s;
    int64_t failed = !take_shared(&s, p, p->in, p->out);
    if (!failed)
#pragma omp parallel num_threads(p->threads)
    {
        use_tiles();
        read_factors(p, &s);
        low_rank_product(p, &s, s.memory + omp_get_thread_num() * s.own, x, p->x_stride, p->in,
            hidden_transposed, residual, y, p->y_stride, p->out, 0);
        _tile_release();
    }
    give_back(&s);
    return failed;
}

/* Packs two panels of 32 columns of x for sums over tokens, `size` elements each. */
INLINE void pack_strip(
    bf16 *strip, int64_t size, const bf16 *x, int64_t stride, int64_t tokens, int64_t columns) {
    for (int64_t first = 0; first < tokens; first += STEP, x += STEP * stride, strip += STEP_SIZE) {
        for (int64_t row = STEP; row < least(2 * STEP, tokens - first);
            row++) /* prefetches the next step, which hardware does not foresee */
            __builtin_prefetch(x + row * stride), __builtin_prefetch(x + row * stride + 32);
        pack_rows(strip, x, stride, tokens - first, columns);
        if (columns > PANEL)
            pack_rows(strip + size, x + PANEL, stride, tokens - first, columns - PANEL);
    }
    written();
}

/* Writes sums [32 × 32] times scale, transposed, to out[column * stride + row]. */
static void keep_transposed(
    float *out, int64_t stride, const float *sums, float scale, int64_t rows, int64_t columns) {
    for (int64_t side = 0; side < PANEL; side += TILE)
        for (int64_t top = 0; top < rows; top += TILE) {
            __m512i square[TILE];
            for (int i = 0; i < TILE; i++)
                square[i] = _mm512_load_si512(sums + (top + i) * PANEL + side);
            transpose_words(square);
            for (int64_t i = 0; i < TILE && side + i < columns; i++) {
                __m512 x = _mm512_mul_ps(_mm512_castsi512_ps(square[i]), _mm512_set1_ps(scale));
                _mm512_mask_storeu_ps(out + (side + i) * stride + top, first_of_16(rows - top), x);
            }
        }
}

/* Writes 32 columns of the gradient of a component's row of A, from the gradient of its gated row.
   Returns their part of the gate's gradient. */
INLINE float keep_gated(
    const LinearCall *p, float *out, const float *sums, int64_t component, int64_t column) {
    int64_t own = component, layer = layer_of(p, &own);
    if (!p->gates[layer]) {
        memcpy(out, sums, PANEL * sizeof(float));
        return 0;
    }
    const float *a = p->a[layer] + own * p->in + column;
    __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + TILE),
           gate = _mm512_set1_ps(p->gates[layer][own]);
    _mm512_storeu_ps(out, _mm512_mul_ps(low, gate)),
        _mm512_storeu_ps(out + TILE, _mm512_mul_ps(high, gate));
    return _mm512_reduce_add_ps(
        _mm512_fmadd_ps(low, _mm512_loadu_ps(a), _mm512_mul_ps(high, _mm512_loadu_ps(a + TILE))));
}

/* Computes the sums over tokens by all threads: the gradients of A [components, in] and of the
   layers' Bs [out, rank], concatenated. of_gates [in / 32, components]: the parts of the gates'
   gradients from each panel's columns. */
static void factor_gradients(const LinearCall *p, const Shared *s, const bf16 *x,
    const bf16 *grad_y, const bf16 *hidden_transposed, const bf16 *grad_transposed, float *grad_a,
    float *grad_b, float *of_gates, bf16 *strip) {
    if (!p->components)
        return;
    int64_t steps = s->T / STEP, size = s->T * PANEL, first_column = 0, first = 0;
    float sums[STEP * PANEL] __attribute__((aligned(64)));
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t start = 0; start < p->in; start += 2 * PANEL) {
        pack_strip(strip, size, x + start, p->x_stride, p->tokens, p->in - start);
        for (int64_t column = start; column < least(start + 2 * PANEL, p->in); column += PANEL)
            for (int64_t component = 0; component < p->components; component += PANEL) {
                int64_t rows = least(p->components - component, PANEL);
                product(sums, grad_transposed + component * s->T, s->T, steps,
                    strip + (column > start) * size, rows <= TILE);
                for (int64_t row = component; row < component + rows; row++) {
                    float *out = grad_a + row * p->in + column;
                    of_gates[column / PANEL * p->components + row] =
                        keep_gated(p, out, sums + (row - component) * PANEL, row, column);
                }
            }
    }
    for (int64_t layer = 0; layer < p->layers; layer++) {
        int64_t rank = p->ranks[layer], out = p->outs[layer];
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t start = 0; start < out; start += 2 * PANEL) {
            pack_strip(
                strip, size, grad_y + first_column + start, p->y_stride, p->tokens, out - start);
            for (int64_t column = start; column < least(start + 2 * PANEL, out); column += PANEL)
                for (int64_t own = 0; own < rank; own += PANEL) {
                    int64_t rows = least(rank - own, PANEL);
                    product(sums, hidden_transposed + (first + own) * s->T, s->T, steps,
                        strip + (column > start) * size, rows <= TILE);
                    keep_transposed(grad_b + column * rank + own, rank, sums,
                        (float)p->scales[layer], rows, out - column);
                }
        }
        first_column += out, first += rank, grad_b += out * rank;
    }
}

/* grad_x [tokens, in] may be NULL, and so may the residual, which is added to it. grad_a, grad_b
   and grad_gates [components] are float32. */
int64_t lora_backward(const LinearCall *p, const bf16 *x, const bf16 *grad_y,
    const bf16 *hidden_transposed, const bf16 *residual, bf16 *grad_x, float *grad_a, float *grad_b,
    float *grad_gates) {
    Shared s;
    int64_t failed = !take_shared(&s, p, p->out, p->in);
    bf16 *grad_transposed = take((p->components + PANEL) * s.T),
         *strips = take(p->threads * s.T * 2 * PANEL);
    float *of_gates = (float *)take(2 * p->components * (p->in / PANEL));
    failed |= !grad_transposed || !strips || !of_gates;
    if (!failed)
#pragma omp parallel num_threads(p->threads)
    {
        use_tiles();
        read_factors(p, &s);
        low_rank_product(p, &s, s.memory + omp_get_thread_num() * s.own, grad_y, p->y_stride,
            p->out, grad_transposed, residual, grad_x, p->in, p->in, 1);
        bf16 *strip = strips + omp_get_thread_num() * s.T * 2 * PANEL;
        factor_gradients(
            p, &s, x, grad_y, hidden_transposed, grad_transposed, grad_a, grad_b, of_gates, strip);
        _tile_release();
    }
    for (int64_t component = 0; !failed && component < p->components; component++) {
        grad_gates[component] = 0;
        for (int64_t panel = 0; panel < p->in / PANEL; panel++)
            grad_gates[component] += of_gates[panel * p->components + component];
    }
    free(grad_transposed), free(strips), free(of_gates), give_back(&s);
    return failed;
}
#endif
