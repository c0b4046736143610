"""Whole denoisers: the same predictions with both backends, in one compiled graph, channels-last throughout."""

import copy

import pytest
import torch

import halfbyte as hb
from halfbyte.conversion import packed_layers
from halfbyte.runtime import backends, cpu, engine
from halfbyte.runtime.layers import PackedConv2d

pytestmark = [
    pytest.mark.skipif(engine.MISSING is not None, reason=f"the C++ engine cannot run: {engine.MISSING}"),
    pytest.mark.usefixtures("cpu_backend"),
]
NAMES = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SanaTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
)
every_model = pytest.mark.parametrize("name", NAMES)


def predict(model, arguments):
    with torch.inference_mode():
        return model(**arguments)[0]


@every_model
@pytest.mark.parametrize("recipe", ["quartz-w4a4", "quartz-unsigned-w4a4", "int8-w8a8"])
def test_both_backends_predict_the_same(name, recipe, build, call, monkeypatch):
    model = build(name)
    hb.quantize(model, recipe)
    assert all(isinstance(layer.plan, cpu.Plan) for layer in packed_layers(model).values())
    found = predict(model, call(name))
    monkeypatch.setenv(backends.VARIABLE, "reference")
    backends.backend.cache_clear()
    assert torch.equal(predict(model, call(name)), found)


@pytest.mark.parametrize(
    "name", ["DiTTransformer2DModel", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES if "DiT" not in name)]
)
def test_a_quantized_model_compiles_into_one_graph(name, build, call):
    model = build(name)
    hb.quantize(model, "quartz-w4a8")
    expected = predict(model, call(name))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(predict(compiled, call(name)), expected)


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel"])
def test_no_convolution_returns_to_contiguous_images(name, build, call, tmp_path):
    """Quantized or loaded, a UNet keeps its images channels-last from the first convolution to the last."""
    model = build(name)
    hb.quantize(model, "quartz-w4a8")
    hb.save(model, tmp_path / "saved")
    for made in (model, hb.load(tmp_path / "saved")):
        seen = []

        def look(layer, args, output, seen=seen):
            seen.append(
                (args[0].is_contiguous(memory_format=torch.channels_last), output.is_contiguous(memory_format=torch.channels_last))
            )

        layers = [layer for layer in made.modules() if isinstance(layer, PackedConv2d)]
        handles = [layer.register_forward_hook(look) for layer in layers]
        predict(made, call(name))
        for handle in handles:
            handle.remove()
        assert len(seen) == len(layers) > 5
        assert all(output for _, output in seen)
        copied = sum(not given for given, _ in seen)  # the latents, and what comes back from a transformer's tokens
        assert copied <= 1 + sum("proj_out" in layer for layer in packed_layers(made))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler of its own older parts
def test_a_quantized_model_compiles_to_native_code(build, call):
    model = build("UNet2DConditionModel")
    hb.quantize(model, "quartz-w4a8")
    expected = predict(model, call("UNet2DConditionModel"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    assert torch.allclose(predict(compiled, call("UNet2DConditionModel")), expected, atol=1e-3)


def test_the_demo_draws_the_same_images_with_both_backends(monkeypatch):
    from halfbyte.demo import load_pipeline
    from halfbyte.evaluate import sample_images

    pipe = load_pipeline()
    hb.quantize(pipe, "quartz-w4a4")
    twin = copy.copy(pipe)
    twin.register_modules(unet=copy.deepcopy(pipe.unet))
    found = sample_images(pipe, 2, 2)
    monkeypatch.setenv(backends.VARIABLE, "reference")
    backends.backend.cache_clear()
    assert torch.equal(sample_images(twin, 2, 2), found)
