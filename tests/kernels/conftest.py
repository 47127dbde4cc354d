"""Kernel tests run each path, with outputs that hold NaN before anything is written to them."""

from collections.abc import Iterator

import pytest
import torch
from paths import BACKENDS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Masked lanes of the interpreter compute -inf · 0 and exp(89) without harm.
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"))


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """torch.empty and its kin return NaN, which a kernel that leaves a gap then shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
