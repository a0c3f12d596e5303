"""Where things lie: the state folder, sockets, the quickstart policy."""

import os
import tempfile
from pathlib import Path

SOCKET_PATH_LIMIT = 107
"""bytes in a unix socket's path on Linux"""
LONGEST_SOCKET = "envoy-admin.sock"


def default_state() -> Path:
    """${XDG_STATE_HOME:-~/.local/state}/arks"""
    home = os.environ.get("XDG_STATE_HOME")
    # The specification ignores relative ones: they would lie somewhere else after each `cd`.
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".local" / "state"
    return base / "arks"


def quickstart() -> Path:
    """The quickstart policy: beside this package in an installed wheel, manifests/quickstart in a checkout."""
    package = Path(__file__).parent
    installed = package / "quickstart"
    return installed if installed.is_dir() else package.parent / "manifests" / "quickstart"


def run_folder(state: Path) -> Path:
    """A private folder for sockets and generated files: in `state`, or a temporary one where that path is too long."""
    run = state / "run"
    if len(os.fsencode(run / LONGEST_SOCKET)) > SOCKET_PATH_LIMIT:
        return Path(tempfile.mkdtemp(prefix="arks-"))
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    run.chmod(0o700)
    return run
