"""LoRA adapters on packed layers: loaded by diffusers and PEFT as on a float model, and doing what they do there."""

import pytest
import torch

import halfbyte as hb
from halfbyte.conversion import packed_layers
from halfbyte.errors import ModelError, PackedError

peft = pytest.importorskip("peft")

RECIPE = "quartz-w4a8"
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT's own, at every second adapter
TARGETS = {  # model -> layers that get an adapter
    "UNet2DConditionModel": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"],
    "SD3Transformer2DModel": ["to_q", "to_v", "add_k_proj", "norm1.linear", "net.2"],
    "FluxTransformer2DModel": ["x_embedder", "to_q", "to_v", "add_k_proj", "proj_mlp", "norm.linear"],
    "SanaTransformer2DModel": ["to_q", "to_v", "conv_inverted", "conv_point"],
}


def adapter(model, targets, seed, size=1.0):
    """The tensors of a random LoRA for a model, named as diffusers saves them."""
    torch.manual_seed(seed)
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False), adapter_name=f"a{seed}")
    found = {key: tensor.clone() for key, tensor in peft.get_peft_model_state_dict(model, adapter_name=f"a{seed}").items()}
    model.delete_adapters(f"a{seed}")
    return {key: tensor * size if "lora_B" in key else tensor for key, tensor in found.items()}


def run(model, arguments):
    with torch.no_grad():
        return model(**arguments, return_dict=False)[0].float()


def norm(x):
    return x.norm().item()


@pytest.fixture(params=TARGETS)
def pair(request, build):
    """(float model, packed model, names of the layers to adapt, class name)"""
    packed = build(request.param)
    hb.quantize(packed, RECIPE)
    return build(request.param), packed, TARGETS[request.param], request.param


def test_the_effect_is_that_on_the_float_model_within_the_quantization_error(pair, call):
    exact, packed, targets, name = pair
    arguments = call(name)
    rounding = norm(run(packed, arguments) - run(exact, arguments))
    lora = adapter(exact, targets, 1)
    plain, plain_packed = run(exact, arguments), run(packed, arguments)
    for model in (exact, packed):
        model.load_lora_adapter(dict(lora), prefix=None, adapter_name="one")
    assert any(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in packed.modules())
    adapted, adapted_packed = run(exact, arguments), run(packed, arguments)
    effect, effect_packed = adapted - plain, adapted_packed - plain_packed
    assert norm(effect) > 3 * rounding, "the test says nothing where the adapter does less than rounding"
    scale = norm(adapted) / norm(plain)  # the adapted model's numbers are larger, and so is what rounding costs
    assert norm(adapted_packed - adapted) < 2 * max(1.0, scale) * rounding
    assert norm(effect_packed - effect) < 0.35 * norm(effect)
    packed.delete_adapters("one")
    assert torch.equal(run(packed, arguments), plain_packed)


def test_each_packed_layer_adds_just_the_low_rank_product(pair):
    _, packed, targets, _ = pair
    packed.load_lora_adapter(adapter(packed, targets, 2), prefix=None, adapter_name="one")
    adapted = [layer for layer in packed.modules() if isinstance(layer, peft.tuners.lora.Linear)]
    assert adapted
    for layer in adapted:
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            product = x @ layer.lora_A["one"].weight.T @ layer.lora_B["one"].weight.T * layer.scaling["one"]
            assert torch.allclose(layer(x) - layer.base_layer(x), product, atol=1e-5, rtol=1e-4)


def test_several_adapters_strengths_and_unloading(pair, call):
    exact, packed, targets, name = pair
    arguments, layers = call(name), set(packed_layers(packed))
    loras = {key: adapter(exact, targets, seed, 0.5) for key, seed in (("one", 3), ("two", 4))}
    plain = run(packed, arguments)
    for key, lora in loras.items():
        packed.load_lora_adapter(lora, prefix=None, adapter_name=key)
    seen = {}
    for weights in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5]):
        packed.set_adapters(["one", "two"], weights)
        seen[tuple(weights)] = run(packed, arguments)
    packed.set_adapters(["one"], [1.0])
    assert torch.allclose(run(packed, arguments), seen[1.0, 0.0], atol=1e-5)
    results = [*seen.values(), plain]
    assert all(norm(a - b) > 1e-4 for index, a in enumerate(results) for b in results[:index])
    packed.disable_adapters()
    assert torch.equal(run(packed, arguments), plain)
    packed.enable_adapters()
    packed.unload_lora()
    assert torch.equal(run(packed, arguments), plain)
    assert set(packed_layers(packed)) == layers


def test_fusing_and_saving_with_adapters_are_refused_in_a_sentence(pair, call, tmp_path):
    _, packed, targets, name = pair
    packed.load_lora_adapter(adapter(packed, targets, 5), prefix=None, adapter_name="one")
    before = run(packed, call(name))
    with pytest.raises(PackedError, match="no float weight to read or write; merge the adapter into the float model"):
        packed.fuse_lora()
    assert torch.equal(run(packed, call(name)), before)
    with pytest.raises(ModelError, match=r"holds adapters.*unload_lora_weights"):
        hb.save(packed, tmp_path / "out")
    packed.unload_lora()
    assert hb.save(packed, tmp_path / "out").is_dir()


def test_a_pipeline_loads_scales_and_unloads(build):
    """`load_lora_weights` of the pipelines looks at shapes of the layers first, FLUX's more than others."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusionPipeline

    nothing = {"vae": None, "text_encoder": None, "tokenizer": None}
    flux = {**nothing, "scheduler": FlowMatchEulerDiscreteScheduler(), "text_encoder_2": None, "tokenizer_2": None}
    sd = {
        **nothing,
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "safety_checker": None,
        "feature_extractor": None,
    }
    for kind, part, name, others in (
        (FluxPipeline, "transformer", "FluxTransformer2DModel", flux),
        (StableDiffusionPipeline, "unet", "UNet2DConditionModel", {**sd, "requires_safety_checker": False}),
    ):
        model = build(name)
        lora = {f"{part}.{key}": tensor for key, tensor in adapter(model, TARGETS[name], 6).items()}
        pipe = kind(**{part: model}, **others)
        hb.quantize(pipe, RECIPE)
        pipe.load_lora_weights(lora, adapter_name="style")
        assert pipe.get_active_adapters() == ["style"]
        pipe.set_adapters(["style"], [0.3])
        scalings = {layer.scaling["style"] for layer in model.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)}
        assert [*scalings] == [pytest.approx(0.3)]
        with pytest.raises(PackedError, match="merge the adapter into the float model"):
            pipe.fuse_lora()
        pipe.unload_lora_weights()
        assert not any(isinstance(layer, peft.tuners.lora.LoraLayer) for layer in model.modules())
        assert packed_layers(model)
