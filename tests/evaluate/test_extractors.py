"""Extractors: files of one's own give what the network gives; what runs code is refused unless it is trusted."""

import sys
import types
import warnings

import pytest
import torch
from torch import nn

from halfbyte.checkpoint import sha256
from halfbyte.errors import HalfbyteError, MissingExtraError
from halfbyte.evaluate.extractors import as_features, load_extractor


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, images):
        pooled = torch.relu(self.convolution(images)).mean((2, 3))
        return pooled, self.head(pooled)


IMAGES = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def torchscript(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Network().eval(), IMAGES).save(tmp_path / "network.pt")
    return tmp_path / "network.pt"


def test_torchscript_runs_when_it_is_trusted(torchscript):
    with pytest.raises(HalfbyteError, match=r"TorchScript, a program that runs with your rights.*--trust-code"):
        load_extractor(str(torchscript))
    found = load_extractor(str(torchscript), trust_code=True)
    expected = Network()(IMAGES)
    seen = found.extract(IMAGES)
    torch.testing.assert_close((seen.pooled, seen.logits), expected)
    assert (found.name, found.digest) == ("network.pt", sha256(torchscript))
    assert set(seen.tensors()) == {"pooled", "logits"}


def write_onnx(network, file):
    """The network as ONNX, node by node: torch's own exporter needs more packages."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from onnx import TensorProto, helper, numpy_helper

    names = {"w": network.convolution.weight, "b": network.convolution.bias, "hw": network.head.weight, "hb": network.head.bias}
    weights = [numpy_helper.from_array(value.detach().numpy(), name) for name, value in names.items()]
    nodes = [
        helper.make_node("Conv", ["images", "w", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["pooled"]),
        helper.make_node("Gemm", ["pooled", "hw", "hb"], ["logits"], transB=1),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, "h", "w"])]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", None]) for name in ("pooled", "logits")]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)


def test_onnx_gives_what_the_network_gives(tmp_path):
    write_onnx(Network(), tmp_path / "network.onnx")
    found = load_extractor(str(tmp_path / "network.onnx"))
    seen = found.extract(IMAGES)
    torch.testing.assert_close((seen.pooled, seen.logits), Network()(IMAGES), rtol=1e-4, atol=1e-5)
    assert found.digest == sha256(tmp_path / "network.onnx")


def test_files_that_are_none_are_named(tmp_path):
    for name in ("a.pt", "a.onnx", "a.pth", "a.pkl", "a.txt"):
        (tmp_path / name).write_text("nothing")
    cases = {
        "missing.onnx": "missing.onnx is not a file; give 'inception'",
        "a.txt": "is no extractor halfbyte knows",
        "a.pth": "is a pickle, which may run any program when it is read",
        "a.pkl": "is a pickle",
        "a.pt": "is not a TorchScript file",
    }
    for name, words in cases.items():
        with pytest.raises(HalfbyteError, match=words):
            load_extractor(str(tmp_path / name), trust_code=True)
    if "onnxruntime" in sys.modules:
        with pytest.raises(HalfbyteError, match=r"a\.onnx cannot be run by ONNX Runtime"):
            load_extractor(str(tmp_path / "a.onnx"))


@pytest.mark.parametrize(
    ("source", "package"), [("a.onnx", "onnxruntime"), ("inception", "torch_fidelity.feature_extractor_inceptionv3")]
)
def test_without_the_package_the_pip_line_is_given(monkeypatch, tmp_path, source, package):
    (tmp_path / "a.onnx").touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match="pip install"):
        load_extractor(str(tmp_path / source) if source == "a.onnx" else source)


def test_outputs_that_are_no_features_are_refused():
    with pytest.raises(HalfbyteError, match=r"net gave \[\(2, 3, 4, 4\)\] for 2 images"):
        as_features(torch.zeros(2, 3, 4, 4), "net", 2)
    with pytest.raises(HalfbyteError, match=r"net gave \[\(3, 4\)\] for 2 images"):
        as_features(torch.zeros(3, 4), "net", 2)
    assert as_features(torch.zeros(2, 4), "net", 2).logits is None


class Port(nn.Module):
    """Stands in for torch-fidelity's network: loads a file as it does, and has its layers' names."""

    def __init__(self, name, wanted, feature_extractor_weights_path):
        super().__init__()
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 9, 1)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))
        assert wanted == ["2048", "logits_unbiased"]

    def forward(self, images):
        assert images.dtype == torch.uint8
        x = self.Mixed_6d.branch1x1(images.float())
        return x.mean((2, 3)), x.amax((2, 3))


@pytest.fixture
def port(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Port
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


class Evil:
    def __reduce__(self):
        return (print, ("it runs",))


def test_inception_reads_tensors_alone_and_keeps_places(port, tmp_path, capsys):
    torch.save({"Mixed_6d.branch1x1.weight": torch.ones(9, 3, 1, 1), "Mixed_6d.branch1x1.bias": torch.zeros(9)}, tmp_path / "w.pth")
    found = load_extractor(f"inception:{tmp_path / 'w.pth'}")
    assert found.name.startswith("Inception")
    seen = found.extract(torch.full((2, 1, 4, 4), 1 / 255))  # grey is made three channels, [0, 1] becomes 0 to 255
    assert (seen.pooled == 3).all()
    assert seen.spatial.shape == (2, 7 * 16)
    assert seen.logits.shape == (2, 9)
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pth")
    torch.save({"evil": Evil()}, tmp_path / "evil.pth")
    for name, words in (
        ("other", "does not hold the weights of FID's Inception"),
        ("evil", "is damaged, or holds more than tensors"),
    ):
        with pytest.raises(HalfbyteError, match=words):
            load_extractor(f"inception:{tmp_path / name}.pth")
    assert "it runs" not in capsys.readouterr().out
