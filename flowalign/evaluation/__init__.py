"""Measuring a model on held-out prompts: scores, the paired gain over the base, and the file that holds a result."""
