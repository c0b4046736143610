"""Data flows one way: a room of src/halfbyte imports only from rooms to its left, and each third party has one door.

Imports are read from the syntax tree, so those inside functions, under TYPE_CHECKING and by importlib.import_module("...") count
too. A room is a module or a folder directly in src/halfbyte; inside one, imports are free.
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "halfbyte"

# Left to right. A new room goes right of all it imports.
# fmt: off
ROOMS = (
    "errors", "fields", "formats", "packing", "subgroups", "recipe", "presets", "targets", "quantizers", "timestep",
    "layers", "splitting", "metrics", "tracing", "calibration", "methods", "checkpoint", "runs", "runtime", "conversion",
    "unpacking", "hub", "diffusers_blocks", "diffusers_plugin", "diffusers_lora", "transformers_plugin", "api", "streaming",
    "comfyui", "export", "evaluate", "heal", "latency", "sensitivity", "budget", "report", "demo", "evidence", "bench", "terminal",
    "cli_options", "cli_evidence", "cli_sensitivity", "cli",
)
# fmt: on

# Rooms to the left that a room must not reach all the same, not even through others: an inference install stays small.
SHUT = {"runtime": ("calibration", "methods", "heal")}

# Who may import a third party: files, or folders ending in "/", relative to src/halfbyte.
DIFFUSERS = (
    "diffusers_blocks.py",
    "diffusers_plugin.py",
    "diffusers_lora.py",
    "api.py",
    "evidence/table.py",
    "demo/",
    "bench/models.py",
)
DOORS = {
    "typer": ("cli.py", "cli_evidence.py", "cli_options.py", "cli_sensitivity.py"),
    "safetensors": ("checkpoint.py", "demo/features.py"),
    "triton": ("runtime/triton_kernels.py", "bench/compiled.py"),
    "torchmetrics": ("metrics/",),
    "torch_fidelity": ("evaluate/extractors.py",),
    "onnxruntime": ("evaluate/extractors.py",),
    "ImageReward": ("evaluate/text.py",),
    "jinja2": ("report/",),
    "diffusers": DIFFUSERS,
    "transformers": ("transformers_plugin.py", "api.py", "evaluate/text.py"),
}

# The root's own files stand outside the order (they hand out public names lazily), but importing halfbyte must cost nothing.
ROOT_FILES = ("__init__.py", "_import_hook.py")
HEAVY = ("torch", "numpy", "diffusers", "transformers")


class Import(NamedTuple):
    """One imported name: `import a.b` is "a.b", and `from a.b import c` is "a.b.c"."""

    name: str
    line: int
    at_import: bool  # runs when its module is imported: not inside a function


def walk(node: ast.AST, at_import: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below `node`, and whether it runs when the module is imported."""
    for child in ast.iter_child_nodes(node):
        yield child, at_import
        yield from walk(child, at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def imports(path: str, text: str) -> Iterator[Import]:
    """Every import of the file at `path` (relative to src/halfbyte), with relative ones made absolute."""
    package = ["halfbyte", *Path(path).parent.parts]
    for node, at_import in walk(ast.parse(text, path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif is_import_call(node):
            names = [node.args[0].value]
        else:
            continue
        yield from (Import(name, node.lineno, at_import) for name in names)


def is_import_call(node: ast.AST) -> bool:
    """Whether the node is import_module("...") or __import__("...") with the name written out."""
    if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
        return False
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
    return function in ("import_module", "__import__") and isinstance(node.args[0].value, str)


def room_of(path: str) -> str:
    return Path(path).parts[0].removesuffix(".py")


def order_fault(path: str, name: str) -> str | None:
    """What is wrong with the file at `path` importing `name` from halfbyte; None when nothing is."""
    here, there = room_of(path), name.partition(".")[2].split(".")[0]
    if there.startswith("__") and there.endswith("__"):  # from halfbyte import __version__
        return None
    if there in ROOMS:
        return f"{here} must not import {there}, which lies to its right" if ROOMS.index(there) > ROOMS.index(here) else None
    return None if here == ROOMS[-1] else f"{here} must name the room it imports from; halfbyte.{there or '*'} is not one"


def door_fault(path: str, name: str) -> str | None:
    """What is wrong with the file at `path` importing the third party `name`; None when nothing is."""
    package = name.split(".")[0]
    doors = DOORS.get(package, (path,))
    if any(path == door or (door.endswith("/") and path.startswith(door)) for door in doors):
        return None
    return f"only {', '.join(doors)} may import {package}"


def faults(path: str, text: str) -> Iterator[str]:
    """Every fault of one file, as a sentence that starts with its place."""
    room = room_of(path)
    if path not in ROOT_FILES and room not in ROOMS:
        yield f"{path}: unknown room {room!r}; add it to ROOMS in tests/test_layers.py, right of all it imports"
        return
    for name, line, at_import in imports(path, text):
        package = name.split(".")[0]
        if package != "halfbyte":
            fault = door_fault(path, name)
            if path in ROOT_FILES and at_import and package in HEAVY:
                fault = f"importing halfbyte must not import {package}; move the import into a function"
        else:
            fault = None if path in ROOT_FILES else order_fault(path, name)
        if fault:
            yield f"{path}:{line}: {fault}"


def shut_faults(sources: Mapping[str, str]) -> Iterator[str]:
    """Every way, however long, from a room to one that is shut to it."""
    graph: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path, text in sources.items():
        if room_of(path) in graph:
            names = [found.name.split(".") for found in imports(path, text)]
            graph[room_of(path)] |= {name[1] for name in names if name[0] == "halfbyte" and len(name) > 1 and name[1] in graph}
    for start, shut in SHUT.items():
        routes = {start: start}
        for room in (queue := [start]):
            for following in sorted(graph[room] - routes.keys()):
                routes[following] = f"{routes[room]} -> {following}"
                queue.append(following)
        yield from (f"{start} must not reach {room}: {routes[room]}" for room in shut if room in routes)


def all_faults(sources: Mapping[str, str]) -> list[str]:
    return [fault for path, text in sources.items() for fault in faults(path, text)] + list(shut_faults(sources))


def test_imports_flow_one_way():
    sources = {path.relative_to(SOURCE).as_posix(): path.read_text("utf-8") for path in sorted(SOURCE.rglob("*.py"))}
    found = all_faults(sources)
    assert not found, "\n" + "\n".join(found)


BROKEN = {
    "import to the right": ("formats.py", "from halfbyte.layers import swap", "formats must not import layers"),
    "plain import": ("formats.py", "import halfbyte.cli", "formats must not import cli"),
    "from the package": ("formats.py", "from halfbyte import methods", "formats must not import methods"),
    "relative": ("heal/dfa.py", "from ..report import html", "heal must not import report"),
    "relative, a bare package": ("heal/dfa.py", "from .. import errors, report", "heal must not import report"),
    "inside a function": ("packing.py", "def f():\n    import halfbyte.recipe", "packing.py:2: packing must not import recipe"),
    "for types only": ("errors.py", "if TYPE_CHECKING:\n    from halfbyte.formats import Grid", "errors must not import formats"),
    "by name": ("errors.py", "importlib.import_module('halfbyte.formats')", "errors must not import formats"),
    "a folder's __init__": ("methods/__init__.py", "from halfbyte.heal import distill", "methods must not import heal"),
    "a public name": ("evaluate.py", "from halfbyte import quantize", "evaluate must name the room"),
    "the whole package": ("evaluate.py", "import halfbyte as hb", "evaluate must name the room"),
    "a room nobody lists": ("utils.py", "", "unknown room 'utils'; add it to ROOMS"),
    "import of a room nobody lists": ("evaluate.py", "import halfbyte.utils", "halfbyte.utils is not one"),
    "runtime and methods": ("runtime/ops.py", "import halfbyte.methods.gptq", "must not reach methods: runtime -> methods"),
    "typer in a room": ("evaluate.py", "import typer", "only cli.py, cli_evidence.py, cli_options.py, "),
    "triton outside its file": ("runtime/ops.py", "import triton.language as tl", "bench/compiled.py may import triton"),
    "safetensors in the demo": ("demo/model.py", "from safetensors.torch import load", "only checkpoint.py, demo/features.py"),
    "metrics in a function": ("evaluate.py", "def f():\n    import torchmetrics", "only metrics/ may import torchmetrics"),
    "jinja2 outside report": ("cli.py", "import jinja2", "only report/ may import jinja2"),
    "diffusers in the cli": ("cli.py", "from diffusers import DiffusionPipeline", "may import diffusers"),
    "transformers in a method": ("methods/gptq.py", "import transformers", "may import transformers"),
    "heavy at the root": ("__init__.py", "import torch", "importing halfbyte must not import torch"),
    "heavy in a root try": ("_import_hook.py", "try:\n    import numpy\nexcept ImportError: pass", "must not import numpy"),
    "heavy in a root class": ("__init__.py", "class A:\n    from torch import nn", "importing halfbyte must not import torch"),
}


@pytest.mark.parametrize(("path", "text", "sentence"), BROKEN.values(), ids=BROKEN)
def test_the_check_can_fail(path, text, sentence):
    found = all_faults({path: text})
    assert len(found) == 1
    assert sentence in found[0]


def test_a_shut_room_is_found_behind_others():
    sources = {
        "runtime/layers.py": "def load():\n    from halfbyte.checkpoint import open_shards",
        "checkpoint.py": "import halfbyte.methods.gptq",
    }
    assert all_faults(sources) == ["runtime must not reach methods: runtime -> checkpoint -> methods"]


ALLOWED = {
    "to the left": ("cli.py", "from halfbyte.evaluate import evaluate"),
    "inside a room": ("runtime/backends.py", "from halfbyte.runtime import ops\nfrom . import cpu\nfrom .layers import A"),
    "a room as a name": ("heal/dfa.py", "from .. import layers, timestep"),
    "the version": ("checkpoint.py", "from halfbyte import __version__"),
    "the public names, in the last room": ("cli.py", "import halfbyte as hb\nimport typer"),
    "a third party without a door": ("formats.py", "import torch\nimport numpy as np\nimport math"),
    "a door that is a folder": ("report/page.py", "import jinja2"),
    "a package whose name starts alike": ("formats.py", "import typer_extras, lpips2"),
    "rooms at the root": ("__init__.py", "if TYPE_CHECKING:\n    from halfbyte.conversion import quantize"),
    "heavy in a root function": ("__init__.py", "def __getattr__(name):\n    import torch"),
}


@pytest.mark.parametrize(("path", "text"), ALLOWED.values(), ids=ALLOWED)
def test_what_is_allowed_passes(path, text):
    assert all_faults({path: text}) == []
