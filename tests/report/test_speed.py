"""Speeds as bars: what `halfbyte bench --json` wrote, checked, and drawn as long as it is fast."""

import json
import re

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.report.speed import load_speed, speed_of, write_speed_report


def test_bars_are_as_long_as_their_speed(bench):
    speed = speed_of(bench())
    assert [case.name for case in speed.models] == ["unet"]
    assert [case.name for case in speed.layers] == ["linear 4096x3072x3072", "conv 3x3/1"]
    linear, conv = speed.layers
    assert [(bar.name, bar.own, bar.times, bar.width) for bar in linear.bars] == [
        ("quartz-w4a4", True, pytest.approx(4), pytest.approx(100)),
        ("torch bf16", False, pytest.approx(1), pytest.approx(25)),
    ]
    assert (linear.base, conv.base) == ("torch bf16", "torch fp32")  # the slowest, where there is no bf16
    assert conv.bars[0].times == pytest.approx(5)
    assert conv.bars[0].milliseconds == pytest.approx(2)


def test_the_page(bench, tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(bench()))
    write_speed_report(load_speed(tmp_path / "bench.json"), tmp_path / "bench.html")
    page = (tmp_path / "bench.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "a UNet, &lt;one&gt; image" in page
    assert re.findall(r"--width: ([\d.]+)%", page) == ["100.0", "50.0", "100.0", "25.0", "100.0", "20.0"]
    assert re.findall(r"</span>([\d.]+×)", page) == ["2.00×", "1.00×", "4.00×", "1.00×", "5.00×", "1.00×"]
    assert "torch 2, threads 2" in page


WRONG = {
    "no rows": ({"environment": {}}, "the measurement has no 'rows'"),
    "a row without seconds": ({"environment": {}, "rows": [{"case": "a"}]}, r"rows\[0\] has no .*'seconds'"),
    "no time": (
        {"environment": {}, "rows": [{"case": "a", "contestant": "b", "seconds": 0.0, "weight_bytes_of_bf16": None}]},
        r"rows\[0\].seconds is 0.0; times are above 0",
    ),
    "something else": ([], "the measurement must be a mapping"),
}


@pytest.mark.parametrize(("data", "words"), WRONG.values(), ids=WRONG)
def test_other_files_are_no_measurements(data, words):
    with pytest.raises(HalfbyteError, match=words):
        speed_of(data)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(HalfbyteError, match=r"absent\.json cannot be read"):
        load_speed(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(HalfbyteError, match=r"bad\.json is not JSON"):
        load_speed(tmp_path / "bad.json")
