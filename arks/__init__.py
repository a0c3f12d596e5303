"""The `arks` command."""

import importlib.metadata


def version() -> str:
    """The installed version; "0+unknown" where the package runs without being installed."""
    try:
        return importlib.metadata.version("arks")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
