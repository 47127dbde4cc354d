"""How close to the dense model each way to prune stays, without training.

    python bench/fidelity.py MODEL --calibration TEXT --text TEXT [--name NAME]

MODEL is a folder or `demo`. Every recipe below is scored, allocated and refitted on windows of the
calibration text, once for each seed (which draws the windows, and fisher's tokens), and measured on
another text: KL(dense || pruned), perplexity and top-1 agreement. Rows go to
bench/results/fidelity/NAME.jsonl as they come, so an interrupted run goes on where it was;
`python bench/report.py` makes tables and a picture of them.

A pruned model is measured as the dense one with its down_proj replaced: columns of removed neurons
are zero and the others refitted, which is the same function as the smaller model. All is fp32; the
paper's recipe with the rounding of its script (`parity`, bf16) is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # not there with PYTHONSAFEPATH
import fidelity_report
from records import described

import hfprune_fast as hf
from hfprune_fast import checkpoint, evaluation, loading, pipeline, prune_job, selection
from hfprune_fast.calibration import windows_for
from hfprune_fast.forward import MicroBatch, ResidentModel, micro_batch, numbered
from hfprune_fast.refit import refit

RATIOS = (0.1, 0.2, 0.3, 0.5)
BATCH = 16


@dataclass(frozen=True)
class Way:
    """A recipe of the table. The paper's is the first, which the others are held against."""

    criterion: str
    statistic: str  # "obs" ranks by removal costs
    allocation: str = "uniform"
    refit: bool = False


PAPER = Way("entropy", "l1")
WAYS = (
    PAPER,
    Way("entropy, parity", "l1"),
    *(Way("entropy", statistic) for statistic in ("l2", "mask")),
    *(Way("cross_entropy", statistic) for statistic in ("l1", "l2", "mask")),
    *(Way("fisher", statistic) for statistic in ("l1", "l2", "mask", "obs")),
    Way("activation", "act"),
    Way("magnitude", "weight_norm"),
    Way("random", "uniform"),
    *(Way(*ranked, "global") for ranked in (("entropy", "l1"), ("fisher", "l2"))),
    *(
        Way(*ranked, refit=True)
        for ranked in (("entropy", "l1"), ("fisher", "l2"), ("activation", "act"))
    ),
    Way("fisher", "l2", "global", refit=True),
    *(Way("fisher", "obs", allocation, refit=True) for allocation in ("uniform", "global", "auto")),
)


class Subject:
    """A dense model, the text that pruned ones are measured on, and where its head reads."""

    def __init__(self, folder: Path, text: Path, seq_len: int, samples: int) -> None:
        self.folder = folder
        self.model = loading.load_model(folder, dtype="float32", device="cpu")
        self.size = checkpoint.open_checkpoint(folder).size
        ids = windows_for(folder, text, seq_len, samples, 0)
        self.held_out = [micro_batch(part, self.size_of_vocabulary) for part in ids.split(BATCH)]
        with ResidentModel(self.model) as model:
            self.hidden = list(model.final_hidden(self.held_out))
        mlps = ResidentModel(self.model).parts.mlps
        self.downs = [mlp.down for mlp in mlps]
        self.weights = [down.weight.detach() for down in self.downs]

    @property
    def size_of_vocabulary(self) -> int:
        return int(self.model.config.vocab_size)

    def measure(self, keep: Mapping[int, Tensor], fitted: Mapping[int, Tensor] | None) -> Any:
        """Return the fidelity of the model that keeps these neurons."""
        try:
            for layer, (down, dense) in enumerate(zip(self.downs, self.weights, strict=True)):
                kept = keep[layer]
                left = dense[:, kept] if fitted is None else fitted[layer]
                weight = torch.zeros_like(dense).index_copy_(1, kept, left)
                down.weight = torch.nn.Parameter(weight, requires_grad=False)
            with ResidentModel(self.model) as model:
                head = model.head()
                hidden = model.final_hidden(self.held_out)
                return evaluation.compare(self.held_out, self.hidden, hidden, head, head)
        finally:
            for down, dense in zip(self.downs, self.weights, strict=True):
                down.weight = torch.nn.Parameter(dense, requires_grad=False)


class Seed:
    """What is scored, once for all ways, with one seed."""

    def __init__(self, subject: Subject, ids: Tensor, seed: int) -> None:
        self.subject, self.ids, self.seed = subject, ids, seed
        self.batches: list[MicroBatch] = numbered(
            micro_batch(part, subject.size_of_vocabulary) for part in ids.split(BATCH)
        )
        self._tables: dict[str, hf.ImportanceTable] = {}

    def importance(self, way: Way) -> Tensor:
        if way.criterion in ("magnitude", "random"):
            folder = self.subject.folder
            return pipeline.weights_table(folder, way.criterion, self.seed).importance()
        if way.criterion == "entropy, parity":
            return self._table("parity").importance("l1")
        return self._table("scores").importance(way.statistic, way.criterion)

    def _table(self, which: str) -> hf.ImportanceTable:
        if which not in self._tables and which == "parity":
            bf16 = loading.load_model(self.subject.folder, dtype="bfloat16", device="cpu")
            self._tables[which] = hf.score(bf16, self.ids.split(1), parity=True)
        elif which not in self._tables:
            self._tables[which] = hf.score(
                self.subject.model,
                self.ids.split(BATCH),
                criterion=["entropy", "cross_entropy", "fisher", "activation"],
                obs=True,
                seed=self.seed,
            )
        return self._tables[which]

    def keep(self, way: Way, ratio: float) -> dict[int, Tensor]:
        importance = self.importance(way)
        width = selection.target_width(self.subject.size, prune_ratio=ratio)
        if way.allocation != "auto":
            return selection.keep_top(importance, width, way.allocation)
        keeps = [
            selection.keep_top(importance, width, number) for number in prune_job.ALLOCATIONS_TRIED
        ]
        with ResidentModel(self.subject.model) as model:
            kl = prune_job.held_out_kl(model, prune_job.trial(self.batches), keeps)
        return keeps[min(range(len(kl)), key=kl.__getitem__)]

    def rows(self, way: Way, ratios: Sequence[float]) -> Iterator[dict[str, Any]]:
        """Measure a way at all ratios, whose refits share the dense model's run."""
        keeps = [self.keep(way, ratio) for ratio in ratios]
        fitted: Sequence[Mapping[int, Tensor] | None] = [None] * len(keeps)
        if way.refit:
            with ResidentModel(self.subject.model) as model:
                fitted = [result.weights for result in refit(model, self.batches, keeps)[0]]
        for ratio, keep, weights in zip(ratios, keeps, fitted, strict=True):
            widths = [len(keep[layer]) for layer in range(len(keep))]
            fidelity = self.subject.measure(keep, weights)
            yield {
                **asdict(way),
                "prune_ratio": ratio,
                "seed": self.seed,
                "widths": widths,
                "param_ratio": self.subject.size.pruned_to(widths)["param_ratio"],
                **asdict(fidelity),
            }


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in (*Way.__dataclass_fields__, "prune_ratio", "seed"))


def run(args: argparse.Namespace, ways: Sequence[Way] = WAYS) -> Path:
    """Measure what is not in the file yet; return the file."""
    folder = checkpoint.find_model(args.model)
    if Path(args.calibration).resolve() == Path(args.text).resolve():
        raise SystemExit("fidelity: --text must be another text than --calibration")
    file: Path = args.out / f"{args.name or checkpoint.display_name(args.model)}.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    subject = Subject(folder, args.text, args.seq_len, args.eval_samples)
    header = {
        "model": file.stem,
        "model_type": subject.size.model_type,
        "params": subject.size.total_params,
        "calibration": {"samples": args.samples, "seq_len": args.seq_len},
        "texts": [Path(args.calibration).name, Path(args.text).name],
        **described(),
    }
    if not file.exists():
        file.write_text(json.dumps(header) + "\n", encoding="utf-8")
    for seed in args.seeds:
        ids = windows_for(folder, args.calibration, args.seq_len, args.samples, seed)
        drawn = Seed(subject, ids, seed)
        for way in ways:
            done = {identity(row) for row in fidelity_report.read(file).rows}
            left = [
                ratio
                for ratio in args.ratios
                if identity({**asdict(way), "prune_ratio": ratio, "seed": seed}) not in done
            ]
            begun = time.perf_counter()
            for row in drawn.rows(way, left) if left else ():
                with file.open("a", encoding="utf-8") as rows:
                    rows.write(json.dumps(row) + "\n")
            print(
                f"{file.stem}, seed {seed}: {way.criterion} {way.statistic} {way.allocation}"
                f"{' refit' * way.refit}: {time.perf_counter() - begun:.1f} s",
                file=sys.stderr,
                flush=True,
            )
    return file


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model folder, or demo")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument(
        "--text", type=Path, required=True, help="held-out text, of other documents"
    )
    parser.add_argument("--name", help="of the model in the results; by default its folder's")
    parser.add_argument("--out", type=Path, default=fidelity_report.FOLDER)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--eval-samples", type=int, default=64, help="held-out windows")
    parser.add_argument("--seq-len", type=int, default=256)
    return parser.parse_args(argv)


if __name__ == "__main__":
    print(run(parsed()))
