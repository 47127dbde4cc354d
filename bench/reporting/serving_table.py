"""Puts what `make test-serving` measured into docs/serving.md.

python bench/reporting/serving_table.py
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = map(str, Path(__file__).parents[1].glob("*/"))
from report_text import under

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "bench" / "results" / "serving" / "serving.json"
PAGE = ROOT / "docs" / "serving.md"
FORMS = {"default": "different widths", "uniform": "uniform widths"}


MODELS = """\
By `make test-serving`, over 256 tokens of the held-out text that ships: the same tokens in every
engine, 8 greedy tokens after them in vLLM, all equal to those of transformers in float32. `demo`
ships with the package; `qwen3` is that of `make qwen3-model`, trained for 200 steps if it was not
made; other names are models that HFPRUNE_SERVING_MODELS gave. `mistral`, `qwen2` and `qwen3-tied`
have random weights: what counts is that their perplexities agree. All were pruned by 25 %. So have
`mixtral` and `qwen3_moe`, of whose experts a quarter was dropped and the others were narrowed by a
quarter. MB is the size of the GGUF file.
"""


def form(name: str) -> str:
    """Return what a form is called in the table; a quantised one begins with how it was pruned."""
    how, comma, quantised = name.partition(", ")
    return FORMS.get(how, how) + comma + quantised


def sizes(row: dict[str, Any]) -> str:
    if "bytes" not in row:
        return ""
    dense = f" (dense {row['dense_bytes'] / 1e6:.2f})" if "dense_bytes" in row else ""
    return f"{row['bytes'] / 1e6:.2f}{dense}"


def line(row: dict[str, Any]) -> str:
    cells = [
        row["engine"],
        row["model"],
        form(row["form"]),
        f"{row['perplexity']:.7g}",
        f"{row['transformers']:.7g}",
        f"{row['kl']:.1e}" if "kl" in row else "",
        f"{row['top1']:.1%}" if "top1" in row else "",
        sizes(row),
    ]
    return f"| {' | '.join(cells)} |"


def section(result: dict[str, Any]) -> str:
    """Return the tables and what made them."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    head = "| engine | model | form | perplexity | in transformers | KL, nats | top-1 | MB |"
    rows = sorted(result["rows"], key=lambda row: row["engine"] != "llama.cpp")
    table = [head, "|---|---|---|---:|---:|---:|---:|---:|", *map(line, rows)]
    return f"{MODELS}\n" + "\n".join(table) + f"\n\n{versions}; {result['date']}, on a CPU.\n"


def page(result: dict[str, Any], text: str) -> str:
    """Return the page with this result under its heading "Measured"."""
    return under(text, "## Measured\n\n", section(result))


def main() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(page(result, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
