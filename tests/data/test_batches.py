from typing import Any

import pytest
import torch
from padding import padded
from transformers import BatchEncoding
from truth import tiny_model

import hfprune_fast as hf
from hfprune_fast.checkpoint.folder import TINY_MODEL
from hfprune_fast.checkpoint.pretrained import load_tokenizer
from hfprune_fast.data.batches import micro_batch
from hfprune_fast.errors import CalibrationError

V = 127


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
