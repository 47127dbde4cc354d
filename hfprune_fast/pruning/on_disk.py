"""keep -> a smaller checkpoint, from disk to disk; `checkpoint/layouts.py` has its layouts.

gate_proj and up_proj lose rows (and bias entries), down_proj loses columns. Every other
tensor is copied byte for byte, so the dtype and all that is not MLP stay what they were.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hfprune_fast._version import __version__
from hfprune_fast.checkpoint.atomic import check_writable, whole_folder
from hfprune_fast.checkpoint.carried import carry
from hfprune_fast.checkpoint.folder import INDEX
from hfprune_fast.checkpoint.layouts import (
    check_layout,
    check_native,
    code_files,
    config_of,
    shipped_code,
)
from hfprune_fast.checkpoint.ours import check_not_read, files_of, real
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.checkpoint.source_card import CARD
from hfprune_fast.checkpoint.writer import Writing, write_json
from hfprune_fast.config import OutputOptions
from hfprune_fast.console import parse_bytes, say, to_path
from hfprune_fast.errors import CheckpointError, OutputError
from hfprune_fast.models.kept import kept_experts
from hfprune_fast.models.sites import check_keep
from hfprune_fast.options import keyword_options
from hfprune_fast.pruning.model_card import model_card
from hfprune_fast.pruning.record import RECORD, kept_record, read_record

_PREDICTS_FURTHER = re.compile(r"(^|\.)(mtp|nextn)[._]")  # layers for multi-token prediction
_MADE_ANEW = {"config.json", RECORD, CARD, INDEX}


@keyword_options(output=OutputOptions)
def prune_checkpoint(
    source: str | Path | ModelSource,
    out: str | Path,
    keep: Mapping[Any, Tensor],
    *,
    replace: Mapping[Any, Tensor] | None = None,
    record: Mapping[str, Any] | None = None,
    progress: bool = False,
    output: OutputOptions,
) -> dict[str, Any]:
    """Write the pruned copy of a checkpoint in one streaming pass; no model is built.

    Args:
        source: a model folder, hub name or `demo`; it is only read.
        out: the folder to make. It appears under this name only when whole.
        keep: {layer: sorted int64 indices}, every layer that has an MLP of its own; with experts
            also {(layer, expert): ...} of those that stay. All layers keep the same number of
            experts and all experts the same number of neurons, each its own.
        replace: {tensor name: tensor} written in place of what the cut leaves, of its shape (before
            padding) and dtype, such as a refitted down_proj; read in its turn, again to verify. Of
            a tensor that holds all experts of a layer, {(tensor name, number): tensor} is one
            expert's. Experts that stay are numbered anew, from 0, and named by their new numbers.
        record: added to hfprune.json: "requested", "provenance" and "fidelity", which the card
            shows too; what stands in place of what would be written, such as the "keep" of an
            earlier pruning.
        progress: show a bar on stderr.

    Returns:
        What was achieved: widths, parameters, ratios; of the model as written, padding included.

    Raises:
        OutputError: out exists, overlaps the source or cannot be written, or reads back otherwise.
        CheckpointError: the source is damaged, or its tensors are not those of its config.
        ArgumentError: keep, layout, replace or max_shard_size do not fit the model.
        NumericsError: a value that was to be written is NaN or infinite.

    Memory: a block of 256 KiB a thread (without the C++ extension a tensor a thread, padded two);
    the source is mapped, and its pages are released. What else belongs to a model is copied
    (`checkpoint.carried`); what is left out is said.
    """
    source, target = open_source(source), real(to_path(out, "out"))
    check_output_folder(target, source.folder, force=output.force)
    keep = check_keep(keep, source.spec.sites)
    spec = source.spec
    experts = kept_experts(keep, spec, source.family)
    widths = [len(keep.get(layer, ())) for layer in range(spec.num_layers)]
    uniform = len(set(widths)) == 1 or experts is not None
    layout = "uniform" if uniform else output.layout.replace("auto", "custom")
    if experts is not None and output.layout != "auto":
        check_layout(source.config, output.layout)
    if layout == "native":
        check_native(source.config, widths)
    size = output.max_shard_size
    shard_bytes = None if size is None else parse_bytes(size, "max_shard_size")
    pad_to = max(widths) if layout == "padded" else 0
    writing = Writing(source, keep, replace or {}, shard_bytes, pad_to=pad_to)
    sizes = None if experts is None else (experts.count, experts.width)
    achieved = spec.pruned_to(max(widths) if pad_to else widths, sizes)
    if layout != "uniform":
        achieved |= {"layout": layout, "mlp_widths": widths}
    full_record = {
        "hfprune_fast": __version__,
        "base_model": source.name,
        "achieved": achieved,
        **(record or {}),
    }
    with whole_folder(target, output.force, foreign_files) as partial:
        write_json(partial / "config.json", config_of(source.config, widths, layout, experts))
        writing.write(partial, progress)
        card = model_card(full_record, source.card)
        (partial / CARD).write_text(card, encoding="utf-8")
        made_anew = {*_MADE_ANEW, *source.shards, *code_files(source.config)}
        left_out = carry(source.folder, partial, made_anew)
        for name, code in shipped_code(layout).items():
            shutil.copyfile(code, partial / name)
        files = sorted(_files_in(partial) | {RECORD})
        kept = kept_record(source, keep)
        write_json(partial / RECORD, {**kept, **full_record, "files": files}, indent=None)
        if output.verify:
            writing.verify(partial, progress)
    beside = [n for n in source.tensors if _PREDICTS_FURTHER.search(n) or source.is_beyond(n)]
    if beside:
        say(
            f"{beside[0]} and {len(beside) - 1} more are copied, as transformers ignores them: a "
            "server that predicts further tokens by them (mtp) may not take them beside narrower "
            "layers"
        )
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        say(f"not copied, no part of the model: {', '.join(left_out[:3])}{more}")
    return achieved


def check_output_folder(out: Path, source: Path, *, force: bool, needed_bytes: int = 0) -> None:
    """Refuse an output that would overwrite other files or has no room, before any work is done."""
    target = real(out)
    check_not_read([out], [source])
    if os.path.lexists(target) and not target.is_dir():
        raise OutputError(f"out {out} is a file; expected a folder that does not exist")
    if target == Path.cwd() or target in Path.cwd().parents or target.is_mount():
        raise OutputError(f"out {out} is the current folder or a mount point; name one below it")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise OutputError(f"out {out} exists and is not empty; --force replaces it")
        others = foreign_files(out)
        if others:
            raise OutputError(
                f"out {out} holds {others[0]}, which hfprune did not write; --force replaces "
                f"only what its {RECORD} lists"
            )
    check_writable(out, needed_bytes)


def foreign_files(out: Path) -> list[str]:
    """Return what is in an earlier output, at any depth, but not in the list of its record."""
    try:
        written = set(read_record(out)["files"])
    except (CheckpointError, KeyError, TypeError):
        written = set()
    return sorted(_files_in(out) - written)


def _files_in(folder: Path) -> set[str]:
    """Return the relative paths of all files and links in a folder, at any depth."""
    return {path.relative_to(folder).as_posix() for path in files_of(folder)}
