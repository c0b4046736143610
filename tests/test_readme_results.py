"""The README's results are those of docs/demo-results.json, and that file was made by configs/demo.yaml.

To make both anew: halfbyte table configs/demo.yaml -o demo-table --insert README.md --slim docs/demo-results.json
"""

from pathlib import Path

from halfbyte.evidence.config import read_config
from halfbyte.report import load_results
from halfbyte.report.markdown import between_markers, captioned_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "demo-results.json"


def test_the_readme_shows_the_results_that_are_kept():
    readme, results = (ROOT / "README.md").read_text("utf-8"), load_results(RESULTS)
    assert between_markers(readme, "results", captioned_table(results)) == readme


def test_the_results_that_are_kept_are_of_the_demos_table():
    config, results = read_config(ROOT / "configs" / "demo.yaml"), load_results(RESULTS)
    assert [run["recipe"] for run in results["runs"]] == ["float", *(run.title for run in config.runs)]
    assert (results["settings"]["steps"], results["settings"]["seed"]) == (config.steps, config.seed)
    assert dict(results)["shown"] == config.shown
    assert len(results["runs"]) >= 13
    assert RESULTS.stat().st_size < 100_000


def test_another_table_would_be_noticed():
    readme, results = (ROOT / "README.md").read_text("utf-8"), load_results(RESULTS)
    results["runs"][1]["figures"]["psnr"]["value"] += 0.01
    assert between_markers(readme, "results", captioned_table(results)) != readme
