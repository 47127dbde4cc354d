"""Safety rests on no `assert`: the same refusals with the package compiled as by `python -O`.

That takes asserts out; torch and transformers are left as they are, of which a whole `python -O`
has no bytecode yet.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hfprune_fast.checkpoint.folder import TINY_MODEL

WITHOUT_ASSERTS = """
import sys
from importlib.machinery import SourceFileLoader

usual, compiled = SourceFileLoader.get_code, set()
def get_code(loader, name):
    if name.partition(".")[0] != "hfprune_fast":
        return usual(loader, name)
    compiled.add(name)
    path = loader.get_filename(name)
    return compile(loader.get_data(path), path, "exec", dont_inherit=True, optimize=1)

SourceFileLoader.get_code = get_code
exec(compile(sys.argv[2], "refusals", "exec", optimize=1))
assert compiled >= {name for name in sys.modules if name.startswith("hfprune_fast.scoring")}
assert "hfprune_fast.scoring.resume" in compiled
"""
REFUSALS = """
import json, os, shutil, sys
import torch
torch.set_num_threads(1)
from safetensors import safe_open
from safetensors.torch import save_file
from pathlib import Path

from hfprune_fast.cli import main
from hfprune_fast.scoring import job, passes, resume

assert sys.exit("asserts are on")

def run(*args):
    try:
        main([str(arg) for arg in args])
    except SystemExit as done:
        return int(done.code or 0)

def rewrite(file, key, change):
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()[key])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    change(header, tensors)
    save_file(tensors, file, {key: json.dumps(header)})

def config(**changes):
    shutil.copytree(sys.argv[1], "hostile", dirs_exist_ok=True)
    old = json.loads(Path(sys.argv[1], "config.json").read_text())
    Path("hostile/config.json").write_text(json.dumps({**old, **changes}))
    return run("plan", "hostile", "--prune-ratio", 0.1)

score = ["score", "demo", "--calibration", "demo", "--samples", 4, "--seq-len", 32]
score += ["--batch-size", 1, "--dtype", "float32"]
save, saved = resume.ResumeFile.on_commit, []
def first_pass_only(self, total, size):
    save(self, total, size)
    if Path("s.state").exists():
        raise KeyboardInterrupt
resume.ResumeFile.on_commit = first_pass_only
codes = {"interrupted": run(*score, "--save-seconds", 0, "--out", "s")}
resume.ResumeFile.on_commit = save
state = Path("s.state").read_bytes()

def damaged(change, sign=False):
    def signed(header, tensors):
        change(header, tensors)
        if sign:
            header["digest"] = resume.digest_of(header, tensors)
    Path("s.state").write_bytes(state)
    rewrite("s.state", "hfprune_state", signed)
    return run(*score, "--out", "s", "--resume")

codes["bit"] = damaged(lambda h, t: t["down_norm"].view(torch.int64)[0].bitwise_xor_(1 << 50))
codes["samples"] = damaged(lambda h, t: h.update(samples=2), True)
codes["tokens"] = damaged(lambda h, t: h.update(samples=3, tokens=5), True)
codes["losses"] = damaged(lambda h, t: h.update(loss_nats=[]), True)
Path("s.state").unlink()
codes["whole"] = run(*score, "--out", "s")
prune = ["prune", "demo", "--scores", "s", "--prune-ratio", 0, "--out", "pruned"]
scores = Path("s").read_bytes()
for name, change in {
    "no criteria": lambda h, t: h["provenance"].update(criteria=[]),
    "float": lambda h, t: h["model"].update(intermediate_size=384.0),
    "no norms": lambda h, t: (t.pop("down_norm"), h["provenance"].pop("model_fingerprint")),
    "negative": lambda h, t: t["act"].neg_(),
    "other model": lambda h, t: h["provenance"].update(model_fingerprint="0"),
}.items():
    Path("s").write_bytes(scores)
    rewrite("s", "hfprune_scores", change)
    codes[name] = run(*prune)
codes["layers"] = config(num_hidden_layers=10**7)
codes["width"] = config(intermediate_size=0)
codes["dtype"] = config(dtype="load")
Path("t.state").write_text("mine")
codes["state"] = run(*score, "--out", "t", "--force")
Path("pruned").mkdir()
Path("pruned/mine").write_text("mine")
codes["folder"] = run(*prune, "--force")
codes["source"] = run(*score, "--out", "hostile/model.safetensors", "--force")
codes["kept"] = [Path("t.state").read_text(), Path("pruned/mine").read_text()]
print(json.dumps(codes))
"""


@pytest.mark.slow
def test_the_same_is_refused_without_asserts(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ASSERTS, str(TINY_MODEL), REFUSALS],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout.splitlines()[-1])
    assert (codes.pop("interrupted"), codes.pop("whole")) == (130, 0)
    assert codes.pop("kept") == ["mine", "mine"]
    assert set(codes.values()) == {2}, (codes, done.stderr[-3000:])
    assert "Traceback" not in done.stderr
