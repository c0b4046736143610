"""Output shards whose bytes are known before a tensor is: laid out as `safetensors.save_file` would, filled in any order."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from halfbyte.checkpoint import dtype_order
from halfbyte.streaming.source import DTYPES, NAMES


class Shards:
    """The safetensors files of one component.

    Args:
        folder: where they are written. tensors: by name, on the meta device; their order decides which shard they go to.
        pattern: file name with `{suffix}`, as huggingface_hub wants it. max_shard: such as "5GB".
    """

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor], pattern: str, max_shard: str) -> None:
        self.folder, self.pattern = folder, pattern
        self.split: Any = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=max_shard)
        self.headers: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}  # of whole files
        self.places: dict[str, tuple[str, int]] = {}  # tensor -> file name, offset of its first byte
        for file, names in self.split.filename_to_tensors.items():
            self._lay_out(file, {name: tensors[name] for name in names})

    def _lay_out(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        order, at = _order(), 0
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0].encode())):
            size = tensor.numel() * tensor.dtype.itemsize
            entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
            self.places[name] = file, at
            at += size
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)
        self.headers[file] = len(header).to_bytes(8, "little") + header
        self.sizes[file] = len(self.headers[file]) + at
        self.places.update({name: (file, len(self.headers[file]) + self.places[name][1]) for name in tensors})

    def create(self) -> None:
        """Files of their final sizes, empty but for their headers; those that are there already keep their content."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, header in self.headers.items():
            path = self.folder / file
            with open(path, "r+b" if path.exists() else "w+b") as handle:
                handle.write(header)
                handle.truncate(self.sizes[file])

    def write(self, name: str, offset: int, content: memoryview) -> None:
        """Bytes of a tensor, from an offset within it."""
        file, start = self.places[name]
        with open(self.folder / file, "r+b", buffering=0) as handle:
            handle.seek(start + offset)
            done = 0
            while done < len(content):
                done += handle.write(content[done:])

    def read(self, name: str, offset: int, count: int) -> bytes:
        """What `write` wrote."""
        file, start = self.places[name]
        with open(self.folder / file, "rb") as handle:
            handle.seek(start + offset)
            return handle.read(count)

    def write_index(self, metadata: Mapping[str, Any]) -> None:
        """The index, where there are several files; `metadata` goes beside its `total_size`."""
        if not self.split.is_sharded:
            return
        index = {"metadata": {**metadata, **self.split.metadata}, "weight_map": self.split.tensor_to_filename}
        name = self.pattern.format(suffix="") + ".index.json"
        (self.folder / name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@cache
def _order() -> list[torch.dtype]:
    """The order in which safetensors puts dtypes into a file, learned from a file."""
    return [DTYPES[name] for name in dtype_order(tuple(DTYPES.values()))]
