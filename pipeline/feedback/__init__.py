"""Comparisons: responses sampled and ranked."""
