/* Definitions that every kernel uses. */

#pragma once
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

/* Defines a function that returns the size of a structure, for the caller to compare with its own.
   */
#define SIZE_OF(structure) \
    int64_t size_of_##structure(void) { return sizeof(structure); }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* n rounded up to a multiple of `step`. */
INLINE int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* Memory that starts with a cache line; NULL if there is none. Freed by `free`. */
INLINE void *aligned_memory(int64_t bytes) { return aligned_alloc(64, rounded_up(bytes + 1, 64)); }
