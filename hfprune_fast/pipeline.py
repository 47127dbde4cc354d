"""The whole job on one screen: text and a model in, a scores file or a smaller checkpoint out."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hfprune_fast import (
    architectures,
    checkpoint,
    compaction,
    evaluation,
    loading,
    native,
    output,
    selection,
)
from hfprune_fast._version import __version__
from hfprune_fast.calibration import DEFAULT_SEQ_LEN, windows_for
from hfprune_fast.errors import ArgumentError, OutputError, ScoresFileError
from hfprune_fast.forward import as_batches
from hfprune_fast.importance import ImportanceTable
from hfprune_fast.kernels import TRITON_VERSION
from hfprune_fast.report import say
from hfprune_fast.scoring import backend_for, column_norms, score_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_SAMPLES = 128

Budget = float | int | None


def score(
    model_or_path: PreTrainedModel | str | Path,
    batches_or_source: Iterable[Any] | Tensor | NDArray[Any] | str | Path,
    *,
    samples: int | None = DEFAULT_SAMPLES,
    seq_len: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    backend: str | None = None,
    parity: bool = False,
    progress: bool = False,
) -> ImportanceTable:
    """Score every MLP neuron of a model by the entropy criterion (arXiv 2603.08083).

    Args:
        model_or_path: a loaded causal language model, or a folder, hub name or `demo`.
        batches_or_source: (B, T) integer token batches or one (N, T) tensor or array; or, for a
            model given by path, a calibration source as `calibration.token_windows` takes it.
        samples: sequences drawn from a source.
        seq_len: tokens a sequence; 1024, or the model's longest if that is less.
        seed: which documents and windows are drawn from a source.
        batch_size: sequences that run at once; the scores do not depend on it but for rounding.
        device, dtype: where and in what a model given by path runs, see `loading.load_model`.
        backend: "triton" or "torch"; by default what HFPRUNE_BACKEND says, else triton on a GPU and
            torch elsewhere.
        parity: round products and totals to the model's dtype, one sequence at a time, as the
            paper's code does: only for reproducing it, since bfloat16 totals lose most of their
            digits.
        progress: show a bar on stderr.

    Returns:
        The table of all statistics, (L, F) float64, from which any ratio can be selected.

    Raises:
        HFPruneError: bad input, one line; its subclasses say which kind.
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size must be at least 1, got {batch_size}")
    batches: Iterable[Any]
    provenance: dict[str, Any] = {"criterion": "entropy", "versions": _versions()}
    folder = None
    if isinstance(model_or_path, str | Path):
        folder = checkpoint.find_model(model_or_path)
        provenance["model"] = checkpoint.display_name(model_or_path)
        provenance["model_fingerprint"] = checkpoint.fingerprint(folder)
        # Refused now rather than after minutes of loading; float32 stands for what will be loaded.
        backend_for(torch.empty(0, device=loading.torch_device(device)), backend, parity)
    elif (device, dtype) != ("auto", "auto"):
        raise ArgumentError("device and dtype are those of the loaded model; move or cast it first")
    calibration: dict[str, Any] = {"source": "token batches"}
    if isinstance(batches_or_source, str | Path):
        if folder is None:
            raise ArgumentError(
                "a loaded model is scored over token batches; give the model by path to use text"
            )
        windows = windows_for(folder, batches_or_source, seq_len, samples, seed)
        batches = as_batches(windows, batch_size)
        calibration = {
            "source": checkpoint.display_name(batches_or_source),
            "seq_len": windows.shape[1],
            "seed": seed,
        }
    else:
        batches = as_batches(batches_or_source, batch_size)
    if folder is None:
        model: Any = model_or_path
    else:
        model = loading.load_model(folder, dtype=dtype, device=device)
    with _bar(batches, "scoring", progress) as shown:
        scored = score_batches(model, shown, backend=backend, parity=parity)
    provenance |= {
        "calibration": {**calibration, "data_sha256": scored.data_sha256},
        "dtype": str(model.dtype).removeprefix("torch."),
        "backend": scored.backend,
        "parity": parity,
        "samples": scored.samples,
        "tokens": scored.tokens,
        "entropy_nats": scored.entropy_nats,
    }
    return ImportanceTable(
        **scored.statistics._asdict(),
        down_norm=scored.down_norm,
        model=architectures.size_of(model),
        provenance=provenance,
    )


def check_score(model: str | Path, calibration: str | Path, out: Path, *, force: bool) -> None:
    """Raise what would spoil the end of `score`'s run, before any work."""
    folder, target = checkpoint.find_model(model).resolve(), out.resolve()
    source = Path(calibration).resolve()
    if folder in target.parents or target == source or source in target.parents:
        raise OutputError(
            f"out {out} is in the model folder or the calibration text, which are never written to"
        )
    if out.exists() and (not force or not out.is_file()):
        raise OutputError(f"out {out} exists; --force replaces a file, but no folder")
    output.check_writable(out)


def check_prune(
    model: str | Path, out: str | Path, *, round_to: int = 1, force: bool = False, **budget: Budget
) -> None:
    """Raise what `prune_to` would refuse of its model, output and budget, before any work."""
    folder = checkpoint.find_model(model)
    size = checkpoint.open_checkpoint(folder).size
    width = selection.target_width(size, round_to=round_to, **budget)  # type: ignore[arg-type]
    dense_bytes = sum(path.stat().st_size for path in checkpoint.weight_files(folder))
    needed_bytes = dense_bytes * size.params_at(width) // size.total_params
    compaction.check_output_folder(Path(out), folder, force=force, needed_bytes=needed_bytes)
    for leftover in output.leftovers(Path(out)):
        say(leftover)
    if native.WHY_NOT is not None:
        say(f"weights are moved by {native.description()}")


def prune_to(
    model: str | Path,
    out: str | Path,
    table: ImportanceTable,
    *,
    statistic: str = "l1",
    round_to: int = 1,
    max_shard_size: str | None = None,
    verify: bool = False,
    force: bool = False,
    progress: bool = False,
    **budget: Budget,
) -> dict[str, Any]:
    """Select by a table and write the pruned checkpoint; return what was achieved."""
    check_table(table, model)
    keep = selection.select(table, statistic=statistic, round_to=round_to, **budget)  # type: ignore[arg-type]
    asked = {name: value for name, value in budget.items() if value is not None}
    record = {
        "asked": {**asked, "statistic": statistic, "round_to": round_to},
        "provenance": table.provenance,
    }
    achieved = compaction.prune_checkpoint(
        model,
        out,
        keep,
        max_shard_size=max_shard_size,
        verify=verify,
        force=force,
        record=record,
        progress=progress,
    )
    return {"out": str(out), **achieved, "statistic": statistic, "verified": verify}


def check_table(table: ImportanceTable, model: str | Path) -> None:
    """Refuse a table that was scored on another model."""
    folder = checkpoint.find_model(model)
    opened = checkpoint.open_checkpoint(folder)
    size = opened.size
    theirs, ours = asdict(table.model), asdict(size)
    differing = [
        f"{key} {theirs[key]}, not {ours[key]}" for key in ours if theirs[key] != ours[key]
    ]
    if differing:
        raise ScoresFileError(
            f"the scores are of another model than {model}: {'; '.join(differing)}"
        )
    scored = table.provenance.get("model_fingerprint")
    if scored is not None:
        same = scored == checkpoint.fingerprint(folder)
    else:
        # Scored in memory, perhaps in another dtype, which moves a norm by its rounding at most.
        last = f".{size.num_layers - 1}.{opened.family.down}.weight"
        name = next(name for name in opened.tensors if name.endswith(last))
        down = opened.read(name)
        same = torch.allclose(column_norms(down), table.down_norm[-1], rtol=2**-8)
    if not same:
        raise ScoresFileError(
            f"the scores are of another model than {model}: same shape, other weights "
            f"(they are of {table.provenance.get('model', 'a model in memory')})"
        )


def evaluate_paths(
    dense: str | Path,
    pruned: str | Path,
    source: str | Path,
    *,
    seq_len: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = False,
) -> evaluation.Fidelity:
    """Load two checkpoints and compare them over a text; by default over all of it, in order."""
    if batch_size < 1:
        raise ArgumentError(f"batch_size must be at least 1, got {batch_size}")
    folders = [checkpoint.find_model(dense), checkpoint.find_model(pruned)]
    windows = windows_for(folders[0], source, seq_len, samples, seed)
    models = [loading.load_model(f, dtype=dtype, device=device) for f in folders]
    with _bar(windows.split(batch_size), "evaluating", progress) as shown:
        return evaluation.evaluate(models[0], models[1], shown)


def plan(
    model: str | Path, *, round_to: int = 1, seq_len: int | None = None, **budget: Budget
) -> dict[str, Any]:
    """Say what pruning to a budget would give, from config.json alone.

    FLOPs are those of a forward pass over one sequence, per token: 2 for each weight of a linear
    layer, and 4 · seq_len · heads · head_dim a layer for attention's two products.
    """
    folder = checkpoint.find_model(model, config_only=True)
    size = loading.model_size(folder)
    config = loading.build_config(folder)
    width = selection.target_width(size, round_to=round_to, **budget)  # type: ignore[arg-type]
    if seq_len is None:
        seq_len = min(DEFAULT_SEQ_LEN, config.max_position_embeddings)
    if seq_len < 1:
        raise ArgumentError(f"seq_len must be at least 1, got {seq_len}")
    dtype = config.dtype or torch.float32
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 4 * seq_len * heads * head_dim * size.num_layers
    result = size.pruned_to(width)
    for prefix, neurons in (("dense_", size.intermediate_size), ("", width)):
        result[f"{prefix}weights_bytes"] = size.params_at(neurons) * dtype.itemsize
        result[f"{prefix}flops_per_token"] = 2 * size.linear_params_at(neurons) + attention
    name = checkpoint.display_name(model)
    return {"model": name, **result, "dtype": str(dtype).split(".")[-1], "seq_len": seq_len}


@contextmanager
def _bar(batches: Iterable[Any], what: str, show: bool) -> Iterator[Iterable[Any]]:
    """Count tokens on stderr as batches are taken; an error closes the bar before it is told."""
    if not show:
        yield batches
        return
    items = list(batches)
    with tqdm(
        total=sum(batch.numel() for batch in items),
        desc=what,
        unit="tok",
        unit_scale=True,
        file=sys.stderr,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    ) as bar:

        def counted() -> Iterator[Any]:
            for batch in items:
                yield batch
                bar.update(batch.numel())

        yield counted()


def _versions() -> dict[str, str | None]:
    import transformers

    return {
        "hfprune_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": TRITON_VERSION,
        "python": platform.python_version(),
    }
