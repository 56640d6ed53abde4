/* Blocks of attention without AMX (attention.c): how their matrices are laid out, read and written,
   and their products, all in float32.

   A matrix of panels [columns / PANEL][BLOCK][PANEL] holds rows of queries, keys or values: each
   panel has two vectors of every row. A matrix of columns [BLOCK / PANEL][width][PANEL] is the
   transpose of keys or values, in panels of its own. Both fill a slot (slot_size), so that every
   product reads its right operand line by line, and elements of its left operand one at a time.
   Scores and weights [queries][BLOCK] are plain rows. */

#pragma once
#include "attention.h"

enum {
    PANEL = 2 * LANES,
    BLOCK = 128,                 /* most queries or keys of a block; a multiple of PANEL */
    TILE = LANES == 16 ? 12 : 6, /* most rows of a product whose sums are kept in registers */
};

INLINE int64_t whole_panels(int64_t n) { return rounded_up(n, PANEL); }

/* The floats of a slot, which holds one block of one head in either form. */
INLINE int64_t slot_size(int64_t width) { return BLOCK * whole_panels(width); }

/* A tensor [tokens, heads, width] in memory: elements from one token to the next, and from one head
   to the next. */
typedef struct {
    void *x;
    int64_t token, head;
} View;

/* ---- reading and writing -------------------------------------------------------------------- */

/* Reads one element of each cache line of `count` tokens and some heads, in the order in which they
   are in memory, as the processor foresees that order, but not that of one head's tokens. */
INLINE void touch(View from, int64_t token, int64_t head, int64_t count, int64_t heads,
    int64_t width, int bf16) {
    int64_t size = bf16 ? 2 : 4;
    for (int64_t row = token; row < token + count; row++)
        for (int64_t h = head; h < head + heads; h++)
            for (int64_t byte = 0; byte < width * size; byte += 64)
                (void)*((const volatile char *)from.x +
                    (row * from.token + h * from.head) * size + byte);
}

/* Reads `count` tokens of a head, times a factor, into panels. */
INLINE void read_rows(float *panels, View from, int64_t token, int64_t head, int64_t count,
    int64_t width, float factor, int bf16) {
    int64_t at = token * from.token + head * from.head;
    for (int64_t c = 0; c < width; c += PANEL, panels += BLOCK * PANEL)
        for (int64_t row = 0; row < count; row++)
            for (int half = 0; half < PANEL; half += LANES)
                put(panels + row * PANEL + half,
                    load(from.x, at + row * from.token + c + half, width - c - half, bf16) *
                        factor);
}

/* Reads the transpose of such tokens into columns, with zeros to the end of the last panel. */
INLINE void read_columns(float *columns, View from, int64_t token, int64_t head, int64_t count,
    int64_t width, int bf16) {
    int64_t at = token * from.token + head * from.head;
    for (int64_t row = 0; row < whole_panels(count); row += LANES) {
        float *panel = columns + row / PANEL * PANEL * width + row % PANEL;
        for (int64_t c = 0; c < width; c += LANES) {
            Floats square[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                square[i] = row + i < count
                    ? load(from.x, at + (row + i) * from.token + c, LANES, bf16)
                    : (Floats){};
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                put(panel + (c + i) * PANEL, square[i]);
        }
    }
}

/* Writes rows of panels, each times its factor if there are factors, as tokens of a head. */
INLINE void write_rows(View to, int64_t token, int64_t head, const float *panels, int64_t count,
    int64_t width, const float *factors, int bf16) {
    int64_t at = token * to.token + head * to.head;
    for (int64_t c = 0; c < width; c += PANEL, panels += BLOCK * PANEL)
        for (int64_t row = 0; row < count; row++)
            for (int half = 0; half < PANEL; half += LANES) {
                Floats x = vector_at(panels + row * PANEL + half);
                store(to.x, at + row * to.token + c + half, width - c - half,
                    factors ? x * factors[row] : x, bf16);
            }
}

/* ---- products ------------------------------------------------------------------------------- */

/* Calls f with each tile of the rows [from, to): the number of its rows as a constant, then its
   first row. The tiles are as equal as can be. */
#define IN_TILES(from, to, f, ...)                                              \
    do {                                                                        \
        int64_t from_ = (from), rows_ = (to) - from_, tiles_ = (rows_ + TILE - 1) / TILE; \
        for (int64_t tile_ = 0; tile_ < tiles_; tile_++) {                      \
            int64_t row_ = from_ + tile_ * rows_ / tiles_,                      \
                    end_ = from_ + (tile_ + 1) * rows_ / tiles_;                \
            switch (end_ - row_) { CASES(f, row_, __VA_ARGS__) }                \
        }                                                                       \
    } while (0)
#define CASE(rows, f, ...)    \
    case rows:                \
        f(rows, __VA_ARGS__); \
        break;
#define SIX_CASES(...)                                                    \
    CASE(1, __VA_ARGS__)                                                  \
    CASE(2, __VA_ARGS__)                                                  \
    CASE(3, __VA_ARGS__)                                                  \
    CASE(4, __VA_ARGS__)                                                  \
    CASE(5, __VA_ARGS__)                                                  \
    CASE(6, __VA_ARGS__)
#if LANES == 16
#define CASES(...)                                               \
    SIX_CASES(__VA_ARGS__)                                       \
    CASE(7, __VA_ARGS__)                                         \
    CASE(8, __VA_ARGS__)                                         \
    CASE(9, __VA_ARGS__)                                         \
    CASE(10, __VA_ARGS__)                                        \
    CASE(11, __VA_ARGS__)                                        \
    CASE(12, __VA_ARGS__)
#else
#define CASES SIX_CASES
#endif

/* sums[row][·] += sum over `depth` steps of a[row * a_row + step * a_step] * b[step * PANEL + ·],
   with a constant number of rows. */
INLINE void add_products(Floats sums[TILE][2], int rows, const float *a, int64_t a_row,
    int64_t a_step, const float *b, int64_t depth) {
    for (int64_t step = 0; step < depth; step++, a += a_step, b += PANEL) {
        Floats low = vector_at(b), high = vector_at(b + LANES);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            sums[i][0] += a[i * a_row] * low;
            sums[i][1] += a[i * a_row] * high;
        }
    }
}

INLINE void score_tile(int rows, int64_t row, float *scores, const float *queries,
    const float *columns, int64_t width) {
    Floats sums[TILE][2] = {};
    queries += row * PANEL, scores += row * BLOCK;
    for (int64_t c = 0; c < width; c += PANEL, queries += BLOCK * PANEL, columns += PANEL * PANEL)
        add_products(sums, rows, queries, PANEL, 1, columns, least(PANEL, width - c));
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        put(scores + i * BLOCK, sums[i][0]), put(scores + i * BLOCK + LANES, sums[i][1]);
}

/* scores[query][key] = the product of a row of panels and a column of columns. On the diagonal,
   where query number i sees only keys up to i, some scores of others are left out. */
NOINLINE void multiply(float *scores, const float *queries, int64_t count, const float *columns,
    int64_t keys, int64_t width, int diagonal) {
    for (int64_t key = 0; key < keys; key += PANEL, columns += PANEL * width)
        IN_TILES(diagonal ? key : 0, count, score_tile, scores + key, queries, columns, width);
}

INLINE void weighted_tile(int rows, int64_t row, float *out, const float *weights,
    const float *panel, int64_t depth, int diagonal, const float *factors, int fresh) {
    Floats sums[TILE][2] = {};
    out += row * PANEL;
    if (!fresh)
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++)
            for (int half = 0; half < 2; half++) {
                Floats x = vector_at(out + i * PANEL + half * LANES);
                sums[i][half] = factors ? x * factors[row + i] : x;
            }
    add_products(sums, rows, weights + row * BLOCK, BLOCK, 1, panel,
        diagonal ? least(depth, row + rows) : depth);
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        put(out + i * PANEL, sums[i][0]), put(out + i * PANEL + LANES, sums[i][1]);
}

/* out[query][·] = out[query][·] * factors[query] + sum over keys of weights[query][key] *
   panels[key][·]; without the first term if `fresh`. */
NOINLINE void add_weighted(float *out, const float *weights, const float *panels, int64_t count,
    int64_t keys, int64_t width, int diagonal, const float *factors, int fresh) {
    for (int64_t c = 0; c < width; c += PANEL, out += BLOCK * PANEL, panels += BLOCK * PANEL)
        IN_TILES(0, count, weighted_tile, out, weights, panels, keys, diagonal, factors, fresh);
}

INLINE void gathered_tile(int rows, int64_t row, float *out, const float *weights,
    const float *panel, int64_t count, int diagonal, int fresh) {
    int64_t first = diagonal ? row : 0;
    Floats sums[TILE][2] = {};
    out += row * PANEL;
    if (!fresh)
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++)
            sums[i][0] = vector_at(out + i * PANEL),
            sums[i][1] = vector_at(out + i * PANEL + LANES);
    add_products(
        sums, rows, weights + first * BLOCK + row, 1, BLOCK, panel + first * PANEL, count - first);
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        put(out + i * PANEL, sums[i][0]), put(out + i * PANEL + LANES, sums[i][1]);
}

/* out[key][·] += sum over queries of weights[query][key] * panels[query][·]; out is taken as zero
   if `fresh`. */
NOINLINE void add_gathered(float *out, const float *weights, const float *panels, int64_t count,
    int64_t keys, int64_t width, int diagonal, int fresh) {
    for (int64_t c = 0; c < width; c += PANEL, out += BLOCK * PANEL, panels += BLOCK * PANEL)
        IN_TILES(0, keys, gathered_tile, out, weights, panels, count, diagonal, fresh);
}
