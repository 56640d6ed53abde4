/* Products of a block of 32 rows and a chunk of packed columns by tiles: the block as tiles of A, one after the other, which stays in
   the first cache, and sums as four tiles, so that all that is loaded or stored is whole lines that follow each other. */

#pragma once
#include "amx.h"

#ifdef HAVE_AMX
INLINE int64_t rounded(int64_t count) { return (count + STEP - 1) / STEP * STEP; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Steps of 32 rows of x from `first` on as tiles of A, one after the other; rows beyond the last one are zero. */
INLINE void pack_block(bf16 *tiles, const bf16 *x, int64_t stride, int64_t first, int64_t rows, int64_t steps) {
    for (int64_t row = 0; row < STEP; row++)
        for (int64_t step = 0; step < steps; step++) {
            __m512i values = first + row < rows ? _mm512_loadu_si512(x + (first + row) * stride + step * STEP) : _mm512_setzero_si512();
            _mm512_store_si512(tiles + step * STEP_SIZE + row * STEP, values);
        }
}

/* sums [32 × 32], from zero if `fresh`, plus the product of `steps` steps of the tiles a and the panel, and of `more` of b and what
   follows in the panel. */
INLINE void add_product(float *sums, int fresh, const bf16 *a, int64_t steps, const bf16 *b, int64_t more, const bf16 *panel) {
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(2, sums + 512, 64);
        _tile_loadd(3, sums + 768, 64);
    }
    for (int part = 0; part < 2; part++, a = b, steps = more)
        for (int64_t step = 0; step < steps; step++, a += STEP_SIZE, panel += STEP_SIZE) {
            _tile_loadd(4, a, 64);
            _tile_loadd(6, panel, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, panel + TILE_SIZE, 64);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + TILE_SIZE, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}
#endif
