"""Pruning a model in memory: the kept neurons stay, and peak memory stays low."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import synthetic_checkpoint
from processes import in_another_process

import hfprune_fast as hf
from hfprune_fast.checkpoint import loading, native


def test_in_memory_storage_is_exactly_what_is_kept(llama_dir: Path) -> None:
    for extension in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not extension:
                patch.setattr(native, "_C", None)
            model = loading.load_model(llama_dir, device="cpu")
            old = {n: p.detach().clone() for n, p in model.named_parameters()}
            keep = {layer: torch.arange(layer, 95, 3) for layer in range(3)}
            hf.prune(model, keep)
        for name, parameter in model.named_parameters():
            if ".mlp." not in name:
                continue
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
            kept = keep[int(name.split(".")[2])]
            assert torch.equal(parameter, old[name].index_select(int("down_proj" in name), kept))
        assert model(torch.arange(8)[None]).logits.isfinite().all()
        assert model.generate(torch.arange(4)[None], max_new_tokens=3).shape[1] > 4


IN_MEMORY = """
import sys, torch
import hfprune_fast as hf
from hfprune_fast.checkpoint import loading
from pathlib import Path
model = loading.load_model(Path(sys.argv[1]), device="cpu")
model(torch.arange(4)[None])

def now():
    with open("/proc/self/status") as status:
        lines = dict(l.split(":", 1) for l in status)
    return int(lines["RssAnon"].split()[0]) * 1024

seen, real = [], torch.nn.Parameter
class Watched(torch.nn.Parameter):
    def __new__(cls, *arguments, **named):
        seen.append(now())
        return real(*arguments, **named)

torch.nn.Parameter = Watched
before = now()
hf.prune(model, {i: torch.arange(0, 4096, 2) for i in range(4)})
mlp = 4 * 3 * 4096 * 1024 * 2
print(before, max(seen), now(), mlp)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_in_memory_takes_one_tensor_more_at_most(
    tmp_path: Path, measured: Callable[[str], None]
) -> None:
    large = synthetic_checkpoint(tmp_path / "model", hidden=1024, width=4096, layers=4, vocab=3000)
    before, peak, after, mlp = map(int, in_another_process(IN_MEMORY, large).split())
    kept = 2048 * 1024 * 2
    measured(
        f"hf.prune in memory, {mlp / 1e6:.0f} MB of MLPs: {(peak - before) / 1e6:+.1f} MB at the "
        f"peak, {(after - before) / 1e6:+.1f} MB at the end of anonymous memory"
    )
    # Weights that were mapped come to be anonymous, the kept half of them; others only shrink.
    mapped = after > before
    most = before + (mlp // 2 if mapped else 0) + kept + 8e6
    assert peak <= most
