"""What transformers reads of a model folder: its config and its tokenizer; never remote code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfprune_fast.console import library_hidden
from hfprune_fast.errors import CheckpointError, one_line_errors, refuse_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_config(folder: Path) -> Any:
    """Return the transformers config of a folder."""
    from transformers import AutoConfig

    with one_line_errors(f"{folder}/config.json is not a valid configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(folder: Path, vocab_size: int = 0) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder.

    Raises:
        CheckpointError: it cannot be loaded, or knows less than half of `vocab_size` tokens:
            transformers makes an empty one where files are missing. (Many vocabularies are padded.)
    """
    from transformers import AutoTokenizer

    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is a pipe or a device, not a file")
    try:
        with one_line_errors(f"{folder} has no tokenizer that can be loaded"), library_hidden():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            if 2 * len(tokenizer) >= vocab_size:
                return tokenizer
            raise CheckpointError(
                f"the tokenizer of {folder} knows {len(tokenizer)} of the model's {vocab_size} "
                "tokens; its files (tokenizer.json, tokenizer.model, vocab.json, ...) are missing, "
                "damaged or another model's: copy those of the model that this one was trained from"
            )
    except CheckpointError:
        for path in sorted(folder.iterdir()):
            if path.is_file():
                refuse_pointer(path, CheckpointError)
        raise
