"""Puts what `make families` found of every family into docs/families.md.

python bench/reporting/families_table.py [NOTES]

NOTES is the file of lines that the tests of every family wrote (`tests/helpers/family_case.py`);
of it bench/results/families/families.json is made anew first.
"""

import json
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path[:0] = map(str, Path(__file__).parents[1].glob("*/"))
from report_text import under

from hfprune_fast.models.families import FAMILIES
from hfprune_fast.models.refused import REFUSED

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "bench" / "results" / "families" / "families.json"
PAGE = ROOT / "docs" / "families.md"
PACKAGES = ("torch", "transformers")
# The columns of errors, and the tests that each is the largest error of.
ERRORS = {
    "scores": ("scores resident", "scores loaded"),
    "streamed": ("scores cpu", "scores disk"),
    "recomputed": ("scores recomputed",),
    "bfloat16": ("bfloat16 in float32",),
    "logits": ("logits none", "logits disk"),
    "removal costs": ("removal costs",),
    "evaluation": ("evaluation",),
    "refit": ("refit",),
}
# Those of families with experts.
EXPERTS_ERRORS = {
    "neurons' scores": ("scores resident", "scores loaded"),
    "experts' scores": ("experts' scores resident", "experts' scores loaded"),
    "streamed": ("scores cpu", "scores disk", "experts' scores cpu", "experts' scores disk"),
    "recomputed": ("scores recomputed", "experts' scores recomputed"),
    "bfloat16": ("bfloat16 in float32",),
    "logits": ("logits none", "logits disk"),
    "removal costs": ("removal costs",),
    "evaluation": ("evaluation",),
    "refit": ("refit",),
}
# The columns of names: the form whose test passed, and where it stands in the table.
FORMS = {
    "written as": {
        "layout uniform": "uniform",
        "layout custom": "custom",
        "layout padded": "padded",
    },
    "in memory": {"in memory uniform": "uniform", "in memory custom": "different"},
    "export": {"export padded": "padded"},
}
REMOVED = {"dropped": "experts", "narrowed": "their neurons", "own": "MLPs", "all": "all"}
EXPERTS_FORMS = {
    "written without": {f"layout {form}": name for form, name in REMOVED.items()},
    "in memory": {f"in memory {form}": name for form, name in REMOVED.items()},
}
WORDS = """\
The columns of numbers are largest errors, of a tiny random model of transformers' own class in
float64, over sequences of 2 to 70 tokens, padded:

- scores: l1, l2, fisher_mask and act by entropy and by fisher, against autograd through the whole
  model, as a share of the layer's largest; streamed, with `--offload cpu` and `disk`; recomputed,
  with layers recomputed in the backward; bfloat16, of a bfloat16 checkpoint run in float32, with
  embedding and head tied where the tiny model does not tie them, and the other way round;
- removal costs: against those by autograd at down_proj's output; gradients are summed in float32;
- logits: run layer by layer, against the model's own forward;
- evaluation: KL and perplexities of `hf.evaluate`, against those of the model's own logits;
- refit: how far a refit that keeps every neuron is from the weights that it was given.

Written as, in memory and export name the forms in which a pruned model, loaded by transformers,
gave the logits of the dense model with those neurons masked, to 1e-12.
"""
EXPERTS_WORDS = """\
Families with experts, against a truth that runs every expert on every token, through the router
too. Experts' scores are expert_taylor, expert_reap, expert_count and expert_mass. A pruned model is
without some experts, without neurons of each expert, without neurons of the MLPs that see every
token (where there are any), or without some of all; it gave the logits of the dense model whose
router cannot choose those experts, and whose other neurons are masked, to 1e-12.
"""


def gather(lines: list[str]) -> dict[str, Any]:
    """Return the result that the tests' notes amount to: the largest error of each."""
    families: dict[str, Any] = {}
    place = {name: number for number, name in enumerate(FAMILIES)}
    for line in lines:
        note = json.loads(line)
        family = families.setdefault(note["family"], {"known_as": note["known_as"], "errors": {}})
        errors = family["errors"]
        errors[note["what"]] = max(note["error"], errors.get(note["what"], 0.0))
    return {
        "date": date.today().isoformat(),
        "versions": {name: version(name) for name in PACKAGES},
        "families": dict(sorted(families.items(), key=lambda item: place[model_type(item[0])])),
    }


def shown(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def model_type(name: str) -> str:
    """Return the model_type of a tiny model, whose name may say more."""
    return name.partition("+")[0]


def has_experts(family: dict[str, Any]) -> bool:
    return any(what.startswith("experts' ") for what in family["errors"])


def row(name: str, family: dict[str, Any]) -> str:
    errors = family["errors"]
    cells = [f"`{model_type(name)}`", family["known_as"]]
    for whats in (EXPERTS_ERRORS if has_experts(family) else ERRORS).values():
        tried = [errors[what] for what in whats if what in errors]
        cells.append(shown(max(tried)) if len(tried) == len(whats) else "")
    for forms in (EXPERTS_FORMS if has_experts(family) else FORMS).values():
        cells.append(", ".join(form for what, form in forms.items() if what in errors))
    return f"| {' | '.join(cells)} |"


def table(families: dict[str, Any], columns: list[str]) -> str:
    head = ["model_type", "known as", *columns]
    rows = [row(name, family) for name, family in families.items()]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows])


def supported(result: dict[str, Any]) -> str:
    """Return the tables and what made them."""
    mixtures = {name: f for name, f in result["families"].items() if has_experts(f)}
    dense = {name: f for name, f in result["families"].items() if name not in mixtures}
    parts = [WORDS, table(dense, [*ERRORS, *FORMS])]
    if mixtures:
        parts += [f"\n{EXPERTS_WORDS}", table(mixtures, [*EXPERTS_ERRORS, *EXPERTS_FORMS])]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    made = f"By `make families`, {result['date']}, with {versions}, on a CPU."
    return "\n".join(parts) + f"\n\n{made}\n"


def refused() -> str:
    """Return the table of what the package refuses by name."""
    whys: dict[str, list[str]] = {}
    for model_type, family in FAMILIES.items():
        for key, what in family.refused.items():
            whys.setdefault(f"it has {what}", []).append(f"`{model_type}` with `{key}`")
    for model_type, why in REFUSED.items():
        whys.setdefault(why, []).append(f"`{model_type}`")
    table = [f"| {', '.join(names)} | {why} |" for why, names in whys.items()]
    return "\n".join(["| model_type | why |", "|---|---|", *table]) + "\n"


def page(result: dict[str, Any], text: str) -> str:
    """Return the page with this result, and what is refused, under their headings."""
    for heading, made in (("Supported", supported(result)), ("Refused by name", refused())):
        text = under(text, f"## {heading}\n\n", made)
    return text


def main() -> None:
    if len(sys.argv) > 1:
        lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(gather(lines), indent=1) + "\n", encoding="utf-8")
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(page(result, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
