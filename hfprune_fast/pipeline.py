"""The whole job on one screen: text and a model in, a scores file or a smaller checkpoint out."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hfprune_fast import checkpoint, compaction, evaluation, report, selection
from hfprune_fast._version import __version__
from hfprune_fast.architectures import ModelSize
from hfprune_fast.calibration import TokenWindows, token_windows
from hfprune_fast.errors import ArgumentError, ScoresFileError
from hfprune_fast.importance import ImportanceTable
from hfprune_fast.kernels._triton import TRITON_VERSION
from hfprune_fast.scoring import score_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_SEQ_LEN = 1024
DEFAULT_SAMPLES = 128


def score(
    model_or_path: PreTrainedModel | str | Path,
    batches_or_source: Iterable[Tensor] | Tensor | NDArray[Any] | str | Path,
    *,
    samples: int | None = DEFAULT_SAMPLES,
    seq_len: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    device: str = "auto",
    dtype: str = "auto",
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
        device, dtype: where and in what a model given by path runs, see `checkpoint.load_model`.
        progress: show a bar on stderr.

    Returns:
        The table of all statistics, (L, F) float64, from which any ratio can be selected.

    Raises:
        HFPruneError: bad input, one line; its subclasses say which kind.
    """
    if batch_size < 1:
        raise ArgumentError(f"batch_size must be at least 1, got {batch_size}")
    provenance: dict[str, Any] = {"criterion": "entropy", "versions": _versions()}
    if isinstance(model_or_path, str | Path):
        folder = checkpoint.find_model(model_or_path)
        provenance["model"] = _name(model_or_path)
        provenance["model_fingerprint"] = checkpoint.fingerprint(folder)
    else:
        folder = None
    batches: Iterable[Tensor]
    if isinstance(batches_or_source, str | Path):
        if folder is None:
            raise ArgumentError(
                "a loaded model is scored over token batches; give the model by path to use text"
            )
        windows = windows_for(folder, batches_or_source, seq_len, samples, seed)
        provenance["calibration"] = {
            "source": windows.source,
            "data_sha256": windows.sha256,
            "seq_len": windows.ids.shape[1],
            "seed": seed,
        }
        batches = windows.ids.split(batch_size)
    elif isinstance(batches_or_source, Tensor | np.ndarray):
        batches = torch.as_tensor(batches_or_source).split(batch_size)
    else:
        batches = batches_or_source
    if folder is None:
        model: Any = model_or_path
    else:
        model = checkpoint.load_model(folder, dtype=dtype, device=device)
    provenance["dtype"] = str(model.dtype).removeprefix("torch.")
    scored = score_batches(model, _with_bar(batches, "scoring", progress))
    for key in ("samples", "tokens", "entropy_nats"):
        provenance[key] = scored.pop(key)
    return ImportanceTable(**scored, model=checkpoint.model_size_of(model), provenance=provenance)


def check_prune(
    model: str | Path,
    out: str | Path,
    *,
    round_to: int = 1,
    force: bool = False,
    **budget: float | int | None,
) -> None:
    """Raise what `prune_to` would refuse of its model, output and budget, before any work."""
    folder = checkpoint.find_model(model)
    checkpoint.tensor_headers(folder)
    size = checkpoint.model_size(folder)
    width = selection.target_width(size, round_to=round_to, **budget)  # type: ignore[arg-type]
    dense_bytes = sum(path.stat().st_size for path in checkpoint.weight_files(folder))
    needed_bytes = dense_bytes * size.params_at(width) // size.total_params
    compaction.check_output_folder(Path(out), folder, force=force, needed_bytes=needed_bytes)
    for leftover in compaction.leftovers(Path(out)):
        say(f"{leftover} is left over from a run that was killed; it can be deleted")


def prune_to(
    model: str | Path,
    out: str | Path,
    table: ImportanceTable,
    *,
    statistic: str = "l1",
    round_to: int = 1,
    force: bool = False,
    **budget: float | int | None,
) -> dict[str, Any]:
    """Select by a table and write the pruned checkpoint; return what was achieved."""
    folder = checkpoint.find_model(model)
    check_table(table, folder, str(model))
    keep = selection.select(table, statistic=statistic, round_to=round_to, **budget)  # type: ignore[arg-type]
    result = {
        **achieved(table.model, len(keep[0])),
        "statistic": statistic,
    }
    asked = {name: value for name, value in budget.items() if value is not None}
    record = {
        "hfprune_fast": __version__,
        "base_model": _name(model),
        "asked": {**asked, "statistic": statistic, "round_to": round_to},
        "achieved": result,
        "provenance": table.provenance,
    }
    card = report.model_card(_name(model), result, table.provenance)
    compaction.prune_checkpoint(folder, out, keep, force=force, record=record, card=card)
    return {"out": str(out), **result}


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
    folders = [checkpoint.find_model(dense), checkpoint.find_model(pruned)]
    windows = windows_for(folders[0], source, seq_len, samples, seed)
    models = [checkpoint.load_model(f, dtype=dtype, device=device) for f in folders]
    batches = _with_bar(windows.ids.split(batch_size), "evaluating", progress)
    return evaluation.evaluate(models[0], models[1], batches)


def windows_for(
    folder: Path, source: str | Path, seq_len: int | None, samples: int | None, seed: int
) -> TokenWindows:
    """Make the token windows for a model folder, telling when the text holds fewer than asked."""
    config = checkpoint.read_config(folder)
    longest = config.get("max_position_embeddings", DEFAULT_SEQ_LEN)
    if seq_len is not None and seq_len > longest:
        raise ArgumentError(
            f"seq_len must be at most {longest}, the model's longest position; got {seq_len}"
        )
    is_ids = str(source).endswith(".npy")
    windows = token_windows(
        source,
        None if is_ids else checkpoint.load_tokenizer(folder),
        seq_len=seq_len if is_ids else seq_len or min(DEFAULT_SEQ_LEN, longest),
        samples=samples,
        seed=seed,
        vocab_size=config["vocab_size"],
    )
    made, length = windows.ids.shape
    if samples is not None and made < samples:
        say(f"{source} holds {made} samples of {length} tokens; {samples} were asked for")
    return windows


def check_table(table: ImportanceTable, folder: Path, name: str) -> None:
    """Refuse a table that was scored on another model."""
    size = checkpoint.model_size(folder)
    scored = table.provenance.get("model_fingerprint")
    if size != table.model:
        raise ScoresFileError(
            f"the scores are of another model than {name}: they are of {table.model}, "
            f"expected {size}"
        )
    if scored is not None and scored != checkpoint.fingerprint(folder):
        raise ScoresFileError(
            f"the scores are of another model than {name}: same shape, other weights "
            f"(they were made from {table.provenance.get('model')})"
        )


def achieved(size: ModelSize, width: int) -> dict[str, Any]:
    """Widths, parameters and ratios of pruning to a width."""
    params = size.params_at(width)
    return {
        "intermediate_size": width,
        "dense_intermediate_size": size.intermediate_size,
        "prune_ratio": 1 - width / size.intermediate_size,
        "params": params,
        "dense_params": size.total_params,
        "param_ratio": 1 - params / size.total_params,
    }


def plan(
    model: str | Path,
    *,
    round_to: int = 1,
    seq_len: int | None = None,
    **budget: float | int | None,
) -> dict[str, Any]:
    """Say what pruning to a budget would give, from config.json alone.

    FLOPs are those of a forward pass over one sequence, per token: 2 for each weight of a linear
    layer, and 4 · seq_len · heads · head_dim a layer for attention's two products.
    """
    folder = checkpoint.find_model(model, config_only=True)
    size = checkpoint.model_size(folder)
    config = checkpoint.build_config(folder)
    width = selection.target_width(size, round_to=round_to, **budget)  # type: ignore[arg-type]
    seq_len = seq_len or min(DEFAULT_SEQ_LEN, config.max_position_embeddings)
    dtype = config.dtype or torch.float32
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 4 * seq_len * heads * head_dim * size.num_layers
    result = achieved(size, width)
    for prefix, neurons in (("dense_", size.intermediate_size), ("", width)):
        result[f"{prefix}weights_bytes"] = size.params_at(neurons) * dtype.itemsize
        result[f"{prefix}flops_per_token"] = 2 * size.linear_params_at(neurons) + attention
    return {"model": _name(model), **result, "dtype": str(dtype).split(".")[-1], "seq_len": seq_len}


def say(message: str) -> None:
    """One line to the user, past the progress bar, on stderr."""
    tqdm.write(f"hfprune: {message}", file=sys.stderr)


def _with_bar(batches: Iterable[Tensor], what: str, show: bool) -> Iterator[Tensor]:
    if not show:
        yield from batches
        return
    items = list(batches)
    tty = sys.stderr.isatty()
    with tqdm(
        total=sum(b.numel() for b in items),
        desc=what,
        unit="tok",
        unit_scale=True,
        file=sys.stderr,
        mininterval=0.2 if tty else 30,
    ) as bar:
        for batch in items:
            yield batch
            bar.update(batch.numel())


def _name(model: str | Path) -> str:
    """A model's name as others know it: hub names stay, folders give their last part."""
    path = Path(model)
    return path.resolve().name if path.is_dir() else str(model)


def _versions() -> dict[str, str | None]:
    import transformers

    return {
        "hfprune_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": TRITON_VERSION,
        "python": platform.python_version(),
    }
