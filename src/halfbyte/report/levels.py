"""Where the values of a layer's input lie and where the levels of its grid are: one small picture a layer, as inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from halfbyte.formats import get_grid
from halfbyte.report.figures import number
from halfbyte.report.schema import InputCodes, Layer, Run, finite

LEFT, WIDTH, HEIGHT = 46, 280, 110  # pixels: the labels, and the bars
ROW, AXIS = 12, 14  # pixels: a row of levels, the numbers below
SHARES = 1e-5  # the smallest share of all values that has a bar; heights are logarithms
MARKS = (0.1, 0.001)  # shares with a line across
WORST = 6  # layers shown at first


@dataclass(frozen=True)
class LevelPicture:
    """One layer's picture, and what stands below it."""

    name: str
    facts: list[str]
    svg: str


@dataclass(frozen=True)
class LevelPictures:
    """The pictures of one run."""

    worst: list[LevelPicture]
    others: list[LevelPicture]
    ranked: bool  # by the SQNR of the layers' outputs; else in model order


Key = tuple[str, tuple[int, ...], float, float]  # grid, steps, ends of the axis: what the rows of levels depend on


class LevelDrawings:
    """Draws the pictures of a page; rows of levels that many layers share are drawn once, and referred to."""

    def __init__(self) -> None:
        self.combs: dict[Key, str] = {}

    def of_run(self, run: Run) -> LevelPictures | None:
        """The layers with small grids, the worst first; None where there are none."""
        rows = [row for row in run["layers"] if row.get("input_codes")]
        ranked = any(finite(row["output_sqnr"]) for row in rows)
        if ranked:
            rows.sort(key=lambda row: row["output_sqnr"] if row["output_sqnr"] is not None else math.inf)
        made = [self._picture(row) for row in rows]
        return LevelPictures(made[:WORST], made[WORST:], ranked) if made else None

    def symbols(self) -> str:
        """The rows of levels, to stand in the page once, before the pictures."""
        drawn = "".join(f'<g id="levels-{place}">{comb}</g>' for place, comb in enumerate(self.combs.values()))
        return f'<svg width="0" height="0" aria-hidden="true" class="symbols"><defs>{drawn}</defs></svg>' if drawn else ""

    def _picture(self, row: Layer) -> LevelPicture:
        codes = row["input_codes"]
        assert codes is not None
        facts = [f"{codes['grid']}, {number(codes['entropy'], 2)} of {get_grid(codes['grid']).bits} bits used"]
        if finite(row["output_sqnr"]):
            facts.insert(0, f"SQNR {number(row['output_sqnr'])} dB")
        facts.append(f"step {codes['step']:.2g}")
        if codes["outside"]:
            facts.append(f"{percent(codes['outside'])} cut off")
        key = (codes["grid"], tuple(codes["steps"]), codes["low"], codes["high"])
        comb = list(self.combs).index(key) if key in self.combs else len(self.combs)
        self.combs.setdefault(key, _comb(key))
        return LevelPicture(row["name"], facts, _svg(codes, comb))


def percent(share: float) -> str:
    """A share as a percentage of one or two digits."""
    if 0 < share < 0.0001:
        return "<0.01 %"
    return f"{100 * share:.0f} %" if share >= 0.095 or not share else f"{100 * share:.1g} %"


def _place(value: float, low: float, high: float) -> float:
    return LEFT + WIDTH * (value - low) / (high - low)


def _top(share: float) -> float:
    """The height at which a share's bar ends, from above."""
    return HEIGHT * min(1.0, math.log(share) / math.log(SHARES)) if share > 0 else HEIGHT


def _bars(counts: Sequence[int]) -> str:
    """The outline of all bars as one path, in whole pixels."""
    total, path, level = max(1, sum(counts)), [f"M{LEFT} {HEIGHT}"], HEIGHT
    for index, count in enumerate(counts):
        top = round(_top(count / total))
        if top != level:
            path.append(f"V{top}")
            level = top
        path.append(f"H{round(LEFT + WIDTH * (index + 1) / len(counts), 1):g}")
    return f"{''.join(path)}V{HEIGHT}z"


def _comb(key: Key) -> str:
    """A row of ticks for every shift or multiple, the finest above; grids without have their levels drawn through the bars."""
    grid, steps, low, high = key
    parts = []
    for row, step in enumerate(steps):
        y, height = (HEIGHT + 3 + ROW * row, ROW - 3) if len(steps) > 1 else (4, HEIGHT)
        places = sorted({round(_place(level * step, low, high), 1) for level in get_grid(grid).levels})
        parts.append("".join(f"M{place:g} {y}v{height}" for place in places))
    return f'<path d="{"".join(parts)}"/>'


def _svg(codes: InputCodes, comb: int) -> str:
    low, high, shifts, levels = codes["low"], codes["high"], codes["shifts"], get_grid(codes["grid"]).levels
    shifted = len(shifts) > 1
    bottom = HEIGHT + (ROW * len(shifts) if shifted else 4) + AXIS
    drawn = [f'<path class="mark" d="{"".join(f"M{LEFT} {_top(share):.0f}h{WIDTH}" for share in MARKS)}"/>']
    labels = [(_top(share) + 4, percent(share)) for share in MARKS]
    if shifted:
        labels += [(HEIGHT + ROW * (shift + 1), percent(share)) for shift, share in enumerate(shifts)]
    drawn += [f'<text x="{LEFT - 5}" y="{y:.0f}" text-anchor="end">{escape(label)}</text>' for y, label in labels]
    largest = codes["steps"][-1]
    for value in dict.fromkeys((largest * min(levels), round(codes["zero"]), largest * max(levels))):
        place = _place(value, low, high)
        anchor = "middle" if place < LEFT + WIDTH - 12 else "end"
        drawn.append(f'<text x="{place:.0f}" y="{bottom - 3}" text-anchor="{anchor}">{number(value, 0)}</text>')
    return (
        f'<svg viewBox="0 0 {LEFT + WIDTH} {bottom}" role="img" aria-label="{escape(_described(codes))}" class="levels">'
        f'<path class="bars" d="{_bars(codes["counts"])}"/><use href="#levels-{comb}"/>{"".join(drawn)}</svg>'
    )


def _described(codes: InputCodes) -> str:
    """The picture in words."""
    counts, shifts = codes["counts"], codes["shifts"]
    width, least = (codes["high"] - codes["low"]) / len(counts), sum(counts) / 20
    below = next((index for index, seen in enumerate(accumulate(counts)) if seen > least), 0)
    above = next((index for index, seen in enumerate(accumulate(reversed(counts))) if seen > least), 0)
    said = f"90 % of the values lie between {codes['low'] + below * width:.1f} and {codes['high'] - above * width:.1f} steps"
    if len(shifts) > 1:
        shares = (f"{step}: {percent(share)}" for step, share in zip(codes["steps"], shifts, strict=True))
        said += "; subgroups by step: " + ", ".join(shares)
    return f"{said}."
