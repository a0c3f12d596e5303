"""`arks crds`: a cluster gets its kinds from whatever is installed, a wheel without a checkout included."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from apis.crds import FOLDER
from apis.resources import KINDS
from arks import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with what a wheel of this version installs, and nothing else of ours."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    (built,) = folder.glob("*.whl")
    zipfile.ZipFile(built).extractall(folder / "site")
    return folder / "site"


def arks_of(wheel, folder, *argv):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ARKS_", "COV_"))}
    program = "import arks, sys; from arks.cli import main; assert arks.__file__.startswith(sys.argv[1]), arks.__file__"
    return subprocess.run(
        [sys.executable, "-c", f"{program}; sys.exit(main(sys.argv[2:]))", str(wheel), *argv],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(wheel)},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def test_what_a_wheel_prints_a_cluster_takes(wheel, tmp_path, kube_api):
    printed = arks_of(wheel, tmp_path, "crds")
    # Checked strictly, as kubectl does; the others of this cluster have applied the same.
    for crd in yaml.safe_load_all(printed):
        path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{crd['metadata']['name']}"
        query = "fieldManager=kubectl&force=true&fieldValidation=Strict&dryRun=All"
        made = kube_api.request("PATCH", f"{path}?{query}", crd, content_type="application/apply-patch+yaml")
        assert made["spec"]["names"]["kind"] in KINDS
    assert [item["spec"]["names"]["kind"] for item in yaml.safe_load_all(printed)] == list(KINDS)


def test_a_folder_gets_the_files_of_the_manifests(tmp_path, capsys):
    assert cli.main(["crds", "--folder", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == ""
    written = {file.name: file.read_text() for file in (tmp_path / "new").iterdir()}
    assert written == {file.name: file.read_text() for file in FOLDER.glob("*.yaml")}


def test_a_folder_that_cannot_be_had_is_told(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["crds", "--folder", str(tmp_path / "file" / "below")]) == 1
    assert "--folder" in capsys.readouterr().err
