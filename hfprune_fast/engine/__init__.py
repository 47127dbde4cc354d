"""Runs a model layer by layer, in the memory there is."""
