"""The results on pages are those of the JSON files beside them, and those were made by the tables of configs/.

To make them anew: halfbyte table configs/NAME.yaml -o out --insert PAGE --slim RESULTS, see the first lines of each config.
"""

from pathlib import Path

import pytest

from halfbyte.evidence.config import read_config
from halfbyte.report import load_results
from halfbyte.report.markdown import between_markers, captioned_table

ROOT = Path(__file__).parents[1]
PAGES = {  # config -> page, results
    "demo": ("README.md", "docs/demo-results.json"),
    "fashion-dit": ("models/fashion-dit/README.md", "models/fashion-dit/results.json"),
    "fashion-dit-wide": ("models/fashion-dit-wide/README.md", "models/fashion-dit-wide/results.json"),
}
every_page = pytest.mark.parametrize("name", PAGES)


def read(name):
    page, results = (ROOT / path for path in PAGES[name])
    return page.read_text("utf-8"), load_results(results)


@every_page
def test_the_page_shows_the_results_that_are_kept(name):
    page, results = read(name)
    assert between_markers(page, "results", captioned_table(results)) == page


@every_page
def test_the_results_that_are_kept_are_of_the_config(name):
    config, (_, results) = read_config(ROOT / "configs" / f"{name}.yaml"), read(name)
    assert [run["recipe"] for run in results["runs"]] == ["float", *(run.title for run in config.runs)]
    assert (results["settings"]["steps"], results["settings"]["seed"]) == (config.steps, config.seed)
    assert dict(results)["shown"] == config.shown
    assert len(results["runs"]) >= 13
    assert (ROOT / PAGES[name][1]).stat().st_size < 100_000


@every_page
def test_another_table_would_be_noticed(name):
    page, results = read(name)
    results["runs"][1]["figures"]["psnr"]["value"] += 0.01
    assert between_markers(page, "results", captioned_table(results)) != page
