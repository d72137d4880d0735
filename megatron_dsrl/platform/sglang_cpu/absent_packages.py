"""Stand-ins for two packages that SGLang imports but never calls on CPU.

`sgl_kernel` exists only as CUDA wheels: without AMX, SGLang uses `forward_native` for every operation. `torchvision`
wheels are linked against CUDA builds of torch and fail to import with a CPU build; SGLang needs them for image models
only. Both are imported at module level, so any name must be importable; calling one raises.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

ABSENT_PACKAGES = ("sgl_kernel", "torchvision")
"""Packages to replace, including their submodules, even if they are installed."""


class AbsentName:
    """Anything imported from an absent package: has any attribute, raises when called."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> "AbsentName":
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentName(f"{self._path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{self._path} is not available on a machine without CUDA")


class AbsentModule(ModuleType):
    """A module of an absent package, with every public name."""

    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> AbsentName:
        if name.startswith("__"):
            raise AttributeError(name)
        return AbsentName(f"{self.__name__}.{name}")


class AbsentPackageFinder(MetaPathFinder, Loader):
    """Finds and creates the modules of absent packages."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in ABSENT_PACKAGES:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> AbsentModule:
        return AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Install the finder before all others. Idempotent. Call it before importing `sglang` or a Transformers model."""
    if not any(isinstance(finder, AbsentPackageFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AbsentPackageFinder())
