"""The page: one self-contained HTML file; no scripts, no external resources."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files

from torch import Tensor

from hfprune_fast._version import __version__
from hfprune_fast.console import human_bytes, human_seconds
from hfprune_fast.errors import MAX_CHARS, printable
from hfprune_fast.evaluation.changes import ChangedToken
from hfprune_fast.models.size_text import kept_text, suits_text
from hfprune_fast.report import html, pictures
from hfprune_fast.report.facts import ALLOCATION_TEXTS, Facts, Measurement

# What a report begins with: by it, an earlier one is known and may be replaced.
START = '<!doctype html>\n<html lang="en">\n<head>\n<meta name="generator" content="hfprune_fast'


@dataclass(frozen=True)
class Report:
    """All that a page shows; what is None or empty is left out, and the page says so."""

    name: str  # of the pruned model's folder
    facts: Facts
    loading: str  # a sentence, code in backticks
    about: Sequence[tuple[str, str]]  # how the neurons were chosen
    training: str = "No training followed."
    ranked: Tensor | None = None  # (L, F) importance, in falling order
    importance_unit: str = ""
    changed: Sequence[ChangedToken] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)


def page(report: Report) -> str:
    """Return the page as HTML."""
    style = files("hfprune_fast.report").joinpath("page.css").read_text(encoding="utf-8")
    title = f"{html.name(report.facts.base_model.split('/')[-1])}, pruned"
    sections = [
        _widths(report), _importance(report), _allocations(report), *_fidelity(report),
        _run(report), _loading(report), _about(report),
    ]  # fmt: skip
    body = "\n".join(section for section in sections if section)
    return f"""{START} {__version__}">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data:">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>{title}</h1>
{_summary(report.facts, report.training)}
</header>
{body}
{_left_out(report)}
</main>
</body>
</html>
"""


def _summary(facts: Facts, training: str) -> str:
    """Say in plain numbers what was done, and what it costs."""
    tiles = [
        ("MLP neurons", f"{facts.prune_ratio:.2%}", "removed"),
        ("parameters", f"{facts.param_ratio:.2%}", "removed"),
        ("parameters left", _short(facts.params), f"of {_short(facts.dense_params)}"),
    ]
    said = (
        f"hfprune removed {facts.prune_ratio:.1%} of the MLP neurons of "
        f"<b>{html.name(facts.base_model)}</b>: {_left(facts)} are left in a layer, "
        f"{facts.params:,} of {facts.dense_params:,} parameters in all. {training}"
    )
    if facts.experts is not None:
        active, dense = facts.experts.active_params, facts.experts.dense_active_params
        tiles.append(("parameters a token uses", _short(active), f"of {_short(dense)}"))
    if facts.measurement:
        measured = facts.measurement.fidelity
        tiles += [
            ("KL(dense ‖ pruned)", f"{measured.kl_nats:.4f}", "nats a token"),
            ("perplexity", f"{measured.ppl_pruned:.2f}", f"dense {measured.ppl_dense:.2f}"),
            ("top-1 agreement", f"{measured.top1_agreement:.1%}", "of the positions"),
        ]
        said += (
            f" On {measured.tokens:,} held-out tokens of {html.name(facts.measurement.text)}, "
            f"both models expect the same next token at {measured.top1_agreement:.1%} of the "
            f"positions, and perplexity goes from {measured.ppl_dense:.2f} to "
            f"{measured.ppl_pruned:.2f}."
        )
    items = "\n".join(
        f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>"
        for name, value, note in tiles
    )
    return f"<p>{said}</p>\n<dl>\n{items}\n</dl>"


def _left(facts: Facts) -> str:
    """Say how many neurons layers have left of how many, and experts."""
    of = facts.experts
    experts = (of.count, of.dense_count, of.width, of.dense_width) if of else ()
    return kept_text(facts.widths, facts.dense_widths, experts)


def _short(count: int) -> str:
    """Return a count in a few characters: 902,272, 8.03 M, 70.6 B."""
    if count >= 10**9:
        return f"{count / 10**9:.4g} B"
    return f"{count / 10**6:.4g} M" if count >= 10**7 else f"{count:,}"


def _widths(report: Report) -> str:
    facts = report.facts
    text = f"<p>{_left(facts)}{' MLP neurons' if facts.experts is None else ''} a layer."
    if facts.layout == "padded":
        text += " In the file, layers are padded with zero neurons to the widest."
    suits = suits_text(facts.suited)
    text += f"</p>\n<p>{escape(suits[:1].upper() + suits[1:])}.</p>"
    rows = [
        (str(layer), f"{had:,}", f"{has:,}", f"{1 - has / had:.1%}")
        for layer, (had, has) in enumerate(zip(facts.dense_widths, facts.widths, strict=True))
        if had
    ]
    if not rows:
        return html.section("Widths", text)
    table = html.table(("layer", "dense", "kept", "removed"), rows, "numbers")
    text += f"\n<details><summary>Each layer in numbers</summary>{table}</details>"
    picture = pictures.widths(facts.widths, facts.dense_widths)
    return html.section("Widths", text, picture)


def _importance(report: Report) -> str:
    if report.ranked is None:
        return ""
    picture = pictures.importance(report.ranked, report.facts.widths, report.importance_unit)
    if picture is None:
        return ""
    at = "height" if len(report.ranked) <= pictures.MOST_CURVES else "colour"
    cuts = f"Layers that are cut at the same {at} gave up neurons that were worth the same."
    if report.facts.allocation == "measured":
        cuts = "Each layer’s importance was scaled to compare it with that of other layers."
    text = (
        "<p>Each layer’s neurons by importance, most important first, on a logarithmic scale. "
        f"Those to the left of the cut were kept. {cuts}</p>"
    )
    return html.section("Importance and the cut", text, picture)


def _allocations(report: Report) -> str:
    tried = report.facts.allocations_kl_nats
    if not tried:
        return ""
    chosen = html.name(report.facts.allocation)
    each = "; ".join(f"<i>{name}</i> {ALLOCATION_TEXTS[name]}" for name in tried)
    text = (
        f"<p>How the budget is dealt to the layers: {each}. "
        "Each was tried and measured on a part of the calibration text that it was not fitted to; "
        f"<b>{chosen}</b> was closest to the dense model.</p>"
    )
    return html.section(
        "Allocations tried", text, pictures.allocations(tried, report.facts.allocation)
    )


def _fidelity(report: Report) -> list[str]:
    measured = report.facts.measurement
    if measured is None:
        return []
    return [_positions(measured), _changed(report.changed)]


def _positions(measured: Measurement) -> str:
    fidelity = measured.fidelity
    rows = [
        ("KL(dense ‖ pruned)", f"{fidelity.kl_nats:.4f} nats a token"),
        ("perplexity, dense", f"{fidelity.ppl_dense:.3f}"),
        ("perplexity, pruned", f"{fidelity.ppl_pruned:.3f}"),
        ("top-1 agreement", f"{fidelity.top1_agreement:.2%}"),
        ("held-out text", html.name(measured.text)),
        ("tokens", f"{fidelity.tokens:,}"),
    ]
    text = (
        "<p>How far the pruned model’s next-token distribution is from the dense one’s, on text "
        "that it was not calibrated on. 0 nats: no difference.</p>\n"
    )
    text += html.table((), rows, "pairs")
    if not measured.by_position:
        return html.section("Fidelity", text)
    picture = pictures.kl_by_position(measured.by_position, fidelity.kl_nats)
    return html.section("Fidelity", text, picture)


def _changed(changed: Sequence[ChangedToken]) -> str:
    if not changed:
        return ""
    rows = [
        (
            f"{each.kl_nats:.2f}",
            f'<span class="token">{escape(printable(each.context))}</span>',
            _labelled("follows", _token(each.follows) if each.follows else "<i>end</i>"),
            _labelled("dense", f"{_token(each.dense_top)} {each.dense_probability:.0%}"),
            _labelled("pruned", f"{_token(each.pruned_top)} {each.pruned_probability:.0%}"),
        )
        for each in changed
    ]
    text = (
        f"<p>The {len(changed)} positions of the held-out text with the largest KL: what the text "
        "says up to there, what follows, and each model’s most likely next token with its "
        "probability. ␣ is a space, ↵ the end of a line.</p>"
    )
    head = ("KL, nats", "text up to here", "follows", "dense expects", "pruned expects")
    return html.section("What changed most", text, more=html.table(head, rows, "tokens"))


def _labelled(label: str, cell: str) -> str:
    """Return a cell with the label that it needs on a phone, where the table has no head."""
    return f'<span class="label">{label}</span> {cell}'


def _token(text: str) -> str:
    return f'<span class="token">{escape(printable(text.replace(" ", "␣")))}</span>'


def _run(report: Report) -> str:
    if not report.seconds:
        return ""
    longest = max(report.seconds.values()) or 1.0
    rows = [
        (
            escape(stage),
            human_seconds(seconds),
            f'<span class="bar" style="width:{100 * seconds / longest:.0f}%"></span>',
        )
        for stage, seconds in report.seconds.items()
    ]
    rows.append(("<b>in all</b>", f"<b>{human_seconds(sum(report.seconds.values()))}</b>", ""))
    peaks = " and ".join(f"{human_bytes(n)} of {name}" for name, n in report.peak_bytes.items())
    text = f"<p>The process took {escape(peaks)} at most.</p>" if peaks else ""
    return html.section("Time and memory", text, more=html.table((), rows, "run"))


def _loading(report: Report) -> str:
    facts, folder = report.facts, printable(report.name)[:MAX_CHARS]
    if facts.layout == "decilm":
        code = f"vllm serve {shlex.quote(folder)} --trust-remote-code"
    else:
        needed = "import hfprune_fast\n" if facts.layout == "custom" else ""
        code = (
            f"{needed}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(folder)})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})"
        )
    text = f"<p>{html.code(report.loading)}</p>\n<pre>{escape(code)}</pre>\n"
    text += "<p>To serve it with vLLM or llama.cpp, see hfprune_fast’s docs/serving.md.</p>"
    return html.section("How to load it", text)


def _about(report: Report) -> str:
    values = [(name, printable(value)[:MAX_CHARS]) for name, value in report.about]
    rows = [(escape(name), html.code(value)) for name, value in values]
    if not rows:
        return ""
    return html.section("How it was made", "", more=html.table((), rows, "pairs"))


def _left_out(report: Report) -> str:
    """Say what the page could show, had it been recorded or given."""
    facts = report.facts
    missing = {
        "importance curves (a scores file)": report.ranked is None,
        "the KL of each allocation (measured by allocation auto)": not facts.allocations_kl_nats,
        "fidelity (held-out text)": facts.measurement is None,
        "the tokens that changed most (the dense model and held-out text)": not report.changed
        and facts.measurement is not None,
        "time and memory of the run (known while it runs)": not report.seconds,
    }
    names = [name for name, is_missing in missing.items() if is_missing]
    said = f"Not recorded or not given, so not shown: {'; '.join(names)}. " if names else ""
    return f"<footer><p>{said}Made by hfprune_fast {__version__}.</p></footer>"
