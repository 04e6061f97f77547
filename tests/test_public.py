"""What the packages export: listed in `__all__`, in order, and documented."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest

PACKAGES = ("edge_slm", "edge_slm_runtime", "edge_slm_bench", "edge_slm_converters")


def packages() -> list[str]:
    """The four packages and the packages inside them, if they export something."""
    names = list(PACKAGES)
    for name in PACKAGES:
        modules = pkgutil.walk_packages(import_module(name).__path__, f"{name}.")
        names += [module.name for module in modules if module.ispkg]
    return [name for name in names if hasattr(import_module(name), "__all__")]


def exports(package: ModuleType) -> set[str]:
    """Public names that come from the modules of the package."""
    return {
        name
        for name, value in vars(package).items()
        if not name.startswith("_")
        and str(getattr(value, "__module__", "")).startswith(f"{package.__name__}.")
    }


def order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, as ruff sorts them."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def is_documented(thing: object) -> bool:
    """By a docstring of its own; dataclasses make themselves one of their signature."""
    doc = thing.__dict__.get("__doc__") if isinstance(thing, type) else inspect.getdoc(thing)
    made = isinstance(thing, type) and dataclasses.is_dataclass(thing)
    return bool(doc) and not (made and str(doc).startswith(f"{thing.__name__}("))


def undocumented(name: str, thing: object) -> Iterator[str]:
    if (inspect.isclass(thing) or inspect.isroutine(thing)) and not is_documented(thing):
        yield name
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            callable_ = inspect.isroutine(value) or isinstance(value, property)
            if callable_ and not member.startswith("_") and not inspect.getdoc(value):
                yield f"{name}.{member}"


@pytest.mark.parametrize("name", packages())
def test_all_is_complete_and_sorted(name: str) -> None:
    package = import_module(name)
    listed = list(package.__all__)
    assert exports(package) <= set(listed)
    assert all(hasattr(package, export) for export in listed)
    assert listed == sorted(set(listed), key=order)


@pytest.mark.parametrize("name", packages())
def test_every_export_is_documented(name: str) -> None:
    package = import_module(name)
    assert package.__doc__
    missing = [
        problem
        for export in package.__all__
        for problem in undocumented(export, getattr(package, export))
    ]
    assert not missing
