"""Generate `apis/wire/*_pb2.py` and `.pyi` from `proto/`.

protoc names a module after its file's path, and `proto/arks/...` would become a package that shadows the `arks`
command, so the modules are laid flat into `apis.wire` and their imports of each other are rewritten.
"""

import re
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
IMPORT = re.compile(r"^from [\w.]+ import (\w+_pb2)( as \w+)?$", re.MULTILINE)


def generate(out: Path) -> list[Path]:
    """Write the modules of every file under `proto/` into `out`; return their paths."""
    sources = sorted((ROOT / "proto").rglob("*.proto"))
    ours = {f"{source.stem}_pb2" for source in sources}
    if len(ours) != len(sources):
        sys.exit("two .proto files share a name: their modules would overwrite each other")
    written = []
    with tempfile.TemporaryDirectory() as scratch:
        include = files("grpc_tools") / "_proto"
        arguments = ["protoc", f"-I{ROOT / 'proto'}", f"-I{include}", f"--python_out={scratch}", f"--pyi_out={scratch}"]
        if protoc.main([*arguments, *map(str, sources)]):
            sys.exit("protoc failed")
        for made in sorted(Path(scratch).rglob("*_pb2.py*")):
            text = IMPORT.sub(
                lambda found: f"from apis.wire import {found[1]}{found[2] or ''}" if found[1] in ours else found[0],
                made.read_text(),
            )
            target = out / made.name
            target.write_text(text)
            written.append(target)
    return written


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "apis" / "wire")
