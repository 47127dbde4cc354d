"""The tables of a run: two that take turns, whatever the passes add to."""

import pytest
import torch
from tiny_mixtures import tiny_mixture

from hfprune_fast.data.batches import micro_batch
from hfprune_fast.engine.layerwise import ResidentModel
from hfprune_fast.scoring.accumulator import ScoreAccumulator
from hfprune_fast.scoring.run import score_batches
from hfprune_fast.scoring.sums import PassOptions

# Of two tokens each, so that most experts get none in a pass.
BATCHES = [micro_batch(torch.tensor([[n, n + 40]]), 127) for n in range(6)]


@pytest.mark.parametrize(
    "options",
    [
        PassOptions(criteria=("fisher", "entropy"), output_fisher=True),
        PassOptions(criteria=()),
    ],
)
def test_no_table_is_made_for_a_pass(options: PassOptions) -> None:
    tables: list[tuple[int, int]] = []

    def commit(total: ScoreAccumulator, _: int) -> None:
        fisher = total.output_fisher
        tables.append((total.statistics.data_ptr(), 0 if fisher is None else fisher.data_ptr()))

    with ResidentModel(tiny_mixture("mixtral", torch.float64)) as model:
        totals = score_batches(model, BATCHES, options, on_commit=commit)
        alone = [score_batches(model, [batch], options) for batch in BATCHES]
    assert len(tables) == len(BATCHES)
    assert len(set(tables)) == 2
    assert tables[:2] * 3 == tables
    statistics = sum(each.statistics for each in alone)
    assert bool((alone[0].statistics == 0).any())
    assert torch.allclose(totals.statistics, torch.as_tensor(statistics), rtol=1e-12, atol=0)
    assert totals.experts is not None
    assert torch.allclose(totals.experts, torch.stack([e.experts for e in alone]).sum(0))  # type: ignore[arg-type]
    if totals.output_fisher is not None:
        fisher = torch.stack([each.output_fisher for each in alone]).sum(0)  # type: ignore[arg-type]
        assert torch.allclose(totals.output_fisher, fisher, rtol=1e-4)
