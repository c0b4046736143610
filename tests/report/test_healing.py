"""The page of a healing run."""

from xml.etree import ElementTree

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.report.allocation import allocation_svg, share_svg
from halfbyte.report.healing import write_healing_report

RESULTS = {
    "method": "talora",
    "settings": {"steps": 30, "loras": 2},
    "log": [{"step": step, "loss": 1 / step, "seconds": 2.0 * step} for step in (10, 20, 30)],
    "timesteps": [float(time) for time in range(1000)],
    "choice": {"a.<b>": [[0, 600], [1, 400]], "c": [[0, 1000]]},
    "gamma": [0.5 + time / 1000 for time in range(1000)],
    "stored_bytes": 3_000_000,
    "stored_before": 2_000_000,
    "share": 0.069,
    "trained": {},
    "peak_bytes": 1_250_000_000,
}
QUEST = {
    **RESULTS,
    "method": "quest",
    "choice": {},
    "gamma": None,
    "trained": {"temporal": {"weights": ["time.<1>"], "scales": ["time.1", "b"]}, "critical": {"weights": [], "scales": []}},
}


def test_the_page_says_what_happened(tmp_path):
    write_healing_report(RESULTS, tmp_path / "page.html", "my model")
    page = (tmp_path / "page.html").read_text()
    for words in (
        "my model",
        "1</strong> of 2",
        "3.00",
        "30</strong> steps",
        "Denoising factors",
        "Loss",
        "a.&lt;b&gt;",
        "6.90</strong> %",
    ):
        assert words in page, words
    assert "What was trained" not in page
    write_healing_report({**RESULTS, "gamma": None, "log": []}, tmp_path / "page.html", "my model")
    assert "Denoising factors" not in (tmp_path / "page.html").read_text()


def test_the_page_of_quest_lists_what_each_stage_trained(tmp_path):
    write_healing_report(QUEST, tmp_path / "page.html", "my model")
    page = (tmp_path / "page.html").read_text()
    for words in ("temporal", "weights of 1 layers", "scales of 2", "time.&lt;1&gt;", "critical", "1.25 GB"):
        assert words in page, words
    assert "by timestep" not in page


def test_noise_is_on_the_left_and_every_timestep_is_coloured():
    root = ElementTree.fromstring(allocation_svg(RESULTS["choice"], RESULTS["timesteps"]))
    bars = [(float(bar.get("x")), float(bar.get("width")), bar.get("fill")) for bar in root.iter("rect")]
    assert len(bars) == 3
    (clean_x, clean_width, clean), (noisy_x, noisy_width, noisy), (_, whole, _) = bars
    assert noisy_x < clean_x == pytest.approx(noisy_x + noisy_width)
    assert clean_width + noisy_width == pytest.approx(whole, abs=0.02)
    assert clean_width / noisy_width == pytest.approx(1.5, abs=0.01)
    assert (clean, noisy) == ("var(--series-0)", "var(--series-1)")


@pytest.mark.parametrize("narrow", [False, True])
def test_the_share_of_layers_is_the_height_of_a_colour(narrow):
    choice = {"a": [[0, 600], [1, 400]], "b": [[0, 1000]], "c": [[2, 250], [0, 750]], "d": [[1, 600], [0, 400]]}
    root = ElementTree.fromstring(share_svg(choice, RESULTS["timesteps"], narrow))
    width, height = (350, 120) if narrow else (1040, 160)
    areas, titles = [], []
    for path in root.iter("path"):
        points = [tuple(map(float, point.split())) for point in path.get("d").strip("Mz").split("L")]
        turned = zip(points, points[1:] + points[:1], strict=True)
        areas.append(abs(sum(x * v - u * y for (x, y), (u, v) in turned)) / 2 / (width * height))
        titles.append(path.find("title").text)
    shares = [(600 + 1000 + 750 + 400) / 4000, (400 + 600) / 4000, 250 / 4000]
    assert areas == pytest.approx(shares, abs=0.002)
    assert titles == [f"set {number}: {100 * share:.0f} % of layers and timesteps" for number, share in enumerate(shares)]


def test_rows_of_phones_fit_phones():
    root = ElementTree.fromstring(allocation_svg(RESULTS["choice"], RESULTS["timesteps"], narrow=True))
    assert root.get("viewBox").startswith("0 0 350 ")
    bars = [(float(bar.get("x")), float(bar.get("y")), float(bar.get("width"))) for bar in root.iter("rect")]
    assert sum(width for *_, width in bars) == pytest.approx(2 * 350, abs=0.1)
    below = [float(text.get("y")) for text in root.iter("text")]
    assert below[0] < bars[0][1] < below[1] < bars[2][1]  # a name stands above its row


def test_incomplete_results_are_refused(tmp_path):
    with pytest.raises(HalfbyteError, match="lack 'choice', 'gamma'"):
        write_healing_report({key: value for key, value in RESULTS.items() if key not in ("gamma", "choice")}, tmp_path / "p", "m")
    with pytest.raises(HalfbyteError, match="lack"):
        write_healing_report([], tmp_path / "p", "m")
