"""From a model and token batches to the importance of every neuron."""
