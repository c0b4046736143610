"""Which LoRA serves which timesteps: a row for every layer, coloured along the timesteps, as inline SVG."""

from collections.abc import Mapping, Sequence
from html import escape

from halfbyte.report.charts import COLOURS

WIDTH, NAMES, ROW, MARGIN = 1040, 330, 13, 34  # pixels: of the picture, of the names, of a layer's row, below for the axis


def allocation_svg(choice: Mapping[str, Sequence[Sequence[int]]], timesteps: Sequence[float]) -> str:
    """The picture as one SVG element, in the page's colours.

    Args:
        choice: by layer, runs of (weight set, number of neighbouring timesteps), from the cleanest timestep on, as
            `HealResult.to_dict` has them.
        timesteps: ascending.
    """
    height, scale = ROW * len(choice) + MARGIN, (WIDTH - NAMES) / max(1, len(timesteps))
    parts = []
    for line, (name, runs) in enumerate(choice.items()):
        y, right = ROW * line, float(WIDTH)  # noise is on the left, where sampling starts
        parts.append(f'<text x="{NAMES - 8}" y="{y + ROW - 3}" text-anchor="end" fill="var(--muted)">{escape(name)}</text>')
        for number, length in runs:
            right -= length * scale
            colour = f"var(--series-{number % COLOURS})"
            title = f"<title>{escape(name)}: weights {number}, {length} timesteps</title>"
            parts.append(
                f'<rect x="{right:.2f}" y="{y + 1}" width="{length * scale:.2f}" height="{ROW - 2}" fill="{colour}">{title}</rect>'
            )
    axis = ROW * len(choice) + 16
    ends = ((NAMES, "start", timesteps[-1]), (WIDTH, "end", timesteps[0]))
    parts += [f'<text x="{x}" y="{axis}" text-anchor="{anchor}" fill="var(--muted)">{time:g}</text>' for x, anchor, time in ends]
    middle = (NAMES + WIDTH) / 2
    parts.append(f'<text x="{middle}" y="{axis}" text-anchor="middle" fill="var(--muted)">timestep (noise to image)</text>')
    several = sum(len({number for number, _ in runs}) > 1 for runs in choice.values())
    described = f"{several} of {len(choice)} layers choose between weights by the timestep; the others use one set."
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" class="chart" role="img" aria-labelledby="allocation-title allocation-desc" '
        f'font-size="10"><title id="allocation-title">Weights by timestep</title><desc id="allocation-desc">{described}</desc>'
        f"{''.join(parts)}</svg>"
    )
