"""Checkpoints of random weights that the libraries load, and the peak of a process."""

import subprocess
import sys

import pytest
import torch

from halfbyte.bench.checkpoints import peak_bytes, write_float


def of_diffusers():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
    )


def of_transformers():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4))


@pytest.mark.parametrize("build", [of_diffusers, of_transformers])
def test_its_library_loads_it(build, tmp_path):
    with torch.device("meta"):
        model = build()
    size = write_float(tmp_path / "model", model)
    assert size == sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    tensors = loaded.state_dict()
    assert {key: one.shape for key, one in tensors.items()} == {key: one.shape for key, one in model.state_dict().items()}
    assert {one.dtype for one in tensors.values()} == {torch.bfloat16}
    matrix = max((one.float() for one in tensors.values() if one.ndim == 2), key=torch.numel)
    assert 0.5 < matrix.square().mean() * matrix.shape[1] < 2  # the usual size for its fan-in
    assert (matrix / matrix.std()).pow(4).mean() > 10  # heavy tails; 3 is a Gaussian's
    assert all(one.eq(1).all() for key, one in tensors.items() if "norm" in key and one.ndim == 1 and key.endswith("weight"))


def test_the_peak_is_of_this_program_and_not_of_its_parent():
    held = torch.ones(50 << 20)  # 200 MB
    assert peak_bytes() > held.nbytes
    if sys.platform == "linux":
        code = "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])"
        child = int(subprocess.run([sys.executable, "-S", "-c", code], check=True, capture_output=True, text=True).stdout) << 10
        assert child < held.nbytes
