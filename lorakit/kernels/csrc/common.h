/* Definitions that every kernel uses. */

#pragma once
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))

/* Defines a function that returns the size of a structure, for the caller to compare with its own.
   */
#define SIZE_OF(structure) \
    int64_t size_of_##structure(void) { return sizeof(structure); }

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
