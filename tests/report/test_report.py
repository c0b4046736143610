"""The report page: one file that loads nothing, says what the results say, and is written whole or not at all."""

import base64
import hashlib
import itertools
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from halfbyte.errors import CheckpointError, MissingExtraError
from halfbyte.report import save_results, write_report
from halfbyte.report.charts import COLOURS, PLAIN, entropy_plots, layer_plot, marker_points, size_plot, timestep_plot
from halfbyte.report.figures import number as fixed
from halfbyte.report.figures import with_interval
from halfbyte.report.heatmap import heatmap_of
from halfbyte.report.page import significant
from halfbyte.report.pictures import GUTTER
from halfbyte.report.speed import speed_of
from halfbyte.report.svg import draw

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """A page taken apart: elements with their attributes, and text; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"an attribute comes twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)
            if self.open and {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def prose(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory, make_results) -> Page:
    """The page of the results as they are."""
    return write(make_results(), tmp_path_factory.mktemp("report"))


def write(results: dict, folder: Path) -> Page:
    write_report(results, folder / "report.html")
    return Page((folder / "report.html").read_text("utf-8"))


# The page


def test_the_page_loads_nothing(page):
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "@import" not in page.text
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert value.startswith(("data:image/png;base64,", "#")), f"{tag} {name}={value}"
            assert not name.startswith("on")
            assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", value or ""))
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert page.all("script") == [{}]  # one, without a source, and the policy names its hash
    script = re.search(r"<script>(.*?)</script>", page.text, re.DOTALL)[1]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert all(target.startswith("data:image/png;base64,") for target in re.findall(r'url\("([^"]*)', page.text))


def test_names_are_text_not_markup(page, EVIL):
    assert page.text.count("<script") == 1
    assert page.prose.count(EVIL) >= 8  # title, heading, tables, captions, legend, layer name, environment


def check_references(page: Page) -> None:
    """Ids are unique, and every reference leads to one."""
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set()
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("aria-labelledby", "aria-describedby"):
                wanted |= set(value.split())
            wanted |= set(re.findall(r"url\(#([^)]*)\)", value or ""))
            if name == "href":
                wanted.add(value[1:])
    assert wanted
    assert wanted <= set(ids)


def test_ids_are_unique_and_every_reference_leads_somewhere(page):
    check_references(page)


def test_pictures_and_charts_speak(page, LAYERS):
    assert [bool(image["alt"]) for image in page.all("img")] == [True] * 5
    assert page.all("img")[0]["width"] == str(2 * 8 + GUTTER)
    assert [frame["class"] for frame in page.all("div") if "frame" in frame.get("class", "")] == ["frame pixels"] * 5
    sliders = page.all("input")
    assert [slider["type"] for slider in sliders] == ["range"] * 4
    assert sliders[0]["aria-label"] == "Draw float over quartz-w4a4"
    assert all("hidden" in slider for slider in sliders)  # the script shows them
    charts = [svg for svg in page.all("svg") if svg.get("class") == "chart"]
    assert len(charts) == 10  # five charts, each for wide and for narrow pages
    assert all(svg["role"] == "img" and svg["aria-labelledby"] for svg in charts)
    levels = [svg for svg in page.all("svg") if svg.get("class") == "levels"]
    assert len(levels) == 4 * (len(LAYERS) - 1)
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in levels)
    assert all(svg.get("aria-hidden") == "true" for svg in page.all("svg") if svg not in charts + levels)
    assert all(cell.get("scope") for cell in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]


def test_the_table_says_what_the_results_say(page):
    rows = [[" ".join(cell.split()) for cell in row] for row in page.rows]
    head = ["Recipe weights × activations", "Bits a weight", "Size MB, of bf16"]
    assert rows[0] == [*head, "SQNR dB ↑", "PSNR dB ↑", "SSIM ↑", "Frechet ↓", "Time s an image"]
    assert rows[1][1:] == ["16.00", "8.001.000×", "–", "–", "–", "1.23± 0.10", "0.0512"]
    ours = "24.44± 0.42published 23.5: Somebody 2025"
    assert rows[2] == ["quartz-w4a4lzs4<<4/16 × int8", "4.30", "2.150.269×", "16.4", ours, "0.912", "1.23± 0.10", "0.0512"]
    assert rows[3][4] == "27.06± 0.42"
    layer = ["down_blocks.0.conv1", "Conv2d", "32×16×3×3", "lzs4<<4/16", "int8", "4.25", "20.4", "17.4", "inner layer"]
    assert layer in rows
    assert ["conv_in", "Conv2d", "32×16×3×3", "float", "float", "16.00", "–", "–", "kept by the recipe"] in rows


def test_the_summary(page, EVIL):
    prose = page.prose
    assert "How near 4 quantized versions stay to the float original, over 64 images each from the same noise." in prose
    assert f"Smallest 0.254× of bf16 {EVIL}" in prose
    assert "Closest with 4-bit weights 19.1 dB SQNR quartz-w4a8" in prose
    assert "Compared 64 images from the same noise, 20 steps" in prose
    assert "6 layers, 1 kept in float" in prose


def test_the_frechet_distance_is_no_fid(page, results, tmp_path):
    prose = page.prose
    assert "DemoFeatures, weights 0123456789abcdef; real images: training images (60,000)" in prose
    assert "This is no FID: Inception's features alone make one." in prose
    assert "Frechet: a sample of this size makes it too large, of int8-w8a8 by about 0.500." in prose
    results["settings"]["features"] = "Inception-2015 (torch-fidelity)"
    assert "This is no FID" not in write(results, tmp_path).prose


def test_what_was_not_measured_has_no_column(results, tmp_path):
    for run in results["runs"]:
        run.update(figures={}, images=None, sqnr_by_timestep=[])
        gone = dict.fromkeys(("weight_sqnr", "output_sqnr", "input_codes", "weight_codes"))
        run["layers"] = [layer | gone for layer in run["layers"]]
    results["settings"].update(features=None, digest=None, reference=None, reference_count=None)
    made = write(results, tmp_path)
    assert len(made.rows[0]) == 5
    assert not made.all("img")
    assert "FID" not in made.prose
    assert "PSNR" not in made.prose
    drawn = [svg for svg in made.all("svg") if svg.get("class") in ("chart", "levels")]
    assert [svg["aria-labelledby"].partition("-")[0] for svg in drawn] == ["size", "size"]  # by SQNR, which every run has
    assert "levels" not in made.prose


def test_lossless_and_broken_runs(results, tmp_path, EVIL, figure):
    results["runs"][1].update(sqnr=math.inf, figures={"psnr": figure(math.inf)}, sqnr_by_timestep=[[900, math.inf], [0, math.inf]])
    results["runs"][2].update(sqnr=-math.inf, figures={"psnr": figure(math.nan), "frechet": figure(math.nan)})
    results["runs"][3]["seconds_per_image"] = None
    results["runs"][2]["sqnr_by_timestep"] = [[900, math.nan], [500, 3.0], [0, -math.inf]]
    results["runs"][4]["bytes_bf16"] = 0
    made = write(results, tmp_path)
    assert [row[3] for row in made.rows[1:6]] == ["–", "∞", "−∞", "7.9", "31.5"]
    assert made.rows[2][4].startswith("∞")
    assert made.rows[3][4] == made.rows[3][6] == "NaN"
    assert made.rows[4][7] == "–"
    assert made.rows[5][2].endswith("–")
    assert f"Closest with 4-bit weights 7.9 dB SQNR {EVIL}" in made.prose


def test_the_float_model_alone(results, tmp_path):
    results["runs"] = results["runs"][:1]
    assert len(write(results, tmp_path).rows) == 2


def test_the_same_results_make_the_same_page(results, page, tmp_path):
    assert write(results, tmp_path).text == page.text


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(1.25, 1, "1.2"), (-3.14159, 2, "−3.14"), (-0.04, 1, "0.0"), (None, 1, "–"), (math.nan, 1, "NaN"), (-math.inf, 1, "−∞")],
)
def test_numbers(value, digits, shown):
    assert fixed(value, digits) == shown


def test_numbers_with_three_digits(figure):
    shown = [significant(value) for value in (0.01234, 0.5, 1.0, 12.345, 123.4, 123456.0, 0.0, math.inf, None)]
    assert shown == ["0.0123", "0.500", "1.00", "12.3", "123", "123456", "0", "∞", "–"]
    assert with_interval(figure(0.5, 0.25), 2) == "0.50 ± 0.25"
    assert [with_interval(one, 1) for one in (None, figure(2.0))] == ["–", "2.0"]


# Charts


def test_markers_and_colours_differ():
    assert len({marker_points(style) for style in range(COLOURS)}) == COLOURS
    assert len({(style % COLOURS, marker_points(style)) for style in range(COLOURS**2)}) == COLOURS**2


def test_chart_of_sizes_has_a_point_with_its_interval_for_every_run(results):
    runs = results["runs"][1:]
    plot = size_plot(runs)
    assert [(line.style, line.x[0], line.y[0]) for line in plot.series] == [
        (style, run["bits"], run["figures"]["psnr"]["value"]) for style, run in enumerate(runs)
    ]
    psnr = runs[0]["figures"]["psnr"]
    assert plot.series[0].half == [(psnr["high"] - psnr["low"]) / 2]
    assert f"quartz-w4a4 {psnr['value']:.1f} dB at {runs[0]['bits']:.2f} bits" in plot.description
    del runs[1]["figures"]["psnr"]
    assert [line.style for line in size_plot(runs).series] == [0, 2, 3]
    for run in runs:
        run["figures"] = {}
    by_noise = size_plot(runs)
    assert by_noise.y_label == "SQNR, dB"
    assert by_noise.series[0].y == [runs[0]["sqnr"]]
    assert size_plot(runs[:2]) is None
    for run in runs:
        run["bits"] = 4.25
    assert size_plot(runs) is None


def test_layers_that_were_left_out_have_no_section(results, tmp_path):
    assert "What became of every Linear" in write(results, tmp_path).prose
    for run in results["runs"]:
        run["layers"] = []
    assert "What became of every Linear" not in write(results, tmp_path).prose


def test_chart_of_layers_follows_the_model(results, LAYERS):
    results["runs"][2]["layers"] = results["runs"][2]["layers"][::2]  # a run that knows fewer layers
    plot = layer_plot(results["runs"][1:])
    assert [block[2] for block in plot.blocks] == ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "conv_out"]
    assert plot.blocks[1][:2] == (1, 2)
    assert [len(line.y) for line in plot.series] == [len(LAYERS)] * 4
    assert [math.isnan(value) for value in plot.series[1].y] == [True, True, False, True, False, True]


def test_chart_of_layers_takes_weights_where_outputs_are_unknown(results):
    for run in results["runs"]:
        run["layers"] = [layer | {"output_sqnr": None} for layer in run["layers"]]
    assert layer_plot(results["runs"][1:]).title == "SQNR of each layer's weights"


def test_many_blocks_are_named_by_their_first_part(results, make_layer):
    for run in results["runs"][1:]:
        run["layers"] = [make_layer(f"blocks.{index}.to_q", 10.0) for index in range(30)]
    assert layer_plot(results["runs"][1:]).blocks == [(0, 29, "blocks")]


def test_chart_of_timesteps_runs_from_noise_to_image(results):
    plot = timestep_plot(results["runs"][1:])
    assert plot.reverse
    assert list(plot.series[0].x) == [0, 500, 900]
    assert "18.4 to 14.4 for quartz-w4a4" in plot.description


def test_charts_of_entropy_hold_recipes_against_plain_int4(results):
    runs = results["runs"][1:]
    weights, inputs = entropy_plots(runs)
    assert [line.style for line in inputs.series] == [0, 1, 2, 3, PLAIN]
    known = [layer["input_codes"]["entropy"] for layer in runs[1]["layers"] if layer["input_codes"]]
    assert [value for value in inputs.series[1].y if not math.isnan(value)] == known
    assert [value for value in inputs.series[-1].y if not math.isnan(value)] == [2.5] * len(known)
    assert [value for value in weights.series[-1].y if not math.isnan(value)] == [3.25] * len(known)
    assert f"{np.mean(known):.2f} for quartz-w4a8" in inputs.about
    assert "2.50 for plain INT4" in inputs.description
    assert "var(--muted)" in draw(inputs)["wide"]
    for layer in runs[3]["layers"]:  # a run that is plain INT4: its line is the one to compare with
        for codes in filter(None, (layer["input_codes"], layer["weight_codes"])):
            codes["entropy"] = codes["plain"]
    assert [line.style for line in entropy_plots(runs)[0].series] == [0, 1, 2, 3]
    for layer in (layer for run in runs for layer in run["layers"]):
        layer["input_codes"] = layer["input_codes"] and {**layer["input_codes"], "grid": "e2m3"}  # 6 bits
        del layer["weight_codes"]  # results of an older version
    assert entropy_plots(runs) == []


def test_results_of_before_codes_were_gathered_make_a_page(results, tmp_path):
    for layer in (layer for run in results["runs"] for layer in run["layers"]):
        del layer["input_codes"], layer["weight_codes"]
    assert "Inputs on their levels" not in write(results, tmp_path).prose


def test_speeds_stand_on_the_same_page(results, bench, tmp_path):
    write_report(results, tmp_path / "report.html", speed_of(bench()))
    made = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "One step of a whole model unet" in made.prose


def test_sensitivities_stand_on_the_same_page(results, bench, study, LAYERS, EVIL, tmp_path):
    plain, heatmap = write(results, tmp_path), heatmap_of(study(LAYERS))
    write_report(results, tmp_path / "report.html", speed_of(bench()), heatmap)
    made = Page((tmp_path / "report.html").read_text("utf-8"))
    check_references(made)
    assert "Sensitivity" not in plain.prose
    assert made.all("meta") == plain.all("meta")  # the policy is the same
    assert made.text.count("<script") == 1
    assert made.prose.count(EVIL) == plain.prose.count(EVIL) + 2  # in the tables of two widths
    assert all(cell.get("scope") for cell in made.all("th"))
    levels = [int(tag[1]) for tag, _ in made.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    regions = [area["aria-label"] for area in made.all("div") if area.get("role") == "region" and "aria-label" in area]
    assert len(regions) == len(set(regions))
    assert {f"Sensitivity of {what} at {width}" for what in ("families", "layers") for width in ("w4a4", "w8a8")} <= set(regions)


def test_a_page_of_500_layers_stays_below_5_megabytes(results, tmp_path, make_layer):
    layers = [make_layer(f"transformer_blocks.{n // 10}.attention.to_q.{n % 10}", 5.0 + n / 50) for n in range(500)]
    counts = [(index * 7919) % 10_000 for index in range(64)]  # as uneven as can be
    for layer in layers:
        layer["input_codes"] |= {"counts": counts, "shifts": [0.2] * 5, "steps": [1, 2, 4, 8, 16], "low": -112.5, "high": 112.5}
    results["runs"] = [run if run["sqnr"] is None else run | {"layers": layers} for run in results["runs"][:4]]
    made = write(results, tmp_path)
    assert len([svg for svg in made.all("svg") if svg.get("class") == "levels"]) == 1500
    assert len(made.text) < 5_000_000
    assert len([one for one in made.all("details") if "open" in one]) == 2  # one run's worst layers, and how to read numbers


def test_drawings_have_the_pages_colours_and_fonts(results):
    results["runs"][1]["layers"][0]["name"] = "\x00日本 $"  # neither XML nor matplotlib's font nor its formulas know these
    for drawing in draw(layer_plot(results["runs"][1:])).values():
        assert "var(--series-0)" in drawing
        assert "#0000" not in drawing
        assert "font-family" not in drawing
        assert "日本 $" in drawing
        assert "xmlns" not in drawing


def test_the_callers_style_does_not_reach_the_chart(results):
    import matplotlib

    plot = timestep_plot(results["runs"][1:])
    plain = draw(plot)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30}):
        assert draw(plot) == plain
        assert matplotlib.rcParams["font.size"] == 30


# Files


@pytest.mark.parametrize("save", [write_report, save_results])
def test_a_failed_write_leaves_the_old_file(results, tmp_path, monkeypatch, save):
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "out"
    path.write_text("the old one")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match="out was not written: Permission denied"):
        save(results, path)
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_extra_the_pip_line_is_given(results, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'halfbyte\[report\]'"):
        write_report(results, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
