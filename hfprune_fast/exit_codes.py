"""What an error ends with: an exit code, and one line."""

from __future__ import annotations

import click

from hfprune_fast.errors import HFPruneError, is_out_of_memory, one_line


def explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line for an error: 2 for what the user can fix, else 1."""
    if isinstance(error, HFPruneError):
        return 2, str(error)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        hint = f" (see `{context.command_path} --help`)" if context else ""
        text = error.format_message()
        return 2, (text if len(text) <= 300 else f"{text[:299]}…") + hint
    if is_out_of_memory(error):
        advice = "try a smaller --batch-size or --seq-len, --dtype bfloat16 or --offload disk"
        return 2, f"out of memory; {advice} ({one_line(error)})"
    if isinstance(error, OSError):  # its text names the file and the reason
        return 2, one_line(error)
    if isinstance(error, UnicodeError):
        return 2, f"a name or text is not UTF-8: {one_line(error)}"
    what = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(error, OverflowError):
        return 2, f"a number is too large or too small ({what})"
    if not isinstance(error, Exception):
        return 2, f"a library gave up on its input ({what}); is a file damaged?"
    return 1, f"unexpected {what}; please report it with the traceback that --debug shows"
