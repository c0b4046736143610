"""Whole models in ComfyUI's layout: a reader of its own, plain torch, finds every weight that halfbyte multiplies with."""

import errno
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from typer.testing import CliRunner

import halfbyte as hb
from halfbyte.cli import app
from halfbyte.comfyui import export
from halfbyte.comfyui.names import placer
from halfbyte.conversion import simulate
from halfbyte.errors import CheckpointError, ModelError, OutputExistsError
from halfbyte.layers import FakeQuant
from halfbyte.presets import PRESETS
from halfbyte.recipe import LayerSpec, WeightSpec
from halfbyte.runtime.layers import Packed
from halfbyte.unpacking import float_layer

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
FLUX_WIDE = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1, "in_channels": 16}
FLUX_WIDE |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8], "patch_size": 1}


def untiled(tiles, rows, blocks):
    """Scales from their tiles of 128 rows by 4 blocks: 32 lines of 16 bytes, 4 rows in a line."""
    along = tiles.shape[1] // 4
    row, block = torch.arange(rows)[:, None], torch.arange(blocks)[None]
    at = (row // 128 * along + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
    return tiles.view(torch.uint8).flatten()[at].view(torch.float8_e4m3fn).float()


def read(file):
    """Every tensor of a file as floats, its quantized layers by their marks: (tensors, format of each layer)."""
    with safe_open(file, framework="pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    marks = {key.removesuffix(".comfy_quant"): tensors.pop(key) for key in list(tensors) if key.endswith(".comfy_quant")}
    formats = {name: json.loads(bytes(mark.tolist())) for name, mark in marks.items()}
    for name, entry in formats.items():
        codes, scale = tensors[f"{name}.weight"], tensors.pop(f"{name}.weight_scale")
        if entry["format"] == "int8_tensorwise":
            tensors[f"{name}.weight"] = codes.float() * scale
            continue
        assert entry["format"] == "nvfp4"
        rows, half = codes.shape
        values = E2M1[torch.stack([codes >> 4, codes & 15], -1).long()].view(rows, half // 8, 16)
        scales = tensors.pop(f"{name}.weight_scale_2") * untiled(scale, rows, half // 8)
        tensors[f"{name}.weight"] = (values * scales[..., None]).view(rows, -1)
    return tensors, formats


def expected(model, dtype=torch.float32):
    """What the file should hold: the model's own weights under ComfyUI's names (tests/comfyui/test_names.py checks those)."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (Packed, FakeQuant))}
    state = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] not in layers}
    for name, layer in layers.items():
        packed = isinstance(layer, Packed)
        state[f"{name}.weight"] = float_layer(layer, dtype).weight if packed else layer.quantized_weight().dequantize()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    place, groups = placer(model), {}
    for key, tensor in state.items():
        groups.setdefault(place(key).name, []).append((*place(key), tensor.detach()))
    made = {}
    for name, parts in groups.items():
        whole = torch.cat([part[-1] for part in sorted(parts, key=lambda part: part[1])])
        made[name] = torch.cat(whole.chunk(2)[::-1]) if parts[0][2] else whole
    return made


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    wrong = [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert not wrong


@pytest.mark.parametrize("recipe", ["quartz-w4a4", "int4-w4a4", "int8-w8a8"])
@pytest.mark.parametrize("name", ["UNet2DConditionModel", "FluxTransformer2DModel", "QwenImageTransformer2DModel"])
def test_packed_models_are_read_back_to_the_bit(build, tmp_path, name, recipe):
    model = build(name)
    hb.quantize(model, recipe)
    hb.save(model, tmp_path / "packed")
    done = export(tmp_path / "packed", tmp_path / "out")
    found, formats = read(tmp_path / "out" / "packed.safetensors")
    assert_same(found, expected(model))
    assert all(entry == {"format": "int8_tensorwise"} for entry in formats.values())
    convolutions = [key for key, layer in model.named_modules() if isinstance(layer, Packed) and not isinstance(layer, nn.Linear)]
    made = done.files["packed.safetensors"]
    assert sorted(made.floats) == sorted(convolutions)
    assert made.layers["int8_tensorwise"] + len(convolutions) == sum(isinstance(layer, Packed) for layer in model.modules())
    assert not made.rounded
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["packed.safetensors"]


def test_text_encoders(tmp_path):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    model = T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)).eval()
    hb.quantize(model, "quartz-w4a8")
    hb.save(model, tmp_path / "text_encoder_2")
    export(tmp_path / "text_encoder_2", tmp_path / "out")
    found, formats = read(tmp_path / "out" / "text_encoder_2.safetensors")
    wanted = expected(model)
    wanted.pop("encoder.embed_tokens.weight")  # another name of shared.weight
    assert_same(found, wanted)
    assert "encoder.block.0.layer.0.SelfAttention.q" in formats


@pytest.fixture
def flux(tmp_path):
    """The folder of a float FLUX pipeline whose sizes are multiples of 16; its denoiser alone, in bfloat16."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    FluxTransformer2DModel(**FLUX_WIDE).bfloat16().save_pretrained(tmp_path / "flux" / "transformer")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps(index))
    return tmp_path / "flux"


def test_nvfp4(flux, tmp_path):
    """The edges are int8; what ComfyUI joins shares one float32; what it reads widths from is left in floats."""
    from diffusers import FluxTransformer2DModel

    done = export(flux, tmp_path / "out", recipe="nvfp4-w4a4")
    found, formats = read(tmp_path / "out" / "transformer.safetensors")
    model = FluxTransformer2DModel.from_pretrained(str(flux / "transformer"), dtype=torch.bfloat16)
    plain = expected(model)
    simulate(model, PRESETS["nvfp4-w4a4"])
    alone = expected(model)
    joined = {name for name in found if ".qkv.weight" in name or ".linear1.weight" in name}
    assert_same({name: found[name] for name in found if name not in joined}, {n: v for n, v in alone.items() if n not in joined})
    for name in joined:  # as one weight under one scale: no worse than apart
        errors = [(other[name] - plain[name]).norm() for other in (found, alone)]
        assert 0 < errors[0] < 1.1 * errors[1]
    assert formats["img_in"] == formats["txt_in"] == {"format": "int8_tensorwise"}
    assert formats["double_blocks.0.img_attn.qkv"] == formats["single_blocks.0.linear1"] == {"format": "nvfp4"}
    assert done.files["transformer.safetensors"].floats == ["time_text_embed.text_embedder.linear_1"]
    assert "vector_in.in_layer" not in formats


def test_layers_whose_input_stays_in_float_say_so(build, tmp_path):
    model = build("QwenImageTransformer2DModel")
    hb.quantize(model, PRESETS["int4-w4a4"].replace(inner=LayerSpec(WeightSpec("int4"))))
    hb.save(model, tmp_path / "packed")
    export(tmp_path / "packed", tmp_path / "out")
    found, formats = read(tmp_path / "out" / "packed.safetensors")
    assert_same(found, expected(model))
    assert formats["transformer_blocks.0.attn.to_q"] == {"format": "int8_tensorwise", "full_precision_matrix_mult": True}
    assert formats["img_in"] == {"format": "int8_tensorwise"}


def test_parts_of_a_joined_layer_that_are_unlike_become_floats(build, tmp_path):
    model = build("FluxTransformer2DModel")
    hb.quantize(model, PRESETS["quartz-w4a8"].replace(keep=(r"transformer_blocks\.0\.attn\.to_q",)))
    hb.save(model, tmp_path / "packed")
    made = export(tmp_path / "packed", tmp_path / "out").files["packed.safetensors"]
    found, formats = read(tmp_path / "out" / "packed.safetensors")
    assert_same(found, expected(model))
    assert "double_blocks.0.img_attn.qkv" not in formats
    assert {"transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"} <= set(made.floats)


def test_a_dtype_rounds_what_has_no_quantized_form_and_is_told(build, tmp_path):
    model = build("UNet2DConditionModel")
    hb.quantize(model, "quartz-w4a8")
    hb.save(model, tmp_path / "packed")
    done = export(tmp_path / "packed", tmp_path / "out", torch.bfloat16)
    found, formats = read(tmp_path / "out" / "packed.safetensors")
    wanted = expected(model)
    assert found["input_blocks.0.0.weight"].dtype == torch.bfloat16
    quantized = {f"{name}.weight" for name in formats}
    assert_same(found, {key: value if key in quantized else value.bfloat16() for key, value in wanted.items()})
    assert any("33 layers have no quantized form in ComfyUI; their weights were rounded" in line for line in done.lines())


def test_what_would_be_lost_is_refused_and_nothing_is_written(build, call, tmp_path):
    model = build("FluxTransformer2DModel")
    hb.quantize(model, PRESETS["quartz-w4a8"].smoothed(0.5), [call("FluxTransformer2DModel")])
    hb.save(model, tmp_path / "packed")
    with pytest.raises(
        ModelError, match=r"would lose, of .*_embedder.* and \d+ more, the factors that smooth its input; --layout diffusers"
    ):
        export(tmp_path / "packed", tmp_path / "out")
    unknown = build("SanaTransformer2DModel")
    hb.quantize(unknown, "quartz-w4a8")
    hb.save(unknown, tmp_path / "sana")
    with pytest.raises(ModelError, match="SanaTransformer2DModel are not known here"):
        export(tmp_path / "sana", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "sana"]


def test_recipes_that_do_not_fit(flux, tmp_path):
    words = {
        "mxfp4-w4a4": r"would lose, of .* and \d+ more, its weights, e2m1 g32 e8m0",
        "msfp-w4a4": "calibrates; run halfbyte quantize",
    }
    for recipe, word in words.items():
        with pytest.raises(ModelError, match=word):
            export(flux, tmp_path / "out", recipe=recipe)
    temporal = PRESETS["nvfp4-w4a4"].replace(temporal=True)
    with pytest.raises(ModelError, match="differences over time, which ComfyUI's layout would lose"):
        export(flux, tmp_path / "out", recipe=temporal)
    with pytest.raises(ModelError, match="has no packed layers; quantize it first, or name a recipe"):
        export(flux / "transformer", tmp_path / "out")
    (flux / "transformer").rename(flux / "other")
    with pytest.raises(ModelError, match="has no denoiser"):
        export(flux, tmp_path / "out", recipe="nvfp4-w4a4")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(build, tmp_path, monkeypatch):
    from halfbyte.streaming.shards import Shards

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = build("QwenImageTransformer2DModel")
    hb.quantize(model, "quartz-w4a8")
    hb.save(model, tmp_path / "packed")
    monkeypatch.setattr(Shards, "write", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        export(tmp_path / "packed", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_the_command(flux, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, ["export", str(flux), "-o", str(tmp_path / "out"), *arguments])

    assert "--layout comfyui --recipe nvfp4-w4a4" in run("--help").output.replace("\n", " ").replace("  ", " ")
    mistakes = {
        ("--layout", "gguf"): "would round every scale",
        ("--layout", "onnx"): "layout must be one of diffusers, comfyui",
        ("--recipe", "nvfp4-w4a4"): "--recipe is for --layout comfyui",
        ("--layout", "comfyui", "--dtype", "int4"): "dtype must be one of bf16, fp16, fp32",
    }
    for arguments, words in mistakes.items():
        assert words in str(run(*arguments).exception)
    done = run("--layout", "comfyui", "--recipe", "nvfp4-w4a4")
    assert done.exit_code == 0, done.output
    assert "transformer.safetensors: " in done.output
    assert "layers as nvfp4" in done.output
    assert isinstance(run("--layout", "comfyui", "--recipe", "nvfp4-w4a4").exception, OutputExistsError)
