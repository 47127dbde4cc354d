"""ImportanceTable: every statistic of every neuron, with where it came from; save and load.

The scores file is a safetensors file, so any tool can read it. Layout, version 1:

    tensors   l1, l2, mask, act    (L, F) float64   sums over the calibration (kernels/taylor)
              down_norm            (L, F) float64   2-norm of each neuron's down_proj column
    metadata  hfprune_scores: JSON with
              format_version       1
              model                the fields of ModelSize
              provenance           model fingerprint, data hash, samples, tokens, seed, versions

Row l, column j of a tensor is neuron j of layer l.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hfprune_fast.architectures import ModelSize
from hfprune_fast.errors import ArgumentError, ScoresFileError, one_line
from hfprune_fast.output import write_whole

STATISTICS = ("l1", "l2", "mask", "act")
_TENSORS = (*STATISTICS, "down_norm")
_FORMAT = "hfprune_scores"
_VERSION = 1


@dataclass(frozen=True, eq=False)  # tensors have no single truth of equality
class ImportanceTable:
    """Statistics of all neurons, (L, F) float64 each; the model's size; the scores' provenance."""

    l1: Tensor
    l2: Tensor
    mask: Tensor
    act: Tensor
    down_norm: Tensor
    model: ModelSize
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        shape = (self.model.num_layers, self.model.intermediate_size)
        for name in _TENSORS:
            tensor = getattr(self, name)
            if tensor.shape != shape or tensor.dtype != torch.float64:
                raise ScoresFileError(
                    f"{name} must be {shape} float64, got {tuple(tensor.shape)} {tensor.dtype}"
                )
            if not bool(tensor.isfinite().all()) or bool((tensor < 0).any()):
                raise ScoresFileError(f"{name} holds NaN, inf or negative numbers")

    def importance(self, statistic: str = "l1") -> Tensor:
        """Return the (L, F) float64 importance by one statistic; higher = keep.

        `l1`, `l2` and `mask` are the sums themselves. `act` is sqrt(Σa²) times the norm of the
        neuron's down_proj column: how much of the MLP's output goes through it.
        """
        if statistic not in STATISTICS:
            raise ArgumentError(
                f"statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}"
            )
        if statistic == "act":
            return self.act.sqrt() * self.down_norm
        table: Tensor = getattr(self, statistic)
        return table

    def save(self, file: str | Path) -> None:
        """Write the scores file; it appears under its name only when whole."""
        header = {
            "format_version": _VERSION,
            "model": asdict(self.model),
            "provenance": self.provenance,
        }
        # One key, because safetensors writes several in an order that changes from run to run.
        metadata = {_FORMAT: json.dumps(header)}
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        write_whole(Path(file), save(tensors, metadata))

    @classmethod
    def load(cls, file: str | Path) -> ImportanceTable:
        """Read a scores file; ScoresFileError says what is wrong with it."""
        path = Path(file)
        if not path.is_file():
            raise ScoresFileError(f"no scores file {path}; make one with `hfprune score`")
        try:
            with safe_open(path, framework="pt") as tensors:
                metadata = tensors.metadata() or {}
                if _FORMAT not in metadata:
                    raise ScoresFileError(
                        f"{path} is a safetensors file but holds no scores; "
                        "expected one written by `hfprune score`"
                    )
                header = json.loads(metadata[_FORMAT])
                if header["format_version"] != _VERSION:
                    raise ScoresFileError(
                        f"{path} has scores of format version {header['format_version']}; "
                        f"this release reads version {_VERSION}"
                    )
                tables = {name: tensors.get_tensor(name) for name in _TENSORS}
            size = ModelSize(**{f.name: header["model"][f.name] for f in fields(ModelSize)})
            provenance = dict(header["provenance"])
        except ScoresFileError:
            raise
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ScoresFileError(
                f"{path} is not a scores file, or is damaged ({one_line(error)}); "
                "expected one written by `hfprune score`"
            ) from None
        return cls(**tables, model=size, provenance=provenance)
