"""Pictures of inputs on their levels: bars as high as the shares, ticks where the levels are, the worst layers first."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from halfbyte.formats import get_grid
from halfbyte.report.levels import HEIGHT, LEFT, ROW, WIDTH, WORST, LevelDrawings, percent


def run_of(*layers):
    return {"recipe": "some", "layers": [{"name": name, "output_sqnr": sqnr, "input_codes": codes} for name, sqnr, codes in layers]}


def picture(codes):
    drawings = LevelDrawings()
    found = drawings.of_run(run_of(("layer", 10.0, codes)))
    return found.worst[0], ElementTree.fromstring(found.worst[0].svg), ElementTree.fromstring(drawings.symbols())


def bars(root):
    """(right end, top) of every bar of the outline."""
    path, found, top = next(path for path in root.iter("path") if path.get("class") == "bars").get("d"), [], HEIGHT
    for letter, number in re.findall(r"([VH])([-\d.]+)", path):
        if letter == "V":
            top = float(number)
        else:
            found.append((float(number), top))
    return found


def test_bars_are_logarithms_of_shares(input_codes):
    codes = input_codes(counts=[0, 1, 10, 100, 1000, 10_000, 100_000, 0] * 8)
    _, root, _ = picture(codes)
    share = np.array(codes["counts"]) / sum(codes["counts"])
    with np.errstate(divide="ignore"):
        height = np.clip(5 + np.log10(share), 0, 5) / 5  # from one in 100000 to all
    found = bars(root)
    assert [right for right, _ in found] == pytest.approx(LEFT + WIDTH * np.arange(1, 65) / 64, abs=0.06)
    assert [HEIGHT - top for _, top in found] == pytest.approx(HEIGHT * height, abs=0.51)


@pytest.mark.parametrize("grid", ["int4", "e2m1", "ue2m2", "e2m3"])
def test_levels_are_drawn_where_they_are(input_codes, grid):
    levels = sorted(set(get_grid(grid).levels))
    low, high = levels[0] - 1, levels[-1] + 1
    _, root, symbols = picture(input_codes(grid, [1.0], low, high))
    places = [float(x) for x in re.findall(r"M([\d.]+) ", next(symbols.iter("path")).get("d"))]
    assert places == pytest.approx([LEFT + WIDTH * (level - low) / (high - low) for level in levels], abs=0.06)
    assert next(root.iter("use")).get("href") == f"#{next(symbols.iter('g')).get('id')}"


def test_every_shift_has_a_row_of_its_levels_and_its_share(input_codes):
    _, root, symbols = picture(input_codes())
    ticks = re.findall(r"M([\d.]+) (\d+)v", next(symbols.iter("path")).get("d"))
    rows = sorted({int(y) for _, y in ticks})
    assert len(rows) == 5
    assert rows[1] - rows[0] == ROW
    for shift, row in enumerate(rows):
        places = [float(x) for x, y in ticks if int(y) == row]
        expected = [LEFT + WIDTH * (level * 2**shift + 112.5) / 225 for level in range(-7, 8)]
        assert places == pytest.approx(expected, abs=0.06)
    texts = [text.text for text in root.iter("text")]
    assert texts == ["10 %", "0.1 %", "10 %", "20 %", "30 %", "30 %", "10 %", "−112", "0", "112"]


def test_the_picture_is_told_in_words(input_codes):
    shown, root, _ = picture(input_codes(outside=0.0123, shifts=[0.00001, 0.99999]))
    assert shown.facts == ["SQNR 10.0 dB", "lzs4, 3.25 of 4 bits used", "step 0.05", "1 % cut off"]
    words = root.get("aria-label")
    low, high = (float(number) for number in re.search(r"between (-?[\d.]+) and (-?[\d.]+) steps", words).groups())
    counts, edges = input_codes()["counts"], np.linspace(-112.5, 112.5, 65)
    middle = sum(count for count, left in zip(counts, edges, strict=False) if low - 0.1 <= left < high - 0.1)
    assert 0.9 <= middle / sum(counts) < 0.97
    assert "1: <0.01 %, 2: 100 %" in words
    assert root.get("role") == "img"


def test_the_worst_layers_come_first_and_share_their_levels(input_codes):
    drawings, layers = LevelDrawings(), [(f"layer {n}", 30.0 - n, input_codes()) for n in range(10)]
    layers += [("eight bits", 1.0, None), ("broken", None, input_codes()), ("other", 5.0, input_codes("int4", [1.0], -8.5, 7.5))]
    found = drawings.of_run(run_of(*layers))
    assert found.ranked
    names = [shown.name for shown in (*found.worst, *found.others)]
    assert names == ["other", *(f"layer {n}" for n in reversed(range(10))), "broken"]
    assert len(found.worst) == WORST
    assert len(drawings.combs) == 2
    assert drawings.symbols().count("<g ") == 2
    assert all(len(shown.svg) < 1800 for shown in (*found.worst, *found.others))  # 500 layers make less than a megabyte


def test_runs_without_small_grids_have_no_pictures(input_codes):
    drawings = LevelDrawings()
    assert drawings.of_run(run_of(("eight bits", 1.0, None))) is None
    assert drawings.of_run({"layers": [{"name": "older results", "output_sqnr": 1.0}]}) is None
    assert drawings.symbols() == ""
    assert not drawings.of_run(run_of(("a", None, input_codes()))).ranked


def test_shares():
    shown = [percent(share) for share in (0, 1e-6, 0.0001, 0.0044, 0.01, 0.0994, 0.0996, 0.5, 1)]
    assert shown == ["0 %", "<0.01 %", "0.01 %", "0.4 %", "1 %", "10 %", "10 %", "50 %", "100 %"]
