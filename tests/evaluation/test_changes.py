"""Where a pruned model differs: against the logits of both, position by position."""

import pytest
import torch
from truth import forward, kl_nats, tiny_model

import hfprune_fast as hf
from hfprune_fast.data.batches import token_data
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.evaluation import fidelity
from hfprune_fast.evaluation.changes import TokenChanges


@pytest.mark.parametrize("bins", [32, 5])
def test_positions_and_largest_changes(monkeypatch: pytest.MonkeyPatch, bins: int) -> None:
    monkeypatch.setattr(fidelity, "_CHUNK_ELEMENTS", 127 * 7)  # several chunks a window
    dense, pruned = tiny_model("llama"), tiny_model("llama")
    hf.prune(pruned, {layer: torch.arange(0, 96, 2) for layer in range(3)})
    ids = torch.randint(127, (5, 20), generator=torch.Generator().manual_seed(0))
    batches = token_data(ids.split(2), 127).batches
    collected = TokenChanges(most=7)
    with ResidentModel(dense) as p, ResidentModel(pruned) as q:
        hidden = p.final_hidden(batches), q.final_hidden(batches)
        found = fidelity.compare(batches, *hidden, p.head(), q.head(), collected)
    plain = hf.evaluate(dense, pruned, ids.split(2))
    assert found == plain  # nothing changes for those who do not look

    z_p, z_q = (
        torch.stack([forward(m.state_dict(), m.config, row).logits for row in ids]).detach()
        for m in (dense, pruned)
    )
    kl = kl_nats(z_p.flatten(0, 1), z_q.flatten(0, 1)).view(ids.shape)
    by_position = collected.by_position(bins)
    assert len(by_position) <= bins
    assert [b.first for b in by_position[1:]] == [b.last + 1 for b in by_position[:-1]]
    for each in by_position:
        part = kl[:, each.first : each.last + 1]
        assert (each.tokens, each.kl_nats) == (
            part.numel(),
            pytest.approx(float(part.mean()), 1e-4),
        )
    total = sum(each.kl_nats * each.tokens for each in by_position)
    assert total == pytest.approx(plain.kl_nats * plain.tokens, rel=1e-9)
    assert sum(each.tokens for each in by_position) == plain.tokens

    order = kl.flatten().argsort(descending=True)[:7].tolist()
    assert [(c.sequence, c.position) for c in collected.largest] == [divmod(i, 20) for i in order]
    first = collected.largest[0]
    row = z_p[first.sequence, first.position].softmax(-1)
    assert first.dense_top == int(row.argmax())
    assert first.dense_probability == pytest.approx(float(row.max()), rel=1e-4)
    assert first.pruned_top == int(z_q[first.sequence, first.position].argmax())
