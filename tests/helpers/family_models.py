"""One tiny random model of every family, of transformers' own class."""

import math
import os
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from family_configs import SIZES, TINY, V
from mixture_configs import MIXTURES, MODELS, model_type
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

# At least one of each group, which `make test` runs; CI runs all.
FAST = {"llama", "stablelm", "phi3", "granite", "gemma2", "gemma4_text", "olmo2"}
FAST |= {"lfm2", "qwen3_5_text", "falcon_h1", "gemma3", "qwen2_5_vl", "smolvlm"}
EVERY = [pytest.param(f, marks=() if f in FAST else pytest.mark.slow) for f in TINY]
# Lines of {"family", "known_as", "what", "error"} are added to this file, of which
# bench/reporting/families_table.py makes docs/families.md.
NOTES = os.environ.get("HFPRUNE_FAMILIES")


def in_turn(
    ways: Sequence[str],
    number: int = 1,
    *,
    families: Collection[str] = TINY,
    fast: Collection[str] = FAST,
    slow_ways: Collection[str] = (),
) -> list[Any]:
    """Return pairs of a family and a way to try it: of fast families all, of others some in turn.

    Of families with one mechanism, which are neighbours, each way is thus tried. With NOTES, for
    which every family is tried in every way, all pairs.
    """
    pairs = []
    for start, family in enumerate(families):
        all_ways = family in fast or NOTES
        tried = ways if all_ways else [ways[(start + i) % len(ways)] for i in range(number)]
        for way in tried:
            slow = family not in fast or way in slow_ways
            marks = pytest.mark.slow if slow else ()
            pairs.append(pytest.param(family, way, marks=marks, id=f"{family}-{way}"))
    return pairs


def every_other(families: Collection[str] = TINY, fast: Collection[str] = FAST) -> list[Any]:
    """Return the fast families and half of the others; with NOTES, all."""
    return [
        pytest.param(family, marks=() if family in fast else pytest.mark.slow)
        for number, family in enumerate(families)
        if family in fast or NOTES or number % 2
    ]


def tiny_config(family: str, **overrides: Any) -> Any:
    """Return the config of a family's tiny model; overrides are of its text."""
    tiny = MODELS[family]
    text = SIZES | tiny.overrides | overrides
    if tiny.vision is None:
        return AutoConfig.for_model(model_type(family), **text)
    text = {"model_type": tiny.text_type, **text}
    parts = {"text_config": text, "vision_config": tiny.vision}
    ties = {key: text[key] for key in ("tie_word_embeddings",) if key in text}
    return AutoConfig.for_model(model_type(family), **parts, **ties)


def plain_experts(family: str) -> dict[str, str]:
    """Return what makes transformers loop over experts: its grouped products lack float64."""
    return {"experts_implementation": "eager"} if family in MIXTURES else {}


def tiny_family_model(
    family: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Return a family's tiny model, of transformers' own class, with random weights.

    Every parameter and every stored buffer is random around what transformers starts it at (biases
    at 0 and norms at 1 would hide what is done with them), the same for every dtype up to its
    rounding, and large enough that the outputs are peaked and depend on the acts.
    """
    config = tiny_config(family, **overrides)
    auto = AutoModelForCausalLM if MODELS[family].vision is None else AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_config(config, dtype=dtype, **plain_experts(family))
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    stored = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in stored.items():
        if id(tensor) not in seen and tensor.is_floating_point():  # a tied head comes twice
            seen.add(id(tensor))
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(_drawn(name, tensor.double(), noise))
    return model


def _drawn(name: str, start: Tensor, noise: Tensor) -> Tensor:
    if name.endswith("correction_bias"):  # of sigmoids: more, and an expert is never chosen
        return start + 0.1 * noise
    if start.ndim < 2 or name.endswith("layer_scalar"):
        return start + (0.3 if name.endswith("bias") else 0.2) * noise
    gain = 2.5 if "embed_tokens" in name or "lm_head" in name else 1.2
    each = start.shape[-1] if ".experts." in name else math.prod(start.shape[1:])
    return noise * gain / math.sqrt(each)


def down_projections(family: str, model: PreTrainedModel) -> list[nn.Module]:
    """Return down_proj of every layer, whatever its name."""
    tiny = TINY[family]
    layers = model.get_submodule(tiny.layers)
    return [layer.get_submodule(tiny.down) for layer in layers.children()]


def sequences(lengths: tuple[int, ...] = (33, 9, 70, 2, 5, 33), *, seed: int = 1) -> list[Tensor]:
    """Token sequences of several lengths: past a window, and past the chunks of hybrid layers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (length,), generator=generator) for length in lengths]
