"""Which LoRA serves which timesteps: how many layers use each, and a row for every layer along the timesteps, as inline SVG."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from halfbyte.report.charts import COLOURS

Choice = Mapping[str, Sequence[Sequence[int]]]  # by layer: (weight set, number of neighbouring timesteps), the cleanest first
WIDTH, NAMES, ROW, MARGIN = 1040, 330, 13, 34  # pixels: of the picture, of the names, of a layer's row, below for the axis
NARROW, TALL = 350, 30  # pixels on phones, where names stand above their rows
SHARE_HEIGHT = {WIDTH: 160, NARROW: 120}


def allocation_svg(choice: Choice, timesteps: Sequence[float], narrow: bool = False) -> str:
    """A row for every layer as one SVG element, in the page's colours.

    Args:
        choice: as `HealResult.to_dict` has it.
        timesteps: ascending.
        narrow: for phones.
    """
    width, left, row = (NARROW, 0, TALL) if narrow else (WIDTH, NAMES, ROW)
    scale, parts = (width - left) / max(1, len(timesteps)), []
    for line, (name, runs) in enumerate(choice.items()):
        y, right = row * line, float(width)  # noise is on the left, where sampling starts
        place = f'x="0" y="{y + 13}"' if narrow else f'x="{NAMES - 8}" y="{y + ROW - 3}" text-anchor="end"'
        parts.append(f'<text {place} fill="var(--muted)">{escape(name)}</text>')
        for number, length in runs:
            right -= length * scale
            colour, title = _colour(number), f"<title>{escape(name)}: weights {number}, {length} timesteps</title>"
            top, size = y + row - 11 - (not narrow), f'width="{length * scale:.2f}" height="{ROW - 2}"'
            parts.append(f'<rect x="{right:.2f}" y="{top}" {size} fill="{colour}">{title}</rect>')
    several = sum(len({number for number, _ in runs}) > 1 for runs in choice.values())
    described = f"{several} of {len(choice)} layers choose between weights by the timestep; the others use one set."
    parts.append(_axis(left, width, row * len(choice) + 16, timesteps))
    return _svg("allocation", narrow, "Weights by timestep", described, width, row * len(choice) + MARGIN, parts)


def share_svg(choice: Choice, timesteps: Sequence[float], narrow: bool = False) -> str:
    """The share of layers that use each set of weights, stacked, along the timesteps; arguments as `allocation_svg` has them."""
    width = NARROW if narrow else WIDTH
    height, count, starts = SHARE_HEIGHT[width], len(timesteps), _starts(choice)
    sets = max((number + 1 for runs in choice.values() for number, _ in runs), default=1)
    below, parts = [0.0] * len(starts), []
    for number in range(sets):
        shares = [_share(choice, number, start) for start in starts]
        above = [low + share for low, share in zip(below, shares, strict=True)]
        edges = [*(start * width / count for start in starts), float(width)]
        ends = list(pairwise(edges))
        tops = [f"{width - x:.1f} {height * (1 - high):.1f}" for pair, high in zip(ends, above, strict=True) for x in pair]
        floors = [f"{width - x:.1f} {height * (1 - low):.1f}" for pair, low in zip(ends, below, strict=True) for x in pair]
        mean = sum(share * (end - start) for share, (start, end) in zip(shares, ends, strict=True)) / width
        title = f"<title>set {number}: {100 * mean:.0f} % of layers and timesteps</title>"
        parts.append(f'<path d="M{"L".join([*tops, *reversed(floors)])}z" fill="{_colour(number)}">{title}</path>')
        below = above
    described = f"Share of the {len(choice)} layers that use each set of weights, from the noisy timesteps to the clean ones."
    parts.append(_axis(0, width, height + 16, timesteps))
    return _svg("shares", narrow, "Share of layers by set of weights", described, width, height + MARGIN, parts)


def _starts(choice: Choice) -> list[int]:
    """The timesteps' indices at which any layer changes its set, from the cleanest on."""
    found = {0}
    for runs in choice.values():
        at = 0
        for _, length in runs[:-1]:
            at += length
            found.add(at)
    return sorted(found)


def _share(choice: Choice, number: int, index: int) -> float:
    """The share of layers that use a set at the timestep of an index."""
    return sum(_set_at(runs, index) == number for runs in choice.values()) / max(1, len(choice))


def _set_at(runs: Sequence[Sequence[int]], index: int) -> int:
    for number, length in runs:
        index -= length
        if index < 0:
            return number
    return runs[-1][0]


def _colour(number: int) -> str:
    return f"var(--series-{number % COLOURS})"


def _axis(left: float, width: float, y: float, timesteps: Sequence[float]) -> str:
    places = ((left, "start", f"{timesteps[-1]:g}"), (width, "end", f"{timesteps[0]:g}"))
    middle = ((left + width) / 2, "middle", "timestep (noise to image)")
    return "".join(
        f'<text x="{x:g}" y="{y}" text-anchor="{anchor}" fill="var(--muted)">{text}</text>' for x, anchor, text in (*places, middle)
    )


def _svg(key: str, narrow: bool, title: str, described: str, width: int, height: int, parts: Sequence[str]) -> str:
    key = f"{key}-narrow" if narrow else f"{key}-wide"
    return (
        f'<svg viewBox="0 0 {width} {height}" class="chart" role="img" aria-labelledby="{key}-title {key}-desc" '
        f'font-size="{12 if narrow else 11}"><title id="{key}-title">{title}</title><desc id="{key}-desc">{described}</desc>'
        f"{''.join(parts)}</svg>"
    )
