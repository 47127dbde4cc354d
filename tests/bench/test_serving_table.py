"""docs/serving.md has the tables of the result file."""

import json

import serving_table


def test_the_page_says_what_was_measured() -> None:
    result = json.loads(serving_table.RESULT.read_text(encoding="utf-8"))
    text = serving_table.PAGE.read_text(encoding="utf-8")
    assert serving_table.page(result, text) == text
    changed = {**result, "rows": [{**result["rows"][0], "perplexity": 1.0}, *result["rows"][1:]]}
    assert serving_table.page(changed, text) != text
    assert serving_table.page(result, serving_table.page(changed, text)) == text


def test_each_engine_ran_what_it_is_said_to_run() -> None:
    result = json.loads(serving_table.RESULT.read_text(encoding="utf-8"))
    ran = {(row["engine"], row["model"], row["form"]) for row in result["rows"]}
    for model in ("demo", "qwen3", "mistral", "qwen2", "qwen3-tied"):
        assert {("llama.cpp", model, "default"), ("vLLM", model, "default")} <= ran
    for model in ("demo", "qwen2", "mistral"):
        assert ("vLLM", model, "decilm") in ran
