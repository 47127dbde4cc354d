"""What follows a pruning: the measurement on held-out text, the report, and what to say of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hfprune_fast.checkpoint.ours import real
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.config import (
    CalibrationOptions,
    OutputOptions,
    Recipe,
    ReportOptions,
    RunOptions,
)
from hfprune_fast.console import say, to_path
from hfprune_fast.data.batches import TokenData
from hfprune_fast.engine.distributed import Processes
from hfprune_fast.engine.run_log import RunLog
from hfprune_fast.errors import OutputError
from hfprune_fast.evaluation.changes import ChangedToken
from hfprune_fast.pruning.checkpoint_fidelity import held_out_windows, measure
from hfprune_fast.pruning.experts import ExpertBudget
from hfprune_fast.pruning.record import add_to_record
from hfprune_fast.pruning.reporting import check_report, write_report
from hfprune_fast.pruning.selection import WidthBudget
from hfprune_fast.scoring.table import ImportanceTable


@dataclass(frozen=True)
class AfterPruning:
    """What is measured and drawn once the checkpoint is whole; checked before the work."""

    source: ModelSource
    out: Path
    run: RunOptions
    force: bool
    data: TokenData | None
    report: Path | None
    log: RunLog = field(default_factory=RunLog)

    @classmethod
    def of(
        cls,
        source: ModelSource,
        out: Path,
        calibration: str | Path | None,
        sampling: CalibrationOptions,
        run: RunOptions,
        output: OutputOptions,
        options: ReportOptions,
        processes: Processes,
    ) -> AfterPruning:
        """Read the held-out text and refuse a report that cannot be written.

        The first process of torchrun alone has anything to do afterwards.
        """
        if processes.rank > 0:
            options = ReportOptions()
        report = None if options.report is None else to_path(options.report, "report")
        if report is not None:
            texts = [Path(text) for text in (calibration, options.text) if text is not None]
            there = [text for text in texts if text.exists()]
            check_report(report, [source.folder, *there], force=output.force)
            page, folder = real(report), real(out)
            if page == folder or page in folder.parents or folder in page.parents:
                raise OutputError(
                    f"report {report} is, is inside or is above out {out}; choose a place beside it"
                )
        whole = replace(sampling, samples=None)  # which are the calibration's
        data = None if options.text is None else held_out_windows(options.text, source, whole)
        return cls(source, out, run, output.force, data, report)

    def finish(self, table: ImportanceTable, progress: bool) -> dict[str, Any]:
        """Measure the checkpoint and write the report, as requested; return what was made."""
        if self.data is None and self.report is None:
            return {}
        made: dict[str, Any] = {}
        with self._output_stays():
            measurement, changed = None, list[ChangedToken]()
            if self.data is not None:
                with self.log.stage("measuring"):
                    measurement, changed = measure(
                        self.source, self.out, self.data, self.run, progress
                    )
                add_to_record(self.source, self.out, {"fidelity": measurement.record()})
                made["fidelity"] = asdict(measurement.fidelity)
            if self.report is not None:
                write_report(
                    self.report, self.out, table=table, measurement=measurement, changed=changed,
                    log=self.log, force=self.force,
                )  # fmt: skip
                made["report"] = str(self.report)
        return made

    @contextmanager
    def _output_stays(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # Ctrl-C too
            say(f"{self.out} is complete; measuring it or writing its report failed")
            raise


def say_what_could_be_closer(
    achieved: dict[str, Any],
    widths: WidthBudget | ExpertBudget,
    recipe: str | Recipe,
    calibration: object,
) -> None:
    """Say where the result differs from the request, and what would make it closer."""
    if recipe == "default" and calibration is None:
        say("nothing was refitted; with --calibration as well it stays closer to the dense model")
    if isinstance(widths, ExpertBudget):
        removed = 1 - achieved["expert_width"] / achieved["dense_expert_width"]
        if abs(removed - widths.ratio) > 0.005:
            say(
                f"{removed:.1%} of an expert's neurons are removed, {widths.ratio:.1%} were "
                f"requested: {achieved['expert_width']} is the nearest width that suits"
            )
        return
    if achieved.get("layout") == "padded":
        return  # its zeros count as neurons
    if not widths.protect and abs(achieved["prune_ratio"] - widths.ratio) > 0.005:
        say(
            f"{achieved['prune_ratio']:.1%} of the neurons are removed, {widths.ratio:.1%} were "
            f"requested: widths are multiples of {widths.step}; --round-to 1 is exact"
        )
