"""The pages in a real browser: no console errors, no requests, sliders that move, pages that fit phones.

Needs Playwright and an installed Chromium; HALFBYTE_SCREENSHOTS=FOLDER keeps pictures of the page for people to look at.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from halfbyte.report import write_report
from halfbyte.report.healing import write_healing_report
from halfbyte.report.heatmap import heatmap_of, write_heatmap
from halfbyte.report.pictures import data_uri, grid_png
from halfbyte.report.speed import speed_of, write_speed_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZES = {"desk": (1280, 900), "phone": (390, 844)}


def figure(value, half):
    return {"value": value, "low": value - half, "high": value + half, "bias": 0.2}


def results(input_codes, weight_codes):
    """A page with everything on it."""
    runs = []
    for index, name in enumerate(("float", "quartz-w4a4", "msfp-w4a4")):
        images = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(index))
        layers = [
            {"name": f"down_blocks.{n}.conv", "kind": "Conv2d", "shape": [8, 8, 3, 3], "weight": "lzs4<<4/16", "activation": "int8"}
            | {"bits": 4.25, "reason": "recipe", "weight_sqnr": 20.0 + n, "output_sqnr": 15.0 + n, "choice": None}
            | {"input_codes": input_codes(entropy=3.0 + n / 10), "weight_codes": weight_codes(entropy=3.5 - n / 10)}
            for n in range(9)
        ]
        sizes = {"bits": 4.3 if index else 16.0, "bytes": 2_000_000 + index, "bytes_bf16": 8_000_000}
        published = [{"figure": "psnr", "value": 24.0, "source": "Somebody 2025"}] if index == 1 else []
        figures = {"frechet": figure(5.0 + index, 0.4)} | ({"psnr": figure(25.0, 0.3), "ssim": figure(0.9, 0.01)} if index else {})
        runs.append(
            {"recipe": name, "weights": "lzs4", "activations": "int8", **sizes}
            | {"sqnr": 12.0 + index if index else None, "sqnr_by_timestep": [[900, 14.0], [0, 10.0]] if index else []}
            | {
                "figures": figures,
                "published": published,
            }
            | {"seconds_per_image": 0.05, "layers": layers if index else [], "images": data_uri(grid_png(images, 4))}
        )
    settings = {"images": 64, "steps": 10, "seed": 0, "batch": 32, "sampler": "DDIMScheduler", "arguments": {}}
    settings |= {"features": "DemoFeatures", "digest": "00ff", "reference": "photos", "reference_count": 60000}
    made = {"schema": 2, "model": "a demo", "created": "2026-01-01", "environment": {"torch": "2"}}
    return made | {"settings": settings, "runs": runs}


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield made
        made.close()


HEALED = {
    "method": "talora",
    "settings": {"steps": 30, "loras": 2},
    "log": [{"step": step, "loss": 1 / step, "seconds": 2.0 * step} for step in (10, 20, 30)],
    "timesteps": [float(time) for time in range(1000)],
    "choice": {f"layers.{n}": [[0, 400 + n], [1, 600 - n]] for n in range(30)},
    "gamma": [0.5 + time / 1000 for time in range(1000)],
    "stored_bytes": 3_000_000,
    "stored_before": 2_000_000,
    "share": 0.069,
    "trained": {"temporal": {"weights": ["time.1"], "scales": []}},
    "peak_bytes": 1_250_000_000,
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory, input_codes, weight_codes, bench, study):
    """The address of every kind of page."""
    folder = tmp_path_factory.mktemp("page")
    write_report(results(input_codes, weight_codes), folder / "report.html", speed_of(bench()), heatmap_of(study()))
    write_healing_report(HEALED, folder / "healing.html", "healed")
    write_heatmap(study(), folder / "sensitivity.html", {f"layers.{n}": "w4a4" for n in range(40)})
    write_speed_report(speed_of(bench()), folder / "speed.html")
    return {page.stem: page.as_uri() for page in folder.iterdir()}


@pytest.fixture(scope="module")
def address(pages):
    return pages["report"]


class Visit:
    """A page of a size and a colour scheme, what its console said and what it asked for."""

    def __init__(self, browser, address, size, scheme="light"):
        self.width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": self.width, "height": height}, color_scheme=scheme)
        self.page, self.said, self.asked, self.address = self.context.new_page(), [], [], address
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)

    def keep(self, name):
        if "HALFBYTE_SCREENSHOTS" in os.environ:
            self.page.screenshot(path=Path(os.environ["HALFBYTE_SCREENSHOTS"]) / f"{name}.png", full_page=True)

    def check(self):
        """Nothing said, nothing asked for but the page itself, nothing wider than the window."""
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width  # tables scroll, the page does not
        self.context.close()
        assert self.said == []
        assert [url for url in self.asked if not url.startswith("data:")] == [self.address]
        assert all(url.startswith(("data:", "file:")) for url in self.asked)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["healing", "sensitivity", "speed"])
@pytest.mark.parametrize("size", SIZES)
def test_other_pages_render_and_ask_for_nothing(browser, pages, kind, size):
    visit = Visit(browser, pages[kind], size, "dark")
    page = visit.page
    while page.locator("details:not([open]) > summary:visible").count():
        page.locator("details:not([open]) > summary:visible").first.press("Enter")  # by keyboard
    drawn = page.locator("svg.chart:visible, .heat:visible, .speed:visible")
    assert drawn.count() >= 2
    assert all(drawn.nth(place).bounding_box()["width"] > 250 for place in range(drawn.count()))
    visit.keep(f"{kind}-{size}")
    visit.check()


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_inputs_on_their_levels_open_by_keyboard(browser, address, size):
    visit = Visit(browser, address, size)
    page, pictures = visit.page, visit.page.locator("svg.levels:visible")
    assert pictures.count() == 6  # the worst of the first run; all others on demand
    page.locator("details[open] > details.inner > summary").first.press("Enter")
    assert pictures.count() == 9
    page.locator("#levels ~ details > summary").last.press("Enter")
    assert pictures.count() == 15
    box = pictures.first.bounding_box()
    assert box["width"] > 200
    levels = pictures.first.locator("use").bounding_box()  # what is referred to is drawn, inside the picture
    assert levels["width"] > 0.7 * box["width"]
    assert box["y"] < levels["y"] < levels["y"] + levels["height"] < box["y"] + box["height"]
    name = pictures.first.get_attribute("aria-label")
    assert page.get_by_role("img", name=name).count()
    colour = "element => getComputedStyle(element).fill"
    assert pictures.first.locator(".bars").evaluate(colour) != pictures.first.locator("text").first.evaluate(colour)
    bars = page.locator(".speed:visible .own .bar")
    assert bars.first.bounding_box()["width"] > 1.8 * page.locator(".speed:visible tr:not(.own) .bar").first.bounding_box()["width"]
    visit.check()


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const over = (...colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = colour => {
    const [r, g, b] = colour.map(part => part / 255).map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = getComputedStyle(document.body).backgroundColor;
  return [...document.querySelectorAll(".heat td[style]")].map(cell => {
    const style = getComputedStyle(cell), under = over(page, style.backgroundColor);
    const [less, more] = [luminance(under), luminance(over(style.color))].sort((one, other) => one - other);
    return {contrast: (more + 0.05) / (less + 0.05), page: luminance(over(page)), cell: luminance(under)};
  });
}"""  # as WCAG 2 defines them


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_heat_map_opens_by_keyboard_and_can_be_read(browser, address, size, scheme):
    visit = Visit(browser, address, size, scheme)
    page, section = visit.page, visit.page.locator("section[aria-labelledby=sensitivity]")
    rows = section.locator("tbody tr:visible")
    assert rows.count() == 1 + 16  # the family and the most sensitive layers at the first width; all others on demand
    section.locator("details[open] > details.inner > summary").press("Enter")
    assert rows.count() == 1 + 40
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Sensitivity of more layers at w4a4"
    assert page.get_by_role("region", name="Sensitivity of families at w4a4").is_visible()
    while section.locator("details:not([open]) > summary:visible").count():
        section.locator("details:not([open]) > summary:visible").first.press("Enter")
    assert rows.count() == 2 * (1 + 40)
    cells = page.evaluate(CONTRASTS)
    assert len(cells) == 2 * 2 * (1 + 40)
    assert min(cell["contrast"] for cell in cells) >= 4.5  # numbers on the strongest colour too
    assert max(abs(cell["cell"] - cell["page"]) for cell in cells) > 0.1  # and there is colour
    visit.check()


@pytest.mark.slow
def test_paper_has_no_sliders_and_no_cut_tables(browser, address):
    visit = Visit(browser, address, "desk")
    visit.page.emulate_media(media="print")
    visit.page.set_viewport_size({"width": 690, "height": 1000})  # A4 without its margins
    assert not visit.page.locator("input.cut:visible").count()
    table = visit.page.locator("table.results").bounding_box()
    assert table["x"] + table["width"] <= 690
    assert not visit.page.get_by_text("Move a slider").is_visible()
    for section in visit.page.locator("section.whole").all():  # a heading stays with its chart, and in line with it
        assert section.evaluate("element => getComputedStyle(element).breakInside") == "avoid"
        assert section.locator("h2").bounding_box()["x"] == section.bounding_box()["x"]
    visit.width = 690
    visit.check()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_renders_and_asks_for_nothing(browser, address, size, scheme):
    visit = Visit(browser, address, size, scheme)
    page = visit.page
    assert page.title() == "a demo: halfbyte report"
    slider = page.locator("input.cut").first
    assert slider.is_visible()
    assert slider.get_attribute("aria-label") == "Draw float over quartz-w4a4"
    over = page.locator(".over").first
    before = over.evaluate("element => getComputedStyle(element).clipPath")
    slider.focus()
    page.keyboard.press("End")  # by keyboard,
    after = over.evaluate("element => getComputedStyle(element).clipPath")
    assert before != after
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)  # and by hand
    assert 30 <= int(slider.input_value()) <= 70
    assert over.evaluate("element => getComputedStyle(element).clipPath") not in (before, after)
    assert "% float" in slider.get_attribute("aria-valuetext")
    assert over.evaluate("element => getComputedStyle(element).backgroundImage").startswith('url("data:image/png;base64,')
    page.locator("summary").last.click()
    reading = page.locator(".reading > dl")
    assert reading.is_visible() == (size == "desk")
    visit.keep(f"report-{size}-{scheme}")
    visit.check()


@pytest.mark.slow
def test_a_page_that_is_wrong_is_noticed(browser, tmp_path):
    """The check can fail: a script the policy does not know is a console error."""
    (tmp_path / "bad.html").write_text(
        "<!doctype html><meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\"><script>1</script>"
    )
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.goto((tmp_path / "bad.html").as_uri())
    assert said
    page.close()
