"""Our scores in the file that ModelOpt's Puzzletron reads, so that it cuts MLPs by them.

    python examples/modelopt_scores.py                       # the model that ships, a few seconds
    python examples/modelopt_scores.py --model MODEL --calibration text.jsonl --out DIR
    python examples/modelopt_scores.py --scores scores.safetensors --out DIR    # of `hfprune score`

ModelOpt is not needed for it. In Puzzletron's configuration:

    pruning:
      activations_log_dir: DIR
      mlp_init_mode: PruneByActivationsLog
      mlp_init_config_yaml: {activations_log_dir: DIR}

It finds rank_0.pth and args.json there, takes its own scoring for done, and keeps the neurons of
the highest scores in each layer. As in ModelOpt 0.47, for Llama, Mistral, Qwen2 and Qwen3.
"""

import argparse
import json
from pathlib import Path

import torch

import hfprune_fast as hf

parser = argparse.ArgumentParser(description="Write scores for ModelOpt's Puzzletron.")
parser.add_argument("--model", default="demo", help="a folder or hub name")
parser.add_argument("--calibration", default="demo", help="text, as `hfprune score` takes it")
parser.add_argument("--scores", help="a scores file, instead of model and calibration")
parser.add_argument("--statistic", default="l1", choices=["l1", "l2", "fisher_mask", "act"])
parser.add_argument("--out", type=Path, default="puzzletron_scores", help="a new folder")
args = parser.parse_args()
if args.out.exists():  # Puzzletron reads every rank_*.pth in it
    parser.error(f"--out must be a folder that does not exist yet, got {args.out}")
try:
    if args.scores:
        table = hf.ImportanceTable.load(args.scores)
    else:
        table = hf.score(args.model, args.calibration)
except hf.HFPruneError as error:
    parser.error(str(error))
log = {
    f"model.layers.{layer}.mlp.down_proj": {"score": row.clone()}  # a view is saved with the rest
    for layer, row in enumerate(table.importance(args.statistic))
}
args.out.mkdir(parents=True)
torch.save(log, args.out / "rank_0.pth")
(args.out / "args.json").write_text(json.dumps(table.provenance, indent=2))
print(f"{args.out}: scores of {table.model.intermediate_size} neurons in each of {len(log)} layers")
