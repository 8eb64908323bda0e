"""Processors of model families that `GeneralProcessor` does not support."""
