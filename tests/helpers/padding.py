"""Sequences of several lengths in one batch."""

import torch


def padded(rows: list[torch.Tensor], side: str, filler: int = 0) -> dict[str, torch.Tensor]:
    """The mapping that a tokenizer makes of sequences."""
    ids = torch.full((len(rows), max(map(len, rows))), filler)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(len(row)) if side == "right" else slice(-len(row), None)
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}
