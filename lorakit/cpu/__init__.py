"""The fast path of processors: ways to compute a loaded model faster, each verified on that model
before it is used."""
