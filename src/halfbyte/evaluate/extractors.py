"""The networks in whose features sets of images are compared: a parameter of every evaluation.

    load_extractor("inception:weights-inception-2015-12-05-6726825d.pth")    FID's own network; "inception" downloads it
    load_extractor("mine.onnx")                                              any ONNX file
    load_extractor("mine.pt", trust_code=True)                               any TorchScript file, which is a program

A file of one's own takes images float32 (N, C, H, W) in [0, 1] and gives features (N, d), and, where it is a classifier, logits
(N, classes) as its second output. Every extractor has a digest, the SHA-256 of its weights: figures in features of different
digests never compare.
"""

import pickle
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from halfbyte.checkpoint import sha256
from halfbyte.errors import HalfbyteError, MissingExtraError
from halfbyte.runs import digest

INCEPTION = "inception"
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SPATIAL_CHANNELS = 7  # of the mixed_6/conv activations, 17 x 17 each: the 2023 features of sFID
PICKLES = (".pth", ".ckpt", ".pkl", ".bin")


@dataclass
class Features:
    """What an extractor found in N images."""

    pooled: Tensor  # float32 (N, d)
    spatial: Tensor | None = None  # float32 (N, s): activations that keep the place, for sFID
    logits: Tensor | None = None  # float32 (N, classes), for the inception score
    maps: list[Tensor] = field(default_factory=list)  # float32 (N, C, H, W) each: activations for perceptual distances

    def tensors(self) -> dict[str, Tensor]:
        """All but the maps, by name."""
        found = {"pooled": self.pooled, "spatial": self.spatial, "logits": self.logits}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


class Extractor(Protocol):
    """A network with a name and a digest."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, in hex."""

    def extract(self, images: Tensor) -> Features:
        """Images float32 (N, C, H, W) in [0, 1] -> their features."""


def load_extractor(source: str, trust_code: bool = False) -> Extractor:
    """The extractor of a file, by its suffix, or "inception" or "inception:FILE".

    Args:
        trust_code: allow TorchScript files, which are programs and may do anything.
    Raises:
        HalfbyteError: for files that are missing, unknown, damaged or not to be trusted.
        MissingExtraError: without the package that runs it.
    """
    kind, _, rest = source.partition(":")
    if kind == INCEPTION:
        return Inception(_existing(rest) if rest else None)
    file = _existing(source)
    if file.suffix == ".onnx":
        return Onnx(file)
    if file.suffix in (".pt", ".torchscript", ".jit"):
        if not trust_code:
            raise HalfbyteError(
                f"{file} is TorchScript, a program that runs with your rights; if you trust its source, pass --trust-code, "
                "else export the network to ONNX"
            )
        return TorchScript(file)
    if file.suffix in PICKLES:
        raise HalfbyteError(f"{file} is a pickle, which may run any program when it is read; export the network to ONNX")
    raise HalfbyteError(
        f"{file} is no extractor halfbyte knows; give 'inception', 'inception:FILE', an .onnx file or a TorchScript file (.pt)"
    )


def _existing(name: str) -> Path:
    file = Path(name)
    if not file.is_file():
        raise HalfbyteError(
            f"{name} is not a file; give 'inception', 'inception:FILE', an .onnx file or a TorchScript file (.pt) as extractor"
        )
    return file


def as_features(outputs: Any, source: str, count: int) -> Features:
    """Features of a network's outputs: a tensor, or features and logits.

    Raises:
        HalfbyteError: when they are not (N, d).
    """
    found = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    tensors = [torch.as_tensor(value).detach().cpu().float() for value in found[:2]]
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if not tensors or any(len(shape) != 2 or shape[0] != count for shape in shapes):
        raise HalfbyteError(f"{source} gave {shapes} for {count} images; an extractor gives features ({count}, d), then logits")
    return Features(tensors[0], logits=tensors[1] if len(tensors) > 1 else None)


class TorchScript:
    """A network in TorchScript."""

    def __init__(self, file: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch calls TorchScript deprecated; files of it remain
            try:
                self.network: Any = torch.jit.load(str(file), map_location="cpu").eval()
            except (RuntimeError, ValueError) as error:
                raise HalfbyteError(f"{file} is not a TorchScript file: {str(error).splitlines()[0]}") from error
        self.name, self.digest = file.name, sha256(file)

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        return as_features(self.network(images.float()), self.name, len(images))


class Onnx:
    """A network in ONNX, run by ONNX Runtime on the CPU."""

    def __init__(self, file: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError(f"{file} needs ONNX Runtime: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            raise HalfbyteError(f"{file} cannot be run by ONNX Runtime: {str(error).splitlines()[0]}") from error
        self.input = self.session.get_inputs()[0].name
        self.name, self.digest = file.name, sha256(file)

    def extract(self, images: Tensor) -> Features:
        return as_features(self.session.run(None, {self.input: images.float().numpy()}), self.name, len(images))


class Inception:
    """FID's network: torch-fidelity's port of the TensorFlow Inception of 2015, with its resize.

    Besides the pooled features and logits it gives the spatial features of sFID.

    Args:
        file: its weights as .pth or .safetensors; None: downloaded once, checked against the hash in its name.
    """

    def __init__(self, file: Path | None) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise MissingExtraError("Inception features need torch-fidelity: pip install torch-fidelity") from error
        state = (
            torch.hub.load_state_dict_from_url(INCEPTION_URL, check_hash=True, weights_only=True)
            if file is None
            else read_weights(file)
        )
        with tempfile.TemporaryDirectory() as folder:  # torch-fidelity unpickles whatever file it is given: hand it tensors only
            clean = Path(folder) / "inception.pth"
            torch.save(dict(state), clean)
            wanted = ["2048", "logits_unbiased"]
            try:
                self.network: Any = FeatureExtractorInceptionV3("halfbyte", wanted, feature_extractor_weights_path=str(clean))
            except (RuntimeError, KeyError) as error:
                raise HalfbyteError(f"{file} does not hold the weights of FID's Inception: {str(error).splitlines()[0]}") from error
        self.spatial: Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._note)
        self.name, self.digest = "Inception-2015 (torch-fidelity)", digest(state)

    def _note(self, _: Any, __: Any, output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL_CHANNELS].flatten(1).cpu().float()

    @torch.no_grad()
    def extract(self, images: Tensor) -> Features:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        device = next(self.network.parameters()).device
        pooled, logits = self.network((images * 255).round().clamp(0, 255).to(torch.uint8).to(device))
        return Features(pooled.cpu().float(), self.spatial, logits.cpu().float())


def read_weights(file: Path) -> Mapping[str, Tensor]:
    """Tensors of a .pth file, without running anything in it.

    Raises:
        HalfbyteError: when it is none, or holds more than tensors.
    """
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise HalfbyteError(f"{file} is damaged, or holds more than tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise HalfbyteError(f"{file} is not a mapping of tensors; give the .pth file that torch-fidelity publishes")
    return found
