/* Products of 32 rows and a panel by AMX. Sums [32 × 32] are stored as four consecutive tiles (top
   left, top right, bottom left, bottom right), so that loads and stores cover whole consecutive
   cache lines. */

#pragma once
#include "amx.h"

#ifdef HAVE_AMX
INLINE int64_t rounded(int64_t count) { return rounded_up(count, STEP); }

/* The offset of row `row` of sums: 16 of its columns start here, the other 16 are 256 further on.
   */
INLINE int64_t row_of_sums(int64_t row) { return row / TILE * 512 + row % TILE * TILE; }

INLINE void load_sums(const float *sums, int fresh) {
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
}

/* Adds the product of `steps` steps of a, `size` elements apart, and of a panel. Rows of a step are
   `stride` apart. A block of rows is multiplied by one panel after another, so panels are loaded
   with a hint that they are not needed again soon; otherwise they would evict the rows from the L1
   cache. */
INLINE void add_steps(
    const bf16 *a, int64_t stride, int64_t size, int64_t steps, const bf16 *panel) {
    for (int64_t step = 0; step < steps; step++, a += size, panel += STEP_SIZE) {
        _tile_loadd(4, a, stride * 2);
        _tile_stream_loadd(6, panel, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stream_loadd(7, panel + TILE_SIZE, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + TILE * stride, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

INLINE void store_sums(float *sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
}
#endif
