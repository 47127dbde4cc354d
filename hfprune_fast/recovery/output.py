"""What a recovery writes: a checkpoint in the layout of the pruned one, or peft's adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.checkpoint.atomic import whole_folder
from hfprune_fast.checkpoint.ours import files_of, real
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.checkpoint.writer import write_json
from hfprune_fast.config import OutputOptions
from hfprune_fast.console import say
from hfprune_fast.models.families import NON_UNIFORM
from hfprune_fast.pruning.on_disk import RECORD, foreign_files, prune_checkpoint, read_record


def carried_record(pruned: ModelSource) -> dict[str, Any]:
    """Return what hfprune.json of a pruned model says that stays true; say if there is none."""
    if not (pruned.folder / RECORD).is_file():
        say(f"{pruned.name} has no {RECORD}: what was pruned is not known, and not in the card")
        return {}
    found = read_record(pruned.folder)
    kept = ("base_model", "achieved", "requested", "chosen", "provenance", "keep", "experts")
    return {name: found[name] for name in kept if name in found}


def write_recovered(
    pruned: ModelSource,
    out: Path,
    trained: Mapping[str, Tensor],
    recovery: Mapping[str, Any],
    output: OutputOptions,
    progress: bool,
) -> None:
    """Write a pruned checkpoint again, with some of its tensors replaced."""
    keep = {site: torch.arange(width) for site, width in pruned.spec.sites.items()}
    native = pruned.spec.mlp_widths is not None and not _is_custom(pruned)
    options: dict[str, Any] = {
        "layout": "native" if native and not pruned.spec.experts else "auto",
        "max_shard_size": output.max_shard_size,
        "verify": output.verify,
        "force": output.force,
    }
    record = {**carried_record(pruned), "recovery": dict(recovery)}
    prune_checkpoint(
        pruned, out, keep, replace=trained, record=record, progress=progress, **options
    )


def write_adapter(
    adapted: Any, pruned: ModelSource, out: Path, recovery: Mapping[str, Any], output: OutputOptions
) -> None:
    """Write adapters as peft loads them onto the pruned model."""
    target = real(out)
    with whole_folder(target, output.force, foreign_files) as partial:
        adapted.save_pretrained(partial)
        files = sorted(path.relative_to(partial).as_posix() for path in files_of(partial))
        record = {"base_model": pruned.name, "recovery": dict(recovery)}
        write_json(partial / RECORD, {**record, "files": [*files, RECORD]})


def _is_custom(source: ModelSource) -> bool:
    return str(source.config["model_type"]).startswith(NON_UNIFORM)
