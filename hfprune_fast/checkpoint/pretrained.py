"""What transformers reads of a model folder: its config and its tokenizer; never remote code."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hfprune_fast.checkpoint.carried import check_tokenizer_files
from hfprune_fast.console import library_hidden
from hfprune_fast.errors import CheckpointError, one_line_errors, refuse_pointer
from hfprune_fast.models.declared import family_type
from hfprune_fast.models.families import NON_UNIFORM
from hfprune_fast.models.registration import nonuniform_classes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What older versions of transformers wrote, which newer ones still read, and what classes read
# without declaring it.
_UNDECLARED = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"}
_UNDECLARED |= {"original_max_position_embeddings", "per_layer_config", "layer_types"}
_UNDECLARED |= {"head_dim", "global_head_dim", "num_global_key_value_heads"}
_UNDECLARED |= {"sliding_window", "sliding_window_pattern", "full_attention_interval"}
_UNDECLARED |= {"use_bidirectional_attention", "block_ff_dim", "tie_embedding"}


def load_config(folder: Path, config: Mapping[str, Any]) -> Any:
    """Return the transformers config of a parsed config.json, of what its own class declares.

    What every config may hold is left out: attention and other kernels that transformers would
    fetch and run, label names, outputs, dtypes.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if str(config["model_type"]).startswith(NON_UNIFORM):
        config_class, _ = nonuniform_classes(str(family_type(config)))
    else:
        config_class = CONFIG_MAPPING[config["model_type"]]
    other_names = config_class.attribute_map
    names = own_fields(config_class) | _UNDECLARED | {*other_names, *other_names.values()}
    with one_line_errors(f"{folder}/config.json is not a valid configuration"):
        made = config_class(
            **{name: _floats(config[name]) for name in sorted(names & config.keys())}
        )
    if isinstance(config.get("tokenizer_class"), str):
        made.tokenizer_class = config["tokenizer_class"]
    return made


def _floats(value: Any) -> Any:
    """Return a value of config.json, with the numbers that transformers tags as JSON lacks them."""
    if isinstance(value, list):
        return [_floats(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    if value.keys() == {"__float__"}:
        return float(value["__float__"])
    return {key: _floats(each) for key, each in value.items()}


def own_fields(config_class: type[Any]) -> set[str]:
    """Return the names that a family's config class declares beyond those of every config."""
    from transformers import PreTrainedConfig

    return {f.name for f in fields(config_class)} - {f.name for f in fields(PreTrainedConfig)}


@contextmanager
def _unmarked(folder: Path) -> Iterator[Path]:
    """Yield a folder of the same files whose config.json has no byte order mark.

    For large vocabularies transformers reads it again, as UTF-8 without one.
    """
    path = folder / "config.json"
    text = path.read_bytes() if path.is_file() else b""
    if not text.startswith(BOM_UTF8):
        yield folder
        return
    with TemporaryDirectory(prefix="hfprune-") as scratch:
        for other in folder.resolve().iterdir():
            (Path(scratch) / other.name).symlink_to(other)
        (Path(scratch) / path.name).unlink()
        (Path(scratch) / path.name).write_bytes(text.removeprefix(BOM_UTF8))
        yield Path(scratch)


def load_tokenizer(
    folder: Path, config: Any = None, vocab_size: int = 0
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder.

    Args:
        config: its transformers config. Without it transformers makes one of all that config.json
            says, so a folder that is not trusted needs it.
        vocab_size: of the model.

    Raises:
        CheckpointError: it cannot be loaded, or knows less than half of `vocab_size` tokens:
            transformers makes an empty one where files are missing. (Many vocabularies are padded.)
    """
    from transformers import AutoTokenizer

    check_tokenizer_files(folder)
    try:
        with (
            one_line_errors(f"{folder} has no tokenizer that can be loaded"),
            library_hidden(),
            _unmarked(folder) as read,
        ):
            tokenizer = AutoTokenizer.from_pretrained(
                read, config=config, trust_remote_code=False, local_files_only=True
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
