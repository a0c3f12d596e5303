"""What is committed under apis/wire is what the .proto files say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def load_generator():
    spec = importlib.util.spec_from_file_location("arks_scripts_wire", ROOT / "scripts" / "wire.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_modules_have_not_drifted_from_the_proto_files(tmp_path):
    fresh = {path.name: path.read_text() for path in load_generator().generate(tmp_path)}
    committed = {path.name: path.read_text() for path in (ROOT / "apis" / "wire").glob("*_pb2.py*")}
    assert fresh.keys() == committed.keys()
    for name, text in fresh.items():
        assert text == committed[name], f"{name} is stale: run make wire"
