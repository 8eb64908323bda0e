"""Adapters over HTTP: what is served, runtime updates, and resolved names."""
