"""A folder quantized a few rows at a time has the bytes of one quantized in memory, however often it was killed on the way."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte as hb
from halfbyte import quantizers
from halfbyte.errors import (
    CheckpointError,
    CorruptError,
    ModelError,
    NonFiniteError,
    OutputExistsError,
    ResumeError,
    UnstreamableError,
)
from halfbyte.streaming import plan as plan_room
from halfbyte.streaming.verb import forecast, prepare, quantize_folder

MODELS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)
RUN = """
import sys, torch
torch.set_num_threads(1)
from halfbyte.streaming import plan
plan.PART_VALUES = plan.CACHED_VALUES = 1 << 12
from halfbyte.streaming.verb import quantize_folder
quantize_folder(sys.argv[1], sys.argv[2], "quartz-w4a8", resume=len(sys.argv) > 3, max_shard="30KB",
                progress=lambda stage, done, total: print(done, flush=True))
"""


HOLD = """
import pathlib, sys
from halfbyte.streaming.journal import locked
with locked(pathlib.Path(sys.argv[1])):
    print(1, flush=True)
    input()
"""


def content(folder):
    """Every file below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("recipe", "dtype"), [("quartz-w4a8", torch.float32), ("int4-w4a4", torch.bfloat16)])
def test_the_bytes_are_those_of_the_path_in_memory(build, tmp_path, monkeypatch, name, recipe, dtype):
    for room in (plan_room, quantizers):
        monkeypatch.setattr(room, "CACHED_VALUES", 1 << 9)
    monkeypatch.setattr(plan_room, "PART_VALUES", 1 << 10)  # several parts a layer
    build(name).to(dtype).save_pretrained(tmp_path / "float", max_shard_size="50KB")
    model = type(build(name)).from_pretrained(tmp_path / "float", torch_dtype=dtype)
    result = hb.quantize(model, recipe)
    hb.save(model, tmp_path / "memory", max_shard_size="20KB")
    job = quantize_folder(tmp_path / "float", tmp_path / "streamed", recipe, max_shard="20KB")
    assert content(tmp_path / "streamed") == content(tmp_path / "memory")
    rows = job.results[""].layers
    assert [(row.name, row.spec) for row in rows] == [(row.name, row.spec) for row in result.layers]
    for row, expected in zip(rows, result.layers, strict=True):
        assert row.weight_sqnr == pytest.approx(expected.weight_sqnr, abs=1e-9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "memory", "streamed"]


@pytest.mark.parametrize("make", ["clip", "t5"])
def test_text_encoders_too(tmp_path, make):
    model = _encoder(make)
    model.save_pretrained(tmp_path / "float")
    job = quantize_folder(tmp_path / "float", tmp_path / "streamed", "quartz-w4a8")
    hb.quantize(model, "quartz-w4a8")
    hb.save(model, tmp_path / "memory")
    assert job.plans[""].unused == []
    assert content(tmp_path / "streamed") == content(tmp_path / "memory")


def _encoder(kind):
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    if kind == "t5":
        return T5EncoderModel(T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=99, bos_token_id=0, eos_token_id=1, max_position_embeddings=16, **sizes)).eval()


@pytest.fixture
def model(build, tmp_path):
    """A float component on disk."""
    build("UNet2DModel").save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def expected(model, tmp_path, monkeypatch):
    """What a run in one go writes."""
    monkeypatch.setattr(plan_room, "PART_VALUES", 1 << 12)
    monkeypatch.setattr(plan_room, "CACHED_VALUES", 1 << 12)
    return content(quantize_folder(model, tmp_path / "whole", "quartz-w4a8", max_shard="30KB") and tmp_path / "whole")


def kill_once(model, out, lines):
    """Start or continue a run and kill it once it has reported some parts; whether it was killed in time."""
    resume = ["resume"] if out.with_name(f".{out.name}.partial").exists() else []
    with subprocess.Popen([sys.executable, "-c", RUN, model, out, *resume], stdout=subprocess.PIPE, text=True) as process:
        for _ in range(lines):
            if not process.stdout.readline():
                break
        process.send_signal(signal.SIGKILL)
    return process.returncode == -signal.SIGKILL


def finish(model, out):
    """Continue a run to its end; the counts it reported."""
    seen, resume = [], out.with_name(f".{out.name}.partial").exists()
    quantize_folder(model, out, "quartz-w4a8", resume=resume, max_shard="30KB", progress=lambda _, done, __: seen.append(done))
    return seen


def test_a_killed_run_goes_on_where_it_was(model, expected, tmp_path):
    out = tmp_path / "out"
    assert kill_once(model, out, 9)
    assert not out.exists()
    lines = (tmp_path / ".out.partial" / "done.jsonl").read_bytes().splitlines()
    assert len(lines) >= 8
    with pytest.raises(OutputExistsError, match="--resume continues it"):
        quantize_folder(model, out, "quartz-w4a8", max_shard="30KB")
    assert finish(model, out)[0] > 0  # what was done is not done again
    assert content(out) == expected
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.slow
def test_killed_ten_times_at_random(model, expected, tmp_path):
    out, draw, killed = tmp_path / "out", random.Random(0), 0
    for _ in range(10):
        killed += kill_once(model, out, draw.randrange(0, 12))
        if out.exists():
            break
    assert killed >= 5
    finish(model, out)
    assert content(out) == expected


def test_damage_between_two_runs_is_made_good(model, expected, tmp_path):
    """As after a power cut: the record is there, some bytes are not; and the last line is half written."""
    out = tmp_path / "out"
    assert kill_once(model, out, 12)
    work = tmp_path / ".out.partial"
    shard = next(path for path in sorted((work / "result").glob("*.safetensors")) if path.read_bytes().strip(b"\0 "))
    damaged = bytearray(shard.read_bytes())
    start = 8 + int.from_bytes(damaged[:8], "little")
    damaged[start:] = bytes(len(damaged) - start)
    shard.write_bytes(damaged)
    with open(work / "done.jsonl", "ab") as handle:
        handle.write(b'{"part": 99, "cr')
    finish(model, out)
    assert content(out) == expected


def test_another_run_is_not_continued(build, model, tmp_path):
    out = tmp_path / "out"
    assert kill_once(model, out, 3)
    part = {"max_shard": "30KB", "resume": True}
    with pytest.raises(ResumeError, match="another division into parts"):
        quantize_folder(model, out, "quartz-w4a8", **part)
    with pytest.raises(ResumeError, match="another shard size"):
        quantize_folder(model, out, "quartz-w4a8", resume=True)
    with pytest.raises(ResumeError, match="another recipe"):
        quantize_folder(model, out, "quartz-w4a4", **part)
    changed = build("UNet2DModel")
    with torch.no_grad():
        changed.conv_in.weight[0, 0, 0, 0] += 1
    changed.save_pretrained(model)
    with pytest.raises(ResumeError, match="another model"):
        quantize_folder(model, out, "quartz-w4a8", **part)


def test_two_processes_cannot_write_one_folder(model, tmp_path):
    out, started = tmp_path / "out", []
    with pytest.raises(CheckpointError, match="another process is writing"):
        quantize_folder(
            model,
            out,
            "int4-w4a4",
            progress=lambda *_: started.append(1) or (quantize_folder(model, out, "int4-w4a4") if len(started) == 1 else None),
        )
    with subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(CheckpointError, match="another process is writing"):
            quantize_folder(model, out, "int4-w4a4", resume=True)
        other.communicate(b"\n")
    quantize_folder(model, out, "int4-w4a4", resume=True)
    with pytest.raises(OutputExistsError, match="exists already"):
        quantize_folder(model, out, "int4-w4a4")


def test_a_bad_weight_is_named_and_nothing_stays(build, tmp_path):
    for key in ("mid_block.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.bias"):
        broken = build("UNet2DModel")
        with torch.no_grad():
            broken.get_parameter(key).view(-1)[5] = float("nan")
        broken.save_pretrained(tmp_path / key)
        with pytest.raises(NonFiniteError, match=key.replace(".", r"\.")):
            quantize_folder(tmp_path / key, tmp_path / "out")
        assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize("name", ["msfp-w4a4", "nvfp4-w4a4"])
def test_recipes_that_need_the_model_are_refused(model, tmp_path, name):
    with pytest.raises(ModelError, match=r"needs calibration|cannot be packed"):
        quantize_folder(model, tmp_path / "out", name)


def alter_shards(folder, change):
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


BROKEN = {
    "a tensor is missing": (lambda t: t.pop("conv_in.weight"), UnstreamableError, r"its shards have no conv_in\.weight"),
    "a wrong shape": (lambda t: t.update({"conv_in.bias": torch.zeros(3)}), CorruptError, r"conv_in\.bias has the shape \(3,\)"),
    "rounded weights": (
        lambda t: t.update({"conv_in.weight": t["conv_in.weight"].to(torch.float8_e4m3fn)}),
        ModelError,
        "rounded by somebody else",
    ),
}


@pytest.mark.parametrize(("change", "error", "words"), BROKEN.values(), ids=BROKEN)
def test_shards_that_do_not_fit(model, tmp_path, change, error, words):
    alter_shards(model, change)
    with pytest.raises(error, match=words):
        quantize_folder(model, tmp_path / "out")


def test_what_the_class_does_not_have_is_told(model, tmp_path):
    alter_shards(model, lambda tensors: tensors.update({"extra": torch.zeros(3)}))
    assert prepare(model, "int4-w4a4").plans[""].unused == ["extra"]


def test_a_pipeline_keeps_its_other_parts(pipe, tmp_path):
    from diffusers import DiffusionPipeline

    pipe.save_pretrained(tmp_path / "float")
    unet = tmp_path / "float" / "unet"
    (unet / "diffusion_pytorch_model.fp16.safetensors").write_bytes((unet / "diffusion_pytorch_model.safetensors").read_bytes())
    job = quantize_folder(tmp_path / "float", tmp_path / "out", "quartz-w4a8")
    assert set(content(tmp_path / "out")) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    assert list(job.plans) == ["unet"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    hb.quantize(pipe, "quartz-w4a8")
    images = [
        one(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images for one in (pipe, loaded)
    ]
    assert (images[0] == images[1]).all()


def test_pickled_weights_and_strange_folders_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "float")
    unet = tmp_path / "float" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="is a pickled checkpoint, which can run any program"):
        prepare(tmp_path / "float", "int4-w4a4")
    with pytest.raises(ModelError, match="neither model_index"):
        prepare(tmp_path, "int4-w4a4")
    index = tmp_path / "float" / "model_index.json"
    entries = json.loads(index.read_text())
    index.write_text(json.dumps({**entries, "../outside": ["diffusers", "UNet2DModel"]}))
    with pytest.raises(CorruptError, match="outside its own folder"):
        prepare(tmp_path / "float", "int4-w4a4")


def test_a_forecast(model):
    job = prepare(model, "quartz-w4a8")
    found = forecast(job)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert 0.9 * size < found.input_bytes <= size
    assert 0.1 * size < found.output_bytes < 0.4 * size
    assert 0 < found.seconds < 60
    assert found.peak_bytes > 700 << 20
    assert "conv_in" in job.results[""].table()


def test_the_forecast_of_the_output_is_what_is_then_written(pipe, tmp_path):
    """To the byte: weight files with their headers, and copies; the config and the card are the library's."""
    pipe.save_pretrained(tmp_path / "float")
    for recipe in ("quartz-w4a4", "int8-w8a8"):
        found = forecast(prepare(tmp_path / "float", recipe))
        quantize_folder(tmp_path / "float", tmp_path / recipe, recipe)
        written = {name: len(one) for name, one in content(tmp_path / recipe).items() if name != "unet/config.json"}
        assert found.output_bytes == sum(written.values())


@pytest.mark.parametrize("name", MODELS)
def test_the_forecast_of_the_output_of_every_architecture(build, tmp_path, name):
    build(name).save_pretrained(tmp_path / "float")
    found = forecast(prepare(tmp_path / "float", "quartz-w4a8"))
    quantize_folder(tmp_path / "float", tmp_path / "out", "quartz-w4a8")
    assert found.output_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))


def test_a_full_disk_can_be_continued(model, expected, tmp_path, monkeypatch):
    from halfbyte.streaming.shards import Shards

    write, calls = Shards.write, []

    def full(self, *arguments):
        calls.append(1)
        if len(calls) == 8:
            raise OSError(28, os.strerror(28))
        write(self, *arguments)

    monkeypatch.setattr(Shards, "write", full)
    with pytest.raises(CheckpointError, match=r"the disk is full.*--resume continues"):
        quantize_folder(model, tmp_path / "out", "quartz-w4a8", max_shard="30KB")
    monkeypatch.setattr(Shards, "write", write)
    finish(model, tmp_path / "out")
    assert content(tmp_path / "out") == expected


def test_old_names_are_left_to_diffusers(pipe, tmp_path, monkeypatch, capsys):
    """Attention layers of old checkpoints have other names, which diffusers changes while loading."""
    from halfbyte import cli

    pipe.save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "unet" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    for key in [key for key in tensors if "attentions" in key]:
        name = next((key.replace(new, before) for new, before in old.items() if new in key), key)
        tensors[name] = tensors.pop(key)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnstreamableError, match="cannot be read tensor by tensor"):
        quantize_folder(tmp_path / "float", tmp_path / "out", "int4-w4a4")
    for options, code in ((["--resume"], 1), ([], 0)):
        monkeypatch.setattr(sys, "argv", ["halfbyte", "quantize", str(tmp_path / "float"), "-o", str(tmp_path / "out"), *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert (stop.value.code or 0) == code
    assert "quantizing in memory" in capsys.readouterr().out
    hb.quantize(pipe, "halfbyte-w4a4")
    loaded = hb.load(tmp_path / "out").unet
    expected = pipe.unet.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
