"""The results file: what is missing or wrong is named, and what is written comes back."""

import copy
import json
import math

import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.report import check_results, load_results, save_results, write_report


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every key of the schema in results; of lists, the last entry."""
    if isinstance(value, list):
        return places(value[-1], (*path, len(value) - 1)) if value and path[-1] not in ("shape", "counts", "shifts") else []
    if not isinstance(value, dict):
        return []
    free = path[-1:] in (("environment",), ("figures",), ("arguments",))
    value = {key: entry for key, entry in value.items() if key not in ("input_codes", "weight_codes") or entry}
    keys = [] if free else [(*path, key) for key in value]
    return keys + [found for key, entry in value.items() for found in places(entry, (*path, key))]


def test_every_missing_key_is_named(results):
    assert check_results(results) is results
    every = [path for path in places(results) if path[-1] not in ("input_codes", "weight_codes")]  # which may be missing
    assert len(every) > 35
    for path in every:
        broken = copy.deepcopy(results)
        parent = broken
        for step in path[:-1]:
            parent = parent[step]
        del parent[path[-1]]
        with pytest.raises(HalfbyteError, match=rf"'{path[-1]}'"):
            check_results(broken)


WRONG = {
    "another schema": (("schema",), 1, "have schema 1, this halfbyte reads 2"),
    "a number for a string": (("model",), 5, "results.model must be a string, got int 5"),
    "a string for a number": (("runs", 1, "bits"), "4", r"results.runs\[1\].bits must be a number, got str '4'"),
    "true for a number": (("settings", "seed"), True, "results.settings.seed must be a whole number, got bool True"),
    "null for a number": (("runs", 1, "bits"), None, r"runs\[1\].bits must be a number, got NoneType None"),
    "a fraction for a count": (("settings", "images"), 1.5, "images must be a whole number, got float 1.5"),
    "no list": (("runs",), {}, "results.runs must be a list, got dict {}"),
    "no run": (("runs",), [], "the first run must be the float model"),
    "no mapping": (("runs", 0), "float", r"results.runs\[0\] must be a mapping"),
    "half a pair": (("runs", 1, "sqnr_by_timestep"), [[3]], r"sqnr_by_timestep\[0\] must be a list of 2 numbers"),
    "half a figure": (
        ("runs", 1, "figures"),
        {"psnr": {"value": 3, "low": None, "high": None}},
        r"runs\[1\].figures\['psnr'\] has no 'bias'; it needs the keys 'bias', 'high', 'low', 'value'",
    ),
    "a published figure without a source": (("runs", 1, "published"), [{"figure": "psnr", "value": 3.0}], "has no 'source'"),
    "numbers in the environment": (("environment",), {"threads": 2}, "environment\\['threads'\\] must be a string, got int 2"),
    "half a choice": (("runs", 1, "layers", 0, "choice"), {"maxval": 1.0}, r"layers\[0\].choice has no "),
    "half of the codes": (("runs", 1, "layers", 1, "weight_codes"), {"grid": "int4"}, r"weight_codes has no 'entropy', 'plain'"),
    "no float model": (("runs", 0, "sqnr"), 3.0, r"results.runs\[0\] \('float'\) has an SQNR"),
    "a picture from elsewhere": (("runs", 1, "images"), "https://example.org/x.png", r"runs\[1\].images must be null or a PNG"),
    "a picture that is none": (("runs", 1, "images"), "data:image/png;base64,AAAA", r"runs\[1\].images must be null or a PNG"),
    "a long value": (("model",), ["x"] * 99, r"got list \['x', .{30,33}…$"),
}


@pytest.mark.parametrize(("path", "value", "sentence"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said(results, path, value, sentence, tmp_path):
    parent = results
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = value
    with pytest.raises(HalfbyteError, match=sentence):
        write_report(results, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [None, [], {}, "results"])
def test_other_files_are_no_results(value):
    with pytest.raises(HalfbyteError, match="these are no results of halfbyte"):
        check_results(value)


def test_results_come_back_from_disk(results, tmp_path):
    results["runs"][1]["sqnr"] = math.inf
    save_results(results, tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_unknown_keys_are_left_alone(results):
    results["note"] = "by hand"
    assert check_results(results)["note"] == "by hand"


def test_results_that_cannot_be_read(tmp_path):
    with pytest.raises(HalfbyteError, match=r"absent\.json cannot be read: No such file"):
        load_results(tmp_path / "absent.json")
    for content in (b"{", b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(HalfbyteError, match=r"bad\.json is not JSON"):
            load_results(tmp_path / "bad.json")


def test_a_results_file_is_json_that_others_read(results, tmp_path):
    save_results(results, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_bytes())["schema"] == 2
