"""Low-rank adapters of frozen linear layers: the adapter layer, the choice of layers, and the
optimizer."""
