/* Masks of sparse factors: which entries of each of many small matrices stay, and zeros where they
   do not. A mask is one byte an entry, 0 or 1. All whole numbers that an exported function takes
   are int64_t; `threads` share the matrices, and no result depends on how many they are. */

#include <omp.h>
#include <stddef.h>
#include <stdint.h>

enum {
    INFINITE = 0x7f800000,
    BITS = 31
}; /* a float32 that is not negative is ordered as its bits are, and these are 31 */

static int32_t count_from(const int32_t *keys, int64_t size, int32_t least) {
    int32_t count = 0;
    for (int64_t i = 0; i < size; i++)
        count += keys[i] >= least;
    return count;
}

/* Marks the `keep` largest scores, whatever their sign; of equal ones, those that come first.
 * Returns whether one is no number. */
static int choose(const int32_t *scores, const uint8_t *spared, const uint8_t *gone, uint8_t *mask,
    int32_t *keys, int64_t size, int64_t keep) {
    int32_t highest = 0;
    for (int64_t i = 0; i < size; i++) {
        int32_t score = scores[i] & INT32_MAX; /* without its sign: -0 is 0 */
        score = score < INFINITE + 1 ? score : INFINITE + 1; /* every NaN alike */
        keys[i] = spared && spared[i] ? INFINITE + 1 : gone[i] ? 0 : score + 1;
        highest = keys[i] > highest ? keys[i] : highest;
    }
    if (highest > INFINITE + 1)
        return 1;

    /* The keep-th highest key, bit by bit: counting is so fast that sorting, or a histogram, would
     * be slower. */
    int32_t least = 0;
    for (int bit = BITS - 1; bit >= 0; bit--) {
        int32_t higher = least | (int32_t)1 << bit, count = count_from(keys, size, higher);
        if (count >= keep)
            least = higher;
        if (count == keep) /* the bits that are left would move `least` between two keys */
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

/* masks[m][i] = 1 for the keeps[m] largest of scores[m], float32, whatever their sign. What is in
   gone[m] scores less than all else and gets a 0; what is in spared[m] (spared may be null) scores
   as much as infinity. keys: scratch of `longest`, the largest of the sizes, a thread. Returns
   whether a score is no number. */
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

/* tensors[m][i] becomes +0.0 where masks[m][i] is 0 (NaN if it was not finite). */
void zero_masked(float *const *tensors, const uint8_t *const *masks, const int64_t *sizes,
    int64_t count, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t m = 0; m < count; m++)
        for (int64_t i = 0; i < sizes[m]; i++)
            tensors[m][i] = tensors[m][i] * masks[m][i] + 0.0f; /* -0.0 + 0.0 is 0.0 */
}
