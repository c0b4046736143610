"""Budgets: the least damage against brute force, in every unit; what cannot be met; recipes; and what a person gets to see."""

import copy
import itertools
import random
import re

import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte import demo
from halfbyte import sensitivity as room
from halfbyte.budget import UNITS, Limit, amount, spend, to_recipe
from halfbyte.conversion import quantizable_layers, stored_bytes
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate import float_states, prediction_sqnr
from halfbyte.latency import FLOAT, Latency
from halfbyte.layers import matrix_shape
from halfbyte.presets import get_recipe
from halfbyte.report.heatmap import heat, write_heatmap

WIDTHS = ("w4a4", "w4a8", "w8a8")
HERE = {"threads": "2", "processor": "AVX2", "backend": "cpu (the C++ engine)"}


def random_study(seed, widths=WIDTHS, count=5):
    draw = random.Random(seed)
    layers = [
        room.LayerDamage(
            f"l{index}", "linear", draw.randint(1, 50), draw.randint(1, 4), draw.randint(1, 50),
            {width: [draw.random() * 2.0**-place] for place, width in enumerate(widths)},
        )
        for index in range(count)
    ]  # fmt: skip
    return room.Sensitivity("X", [1.0], {width: room.LADDER[width] for width in widths}, layers, [])


def random_times(study, seed):
    """A table of times that nobody measured: the first two layers are equal, and the last is called twice."""
    draw, names = random.Random(seed), [layer.name for layer in study.layers]
    cases = {name: {width: draw.uniform(1e-3, 2e-3) for width in study.ladder} for name in names[1:]}
    for made in cases.values():
        made[FLOAT] = draw.uniform(1.5e-3, 4e-3)
    calls = {name: {name if name in cases else names[1]: 2 if name == names[-1] else 1} for name in names}
    rest = 4e-3
    total = rest + sum(count * cases[case][FLOAT] for made in calls.values() for case, count in made.items())
    return Latency("X", HERE, "bf16", total, cases, calls)


def damage(study, widths):
    return sum(layer.total(widths[layer.name]) for layer in study.layers if widths[layer.name] != FLOAT)


LIMITS = [("5bits",), ("6.5bits", "6activation-bits"), ("8bits", "5activation-bits")]
TIMED = [("14ms",), ("0.9x",), ("0.85x", "7bits"), ("16ms", "0.0002MB", "6activation-bits")]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limits", LIMITS + TIMED, ids="+".join)
def test_a_budget_is_spent_as_well_as_brute_force_does(seed, limits):
    study, limits = random_study(seed), [Limit.parse(text) for text in limits]
    times, best = random_times(study, seed), None
    widths = (*study.ladder, *([FLOAT] if any(limit.timed for limit in limits) else ()))
    for chosen in itertools.product(widths, repeat=len(study.layers)):
        given = dict(zip((layer.name for layer in study.layers), chosen, strict=True))
        if all(amount(study, given, limit.unit, times) <= limit.most * (1 + 1e-9) for limit in limits):
            best = min(damage(study, given), damage(study, given) if best is None else best)
    if best is None:
        with pytest.raises(HalfbyteError, match="no assignment "):
            spend(study, limits, times)
        return
    spent = spend(study, limits, times)
    assert damage(study, spent) == pytest.approx(best, rel=1e-3)
    assert all(amount(study, spent, limit.unit, times) <= limit.most * (1 + 1e-6) for limit in limits)


def test_the_time_of_an_assignment_is_that_of_its_layers_and_of_the_rest():
    times = Latency(
        "X", HERE, "bf16", 0.010,
        {"small": {"w4a4": 0.001, "w8a8": 0.0015, FLOAT: 0.002}, "large": {"w4a4": 0.002, "w8a8": 0.003, FLOAT: 0.004}},
        {"a": {"small": 1}, "b": {"small": 1}, "c": {"small": 1, "large": 2}},
    )  # fmt: skip
    assert times.rest == pytest.approx(0.010 - (0.002 + 0.002 + 0.002 + 2 * 0.004))
    assert times.uniform(FLOAT) == pytest.approx(times.total)
    assert times.uniform("w4a4") == pytest.approx(0.010 - 3 * 0.001 - 2 * 0.002)
    assert times.predict({"a": "w4a4", "c": "w8a8"}) == pytest.approx(0.010 - 0.001 - 0.0005 - 2 * 0.001)
    assert times.predict({}) == times.total
    assert times.seconds("never called", "w4a4") == 0
    assert times.describe() == "for this machine (AVX2, backend cpu) and 2 threads, in bf16"


def test_without_a_limit_of_time_nothing_stays_in_float():
    study = random_study(0)
    assert FLOAT not in spend(study, [Limit(99, "bits")]).values()
    assert set(spend(study, [Limit(9, "x")], random_times(study, 0)).values()) == {FLOAT}


MISTAKES = {
    "bits": (["3bits"], r"has 3 stored bits a weight; these widths reach 4\.25 to 8$"),
    "activation bits": (["5bits", "2activation-bits"], r"has 2 bits an activation; these widths reach 4 to 8$"),
    "bytes": (["0.00001MB"], r"has 1e-05 MB of stored weights; these widths reach 0\.0\d+ to 0\.0\d+$"),
    "milliseconds": (["3ms"], r"has 3 ms a step of one image; these widths reach \d+\.?\d* to \d+\.?\d*$"),
    "share": (["0.1x"], r"has 0\.1 of the float model's time; these widths reach 0\.\d+ to 1\.?\d*$"),
}


@pytest.mark.parametrize(("limits", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_budget_that_cannot_be_met_says_what_can(limits, words):
    study = random_study(0)
    times, limits = random_times(study, 0), [Limit.parse(text) for text in limits]
    with pytest.raises(HalfbyteError, match=f"no assignment {words}") as caught:
        spend(study, limits, times)
    least = re.search(r"reach (\S+) to", str(caught.value))[1]
    spend(study, [Limit(float(least), limits[-1].unit)], times)  # what it says can be reached


def test_limits_that_exclude_each_other_say_how_low_each_can_be():
    study = random_study(0, ("w4a4", "w8a8"))
    times = random_times(study, 0)
    for made in times.cases.values():
        made["w4a4"], made["w8a8"], made[FLOAT] = 3e-3, 1e-3, 2e-3  # few bits are slow here
    fast = Limit(times.uniform("w8a8") * 1e3, "ms")
    with pytest.raises(HalfbyteError, match=r"meets all limits at once; the others allow no less than") as caught:
        spend(study, [fast, Limit(4.25, "bits")], times)
    fewest, fastest = re.search(
        r"no less than (\S+) ms a step of one image or (\S+) stored bits a weight$", str(caught.value)
    ).groups()
    assert float(fastest) == 8
    assert float(fewest) == pytest.approx(1e3 * times.uniform("w4a4"), rel=1e-3)
    spend(study, [Limit(float(fewest), "ms"), Limit(4.25, "bits")], times)
    with pytest.raises(HalfbyteError, match="a limit in ms needs the times of the layers"):
        spend(study, [fast])


@pytest.mark.parametrize("text", ["", "12", "ms", "-3ms", "1e3ms", "12 s", "nanbits", "4.5 bits a weight"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(HalfbyteError, match=r"such as 4\.5bits, 1\.9MB, 12ms or 0\.8x; got"):
        Limit.parse(text)


@pytest.mark.parametrize(("most", "unit"), [(0, "x"), (-1, "bits"), (float("nan"), "ms"), (float("inf"), "ms"), (3, "s")])
def test_limits_are_positive_numbers_of_known_units(most, unit):
    with pytest.raises(HalfbyteError, match=r"a budget is a number above 0 of 'MB', 'activation-bits', 'bits', 'ms', 'x'; got"):
        Limit(most, unit)


def test_budgets_are_read_and_shown():
    for unit in UNITS:
        assert Limit.parse(f"4.5{unit}") == Limit.parse(f" 4.50 {unit}") == Limit(4.5, unit)
        assert str(Limit(4.5, unit)) == f"4.5{unit}"


def test_simulated_widths_are_only_given_when_asked_for():
    study = random_study(1, ("w4a4", "w6a6", "w8a8"))
    for layer in study.layers:
        layer.damage["w6a6"] = [0.0]
    limits = [Limit(6.0, "bits")]
    assert "w6a6" not in spend(study, limits).values()
    assert set(spend(study, limits, simulated=True).values()) == {"w6a6"}


def uniform(study, width):
    """All layers at one width, those at the edges at 8 bits."""
    return {layer.name: "w8a8" if layer.family == "edge" else width for layer in study.layers}


@pytest.mark.slow
def test_spending_beats_uniform_bits_of_the_same_size_on_the_demo_model():
    pipe = demo.load_pipeline()
    study = room.measure(pipe, {width: room.LADDER[width] for width in ("w4a4", "w8a8")}, images=1, steps=4)
    study.ladder["w6a6"] = room.LADDER["w6a6"]
    states = float_states(pipe, 4, 5, 3)

    def score(widths):
        student = copy.deepcopy(pipe.unet)
        hb.quantize(student, to_recipe(study, widths, "test"), simulate="w6a6" in widths.values())
        return prediction_sqnr(student, states)[0]

    for width, extra, gain in (("w4a4", 0.2, 1), ("w6a6", 0, 3)):  # 4 bits are the least there is: nothing could be moved
        plain = uniform(study, width)
        limits = [Limit(extra + amount(study, plain, unit), unit) for unit in ("bits", "activation-bits")]
        assert score(spend(packable(study), limits)) > score(plain) + gain


def packable(study):
    ladder = {width: spec for width, spec in study.ladder.items() if spec.simulated_only() is None}
    return room.Sensitivity(study.model, study.timesteps, ladder, study.layers, study.families)


def test_a_budget_of_bytes_is_what_the_packed_model_takes():
    student, study = demo.load_pipeline().unet, random_study(0)
    draw, sizes = random.Random(0), {name: matrix_shape(layer) for name, layer in quantizable_layers(student).items()}
    study.layers = [
        room.LayerDamage(name, "linear", rows * count, rows, 1, {width: [draw.random()] for width in WIDTHS})
        for name, (rows, count) in sizes.items()
    ]
    widths = spend(study, [Limit(2.5, "MB")])
    hb.quantize(student, to_recipe(study, widths, "small"))
    assert stored_bytes(student)[0] == pytest.approx(1e6 * amount(study, widths, "MB"), rel=1e-3)
    assert 2.45e6 < stored_bytes(student)[0] < 2.501e6


def tiny_model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))


def test_the_recipe_gives_every_layer_its_width_and_survives_yaml(tmp_path):
    study = random_study(3)
    for index, layer in enumerate(study.layers):
        layer.name, layer.family = str(index), "edge" if index in (0, 4) else "linear"
    for widths in itertools.islice(itertools.product((*WIDTHS, FLOAT), repeat=5), 1, None, 37):
        given = dict(zip(map(str, range(5)), widths, strict=True))
        if set(widths) == {FLOAT}:
            continue
        recipe = to_recipe(study, given, "mine")
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        assert get_recipe(tmp_path / "recipe.yaml") == recipe
        result = hb.quantize(tiny_model(), recipe)
        expected = {name: None if width == FLOAT else study.ladder[width] for name, width in given.items()}
        assert {layer.name: layer.spec for layer in result.layers} == expected


def test_a_budget_that_needs_no_quantizing_is_refused():
    study = random_study(0)
    with pytest.raises(HalfbyteError, match="leaves every layer in float; there is nothing to quantize"):
        to_recipe(study, dict.fromkeys((layer.name for layer in study.layers), FLOAT), "x")


def test_the_page_shows_every_layer_and_what_was_spent(tmp_path):
    study = random_study(0)
    study.families = study.layers[:2]
    times = random_times(study, 0)
    widths = spend(study, [Limit.parse("0.9x")], times)
    write_heatmap(study, tmp_path / "page.html", widths, times)
    page = " ".join((tmp_path / "page.html").read_text().split())
    assert page.count("--heat:") == len(study.ladder) * (len(study.layers) + len(study.families))
    assert all(page.count(f'<th scope="row"><span>{layer.name}</span>') >= 3 for layer in study.layers)
    stored, seen = (amount(study, widths, unit) for unit in ("bits", "activation-bits"))
    assert f"{stored:.2f} stored bits a weight and {seen:.2f} bits an activation" in page
    assert f"Predicted step of one image: <strong>{1e3 * times.predict(widths):.1f} ms</strong>, " in page
    assert f"{times.predict(widths) / times.total:.2f}× of the float model’s {1e3 * times.total:.1f} ms" in page
    assert "holds for this machine (AVX2, backend cpu) and 2 threads, in bf16" in page
    assert "at float" in page
    assert "http" not in page.replace("http-equiv", "")
    assert (heat(1.0), heat(10**-5.1), heat(0.0)) == (85, 0, 0)
    write_heatmap(study, tmp_path / "page.html", spend(study, [Limit(5, "bits")]))
    assert "Predicted" not in (tmp_path / "page.html").read_text()
