"""CPU fast path: faster ways to compute a loaded model, each verified on that model before it is
used."""
