"""Float checkpoints on disk, read a piece at a time.

Plain reads, not a memory map: pages of a map count as this process's memory until the machine runs out of it.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.checkpoint import PICKLED, pickle_sentence, read_header, shards_of, unreadable
from halfbyte.errors import CorruptError, ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
STEMS = ("diffusion_pytorch_model", "model")
PART = re.compile(r"-\d{5}-of-\d{5}$")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte, from the start of the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, first: int, last: int) -> Tensor:
        """Bytes first to last (not included), uint8.

        Raises:
            CorruptError: when the file has become shorter.
        """
        made = torch.empty(last - first, dtype=torch.uint8)
        buffer, done = bytes_of(made), 0
        with open(self.file, "rb", buffering=0) as handle:
            handle.seek(self.offset + first)
            while done < len(buffer):
                count = handle.readinto(buffer[done:])
                if not count:
                    raise CorruptError(f"{self.file} was cut off while it was read")
                done += count
        return made

    def rows(self, first: int, last: int) -> Tensor:
        """Entries first to last along the first axis."""
        row = self.nbytes // self.shape[0]
        return self.read(first * row, last * row).view(self.dtype).view(last - first, *self.shape[1:])


def open_component(folder: Path) -> dict[str, Stored]:
    """Every tensor of a component's safetensors files by name; nothing but the headers is read.

    Raises:
        ModelError: when there are none, or only pickled ones. CorruptError: when a file is damaged or holds an unknown dtype.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(folder):
        read_header([file])  # safetensors checks names, shapes, offsets and sizes against each other
        with unreadable(file), open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise CorruptError(f"{file}: {name} has the dtype {entry['dtype']}, which halfbyte does not know")
            found[name] = Stored(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component: those its index names, else its single one.

    Where there are variants, the plain one counts. Raises ModelError and CorruptError as `open_component` says.
    """
    indexes = sorted(folder.glob("*.safetensors.index*.json"), key=lambda file: (not file.name.endswith(".index.json"), file.name))
    if indexes:
        return shards_of(indexes[0])
    singles = [file.name for file in folder.glob("*.safetensors") if not PART.search(file.stem)]
    if singles:
        return [folder / min(singles, key=lambda name: (name.removesuffix(".safetensors") not in STEMS, name))]
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)
    raise ModelError(pickle_sentence(folder / pickled[0]) if pickled else f"{folder} holds no .safetensors file")
