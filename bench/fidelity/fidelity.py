"""How close to the dense model each way to prune stays, without training.

    python bench/fidelity/fidelity.py MODEL --calibration TEXT --text TEXT [--name NAME]
    python bench/reporting/report.py       the tables, the picture and docs/benchmarks.md from these

MODEL is a folder, a hub name or `demo`. Each of `fidelity_variants.py` is scored, allocated and
refitted on windows of the calibration text, once for each seed (which draws the windows, and
fisher's tokens), and measured on another text: KL(dense || pruned), perplexity, top-1 and top-5
agreement; with --also on further texts, and with --generate by greedy continuations.
`--rows baselines`: other authors' methods (bench/baselines) beside the paper's recipe and ours.
Of a model with experts the ways are those of `fidelity_mixture.py`.
All is fp32 on a CPU; the paper's recipe with the rounding of its script (bf16 parity) is a row of
its own. The held-out windows are the same for all seeds.

Rows go to NAME.jsonl in bench/results/fidelity as they come. An interrupted run goes on where it
was, with --work from the scores of a seed too, and so does one that is asked for further seeds,
ratios or rows. A row that is there stays as it is, also where it has no continuations yet or was
measured on fewer texts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = map(str, Path(__file__).parents[1].glob("*/"))
from fidelity_mixture import sizes
from fidelity_subject import CRITERIA, Seed, Subject
from fidelity_tables import FOLDER, read
from fidelity_variants import (
    BASELINES,
    CORE,
    MIXTURE_RATIOS,
    MIXTURES,
    QUICK,
    QUICK_MIXTURES,
    VARIANTS,
    Variant,
    variant_of,
)
from fidelity_windows import held_out_windows, windows
from records import ResultError, Row, described, rounded

from hfprune_fast.checkpoint.source import ModelSource, open_source
from hfprune_fast.data.batches import TokenData
from hfprune_fast.errors import ArgumentError, HFPruneError
from hfprune_fast.models.spec import ModelSpec

Study = Callable[[argparse.Namespace, Callable[[str], None]], Path]
RATIOS = (0.1, 0.2, 0.3, 0.5)
ROWS = {"all": VARIANTS, "baselines": BASELINES, "core": CORE, "quick": QUICK}
ROWS_OF_MIXTURES = {"all": MIXTURES, "quick": QUICK_MIXTURES}
# A file is of one of each: rows of others cannot be compared with it.
SETTINGS = ("model_type", "params", "calibration", "evaluation", "texts", "weights")


def run(args: argparse.Namespace, say: Callable[[str], None]) -> Path:
    """Measure what is not in the file yet; return the file."""
    source = open_source(args.model)
    drawn = {s: windows(args, source, args.calibration, args.samples, s) for s in args.seeds}
    held_out = {
        name: held_out_windows(args, source, text, drawn.values())
        for name, text in {"": args.text, **args.also}.items()
    }
    header = header_of(args, source, drawn, held_out)
    header["also"] = {name: Path(text).name for name, text in args.also.items()}
    file, done = opened(args.out / f"{header['model']}.jsonl", header)
    measured = {(variant_of(row), row["prune_ratio"], row["seed"]) for row in done}
    remaining = [
        (seed, variant, ratio)
        for seed in args.seeds
        for variant, ratios in _requested(args, source.spec)
        for ratio in ratios
        if (variant, ratio, seed) not in measured
    ]
    if remaining:
        append(file, header)
        text = held_out.pop("")
        subject, scored = Subject(source, text, held_out, args.generate), None
    begun = last = time.monotonic()
    for i, (seed, variant, ratio) in enumerate(remaining, 1):
        if scored is None or scored.seed != seed:
            kept_at = scores_at(args, f"{header['model']}-{args.rows}-seed{seed}")
            scored = Seed(subject, drawn[seed], seed, kept_at, _criteria(args, source.spec))
        append(file, scored.row(variant, ratio))
        now = time.monotonic()
        left_s = (now - begun) * (len(remaining) - i) / i
        say(
            f"{header['model']} {i}/{len(remaining)}: seed {seed}, {variant}, "
            f"{ratio:.0%} in {now - last:.0f} s; about {left_s / 60:.0f} min to go"
        )
        last = now
    return file


def scores_at(args: argparse.Namespace, name: str) -> Path | None:
    """Return how the files of scores begin, in the folder that is to keep them, if any."""
    if args.work is None:
        return None
    args.work.mkdir(parents=True, exist_ok=True)
    folder: Path = args.work
    return folder / name


def header_of(
    args: argparse.Namespace,
    source: ModelSource,
    drawn: Mapping[int, TokenData],
    held_out: Mapping[str, TokenData],
) -> dict[str, Any]:
    """Return what a file says before its rows.

    Args:
        drawn: calibration windows by seed.
        held_out: windows to measure on, of the main text by the name "".
    """
    samples = args.samples if isinstance(args.samples, int) else max(args.samples)
    # The same whichever seeds a run is asked for.
    of_seed_0 = drawn.get(0) or windows(args, source, args.calibration, samples, 0)
    return {
        "model": args.name or source.name.rpartition("/")[2],
        "model_type": source.spec.model_type,
        "params": source.spec.total_params,
        "calibration": {"samples": of_seed_0.sequences, "seq_len": args.seq_len},
        "evaluation": {"samples": held_out[""].sequences, "seq_len": args.seq_len},
        "texts": [Path(args.calibration).name, Path(args.text).name],
        "also": {},
        # Another model or text may have the same name and size.
        "weights": source.fingerprint[:12],
        "windows": [of_seed_0.sha256[:12], *(data.sha256[:12] for data in held_out.values())],
        **described(),
    }


def _variants(args: argparse.Namespace, spec: ModelSpec) -> Sequence[Variant]:
    if spec.experts and args.rows not in ROWS_OF_MIXTURES:
        raise ArgumentError(f"--rows {args.rows} is of models without experts")
    rows = ROWS_OF_MIXTURES if spec.experts else ROWS
    return rows[args.rows]


def _criteria(args: argparse.Namespace, spec: ModelSpec) -> list[str] | None:
    """Return what the rows are ranked by; None, which is all, of a model with experts."""
    ranked_by = {variant.criterion for variant in _variants(args, spec)}
    return None if spec.experts else [each for each in CRITERIA if each in ranked_by]


def _requested(
    args: argparse.Namespace, spec: ModelSpec
) -> Iterator[tuple[Variant, Sequence[float]]]:
    """Yield each variant, with the ratios at which it is measured."""
    variants = _variants(args, spec)
    names = [str(variant) for variant in variants]
    if unknown := set(args.only or ()) - set(names):
        raise ArgumentError(
            f"--only {min(unknown)!r} is not one of --rows {args.rows}: {'; '.join(names)}"
        )
    ratios = args.ratios or (MIXTURE_RATIOS if spec.experts else RATIOS)
    if unknown := set(args.generate) - set(ratios):
        raise ArgumentError(f"--generate {min(unknown)} is not one of the ratios: {list(ratios)}")
    for variant in variants:
        if not args.only or str(variant) in args.only:
            yield variant, [r for r in ratios if not spec.experts or sizes(variant, r, spec)]


def opened(file: Path, header: dict[str, Any]) -> tuple[Path, list[Row]]:
    """Return a file and its rows; refuse to add to one with other settings."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        return file, []
    earlier = read(file)
    for name in SETTINGS:  # older files do not have all
        was = next((h[name] for h in reversed(earlier.headers) if name in h), header[name])
        if was != header[name]:
            raise ResultError(f"{file} has {name} {was}, not {header[name]}; give another --out")
    digests = _digests(header)
    for was_of in map(_digests, earlier.headers):
        for name in was_of.keys() & digests.keys():
            if was_of[name] != digests[name]:
                raise ResultError(f"{file} has other windows of its {name}; give another --out")
    return file, earlier.rows


def _digests(header: Mapping[str, Any]) -> dict[str, str]:
    """Return the digest of each text's windows; a row may be measured on more texts than others."""
    names = (
        "calibration text",
        "held-out text",
        *(f"text {name!r}" for name in header.get("also", {})),
    )
    return dict(zip(names, header.get("windows", ()), strict=False))


def append(file: Path, line: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(rounded(line)) + "\n")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all studies of a model's fidelity take."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model folder, a hub name, or demo")
    parser.add_argument("--calibration", required=True, help="text to score and refit on")
    parser.add_argument("--text", required=True, help="text to measure on, of other documents")
    parser.add_argument("--name", help="of the model in the results; by default its folder's")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--work", type=Path, help="folder that keeps scores, for a later run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval-samples", type=int, default=64, help="held-out windows, of a text")
    parser.add_argument("--seq-len", type=int, default=256)
    return parser


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--ratios", type=float, nargs="+", help="of MLP neurons, or of experts")
    parser.add_argument("--rows", choices=ROWS, default="all")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="of these, by their names")
    parser.add_argument(
        "--also", type=_named, nargs="+", default=[], metavar="NAME=FILE",
        help="further texts to measure on",
    )  # fmt: skip
    parser.add_argument(
        "--generate", type=float, nargs="+", default=[], metavar="RATIO",
        help="compare greedy continuations too, at these ratios",
    )  # fmt: skip
    args = parser.parse_args(argv)
    refuse_twice(
        parser, also=[name for name, _ in args.also], ratios=args.ratios or [], seeds=args.seeds
    )
    args.also = dict(args.also)
    return args


def refuse_twice(parser: argparse.ArgumentParser, **options: Sequence[Any]) -> None:
    """Stop at an option that has a value twice: its rows would be measured twice."""
    for option, given in options.items():
        if twice := [each for i, each in enumerate(given) if each in given[:i]]:
            parser.error(f"--{option} has {twice[0]} twice")


def _named(given: str) -> tuple[str, str]:
    name, _, file = given.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {given!r}")
    return name, file


def main(argv: Sequence[str] | None = None) -> int:
    return reported("fidelity.py", run, parsed(argv))


def reported(name: str, study: Study, args: argparse.Namespace) -> int:
    """Run a study and return the exit status; its file is printed, its progress is on stderr."""
    try:
        print(study(args, lambda line: print(line, file=sys.stderr, flush=True)))
    except (ResultError, HFPruneError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
