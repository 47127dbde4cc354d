"""The criteria that a model is scored by."""

from __future__ import annotations

CRITERIA = ("entropy", "cross_entropy", "fisher")
