"""A model folder on disk: opened, read without trust, loaded and written."""
