"""Entropy-based pruning of the MLP neurons of language models (HFPrune, arXiv 2603.08083).

hf.oneshot("path/to/model", "text.txt", "out", prune_ratio=0.2)   # the whole job
table = hf.score("path/to/model", "text.txt")        # every statistic of every neuron
keep = hf.select(table, prune_ratio=0.2)             # {layer: indices}
hf.prune(model, keep)                                # a loaded model, in place
hf.prune_checkpoint("path/to/model", "out", keep)    # or from disk to disk
hf.evaluate(dense, pruned, batches)                  # KL, perplexity, agreement
hf.recover("path/to/model", "out", "text.txt", "recovered")  # train by KL from the dense model
hf.evaluate_tasks("path/to/model", "out", tasks="hellaswag,piqa")  # lm-evaluation-harness
"""

from hfprune_fast._version import __version__
from hfprune_fast.errors import HFPruneError
from hfprune_fast.evaluation.fidelity import Fidelity, evaluate
from hfprune_fast.evaluation.harness import TaskResult, evaluate_tasks
from hfprune_fast.models.registration import register_with_transformers
from hfprune_fast.pruning.in_memory import prune
from hfprune_fast.pruning.on_disk import prune_checkpoint
from hfprune_fast.pruning.oneshot import oneshot
from hfprune_fast.pruning.refit import refit_down_proj
from hfprune_fast.pruning.selection import select
from hfprune_fast.recovery.run import recover
from hfprune_fast.scoring.score import score
from hfprune_fast.scoring.table import ImportanceTable

__all__ = [
    "Fidelity",
    "HFPruneError",
    "ImportanceTable",
    "TaskResult",
    "__version__",
    "evaluate",
    "evaluate_tasks",
    "oneshot",
    "prune",
    "prune_checkpoint",
    "recover",
    "refit_down_proj",
    "score",
    "select",
]

register_with_transformers()
