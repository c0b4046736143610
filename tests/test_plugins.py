"""halfbyte inside diffusers and transformers: loading, saving, quantizing while loading, whoever is imported first."""

import copy
import subprocess
import sys

import pytest
import torch

import halfbyte as hb
from halfbyte.conversion import packed_layers
from halfbyte.errors import CorruptError, ModelError, RecipeError
from halfbyte.hub import LayoutConfig

REGISTERED = "from {library}.quantizers.auto import AUTO_QUANTIZER_MAPPING as table; assert 'halfbyte' in table"


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize(
    "start",
    [
        "import halfbyte, {library}",
        "import {library}.quantizers.auto; import halfbyte",
        "import halfbyte.{library}_plugin",
        "import halfbyte; halfbyte.quantize; import {library}",
    ],
)
def test_registration_does_not_depend_on_the_order_of_imports(library, start):
    script = f"{start}; {REGISTERED}".format(library=library)
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_float_model_is_quantized_while_loading(build, call, tmp_path):
    from diffusers import UNet2DModel

    model = build("UNet2DModel")
    model.save_pretrained(tmp_path / "float")
    loaded = UNet2DModel.from_pretrained(str(tmp_path / "float"), quantization_config=hb.HalfbyteConfig("quartz-w4a4"))
    hb.quantize(model, "quartz-w4a4")
    with torch.no_grad():
        expected = model(**call("UNet2DModel")).sample
        assert torch.equal(loaded(**call("UNet2DModel")).sample, expected)
        loaded.save_pretrained(tmp_path / "packed")
        again = UNet2DModel.from_pretrained(str(tmp_path / "packed"))
        assert torch.equal(again(**call("UNet2DModel")).sample, expected)
        assert torch.equal(copy.deepcopy(again)(**call("UNet2DModel")).sample, expected)


def test_a_pipeline_is_quantized_by_its_quantization_config(pipe, tmp_path):
    from diffusers import DiffusionPipeline, PipelineQuantizationConfig

    pipe.save_pretrained(tmp_path / "float")
    config = PipelineQuantizationConfig(quant_mapping={"unet": hb.HalfbyteConfig("int8-w8a8")})
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=config)
    assert len(packed_layers(loaded.unet)) == 51


def test_configs_that_cannot_be(build, tmp_path):
    from diffusers import UNet2DModel

    with pytest.raises(RecipeError, match="unknown recipe"):
        hb.HalfbyteConfig("nothing")
    with pytest.raises(RecipeError, match="no key 'bits'"):
        LayoutConfig("quartz-w4a4", bits=4)
    build("UNet2DModel").save_pretrained(tmp_path / "float")
    config = hb.HalfbyteConfig(hb.PRESETS["quartz-w4a4"].compensated())
    with pytest.raises(ModelError, match="needs calibration, which loading cannot do"):
        UNet2DModel.from_pretrained(str(tmp_path / "float"), quantization_config=config)


def test_a_packed_model_refuses_casts_and_keeps_its_config(build):
    model = build("UNet2DModel")
    hb.quantize(model, "quartz-w4a4")
    assert model.config["quantization_config"].to_dict()["format_version"] == 1
    assert model.dtype == torch.float32
    with pytest.raises(ValueError, match=r"(?i)quantized|cast"):
        model.to(torch.bfloat16)


def clip():
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=99, bos_token_id=0, eos_token_id=1, max_position_embeddings=16, **sizes)).eval()


def t5():
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)).eval()


TOKENS = torch.arange(12).view(2, 6)


@pytest.mark.parametrize("make", [clip, t5, None])
def test_the_libraries_own_dequantize(build, call, make):
    model = make() if make else build("UNet2DModel")
    arguments = {"input_ids": TOKENS} if make else call("UNet2DModel")
    with torch.no_grad():
        exact = model(**arguments)[0]
        hb.quantize(model, "quartz-w4a8")
        packed = model(**arguments)[0]
        model.dequantize()
        found = model(**arguments)[0]
    assert not packed_layers(model)
    assert not hasattr(model, "hf_quantizer")
    assert model.to(torch.bfloat16).dtype == torch.bfloat16  # quantized models may not be cast
    assert 0 < (found - packed).norm() < 0.1 * exact.norm()  # the 8-bit inputs
    assert 0 < (found - exact).norm() < 0.3 * exact.norm()  # the 4-bit weights


@pytest.mark.parametrize("make", [clip, t5])
def test_text_encoders_are_saved_and_loaded_bit_for_bit(make, tmp_path):
    model = make()
    with torch.no_grad():
        exact = model(TOKENS).last_hidden_state
        hb.quantize(model, "quartz-w4a8")
        expected = model(TOKENS).last_hidden_state
        assert 0 < ((expected - exact).norm() / exact.norm()).item() < 0.3
        hb.save(model, tmp_path / "out")
        loaded = type(model).from_pretrained(tmp_path / "out")
        assert torch.equal(loaded(TOKENS).last_hidden_state, expected)
        loaded.save_pretrained(tmp_path / "again")
        assert torch.equal(type(model).from_pretrained(tmp_path / "again")(TOKENS).last_hidden_state, expected)
    half = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, layer in packed_layers(half).items():
        assert torch.equal(layer.weight_scale, model.get_submodule(name).weight_scale)
    shard = tmp_path / "out" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CorruptError, match=r"model\.safetensors was truncated or altered"):
        type(model).from_pretrained(tmp_path / "out")


def test_a_text_encoder_is_quantized_while_loading(tmp_path):
    from transformers import T5EncoderModel

    from halfbyte.transformers_plugin import HalfbyteConfig

    model = t5()
    model.save_pretrained(tmp_path / "float")
    loaded = T5EncoderModel.from_pretrained(tmp_path / "float", quantization_config=HalfbyteConfig("quartz-w4a4"))
    hb.quantize(model, "quartz-w4a4")
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS).last_hidden_state, model(TOKENS).last_hidden_state)
