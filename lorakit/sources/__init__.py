"""Where a model or a data set comes from: a local folder, the hub, its cache, or a builtin."""
