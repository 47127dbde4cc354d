"""What transformers reads of a model folder: its config and its tokenizer; never remote code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfprune_fast.errors import CheckpointError, is_out_of_memory, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_config(folder: Path) -> Any:
    """Return the transformers config of a folder."""
    from transformers import AutoConfig

    with one_line_errors(f"{folder}/config.json is not a valid configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder."""
    from transformers import AutoTokenizer

    with one_line_errors(f"{folder} has no tokenizer that can be loaded"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn what transformers raises over a bad folder into one line."""
    try:
        yield
    except Exception as error:  # it raises a dozen classes, some of them its dependencies'
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{what}: {one_line(error)}") from error
