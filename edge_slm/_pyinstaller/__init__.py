"""Hooks for PyInstaller, which finds them by the entry point `pyinstaller40`."""

from pathlib import Path


def hook_dirs() -> list[str]:
    """The folders of the hooks."""
    return [str(Path(__file__).parent)]
