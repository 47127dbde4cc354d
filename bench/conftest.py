"""How the suites run: at which scale, which providers, and where their rows go.

    .venv/bin/pytest bench --small --rows DIR      DIR/<machine>-<date>.json and .md

`--tiny` rehearses: tiny shapes, and Triton's kernels in its interpreter if TRITON_INTERPRET=1.
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Every folder of bench/, and not bench/ itself, where `kernels` would be taken for the package of
# that name that transformers looks for. pytest does not do it, with its importlib mode.
sys.path[:0] = map(str, Path(__file__).parent.glob("*/"))

ROWS = pytest.StashKey[list[dict[str, Any]]]()
RESULT = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    option = parser.getgroup("hfprune_fast's suites").addoption
    option("--small", action="store_const", dest="scale", const="small",
           help="few tokens; without a GPU the default")  # fmt: skip
    option("--tiny", action="store_const", dest="scale", const="tiny", help="a rehearsal")
    option("--rows", type=Path, metavar="DIR", help="write the result file there")
    option("--rows-suffix", default="", help="what its name ends with")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("rows") is not None:
        _check_rows(config)  # before torch is imported, which takes seconds
    import torch

    config.stash[ROWS] = []
    config.option.scale = config.option.scale or ("full" if torch.cuda.is_available() else "small")
    if not torch.cuda.is_available():
        torch.set_num_threads(2)
    if config.getoption("rows") is not None:
        from records import described

        if torch.cuda.is_available():
            raise pytest.UsageError("result files of a GPU are made by bench/gpu/gpu_check.py")
        config.stash[RESULT] = described()  # of the commit that is measured, not of a later one


def _check_rows(config: pytest.Config) -> None:
    from records import RESULTS

    folder, part = config.option.rows, config.option.keyword or config.option.scale == "tiny"
    if part and folder.resolve() == RESULTS and not config.option.rows_suffix:
        raise pytest.UsageError("--rows bench/results is for whole runs; give a --rows-suffix")
    if folder.exists() and not folder.is_dir():
        raise pytest.UsageError(f"--rows must be a folder, got the file {folder}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of `case` and `provider` for every spec of its module and all its providers."""
    from shapes import specs_of

    if "provider" in metafunc.fixturenames:
        cases = metafunc.module.CASES
        pairs = [
            pytest.param(spec, name, id=f"{spec}, {name}")
            for spec in specs_of(cases, metafunc.config.getoption("scale"))
            for name in cases[spec.op].PROVIDERS
        ]
        metafunc.parametrize(("case", "provider"), pairs, indirect=["case"], scope="module")


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Any:
    """The case of a spec, one for all its providers and one at a time."""
    gc.collect()
    return request.module.CASES[request.param.op](request.param)


@pytest.fixture
def scale(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("scale")  # type: ignore[no-any-return]


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """Put a row into the result file."""
    return request.config.stash[ROWS].append


@pytest.fixture
def measure(benchmark: Any, report: Callable[..., None]) -> Callable[..., None]:
    """Measure a provider of a case, if it can run and is right."""
    from case import OUT_OF_MEMORY, measured

    def measure(case: Any, provider: str) -> None:
        benchmark.group = str(case.spec)
        row = measured(case, provider, benchmark)
        report(row)
        reason = row.get("skipped", row.get("failed"))
        if "skipped" in row or reason == OUT_OF_MEMORY:
            pytest.skip(reason)
        if reason:
            pytest.fail(reason, pytrace=False)

    return measure


@pytest.fixture
def checkpoint_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for gigabytes, which pytest would keep."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    folder, rows = config.getoption("rows"), config.stash[ROWS]
    if folder is None or not rows:
        return
    import records
    from meter import ceilings
    from report import markdown

    result = {**config.stash[RESULT], "ceilings": ceilings(config.getoption("scale")), "rows": rows}
    path = records.write(result, folder, config.getoption("rows_suffix"))
    path.with_suffix(".md").write_text(markdown(records.read(path)), encoding="utf-8")
    print(f"\n{path} and .md; `python bench/reporting/report.py` brings docs/ up to date")
