"""What is served in tests/serving: dense models, the pruned ones, and transformers' own results."""

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hfprune_fast.checkpoint.folder import TINY_MODEL

TOKENS, NEW_TOKENS = 256, 8
_SHAPE = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2112, "max_position_embeddings": 512,
    "initializer_range": 0.08, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_RANDOM: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 32}),
}
RANDOM = tuple(_RANDOM)
# Of 8 experts, 2 a token; llama.cpp knows a width of experts that is not the layers' own.
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 256, "sliding_window": None},
    "qwen3_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "head_dim": 32,
        "norm_topk_prob": True,
    },
}  # fmt: skip
MORE = [Path(each) for each in os.environ.get("HFPRUNE_SERVING_MODELS", "").split(":") if each]
TRAINED = ("demo", "qwen3", *(path.name for path in MORE))


@dataclass(frozen=True)
class Reference:
    """What transformers makes of the first tokens of the held-out text, in float32."""

    ids: list[int]
    log_probs: torch.Tensor  # (tokens, vocabulary), float64
    perplexity: float
    greedy: list[int]  # the tokens after them


def random_model(name: str) -> PreTrainedModel:
    """A model that nobody trained, whose layers have MLPs of different magnitude, in bf16."""
    config_class, model_class, options = _RANDOM[name]
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config_class(**_SHAPE, **options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".mlp." in name:
                weight *= 1 + torch.rand(()) + torch.rand(weight.shape[0], 1)
            elif name.endswith(".bias"):
                weight.normal_(std=0.5)
    return model.bfloat16()


def random_mixture(family: str) -> PreTrainedModel:
    """A model with experts that nobody trained, in float32; experts differ, routing is decided."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**_SHAPE, **MIXTURES[family]})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".experts." in name:
                weight *= 1 + torch.rand(len(weight), 1, 1)
            elif name.endswith(".mlp.gate.weight"):
                weight *= 20
    return model


def train_qwen3(folder: Path, steps: int) -> None:
    """Write a Qwen3 of 3.4 million parameters, trained for so many steps."""
    script = Path(__file__).parents[2] / "tools" / "tiny_model.py"
    command = [sys.executable, str(script), "--family", "qwen3", "--steps", str(steps)]
    # Its exit status is 1: the loss is not that of the whole training.
    subprocess.run([*command, "--out", str(folder)], check=False)
    assert folder.is_dir()


def hfprune(*arguments: Any) -> dict[str, Any]:
    """Run a command and return its result."""
    command = [sys.executable, "-P", "-m", "hfprune_fast", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def heldout(tokenizer: Any) -> list[int]:
    text = (TINY_MODEL / "heldout.txt").read_text(encoding="utf-8")[5000:10000]
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:TOKENS]
    return ids


def reference(folder: Path) -> Reference:
    ids = heldout(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batch = torch.tensor([ids])
    with torch.no_grad():
        log_probs = torch.log_softmax(model(batch).logits[0].double(), dim=-1)
        greedy = model.generate(batch, max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :]
    return Reference(ids, log_probs, perplexity(log_probs, ids), greedy.tolist())


def perplexity(log_probs: torch.Tensor, ids: list[int]) -> float:
    return math.exp(-float(log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean()))


@dataclass(frozen=True)
class Row:
    """One model in one engine."""

    model: str
    form: str  # how it was pruned, and in what form it was served
    engine: str
    perplexity: float
    transformers: float  # its perplexity there
    kl: float | None = None
    top1: float | None = None
    bytes: int | None = None
    dense_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}
