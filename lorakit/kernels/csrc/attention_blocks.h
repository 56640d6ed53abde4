/* Parts of attention by AMX (attention_tiles.c): blocks of 32 × 32 as operands of products, the
   mask of a block's weights, and a row of tokens. */

#pragma once
#include "attention.h"

#include "amx.h"

#ifdef HAVE_AMX

enum { BLOCK = 32, CHUNK = 8, FORWARD = 16 }; /* BLOCK in tokens, the others in blocks */

/* out [32 × 32] = a · b, or out + a · b with `add`, over `steps` blocks of each; with few_rows or
   few_columns only the first 16 rows or columns. */
INLINE void multiply(float *out, const bf16 *a, const bf16 *b, int64_t steps, int add, int few_rows,
    int few_columns) {
    written();
    if (add) {
        _tile_loadd(0, out, 128);
        _tile_loadd(1, out + TILE, 128);
        _tile_loadd(2, out + TILE * BLOCK, 128);
        _tile_loadd(3, out + TILE * BLOCK + TILE, 128);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; step++, a += STEP_SIZE, b += STEP_SIZE) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (!few_columns) {
            _tile_loadd(7, b + TILE_SIZE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (!few_rows) {
            _tile_loadd(5, a + TILE_SIZE, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (!few_columns)
                _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out, 128);
    if (!few_columns)
        _tile_stored(1, out + TILE, 128);
    if (!few_rows) {
        _tile_stored(2, out + TILE * BLOCK, 128);
        if (!few_columns)
            _tile_stored(3, out + TILE * BLOCK + TILE, 128);
    }
}

/* Copies a left operand: 32 rows x[i * stride + ·], with zeros for missing rows; all bits are xored
   with `flip`. */
INLINE void copy_block(bf16 *out, const bf16 *x, int64_t stride, int64_t rows, __m512i flip) {
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK; i++)
        _mm512_store_si512(out + i * 32,
            i < rows ? _mm512_xor_si512(_mm512_loadu_si512(x + i * stride), flip)
                     : _mm512_setzero_si512());
}

/* Copies the transpose of such a block, also as a left operand. */
INLINE void transpose_block(bf16 *out, const bf16 *x, int64_t stride, int64_t rows) {
    pack_rows(out, x, stride, rows, BLOCK);
    for (int half = 0; half < 2; half++, out += TILE_SIZE) {
        __m512i square[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            square[i] = _mm512_load_si512(out + 32 * i);
        transpose_words(square);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            _mm512_store_si512(out + 32 * i, square[i]);
    }
}

/* Packs a right operand: the transpose of 32 rows of x. */
INLINE void pack_block(bf16 *out, const bf16 *x, int64_t stride, int64_t rows) {
    pack_columns(out, x, stride, rows);
    if (rows > TILE)
        pack_columns(out + TILE_SIZE, x + TILE * stride, stride, rows - TILE);
}

/* Writes the transpose of x [32 × 32], each row times its lane of `factors`, to `rows` rows y[row *
   stride + ·] of 32 columns. */
INLINE void write_transpose(
    bf16 *y, int64_t stride, int64_t rows, const float *x, const __m512 *factors) {
    const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
        24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int half = 0; half * TILE < rows; half++, x += TILE, y += TILE * stride) {
        __m512i square[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) {
            __m512 low = _mm512_load_ps(x + 2 * i * BLOCK) * factors[half],
                   high = _mm512_load_ps(x + (2 * i + 1) * BLOCK) * factors[half];
            square[i] = _mm512_permutexvar_epi16(pairs, narrowed_32(low, high));
        }
        transpose_words(square);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if (half * TILE + i < rows)
                _mm512_storeu_si512(y + i * stride, square[i]);
    }
}

/* Writes x [32 × 32] times `factor` to `rows` rows y[row * stride + ·] of 32 columns. */
INLINE void write_block(bf16 *y, int64_t stride, int64_t rows, const float *x, float factor) {
    for (int64_t i = 0; i < rows; i++, x += BLOCK, y += stride)
        _mm512_storeu_si512(
            y, narrowed_32(_mm512_load_ps(x) * factor, _mm512_load_ps(x + TILE) * factor));
}

/* log2(x) for x > 0: its exponent and, for m in [1, 2), log2(m) = 1/2 + 2 / ln(2) artanh((m - √2) /
 * (m + √2)). */
INLINE __m512 logarithm_of_two(__m512 x) {
    __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero),
           root = _mm512_set1_ps(1.41421356f);
    __m512 t = (m - root) / (m + root), square = t * t;
    __m512 y = square * (2.885390082f / 9) + 2.885390082f / 7;
    y = y * square + 2.885390082f / 5;
    y = y * square + 2.885390082f / 3;
    y = y * square + 2.885390082f;
    return _mm512_getexp_ps(x) + 0.5f + y * t;
}

/* A mask of sixteen queries: those whose weight for a key dropout keeps. */
INLINE __mmask16 kept(int64_t key, __m512i query_hashes, uint32_t threshold) {
    Words hash = weight_hash((Words){} + (uint32_t)key, (Words)query_hashes);
    return _mm512_cmpge_epu32_mask((__m512i)hash, _mm512_set1_epi32((int32_t)threshold));
}

/* A mask of one half of 32 queries: those that see key number `key` of a block on the diagonal. */
INLINE __mmask16 seeing(int diagonal, int64_t key, int half) {
    return diagonal ? (__mmask16)(~0u << key >> half * TILE) : 0xffff;
}

/* Zeroes keys of a step of a panel from number `keys` on; if that key is interleaved with a real
   one, from the next. */
INLINE void clear_keys(bf16 *step, int64_t keys) {
    for (int64_t k = (keys + 1) / 2 * 2; k < BLOCK; k += 2) {
        _mm512_store_si512(step + k * TILE, _mm512_setzero_si512());
        _mm512_store_si512(step + k * TILE + TILE_SIZE, _mm512_setzero_si512());
    }
}

/* A row, and values that its tasks share. */
typedef struct {
    int64_t first, tokens, blocks; /* blocks: number of blocks of 32 tokens, rounded up */
    int64_t width, blocks_wide, head, causal;
    float scale; /* makes scores exponents of two; its sign is in the keys */
    __m512i flip;
    uint32_t threshold;
} Row;

static Row row_of(const AttentionCall *p, int64_t number) {
    int64_t first = p->firsts[number], tokens = p->firsts[number + 1] - first;
    Row row = {.first = first,
        .tokens = tokens,
        .blocks = (tokens + BLOCK - 1) / BLOCK,
        .width = p->width,
        .blocks_wide = p->width / BLOCK};
    row.causal = p->causal, row.threshold = threshold_of(p);
    row.scale = (float)((p->scaling < 0 ? -p->scaling : p->scaling) * 1.4426950408889634);
    row.flip = _mm512_set1_epi16(p->scaling < 0 ? (int16_t)0x8000 : 0);
    return row;
}

/* The number of tokens in the block, at most 32. */
INLINE int64_t tokens_of(const Row *row, int64_t block) {
    return least(row->tokens - block * BLOCK, BLOCK);
}

/* Computes the hashes of the block's 32 queries. */
static void hash_queries(
    uint32_t *hashes, const AttentionCall *p, const Row *row, int64_t block, int64_t head) {
    for (int i = 0; i < BLOCK; i++)
        hashes[i] = query_hash(p, row->first + block * BLOCK + i, head);
}

/* Takes a part of the memory from `*next` on, aligned to a cache line. If `*next` starts as NULL,
   it only counts bytes. */
INLINE void *part_of(char **next, int64_t bytes) {
    void *part = *next;
    *next += (bytes + 63) / 64 * 64;
    return part;
}

#endif
