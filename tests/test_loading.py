"""What loaders and offloaders do with packed models: memory, devices, hooks, the Hub."""

import contextlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import halfbyte as hb
from halfbyte.api import describe, stored_sizes
from halfbyte.conversion import memory_bytes, packed_layers, stored_bytes
from halfbyte.errors import CheckpointError, CorruptError

NAME = "UNet2DModel"


def run(model, arguments):
    with torch.no_grad():
        return model(**arguments).sample


@pytest.fixture
def packed(build, tmp_path):
    """A saved packed model, in shards; its folder and the model."""
    model = build(NAME)
    hb.quantize(model, "quartz-w4a8")
    return hb.save(model, tmp_path / "out", max_shard_size="30KB"), model


def memory(key):
    """A line of this process's status, in bytes."""
    return int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) << 10


@contextlib.contextmanager
def peak(found):
    """Puts into `found` by how much the resident memory grew at its peak."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    yield
    found.append(memory("VmHWM") - before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_float_weights_are_never_in_memory(tmp_path):
    from diffusers import DiTTransformer2DModel

    from halfbyte.streaming.verb import quantize_folder

    sizes = {"num_attention_heads": 16, "attention_head_dim": 48, "num_layers": 4, "num_embeds_ada_norm": 10, "sample_size": 8}
    model = DiTTransformer2DModel(in_channels=4, patch_size=2, **sizes)
    floats = sum(4 * parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "float")
    del model
    streamed, loaded = [], []
    with peak(streamed):
        quantize_folder(tmp_path / "float", tmp_path / "out", "int4-w4a4", max_shard="10MB")
    with peak(loaded):
        model = hb.load(tmp_path / "out")
    stored, held = stored_bytes(model)[0], memory_bytes(model)[0]
    assert held < floats / 7
    assert stored < floats / 7
    assert loaded[0] < floats / 2, "packed layers, biases, and a shard in reading"
    assert streamed[0] < floats, "a few parts"


DEVICE_MAPS = ["cpu", {"": "cpu"}, "auto"]


@pytest.mark.parametrize("device_map", DEVICE_MAPS, ids=str)
def test_device_maps(build, call, tmp_path, device_map):
    from diffusers import FluxTransformer2DModel

    model, arguments = build("FluxTransformer2DModel"), call("FluxTransformer2DModel")
    hb.quantize(model, "quartz-w4a8")
    hb.save(model, tmp_path / "out", max_shard_size="30KB")
    loaded = FluxTransformer2DModel.from_pretrained(str(tmp_path / "out"), device_map=device_map)
    assert torch.equal(run(loaded, arguments), run(model, arguments))


@pytest.mark.parametrize("buffers", [False, True])
def test_accelerate_offloads_and_brings_back(packed, call, buffers):
    from accelerate import cpu_offload

    _, model = packed
    expected = run(model, call(NAME))
    model = cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    for _ in range(2):
        assert torch.equal(run(model, call(NAME)), expected)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(packed, call, kind):
    _, model = packed
    expected = run(model, call(NAME))
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=kind, **blocks)
    for _ in range(2):
        assert torch.equal(run(model, call(NAME)), expected)


def test_a_model_is_pushed_to_the_hub_as_it_is_saved(packed, monkeypatch, tmp_path):
    from diffusers.models import modeling_utils
    from diffusers.utils import PushToHubMixin

    folder, model = packed
    seen = {}
    monkeypatch.setattr(modeling_utils, "create_repo", lambda name, **_: type("Repository", (), {"repo_id": name}))
    monkeypatch.setattr(modeling_utils, "load_or_create_model_card", lambda *_, **__: type("Card", (), {"save": lambda *_: None})())
    monkeypatch.setattr(modeling_utils, "populate_model_card", lambda card: card)
    monkeypatch.setattr(
        PushToHubMixin,
        "_upload_folder",
        lambda self, working, name, **_: seen.update({name: {file.name: file.read_bytes() for file in Path(working).iterdir()}}),
    )
    model.save_pretrained(str(tmp_path / "pushed"), push_to_hub=True, repo_id="me/model", max_shard_size="30KB")
    shards = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    assert {name: content for name, content in seen["me/model"].items() if name.endswith(".safetensors")} == shards
    assert json.loads(seen["me/model"]["config.json"])["quantization_config"]["quant_method"] == "halfbyte"


def test_sizes_are_told_without_reading_tensors(packed):
    folder, model = packed
    sizes = stored_sizes(folder)
    assert sizes.keys() == describe(folder)[1].keys() == packed_layers(model).keys()
    assert sum(sizes.values()) == stored_bytes(model)[0]


def test_shards_elsewhere_are_refused_by_every_loader(packed, tmp_path):
    from diffusers import UNet2DModel

    folder, _ = packed
    shard = sorted(folder.glob("*.safetensors"))[0]
    (tmp_path / "elsewhere.safetensors").write_bytes(shard.read_bytes())
    index = next(folder.glob("*.index.json"))
    index.write_text(index.read_text().replace(shard.name, "../elsewhere.safetensors"))
    with pytest.raises(CorruptError, match="not to be trusted"):
        hb.load(folder)
    with pytest.raises(ValueError, match="not allowed"):  # diffusers looks first
        UNet2DModel.from_pretrained(str(folder))


def test_pickled_weights_are_never_opened(packed):
    from diffusers import UNet2DModel

    folder, model = packed
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    torch.save(model.state_dict(), folder / "diffusion_pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match="lacks its shard"):
        hb.load(folder)
    del config["quantization_config"]["files"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        hb.load(folder)
    with pytest.raises(CorruptError, match="is no safetensors file"):
        UNet2DModel.from_pretrained(str(folder))


def test_a_config_of_a_billion_layers_is_refused_soon(packed):
    folder, _ = packed
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layers_per_block": 10**9}))
    with pytest.raises(CorruptError, match="more layers than the shards hold"):
        hb.load(folder)
