"""The examples run as they are, from anywhere, and do what they say."""

import copy
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import random_llama

import hfprune_fast as hf

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args],
        cwd=cwd, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def output_of(name: str, cwd: Path, *args: str) -> str:
    done = run(name, cwd, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_is_short_and_in_the_readme() -> None:
    examples = sorted(EXAMPLES.glob("*.py"))
    assert [path.name for path in examples] == [
        "modelopt_scores.py", "own_loop.py", "torch_pruning.py",
    ]  # fmt: skip
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    for path in examples:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, path
        assert f"(examples/{path.name})" in readme


@pytest.fixture
def torch_pruning(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module; it has the name of the package that it uses."""
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    path = EXAMPLES / "torch_pruning.py"
    spec = importlib.util.spec_from_file_location("example_torch_pruning", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("ratio", [0.25, 0.3])
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_torch_pruning_removes_what_select_does(
    torch_pruning: ModuleType, ratio: float, mlp_bias: bool
) -> None:
    theirs = random_llama(mlp_bias=mlp_bias)
    ids = torch.arange(64).view(2, 32)
    table = hf.score(theirs, ids)
    ours = copy.deepcopy(theirs)
    torch_pruning.prune_mlps(theirs, ids[:1, :8], table, ratio)
    width = theirs.config.intermediate_size
    assert width == int(96 * (1 - ratio))
    hf.prune(ours, hf.select(table, intermediate_size=width))
    weights = theirs.state_dict()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weights[name], weight), name
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_torch_pruning_refuses_a_second_round(torch_pruning: ModuleType) -> None:
    model, ids = random_llama(), torch.arange(64).view(2, 32)
    table = hf.score(model, ids)
    torch_pruning.prune_mlps(model, ids, table, 0.5)
    with pytest.raises(ValueError, match="dense model"):
        torch_pruning.prune_mlps(model, ids, table, 0.5)


@pytest.mark.slow
def test_torch_pruning_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="torch-pruning is not installed")
    out = output_of("torch_pruning.py", tmp_path)
    assert "MLP width 384 -> 288\n" in out
    (kl,) = re.findall(r"kl_nats=([\d.]+)", out)
    assert 0 < float(kl) < 0.25  # 0.14; a random quarter costs 0.39 to 0.47


def test_modelopt_scores_are_what_puzzletron_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_llama()
    table = hf.score(model, torch.arange(64).view(2, 32))
    table.save(tmp_path / "scores.safetensors")
    arguments = ["--scores", "scores.safetensors", "--statistic", "l2"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["modelopt_scores.py", *arguments])
    runpy.run_path(str(EXAMPLES / "modelopt_scores.py"), run_name="__main__")
    folder = tmp_path / "puzzletron_scores"
    assert sorted(path.name for path in folder.iterdir()) == ["args.json", "rank_0.pth"]
    assert json.loads((folder / "args.json").read_text()) == table.provenance
    log = torch.load(folder / "rank_0.pth", weights_only=True)
    downs = [name for name, _ in model.named_modules() if name.endswith("mlp.down_proj")]
    assert list(log) == downs
    keep = hf.select(table, intermediate_size=60, statistic="l2")
    for layer, name in enumerate(downs):
        score = log[name]["score"]
        assert torch.equal(score, table.l2[layer])
        assert score.untyped_storage().nbytes() == score.nbytes  # not the whole table each time
        kept = score.argsort(descending=True)[:60]  # as Puzzletron chooses
        assert torch.equal(kept.sort().values, keep[layer])


@pytest.mark.slow
def test_modelopt_scores_of_the_model_that_ships(tmp_path: Path) -> None:
    output_of("modelopt_scores.py", tmp_path)
    log = torch.load(tmp_path / "puzzletron_scores" / "rank_0.pth", weights_only=True)
    assert [entry["score"].shape for entry in log.values()] == 4 * [(384,)]
    again = run("modelopt_scores.py", tmp_path)
    assert again.returncode == 2
    assert "--out must be a folder that does not exist yet" in again.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_own_loop_learns_and_its_scores_are_of_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(EXAMPLES / "own_loop.py"), run_name="__main__")
    out = capsys.readouterr().out
    losses = re.findall(r"removed: (\w+).*cross entropy ([\d.]+) nats\n", out)
    none, lowest, random = (float(loss) for _, loss in losses)
    assert [name for name, _ in losses] == ["none", "lowest", "random"]
    assert none < 2.6  # 3.29 is the entropy of the bytes alone
    assert 0 < lowest - none < 0.8 * (random - none)
    assert_scores_are_those_of_whole_fp64_logits(names)


def assert_scores_are_those_of_whole_fp64_logits(names: dict[str, Any]) -> None:
    embed, gate, up, head = (names[name].double() for name in ("embed", "gate", "up", "head"))
    down = names["weight"].detach().double(), names["down"].bias.detach().double()
    truth = torch.zeros(256, dtype=torch.float64)
    for batch in names["train"][:32768].view(32, 1024, 7):
        with torch.no_grad():
            x = embed(batch[:, :6]).flatten(1)
            act = torch.nn.functional.silu(gate(x)) * up(x)
        act.requires_grad_()
        log_p = head(torch.nn.functional.linear(act, *down)).log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
        (grad,) = torch.autograd.grad(entropy, act)
        truth += (grad * act.detach()).abs().sum(dim=0)
    # fp32 rounds by 6e-8, in sums that may cancel to a hundredth of their terms.
    torch.testing.assert_close(names["scores"], truth, rtol=1e-5, atol=0)
