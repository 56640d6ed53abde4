"""lorakit: fine-tunes language models with low-rank adapters whose capacity adapts."""

__version__ = "0.1.0"
