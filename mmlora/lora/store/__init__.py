"""Adapters on the host: the cache, the registry file, and their life cycle."""
