"""Entropy-based pruning of the MLP neurons of language models (HFPrune, arXiv 2603.08083).

table = hf.score("path/to/model", "text.txt")        # every statistic of every neuron
keep = hf.select(table, prune_ratio=0.2)             # {layer: indices}
hf.prune(model, keep)                                # a loaded model, in place
hf.prune_checkpoint("path/to/model", "out", keep)    # or from disk to disk
hf.evaluate(dense, pruned, batches)                  # KL, perplexity, top-1 agreement
"""

from hfprune_fast._version import __version__
from hfprune_fast.compaction import prune, prune_checkpoint
from hfprune_fast.errors import HFPruneError
from hfprune_fast.evaluation import Fidelity, evaluate
from hfprune_fast.importance import ImportanceTable
from hfprune_fast.layouts import register_with_transformers
from hfprune_fast.refit import refit_down_proj
from hfprune_fast.score_job import score
from hfprune_fast.selection import select

__all__ = [
    "Fidelity",
    "HFPruneError",
    "ImportanceTable",
    "__version__",
    "evaluate",
    "prune",
    "prune_checkpoint",
    "refit_down_proj",
    "score",
    "select",
]

register_with_transformers()
