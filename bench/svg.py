"""The little of SVG that the pictures need: the same bytes for the same data, on any machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.sax.saxutils import escape

INK, GREY, FAINT = "#222222", "#777777", "#dddddd"
# The first is the widest, so that what fits in it fits in all.
FONTS = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"
SIZE = 11


class Canvas:
    """A white sheet, since what is behind it may be dark."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._parts: list[str] = []

    def __str__(self) -> str:
        size = f'width="{self.width:.0f}" height="{self.height:.0f}"'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
                f'viewBox="0 0 {self.width:.0f} {self.height:.0f}" '
                f'font-family="{FONTS}" font-size="{SIZE}" fill="{INK}">',
                f'<rect {size} fill="#ffffff"/>',
                *self._parts,
                "</svg>\n",
            ]
        )

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", *, bold: bool = False,
        size: float = SIZE, turned: bool = False,
    ) -> None:  # fmt: skip
        how = f' text-anchor="{anchor}"' if anchor != "start" else ""
        how += ' font-weight="bold"' if bold else ""
        how += f' font-size="{size:g}"' if size != SIZE else ""
        how += f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}"{how}>{escape(text)}</text>')

    def line(
        self, points: list[tuple[float, float]], colour: str, width: float = 1, dashes: str = ""
    ) -> None:
        along = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
        self._parts.append(
            f'<polyline points="{along}" fill="none" stroke="{colour}" '
            f'stroke-width="{width:g}"{dashed}/>'
        )

    def marker(
        self, form: str, x: float, y: float, colour: str, radius: float, *, hollow: bool = False
    ) -> None:
        paint = f'fill="{"none" if hollow else colour}" stroke="{colour}" stroke-width="1.4"'
        if form == "circle":
            shape = f'circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"'
        else:
            corners = " ".join(
                f"{x + radius * dx:.1f},{y + radius * dy:.1f}" for dx, dy in FORMS[form]
            )
            shape = f'polygon points="{corners}"'
        self._parts.append(f"<{shape} {paint}/>")


def _star(arms: int, turn: float, inner: float) -> list[tuple[float, float]]:
    """Corners of a star, whose arms have length 1, from the top clockwise."""
    steps = [(1.15 if i % 2 == 0 else inner, math.pi * i / arms + turn) for i in range(2 * arms)]
    return [(length * math.sin(angle), -length * math.cos(angle)) for length, angle in steps]


FORMS = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "up": [(0, -1.1), (1.05, 0.8), (-1.05, 0.8)],
    "down": [(0, 1.1), (1.05, -0.8), (-1.05, -0.8)],
    "diamond": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
    "plus": _star(4, 0, 0.4),
    "cross": _star(4, math.pi / 4, 0.4),
}


@dataclass(frozen=True)
class Scale:
    """From values between low and high to positions between start and end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log
            else (self.low, self.high, value)
        )  # fmt: skip
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers of a logarithmic scale, three to seven of them."""
        span = self.high / self.low
        steps = (1, 2, 5) if span < 30 else (1, 3) if span < 300 else (1,)
        if span < 3:
            steps = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
        first, last = (math.floor(math.log10(v)) for v in (self.low, self.high))
        found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        found = [value for value in found if self.low <= value <= self.high]
        return found[:: max(1, round(len(found) / 6))]


def text_width(text: str, size: float = SIZE) -> float:
    """About, as no font is at hand to be asked."""
    return 0.6 * size * len(text)
