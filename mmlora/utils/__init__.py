"""Helpers without knowledge of the engine."""
