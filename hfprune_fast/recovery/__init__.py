"""A pruned model trained to give the dense model's output: KL, in little memory."""
