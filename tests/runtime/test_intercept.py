"""Attention of diffusers models in integers: every module, simulated as packed, saved, loaded, compiled, given back."""

import copy
import json
import threading

import pytest
import torch
import torch.nn.functional as F

import halfbyte as hb
from halfbyte import api
from halfbyte.errors import CorruptError, ModelError
from halfbyte.presets import get_recipe
from halfbyte.runtime.intercept import attention_modules, in_integers, integer_attention, release_attention, replace_attention
from halfbyte.streaming.verb import quantize_folder

RECIPE = get_recipe("quartz-w4a8").with_attention()
CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.3},
    "float mask": {"attn_mask": torch.randn(2, 1, 5, 7, generator=torch.Generator().manual_seed(2))},
}
MODELS = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel")


def heads(shared=1):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 16, generator=generator)
    key, value = (torch.randn(2, 4 // shared, 7, 16, generator=generator) for _ in "kv")
    return query, key, value


@torch.no_grad()
def run(model, arguments):
    return model(**arguments, return_dict=False)[0]


@pytest.mark.parametrize("case", CASES)
def test_arguments_are_those_of_torch(case):
    query, key, value = heads()
    exact = F.scaled_dot_product_attention(query, key, value, **CASES[case])
    torch.testing.assert_close(integer_attention(query, key, value, **CASES[case]), exact, atol=0.06, rtol=0)


def test_shared_heads_are_repeated():
    query, key, value = heads(shared=2)
    exact = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(integer_attention(query, key, value, enable_gqa=True), exact, atol=0.06, rtol=0)


def test_gradients_are_those_of_float():
    given = [one.requires_grad_() for one in heads()]
    integer_attention(*given).sum().backward()
    ours = [one.grad.clone() for one in given]
    for one in given:
        one.grad = None
    F.scaled_dot_product_attention(*given).sum().backward()
    for found, one in zip(ours, given, strict=True):
        torch.testing.assert_close(found, one.grad)


def test_dropout_is_refused():
    with pytest.raises(ModelError, match=r"has no dropout, got 0\.1; call eval"):
        integer_attention(*heads(), dropout_p=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_packed_as_simulated_and_as_the_reference(name, build, call, monkeypatch):
    model = build(name)
    plain, simulated = copy.deepcopy(model), copy.deepcopy(model)
    api.quantize(plain, "quartz-w4a8")
    result = api.quantize(simulated, RECIPE, simulate=True)
    found = api.quantize(model, RECIPE)
    assert len(found.notes) == len(result.notes) == len(attention_modules(model)) > 0
    assert found.notes[0].endswith("attention products, in integers")
    expected = run(model, call(name))
    for other in (plain, simulated):
        off = (run(other, call(name)) - expected).abs().max()
        assert off < 0.1 * expected.abs().max()
    assert not torch.equal(run(plain, call(name)), expected)
    monkeypatch.setattr("halfbyte.runtime.attention._engine_takes", lambda *_: False)
    assert torch.equal(run(model, call(name)), expected)


def test_saved_loaded_and_given_back(build, call, tmp_path):
    model = build("UNet2DModel")
    model.save_pretrained(tmp_path / "float")
    api.quantize(model, RECIPE)
    names = in_integers(model)
    assert names
    expected = run(model, call("UNet2DModel"))
    hb.save(model, tmp_path / "saved")
    quantize_folder(tmp_path / "float", tmp_path / "streamed", RECIPE)
    for folder in ("saved", "streamed"):
        loaded = hb.load(tmp_path / folder)
        assert in_integers(loaded) == names
        assert torch.equal(run(loaded, call("UNet2DModel")), expected)
    again = copy.deepcopy(loaded)
    assert torch.equal(run(again, call("UNet2DModel")), expected)
    loaded.dequantize()
    assert not in_integers(loaded)
    release_attention(again)
    assert not torch.equal(run(again, call("UNet2DModel")), expected)


@pytest.mark.parametrize("wrong", [["conv_in"], ["no.such"], [3], "mid_block", {"a": 1}])
def test_damaged_names(wrong, build, tmp_path):
    model = build("UNet2DModel")
    api.quantize(model, RECIPE)
    hb.save(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    config["quantization_config"]["attention"] = wrong
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptError, match="attention"):
        hb.load(tmp_path / "saved")


def test_names_that_are_none():
    with pytest.raises(ModelError, match="has no attention of diffusers"):
        replace_attention(torch.nn.Linear(2, 2), [])


def test_callers_in_several_threads(build, call):
    model = build("UNet2DModel")
    api.quantize(model, RECIPE)
    expected, found = run(model, call("UNet2DModel")), []
    threads = [threading.Thread(target=lambda: found.append(run(model, call("UNet2DModel")))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("name", ["UNet2DModel", "DiTTransformer2DModel"])
def test_whole_models_compile(name, build, call):
    model = build(name)
    api.quantize(model, RECIPE)
    expected = run(model, call(name))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, call(name)), expected)
