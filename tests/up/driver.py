"""`arks up` with the stand-in extproc: the flags are `arks up`'s own."""

import sys
from dataclasses import replace
from pathlib import Path

from arks import cli, up

STANDIN = (sys.executable, str(Path(__file__).with_name("standin_extproc.py")))
real_run = up.run


def run(settings: up.UpSettings) -> int:
    return real_run(replace(settings, extproc_command=STANDIN))


if __name__ == "__main__":
    up.run = run
    sys.exit(cli.main(["up", *sys.argv[1:]]))
