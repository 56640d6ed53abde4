"""SALOR: sparsity-aware low-rank representation."""
