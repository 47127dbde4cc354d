"""Runs a model layer by layer, within the free memory."""
