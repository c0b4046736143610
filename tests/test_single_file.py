"""Checkpoints in their authors' own layout: one .safetensors file, renamed by diffusers' converters; pickled ones refused."""

import pytest
import torch
from safetensors.torch import save_file

import halfbyte as hb
from halfbyte import cli
from halfbyte.api import load_float
from halfbyte.conversion import packed_layers
from halfbyte.errors import ModelError

# How the authors of LTX-Video name what diffusers names otherwise.
ORIGINAL = {"proj_in": "patchify_proj", "time_embed": "adaln_single", "norm_q": "q_norm", "norm_k": "k_norm"}


@pytest.fixture
def single(build, tmp_path):
    """(the float model, its single file, a diffusers folder of the same architecture)"""
    model = build("LTXVideoTransformer3DModel")
    tensors = {}
    for key, tensor in model.state_dict().items():
        for ours, theirs in ORIGINAL.items():
            key = key.replace(ours, theirs)
        tensors[f"model.diffusion_model.{key}"] = tensor.contiguous()
    save_file(tensors, tmp_path / "ltx.safetensors")
    model.save_config(tmp_path / "config")
    return model, tmp_path / "ltx.safetensors", tmp_path / "config"


def test_a_single_file_is_quantized_while_loading(single, call):
    from diffusers import LTXVideoTransformer3DModel

    model, file, config = single
    options = {"config": str(config), "quantization_config": hb.HalfbyteConfig("quartz-w4a8")}
    loaded = LTXVideoTransformer3DModel.from_single_file(str(file), **options)
    hb.quantize(model, "quartz-w4a8")
    assert packed_layers(loaded).keys() == packed_layers(model).keys()
    arguments = call("LTXVideoTransformer3DModel")
    with torch.no_grad():
        assert torch.equal(loaded(**arguments).sample, model(**arguments).sample)


def test_a_pipeline_is_made_of_the_file_and_a_folder_like_it(single, pipe, tmp_path, monkeypatch):
    """The pipeline's own converter is diffusers' business; which one is called, and with what, is ours."""
    from diffusers import DDIMPipeline

    _, file, _ = single
    pipe.save_pretrained(tmp_path / "like")
    seen = {}

    def from_single_file(path, **options):
        seen.update(options, path=path)
        return pipe

    monkeypatch.setattr(DDIMPipeline, "from_single_file", from_single_file, raising=False)
    assert load_float(file, tmp_path / "like") is pipe
    assert seen == {"path": str(file), "config": str(tmp_path / "like"), "dtype": torch.float32}
    monkeypatch.setattr(
        "sys.argv", ["halfbyte", "quantize", str(file), "--config", str(tmp_path / "like"), "-o", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None)
    assert packed_layers(hb.load(tmp_path / "out").unet)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pth", "model.pt", "pytorch_model.bin"])
def test_pickled_files_are_refused_with_how_to_convert_them(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ModelError, match=r"can run any program when it is opened.*save_file\(torch\.load\(.*weights_only=True"):
        load_float(tmp_path / name)


def test_files_that_are_not_there_and_configs_that_do_not_belong(tmp_path):
    with pytest.raises(ModelError, match=r"nothing\.safetensors is not a file"):
        load_float(tmp_path / "nothing.safetensors")
    with pytest.raises(ModelError, match=r"config belongs to a single \.safetensors file"):
        load_float(tmp_path, config=tmp_path)
