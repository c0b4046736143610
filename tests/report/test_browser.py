"""The report page in a real browser: no console errors, no requests, sliders that move, pages that fit phones.

Needs Playwright and an installed Chromium; HALFBYTE_SCREENSHOTS=FOLDER keeps pictures of the page for people to look at.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

from halfbyte.report import write_report
from halfbyte.report.pictures import data_uri, grid_png

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZES = {"desk": (1280, 900), "phone": (390, 844)}


def figure(value, half):
    return {"value": value, "low": value - half, "high": value + half, "bias": 0.2}


def results():
    """A page with everything on it."""
    runs = []
    for index, name in enumerate(("float", "quartz-w4a4", "msfp-w4a4")):
        images = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(index))
        layers = [
            {"name": f"down_blocks.{n}.conv", "kind": "Conv2d", "shape": [8, 8, 3, 3], "weight": "lzs4<<4/16", "activation": "int8"}
            | {"bits": 4.25, "reason": "recipe", "weight_sqnr": 20.0 + n, "output_sqnr": 15.0 + n, "choice": None}
            for n in range(6)
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


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "report.html"
    write_report(results(), page)
    return page.as_uri()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_renders_and_asks_for_nothing(browser, address, size, scheme):
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    assert page.title() == "a demo: halfbyte report"
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll, the page does not
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
    if "HALFBYTE_SCREENSHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["HALFBYTE_SCREENSHOTS"]) / f"report-{size}-{scheme}.png", full_page=True)
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert all(url.startswith(("data:", "file:")) for url in asked)


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
