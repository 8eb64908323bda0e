"""Checkpoints whose files differ from those that `transformers` writes for the class that serves them."""
