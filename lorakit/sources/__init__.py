"""Sources of models and data sets: a local folder, the hub, its cache, or a builtin."""
