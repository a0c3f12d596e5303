"""Make the virtual environment, and say what to install where the system's Python cannot."""

import subprocess
import sys
import venv
from pathlib import Path

MINIMUM = (3, 11)


def main(folder: str) -> None:
    if sys.version_info < MINIMUM:
        sys.exit(
            f"arks needs Python {MINIMUM[0]}.{MINIMUM[1]} or newer; {sys.executable} is {sys.version.split()[0]}. "
            "Install a newer one and run: make PYTHON=/path/to/python3 run"
        )
    try:
        venv.create(folder, with_pip=True)
    except (subprocess.CalledProcessError, ImportError, OSError) as error:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(
            f"cannot make {Path(folder)}: {error}\n"
            f"On Debian and Ubuntu: sudo apt-get install python{version}-venv, then run make again."
        )


if __name__ == "__main__":
    main(sys.argv[1])
