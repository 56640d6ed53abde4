"""Chunkwise low-rank adaptation: a rank, a scale and a key-value cache policy for each chunk of a
sequence."""
