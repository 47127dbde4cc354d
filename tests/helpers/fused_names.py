"""Which modules of a model are fused, by name, and a Llama to ask it of."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from truth import tiny_model

from hfprune_fast.engine.fused import fused_modules


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny_model("llama", dtype=dtype, num_hidden_layers=2).requires_grad_(False)


def like(dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor whose backend and dtype `fused_modules` goes by."""
    return torch.empty(0, dtype=dtype)


def replaced(model: nn.Module) -> list[str]:
    """Names of the modules whose forward is not their class's own."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def fused_names(
    model: nn.Module, backend: str | None = "triton", dtype: torch.dtype = torch.float32
) -> list[str]:
    with fused_modules(model, backend, like(dtype)):
        names = replaced(model)
    assert replaced(model) == []
    return names
