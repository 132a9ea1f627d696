"""Packages that only some adapters need."""

from importlib import import_module
from types import ModuleType


def require(module: str, package: str) -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: Its dotted name.
        package: Name under which it is installed.

    Returns:
        The module.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this adapter needs {package}, which is not installed or cannot be imported "
            f"({error}): pip install 'torchdnr[peers]', or {package} alone"
        ) from error
