"""Paged attention: the KV cache, what a forward needs to know of it, and the backends that read it."""
