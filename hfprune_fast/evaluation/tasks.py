"""Tasks of lm-evaluation-harness: found by name, loaded with their data, or refused in one line.

No remote code runs: datasets 4 no longer runs dataset scripts, metrics that are code on the hub are
refused, and so are tasks that run what a model writes. A task file's own Python (named by
`!function`) runs: it is part of the harness or of the folder that the user gave.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

from hfprune_fast.config import TaskOptions
from hfprune_fast.console import say, to_path
from hfprune_fast.errors import ArgumentError, one_line, one_line_errors

PAPER = (
    *("hellaswag", "piqa", "arc_challenge", "arc_easy", "openbookqa", "boolq", "winogrande"),
    "wikitext",
)
_FEWSHOT_SEED = 1234  # the harness's own
_HUB_SECONDS = 5.0
_MAX_NAMED = 10
_READERS = ("json", "csv", "parquet", "text", "arrow")  # of data sets in local files


def check_harness() -> None:
    """Refuse in one line where lm-evaluation-harness is not installed."""
    try:
        import accelerate  # noqa: F401
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ArgumentError(
            f"tasks need lm-evaluation-harness ({one_line(error)}): "
            "pip install 'hfprune_fast[eval]'"
        ) from None


def load_tasks(options: TaskOptions) -> dict[str, Any]:
    """Return what the harness runs: {"tasks": {name: task}, "groups": ..., "group_map": ...}.

    Raises:
        ArgumentError: an unknown task, one whose data set is neither cached nor downloadable, one
            that would run foreign code, a task file that is not valid, or the harness is missing.
    """
    wanted = [name.strip() for name in (options.tasks or "").split(",") if name.strip()]
    if not wanted:
        raise ArgumentError("tasks must be names such as hellaswag,piqa, got none")
    check_harness()
    found = _find(wanted, options.include_path)
    with hub_code_refused(), _hub_probed(found), redirect_stdout(sys.stderr):
        loaded = _build(found)
    for name, task in loaded["tasks"].items():
        _check(name, task)
        # As the harness does it: a task that says 0 examples means it.
        own = task.get_config("num_fewshot")
        if options.num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=options.num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def seed_fewshot(loaded: dict[str, Any]) -> None:
    """Let every task draw the same examples again."""
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _find(wanted: list[str], include_path: str | None) -> dict[str, Any]:
    """Return the tasks that match the names and patterns, with the manager that loads each."""
    managers: list[Callable[[], Any]] = [_all_tasks]
    folder = None
    if include_path is not None:
        folder = to_path(include_path, "include_path").absolute()
        if not folder.is_dir():
            raise ArgumentError(f"include_path {include_path} is not a folder")
        own = _manager(folder, with_defaults=False)
        if own.all_groups:  # which may be of the harness's tasks
            own = _manager(folder, with_defaults=True)
        managers.insert(0, lambda: own)
    found: dict[str, Any] = {}
    names = [name for each in wanted for name in (PAPER if each == "paper" else (each,))]
    for name in names:
        for manager in managers:
            matches = manager().match_tasks([name])
            found |= {match: manager() for match in sorted(matches) if match not in found}
            if matches:
                break
        else:
            if folder is not None:
                _check_files(folder)
            near = difflib.get_close_matches(name, manager().all_tasks, n=4, cutoff=0.5)
            hint = f"near it: {', '.join(near)}" if near else "lm-eval ls tasks lists them"
            raise ArgumentError(f"no task {name}; {hint}; --include-path takes your own")
    return found


@cache
def _all_tasks() -> Any:  # reading fifteen thousand files takes seconds
    return _manager(None, with_defaults=True)


def _manager(folder: Path | None, *, with_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    with one_line_errors(f"include_path {folder}", ArgumentError):
        return TaskManager(include_path=folder, include_defaults=with_defaults)


def _check_files(folder: Path) -> None:
    """Name the task file that cannot be read; the harness skips it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(folder.glob("**/*.yaml")):
        with one_line_errors(f"{path} is not a valid task file", ArgumentError):
            load_yaml(path, resolve_func=False)


def _build(found: dict[str, Any]) -> dict[str, Any]:
    """Return the tasks with their data; those whose data are missing are named together."""
    built, missing = [], []
    for name, manager in found.items():
        try:
            built.append(manager._load_spec(name))
        except ConnectionError as error:  # the hub's and the data sets' own are among them
            missing.append((name, one_line(error)))
        except Exception as error:  # whatever a task file and its Python raise
            raise ArgumentError(f"task {name} cannot be loaded: {one_line(error)}") from error
    if missing:
        named = ", ".join(name for name, _ in missing[:_MAX_NAMED])
        more = f" and {len(missing) - _MAX_NAMED} more" if len(missing) > _MAX_NAMED else ""
        raise ArgumentError(
            f"no data set for {named}{more}: not in the cache, and the hub cannot be reached "
            f"({missing[0][1]}); run once where there is a network, or give tasks over files of "
            "your own with --include-path"
        )
    flat = [each for item in built for each in (item if isinstance(item, list) else [item])]
    with one_line_errors("tasks", ArgumentError):  # one that is in two groups
        return dict(manager.load(flat))


def _check(name: str, task: Any) -> None:
    """Refuse tasks that would run foreign code or need more than text."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ArgumentError(f"task {name} runs code that the model writes, which is never done")
    if getattr(task, "MULTIMODAL", False):
        raise ArgumentError(f"task {name} needs images or sound; only text is evaluated")
    unknown = [m for m, function in getattr(task, "_metric_fn_list", {}).items() if not function]
    if unknown and task.config.process_results is None:
        raise ArgumentError(
            f"task {name} has the metric {unknown[0]}, which the harness does not know; "
            "metrics that are code on the hub are not run"
        )


@contextmanager
def hub_code_refused() -> Iterator[None]:
    """Refuse metrics that the `evaluate` package would download and run as code."""
    import evaluate

    def refuse(path: str, *_: Any, **__: Any) -> None:
        raise ArgumentError(f"metric {path} is code on the hub, which is not run")

    load, evaluate.load = evaluate.load, refuse
    try:
        yield
    finally:
        evaluate.load = load


def _is_local(config: dict[str, Any]) -> bool:
    """Return whether the data of a task file are in local files."""
    has_address = "://" in str(config.get("dataset_kwargs"))
    return config.get("dataset_path") in _READERS and not has_address


@contextmanager
def _hub_probed(found: dict[str, Any]) -> Iterator[None]:
    """Go offline meanwhile if the hub does not answer: each data set would try for half a minute.

    Tasks over local files do not need it.
    """
    import datasets
    from huggingface_hub import constants, get_session

    configs = [manager.task_index[name].cfg or {} for name, manager in found.items()]
    offline = bool(constants.HF_HUB_OFFLINE) or all(map(_is_local, configs))
    if not offline:
        try:
            get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
        except Exception as error:  # of whichever library makes the requests
            say(f"the hub does not answer ({one_line(error)}); data sets are taken from the cache")
            offline = True
    kept = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    bars = datasets.are_progress_bars_disabled()
    if offline:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = kept
        if not bars:
            datasets.enable_progress_bars()
