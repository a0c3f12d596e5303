"""The containers of one pod, which share its address here as they do on a node.

A program that listens on every address of its pod, or asks its own pod by 127.0.0.1, means that one address.
"""

import contextlib
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts import engines
from tests.engines_real.launched import START_TIMEOUT_S, Container, pod_address


class PodContainer(Container):
    """A container that reaches all of its pod, and nothing beside it, at the pod's one address."""

    def _placed(self, text: str) -> str:
        text = super()._placed(text).replace("127.0.0.1", self.address).replace("0.0.0.0", self.address)
        for mount in self.spec["volumeMounts"]:
            if mount["name"] in self.volumes:
                where = self.volumes[mount["name"]] / mount.get("subPath", "")
                text = text.replace(f"file://{mount['mountPath']}", f"file://{where}")
        return text

    def post_start(self) -> int:
        """The hook that comes before any probe; its exit status."""
        return self._exec(self.spec["lifecycle"]["postStart"]["exec"]["command"], START_TIMEOUT_S)

    def stop(self) -> int:
        """As a deleted pod's container ends: hook, SIGTERM, SIGKILL at the end of the grace period."""
        until_s = time.monotonic() + self.grace_s
        self.pre_stop()
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait_ended(max(2.0, until_s - time.monotonic()))
        self.kill()
        return self.wait_ended(10)


def containers(
    tree: Mapping[str, Any], which: engines.Environment, folder: Path, volumes: Mapping[str, Path], **env: str
) -> dict[str, PodContainer]:
    """Of one pod, by name. `env`: what the image brings beside what every image here brings; `{address}` in it is the
    pod's own.
    """
    address = pod_address()
    image = {
        "PATH": f"{engines.environment(which)}/bin:/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        **{name: value.format(address=address) for name, value in env.items()},
    }
    return {
        each["name"]: PodContainer(tree, folder / each["name"], volumes, {}, image, each["name"], address)
        for each in tree["spec"]["containers"]
    }
