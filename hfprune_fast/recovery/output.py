"""What a recovery writes: a checkpoint in the layout of the pruned one, or peft's adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.checkpoint.atomic import whole_folder
from hfprune_fast.checkpoint.ours import files_of, real
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.checkpoint.source_card import CARD
from hfprune_fast.checkpoint.writer import write_json
from hfprune_fast.config import OutputOptions
from hfprune_fast.models.families import NON_UNIFORM
from hfprune_fast.pruning.model_card import escaped, made_rows, training_text
from hfprune_fast.pruning.on_disk import foreign_files, prune_checkpoint
from hfprune_fast.pruning.record import RECORD, carried_record
from hfprune_fast.recovery.adapters import ADAPTER


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
    record = carried_record(pruned)
    before = {"before": record["recovery"]} if "recovery" in record else {}
    record["recovery"] = {**recovery, **before}
    prune_checkpoint(
        pruned, out, keep, replace=trained, record=record, progress=progress, **options
    )


def write_adapter(
    adapted: Any, pruned: ModelSource, out: Path, recovery: Mapping[str, Any], output: OutputOptions
) -> None:
    """Write adapters as peft loads them onto the pruned model."""
    record = {"base_model": pruned.name, "recovery": dict(recovery)}
    of_hub = "/" in pruned.name  # a folder is named by its last part
    adapted.peft_config[ADAPTER].base_model_name_or_path = (
        pruned.name if of_hub else str(pruned.folder.resolve())
    )
    with whole_folder(real(out), output.force, foreign_files) as partial:
        adapted.save_pretrained(partial)
        (partial / CARD).write_text(_adapter_card(record, of_hub), encoding="utf-8")
        files = sorted(path.relative_to(partial).as_posix() for path in files_of(partial))
        write_json(partial / RECORD, {**record, "files": [*files, RECORD]})


def _adapter_card(record: Mapping[str, Any], of_hub: bool) -> str:
    """Return README.md of adapters, in place of the form that peft leaves to be filled in."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in made_rows(record, escaped))
    name = escaped(record["base_model"])
    base_model = f"base_model: {json.dumps(record['base_model'])}\n" if of_hub else ""
    return f"""---
library_name: peft
pipeline_tag: text-generation
tags: [lora, hfprune]
{base_model}---

# Adapters for {name}

They are for {name}, a pruned model. {training_text(record)} Load them onto
it with `peft.PeftModel.from_pretrained`.

| | |
|---|---|
{rows}
"""


def _is_custom(source: ModelSource) -> bool:
    return str(source.config["model_type"]).startswith(NON_UNIFORM)
