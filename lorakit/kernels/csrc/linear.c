/* LoRA linear layers that read the same input, forward and backward, in float32 (see products.py);
   without components, a frozen layer.

   y = x Wᵀ + bias + h Bᵀ with h = x Aᵀ (Hu et al., arXiv 2106.09685, eq. 3), where h has the
   components of all layers. The low-rank product is a few more steps of the dense one: [x h]
   [W B]ᵀ. Backward, with g = dy B, the gradient of x is [dy g] [W; A]. So the low-rank product needs
   no additional pass over y.

   All threads together pack the weights, one chunk of panels at a time; then each thread takes
   blocks of tokens. Sums over tokens (gradients of A and B) are computed in strips of columns. A
   gate multiplies a row of A, and its gradient is computed from that row's. No result depends on
   the number of threads. */

#include "linear.h"
#include "products.h"
#include <omp.h>

enum {
    CHUNK_FLOATS = 72 << 10, /* of a chunk of panels, which fits the L2 cache */
    BLOCK = 4 * ROWS,        /* tokens that a thread takes at a time */
    STRIP = 48,              /* columns of a sum over tokens that a thread takes at a time */
    SPAN_OF_TOKENS = 64,     /* tokens that stay in the L1 cache for a strip */
};

SIZE_OF(LinearCall)

/* Columns of one side of a layer and the components that belong to them. */
typedef struct {
    int64_t column, columns, component, components;
} Part;

/* One direction of a layer: hidden = x · down, y = x · weight + hidden · up. The parts of x make
   components each of their own, and so do components columns of y: forward x is one part and y has
   one for each layer, backward the other way round. */
typedef struct {
    const LinearCall *p;
    int backward;
    const float *x;
    int64_t x_stride, in, y_stride;
    int64_t x_count, y_count;
    Part whole, layers[MOST_LAYERS];
    const Part *x_parts, *y_parts;
    float *down, *panels, *hidden; /* hidden [tokens, components] */
    int64_t chunk;                 /* columns */
} Way;

static float *take(int64_t count) { return aligned_memory(count * sizeof(float)); }

/* Takes the memory of one direction. Returns 0 on failure; the caller frees it in either case. */
static int prepare(Way *way, const LinearCall *p, int backward, const float *x, float *hidden) {
    int64_t column = 0, component = 0;
    *way = (Way){.p = p, .backward = backward, .x = x, .hidden = hidden};
    way->in = backward ? p->out : p->in;
    way->x_stride = backward ? p->y_stride : p->x_stride;
    way->y_stride = backward ? p->in : p->y_stride;
    way->whole = (Part){0, p->in, 0, p->components};
    way->layers[0] = (Part){0, p->out, 0, 0}; /* of a frozen layer, which has no others */
    for (int64_t layer = 0; layer < p->layers; layer++) {
        way->layers[layer] = (Part){column, p->outs[layer], component, p->ranks[layer]};
        column += p->outs[layer], component += p->ranks[layer];
    }
    int64_t count = p->layers ? p->layers : 1;
    way->x_parts = backward ? way->layers : &way->whole, way->x_count = backward ? count : 1;
    way->y_parts = backward ? &way->whole : way->layers, way->y_count = backward ? 1 : count;
    int64_t steps = way->in + p->components;
    way->chunk = (CHUNK_FLOATS / (steps * PANEL) + 1) * PANEL;
    way->down = take(way->in * (p->components + count * LANES));
    way->panels = take(way->chunk * steps);
    return way->down && way->panels;
}

static void give_back(Way *way) { free(way->down), free(way->panels); }

/* ---- packing, by all threads ---- */

/* One value of the right operand of `hidden`: backward the scaled B, forward A with its gate. */
INLINE float down_value(
    const LinearCall *p, int64_t layer, int64_t own, int64_t step, int backward) {
    if (backward)
        return (float)p->scales[layer] * p->b[layer][step * p->ranks[layer] + own];
    return p->a[layer][own * p->in + step] * (p->gates[layer] ? p->gates[layer][own] : 1);
}

/* Packs the panels of the product for `hidden`, part by part. */
static void pack_down(const Way *way) {
    const LinearCall *p = way->p;
    float *panels = way->down;
    for (const Part *part = way->x_parts; part < way->x_parts + way->x_count; part++)
        for (int64_t at = 0; at < part->components; at += PANEL) {
            int64_t width = width_of(part->components - at);
#pragma omp for schedule(static) nowait
            for (int64_t lane = 0; lane < width; lane++) {
                int64_t own = part->component + at + lane, layer = layer_of(p, &own);
                int there = at + lane < part->components;
                for (int64_t step = 0; step < part->columns; step++)
                    panels[step * width + lane] =
                        there ? down_value(p, layer, own, step, way->backward) : 0;
            }
            panels += part->columns * width;
        }
}

/* Packs the low-rank steps of a panel, which follow the dense ones. What goes up here goes down in
   the other direction. */
static void pack_up(const Way *way, float *panel, const Part *part, int64_t at) {
    int64_t columns = part->columns - at, width = width_of(columns);
    for (int64_t step = 0; step < part->components; step++, panel += width) {
        int64_t own = part->component + step, layer = layer_of(way->p, &own);
        for (int64_t lane = 0; lane < width; lane++)
            panel[lane] = lane < columns
                ? down_value(way->p, layer, own, at + lane, !way->backward)
                : 0;
    }
}

static void pack_dense(const Way *way, float *panel, int64_t column, int64_t columns) {
    const LinearCall *p = way->p;
    if (!way->backward != !!p->weight_is_transposed)
        pack_rows(panel, p->weight, p->weight_stride, column, columns, way->in);
    else
        pack_columns(panel, p->weight, p->weight_stride, column, columns, way->in);
}

/* ---- products of a block of tokens ---- */

/* Computes one block of sums [ROWS, vectors], for tokens from `first` on; tokens beyond the last
   repeat it. */
INLINE void block_of_sums(Floats sums[ROWS][VECTORS], const Way *way, int64_t first, int64_t column,
    int64_t steps, const float *panel, const int vectors) {
    const float *rows[ROWS];
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++)
        rows[row] = way->x + least(first + row, way->p->tokens - 1) * way->x_stride + column;
    add_rows(sums, rows, steps, panel, vectors);
}

/* Computes `hidden` of up to ROWS tokens for one panel of components. */
INLINE void hidden_panel(const Way *way, int64_t first, int64_t column, int64_t steps,
    const float *panel, int64_t component, int64_t components, const int vectors) {
    const LinearCall *p = way->p;
    Floats sums[ROWS][VECTORS] = {};
    block_of_sums(sums, way, first, column, steps, panel, vectors);
    for (int64_t row = 0; row < least(ROWS, p->tokens - first); row++)
        for (int v = 0; v < vectors; v++) {
            int64_t place = (first + row) * p->components + component + v * LANES,
                    count = components - v * LANES;
            Floats values = sums[row][v];
            if (p->mask)
                values *= load(p->mask, place, count, 0);
            store(way->hidden, place, count, values, 0);
        }
}

static void hidden_of_block(const Way *way, int64_t first, int64_t last) {
    const float *panel = way->down;
    for (const Part *part = way->x_parts; part < way->x_parts + way->x_count; part++)
        for (int64_t at = 0; at < part->components; at += PANEL) {
            int64_t width = width_of(part->components - at);
            for (int64_t token = first; token < last; token += ROWS)
                BY_VECTORS(hidden_panel, width / LANES, way, token, part->column, part->columns,
                    panel, part->component + at, part->components - at);
            panel += part->columns * width;
        }
}

/* Computes up to ROWS tokens of one panel of y. */
INLINE void dense_panel(const Way *way, int64_t first, const Part *part, int64_t at,
    const float *panel, const float *bias, const float *residual, float *y, const int vectors) {
    const LinearCall *p = way->p;
    Floats sums[ROWS][VECTORS] = {};
    block_of_sums(sums, way, first, 0, way->in, panel, vectors);
    if (part->components) {
        const float *rows[ROWS];
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++)
            rows[row] =
                way->hidden + least(first + row, p->tokens - 1) * p->components + part->component;
        add_rows(sums, rows, part->components, panel + way->in * vectors * LANES, vectors);
    }
    int64_t column = part->column + at, columns = part->columns - at;
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        int64_t count = columns - v * LANES;
        Floats add = bias ? load(bias, column + v * LANES, count, 0) : all(0);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            int64_t place = (first + row) * way->y_stride + column + v * LANES;
            if (first + row >= p->tokens)
                break;
            Floats values = sums[row][v] + add;
            if (residual)
                values += load(residual, place, count, 0);
            store(y, place, count, values, 0);
        }
    }
}

/* Computes hidden and, if y is wanted, y = x · weight + hidden · up + bias + residual, by all
   threads. */
static void low_rank_product(const Way *way, const float *residual, float *y) {
    const LinearCall *p = way->p;
    const float *bias = way->backward ? NULL : p->bias;
    pack_down(way);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < p->tokens; first += BLOCK)
        hidden_of_block(way, first, least(first + BLOCK, p->tokens));
    for (const Part *part = way->y_parts; y && part < way->y_parts + way->y_count; part++) {
        int64_t steps = way->in + part->components;
        for (int64_t start = 0; start < part->columns; start += way->chunk) {
            int64_t end = least(start + way->chunk, part->columns);
#pragma omp for schedule(static)
            for (int64_t at = start; at < end; at += PANEL) {
                int64_t columns = part->columns - at, width = width_of(columns);
                float *panel = way->panels + (at - start) * steps;
                pack_dense(way, panel, part->column + at, columns);
                pack_up(way, panel + way->in * width, part, at);
            }
#pragma omp for schedule(dynamic, 1)
            for (int64_t first = 0; first < p->tokens; first += BLOCK)
                for (int64_t at = start; at < end; at += PANEL)
                    for (int64_t token = first; token < least(first + BLOCK, p->tokens);
                         token += ROWS)
                        BY_VECTORS(dense_panel, width_of(part->columns - at) / LANES, way, token,
                            part, at, way->panels + (at - start) * steps, bias, residual, y);
        }
    }
}

/* Fills y [tokens, out], and hidden [tokens, components] for the backward pass, with PANEL floats
   of room behind it. residual, with y's strides, is added to y and may be NULL. Returns 0, or 1 if
   memory is missing. */
int64_t lora_forward(
    const LinearCall *p, const float *x, float *y, float *hidden, const float *residual) {
    Way way;
    int64_t failed = !prepare(&way, p, 0, x, hidden);
    if (!failed)
#pragma omp parallel num_threads(p->threads)
        low_rank_product(&way, residual, y);
    give_back(&way);
    return failed;
}

/* ---- sums over tokens ---- */

/* Where the sums of a strip go: to y[column * stride + i] times scale, or transposed, to
   y[i * stride + column]. */
typedef struct {
    float *y;
    int64_t stride, is_transposed;
    float scale;
} Target;

/* Computes sums over tokens of left[token][column] * right[token][·] for a strip of columns and
   `count` values of the right rows. */
INLINE void sums_of_vectors(const LinearCall *p, const float *left, int64_t left_stride,
    int64_t columns, const float *right, int64_t count, Target target, const int vectors) {
    float sums[STRIP * SUMS * LANES] __attribute__((aligned(64)));
    const int64_t size = SUMS / vectors; /* columns of a block; the last block may overlap */
    for (int64_t first = 0; first < p->tokens; first += SPAN_OF_TOKENS) {
        int64_t tokens = least(SPAN_OF_TOKENS, p->tokens - first);
        float *own = sums;
        for (int64_t at = 0; at < columns; at += size, own += SUMS * LANES)
            add_tokens(own, first == 0, left + first * left_stride + least(at, columns - size),
                left_stride, right + first * p->components, p->components, tokens, vectors);
    }
    const float *own = sums;
    for (int64_t at = 0; at < columns; at += size, own += SUMS * LANES)
        for (int64_t column = 0; column < size; column++)
            for (int64_t i = 0; i < least(count, vectors * LANES); i++) {
                int64_t place = least(at, columns - size) + column;
                target.y[target.is_transposed ? i * target.stride + place
                                              : place * target.stride + i] =
                    own[column * vectors * LANES + i] * target.scale;
            }
}

static void sums_over_tokens(const LinearCall *p, const float *left, int64_t left_stride,
    int64_t columns, const float *right, int64_t count, Target target) {
    for (int64_t at = 0; at < count; at += 2 * LANES) {
        Target own = target;
        own.y += at * (target.is_transposed ? target.stride : 1);
        if (count - at > LANES)
            sums_of_vectors(p, left, left_stride, columns, right + at, count - at, own, 2);
        else
            sums_of_vectors(p, left, left_stride, columns, right + at, count - at, own, 1);
    }
}

/* The gradients of A [components, in] and of the layers' Bs [out, rank], concatenated, by all
   threads. */
static void factor_gradients(const Way *way, const float *x, const float *hidden, float *grad_a,
    float *grad_b, float *grad_gates) {
    const LinearCall *p = way->p;
    int64_t all_components = p->components;
    if (!all_components)
        return;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t start = 0; start < p->in; start += STRIP)
        sums_over_tokens(p, x + start, p->x_stride, least(STRIP, p->in - start), way->hidden,
            all_components, (Target){grad_a + start, p->in, 1, 1});
    for (int64_t layer = 0; layer < p->layers; layer++) {
        Part part = way->layers[layer];
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t start = 0; start < part.columns; start += STRIP)
            sums_over_tokens(p, way->x + part.column + start, way->x_stride,
                least(STRIP, part.columns - start), hidden + part.component, part.components,
                (Target){grad_b + start * part.components, part.components, 0,
                    (float)p->scales[layer]});
        grad_b += part.columns * part.components;
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t component = 0; component < all_components; component++) {
        int64_t own = component, layer = layer_of(p, &own);
        grad_gates[component] = 0;
        if (!p->gates[layer])
            continue;
        float *row = grad_a + component * p->in, gate = p->gates[layer][own];
        Floats total = all(0);
        for (int64_t i = 0; i < p->in; i += LANES) {
            Floats values = vector_at(row + i);
            total += values * vector_at(p->a[layer] + own * p->in + i);
            put(row + i, values * gate);
        }
        grad_gates[component] = sum(total);
    }
}

/* grad_x [tokens, in] may be NULL, and so may the residual, which is added to it. grad_a, grad_b
   and grad_gates [components] are those of all layers. */
int64_t lora_backward(const LinearCall *p, const float *x, const float *grad_y, const float *hidden,
    const float *residual, float *grad_x, float *grad_a, float *grad_b, float *grad_gates) {
    Way way;
    float *grad_hidden = take(p->tokens * p->components + PANEL);
    int64_t failed = !prepare(&way, p, 1, grad_y, grad_hidden) | !grad_hidden;
    if (!failed)
#pragma omp parallel num_threads(p->threads)
    {
        low_rank_product(&way, residual, grad_x);
        factor_gradients(&way, x, hidden, grad_a, grad_b, grad_gates);
    }
    free(grad_hidden), give_back(&way);
    return failed;
}
