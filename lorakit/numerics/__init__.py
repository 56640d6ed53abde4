"""Pure functions: schedules, rank budgets, sparsity, low-rank factorisation."""
