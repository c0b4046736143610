"""Attention with quantized products: the float one where nothing is rounded, an obvious oracle where something is."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halfbyte import api, heal, pack
from halfbyte.errors import HealError, ModelError, PackedError, RecipeError
from halfbyte.methods.attention import quantized_attention, round_rows
from halfbyte.presets import get_recipe
from halfbyte.recipe import ActivationSpec, AttentionSpec, LayerSpec, Recipe, WeightSpec
from halfbyte.runtime.intercept import attention_modules

PLAIN = Recipe("plain", LayerSpec(WeightSpec("int8"), ActivationSpec("int8")))
SIMULATED = AttentionSpec("uint8", "int4")
CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.3},
    "float mask": {"attn_mask": torch.randn(2, 1, 5, 7, generator=torch.Generator().manual_seed(2))},
}


def heads(keys: int = 7, shared: int = 1):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 16, generator=generator)
    key, value = (
        torch.randn(2, 4 // shared, keys, 16, generator=generator) * torch.rand(16, generator=generator) * 3 for _ in "kv"
    )
    return query, key, value


@pytest.mark.parametrize("case", CASES)
def test_unrounded_it_is_torch_s_attention(case, monkeypatch):
    monkeypatch.setattr("halfbyte.methods.attention.round_rows", lambda x, grid: x)
    options = CASES[case]
    if "attn_mask" in options:
        options["attn_mask"][..., 0] = True if options["attn_mask"].dtype == torch.bool else 0.0
    query, key, value = heads()
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(quantized_attention(query, key, value, **options, spec=SIMULATED), expected)


def test_shared_heads_are_repeated(monkeypatch):
    monkeypatch.setattr("halfbyte.methods.attention.round_rows", lambda x, grid: x)
    query, key, value = heads(shared=2)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(quantized_attention(query, key, value, enable_gqa=True, spec=SIMULATED), expected)


def test_it_equals_rounding_by_hand():
    query, key, value = heads()
    found = quantized_attention(query, key, value, spec=SIMULATED)
    q, k = (round_rows(one, "int4") for one in (query, key))
    v = round_rows(value.transpose(-1, -2), "int4").transpose(-1, -2)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
    codes = (weights / weights.amax(-1, keepdim=True) * 255).round()
    torch.testing.assert_close(found, codes * weights.amax(-1, keepdim=True) / 255 @ v)


def test_many_equal_probabilities_survive():
    weights = torch.full((1, 4096), 1 / 4096)
    torch.testing.assert_close(round_rows(weights, "uint8"), weights)


def test_gradients_pass_straight_through():
    query, key, value = (tensor.requires_grad_() for tensor in heads())
    quantized_attention(query, key, value, spec=SIMULATED).square().sum().backward()
    ours = query.grad.clone()
    query.grad = None
    F.scaled_dot_product_attention(query, key, value).square().sum().backward()
    assert torch.nn.functional.cosine_similarity(ours.flatten(), query.grad.flatten(), 0) > 0.95


KINDS = {
    "UNet2DModel": 4,
    "UNet2DConditionModel": 8,
    "DiTTransformer2DModel": 2,
    "SD3Transformer2DModel": 2,
    "FluxTransformer2DModel": 2,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_attention_of_a_model_is_quantized_and_listed(name, build, call):
    exact, eight, four = (copy.deepcopy(build(name)) for _ in range(3))
    result = api.quantize(exact, PLAIN, simulate=True)
    assert result.notes == []
    outputs = []
    for model, grids in ((eight, AttentionSpec("uint8", "int8")), (four, AttentionSpec("ue1m3", "int4"))):
        result = api.quantize(model, PLAIN.replace(attention=grids), simulate=True)
        outputs.append(model)
    with torch.no_grad():
        reference = exact(**call(name))[0]
        errors = [float((model(**call(name))[0] - reference).square().mean()) for model in outputs]
    assert 0 < errors[0] < errors[1]
    assert len(result.notes) == len(attention_modules(four)) == KINDS[name]
    assert result.table().endswith("attention products, simulated: Q, K, V int4; softmax ue1m3")


def test_packing_and_healing_refuse_simulated_products(pipe):
    teacher = copy.deepcopy(pipe)
    model = pipe.unet
    recipe = PLAIN.replace(attention=AttentionSpec())
    with pytest.raises(
        ModelError,
        match="cannot be packed: its attention with Q, K, V float; softmax uint8 exists in simulation only",
    ):
        api.quantize(model, recipe)
    api.quantize(model, recipe, simulate=True)
    with pytest.raises(PackedError, match="softmax uint8 runs; quantize it without"):
        pack(model)
    with pytest.raises(HealError, match="cannot be healed: its attention with Q, K, V float; softmax uint8 exists"):
        heal(pipe, teacher, steps=1)


class OwnProcessor:
    """One that multiplies by itself."""

    def __call__(self, attn, hidden_states, **_):
        return hidden_states


def test_processors_that_go_their_own_way_are_named_and_can_be_kept(build, call):
    model = build("UNet2DModel")
    name = next(iter(attention_modules(model)))
    model.get_submodule(name).set_processor(OwnProcessor())
    kept = copy.deepcopy(model)
    api.quantize(model, PLAIN.replace(attention=AttentionSpec()), simulate=True)
    with pytest.raises(ModelError, match=f"'{name}' cannot be quantized: its OwnProcessor does not call"):
        model(**call("UNet2DModel"))
    model.get_submodule(name).processor = build("UNet2DModel").get_submodule(name).processor
    model(**call("UNet2DModel"))  # nothing was left behind by the failure
    result = api.quantize(kept, PLAIN.replace(attention=AttentionSpec(), keep=(f"^{name}$",)), simulate=True)
    kept(**call("UNet2DModel"))
    assert len(result.notes) == KINDS["UNet2DModel"] - 1


def test_bad_specs_and_models_are_refused():
    for wrong, sentence in (
        ({"softmax": "int8"}, "take an unsigned grid, not 'int8'"),
        ({"operands": "uint8"}, "need a signed grid, got 'uint8'"),
        ({"softmax": None}, "nothing to quantize"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            AttentionSpec(**wrong)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ModelError, match="has no attention of diffusers"):
        api.quantize(model, PLAIN.replace(attention=AttentionSpec()), simulate=True)
    recipe = PLAIN.replace(attention=SIMULATED)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert get_recipe("int8-w8a8").attention is None
