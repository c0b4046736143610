"""diffusers' own tests for quantization backends, run against halfbyte on tiny models; needs a checkout of diffusers.

    git clone https://github.com/huggingface/diffusers
    DIFFUSERS_SOURCE=diffusers pytest tests/test_diffusers_suite.py

Their mixins ask for models of the Hub and an accelerator; here their checks are called with tiny models from disk, on the CPU.
docs/diffusers-suite.md lists what passes and what is left out, and why; the list is compared with the mixins below.
"""

import importlib
import os
import re
import sys
import warnings
from pathlib import Path

import pytest

import halfbyte as hb
from halfbyte.presets import get_recipe
from halfbyte.runtime.layers import Packed

SOURCE = os.environ.get("DIFFUSERS_SOURCE")
PAGE = Path(__file__).parents[1] / "docs" / "diffusers-suite.md"
pytestmark = pytest.mark.skipif(not SOURCE, reason="needs a checkout of diffusers; name it in DIFFUSERS_SOURCE")

MODELS = ("UNet2DConditionModel", "FluxTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel")
CHECKS = {  # their checks -> what they are given beyond the config
    "_test_quantization_memory_footprint": {"expected_memory_reduction": 1.15},  # tiny layers; theirs is 1.2
    "_test_quantization_inference": {},
    "_test_quantization_dtype_assignment": {},
    "_test_quantization_lora_inference": {},
    "_test_quantization_serialization": {"tmp_path": True},
    "_test_quantization_config_serialization": {},
    "_test_keep_modules_in_fp32": {},
    "_test_quantization_modules_to_not_convert": {"modules_to_not_convert": ["to_q", "to_k"], "exclusion_key": "keep"},
    "_test_quantization_cpu_device_map": {},
    "_test_quantization_device_map": {},
    "_test_dequantize": {},
}
COMPILE_CHECKS = ("_test_torch_compile", "_test_torch_compile_with_group_offload")


@pytest.fixture(scope="module")
def mixins(pytestconfig):
    """Their module of mixins, imported from the checkout, whose package has the name of this folder."""
    ours = {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] == "tests"}
    for file in Path(str(SOURCE)).glob("tests/**/*.py"):  # our pytest refuses marks that nobody registered
        for mark in set(re.findall(r"pytest\.mark\.(\w+)", file.read_text("utf-8"))):
            pytestconfig.addinivalue_line("markers", f"{mark}: of diffusers")
    sys.path.insert(0, str(SOURCE))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield importlib.import_module("tests.models.testing_utils.quantization")
    finally:
        sys.path.remove(str(SOURCE))
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            del sys.modules[name]
        sys.modules.update(ours)


@pytest.fixture
def suite(mixins, build, call, tmp_path, request):
    """An instance of one of their mixins for a tiny model; not a test class, as theirs would skip themselves on a CPU."""
    mixin, name = request.param
    folder, made = tmp_path / "float", build(name)
    made.save_pretrained(folder)

    class Suite(getattr(mixins, mixin)):
        model_class, pretrained_model_name_or_path = type(made), str(folder)

        def get_dummy_inputs(self):
            return call(name)

        def _create_quantized_model(self, config_kwargs, **options):
            recipe = get_recipe("quartz-w4a4").replace(edge=None, **{key: tuple(value) for key, value in config_kwargs.items()})
            return type(made).from_pretrained(folder, quantization_config=hb.HalfbyteConfig(recipe), **options)

        def _verify_if_layer_quantized(self, name, module, config_kwargs):
            assert isinstance(module, Packed), name

    Suite.__test__ = False
    tested = Suite()
    tested.setup_method()
    yield tested
    tested.teardown_method()


@pytest.mark.parametrize("suite", [("QuantizationTesterMixin", name) for name in MODELS], indirect=True, ids=MODELS)
@pytest.mark.parametrize("check", CHECKS)
def test_their_check_passes(suite, check, tmp_path):
    options = dict(CHECKS[check])
    if options.pop("tmp_path", False):
        options["tmp_path"] = tmp_path / "saved"
    getattr(suite, check)({}, **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler
@pytest.mark.parametrize(
    "suite", [("QuantizationCompileTesterMixin", name) for name in MODELS[1:2]], indirect=True, ids=MODELS[1:2]
)
@pytest.mark.parametrize("check", COMPILE_CHECKS)
def test_their_check_of_compiled_models_passes(suite, check):
    getattr(suite, check)({})


def test_the_page_lists_every_check_they_have(mixins):
    theirs = {
        name
        for mixin in (mixins.QuantizationTesterMixin, mixins.QuantizationCompileTesterMixin)
        for name in vars(mixin)
        if name.startswith("_test_")
    }
    listed = dict(re.findall(r"^\| `(_test_\w+)` \| (passes|left out)", PAGE.read_text("utf-8"), re.M))
    assert set(listed) == theirs
    assert {name for name, state in listed.items() if state == "passes"} == {*CHECKS, *COMPILE_CHECKS}
