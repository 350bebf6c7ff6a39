"""Plugins: finding, importing and validating them, and calling their hooks."""
