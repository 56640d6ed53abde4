"""Base models: loading, task heads, and the loss of a batch."""
