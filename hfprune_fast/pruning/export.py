"""A pruned checkpoint in another form, from disk to disk; no model is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hfprune_fast.checkpoint import gguf_converter, gguf_file
from hfprune_fast.checkpoint.atomic import check_file, whole_file
from hfprune_fast.checkpoint.layouts import check_layout
from hfprune_fast.checkpoint.ours import begins_with, check_not_read, real
from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.console import say
from hfprune_fast.errors import ArgumentError, printable
from hfprune_fast.pruning.on_disk import prune_checkpoint
from hfprune_fast.pruning.record import RECORD, carried_record, facts_of

_CONVERTER = "convert_hf_to_gguf.py"
_GET_CONVERTER = (
    "git clone --depth 1 https://github.com/ggml-org/llama.cpp, pip install sentencepiece, and "
    "give --converter llama.cpp"
)


def export(
    model: str | Path, to: str, out: Path, *, converter: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Write a pruned model in another form.

    Args:
        model: the folder of a pruned model; for gguf also a .gguf file of a padded one.
        to: "custom", "padded", "decilm" or "gguf".
        out: the folder to make, or the .gguf file.
        converter: llama.cpp's convert_hf_to_gguf.py or the folder it is in, for gguf from a folder;
            None looks for it on the PATH.
        force: replace an earlier output.

    Returns:
        `out`, `to`, and the width of each layer.
    """
    if to == "gguf":
        widths = _export_gguf(Path(model), out, converter, force)
    else:
        widths = _export_layout(open_source(model), to, out, force)
    return {"out": str(out), "to": to, "mlp_widths": widths}


def _export_layout(source: ModelSource, to: str, out: Path, force: bool) -> list[int]:
    widths = _true_widths(source)
    if source.spec.experts:
        raise ArgumentError(
            f"{source.name} has experts, and all of its layers are of one size: it is a plain "
            "checkpoint, which loads wherever its family does"
        )
    if len(set(widths)) == 1:
        raise ArgumentError(
            f"all layers of {source.name} have {widths[0]} MLP neurons: it is a plain checkpoint, "
            "which loads wherever its family does"
        )
    keep = {layer: torch.arange(width) for layer, width in enumerate(widths)}
    check_layout(source.config, to)
    record = _record(source, widths, to)
    prune_checkpoint(source, out, keep, layout=to, force=force, record=record, verify=True)
    return widths


def _true_widths(source: ModelSource) -> list[int]:
    """Return the width of each layer without padding."""
    widths = list(source.spec.widths)
    if len(set(widths)) == 1 and not source.spec.experts:
        widths = [_used(source.read(source.down_proj(layer))) for layer in range(len(widths))]
    return widths


def _used(down: Tensor) -> int:
    """Return how many columns there are up to the last that is not zero; one at least."""
    used = down.any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def _record(source: ModelSource, widths: list[int], layout: str) -> dict[str, Any]:
    """Return the record of the pruning, with the sizes of the model in its new form."""
    sizes = source.spec.pruned_to(max(widths) if layout == "padded" else widths)
    now = {"params": sizes["params"], "layout": layout, "mlp_widths": widths}
    record, facts = carried_record(source, "fidelity"), facts_of(source.folder)
    if facts is None:
        now |= {"dense_params": sizes["params"], "param_ratio": 0.0, "prune_ratio": 0.0}
        return {"achieved": {**sizes, **now, "dense_mlp_widths": widths}}
    now["param_ratio"] = 1 - sizes["params"] / facts.dense_params
    record["achieved"] = {**record["achieved"], **now}
    return record


def _export_gguf(model: Path, out: Path, converter: Path | None, force: bool) -> list[int]:
    gguf_file.package()
    _check_gguf_output(out, force)
    out = real(out)
    if model.suffix == ".gguf":
        if not model.is_file():
            raise ArgumentError(f"there is no file {model}")
        check_not_read([out], [model])
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out, _is_gguf) as partial:
            return gguf_file.narrow(model, partial)
    source = open_source(model)
    check_not_read([out], [source.folder])
    widths = _true_widths(source)
    uneven = len(set(widths)) > 1 and not source.spec.experts
    if not uneven and not (source.folder / RECORD).is_file():
        raise ArgumentError(
            f"{source.name} was not pruned: llama.cpp's {_CONVERTER} takes it as it is"
        )
    converter = _find_converter(converter)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".hfprune-", dir=out.parent) as scratch:
        folder, padded = source.folder.resolve(), Path(scratch) / "padded.gguf"
        if uneven and source.spec.mlp_widths is not None:
            folder = Path(scratch) / "padded"
            _export_layout(source, "padded", folder, force=False)
        _convert(converter, folder, padded)
        with whole_file(out, _is_gguf) as partial:
            known = source.spec.model_type in gguf_file.TRIED and source.family.tower is None
            if uneven and not (known and gguf_file.target_of_file(padded)):
                say(
                    f"llama.cpp has no form of {source.spec.model_type} with a width for each "
                    "layer; the file is padded to the widest"
                )
                widths = [max(widths)] * len(widths)
            elif uneven:
                return gguf_file.narrow(padded, partial)
            padded.replace(partial)
    return widths


def _check_gguf_output(out: Path, force: bool) -> None:
    if out.suffix != ".gguf":
        raise ArgumentError(f"out {out} must be a file that ends with .gguf")
    check_file(out, "out", "a GGUF file", _is_gguf, force=force)


def _is_gguf(path: Path) -> bool:
    return begins_with(path, b"GGUF")


def _find_converter(given: Path | None) -> Path:
    """Return the path of llama.cpp's converter."""
    on_path = shutil.which(_CONVERTER)
    converter = given or (Path(on_path) if on_path else None)
    if converter is not None and converter.is_dir():
        converter /= _CONVERTER
    if converter is None or not converter.is_file():
        what = f"no file {converter}" if converter else f"no {_CONVERTER} on the PATH"
        raise ArgumentError(f"{what}; {_GET_CONVERTER}")
    return converter


def _convert(converter: Path, folder: Path, out: Path) -> None:
    """Run llama.cpp's converter."""
    # As a file, so that nothing of this package is imported; -P keeps its folder off the path.
    command = [sys.executable, "-P", gguf_converter.__file__]
    command += [str(converter), str(folder), "--outfile", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise ArgumentError(
            f"{converter} failed: {printable(lines[-1])[:300]}; to see all that it says, export "
            "--to padded and run it on that"
        )
    if not _is_gguf(out):
        raise ArgumentError(f"{converter} wrote no GGUF file")
