"""Kernels: operations whose speed matters. Tests compare each with a plain implementation in
torch."""
