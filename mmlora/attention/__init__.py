"""Paged attention: the KV cache, the metadata of a forward, and the backends."""
