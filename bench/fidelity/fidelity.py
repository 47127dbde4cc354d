"""How close to the dense model each way to prune stays, without training.

    python bench/fidelity/fidelity.py MODEL --calibration TEXT --text TEXT [--name NAME]
    python bench/reporting/report.py       the tables, the picture and docs/benchmarks.md from these

MODEL is a folder, a hub name or `demo`. Each of `fidelity_variants.py` is scored, allocated and
refitted on windows of the calibration text, once for each seed (which draws the windows, and
fisher's tokens), and measured on another text: KL(dense || pruned), perplexity, top-1 agreement.
`--rows baselines`: other authors' methods (bench/baselines) beside the paper's recipe and ours.
Of a model with experts the ways are those of `fidelity_mixture.py`.
All is fp32 on a CPU; the paper's recipe with the rounding of its script (bf16 parity) is a row of
its own. The held-out windows are the same for all seeds.

Rows go to NAME.jsonl in bench/results/fidelity as they come. An interrupted run goes on where it
was, and so does one that is asked for further seeds, ratios or rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path[:0] = map(str, Path(__file__).parents[1].glob("*/"))
from fidelity_mixture import sizes
from fidelity_subject import Seed, Subject
from fidelity_tables import FOLDER, read
from fidelity_variants import (
    BASELINES,
    MIXTURE_RATIOS,
    MIXTURES,
    QUICK,
    QUICK_MIXTURES,
    VARIANTS,
    Variant,
    variant_of,
)
from records import ResultError, described, rounded

from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.config import CalibrationOptions
from hfprune_fast.data.batches import TokenData
from hfprune_fast.data.calibration import calibrate
from hfprune_fast.errors import ArgumentError, HFPruneError
from hfprune_fast.models.spec import ModelSpec

RATIOS = (0.1, 0.2, 0.3, 0.5)
ROWS = {"all": VARIANTS, "baselines": BASELINES, "quick": QUICK}
ROWS_OF_MIXTURES = {"all": MIXTURES, "quick": QUICK_MIXTURES}
# A file is of one of each: rows of others cannot be compared with it.
SETTINGS = ("model_type", "params", "calibration", "evaluation", "texts")
# Two windows with as many equal tokens in a row have them from one document.
SHARED_RUN = 48


def run(args: argparse.Namespace, told: Callable[[str], None]) -> Path:
    """Measure what is not in the file yet; return the file."""
    source = open_source(args.model)
    check_texts(args.calibration, args.text)

    def windows(text: str, samples: int, seed: int) -> TokenData:
        return calibrate(text, source, CalibrationOptions(samples, args.seq_len, seed))

    held_out = windows(args.text, args.eval_samples, 0)
    drawn = {seed: windows(args.calibration, args.samples, seed) for seed in args.seeds}
    for data in drawn.values():
        check_windows(data.batches[0].ids, held_out.batches[0].ids)
    header = {
        "model": args.name or source.name.rpartition("/")[2],
        "model_type": source.spec.model_type,
        "params": source.spec.total_params,
        "calibration": {"samples": drawn[args.seeds[0]].sequences, "seq_len": args.seq_len},
        "evaluation": {"samples": held_out.sequences, "seq_len": args.seq_len},
        "texts": [Path(args.calibration).name, Path(args.text).name],
        **described(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file: Path = args.out / f"{header['model']}.jsonl"
    done = _done(file, header)
    remaining = [
        (seed, variant, ratios)
        for seed in args.seeds
        for variant, of_variant in _requested(args, source.spec)
        if (ratios := [r for r in of_variant if (variant, r, seed) not in done])
    ]
    if remaining:
        _append(file, header)
        subject, scored = Subject(source, held_out), None
    begun = time.monotonic()
    for i, (seed, variant, ratios) in enumerate(remaining, 1):
        if scored is None or scored.seed != seed:
            scored = Seed(subject, drawn[seed], seed)
        for row in scored.rows(variant, ratios):
            _append(file, row)
        left = (time.monotonic() - begun) / 60 * (len(remaining) - i) / i
        progress = f"{header['model']} {i}/{len(remaining)}: seed {seed}, {variant}"
        told(f"{progress}; about {left:.0f} min to go")
    return file


def _requested(
    args: argparse.Namespace, spec: ModelSpec
) -> Iterator[tuple[Variant, Sequence[float]]]:
    """Yield each variant, with the ratios at which it is measured."""
    if not spec.experts:
        yield from ((variant, args.ratios or RATIOS) for variant in ROWS[args.rows])
        return
    if args.rows not in ROWS_OF_MIXTURES:
        raise ArgumentError(f"--rows {args.rows} is of models without experts")
    ratios = args.ratios or MIXTURE_RATIOS
    for variant in ROWS_OF_MIXTURES[args.rows]:
        yield variant, [r for r in ratios if sizes(variant, r, spec)]


def check_texts(calibration: str | Path, text: str | Path) -> None:
    """Refuse one text for both, whatever it is called."""
    one, other = Path(calibration).resolve(), Path(text).resolve()
    files = one.is_file() and other.is_file()
    if one == other or (files and one.read_bytes() == other.read_bytes()):
        raise ArgumentError(f"text {text} is the calibration text; give one of other documents")


def check_windows(calibration: Tensor, held_out: Tensor) -> None:
    """Refuse held-out windows that have a long run of tokens in common with calibration."""
    length = min(SHARED_RUN, calibration.shape[1])

    def runs(windows: Tensor) -> list[set[bytes]]:
        parts = windows.unfold(1, length, 1).numpy()
        return [{part.tobytes() for part in window} for window in parts]

    seen = set().union(*runs(calibration))
    sharing = sum(not seen.isdisjoint(window) for window in runs(held_out))
    if sharing:
        raise ArgumentError(
            f"{sharing} of {len(held_out)} held-out windows have {SHARED_RUN} tokens in a row in "
            "common with calibration windows; give texts of different documents"
        )


def _done(file: Path, header: dict[str, Any]) -> set[tuple[Variant, float, int]]:
    """Return what an earlier run has measured; refuse to add to one with other settings."""
    if not file.exists():
        return set()
    earlier = read(file)
    for name in SETTINGS:
        if (was := earlier.header.get(name, header[name])) != header[name]:
            raise ResultError(f"{file} has {name} {was}, not {header[name]}; give another --out")
    return {(variant_of(row), row["prune_ratio"], row["seed"]) for row in earlier.rows}


def _append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(rounded(line)) + "\n")


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model folder, a hub name, or demo")
    parser.add_argument("--calibration", required=True, help="text to score and refit on")
    parser.add_argument("--text", required=True, help="text to measure on, of other documents")
    parser.add_argument("--name", help="of the model in the results; by default its folder's")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=float, nargs="+", help="of MLP neurons, or of experts")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--eval-samples", type=int, default=64, help="held-out windows")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", choices=ROWS, default="all")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        print(run(parsed(argv), lambda line: print(line, file=sys.stderr, flush=True)))
    except (ResultError, HFPruneError) as error:
        print(f"fidelity.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
