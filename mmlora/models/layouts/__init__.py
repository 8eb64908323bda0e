"""Checkpoints that are not laid out as `transformers` writes the class that serves them."""
