"""The public verbs on real classes: quantize, save, load, and what they say when something is wrong."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import halfbyte as hb
from halfbyte import checkpoint
from halfbyte.api import describe, load_float
from halfbyte.conversion import packed_layers, stored_bytes
from halfbyte.errors import (
    CheckpointError,
    CorruptError,
    ModelError,
    NonFiniteError,
    OutputExistsError,
    PackedError,
    RecipeError,
    VersionError,
)
from halfbyte.layers import FakeQuant, module_kind

CLASSES = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)


class Stranger(nn.Module):
    """A network no table knows, with every kind of layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.down = nn.Conv2d(20, 24, 3, stride=2, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(24, 20, 4, stride=2, padding=1)
        self.mix = nn.Conv1d(20, 20, 1)
        self.attention = nn.MultiheadAttention(20, 2, batch_first=True)
        self.shared = nn.Linear(20, 20)
        self.again = self.shared
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        x = self.up(torch.relu(self.down(torch.relu(self.stem(x))))).flatten(2)
        x = self.mix(x).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.relu(self.again(torch.relu(self.shared(x))).mean(1)))


def image(pipe):
    return pipe(batch_size=2, generator=torch.Generator().manual_seed(1), num_inference_steps=3, output_type="np").images


def relative(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def test_a_network_no_one_knows_is_quantized_and_accounted_for():
    torch.manual_seed(0)
    model, x = Stranger().eval(), torch.randn(2, 3, 8, 8)
    met = [name for name, module in model.named_modules(remove_duplicate=False) if module_kind(module)]
    exact = model(x)
    result = hb.quantize(model, recipe="quartz-w4a4")
    assert [layer.name for layer in result.layers] == met
    became = {layer.name: layer for layer in result.layers}
    assert became["stem"].spec.weight.grid == became["head"].spec.weight.grid == "int8"
    assert became["up"].spec.weight.grid == "lzs4"
    assert became["attention.out_proj"].spec is None
    assert "reads its weights directly" in became["attention.out_proj"].reason
    assert model.shared is model.again
    assert relative(model(x), exact) < 0.3
    assert "stem" in result.table()


@pytest.mark.parametrize("name", CLASSES)
def test_every_layer_of_the_real_classes_is_accounted_for_and_runs(build, call, name):
    model = build(name)
    met = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d)]
    with torch.no_grad():
        exact = model(**call(name), return_dict=False)[0]
        result = hb.quantize(model, "quartz-w4a8")
        found = model(**call(name), return_dict=False)[0]
    assert [layer.name for layer in result.layers] == met
    assert all(layer.spec is not None for layer in result.layers)
    edges = [layer.name for layer in result.layers if layer.spec.weight.grid == "int8"]
    assert 2 <= len(edges) <= 3, edges
    assert relative(found, exact) < 0.25


def test_packed_and_simulated_models_agree(build, call):
    packed, simulated = build("UNet2DModel"), build("UNet2DModel")
    hb.quantize(packed, "quartz-w4a4")
    result = hb.quantize(simulated, "quartz-w4a4", simulate=True)
    assert all(isinstance(simulated.get_submodule(layer.name), FakeQuant) for layer in result.layers)
    with torch.no_grad():
        one, other = packed(**call("UNet2DModel")).sample, simulated(**call("UNet2DModel")).sample
        assert relative(one, other) < 1e-3  # float rounding, amplified where a value sits on a rounding edge
        hb.pack(simulated)
        assert torch.equal(simulated(**call("UNet2DModel")).sample, one)


def test_quantizing_a_pipeline_saves_loads_and_samples_bit_for_bit(pipe, tmp_path):
    from diffusers import AutoModel, DiffusionPipeline

    hb.quantize(pipe, "quartz-w4a4")
    expected = image(pipe)
    hb.save(pipe, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out" / "unet").glob("*.safetensors"))) > 1
    for reloaded in (DiffusionPipeline.from_pretrained(tmp_path / "out"), hb.load(tmp_path / "out")):
        reloaded.set_progress_bar_config(disable=True)
        assert (image(reloaded) == expected).all()
    reloaded.save_pretrained(tmp_path / "again")
    third = DiffusionPipeline.from_pretrained(tmp_path / "again")
    third.set_progress_bar_config(disable=True)
    assert (image(third) == expected).all()
    assert packed_layers(AutoModel.from_pretrained(str(tmp_path / "out" / "unet")))


def test_float32_scales_survive_loading_in_bf16(pipe, tmp_path):
    hb.quantize(pipe, "quartz-w4a4")
    hb.save(pipe, tmp_path / "out")
    unet = hb.load(tmp_path / "out", dtype=torch.bfloat16).unet
    assert unet.conv_in.bias.dtype == torch.bfloat16
    for name, layer in packed_layers(unet).items():
        assert torch.equal(layer.weight_scale, pipe.unet.get_submodule(name).weight_scale)


def test_stored_bytes_are_what_the_shards_hold(pipe, tmp_path):
    hb.quantize(pipe, "quartz-w4a4")
    hb.save(pipe, tmp_path / "out")
    tensors = load_file(next((tmp_path / "out" / "unet").glob("*.safetensors")))
    on_disk = sum(tensor.nbytes for name, tensor in tensors.items() if ".weight_" in name)
    assert stored_bytes(pipe.unet)[0] == on_disk


def test_a_plain_module_is_saved_and_loaded_into_its_float_twin(tmp_path):
    torch.manual_seed(0)
    model, x = Stranger().eval(), torch.randn(2, 3, 8, 8)
    hb.quantize(model, "quartz-w4a4")
    hb.save(model, tmp_path / "out", max_shard_size="5KB")
    assert torch.equal(hb.load(tmp_path / "out", into=Stranger().eval())(x), model(x))
    with pytest.raises(CorruptError, match="no such layer"):
        hb.load(tmp_path / "out", into=nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ModelError, match="pass into="):
        hb.load(tmp_path / "out")


def test_calibrated_recipes_on_a_pipeline_and_on_inputs(build, pipe, call):
    recipe = hb.PRESETS["quartz-w4a4"]
    gptq = recipe.replace(inner=recipe.inner.replace(weight=recipe.inner.weight.replace(rounding="gptq")))
    hb.quantize(pipe, gptq, calibration=2, steps=2)
    assert image(pipe).shape == (2, 8, 8, 1)
    model = build("DiTTransformer2DModel")
    with torch.no_grad():
        exact = model(**call("DiTTransformer2DModel")).sample
        hb.quantize(model, gptq.replace(smooth=0.5), calibration=[call("DiTTransformer2DModel")])
        assert relative(model(**call("DiTTransformer2DModel")).sample, exact) < 0.3


def test_calibration_is_asked_for(build, pipe):
    recipe = hb.PRESETS["quartz-w4a4"].replace(smooth=0.5)
    with pytest.raises(ModelError, match="needs calibration"):
        hb.quantize(pipe, recipe)
    with pytest.raises(ModelError, match="bare module has no sampler"):
        hb.quantize(build("UNet2DModel"), recipe, calibration=4)


def test_unknown_recipes_and_strange_models_are_refused(pipe):
    with pytest.raises(RecipeError, match=r"unknown recipe 'quartz'.*'int4-w4a4'"):
        hb.quantize(pipe, "quartz")
    with pytest.raises(ModelError, match="got dict"):
        hb.quantize({}, "quartz-w4a4")
    with pytest.raises(ModelError, match="group"):
        hb.quantize(pipe, "quartz-authors-w4a4")
    hb.quantize(pipe, "int4-w4a4")
    with pytest.raises(ModelError, match="quantized already"):
        hb.quantize(pipe, "int4-w4a4")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named_and_nothing_changes(pipe, bad):
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = bad
    with pytest.raises(NonFiniteError, match=r"mid_block\.resnets\.0\.conv1\.weight holds 1 NaN or infinite"):
        hb.quantize(pipe, "quartz-w4a4")
    assert not packed_layers(pipe.unet)
    assert type(pipe.unet.conv_in) is nn.Conv2d


def test_saving_refuses_float_models_and_existing_folders(pipe, tmp_path):
    with pytest.raises(ModelError, match="not packed"):
        hb.save(pipe, tmp_path / "out")
    hb.quantize(pipe, "int4-w4a4")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputExistsError, match="exists already"):
        hb.save(pipe, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_is_cut_short_leaves_nothing(pipe, tmp_path, monkeypatch, failure):
    hb.quantize(pipe, "int4-w4a4")

    def fail(*_):
        raise failure

    monkeypatch.setattr(checkpoint, "record_hashes", fail)  # the shards are written by then
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as caught:
        hb.save(pipe, tmp_path / "out")
    if isinstance(failure, OSError):
        assert "the disk is full" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_really_full_disk(pipe, tmp_path):
    hb.quantize(pipe, "int4-w4a4")
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=64k none {small} 2>/dev/null") != 0:
        pytest.skip("no permission to mount a tmpfs")
    try:
        with pytest.raises(CheckpointError, match="the disk is full"):
            hb.save(pipe, small / "out")
        assert list(small.iterdir()) == []
    finally:
        os.system(f"umount {small}")


def saved(pipe, folder):
    hb.quantize(pipe, "quartz-w4a4")
    return hb.save(pipe, folder / "out") / "unet"


def test_altered_truncated_and_missing_shards_are_named(pipe, tmp_path):
    from diffusers import DiffusionPipeline

    unet = saved(pipe, tmp_path)
    shard = unet / "diffusion_pytorch_model.safetensors"
    whole = shard.read_bytes()
    for content in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), whole[:20], b""):
        shard.write_bytes(content)
        with pytest.raises(CorruptError, match=r"diffusion_pytorch_model\.safetensors was truncated or altered"):
            hb.load(unet.parent)
        with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):  # ours, or diffusers' own where it looks first
            DiffusionPipeline.from_pretrained(unet.parent)
    shard.unlink()
    with pytest.raises(CorruptError, match=r"lacks its shard diffusion_pytorch_model\.safetensors"):
        hb.load(unet.parent)


def edit(file: Path, change):
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda q: q.update(format_version=2), VersionError, "reads up to 1.*pip install -U"),
        (lambda q: q.update(format_version="1"), CorruptError, "positive integer"),
        (lambda q: q.update(surprise=1), CorruptError, "unknown keys.*surprise"),
        (lambda q: q["layers"].update(conv_in=99), CorruptError, "damaged"),
        (lambda q: q["layers"].update(nowhere=0), CorruptError, "'nowhere'.*no such layer"),
        (lambda q: q["specs"][0]["weight"].update(grid="int3"), CorruptError, "unknown grid 'int3'"),
        (lambda q: q["files"].update({"../../evil.safetensors": "00"}), CorruptError, "outside its own folder"),
        (lambda q: q["specs"][0]["weight"].update(grid="int4"), CorruptError, "the config asks for"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(pipe, tmp_path, change, error, words):
    from diffusers import DiffusionPipeline

    unet = saved(pipe, tmp_path)
    edit(unet / "config.json", change)
    for load in (hb.load, DiffusionPipeline.from_pretrained):
        with pytest.raises(error, match=words):
            load(unet.parent)


def test_a_missing_tensor_is_named(pipe, tmp_path):
    unet = saved(pipe, tmp_path)
    shard = unet / "diffusion_pytorch_model.safetensors"
    tensors = load_file(shard)
    del tensors["conv_in.weight_scale"]
    save_file(tensors, shard, metadata={"format": "pt"})
    edit(unet / "config.json", lambda q: q.pop("files"))
    with pytest.raises(CorruptError, match=r"conv_in\.weight_scale is missing"):
        hb.load(unet.parent)


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(CheckpointError, match="not a folder"):
        hb.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="neither model_index"):
        hb.load(tmp_path)
    with pytest.raises(ModelError, match="holds no halfbyte checkpoint"):
        describe(tmp_path)
    with pytest.raises(ModelError, match="no model_index"):
        load_float(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CorruptError, match="not JSON"):
        hb.load(tmp_path)


def test_describe_reads_a_folder_without_its_tensors(pipe, tmp_path):
    unet = saved(pipe, tmp_path)
    shutil.move(unet / "diffusion_pytorch_model.safetensors", tmp_path / "elsewhere")
    recipe, layers = describe(unet.parent)
    assert recipe == hb.PRESETS["quartz-w4a4"]
    assert set(layers) == set(packed_layers(pipe.unet))


def test_simulated_models_cannot_be_packed_with_group_scales(build):
    model = build("UNet2DModel")
    hb.quantize(model, "quartz-authors-w4a4", simulate=True)
    with pytest.raises(PackedError, match="group"):
        hb.pack(model)
    assert not packed_layers(model)
