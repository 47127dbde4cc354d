"""A checkpoint of a size where memory, time and interruptions show."""

from pathlib import Path

import pytest
from checkpoints import synthetic_checkpoint


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 Llama of 4 layers x 4096 neurons in shards, 210 MB."""
    return synthetic_checkpoint(
        tmp_path_factory.mktemp("large") / "model", hidden=1024, width=4096, layers=4, vocab=32000
    )
