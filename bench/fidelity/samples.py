"""How many calibration windows the default recipe needs, and of what length.

    python bench/fidelity/samples.py MODEL --calibration TEXT --text TEXT [--name NAME]

For each number N of windows the default recipe scores, allocates and refits on the first N windows
of a seed; with --lengths also on the same number of tokens as the most windows have, cut into
windows of T. The windows to measure on are of --seq-len tokens, whatever T is. A row, in
NAME-samples.jsonl in bench/results/fidelity, is one of `fidelity.py`'s of the default recipe, and
also has

    samples        N
    seq_len        T; older rows lack it: theirs is the header's
    kept_overlap   part of the kept neurons that the most windows keep too
    score_regret   Σ cost of what N windows remove / Σ cost of what the most windows remove, less 1;
                   costs of removal by the scores of the most windows, as if they added up
    squared_error  mean over the layers of Σ‖x - h‖² / Σ‖x‖² on the held-out text, x the dense
                   model's residual stream after the layer and h the pruned one's: what a refit
                   lowers on the calibration text

An interrupted run goes on where it was, with --work from the scores too. The most windows come
first, as the others are compared with them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = map(str, Path(__file__).parents[1].glob("*/"))
from fidelity import (
    append,
    header_of,
    opened,
    parser_of,
    refuse_twice,
    reported,
    scores_at,
)
from fidelity_subject import Seed, Subject
from fidelity_variants import DEFAULT
from fidelity_windows import held_out_windows, windows
from torch import Tensor
from transformers import PreTrainedModel

from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.data.batches import MicroBatch, TokenData
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.errors import ArgumentError
from hfprune_fast.pruning.widths import most_important

COUNTS = (16, 32, 64, 128, 256, 512)
RATIOS = (0.2, 0.5)


def run(args: argparse.Namespace, say: Callable[[str], None]) -> Path:
    """Measure what is not in the file yet; return the file."""
    source = open_source(args.model)
    if source.spec.experts:
        raise ArgumentError("samples.py is of models without experts")
    drawn = {s: windows(args, source, args.calibration, max(args.samples), s) for s in args.seeds}
    held = min(data.sequences for data in drawn.values())
    counts = sorted((n for n in set(args.samples) if n <= held), reverse=True)
    if not counts:
        raise ArgumentError(f"{args.calibration} holds {held} windows, fewer than {args.samples}")
    most, tokens = (counts[0], args.seq_len), counts[0] * args.seq_len
    of_length = {
        (length, seed): _of_length(args, source, tokens, length, seed)
        for length in args.lengths
        for seed in args.seeds
    }
    texts = [*drawn.values(), *of_length.values()]
    held_out = held_out_windows(args, source, args.text, texts)
    header = header_of(args, source, drawn, {"": held_out})
    # All rows of a file are compared with this number of windows.
    header["calibration"]["samples"] = counts[0]
    file, done = opened(args.out / f"{header['model']}-samples.jsonl", header)
    measured = {
        (row["seed"], row["samples"], row.get("seq_len", args.seq_len), row["prune_ratio"]): row
        for row in done
    }
    settings = [(count, args.seq_len) for count in counts]
    settings += [(tokens // length, length) for length in args.lengths]
    remaining = [
        each
        for each in [(s, *n, r) for s in args.seeds for n in settings for r in args.ratios]
        if each not in measured
    ]
    if remaining:
        append(file, header)
        subject = Subject(source, held_out)

    @cache
    def on(count: int, length: int, seed: int) -> Seed:
        data = of_length.get((length, seed)) or first(drawn[seed], count, seed)
        of = "" if length == args.seq_len else f"-of{length}"
        at = scores_at(args, f"{header['model']}-samples-seed{seed}-{count}{of}")
        return Seed(subject, data, seed, at, criteria=["fisher"])

    for i, (seed, count, length, ratio) in enumerate(remaining, 1):
        begun = time.monotonic()
        most_widths = measured.get((seed, *most, ratio), {}).get("widths")
        row = compared(on(count, length, seed), on(*most, seed), ratio, most_widths)
        append(file, row)
        measured[seed, count, length, ratio] = row
        say(
            f"{header['model']} {i}/{len(remaining)}: seed {seed}, {count} windows of {length} "
            f"tokens, {ratio:.0%} in {time.monotonic() - begun:.0f} s"
        )
    return file


def _of_length(
    args: argparse.Namespace, source: ModelSource, tokens: int, length: int, seed: int
) -> TokenData:
    """Return `tokens` calibration tokens in windows of `length`."""
    if tokens % length:
        raise ArgumentError(f"--lengths {length} does not divide the {tokens} tokens in all")
    data = windows(args, source, args.calibration, tokens // length, seed, length)
    if data.sequences < tokens // length:
        raise ArgumentError(
            f"{args.calibration} holds {data.sequences} windows of {length} tokens, fewer than "
            f"{tokens // length}; give fewer --samples"
        )
    return data


def first(data: TokenData, count: int, seed: int) -> TokenData:
    """Return the first windows in an order drawn by seed; a short text's are in its own order."""
    ids = data.batches[0].ids
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    chosen = ids[order[:count]]
    return TokenData([MicroBatch(chosen, (ids.shape[1],) * count)], data.description, None)


def compared(
    few: Seed, most: Seed, ratio: float, most_widths: Sequence[int] | None
) -> dict[str, Any]:
    """Return a row: the default recipe on few windows, beside what it keeps on the most."""
    pruning = few.prune(DEFAULT, ratio)
    row = few.measured(DEFAULT, ratio, pruning)
    costs = most.scores.importance("obs", "fisher")
    want = most_costly(costs, most_widths or row["widths"])
    kept = torch.zeros_like(want)
    for layer, neurons in pruning.keep.items():
        kept[layer, neurons] = True
    subject = few.subject
    smaller = subject.pruned(pruning)
    return row | {
        "samples": few.calibration.sequences,
        "seq_len": few.ids.shape[1],
        "kept_overlap": int((kept & want).sum()) / int(want.sum()),
        "score_regret": float(costs[~kept].sum() / costs[~want].sum()) - 1,
        "squared_error": squared_error(subject.model, smaller, subject.held_out.batches),
    }


def most_costly(costs: Tensor, widths: Sequence[int]) -> Tensor:
    """Return (L, F) bool: so many neurons of each layer, as a pruning chooses them."""
    kept = torch.zeros_like(costs, dtype=torch.bool)
    for layer, width in enumerate(widths):
        kept[layer, most_important(costs[layer], width)] = True
    return kept


@torch.no_grad()
def squared_error(
    dense: PreTrainedModel, pruned: PreTrainedModel, batches: Sequence[MicroBatch]
) -> float:
    """Return the mean over the layers of Σ‖x - h‖² / Σ‖x‖², of the streams after each layer."""
    with ResidentModel(dense) as p, ResidentModel(pruned) as q:
        sums = torch.zeros(2, len(p.parts.layers), dtype=torch.float64)
        for batch in batches:
            x, h = p.begin(batch), q.begin(batch)
            for layer in range(sums.shape[1]):
                x, h = p.run(layer, x, batch), q.run(layer, h, batch)
                sums[0, layer] += (x - h).double().square().sum()
                sums[1, layer] += x.double().square().sum()
    return float((sums[0] / sums[1]).mean())


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=COUNTS, help="of windows")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[], metavar="T",
        help="also calibrate on as many tokens as the most windows have, in windows of T",
    )  # fmt: skip
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="of MLP neurons")
    args = parser.parse_args(argv)
    if wrong := [t for t in args.lengths if t < 2 or t == args.seq_len]:
        parser.error(f"--lengths {wrong[0]}: expected 2 or more, and not --seq-len")
    refuse_twice(parser, ratios=args.ratios, seeds=args.seeds, lengths=args.lengths)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    return reported("samples.py", run, parsed(argv))


if __name__ == "__main__":
    sys.exit(main())
