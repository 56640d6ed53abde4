"""Low-rank updates of frozen linear layers: the layer itself, which layers get one, and their
optimizer."""
