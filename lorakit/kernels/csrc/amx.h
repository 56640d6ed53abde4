/* Products of bfloat16 matrices with float32 sums by AMX (Intel SDM vol. 1, chapter 18).

   A tile is 16 rows of 64 bytes. One instruction adds the product of a tile A [16 × 32] and a tile
   B [32 × 16], both bfloat16, to a tile C [16 × 16] of float32. The rows of A are plain rows in
   memory; B must be packed: its row i holds rows 2 i and 2 i + 1 of the matrix, interleaved. A
   panel is a packed matrix of 32 columns, with two consecutive tiles for every 32 rows (a step).

   Four tiles of C, two of A and two of B are in use, so every loaded tile is used twice. HAVE_AMX
   is defined if the compiler's target has the instructions. The process must first request
   permission to use AMX from the system (levels.py), or the system ends it. */

#pragma once
#include "common.h"
#include <string.h>

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && \
    defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAVE_AMX 1
#include <immintrin.h>

typedef uint16_t bf16;
enum {
    TILE = 16,
    STEP = 32,
    PANEL = 32,
    TILE_SIZE = 512,
    STEP_SIZE = 2 * TILE_SIZE
}; /* sizes in bf16 elements */

/* Configures eight tiles of full size. Each thread calls it before its first product, and
   `_tile_release()` after its last. */
INLINE void use_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++)
        config.row_bytes[i] = 64, config.rows[i] = TILE;
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

/* Compiler barrier between writing memory and loading it as a tile, since the compiler does not
   know that tile loads read memory. */
INLINE void written(void) { __asm__ volatile("" ::: "memory"); }

INLINE __mmask32 first_of_32(int64_t count) {
    return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
}
INLINE __mmask16 first_of_16(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
}

/* Indices that interleave the first 16 elements of two rows of 32; adding 16 gives those of the
   last 16. */
INLINE __m512i interleaved(void) {
    return _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38,
        6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
}

/* Packs one step of a panel from 32 rows x[i * stride + ·] of 32 columns; missing rows and columns
   become zero. */
INLINE void pack_rows(bf16 *out, const bf16 *x, int64_t stride, int64_t rows, int64_t columns) {
    const __m512i low = interleaved(), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __mmask32 mask = first_of_32(columns);
    for (int i = 0; i < TILE; i++) {
        __m512i first = _mm512_maskz_loadu_epi16(2 * i < rows ? mask : 0, x + 2 * i * stride);
        __m512i second =
            _mm512_maskz_loadu_epi16(2 * i + 1 < rows ? mask : 0, x + (2 * i + 1) * stride);
        _mm512_store_si512(out + 32 * i, _mm512_permutex2var_epi16(first, low, second));
        _mm512_store_si512(
            out + TILE_SIZE + 32 * i, _mm512_permutex2var_epi16(first, high, second));
    }
}

/* Transposes 16 × 16 words of four bytes in place. */
INLINE void transpose_words(__m512i *square) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(square[i], square[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(square[i], square[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            square[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            square[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    /* square[4 g + c], lane l: rows 4 g to 4 g + 3 of column 4 l + c */
    for (int c = 0; c < 4; c++) {
        __m512i a = _mm512_shuffle_i32x4(square[c], square[4 + c], 0x88),
                b = _mm512_shuffle_i32x4(square[8 + c], square[12 + c], 0x88);
        __m512i d = _mm512_shuffle_i32x4(square[c], square[4 + c], 0xdd),
                e = _mm512_shuffle_i32x4(square[8 + c], square[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(a, b, 0x88), t[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88), t[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
    }
    for (int i = 0; i < 16; i++)
        square[i] = t[i];
}

/* Packs one tile of a panel, 16 columns, from the rows x[column * stride + ·] of its transpose, 32
   elements each; missing columns become zero. */
INLINE void pack_columns(bf16 *out, const bf16 *x, int64_t stride, int64_t columns) {
    __m512i square[16];
    if (columns >= TILE) /* without a branch for each column */
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            _mm_prefetch(x + i * stride + 4 * STEP, _MM_HINT_T0),
                square[i] = _mm512_loadu_si512(x + i * stride);
    else
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            square[i] = i < columns ? _mm512_loadu_si512(x + i * stride) : _mm512_setzero_si512();
    transpose_words(square);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        _mm512_store_si512(out + 32 * i, square[i]);
}

/* out [32 × 32] in float32 = the product of 32 rows of a (16 with `half`), `stride` elements apart,
   and a panel of `steps` steps. */
INLINE void product(
    float *out, const bf16 *a, int64_t stride, int64_t steps, const bf16 *panel, int half) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    written();
    for (int64_t step = 0; step < steps; step++, a += STEP, panel += STEP_SIZE) {
        _tile_loadd(4, a, stride * 2);
        _tile_loadd(6, panel, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + TILE_SIZE, 64);
        _tile_dpbf16ps(1, 4, 7);
        if (!half) {
            _tile_loadd(5, a + TILE * stride, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, PANEL * 4);
    _tile_stored(1, out + TILE, PANEL * 4);
    if (!half) {
        _tile_stored(2, out + TILE * PANEL, PANEL * 4);
        _tile_stored(3, out + TILE * PANEL + TILE, PANEL * 4);
    }
}

INLINE __m512i narrowed_32(__m512 low, __m512 high) {
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
INLINE __m512 widened(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
INLINE __m512 widened_16(const bf16 *x) { return widened(_mm256_loadu_si256((const void *)x)); }

#endif
