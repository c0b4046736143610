"""A pipeline with two quantized components, one of diffusers and one of transformers: saved, described, loaded in a new process."""

import copy
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import halfbyte as hb
from halfbyte.api import describe
from halfbyte.checkpoint import sha256
from halfbyte.conversion import packed_layers
from halfbyte.errors import CorruptError, ModelError
from halfbyte.hub import is_packed

# A new process: loads the pipelines given by their folders and samples one step of each.
FRESH = """
import sys, numpy, torch, halfbyte
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "output_type": "latent", "generator": torch.Generator().manual_seed(5)}
    numpy.save(folder + ".npy", pipe("a b", **options).images.numpy())
"""


def tokenizer(folder):
    """A CLIP tokenizer that knows the letters a and b."""
    from transformers import CLIPTokenizer

    folder.mkdir()
    words = ["<|startoftext|>", "<|endoftext|>", "a", "b", "a</w>", "b</w>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)


@pytest.fixture
def text_to_image(build, tmp_path):
    """A Stable Diffusion pipeline, as tiny as it gets."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=6, bos_token_id=0, eos_token_id=1, pad_token_id=1, max_position_embeddings=8, **sizes)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8),
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=tokenizer(tmp_path / "tokenizer"),
        unet=build("UNet2DConditionModel"),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latent(pipe):
    return pipe("a b", num_inference_steps=1, output_type="latent", generator=torch.Generator().manual_seed(5)).images.numpy()


def files_of(component):
    return json.loads((component / "config.json").read_text())["quantization_config"]["files"]


def alter(shard):
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_both_components_are_saved_hashed_described_and_loaded_bit_for_bit(text_to_image, tmp_path):
    exact = latent(text_to_image)
    hb.quantize(text_to_image, "quartz-w4a8")
    only_unet = latent(text_to_image)
    hb.save(text_to_image, tmp_path / "unet-only")
    hb.quantize(text_to_image.text_encoder, "int8-w8a8")
    both = latent(text_to_image)
    assert len({image.tobytes() for image in (exact, only_unet, both)}) == 3
    out = hb.save(text_to_image, tmp_path / "both", max_shard_size="30KB")

    for name in ("unet", "text_encoder"):
        shards = sorted((out / name).glob("*.safetensors"))
        assert files_of(out / name) == {shard.name: sha256(shard) for shard in shards}
    assert len(files_of(out / "unet")) > 1
    assert "quantization_config" not in json.loads((out / "vae" / "config.json").read_text())
    assert "quantization_config" not in json.loads((tmp_path / "unet-only" / "text_encoder" / "config.json").read_text())

    recipe, layers = describe(out)
    assert recipe.name == "quartz-w4a8"
    expected = {f"{part}.{name}" for part in ("unet", "text_encoder") for name in packed_layers(getattr(text_to_image, part))}
    assert set(layers) == expected
    recipe, layers = describe(out / "text_encoder")
    assert (recipe.name, set(layers)) == ("int8-w8a8", set(packed_layers(text_to_image.text_encoder)))
    assert set(describe(tmp_path / "unet-only")[1]) == set(packed_layers(text_to_image.unet))

    folders = [str(tmp_path / "both"), str(tmp_path / "unet-only")]
    done = subprocess.run([sys.executable, "-c", FRESH, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (np.load(tmp_path / "both.npy") == both).all()
    assert (np.load(tmp_path / "unet-only.npy") == only_unet).all()


def test_a_text_encoder_alone_is_saved_loaded_and_checked(text_to_image, tmp_path):
    hb.quantize(text_to_image.text_encoder, "quartz-w4a4")
    expected = latent(text_to_image)
    whole = hb.load(hb.save(text_to_image, tmp_path / "whole"))
    assert is_packed(whole.text_encoder)
    assert not is_packed(whole.unet)
    whole.set_progress_bar_config(disable=True)
    assert (latent(whole) == expected).all()
    text_to_image.text_encoder = hb.load(hb.save(text_to_image.text_encoder, tmp_path / "alone"))
    assert (latent(text_to_image) == expected).all()
    alter(tmp_path / "whole" / "text_encoder" / "model.safetensors")
    with pytest.raises(CorruptError, match=r"text_encoder.*model\.safetensors was truncated or altered"):
        hb.load(tmp_path / "whole")


def test_what_is_not_wholly_packed_is_not_saved(text_to_image, tmp_path):
    with pytest.raises(ModelError, match=r"UNet2DConditionModel is not packed; run halfbyte\.quantize"):
        hb.save(text_to_image, tmp_path / "out")
    hb.quantize(text_to_image, "int4-w4a4")
    hb.quantize(text_to_image.text_encoder, "int4-w4a4", simulate=True)
    with pytest.raises(ModelError, match=r"CLIPTextModel is simulated, not packed; run halfbyte\.pack"):
        hb.save(text_to_image, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hb.pack(text_to_image.text_encoder)
    assert hb.save(text_to_image, tmp_path / "out").is_dir()


def test_a_fine_tuned_student_is_packed_and_saved(build, call, tmp_path):
    student, plain = build("UNet2DModel"), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for model in (student, plain):
        hb.quantize(model, "quartz-w4a4", simulate=True)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)  # what training would do
        hb.pack(model)
    loaded = hb.load(hb.save(student, tmp_path / "student"))
    with torch.no_grad():
        assert torch.equal(loaded(**call("UNet2DModel")).sample, student(**call("UNet2DModel")).sample)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    twin = hb.load(hb.save(plain, tmp_path / "plain"), into=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    assert torch.equal(twin(x), plain(x))


def test_the_stored_layout_wins_over_a_config_given_while_loading(build, call, tmp_path):
    from diffusers import AutoModel, UNet2DModel

    model = build("UNet2DModel")
    hb.quantize(model, "quartz-w4a4")
    out = hb.save(model, tmp_path / "out", max_shard_size="20KB")
    assert len(files_of(out)) > 1
    with torch.no_grad():
        expected = model(**call("UNet2DModel")).sample
        loaded = AutoModel.from_pretrained(str(out))
        assert torch.equal(loaded(**call("UNet2DModel")).sample, expected)
        assert torch.equal(copy.deepcopy(model)(**call("UNet2DModel")).sample, expected)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        other = UNet2DModel.from_pretrained(str(out), quantization_config=hb.HalfbyteConfig("int8-w8a8"))
    assert {name: layer.spec for name, layer in packed_layers(other).items()} == {
        name: layer.spec for name, layer in packed_layers(model).items()
    }


def test_a_smoothed_model_keeps_its_input_scales_in_float32(build, call, tmp_path):
    from diffusers import UNet2DModel

    model = build("UNet2DModel")
    hb.quantize(model, hb.PRESETS["quartz-w4a4"].smoothed(0.5), calibration=[call("UNet2DModel")])
    out = hb.save(model, tmp_path / "out")
    half = UNet2DModel.from_pretrained(str(out), torch_dtype=torch.bfloat16)
    loaded = hb.load(out)
    for name, layer in packed_layers(model).items():
        for found in (half.get_submodule(name), loaded.get_submodule(name)):
            assert found.input_scale.dtype == torch.float32
            assert torch.equal(found.input_scale, layer.input_scale)
    with torch.no_grad():
        assert torch.equal(loaded(**call("UNet2DModel")).sample, model(**call("UNet2DModel")).sample)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda entry: entry.pop("smoothed"), "the shards hold .*input_scale; the config asks for no such tensor"),
        (lambda entry: entry.update(smoothed="conv_in"), "smoothed must be a list"),
        (lambda entry: entry.update(smoothed=["nowhere"]), "smoothed must be a list"),
        (lambda entry: entry.update(files=["x"]), "files must be a mapping"),
        (lambda entry: entry.pop("recipe"), "Recipe needs a mapping"),
    ],
)
def test_a_config_that_would_give_wrong_numbers_is_refused(build, call, tmp_path, edit, words):
    from diffusers import UNet2DModel

    model = build("UNet2DModel")
    hb.quantize(model, hb.PRESETS["int4-w4a4"].smoothed(0.5), calibration=[call("UNet2DModel")])
    config = hb.save(model, tmp_path / "out") / "config.json"
    content = json.loads(config.read_text())
    edit(content["quantization_config"])
    config.write_text(json.dumps(content))
    for load in (hb.load, UNet2DModel.from_pretrained):
        with pytest.raises(CorruptError, match=words):
            load(tmp_path / "out")


def test_folders_that_name_no_class(tmp_path):
    for index, config in enumerate(({"_class_name": "utils"}, {"architectures": []}, {"architectures": ["Nothing"]}, {})):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match="pass into="):
            hb.load(folder)
        shutil.rmtree(folder)


def test_text_encoder_and_autoencoder_in_the_same_call(text_to_image, tmp_path):
    """The streamed pipeline's images are those of one quantized in memory."""
    from halfbyte.streaming.verb import prepare, quantize_folder

    text_to_image.save_pretrained(tmp_path / "float")
    job = prepare(tmp_path / "float", "quartz-w4a8", "quartz-w4a8", "int8-w8a8")
    assert sorted(job.plans) == ["text_encoder", "unet", "vae"]
    quantize_folder(tmp_path / "float", tmp_path / "out", "quartz-w4a8", encoders="quartz-w4a8", vae="int8-w8a8")
    for model, recipe in (
        (text_to_image.unet, "quartz-w4a8"),
        (text_to_image.text_encoder, "quartz-w4a8"),
        (text_to_image.vae, "int8-w8a8"),
    ):
        hb.quantize(model, recipe)
    loaded = hb.load(tmp_path / "out")
    assert all(is_packed(part) for part in (loaded.unet, loaded.text_encoder, loaded.vae))
    loaded.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "output_type": "np"}
    images = [pipe("a b", generator=torch.Generator().manual_seed(5), **options).images for pipe in (loaded, text_to_image)]
    assert (images[0] == images[1]).all()
    names = [sorted(path.name for path in (tmp_path / place / "tokenizer").iterdir()) for place in ("float", "out")]
    assert names[0] == names[1]
