"""Recipes: YAML with places, every mistake explained, and the Recipe."""
