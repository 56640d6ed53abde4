"""Recipes: YAML that remembers where each key stands, an explanation of every mistake, and the
Recipe."""
