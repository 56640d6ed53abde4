"""The training loop, checkpoints, interrupts, and metrics."""
