"""Kernels: the operations whose speed matters, each held against its plain twin in the tests."""
