"""Every option once, as frozen dataclasses.

Functions take the fields of these classes as keyword arguments (`keyword_options`), `cli.py` makes
its flags from them, and records of a run are made of them. So a new option is one field in one of
these files and its use.
"""

from pathlib import Path

from hfprune_fast.config.pruning import (
    ALLOCATIONS,
    BUDGETS,
    CRITERIA,
    DATA_FREE,
    EXPERT_SCORES,
    MEASURED_ALLOCATIONS,
    PRESETS,
    SELECTS,
    STATISTICS,
    Budget,
    Recipe,
    RecipeChanges,
)
from hfprune_fast.config.results import (
    EXPORTS,
    LAYOUTS,
    RECOVERY_LOSSES,
    TEACHERS,
    TRAINED,
    OutputOptions,
    RecoveryOptions,
    ReportOptions,
)
from hfprune_fast.config.running import (
    ATTENTIONS,
    DEFAULT_SEQ_LEN,
    DTYPES,
    OFFLOADS,
    REFIT_TOKENS,
    CalibrationOptions,
    PruningCalibration,
    RunOptions,
    ScoringOptions,
    TaskOptions,
)

TINY_MODEL = Path(__file__).parents[1] / "tiny"  # the model that ships with the package

__all__ = [
    "ALLOCATIONS",
    "ATTENTIONS",
    "BUDGETS",
    "CRITERIA",
    "DATA_FREE",
    "DEFAULT_SEQ_LEN",
    "DTYPES",
    "EXPERT_SCORES",
    "EXPORTS",
    "LAYOUTS",
    "MEASURED_ALLOCATIONS",
    "OFFLOADS",
    "PRESETS",
    "RECOVERY_LOSSES",
    "REFIT_TOKENS",
    "SELECTS",
    "STATISTICS",
    "TEACHERS",
    "TINY_MODEL",
    "TRAINED",
    "Budget",
    "CalibrationOptions",
    "OutputOptions",
    "PruningCalibration",
    "Recipe",
    "RecipeChanges",
    "RecoveryOptions",
    "ReportOptions",
    "RunOptions",
    "ScoringOptions",
    "TaskOptions",
]
