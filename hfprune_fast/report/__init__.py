"""The page with pictures of a pruned model: facts in, HTML out; nothing is run or measured here."""
