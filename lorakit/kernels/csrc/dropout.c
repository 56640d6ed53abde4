/* Dropout, forward and backward: see vectors.h. */

#include "dropout.h"

/* Rows have `length` elements; the last may be shorter. */
void dropout(const void *x, void *y, int64_t count, int64_t length, uint64_t seed, int64_t dropped,
             float scale, int64_t bf16, int64_t threads) {
    Dropout how = {seed, dropped, scale};
#pragma omp parallel for schedule(static) num_threads(threads) if (count > PARALLEL)
    for (int64_t row = 0; row < (count + length - 1) / length; row++)
        BY_TYPE(dropout_row, x, NULL, y, how, row, row * length, least((row + 1) * length, count));
}
