"""What a refused command says."""

import re
from typing import Any


def assert_refused(run: Any, message: str) -> None:
    assert run.code == 2, run.err
    lines = re.split(r"[\r\n]+", run.err.strip())
    assert lines[-1].startswith("hfprune: error: ")
    assert re.search(message, lines[-1]), lines[-1]
    # Nothing else is there but progress bars and what was said before.
    bars = re.compile(
        r"\s*(Writing model shards: |scoring: |removal costs: |measuring layers: |allocating: |"
        r"refitting: |evaluating: |writing: |verifying: |hfprune: |$)"
    )
    assert all(bars.match(line) for line in lines), run.err
    assert run.out == ""
