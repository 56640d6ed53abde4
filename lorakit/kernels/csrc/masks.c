/* Masks of sparse factors: choosing the entries that stay in each of many small matrices, and
   zeroing the others. A mask has one byte per entry, 0 or 1. All integer arguments of exported
   functions are int64_t. `threads` threads share the matrices; no result depends on their number.
   */

#include <omp.h>
#include <stddef.h>
#include <stdint.h>

enum {
    INFINITE = 0x7f800000,
    BITS = 31
}; /* non-negative float32 values are ordered like their bits, which are 31 */

static int32_t count_from(const int32_t *keys, int64_t size, int32_t least) {
    int32_t count = 0;
    for (int64_t i = 0; i < size; i++)
        count += keys[i] >= least;
    return count;
}

/* Marks the `keep` scores with the largest absolute values; of equal ones, the first. Returns 1 if
   a score is NaN. */
static int choose(const int32_t *scores, const uint8_t *spared, const uint8_t *gone, uint8_t *mask,
    int32_t *keys, int64_t size, int64_t keep) {
    int32_t highest = 0;
    for (int64_t i = 0; i < size; i++) {
        int32_t score = scores[i] & INT32_MAX; /* absolute value: -0 is 0 */
        score = score < INFINITE + 1 ? score : INFINITE + 1; /* one key for all NaNs */
        keys[i] = spared && spared[i] ? INFINITE + 1 : gone[i] ? 0 : score + 1;
        highest = keys[i] > highest ? keys[i] : highest;
    }
    if (highest > INFINITE + 1)
        return 1;

    /* Finds the keep-th highest key bit by bit: counting is so fast that sorting, or a histogram,
       would be slower. */
    int32_t least = 0;
    for (int bit = BITS - 1; bit >= 0; bit--) {
        int32_t higher = least | (int32_t)1 << bit, count = count_from(keys, size, higher);
        if (count >= keep)
            least = higher;
        if (count == keep) /* the remaining bits would only move `least` between two keys */
            break;
    }

    int64_t places = keep - count_from(keys, size, least + 1);
    for (int64_t i = 0; i < size; i++)
        mask[i] = keys[i] > least;
    for (int64_t i = 0; i < size && places > 0; i++)
        if (keys[i] == least) {
            mask[i] = 1;
            places--;
        }
    for (int64_t i = 0; i < size; i++)
        mask[i] &= !gone[i];
    return 0;
}

/* masks[m][i] = 1 for the keeps[m] largest absolute values of scores[m], float32. Entries in
   gone[m] score below all others and get 0; entries in spared[m] (spared may be NULL) score
   infinity. keys: scratch of `longest`, the largest of the sizes, for each thread. Returns 1 if a
   score is NaN. */
int64_t keep_strongest(const int32_t *const *scores, const uint8_t *const *spared,
    const uint8_t *const *gone, uint8_t *const *masks, const int64_t *sizes, const int64_t *keeps,
    int32_t *keys, int64_t count, int64_t longest, int64_t threads) {
    int unordered = 0;
#pragma omp parallel num_threads(threads)
    {
        int32_t *own = keys + longest * omp_get_thread_num();
#pragma omp for schedule(dynamic) reduction(| : unordered)
        for (int64_t m = 0; m < count; m++)
            unordered |= choose(
                scores[m], spared ? spared[m] : NULL, gone[m], masks[m], own, sizes[m], keeps[m]);
    }
    return unordered;
}

/* Sets tensors[m][i] to +0.0 where masks[m][i] is 0 (to NaN if it was not finite). */
void zero_masked(float *const *tensors, const uint8_t *const *masks, const int64_t *sizes,
    int64_t count, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < count; m++)
        for (int64_t i = 0; i < sizes[m]; i++)
            tensors[m][i] = tensors[m][i] * masks[m][i] + 0.0f; /* -0.0 + 0.0 is 0.0 */
}
