"""Every kernel on a GPU, at the sizes of real models, against float64 made on the same GPU.

The rule is that of `tests/helpers/tolerances.py`: error <= 2 x plain torch's in the same dtype + a
stated floor. It applies to whole rows or sums and, so that no single entry can hide in a row, to
every entry. Memory that an operation allocates holds NaN before a kernel writes it.
"""

from collections.abc import Iterator

import pytest
import torch

from hfprune_fast.kernels._triton import INTERPRETED

REASON = (
    "needs a CUDA device"
    if not torch.cuda.is_available()
    else "kernels are interpreted here; set TRITON_INTERPRET=0"
    if INTERPRETED
    else None
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" not in item.path.as_posix():
            continue
        item.add_marker("gpu")
        item.add_marker(pytest.mark.filterwarnings("ignore:.*[Dd]eterministic"))
        if REASON is not None:
            item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(autouse=True)
def _fresh_device() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()
