"""Runs a registration as soon as another library is imported, without importing that library.

diffusers and transformers find quantization backends in tables inside their own modules. Importing them just to write a line there
would make `import halfbyte` take seconds, so the line is written when (and if) they are imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PLUGINS = {
    "diffusers.quantizers.auto": "halfbyte.diffusers_plugin",
    "diffusers.loaders.lora_pipeline": "halfbyte.diffusers_lora",
    "transformers.quantizers.auto": "halfbyte.transformers_plugin",
}


def _register(module_name: str) -> None:
    """Import the plug-in, which registers itself; where its own import is under way already, it will do so at its end.

    This runs inside another library's import: a version we do not fit must not break it, so it only warns.
    """
    try:
        importlib.import_module(PLUGINS[module_name])
    except (ImportError, AttributeError, KeyError) as error:
        library = module_name.partition(".")[0]
        warnings.warn(f"halfbyte does not fit this {library} and cannot load 4-bit checkpoints with it: {error}", stacklevel=2)


class _Loader(importlib.abc.Loader):
    """The module's own loader, followed by our registration."""

    def __init__(self, loader: Any, name: str) -> None:
        self.loader, self.name = loader, name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register(self.name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name not in PLUGINS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, name)
        return spec


def install() -> None:
    """Register with the libraries that are imported already, and with the others when they are."""
    for name in PLUGINS:
        if name in sys.modules:
            _register(name)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
