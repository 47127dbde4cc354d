"""The model card of a pruned checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from hfprune_fast._version import __version__
from hfprune_fast.errors import MAX_CHARS, printable
from hfprune_fast.models.size_text import neurons_text, suits_text, widths_in

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

PAPER = "arXiv 2603.08083"

# What each layout changes in the architecture, and what loading it takes beyond transformers.
_CHANGED = {
    "uniform": "The\narchitecture is unchanged; only `intermediate_size` is smaller.",
    "experts": "The\narchitecture is unchanged; only experts are fewer or widths smaller.",
    "custom": "Layers have\ndifferent widths, `mlp_widths` in config.json.",
    "decilm": "Layers have\ndifferent widths, `block_configs` in config.json (DeciLM's layout).",
    "native": "Layers have\ndifferent widths, `per_layer_config` in config.json.",
    "padded": "Narrower\nlayers are filled up with zero neurons, which add nothing to the output "
    "but take time and memory\nlike any others: the model is as large as if all layers were as "
    "wide as the widest.",
}
_LOADING = {
    "custom": " after `import hfprune_fast`, or with `trust_remote_code=True`, which runs this "
    "folder's `modeling_hfprune.py`",
}


def loading_text(layout: str) -> str:
    """Say how a checkpoint of this layout is loaded."""
    if layout == "decilm":
        return "Load it with vLLM, `--trust-remote-code`; transformers has no class for it."
    return f"Load it with `AutoModelForCausalLM.from_pretrained`{_LOADING.get(layout, '')}."


def made_rows(
    record: Mapping[str, Any], shown: Callable[[str], str] = str
) -> list[tuple[str, str]]:
    """Say how the neurons were chosen, what became of the others, and on what text.

    Args:
        shown: applied to what others chose.
    """
    rows: list[tuple[str, str]] = []
    provenance = record.get("provenance", {})
    if "criterion" in record.get("requested", {}):
        rows += _recipe_rows(record["requested"], record.get("chosen", {}), shown)
    calibration = provenance.get("calibration")
    if isinstance(calibration, dict) and "source" in calibration:
        rows.append(("calibration", shown(str(calibration["source"]))))
    if {"samples", "tokens"} <= provenance.keys():
        size = f"{provenance['samples']} samples, {provenance['tokens']} tokens"
        rows.append(("calibration size", shown(size)))
    if "recovery" in record:
        rows += _recovery_rows(record["recovery"], shown)
    return rows


def _recipe_rows(
    requested: dict[str, Any], chosen: dict[str, Any], shown: Callable[[str], str]
) -> list[tuple[str, str]]:
    if requested["select"] == "obs":
        ranked = "what a removal costs when the others are refitted (criterion `fisher`)"
    else:
        ranked = f"criterion `{_word(requested['criterion'])}`"
        ranked += f", statistic `{_word(requested['statistic'])}`" if requested["statistic"] else ""
    allocation = str(chosen.get("allocation", requested["allocation"]))
    if allocation == "measured":
        allocation += ": one ranking, a layer's scores scaled by the KL of cutting it alone"
    rows = [("ranked by", ranked), ("allocation", shown(allocation))]
    if trained := int(chosen.get("reconstructed_layers", 0)):
        how = f"trained in {trained} layers, one at a time, to give the dense stream"
        rows.append(("kept neurons", how))
    elif requested["refit"] != "none":
        rows.append(("down_proj", "refitted to the dense model by least squares"))
    return rows


def _word(name: object) -> str:
    """Return a name as it can stand between backticks."""
    return re.sub(r"\W", "", str(name))[:MAX_CHARS]


def escaped(text: str) -> str:
    """Return a text that Markdown and HTML show as it is, on one line; a tab is shown as \\t."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~$&@:])", r"\\\1", printable(text[:MAX_CHARS]))


def _front_matter(record: dict[str, Any], facts: Mapping[str, Any]) -> str:
    """Return the card's metadata, by which the hub finds, lists and compares models."""
    from huggingface_hub import ModelCardData

    base_model = record["base_model"]
    given = {**facts, "pipeline_tag": "text-generation", "library_name": "transformers"}
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base_model, re.ASCII):  # a name on the hub
        # The hub has no word for a pruned model; this is its word for other weights of the same.
        given |= {"base_model": base_model, "base_model_relation": "finetune"}
    if "fidelity" in record:
        given["model_name"] = f"{base_model.split('/')[-1][:MAX_CHARS]}, pruned"
        given["eval_results"] = _eval_results(record["fidelity"])
    return ModelCardData(**given, tags=["pruned", "hfprune"]).to_yaml()


def _eval_results(fidelity: Mapping[str, Any]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    text = str(fidelity["text"])[:MAX_CHARS]
    metrics = {
        "perplexity": ("Perplexity", fidelity["ppl_pruned"]),
        "perplexity_dense": ("Perplexity of the dense model", fidelity["ppl_dense"]),
        "kl_divergence": ("KL(dense ‖ pruned), nats a token", fidelity["kl_nats"]),
        "top1_agreement": ("Top-1 agreement with the dense model", fidelity["top1_agreement"]),
    }
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=text,
            dataset_name=f"{text}, {fidelity['tokens']} held-out tokens",
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )
        for metric, (name, value) in metrics.items()
    ]


def fidelity_rows(fidelity: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say what was measured on held-out text."""
    ppl_dense, ppl_pruned = fidelity["ppl_dense"], fidelity["ppl_pruned"]
    return [
        ("KL(dense ‖ pruned)", f"{fidelity['kl_nats']:.4f} nats a token"),
        ("perplexity", f"{ppl_pruned:.2f}, dense {ppl_dense:.2f}"),
        ("top-1 agreement", f"{fidelity['top1_agreement']:.1%}"),
        ("measured on", f"{escaped(str(fidelity['text']))}, {fidelity['tokens']:,} tokens"),
    ]


def training_text(record: Mapping[str, Any]) -> str:
    """Say whether a pruned model was trained afterwards as a whole, and by what."""
    recovery = record.get("recovery")
    if recovery is None:
        if record.get("requested", {}).get("refit") == "reconstruct":
            return "No training of the whole model followed."
        return "No training followed."
    if not int(recovery["best_step"]):
        return "Training it did not lower the held-out loss, so its weights are unchanged."
    return f"It was then trained by {_loss_text(recovery)}."


def _loss_text(recovery: Mapping[str, Any]) -> str:
    losses = {
        "kl": "KL from the dense model",
        "ce": "cross entropy of the text",
        "kl+ce": "KL from the dense model and cross entropy of the text",
    }
    return losses.get(recovery["loss"], _word(recovery["loss"]))


def _recovery_rows(
    recovery: Mapping[str, Any], shown: Callable[[str], str]
) -> list[tuple[str, str]]:
    """Say how a pruned model was trained, and what that did on held-out windows of the text."""
    rank = int(recovery["lora"])
    what = f"LoRA of rank {rank}" if rank else "weights themselves"
    before, after = float(recovery["kl_before"]), float(recovery["kl_after"])
    return [
        ("recovery", f"{what}, by {_loss_text(recovery)}"),
        ("recovery text", f"{shown(str(recovery['text']))}, {int(recovery['tokens']):,} tokens"),
        ("held-out KL by recovery", f"{before:.4f} to {after:.4f} nats a token"),
    ]


def model_card(record: dict[str, Any], facts: Mapping[str, Any]) -> str:
    """Return README.md of a pruned checkpoint.

    Args:
        record: what becomes its hfprune.json; "fidelity" in it is a `Measurement.record()`.
        facts: the source's licence and languages, as `checkpoint.source_card` reads them.
    """
    base_model, achieved = record["base_model"], record["achieved"]
    rows = [
        ("base model", escaped(base_model)),
        ("MLP neurons a layer", neurons_text(achieved)),
        ("neurons removed", f"{achieved['prune_ratio']:.2%}"),
        ("widths", suits_text(widths_in(achieved))),
        ("parameters", f"{achieved['params']:,} of {achieved['dense_params']:,}"),
        ("parameters removed", f"{achieved['param_ratio']:.2%}"),
    ]
    if "experts" in achieved:
        active = f"{achieved['active_params']:,} of {achieved['dense_active_params']:,}"
        rows.append(("parameters a token uses", active))
    rows += made_rows(record, escaped)
    if "fidelity" in record:
        rows += fidelity_rows(record["fidelity"])
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    layout = achieved.get("layout", "uniform")
    changed = _CHANGED["experts" if "experts" in achieved else layout]
    by = f"hfprune_fast {__version__}, after HFPrune ({PAPER})"
    return f"""---
{_front_matter(record, facts)}
---

# {escaped(base_model.split("/")[-1])}, pruned

MLP neurons were cut out with {by}. {changed}
{training_text(record)}

| | |
|---|---|
{table}

{loading_text(layout)} Which neurons were kept, and by what they were
chosen, is in `hfprune.json`.
"""
