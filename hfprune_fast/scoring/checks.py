"""What is refused before scoring: a table of another model, and the state of another run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.errors import ResumeError, ScoresFileError
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.scoring.passes import column_norms
from hfprune_fast.scoring.table import ImportanceTable

# A table read from a file of version 2 does not know the others.
_COMPARED = [f.name for f in fields(ModelSpec) if f.name not in ("vocab_size", "attention_width")]


def state_of(out: Path) -> Path:
    """Return the file that saves the state of scoring for an output."""
    return out.with_name(f"{out.name}.state")


def check_state(out: Path, *, resume: bool, force: bool) -> None:
    """Refuse to run over what an interrupted run has left; `force` deletes it."""
    left = state_of(out)
    if not resume and force:
        left.unlink(missing_ok=True)
    elif not resume and left.exists():
        raise ResumeError(
            f"an interrupted run has left {left}; --resume continues it, --force discards it"
        )


def check_table(table: ImportanceTable, source: ModelSource) -> None:
    """Refuse a table that was scored on another model."""
    differing = [
        f"{key} {theirs}, not {ours}"
        for key in _COMPARED
        if (theirs := getattr(table.model, key)) != (ours := getattr(source.spec, key))
    ]
    if differing:
        raise ScoresFileError(
            f"the scores are of another model than {source.name}: {'; '.join(differing)}"
        )
    scored = table.provenance.get("model_fingerprint")
    same = scored == source.fingerprint
    if scored is None:
        # Scored in memory, perhaps in another dtype, which moves a norm by its rounding at most.
        norms = column_norms(source.read(source.down_proj(source.spec.num_layers - 1)))
        same = torch.allclose(norms, table.down_norm[-1, : len(norms)], rtol=2**-8)
    if not same:
        raise ScoresFileError(
            f"the scores are of another model than {source.name}: same shape, other weights "
            f"(they are of {table.provenance.get('model', 'a model in memory')})"
        )
