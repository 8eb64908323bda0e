"""Processors of model families that the general one does not fit."""
