"""docs/families.md has the table of the result file, which has every family and all its tests."""

import json
import re

import families_table
from mixture_configs import MIXTURES, MODELS, model_type

from hfprune_fast.models.families import FAMILIES


def test_the_page_says_what_was_found() -> None:
    result = json.loads(families_table.RESULT.read_text(encoding="utf-8"))
    text = families_table.PAGE.read_text(encoding="utf-8")
    assert families_table.page(result, text) == text
    changed = {**result, "families": {**result["families"], "other": result["families"]["llama"]}}
    assert families_table.page(changed, text) != text
    assert families_table.page(result, families_table.page(changed, text)) == text


def test_page_result_and_package_have_the_same_families() -> None:
    families = json.loads(families_table.RESULT.read_text(encoding="utf-8"))["families"]
    assert list(dict.fromkeys(map(model_type, families))) == list(FAMILIES)
    assert set(families) == set(MODELS)
    for name, family in families.items():
        assert family["known_as"] == MODELS[name].known_as
        assert families_table.has_experts(family) == (name in MIXTURES)
        columns = families_table.EXPERTS_ERRORS if name in MIXTURES else families_table.ERRORS
        tried = {what for whats in columns.values() for what in whats}
        assert tried <= set(family["errors"]), name


def test_the_readme_names_the_same_families() -> None:
    text = (families_table.ROOT / "README.md").read_text(encoding="utf-8")
    models = text.partition("## Models\n")[2].partition("\n## ")[0]
    assert [name for name in FAMILIES if not re.search(rf"\b{name}\b", models)] == []


def test_notes_become_the_largest_error_of_each() -> None:
    notes = [
        {"family": "qwen2", "known_as": "A 1", "what": what, "error": error}
        for what, error in (("refit", 1e-15), ("refit", 3e-13), ("layout padded", 0.0))
    ]
    result = families_table.gather([json.dumps(note) for note in notes])
    assert result["families"]["qwen2"]["errors"] == {"refit": 3e-13, "layout padded": 0.0}
    cells = families_table.row("qwen2", result["families"]["qwen2"]).split(" | ")
    assert cells == ["| `qwen2`", "A 1", *7 * [""], "3e-13", "padded", "", " |"]


def test_families_with_experts_have_a_table_of_their_own() -> None:
    notes = [
        {"family": family, "known_as": "A 1", "what": what, "error": 1e-14}
        for family, what in (
            ("gemma4_text", "refit"),
            ("gemma4_text+experts", "experts' scores resident"),
            ("gemma4_text+experts", "experts' scores loaded"),
            ("gemma4_text+experts", "in memory dropped"),
            ("gemma4_text+experts", "in memory all"),
        )
    ]
    text = families_table.supported(families_table.gather([json.dumps(note) for note in notes]))
    rows = [line for line in text.splitlines() if line.startswith("| `gemma4_text`")]
    dense, mixture = rows
    assert dense == f"| `gemma4_text` | A 1 | {7 * ' | '}1e-14 |  |  |  |"
    assert mixture == "| `gemma4_text` | A 1 |  | 1e-14 |  |  |  |  |  |  |  |  | experts, all |"
