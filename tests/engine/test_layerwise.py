from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from exact import make_float64_exact
from tolerances import relative_error
from transformers import BatchEncoding, PreTrainedModel
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint.loading import load_tokenizer
from hfprune_fast.checkpoint.source import TINY_MODEL
from hfprune_fast.data.batches import MicroBatch, micro_batch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.errors import CalibrationError
from hfprune_fast.scoring.passes import How
from hfprune_fast.scoring.run import score_batches
from hfprune_fast.scoring.table import STATISTICS

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


def padded(rows: list[torch.Tensor], side: str, filler: int = 0) -> dict[str, torch.Tensor]:
    """The mapping that a tokenizer makes of sequences."""
    ids = torch.full((len(rows), max(map(len, rows))), filler)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(len(row)) if side == "right" else slice(-len(row), None)
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def test_padding_moves_to_the_right() -> None:
    ids = torch.tensor([[-100, -100, 1, 2], [3, 4, 5, V], [V, 6, -1, -1]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 1, 0, 0]])
    batch = micro_batch({"input_ids": ids, "attention_mask": mask}, V)
    assert batch.ids.tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]
    assert (batch.lengths, batch.tokens) == ((2, 3, 1), 6)
    assert batch.token_mask is not None
    assert batch.token_mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]


def test_parts_hold_no_more_padding_than_they_need() -> None:
    rows = [torch.tensor(row) for row in ([1, 2], [3, 4, 5], [6], [7])]
    batch = micro_batch(padded(rows, "left"), V)
    assert [part.ids.tolist() for part in batch.split(2)] == [[[1, 2, 0], [3, 4, 5]], [[6], [7]]]
    assert [part.lengths for part in batch.split(2)] == [(2, 3), (1, 1)]
    assert [part.token_mask is None for part in batch.split(1)] == [True] * 4
    (whole,) = batch.split(9)
    assert torch.equal(whole.ids, batch.ids)
    assert whole.lengths == batch.lengths


@pytest.mark.parametrize("mask", [None, [[1, 1, 1]], [[True] * 3]])
def test_without_padding_there_is_no_mask(mask: object) -> None:
    batch = micro_batch({"input_ids": [[1, 2, 3]], "attention_mask": mask}, V)
    assert batch.token_mask is None
    assert (batch.ids.tolist(), batch.lengths) == ([[1, 2, 3]], (3,))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_ids_of_any_integers_become_int64(dtype: torch.dtype) -> None:
    ids = torch.tensor([[0, 1, V - 1]], dtype=dtype)
    for given in (ids, ids.numpy(), {"input_ids": ids}):
        batch = micro_batch(given, V)
        assert batch.ids.dtype == torch.int64
        assert batch.ids.tolist() == ids.tolist()


@pytest.mark.parametrize("tensors", [None, "pt", "np"])
def test_what_a_tokenizer_returns_is_a_batch(tensors: str | None) -> None:
    tokenizer = load_tokenizer(TINY_MODEL)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(3)
    texts = ["Once upon a time", "The", "A little girl and her dog"]
    alone = [tokenizer(text)["input_ids"] for text in texts]
    for side in ("left", "right"):
        encoded = tokenizer(texts, padding=True, padding_side=side, return_tensors=tensors)
        assert isinstance(encoded, BatchEncoding)
        batch = micro_batch(encoded, len(tokenizer))
        assert batch.lengths == tuple(map(len, alone))
        for row, ids, length in zip(batch.ids.tolist(), alone, batch.lengths, strict=True):
            assert row == ids + [0] * (len(row) - length)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 0, 1]], "attention_mask must have one run of ones"),
        ([[0, 0, 0]], "attention_mask must have one run of ones"),
        ([[1, 1]], r"attention_mask must be \(1, 3\) as input_ids, got \(1, 2\)"),
        ([[1, 1, 1]] * 2, r"attention_mask must be \(1, 3\) as input_ids, got \(2, 3\)"),
        ([1, 1, 1], r"attention_mask must be \(B, T\) integers, .*got \(3,\)"),
        ([[1.0, 1.0, 0.0]], r"attention_mask must be \(B, T\) integers, .*float32"),
        ([[1, 1], [1]], r"attention_mask must be \(B, T\) integers, got list"),
    ],
)
def test_masks_that_are_refused(mask: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as raised:
        micro_batch({"input_ids": [[1, 2, 3]], "attention_mask": mask}, V)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "ids", [None, "abc", [[1, 2], [3]], [1, 2], [[]], [[1.0, 2.0]], [[2**70]], [[V]], [[-1]]]
)
def test_ids_that_are_refused(ids: object) -> None:
    for batch in (ids, {"input_ids": ids}):
        with pytest.raises(CalibrationError, match=r"token (batches|ids) must be") as raised:
            micro_batch(batch, V)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("batches", [3, torch.tensor(3), {"input_ids": [[1, 2]]}])
def test_what_is_no_list_of_batches_is_refused(batches: Any) -> None:
    with pytest.raises(CalibrationError, match="token batches must be") as raised:
        hf.score(tiny_model("llama"), batches)
    assert "\n" not in str(raised.value)


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
    how = How(recompute=recompute)
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
def test_a_config_that_asks_for_other_outputs_changes_nothing(option: str) -> None:
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


def innards(model: PreTrainedModel) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every attribute of every module, a dictionary's entries (children, hooks) one by one."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            entries = value.items() if isinstance(value, dict) else [("", value)]
            yield from (((name, key, str(entry)), held) for entry, held in entries)


def break_in(where: str, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "set-up":
        model.model.rotary_emb.register_forward_pre_hook(stop)
    elif where == "forward":
        model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(stop)
    elif where == "forward inside the MLP":
        model.model.layers[1].mlp.act_fn = Broken()
    elif where == "norm":
        model.model.norm.register_forward_pre_hook(stop)
    elif where == "head":
        monkeypatch.setattr("hfprune_fast.scoring.run.linear_entropy", stop)
    elif where == "backward":
        monkeypatch.setattr("hfprune_fast.engine.mlp_hooks.gated_taylor", stop)
    elif where == "backward of a hooked MLP":
        monkeypatch.setattr("hfprune_fast.engine.mlp_hooks.taylor_statistics", stop)


class Broken(torch.nn.SiLU):
    def forward(self, _: torch.Tensor) -> torch.Tensor:
        raise StopError


PLACES = ["set-up", "forward", "forward inside the MLP", "norm", "head", "backward",
          "backward of a hooked MLP"]  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("where", ["nowhere", *PLACES])
def test_model_is_left_exactly_as_found(
    where: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", dtype=torch.float32).train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(True)
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    model.model.layers[2].mlp.register_forward_hook(lambda *_: None)  # so it is hooked, not known
    break_in(where, model, monkeypatch)
    before = dict(innards(model))
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    wanted = [tensor.requires_grad for tensor in tensors]
    batch = micro_batch(padded(sequences(9, 5), "left"), V)

    failing = nullcontext() if where == "nowhere" else pytest.raises(StopError)
    with failing, ResidentModel(model) as running:
        score_batches(running, [batch], How(recompute=recompute))
    after = dict(innards(model))
    assert after.keys() == before.keys()
    assert [key for key, value in after.items() if value is not before[key]] == []
    assert [tensor.requires_grad for tensor in tensors] == wanted
    assert all(tensor.grad is None for tensor in tensors)
    assert all(torch.equal(t, value) for t, value in zip(tensors, values, strict=True))
