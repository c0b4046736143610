"""The page of a healing run."""

from xml.etree import ElementTree

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.report.allocation import allocation_svg
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


def test_incomplete_results_are_refused(tmp_path):
    with pytest.raises(HalfbyteError, match="lack 'choice', 'gamma'"):
        write_healing_report({key: value for key, value in RESULTS.items() if key not in ("gamma", "choice")}, tmp_path / "p", "m")
    with pytest.raises(HalfbyteError, match="lack"):
        write_healing_report([], tmp_path / "p", "m")
