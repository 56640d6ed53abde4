/* Matrix products in float32 by vectors: blocks of sums that stay in registers while a panel of the
   right operand stays in the cache (Goto and van de Geijn, Anatomy of High-Performance Matrix
   Multiplication, 2008).

   A panel holds up to PANEL columns of a right operand, step by step: [steps, width], where the
   width is a whole number of vectors. */

#pragma once
#include "vectors.h"

enum {
    ROWS = 6,                      /* rows of a block of sums */
    VECTORS = LANES == 16 ? 4 : 2, /* its vectors, at most */
    PANEL = VECTORS * LANES,       /* its columns, at most */
    SUMS = 12,                     /* vectors of a block of sums over tokens */
};

/* Calls f with the number of vectors, 1 to VECTORS, as a constant last argument. */
#define BY_VECTORS(f, vectors, ...)       \
    do {                                  \
        if ((vectors) == VECTORS)         \
            f(__VA_ARGS__, VECTORS);      \
        else if ((vectors) == 1)          \
            f(__VA_ARGS__, 1);            \
        else if ((vectors) == 2)          \
            f(__VA_ARGS__, 2);            \
        else                              \
            f(__VA_ARGS__, VECTORS - 1);  \
    } while (0)

/* The width of a panel of so many columns. */
INLINE int64_t width_of(int64_t columns) { return rounded_up(least(columns, PANEL), LANES); }

/* sums[row][·] += sum over steps of rows[row][step] * panel[step][·]. */
INLINE void add_rows(Floats sums[ROWS][VECTORS], const float *const rows[ROWS], int64_t steps,
    const float *panel, const int vectors) {
    for (int64_t step = 0; step < steps; step++, panel += vectors * LANES) {
        Floats right[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            right[v] = vector_at(panel + v * LANES);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            Floats left = all(rows[row][step]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sums[row][v] += left * right[v];
        }
    }
}

/* sums[column][·] (to zero if `fresh`) += sum over tokens of left[token][column] *
   right[token][·], for SUMS / vectors columns and one or two vectors. */
INLINE void add_tokens(float *sums, int fresh, const float *left, int64_t left_stride,
    const float *right, int64_t right_stride, int64_t tokens, const int vectors) {
    const int columns = SUMS / vectors;
    Floats own[SUMS];
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++)
        own[i] = fresh ? all(0) : vector_at(sums + i * LANES);
    for (int64_t token = 0; token < tokens; token++, left += left_stride, right += right_stride) {
        Floats values[2];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            values[v] = vector_at(right + v * LANES);
#pragma GCC unroll 12
        for (int column = 0; column < columns; column++) {
            Floats factor = all(left[column]);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++)
                own[column * vectors + v] += factor * values[v];
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; i++)
        put(sums + i * LANES, own[i]);
}

/* Packs `columns` columns from `column` on of a right operand x[step * stride + column]. */
static void pack_columns(float *panel, const float *x, int64_t stride, int64_t column,
    int64_t columns, int64_t steps) {
    int64_t width = width_of(columns);
    for (int64_t step = 0; step < steps; step++, panel += width)
        for (int64_t at = 0; at < width; at += LANES)
            put(panel + at, load(x, step * stride + column + at, columns - at, 0));
}

/* Packs the same columns of a right operand x[column * stride + step]. */
static void pack_rows(float *panel, const float *x, int64_t stride, int64_t column, int64_t columns,
    int64_t steps) {
    int64_t width = width_of(columns);
    for (int64_t step = 0; step < steps; step += LANES)
        for (int64_t at = 0; at < width; at += LANES) {
            Floats square[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                square[i] = at + i < columns
                    ? load(x, (column + at + i) * stride + step, steps - step, 0)
                    : all(0);
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                if (step + i < steps)
                    put(panel + (step + i) * width + at, square[i]);
        }
}
