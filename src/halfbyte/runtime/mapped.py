"""Pages of mapped checkpoints, given back to the system once nothing will read them soon.

Tensors of safetensors files lie in one mapping a file, which lives as long as any of them. Its pages stay in memory after they were
read: beside the tiles made from them, a model would take its size twice.
"""

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")
PAGE_OUT = 21  # MADV_PAGEOUT of linux/mman.h, since Linux 5.4: a hint that loses nothing; pages are read from the file again


def give_back(tensor: Tensor) -> None:
    """Free the memory behind a tensor that lies in a mapped file; it can still be read. Any other tensor is left alone."""
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu" or not _in_file(tensor.data_ptr()):
        return
    page = mmap.PAGESIZE
    start, end = -(-tensor.data_ptr() // page) * page, (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), PAGE_OUT)


def _in_file(address: int) -> bool:
    """Whether an address lies in the mapping of a file."""
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:
        return False
    for line in lines:  # such as: 7f12a000-7f13b000 r--s 00000000 fe:00 1234  /models/unet.safetensors
        span, _, _, _, inode = line.split(maxsplit=5)[:5]
        low, high = (int(one, 16) for one in span.split("-"))
        if low <= address < high:
            return inode != "0"
    return False
