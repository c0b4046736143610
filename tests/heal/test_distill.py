"""The loop: it learns, continues to the last bit, stops cleanly, and says what went wrong."""

import copy
import json
import os
import signal

import pytest
import torch

import halfbyte as hb
from halfbyte.errors import DivergedError, HealError, OutputExistsError, ResumeError, StoppedError
from halfbyte.heal.distill import distill
from halfbyte.heal.method import Method
from halfbyte.heal.settings import Settings
from halfbyte.heal.states import PoolSettings, StatePool
from halfbyte.recipe import LayerSpec, Recipe, WeightSpec

SHORT = {"batch": 4, "sampler_steps": 4, "depth": 1, "reuse": 1.0, "learning_rate": 1e-3, "log_every": 2}


class Biases(Method):
    """Trains the biases of all quantized layers."""

    name = "biases"

    def __init__(self, student):
        self.student = student

    def trained(self):
        return {name: 1.0 for name, _ in self.student.named_parameters() if name.endswith("bias")}


@pytest.fixture
def student(pipe):
    made = copy.deepcopy(pipe.unet)
    hb.quantize(made, "int4-w4a4", simulate=True)
    return made


def train(student, pipe, method=None, **options):
    outer = {key: options.pop(key) for key in ("folder", "resume", "identity", "progress") if key in options}
    return distill(student, pipe, method or Biases(student), Settings(**{"steps": 12, **SHORT, **options}), **outer)


def weights(student):
    return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}


class Convolutions(Biases):
    """Trains the weights of all convolutions of the residual blocks."""

    def trained(self):
        return {name: 1.0 for name, _ in self.student.named_parameters() if ".conv" in name and name.endswith("weight")}


def test_the_loss_falls_and_only_what_is_trained_changes(pipe):
    student = copy.deepcopy(pipe.unet)
    hb.quantize(student, Recipe("weights", LayerSpec(WeightSpec("int4", scale="absmax")), edge=None), simulate=True)
    before, teacher, seen = weights(student), weights(pipe.unet), []
    method, batch = Convolutions(student), StatePool(pipe, PoolSettings(batch=16), range(16)).batch(0)

    @torch.no_grad()
    def error():
        return float(Method.loss(method, student, batch).mean())

    at_first = error()
    train(student, pipe, method, steps=80, learning_rate=1.5e-4, progress=lambda *row: seen.append(row))
    assert error() < 0.8 * at_first
    for name, value in weights(student).items():
        assert torch.equal(value, before[name]) != (name in method.trained()), name
    assert all(torch.equal(value, teacher[name]) for name, value in weights(pipe.unet).items())
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1:] == (1000, 1000)
    assert "loss" in seen[-1][0]


class StopAt(Biases):
    """Sends this process a signal at a step, as a queue or a person would."""

    def __init__(self, student, step, number=signal.SIGTERM):
        super().__init__(student)
        self.at, self.number = step, number

    def before_step(self, step):
        if step == self.at:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_continues_to_the_same_bits(student, pipe, tmp_path, number):
    options = {"ema": 0.9, "accumulate": 2}
    whole, handler = copy.deepcopy(student), signal.getsignal(number)
    expected = train(whole, pipe, **options)
    for stop in (5, 9):
        part = copy.deepcopy(student)
        with pytest.raises(StoppedError, match=f"stopped at step {stop}, saved in .*resume") as stopped:
            train(part, pipe, StopAt(part, stop, number), folder=tmp_path, resume=True, **options)
        assert stopped.value.signal == number
        assert signal.getsignal(number) is handler
    rest = copy.deepcopy(student)
    log = train(rest, pipe, folder=tmp_path, resume=True, **options)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(rest)[name]), name
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == log.rows
    for ours, theirs in zip(rows, expected.rows, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_a_finished_run_is_not_trained_again(student, pipe, tmp_path):
    again = copy.deepcopy(student)
    train(student, pipe, folder=tmp_path)
    log = train(again, pipe, folder=tmp_path, resume=True)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(student).items())
    assert log.rows[-1]["step"] == 12


def test_another_run_is_not_continued(student, pipe, tmp_path):
    train(copy.deepcopy(student), pipe, steps=2, folder=tmp_path, identity={"recipe": {"name": "int4-w4a4"}})
    with pytest.raises(OutputExistsError, match="holds a run already"):
        train(copy.deepcopy(student), pipe, folder=tmp_path)
    mine = {"folder": tmp_path, "resume": True, "identity": {"recipe": {"name": "int4-w4a4"}}}
    with pytest.raises(ResumeError, match=r"its settings\.seed is 0, this run's is 1"):
        train(copy.deepcopy(student), pipe, **mine, steps=2, seed=1)
    with pytest.raises(ResumeError, match=r'its recipe\.name is "int4-w4a4", this run\'s is "other"'):
        train(copy.deepcopy(student), pipe, **{**mine, "identity": {"recipe": {"name": "other"}}}, steps=2)
    train(copy.deepcopy(student), pipe, **mine, steps=2, minutes=5.0, save_minutes=1.0)  # the budget may change


class PoisonAt(Biases):
    """Ruins a parameter of one layer in the middle of a run, as an overflow would."""

    def __init__(self, student, step):
        super().__init__(student)
        self.at = step

    def before_step(self, step):
        if step == self.at:
            self.student.mid_block.resnets[0].conv1.bias.data[0] = torch.inf


class Explode(Biases):
    """A loss that is NaN at one timestep although every layer is finite."""

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        return torch.where(batch.timesteps == batch.timesteps[1], torch.nan, loss)


def test_nan_stops_names_layer_and_timestep_and_keeps_the_last_good_state(student, pipe, tmp_path):
    words = r"step 3: mid_block.resnets.0.conv1.bias holds NaN or infinite values already. The student is back at step 2"
    with pytest.raises(DivergedError, match=words):
        train(student, pipe, PoisonAt(student, 3), folder=tmp_path, save_minutes=1e-9)
    assert all(value.isfinite().all() for value in weights(student).values())
    train(student, pipe, folder=tmp_path, resume=True)  # the file is sound


def test_nan_of_a_layer_is_found_where_it_arises(student, pipe):
    def overflow(layer, args):
        return (args[0] * torch.inf,) if overflow.on else None

    overflow.on = False
    student.mid_block.resnets[0].conv1.register_forward_pre_hook(overflow)

    class Overflow(Biases):
        def before_step(self, step):
            overflow.on = step == 2

    with pytest.raises(DivergedError, match=r"step 2: .* come out of layer 'mid_block.resnets.0.conv1', at timestep \d+\."):
        train(student, pipe, Overflow(student))
    overflow.on = False
    with pytest.raises(DivergedError, match=r"nan at step 0: all layers are finite, but not the loss, at timestep \d+\."):
        train(student, pipe, Explode(student))


def test_settings_that_make_no_sense(student, pipe):
    for changes, words in [
        ({"steps": None}, "needs an end"),
        ({"batch": 0}, "batch must be > 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be > 0, got nan"),
        ({"ema": 1.5}, "between 0 and 1"),
        ({"batch": 3, "accumulate": 2}, "a batch of 3 cannot be shared"),
    ]:
        with pytest.raises(HealError, match=words):
            train(student, pipe, **changes)


def test_bf16_and_recomputed_activations(student, pipe):
    exact, less = copy.deepcopy(student), copy.deepcopy(student)
    expected = train(exact, pipe)
    train(less, pipe, recompute=True)
    for name, value in weights(exact).items():
        assert torch.allclose(value, weights(less)[name], atol=1e-6), name
    rough = train(student, pipe, bf16=True)
    assert rough.rows[0]["loss"] == pytest.approx(expected.rows[0]["loss"], rel=0.3)
    assert rough.rows[0]["loss"] != expected.rows[0]["loss"]


def test_minutes_end_a_run_and_its_learning_rate(student, pipe):
    log = train(student, pipe, steps=None, minutes=0.02, log_every=1)
    assert 1.2 <= log.rows[-1]["seconds"] < 8
    assert log.rows[-1]["learning_rate"] < 0.2 * max(row["learning_rate"] for row in log.rows)


def test_batches_depend_on_seed_step_and_lane_alone(pipe):
    settings = PoolSettings(batch=4, sampler_steps=4, depth=2, reuse=1.0)
    whole = StatePool(pipe, settings, range(4))
    for step in (0, 1, 7):
        batch = whole.batch(step)
        parts = [StatePool(pipe, settings, range(a, a + 2)).batch(step) for a in (0, 2)]
        times = torch.cat([part.timesteps for part in parts])
        assert torch.equal(batch.timesteps, times.sort().values)  # a batch is in the order of its timesteps
        target = torch.cat([part.target for part in parts])[times.argsort(stable=True)]
        assert torch.allclose(batch.target.sum((1, 2, 3)).sort().values, target.sum((1, 2, 3)).sort().values, atol=1e-3)
        assert torch.equal(batch.target, StatePool(pipe, settings, range(4)).batch(step).target)
    assert len({float(t) for step in range(6) for t in whole.batch(step).timesteps}) > 4
    assert len(whole.batch(0).timesteps.unique()) > 1
    with torch.no_grad():
        again = pipe.unet(*batch.args, **{**batch.kwargs, "return_dict": False})[0]
    assert torch.allclose(again, batch.target, atol=1e-5)
