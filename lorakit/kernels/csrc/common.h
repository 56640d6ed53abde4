/* What every kernel needs. */

#pragma once
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* A function that gives the size of a structure, for the caller to compare with its own. */
#define SIZE_OF(structure) \
    int64_t size_of_##structure(void) { return sizeof(structure); }
