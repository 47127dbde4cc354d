"""Custom checkpoints in other versions of transformers, by the code that they ship alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_process import in_fresh_process
from tolerances import assert_no_worse
from truth import forward, tiny_model
from uneven import IDS, keep_of

import hfprune_fast as hf

# The oldest that the shipped file is for, the last before 5, and this package's own minimum; each
# with what it needs that the running environment has in another version.
_HTTPX = ("httpx==0.28.1", "httpcore==1.0.9")
VERSIONS = {
    "4.51.3": ("tokenizers==0.21.4", "huggingface_hub==0.36.2"),
    "4.57.6": ("tokenizers==0.22.2", "huggingface_hub==0.36.2"),
    "5.17.0": ("huggingface_hub==1.33.0", *_HTTPX),
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"tied": True},
}
CODE = """
sys.modules["hfprune_fast"] = None  # importing it now raises ImportError
import json, transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
version, *folders = sys.argv[1:]
assert transformers.__version__ == version, (transformers.__version__, transformers.__file__)
widths, ids = [61, 96, 30], torch.arange(40)[None] * 3 % 127
torch.set_grad_enabled(False)

def load(head, folder, **options):
    auto = getattr(transformers, f"AutoModel{head}")
    model, info = auto.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options)
    return model.eval(), info

def found(config):
    return config["mlp_widths"], [
        config["per_layer_config"][str(i)]["intermediate_size"] for i in range(3)]

for folder in folders:
    assert found(json.load(open(f"{folder}/config.json"))) == (widths, widths)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.mlp_widths, config.intermediate_size) == (widths, 96)
    plain = AutoConfig.from_pretrained(f"{folder}-padded")
    if hasattr(plain, "rope_theta"):  # transformers 4 ignores what transformers 5 saves
        plain.rope_theta = 500_000.0
    padded = AutoModelForCausalLM.from_pretrained(f"{folder}-padded", config=plain).eval()
    assert type(padded).__module__.startswith("transformers.models.")
    model, info = load("ForCausalLM", folder)
    assert not any(info.values()), info
    assert [layer.mlp.up_proj.out_features for layer in model.model.layers] == widths
    logits = model(ids).logits
    hidden = model.model(ids).last_hidden_state
    decoder, info = load("", folder)
    assert torch.equal(decoder(ids).last_hidden_state, hidden)
    for head in ("ForSequenceClassification", "ForTokenClassification"):
        classifier, info = load(head, folder, num_labels=3, pad_token_id=0)
        assert {key.split(".")[0] for key in info["missing_keys"]} == {"score"}
        assert torch.equal(classifier.model(ids).last_hidden_state, hidden)
        expected = classifier.score(hidden)
        if head == "ForSequenceClassification":
            expected = expected[:, -1]
        assert torch.equal(classifier(ids).logits, expected)
    longer = [
        model.generate(ids, generation_config=GenerationConfig(
            max_new_tokens=4, do_sample=False, use_cache=cache))
        for cache in (True, False)]
    assert longer[0].shape == (1, 44) and torch.equal(*longer)
    assert longer[0][0, 40] == logits[0, -1].argmax()
    model.save_pretrained(f"{folder}-copy")
    assert found(json.load(open(f"{folder}-copy/config.json"))) == (widths, widths)
    again, info = load("ForCausalLM", f"{folder}-copy")
    assert not any(info.values()), info
    assert torch.equal(again(ids).logits, logits)
    torch.save((logits[0], padded(ids).logits[0]), f"{folder}.pt")
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give the processes that a test starts another transformers, beside this torch.

    Where pip reaches no registry, the test is skipped. Where the variable CI is set, it fails.
    """

    def install(version: str) -> None:
        site, pip = tmp_path / "site", ("-m", "pip", "install", "--quiet", "--no-deps")
        packages = (f"transformers=={version}", *VERSIONS[version])
        done = subprocess.run(
            [sys.executable, *pip, "--no-compile", "--retries", "1", "--target", site, *packages],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            reason = f"transformers {version} could not be installed: {done.stderr.strip()[-300:]}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        path = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))

    return install


def as_published(folder: Path) -> None:
    """Rewrite config.json as models on the hub have it, which transformers 4 reads too."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"torch_dtype": config.pop("dtype"), **config.pop("rope_parameters")}
    config.pop("rope_type")
    path.write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_a_custom_checkpoint_in_another_version(
    version: str,
    installed: Callable[[str], None],
    save_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    installed(version)
    keep, truths = keep_of(), {}
    alive = torch.stack([torch.isin(torch.arange(96), keep[layer]) for layer in range(3)])
    for family, options in CASES.items():
        rope = {"rope_type": "default", "rope_theta": 500_000.0}
        model = tiny_model(family, dtype=torch.float32, rope_parameters=rope, **options)
        dense = save_checkpoint(model, f"dense-{family}")
        if family != "llama":  # which is as transformers 5 saves it
            as_published(dense)
        for name, layout in ((family, "custom"), (f"{family}-padded", "padded")):
            hf.prune_checkpoint(dense, tmp_path / name, keep, layout=layout)
        truths[family] = forward(model.state_dict(), model.config, IDS, alive=alive).logits
    in_fresh_process(CODE, version, *(tmp_path / family for family in CASES), cwd=tmp_path)
    for family, truth in truths.items():
        ours, padded = torch.load(tmp_path / f"{family}.pt")
        # The same sums in fp32; their order can depend on widths and alignment of the weights.
        assert_no_worse(ours, padded, truth, floor=4 * torch.finfo(torch.float32).eps)
