"""Every kernel on a GPU, at the sizes of real models, against float64 made on the same GPU."""

from collections.abc import Iterator

import pytest
import torch

from hfprune_fast.kernels._triton import INTERPRETED

_UNUSABLE = not torch.cuda.is_available() or INTERPRETED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker("gpu")
            item.add_marker(pytest.mark.filterwarnings("ignore:.*[Dd]eterministic"))
            reason = "needs a CUDA device, and TRITON_INTERPRET=0"
            item.add_marker(pytest.mark.skipif(_UNUSABLE, reason=reason))


@pytest.fixture(autouse=True)
def _fresh_device() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()
