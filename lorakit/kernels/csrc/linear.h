/* Definitions shared by the two kernels of LoRA linear layers, by AMX (linear_tiles.c) and by
   vectors (linear.c): their arguments. */

#pragma once
#include "common.h"

enum { MOST_LAYERS = 8 };

/* The caller's arguments, in the order of `LinearCall` in products.py. Strides count elements. The
   tensors have the kernel's type. */
typedef struct {
    int64_t tokens, in, out, components, layers, threads;
    int64_t x_stride, y_stride; /* token strides; y_stride: of y or its gradient */
    int64_t weight_stride, weight_is_transposed; /* W [out, in], or transposed, [in, out] */
    const void *weight, *bias, *mask; /* bias [out], mask [tokens, components], or NULL */
    int64_t ranks[MOST_LAYERS], outs[MOST_LAYERS];
    const float *a[MOST_LAYERS], *b[MOST_LAYERS]; /* [rank, in], [out, rank] */
    const float *gates[MOST_LAYERS];              /* [rank], factors of the rows of A, or NULL */
    double scales[MOST_LAYERS];
} LinearCall;

/* The layer of a component, whose number becomes the one within the layer; `layers` for a component
   beyond the last. */
INLINE int64_t layer_of(const LinearCall *p, int64_t *component) {
    int64_t layer = 0;
    while (layer < p->layers && *component >= p->ranks[layer])
        *component -= p->ranks[layer++];
    return layer;
}
