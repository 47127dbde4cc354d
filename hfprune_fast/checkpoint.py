"""A model folder on disk: found, read without trust, and loaded whole or not at all.

Only safetensors are read; nothing is ever unpickled and no code that came with a model is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hfprune_fast.architectures import ModelSize, family_of, parts_of
from hfprune_fast.errors import ArgumentError, CheckpointError, HFPruneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY_MODEL = Path(__file__).parent / "tiny"

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# What `from_pretrained` needs; nothing else is downloaded.
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
# Buffers that old LLaMA checkpoints carry and transformers computes itself.
_IGNORED_TENSOR = re.compile(r".*rotary_emb\.inv_freq")
_FINGERPRINT_ELEMENTS = 4096


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def find_model(model: str | Path, *, config_only: bool = False) -> Path:
    """Return the folder of a model given as a folder, as `demo`, or by its hub name.

    A folder of that name comes first, then `demo` (the model that ships with this package), then
    the hub, of which only safetensors, tokenizer and configuration are downloaded.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"model {model} is a file; expected a model folder or a hub name")
    if str(model) == "demo":
        return TINY_MODEL
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(model)):
        raise CheckpointError(f"no model folder {model}, and that is not a hub name either")
    from huggingface_hub import snapshot_download

    patterns = ["config.json"] if config_only else list(_HUB_FILES)
    try:
        return Path(snapshot_download(str(model), allow_patterns=patterns))
    except Exception as error:
        # Offline, unknown, private and gated repositories each have a class of their own.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"no model folder {model}, and the hub says: {reason}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of a model folder and refuse what this package cannot prune."""
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} has no config.json; expected a model folder as save_pretrained writes it"
        )
    config = read_json_object(folder / "config.json")
    family_of(config)
    if "quantization_config" in config:
        method = (config["quantization_config"] or {}).get("quant_method", "unknown method")
        raise CheckpointError(
            f"{folder} is quantised ({method}), so its neurons cannot be cut; "
            "prune the unquantised checkpoint and quantise the result"
        )
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that must hold an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def model_size(folder: Path) -> ModelSize:
    """Count parameters from config.json alone, through a model on the meta device."""
    config = build_config(folder)
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), _one_line_errors(f"{folder}/config.json does not make a model"):
        model = AutoModelForCausalLM.from_config(config)
    return model_size_of(model)


def model_size_of(model: PreTrainedModel) -> ModelSize:
    """Count the parameters of a model in memory (tied ones once)."""
    mlps = parts_of(model).mlps
    mlp = mlps[0]
    width, hidden = mlp.gate.weight.shape
    biases = sum(linear.bias is not None for linear in (mlp.gate, mlp.up))
    return ModelSize(
        model_type=str(model.config.model_type),
        num_layers=len(mlps),
        hidden_size=hidden,
        intermediate_size=width,
        total_params=sum(p.numel() for p in model.parameters()),
        linear_params=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)),
        params_per_neuron=3 * hidden + biases,
    )


def build_config(folder: Path) -> Any:
    """Return the transformers config of a folder that `read_config` accepts."""
    read_config(folder)
    from transformers import AutoConfig

    with _one_line_errors(f"{folder}/config.json is not a valid configuration"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in the order of its index."""
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).exists():
        names = sorted(set(_weight_map(folder).values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{folder / _INDEX} names a file outside its folder: {name}")
            if not (folder / name).exists():
                raise CheckpointError(
                    f"{folder} lacks the shard {name} that its index names; download it again"
                )
        return [folder / name for name in names]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"{folder} has only pickled weights (.bin/.pth), which are never opened here; use a "
            "safetensors revision, or save it again with save_pretrained where you trust the file"
        )
    raise CheckpointError(f"{folder} has neither {_WEIGHTS} nor {_INDEX}")


def _weight_map(folder: Path) -> Mapping[str, str]:
    weight_map = read_json_object(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder / _INDEX} has no weight_map of tensor names to files")
    return weight_map


def tensor_headers(folder: Path) -> dict[str, TensorInfo]:
    """Read the headers of all shards; the data are not read, but their place is checked."""
    headers: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        with open_tensors(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is no mapping
                if name in headers:
                    raise CheckpointError(
                        f"tensor {name} is both in {headers[name].file} and in {path.name}"
                    )
                view = tensors.get_slice(name)
                headers[name] = TensorInfo(path.name, view.get_dtype(), tuple(view.get_shape()))
    if (folder / _INDEX).exists() and not (folder / _WEIGHTS).exists():
        for name in sorted(set(_weight_map(folder)) - set(headers)):
            raise CheckpointError(f"tensor {name} is in the index of {folder} but in no shard")
    return headers


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, mapped; damage becomes one line that names the file."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); download it again"
        ) from None


def fingerprint(folder: Path) -> str:
    """Return a sha256 over names, dtypes, shapes and a sample of the data of every tensor.

    The sample is the first and the last rows (about 4096 elements each), so that it costs
    milliseconds for a checkpoint of any size and still tells a fine-tuned sibling apart.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with open_tensors(path) as tensors:
            for name in sorted(tensors.keys()):
                view = tensors.get_slice(name)
                shape = tuple(view.get_shape())
                digest.update(f"{name} {view.get_dtype()} {shape}\n".encode())
                for sample in _sample(tensors, view, name, shape):
                    digest.update(sample.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sample(tensors: Any, view: Any, name: str, shape: tuple[int, ...]) -> list[torch.Tensor]:
    if len(shape) == 0 or 0 in shape:
        return [tensors.get_tensor(name)]
    row_elements = 1
    for size in shape[1:]:
        row_elements *= size
    rows = min(shape[0], max(1, _FINGERPRINT_ELEMENTS // row_elements))
    return [view[:rows], view[shape[0] - rows :]]


def load_model(folder: Path, *, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Load a checkpoint for inference, or raise CheckpointError; never half of it.

    Args:
        folder: a model folder.
        dtype: "auto" (the checkpoint's own; float32 for float16, whose gradients would underflow)
            or "float32", "bfloat16", "float64".
        device: "auto" (cuda where there is one) or any torch device.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; a shard is damaged.
        ArgumentError: an unknown or absent device.
    """
    headers = tensor_headers(folder)
    config = build_config(folder)
    target = torch_device(device)
    from transformers import AutoModelForCausalLM

    if dtype == "auto" and any(info.dtype == "F16" for info in headers.values()):
        dtype = "float32"
    with _one_line_errors(f"{folder} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # so that they are listed, and refused below
            output_loading_info=True,
            local_files_only=True,
        )
    model, info = loaded
    unexpected = [n for n in info["unexpected_keys"] if not _IGNORED_TENSOR.fullmatch(n)]
    for problem, names in (
        ("lacks the tensor", info["missing_keys"]),
        ("has a tensor that its architecture does not know:", unexpected),
        ("has a tensor whose shape is not its config's:", info["mismatched_keys"]),
    ):
        if names:
            listed = sorted(str(n[0]) if isinstance(n, tuple) else str(n) for n in names)
            more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
            raise CheckpointError(f"{folder} {problem} {listed[0]}{more}")
    return model.eval().requires_grad_(False).to(target)  # type: ignore[no-any-return]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder."""
    from transformers import AutoTokenizer

    with _one_line_errors(f"{folder} has no tokenizer that can be loaded"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def torch_device(device: str) -> torch.device:
    """Resolve "auto" and check that the device exists."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f"device {device!r} cannot be used here: {reason}") from None
    return target


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turn what transformers raises over a bad folder into one line."""
    try:
        yield
    except HFPruneError:
        raise
    except Exception as error:  # it raises a dozen classes, some of them its dependencies'
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{what}: {lines[0] if lines else type(error).__name__}") from error
