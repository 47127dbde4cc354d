"""What config.json has one number for: a keep that leaves several is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_mixtures import tiny_mixture
from torch import Tensor

import hfprune_fast as hf
from hfprune_fast.checkpoint.source import open_source
from hfprune_fast.errors import ArgumentError
from hfprune_fast.models.sites import SiteKey

Keep = dict[SiteKey, Tensor]


def without(keep: Keep, *sites: SiteKey) -> Keep:
    return {site: kept for site, kept in keep.items() if site not in sites}


ALL = torch.arange(24)
REFUSED: dict[str, tuple[str, Callable[[Keep], Keep], str]] = {
    "layers of different numbers": (
        "mixtral",
        lambda keep: without(keep, (1, 0)),
        "the same number of experts.* got 4 in layer 0 and 3 in layer 1",
    ),
    "experts of different widths": (
        "mixtral",
        lambda keep: {**keep, (2, 3): ALL[:7]},
        r"each expert the same number of neurons.* got 24 in \(0, 0\) and 7 in \(2, 3\)",
    ),
    "fewer than a token chooses": (
        "mixtral",
        lambda keep: {(layer, 0): ALL for layer in range(3)},
        "at least the 2 experts that a token chooses, got 1",
    ),
    "none of a layer": (
        "mixtral",
        lambda keep: without(keep, *((1, e) for e in range(4))),
        "got 4 in layer 0 and 0 in layer 1",
    ),
    "no MLP that all see": (
        "qwen3_moe",
        lambda keep: without(keep, 0),
        r"each layer in \[0\]|0\.\.0",
    ),
    "shared experts of different widths": (
        "qwen2_moe",
        lambda keep: {**keep, 2: ALL[:9]},
        "shared expert of each layer .*got 20 in layer 1 and 9 in layer 2",
    ),
    "dense layers of different widths": (
        "deepseek_v3 with two dense layers",
        lambda keep: {**keep, 1: ALL[:9]},
        "each layer without experts .*got 40 in layer 0 and 9 in layer 1",
    ),
    "a shared width that no key says": (
        "deepseek_v3",
        lambda keep: {**keep, 1: ALL[:23], 2: ALL[:23]},
        "a multiple of the 24 neurons of an expert.* got 23",
    ),
    "groups of different sizes": (
        "deepseek_v3",
        lambda keep: without(keep, *((n, e) for n in (1, 2) for e in (0, 1))),
        r"each of the 2 groups .* 2 or more, got \[2, 4\] in layer 1",
    ),
    "groups of one": (
        "deepseek_v3",
        lambda keep: without(keep, *((n, e) for n in (1, 2) for e in (0, 1, 2, 4, 5, 6))),
        r"2 or more, got \[1, 1\] in layer 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_config_json_cannot_say_is_refused(
    save_checkpoint: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    name, change, message = REFUSED[case]
    family, _, dense = name.partition(" with ")
    folder = save_checkpoint(
        tiny_mixture(family, **({"first_k_dense_replace": 2} if dense else {}))
    )
    whole = {site: torch.arange(width) for site, width in open_source(folder).spec.sites.items()}
    with pytest.raises(ArgumentError, match=message) as caught:
        hf.prune_checkpoint(folder, tmp_path / "out", change(whole))
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
