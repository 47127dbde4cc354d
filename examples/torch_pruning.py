"""Our scores as an importance of Torch-Pruning, which then cuts the MLPs of a small Llama.

    pip install torch-pruning && python examples/torch_pruning.py

Torch-Pruning asks an importance for the scores of a group of layers' channels, and leaves the group
alone when the answer is None. It takes the model that ships with hfprune_fast.
"""

import copy
import sys

# This file is itself called torch_pruning where it lies.
sys.path[:] = [path for path in sys.path if not path.endswith("examples")]

import torch
import torch_pruning as tp
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL


class EntropyImportance:
    """The scores of gated MLPs' neurons; every other group is left alone."""

    def __init__(self, model, table, statistic="l1"):
        downs = [layer.mlp.down_proj for layer in model.model.layers]
        self.rows = dict(zip(downs, table.importance(statistic), strict=True))

    def __call__(self, group):
        for dep, neurons in group:
            if dep.handler == tp.prune_linear_in_channels and dep.target.module in self.rows:
                row = self.rows[dep.target.module]
                if len(neurons) != len(row):
                    raise ValueError("the scores are of the dense model; take iterative_steps=1")
                return row[neurons]
        return None


def prune_mlps(model, ids, table, ratio):
    """Cut the model's MLPs in place; Torch-Pruning rounds their width down."""
    linears = [item for item in model.named_modules() if isinstance(item[1], torch.nn.Linear)]
    others = [module for name, module in linears if not name.endswith((".gate_proj", ".up_proj"))]
    model.requires_grad_()  # in a frozen model Torch-Pruning finds nothing to prune
    # Following what depends on the others takes many minutes. The norms it warns of stay whole.
    options = {"pruning_ratio": ratio, "ignored_layers": others}
    options["output_transform"] = lambda output: output.logits
    tp.BasePruner(model, ids, EntropyImportance(model, table), **options).step()
    model.config.intermediate_size = model.model.layers[0].mlp.down_proj.in_features


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32)
    text = (TINY_MODEL / "calibration.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(TINY_MODEL)(text, return_tensors="pt")["input_ids"][0]
    calibration, held_out = ids[: 48 * 256].view(48, 256).split([32, 16])
    dense = copy.deepcopy(model)
    prune_mlps(model, calibration[:1, :8], hf.score(model, calibration), ratio=0.25)
    print(f"MLP width {dense.config.intermediate_size} -> {model.config.intermediate_size}")
    print(hf.evaluate(dense, model, held_out))
