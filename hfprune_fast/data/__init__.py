"""Text and token ids as checked token batches."""
