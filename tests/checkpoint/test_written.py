"""Checkpoints with experts, written: dropped, renumbered, each cut to its own neurons."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_mixture import masked_logits
from processes import in_another_process
from safetensors.torch import load_file, save_file
from tiny_mixtures import change_config, merge_files, tiny_mixture
from torch import Tensor
from transformers import AutoModelForCausalLM

import hfprune_fast as hf
from hfprune_fast.checkpoint import native, writer
from hfprune_fast.checkpoint.folder import weight_files
from hfprune_fast.checkpoint.loading import load_model
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.errors import ArgumentError, NumericsError, OutputError
from hfprune_fast.models.sites import SiteKey
from hfprune_fast.report.facts import recorded_keep

Keep = dict[SiteKey, Tensor]
IDS = torch.arange(40).view(2, 20)


@pytest.fixture(params=["extension", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(native, "_C", None)


def some_keep(folder: Path, *, width: int = 11, own: int = 13, dropped: int = 1) -> Keep:
    """Keep random neurons, and of each layer and group of experts all but some."""
    spec, generator = open_source(folder).spec, torch.Generator().manual_seed(3)
    in_group = spec.num_experts // spec.expert_groups
    keep: Keep = {}
    for site, dense in spec.sites.items():
        kept = own if isinstance(site, int) else width
        if isinstance(site, int) or (site[0] + site[1]) % in_group >= dropped:
            keep[site] = torch.randperm(dense, generator=generator)[:kept].sort().values
    return keep


FORMS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", False, {}),
    "qwen3_moe, merged": ("qwen3_moe", True, {}),
    "mixtral": ("mixtral", False, {}),
    "gpt_oss": ("gpt_oss", False, {"width": 12}),
    "granitemoe": ("granitemoe", False, {}),
    "deepseek_v3": ("deepseek_v3", False, {"width": 12, "own": 36}),
}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_computes_what_is_kept(
    save_checkpoint: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    family, merged, sizes = FORMS[form]
    model = tiny_mixture(family)
    folder = save_checkpoint(model)
    if merged:
        merge_files(folder, model)
    keep, out = some_keep(folder, **sizes), tmp_path / "out"
    achieved = hf.prune_checkpoint(folder, out, keep, verify=True)
    written = AutoModelForCausalLM.from_pretrained(out, experts_implementation="eager").double()
    difference = (written(IDS).logits - masked_logits(folder, keep, IDS)).abs().max()
    assert difference.item() < 1e-12
    assert achieved["params"] == sum(p.numel() for p in written.parameters())
    assert achieved["params"] == open_source(out).spec.total_params
    opened = open_source(out).spec
    assert (achieved["experts"], achieved["expert_width"]) == (
        opened.num_experts,
        opened.expert_width,
    )
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_token_uses_the_experts_it_chooses(
    save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_mixture("mixtral"))
    achieved = hf.prune_checkpoint(folder, tmp_path / "out", some_keep(folder))
    a_neuron, layers = 3 * 32, 3
    assert achieved["dense_params"] - achieved["dense_active_params"] == layers * 2 * 24 * a_neuron
    assert achieved["params"] - achieved["active_params"] == layers * 1 * 11 * a_neuron
    assert achieved["prune_ratio"] == 1 - (3 * 11) / (4 * 24)


def test_the_record_names_mlps_by_their_paths(
    save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = save_checkpoint(tiny_mixture("qwen2_moe")), tmp_path / "out"
    keep = some_keep(folder)
    achieved = hf.prune_checkpoint(folder, out, keep)
    record = json.loads((out / "hfprune.json").read_text())
    assert record["achieved"] == achieved
    assert record["experts"] == {
        "model.layers.1.mlp.experts": [0, 1, 2],
        "model.layers.2.mlp.experts": [0, 1, 3],
    }
    assert record["keep"] == {
        "model.layers.0.mlp": keep[0].tolist(),
        "model.layers.1.mlp.shared_expert": keep[1].tolist(),
        "model.layers.2.mlp.shared_expert": keep[2].tolist(),
        **{
            f"model.layers.{site[0]}.mlp.experts.{site[1]}": kept.tolist()
            for site, kept in keep.items()
            if isinstance(site, tuple)
        },
    }
    assert recorded_keep(record) == {site: kept.tolist() for site, kept in keep.items()}
    card = (out / "README.md").read_text()
    assert "3 of 4 experts, 11 of 24 neurons of each and 13 of 20 to 40" in card
    assert f"{achieved['active_params']:,} of {achieved['dense_active_params']:,}" in card


def test_experts_are_numbered_anew_and_their_tensors_follow(
    save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_mixture("mixtral"), max_shard_size="20KB")
    keep: Keep = {(n, e): torch.arange(24) for n in range(3) for e in (1, 3)}
    hf.prune_checkpoint(folder, tmp_path / "out", keep, verify=True)
    dense, written = all_tensors(folder), all_tensors(tmp_path / "out")
    for layer in range(3):
        below = f"model.layers.{layer}.block_sparse_moe."
        assert torch.equal(written[f"{below}gate.weight"], dense[f"{below}gate.weight"][[1, 3]])
        for new, old in enumerate((1, 3)):
            for leaf in ("w1", "w2", "w3"):
                name = f"{below}experts.{{}}.{leaf}.weight"
                assert torch.equal(written[name.format(new)], dense[name.format(old)])
    assert len(dense) - len(written) == 3 * 2 * 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    assert set(index["weight_map"].values()) == {p.name for p in weight_files(tmp_path / "out")}


def all_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in weight_files(folder) for name, t in load_file(file).items()}


def test_the_count_is_written_by_the_name_that_is_there(
    save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = save_checkpoint(tiny_mixture("qwen3_moe"))
    keep = some_keep(folder)
    change_config(folder, num_local_experts=None, num_experts=4)
    hf.prune_checkpoint(folder, tmp_path / "out", keep)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "num_local_experts" not in config
    sizes = [config[key] for key in ("num_experts", "moe_intermediate_size", "intermediate_size")]
    assert sizes == [3, 11, 13]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("merged", [False, True])
def test_an_experts_down_projection_is_replaced(
    save_checkpoint: Callable[..., Path], tmp_path: Path, merged: bool
) -> None:
    model = tiny_mixture("qwen3_moe")
    folder = save_checkpoint(model)
    if merged:
        merge_files(folder, model)
    keep, refitted = some_keep(folder, dropped=2), torch.randn(32, 11)
    expected = tmp_path / "expected"
    hf.prune_checkpoint(folder, expected, keep)
    key = open_source(folder).expert_down_proj(1, 1)  # by its number in what is written
    assert isinstance(key, tuple) == merged
    hf.prune_checkpoint(folder, tmp_path / "out", keep, replace={key: refitted}, verify=True)
    before, after = (load_model(f, device="cpu").state_dict() for f in (expected, tmp_path / "out"))
    before["model.layers.1.mlp.experts.down_proj"][1] = refitted
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    key_of_one = (key, 0) if isinstance(key, str) else (key[0], 7)
    for bad in ({key: refitted.t()}, {key: refitted.double()}, {key_of_one: refitted}):
        with pytest.raises(ArgumentError, match="replace"):
            hf.prune_checkpoint(folder, tmp_path / "bad", keep, replace=bad)
    with pytest.raises(NumericsError, match="holds NaN"):
        hf.prune_checkpoint(folder, tmp_path / "bad", keep, replace={key: refitted / 0})
    assert not (tmp_path / "bad").exists()


def test_verify_sees_a_flipped_bit_in_an_expert(
    save_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint(tiny_mixture("granitemoe"))
    name, real = "model.layers.1.block_sparse_moe.output_linear.weight", writer._forget_cached

    def flip(file: Path) -> None:
        real(file)
        tensors = load_file(file)
        tensors[name].view(torch.int32)[2, 3, 4] ^= 1
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(writer, "_forget_cached", flip)
    with pytest.raises(OutputError, match=f"{name} .*not read back"):
        hf.prune_checkpoint(folder, tmp_path / "out", some_keep(folder), verify=True)


def test_layers_that_predict_further_are_copied(
    save_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(tiny_mixture("deepseek_v3"))
    tensors = load_file(folder / "model.safetensors")
    below = "model.layers.61."  # of DeepSeek-V3, which has 61 layers
    beside = {
        f"{below}mlp.experts.7.gate_proj.weight": torch.ones(3, 32),
        f"{below}mlp.gate.e_score_correction_bias": torch.ones(8),
        f"{below}eh_proj.weight": torch.ones(2, 2),
    }
    save_file({**tensors, **beside}, folder / "model.safetensors", {"format": "pt"})
    hf.prune_checkpoint(folder, tmp_path / "out", some_keep(folder, width=12, own=36), verify=True)
    written = all_tensors(tmp_path / "out")
    assert all(torch.equal(written[name], tensor) for name, tensor in beside.items())
    assert f"{below}mlp.experts.7.gate_proj.weight and 1 more are copied" in capsys.readouterr().err


MEMORY = """
import sys, threading, time, torch
import hfprune_fast as hf
from hfprune_fast.checkpoint.source import open_source

source, out = sys.argv[1:]
keep = {site: torch.arange(0, width, 2) for site, width in open_source(source).spec.sites.items()}

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(l.split()[1]) for l in status if l.startswith("RssAnon")) * 1024

base, peak, over = anonymous(), 0, False
def watch():
    global peak
    while not over:
        peak = max(peak, anonymous() - base)
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
hf.prune_checkpoint(source, out, keep, verify=True)
over = True
thread.join()
print(peak)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.skipif(native.UNUSED_REASON is not None, reason="the extension is not built")
def test_memory_does_not_grow_with_the_number_of_experts(
    save_checkpoint: Callable[..., Path], tmp_path: Path, measured: Callable[[str], None]
) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 256}
    model = tiny_mixture("qwen3_moe", num_hidden_layers=1, mlp_only_layers=[], **sizes)
    folder = merge_files(save_checkpoint(model), model)
    one_tensor_bytes = 256 * 2 * 512 * 512 * 4
    peak = int(in_another_process(MEMORY, folder, tmp_path / "out"))
    measured(f"a tensor of {one_tensor_bytes / 1e6:.0f} MB, pruned: {peak / 1e6:.1f} MB anonymous")
    assert peak < 50e6  # verifying holds blocks of an expert's 2 MB


@pytest.mark.parametrize("layout", ["custom", "padded", "native", "decilm"])
def test_layouts_are_refused(
    save_checkpoint: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    folder = save_checkpoint(tiny_mixture("mixtral"))
    with pytest.raises(ArgumentError, match=f"layout {layout}: .* needs no layout; leave it out"):
        hf.prune_checkpoint(folder, tmp_path / "out", some_keep(folder), layout=layout)
