"""ImportanceTable: every statistic of every neuron, with its provenance; save and load.

The scores file is a safetensors file of the statistics, (L, F) float64 each, with a JSON header;
docs/scores-file.md describes it. Row l, column j is neuron j of layer l; F is the widest layer's,
and the row of a narrower layer ends in zeros. For a model with experts a statistic is (N,): the
neurons of each layer's own MLP and of its experts, one after the other, as `ImportanceTable.sites`
says; of experts, (E,) of all experts of all layers.

    CRITERION.l1, .l2,     sums over the calibration of x = gradient times act (kernels/taylor),
      .fisher_mask         the gradient being that of the criterion (scoring/passes)
    act, down_norm         Σa², and the 2-norm of the neuron's down_proj column
    obs                    the cost of removing it when the others are refitted (scoring/obs), nats
    weight_norm, uniform   2-norm of its weights; a random number
    CRITERION.expert_taylor  Σ|<gradient, w·y>| of an expert's output y, w its routing weight
    expert_reap            the mean of w·‖y‖ over the tokens that chose it
    expert_count, _mass    how many tokens chose it, and the sum of their w
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hfprune_fast.checkpoint.atomic import write_whole
from hfprune_fast.checkpoint.folder import is_deeper
from hfprune_fast.checkpoint.ours import SCORES, real
from hfprune_fast.checkpoint.source import ModelSource
from hfprune_fast.console import say, to_path
from hfprune_fast.errors import ArgumentError, ScoresFileError, one_line, shown
from hfprune_fast.models.sites import SiteKey, site_slices, table_shape
from hfprune_fast.models.spec import ModelSpec
from hfprune_fast.scoring.criteria import CRITERIA
from hfprune_fast.scoring.moments import column_norms

DEFAULT_STATISTIC = {name: criterion.default_statistic for name, criterion in CRITERIA.items()}
DEFAULT_STATISTIC |= {"magnitude": "weight_norm", "random": "uniform"}
_OF_A_CRITERION = ("l1", "l2", "fisher_mask")
_OF_EXPERTS = ("expert_reap", "expert_count", "expert_mass")
_OF_ALL = ("act", "down_norm", "obs", "weight_norm", "uniform")
_VERSION = 3
_SPEC = [f.name for f in fields(ModelSpec)]
_MAY_BE_0 = {f.name for f in fields(ModelSpec) if f.default == 0}


@dataclass(frozen=True, eq=False)  # comparing tensors gives no single bool
class ImportanceTable:
    """Statistics of all neurons, (L, F) or (N,) float64; the model's size; their provenance.

    A statistic is an attribute as well: `table.act`, or `table.l1`, of the first criterion.
    """

    statistics: Mapping[str, Tensor]
    model: ModelSpec
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        for name, tensor in self.statistics.items():
            criterion, _, statistic = name.rpartition(".")
            of_experts = name in _OF_EXPERTS or (criterion and statistic == "expert_taylor")
            if not (of_experts or (statistic in _OF_A_CRITERION and criterion) or name in _OF_ALL):
                raise ScoresFileError(f"{name} is not the name of a statistic")
            shape = (sum(self.model.experts),) if of_experts else table_shape(self.model.sites)
            if tensor.shape != shape or tensor.dtype != torch.float64:
                raise ScoresFileError(
                    f"{name} must be {shape} float64, got {tuple(tensor.shape)} {tensor.dtype}"
                )
            if not bool(tensor.isfinite().all()) or bool((tensor < 0).any()):
                raise ScoresFileError(f"{name} holds NaN, inf or negative numbers")

    def __getattr__(self, name: str) -> Tensor:
        if name not in _OF_A_CRITERION + _OF_ALL:
            raise AttributeError(name)
        found = self.statistics.get(f"{self.criteria[0]}.{name}", self.statistics.get(name))
        if found is None:
            raise AttributeError(f"these scores have no {name}, only {', '.join(self.statistics)}")
        return found

    @property
    def sites(self) -> dict[SiteKey, slice]:
        """Where each layer's own MLP, and each (layer, expert), has its neurons in a flat table."""
        return site_slices(self.model.sites)

    def of(self, statistic: str, site: SiteKey) -> Tensor:
        """Return one MLP's values, (width,), of a statistic by its full name."""
        return self.statistics[statistic].flatten()[self.sites[site]]

    def experts(self, statistic: str) -> Tensor:
        """Return (X, E) values of a statistic of experts, of the X layers that have E of them."""
        return self.statistics[statistic].view(-1, self.model.num_experts)

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria of these scores; the first is the default."""
        return tuple(self.provenance.get("criteria", ("entropy",)))

    def importance(self, statistic: str | None = None, criterion: str | None = None) -> Tensor:
        """Return the (L, F) or (N,) float64 importance by one statistic; higher = keep.

        By default the criterion is the table's first and the statistic that of DEFAULT_STATISTIC.
        The importance is the sum or number itself, but for `act`: sqrt(Σa²) times the norm of the
        neuron's down_proj column, which is how much of the MLP's output goes through it.
        """
        criterion = criterion or self.criteria[0]
        if criterion not in self.criteria:
            raise ArgumentError(
                f"these scores are by {', '.join(self.criteria)}, not by {criterion}; score again"
            )
        statistic = statistic or DEFAULT_STATISTIC[criterion]
        if statistic == "act" and "act" in self.statistics:
            return self.act.sqrt() * self.down_norm
        if not isinstance(statistic, str):
            raise ArgumentError(f"statistic must be text or None, got {shown(statistic)}")
        name = f"{criterion}.{statistic}" if statistic in _OF_A_CRITERION else statistic
        if name not in self.statistics:
            names = [name.removeprefix(f"{criterion}.") for name in self.statistics]
            known = [name for name in names if "." not in name and name != "down_norm"]
            raise ArgumentError(
                f"statistic must be one of {', '.join(known)} "
                f"(what these scores have by {criterion}), got {statistic!r}"
            )
        return self.statistics[name]

    def save(self, file: str | Path, may_replace: Callable[[Path], bool] = lambda _: True) -> None:
        """Write the scores file; it appears under its name only when whole.

        What is at that name then is replaced if `may_replace` of it, else it stays: an OutputError.
        """
        model, provenance = asdict(self.model), self.provenance
        header = {"format_version": _VERSION, "model": model, "provenance": provenance}
        # One key, because safetensors writes several in an order that changes from run to run.
        metadata = {SCORES: json.dumps(header)}
        tensors = {name: tensor.contiguous() for name, tensor in self.statistics.items()}
        write_whole(to_path(file, "file"), save(tensors, metadata), may_replace)

    @classmethod
    def load(cls, file: str | Path) -> ImportanceTable:
        """Read a scores file, or raise ScoresFileError."""
        path = to_path(file, "file")
        if not path.is_file():
            raise ScoresFileError(f"no scores file {path}; make one with `hfprune score`")
        expected = "expected one written by `hfprune score`"
        try:
            with safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
                if SCORES not in metadata:
                    raise ScoresFileError(
                        f"{path} is a safetensors file but holds no scores; {expected}"
                    )
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            header = json.loads(metadata[SCORES])
            if header["format_version"] != _VERSION:
                raise ScoresFileError(
                    f"{path} has scores of format version {header['format_version']!r:.60}; "
                    f"this release reads version {_VERSION}: score again"
                )
            provenance = dict(header["provenance"])
            _check_provenance(provenance, tensors)
            entries = max((tensor.numel() for tensor in tensors.values()), default=0)
            table = cls(tensors, _spec(header["model"], entries), provenance)
            for criterion in table.criteria:
                table.importance(criterion=criterion)
        except ScoresFileError:
            raise
        except (
            *(SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError),
            AttributeError,
        ) as error:
            raise ScoresFileError(
                f"{path} is not a scores file, or is damaged ({one_line(error)}); {expected}"
            ) from None
        return table


def _spec(header: dict[str, Any], entries: int) -> ModelSpec:
    """Return the model's spec, or raise over a field that it cannot have.

    Args:
        entries: of the largest statistic; no more layers, and no more experts, are made.
    """
    values = {name: header[name] for name in _SPEC}
    layers, widest = values["num_layers"], values["intermediate_size"]
    has_experts = bool(values["experts"])
    may_be_0 = _MAY_BE_0 | ({"intermediate_size"} if has_experts else set())
    for name, value in values.items():
        if name == "model_type":
            ok = isinstance(value, str)
        elif name == "mlp_widths":
            ok = value is None or _are_sizes(value, layers, int(not has_experts), widest)
        elif name == "experts":
            ok = value == [] or _are_sizes(value, layers, 0, 1 << 16)
            ok = ok and len({count for count in value if count}) <= 1
            ok = ok and sum(value) <= entries
            values[name] = tuple(value) if ok else ()
        else:
            ok = type(value) is int and value >= (name not in may_be_0)
        if name == "num_layers":
            ok = ok and value <= entries
        if not ok:
            raise ValueError(f"{name} is {value!r:.60}")
    return ModelSpec(**values)


def _are_sizes(value: Any, number: Any, least: int, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == number
        and all(type(size) is int and least <= size <= most for size in value)
    )


def _check_provenance(provenance: dict[str, Any], statistics: Mapping[str, Tensor]) -> None:
    criteria = provenance.get("criteria", ["entropy"])
    if (
        not isinstance(criteria, list)
        or not criteria
        or not set(criteria) <= set(DEFAULT_STATISTIC)
    ):
        raise ValueError(f"criteria is {criteria!r:.60}")
    if is_deeper(provenance, 8):
        raise ValueError("its provenance is nested more than 8 levels deep")
    needs_norms = "act" in statistics or provenance.get("model_fingerprint") is None
    if needs_norms and "down_norm" not in statistics:
        raise ValueError("it has no down_norm")


def check_table(table: ImportanceTable, source: ModelSource) -> None:
    """Refuse a table that was scored on another model."""
    differing = [
        f"{key} {theirs!s:.60}, not {ours}"
        for key in _SPEC
        if (theirs := getattr(table.model, key)) != (ours := getattr(source.spec, key))
    ]
    if differing:
        raise ScoresFileError(
            f"the scores are of another model than {source.name}: {'; '.join(differing)}"
        )
    scored = table.provenance.get("model_fingerprint")
    if scored is not None:
        same = scored == source.fingerprint
    else:
        # Scored in memory, perhaps in another dtype, which moves a norm by its rounding at most.
        site = list(source.spec.sites)[-1]
        norms = column_norms(source.down_weight(site))
        same = torch.allclose(norms, table.of("down_norm", site), rtol=2**-8)
    if not same:
        raise ScoresFileError(
            f"the scores are of another model than {source.name}: same shape, other weights "
            f"(they are of {table.provenance.get('model', 'a model in memory')!s:.100})"
        )


@contextmanager
def saved_on_failure(table: ImportanceTable, out: Path) -> Iterator[None]:
    """Save the table in a file of its own if what runs inside fails, and say where.

    Hours of scoring must not be lost to a full disk or a late Ctrl-C: the folder of `out`, the
    temporary and the home folder are tried in turn. The error that led here stays the one raised.
    """
    try:
        yield
    except BaseException:  # Ctrl-C too
        say(_rescued(table, out))
        raise


def _rescued(table: ImportanceTable, out: Path) -> str:
    """Save the table where there is room, and return a line about it."""
    name, reasons = f"hfprune-scores-{uuid.uuid4().hex[:8]}.safetensors", []
    places: list[Callable[[], Path]]
    places = [lambda: out.parent, lambda: Path(tempfile.gettempdir()), Path.home]
    for place in places:
        try:
            folder = real(place())
            if folder.is_dir():
                table.save(folder / name)
                return f"the scores are saved in {folder / name}"
        except Exception as error:  # full, read-only, not there: what led here is what is raised
            reasons.append(one_line(error))
    return f"the scores are lost: they could not be saved either ({'; '.join(reasons)})"
