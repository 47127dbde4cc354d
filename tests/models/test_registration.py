"""Models of `nonuniform` load by transformers' own Auto classes, whatever was imported first."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fresh_process import in_fresh_process
from transformers import AutoConfig, AutoModelForCausalLM
from truth import FAMILIES, tiny_model

import hfprune_fast as hf
from hfprune_fast.models import nonuniform, registration

WIDTHS = [61, 96, 30]
OURS_FIRST = """
import hfprune_fast
assert not {"transformers.modeling_utils", "transformers.models.llama"} & sys.modules.keys()
"""
IN_TWO_THREADS = """
import threading
thread = threading.Thread(target=__import__, args=("hfprune_fast",))
thread.start()
import transformers  # waits; see register_with_transformers
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM, Trainer
thread.join()
assert hasattr(sys.modules["hfprune_fast"], "score")
"""
ORDERS = {  # the family whose classes are the first to be imported: how
    "llama": OURS_FIRST + "from transformers import LlamaForCausalLM, MixtralForCausalLM, Trainer",
    "mistral": "from transformers import MistralForCausalLM, Trainer; import hfprune_fast",
    "qwen2": "import transformers, hfprune_fast; from transformers import AutoModelForCausalLM",
    "qwen3": IN_TWO_THREADS,
}
LOADS = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    assert type(config) is type(model.config) and config.mlp_widths == [61, 96, 30]
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == [61, 96, 30]
    print(type(model).__module__, type(model).__name__)
from transformers import LlamaForCausalLM, Qwen3ForCausalLM, MixtralForCausalLM, Trainer
"""


@pytest.fixture
def folders(save_checkpoint: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    """A checkpoint of each family with layers of different widths, whose code must not be run."""
    found = {}
    for family in FAMILIES:
        dense, found[family] = save_checkpoint(tiny_model(family), family), tmp_path / f"{family}-p"
        keep = {layer: torch.arange(width) for layer, width in enumerate(WIDTHS)}
        hf.prune_checkpoint(dense, found[family], keep)
        (found[family] / "modeling_hfprune.py").write_text("raise SystemExit('remote code ran')")
    return found


@pytest.mark.parametrize(
    "first",
    ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ORDERS if f != "llama")],
)
def test_any_order_of_imports(folders: dict[str, Path], tmp_path: Path, first: str) -> None:
    rotated = [first, *(family for family in FAMILIES if family != first)]
    code = f"{ORDERS[first]}\n{LOADS}"
    out = in_fresh_process(code, *(folders[family] for family in rotated), cwd=tmp_path)
    names = (registration.main_class(family) for family in rotated)
    expected = (f"hfprune_fast.models.nonuniform HFPrune{name}" for name in names)
    assert out.splitlines() == list(expected)


def test_a_config_made_by_hand_makes_a_model() -> None:
    registration.register_with_transformers()  # as in a process that has used none of them
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9}
    config = AutoConfig.for_model(
        "hfprune_qwen2", **sizes, intermediate_size=90, mlp_widths=[90, 70]
    )
    model = AutoModelForCausalLM.from_config(config)
    assert type(model) is nonuniform.HFPruneQwen2ForCausalLM
    assert model.model.layers[1].mlp.up_proj.out_features == 70
