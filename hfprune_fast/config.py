"""Every option once, as frozen dataclasses.

Functions take the fields of these classes as keyword arguments (`keyword_options`), `cli.py` makes
its flags from them, and records of a run are made of them. So a new option is one field here and
its use.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hfprune_fast.errors import ArgumentError
from hfprune_fast.kernels import BACKENDS

CRITERIA = ("entropy", "cross_entropy", "fisher", "activation")
DATA_FREE = ("magnitude", "random")
STATISTICS = ("l1", "l2", "fisher_mask", "act")
ALLOCATIONS = ("auto", "uniform", "global")
SELECTS = ("obs", "statistic")
OFFLOADS = ("auto", "none", "cpu", "disk")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2")
LAYOUTS = ("auto", "custom", "native", "padded")

DEFAULT_SEQ_LEN = 1024
TINY_MODEL = Path(__file__).parent / "tiny"  # the model that ships with the package
Result = TypeVar("Result")
Options = TypeVar("Options")


def _option(default: Any, text: str, *, choices: Sequence[str] = (), metavar: str = "") -> Any:
    """Return a dataclass field with what the command line and the docs say about it."""
    return field(
        default=default, metadata={"text": text, "choices": tuple(choices), "metavar": metavar}
    )


def _check_choices(options: Any) -> None:
    for each in fields(options):
        value, choices = getattr(options, each.name), each.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise ArgumentError(f"{each.name} must be one of {', '.join(choices)}, got {value!r}")
        if isinstance(each.default, bool) and not isinstance(value, bool):
            raise ArgumentError(f"{each.name} must be True or False, got {value!r}")


@dataclass(frozen=True)
class CalibrationOptions:
    """Which windows of a text are used."""

    samples: int | None = _option(128, "Samples to draw; None takes all of the text, in order.")
    seq_len: int | None = _option(
        None, f"Tokens a sample. [default: {DEFAULT_SEQ_LEN}, or the model's longest if less]"
    )
    seed: int = _option(0, "Which samples are drawn, and which tokens criterion fisher draws.")

    def __post_init__(self) -> None:
        for name in ("samples", "seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class RunOptions:
    """Where a model runs, and in how much memory."""

    device: str = _option("auto", "cpu, cuda, cuda:1, ...; auto is cuda where there is one.")
    dtype: str = _option(
        "auto",
        "Dtype to run in; auto is the checkpoint's own, float32 on a CPU slow in it.",
        choices=DTYPES,
    )
    attention: str = _option(
        "auto", "How attention runs; auto is sdpa where the family has it.", choices=ATTENTIONS
    )
    batch_size: int | None = _option(
        None, "Samples at once. [default: what suits the device and fits]"
    )
    offload: str = _option(
        "auto",
        "Where weights are: none keeps them on the device; cpu, in host memory, and disk, in the "
        "checkpoint, fetch them layer by layer; auto keeps them on the device if they fit.",
        choices=OFFLOADS,
    )
    memory_budget: str | None = _option(
        None, "Memory to use, such as 24GiB. [default: all that is free]", metavar="SIZE"
    )

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.batch_size is not None and self.batch_size < 1:
            raise ArgumentError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True)
class ScoringOptions:
    """How neurons are scored, whatever they are scored by."""

    backend: str | None = _option(
        None,
        "Kernels to score with. [default: HFPRUNE_BACKEND, else triton on a GPU, else torch]",
        choices=BACKENDS,
    )
    parity: bool = _option(False, "Round products and sums as the paper's code does.")
    resume: bool = _option(False, "Continue scoring that was interrupted.")
    save_seconds: float = _option(60.0, "How often the scores so far are saved, for resume.")

    def __post_init__(self) -> None:
        _check_choices(self)


@dataclass(frozen=True)
class Budget:
    """How much to remove, and from which layers: exactly one of the first three."""

    prune_ratio: float | None = _option(None, "Fraction of MLP neurons to remove, in [0, 1).")
    param_ratio: float | None = _option(None, "Fraction of ALL parameters to remove, in [0, 1).")
    intermediate_size: int | None = _option(None, "The (mean) MLP width to prune to.")
    round_to: int = _option(1, "Make widths multiples of this.")
    min_keep: float = _option(0.05, "Fraction of a layer's neurons that is kept at least.")
    protect: tuple[int, ...] = _option(
        (), "Layers that are not pruned, such as 0,1,31.", metavar="LAYERS"
    )

    @property
    def size(self) -> dict[str, float | int]:
        """The budgets that are given; `target_width` takes exactly one."""
        sizes = {name: getattr(self, name) for name in BUDGETS}
        return {name: value for name, value in sizes.items() if value is not None}


BUDGETS = ("prune_ratio", "param_ratio", "intermediate_size")


@dataclass(frozen=True)
class OutputOptions:
    """How a pruned checkpoint is written."""

    layout: str = _option(
        "auto",
        "How layers of different widths are written: custom (which auto is) needs this package or "
        "remote code to load, padded loads everywhere and is larger, native needs a transformers "
        "that builds the family by per_layer_config.",
        choices=LAYOUTS,
    )
    max_shard_size: str | int | None = _option(
        None, "Such as 5GB. [default: shards are kept]", metavar="SIZE"
    )
    verify: bool = _option(False, "Read the output back from disk and compare it.")
    force: bool = _option(False, "Replace an earlier output.")

    def __post_init__(self) -> None:
        _check_choices(self)


@dataclass(frozen=True)
class Recipe:
    """How neurons are chosen and what is done with the others: one switch each.

    The default recipe is the one that did best in bench/results/fidelity.
    """

    criterion: str = _option(
        "fisher", "What to score by; magnitude and random need no text.",
        choices=(*CRITERIA, *DATA_FREE),
    )  # fmt: skip
    select: str = _option(
        "obs",
        "Rank by obs, the cost of a removal when the others are refitted, or by a statistic.",
        choices=SELECTS,
    )
    statistic: str | None = _option(
        None, "Which one; l1 is the paper's. [default: the criterion's own]", choices=STATISTICS
    )
    allocation: str = _option(
        "auto",
        "uniform: one width for all layers; global: one ranking across them; auto: whichever of "
        "uniform, halfway and global is closest to the dense model on held-out calibration text.",
        choices=ALLOCATIONS,
    )
    refit: bool = _option(True, "Fit down_proj to the dense model by least squares.")

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.select == "obs" and self.criterion != "fisher":
            raise ArgumentError(
                f"select obs needs criterion fisher, got {self.criterion}; "
                "--select statistic ranks by it"
            )
        if self.select == "obs" and self.statistic is not None:
            raise ArgumentError(f"select obs ranks by no statistic, got {self.statistic}")
        if self.allocation == "auto" and not self.refit:
            raise ArgumentError(
                "allocation auto is measured after a refit; choose another or refit"
            )

    @property
    def ranks_by(self) -> str | None:
        """The name of the statistic in the table; None is the criterion's default."""
        return "obs" if self.select == "obs" else self.statistic


def _all_optional(group: type[Any]) -> Any:
    """Return a class of the same fields that are all None by default."""
    return make_dataclass(
        f"{group.__name__}Changes",
        [(f.name, f.type, field(default=None, metadata=f.metadata)) for f in fields(group)],
        frozen=True,
    )


# Fields of a recipe that replace those of a preset where they are not None.
RecipeChanges: Any = _all_optional(Recipe)

PRESETS = {
    "default": Recipe(),
    "paper": Recipe("entropy", "statistic", "l1", "uniform", refit=False),
}


def resolve_recipe(
    recipe: str | Recipe,
    changes: Mapping[str, Any],
    scored: tuple[tuple[str, ...], bool] | None = None,
    *,
    has_text: bool = True,
) -> Recipe:
    """Return a recipe with some fields changed, and those left open made to fit them.

    The default recipe ranks by what the scores hold, by a statistic if a criterion without removal
    costs or a statistic is given, and neither refits nor measures allocations without text.

    Args:
        recipe: a name in PRESETS, or a recipe, which is taken as it is but for `changes`.
        changes: fields of Recipe; None leaves one open.
        scored: of existing scores, their criteria, and whether they have removal costs.
        has_text: whether there is a calibration text.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if isinstance(recipe, Recipe):
        return Recipe(**{**asdict(recipe), **given})
    if recipe not in PRESETS:
        raise ArgumentError(f"recipe must be one of {', '.join(PRESETS)}, got {recipe!r}")
    values = asdict(PRESETS[recipe])
    if recipe == "default" and scored is not None:
        values["criterion"] = scored[0][0]
    values["criterion"] = given.get("criterion", values["criterion"])
    has_costs = values["criterion"] == "fisher" and (scored is None or scored[1])
    if not has_costs or "statistic" in given:
        values["select"] = "statistic"
    values["refit"] = given.get("refit", values["refit"] and has_text)
    if values["allocation"] == "auto" and not values["refit"]:
        values["allocation"] = "uniform"
    return Recipe(**{**values, **given})


def keyword_options(
    **groups: type[Any],
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function take options flat: `@keyword_options(run=RunOptions)` makes f(device="cpu").

    The function gets each group in the parameter of that name; its signature and docstring show the
    fields. A name that is neither a field nor a parameter is a TypeError.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        signature = inspect.signature(function)
        own = [p for name, p in signature.parameters.items() if name not in groups]
        options = [each for group in groups.values() for each in fields(group)]
        keyword = inspect.Parameter.KEYWORD_ONLY
        flat = [
            inspect.Parameter(o.name, keyword, default=o.default, annotation=o.type)
            for o in options
        ]

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> Result:
            made = {name: take_options(group, given) for name, group in groups.items()}
            return function(*args, **given, **made)

        call.__signature__ = signature.replace(parameters=[*own, *flat])  # type: ignore[attr-defined]
        lines = [f"    {o.name}: {o.metadata['text']}" for o in options]
        call.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Options:", *lines])
        return call

    return decorate


def take_options(group: type[Options], given: dict[str, Any]) -> Options:
    """Take the keyword arguments that are fields of a group of options out, and make the group."""
    names = [each.name for each in fields(group) if each.name in given]  # type: ignore[arg-type]
    return group(**{name: given.pop(name) for name in names})


def field_types(group: type[Any]) -> dict[str, Any]:
    """Return the type of each field, `int` for `int | None`."""
    hints = typing.get_type_hints(group)
    return {name: (*typing.get_args(hint), hint)[0] for name, hint in hints.items()}
