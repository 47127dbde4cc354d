"""How faithful a pruned model is."""
