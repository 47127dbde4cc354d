from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from exact import make_float64_exact
from padding import padded
from tolerances import relative_error
from transformers import PreTrainedModel
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.config import STATISTICS
from hfprune_fast.data.batches import MicroBatch, micro_batch
from hfprune_fast.engine.layerwise import ResidentModel, for_each_layer
from hfprune_fast.scoring.run import score_batches
from hfprune_fast.scoring.sums import PassOptions

V = 127
SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral, 5 tokens seen": ("mistral", {"sliding_window": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2, sliding from layer 1": ("qwen2", SLIDING),
    "qwen3": ("qwen3", {}),
}


def model_of(which: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    family, overrides = MODELS[which]
    return tiny_model(family, dtype=dtype, **overrides)


def sequences(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(V, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("which", MODELS)
def test_padded_batches_score_as_one_at_a_time(
    which: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With float64 norms and rotary tables (`make_float64_exact`) only roundings are left.

    Both ways do the same sums in another order: about 30 products one after the other, back and
    forth, of at most 127 terms, so 30 * 127 roundings of 1.1e-16 are 4e-13 of a layer's norm.
    """
    model = model_of(which)
    make_float64_exact(model, monkeypatch)
    rows = sequences(20, 7, 1, 13)
    alone = hf.score(model, [row[None] for row in rows])
    together = hf.score(model, [padded(rows, side, filler=-100)])
    for name in STATISTICS:
        assert relative_error(getattr(together, name), getattr(alone, name)).max() < 1e-12, name
    ours, theirs = together.provenance, alone.provenance
    assert ours["entropy_nats"] == pytest.approx(theirs["entropy_nats"], rel=1e-12)
    assert (ours["samples"], ours["tokens"]) == (4, 41)
    assert ours["calibration"]["data_sha256"] == theirs["calibration"]["data_sha256"]


@pytest.mark.parametrize("parity", [False, True])
def test_padded_batches_cut_into_sequences_score_the_same_bits(parity: bool) -> None:
    """Parity, which runs one sequence at a time, too: no padding is left for it to count."""
    model, rows = tiny_model("llama", dtype=torch.bfloat16), sequences(20, 7, 1, 13)
    alone = hf.score(model, [row[None] for row in rows], parity=parity)
    cut = hf.score(model, [padded(rows, "left")], batch_size=1, parity=parity)
    for name in STATISTICS:
        assert torch.equal(getattr(cut, name), getattr(alone, name)), name
    assert cut.provenance["entropy_nats"] == alone.provenance["entropy_nats"]


def test_padded_batches_evaluate_as_one_at_a_time() -> None:
    dense, pruned = (tiny_model("mistral", sliding_window=5) for _ in range(2))
    hf.prune(pruned, {layer: torch.arange(0, 96, 2) for layer in range(3)})
    rows = sequences(20, 7, 2, 13)
    alone = hf.evaluate(dense, pruned, [row[None] for row in rows])
    # Logits are compared in float32, so their last bit moves with the order of a float64 sum.
    size = max(float(m(row[None]).logits.abs().max()) for m in (dense, pruned) for row in rows)
    close = 4 * size * torch.finfo(torch.float32).eps
    for side in ("left", "right"):
        got = hf.evaluate(dense, pruned, [padded(rows, side, filler=-100)])
        assert got.kl_nats == pytest.approx(alone.kl_nats, abs=close)
        assert got.ppl_dense == pytest.approx(alone.ppl_dense, rel=close)
        assert got.ppl_pruned == pytest.approx(alone.ppl_pruned, rel=close)
        assert (got.top1_agreement, got.tokens) == (alone.top1_agreement, 42)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("which", MODELS)
def test_what_stands_in_the_padding_changes_no_bit(which: str, recompute: bool) -> None:
    """Neither in a tokenizer's mapping nor, after that, in the rows that go through the model."""
    model = model_of(which, torch.float32)
    rows = sequences(20, 7, 1, 13)
    batch = micro_batch(padded(rows, "left", filler=3), V)
    other = micro_batch(padded(rows, "right", filler=V + 5), V)
    assert torch.equal(batch.ids, other.ids)
    assert batch.token_mask is not None
    filled = MicroBatch(batch.ids.masked_fill(~batch.token_mask, 77), batch.lengths)
    how = PassOptions(recompute=recompute)
    with ResidentModel(model) as running:
        expected, got = (score_batches(running, [b], how) for b in (batch, filled))
    assert torch.equal(got.statistics, expected.statistics)
    assert got.loss_nats == expected.loss_nats


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", MODELS)
def test_logits_are_those_of_transformers_bit_for_bit(
    which: str, dtype: torch.dtype, attention: str
) -> None:
    model = model_of(which, dtype)
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(1)
    # The calls that the first batch records serve the third too, which is of the same shape.
    given = [torch.randint(V, shape, generator=generator) for shape in ((2, 20), (1, 33), (2, 20))]
    with ResidentModel(model) as running:
        head = running.head()
        got = [head(h) for h in running.final_hidden([micro_batch(ids, V) for ids in given])]
    for ids, logits in zip(given, got, strict=True):
        assert torch.equal(logits, model(ids).logits)


def test_a_model_in_training_mode_is_run_without_dropout() -> None:
    batch = sequences(20)[0][None]
    expected = hf.score(tiny_model("llama"), [batch])
    got = hf.score(tiny_model("llama", attention_dropout=0.5).train(), [batch])
    assert torch.equal(got.l1, expected.l1)


@pytest.mark.parametrize("option", ["return_dict", "output_hidden_states", "use_cache"])
def test_a_config_that_requests_other_outputs_changes_nothing(option: str) -> None:
    model, batch = tiny_model("llama"), sequences(20)[0][None]
    expected = hf.score(model, [batch])
    setattr(model.config, option, option != "return_dict")
    assert torch.equal(hf.score(model, [batch]).l1, expected.l1)


def test_no_layer_is_given_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").train()
    assert model.config.use_cache
    kind = type(model.model.layers[0])
    run, calls = kind.forward, []

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", watched)
    batch = sequences(20)[0][None]
    hf.score(model, [batch])
    hf.evaluate(model, model, [batch])
    assert len(calls) == 3 * 3
    for kwargs in calls:
        assert kwargs["past_key_values"] is None
        assert not kwargs["use_cache"]


class StopError(Exception):
    pass


def stop(*_: object, **__: object) -> None:
    raise StopError


class Noted(ResidentModel):
    """Notes which weights are fetched and released, and which are announced."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.events: list[Any] = []

    @contextmanager
    def weights_of(self, unit: int, then: int) -> Iterator[None]:
        self.events.append(("fetch", unit, then))
        try:
            yield
        finally:
            self.events.append(("release", unit))


@pytest.mark.parametrize(
    ("backward", "order"), [(False, [(0, 1), (1, 2), (2, 7)]), (True, [(2, 1), (1, 0), (0, 7)])]
)
def test_each_layer_is_visited_with_its_weights(
    backward: bool, order: list[tuple[int, int]]
) -> None:
    model = Noted(tiny_model("llama"))
    for_each_layer(model, model.events.append, then=7, backward=backward)
    assert model.events == [
        event for unit, then in order for event in (("fetch", unit, then), unit, ("release", unit))
    ]


def test_an_error_releases_the_layer_at_once() -> None:
    """Also while its traceback is kept, whose frames hold what is local to the loop."""
    model = Noted(tiny_model("llama"))
    with pytest.raises(StopError) as raised:
        for_each_layer(model, stop, then=0)
    assert raised.tb is not None
    assert model.events == [("fetch", 0, 1), ("release", 0)]


def innards(model: PreTrainedModel) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every attribute of every module, a dictionary's entries (children, hooks) one by one."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            entries = value.items() if isinstance(value, dict) else [("", value)]
            yield from (((name, key, str(entry)), held) for entry, held in entries)


class Broken(torch.nn.SiLU):
    def forward(self, _: torch.Tensor) -> torch.Tensor:
        raise StopError


HOOKED = {
    "set-up": "model.rotary_emb",
    "forward": "model.layers.1.post_attention_layernorm",
    "norm": "model.norm",
}
PATCHED = {
    "head": "hfprune_fast.scoring.criteria.linear_entropy",
    "backward": "hfprune_fast.engine.mlp_hooks.gated_taylor",
    "backward of a hooked MLP": "hfprune_fast.engine.mlp_hooks.taylor_statistics",
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("where", ["nowhere", "inside the MLP", *HOOKED, *PATCHED])
def test_model_is_left_exactly_as_found(
    where: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", dtype=torch.float32).train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(True)
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    model.model.layers[2].mlp.register_forward_hook(lambda *_: None)  # so it is hooked, not known
    if where in HOOKED:
        model.get_submodule(HOOKED[where]).register_forward_pre_hook(stop)
    elif where in PATCHED:
        monkeypatch.setattr(PATCHED[where], stop)
    elif where != "nowhere":
        model.model.layers[1].mlp.act_fn = Broken()
    before = dict(innards(model))
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    wanted = [tensor.requires_grad for tensor in tensors]
    batch = micro_batch(padded(sequences(9, 5), "left"), V)

    failing = nullcontext() if where == "nowhere" else pytest.raises(StopError)
    with failing, ResidentModel(model) as running:
        score_batches(running, [batch], PassOptions(recompute=recompute))
    after = dict(innards(model))
    assert after.keys() == before.keys()
    assert [key for key, value in after.items() if value is not before[key]] == []
    assert [tensor.requires_grad for tensor in tensors] == wanted
    assert all(tensor.grad is None for tensor in tensors)
    assert all(torch.equal(t, value) for t, value in zip(tensors, values, strict=True))
