"""lorakit: fine-tunes language models with low-rank adapters whose capacity adapts."""

import os

# Threads that wait for the next parallel region sleep instead of spinning. On a machine that has anything else to do, a
# spinning thread holds the core that the slowest one is waiting for: measured on two cores with one busy neighbour, 1.3
# s a step against 0.3 s. Read when torch loads OpenMP, so it is set before anything imports torch. Commands that train let
# threads spin after all where nothing else runs (lorakit.cli._common).
THREADS_AS_TOLD = bool(os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"})  # by whoever started Python
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
