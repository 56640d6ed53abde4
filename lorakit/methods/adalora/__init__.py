"""AdaLoRA: rank allocation by importance."""
