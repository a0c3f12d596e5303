"""Services' own addresses inside a `NetworkRoom`: a connection goes on to a pod that is ready, as kube-proxy has it.

Pods that leave are taken where no other is there and they still say that they serve; without any, connections are
refused. TCP alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.harness.kubernetes import Object
from tests.harness.room import NetworkRoom

SERVICE_OF = "kubernetes.io/service-name"


class KubeProxy:
    def __init__(self, room: NetworkRoom) -> None:
        self._room = room
        self._forwarded: dict[str, list[str]] = {}

    def see(self, services: Iterable[Object], slices: Iterable[Object]) -> None:
        """All that there are."""
        found: dict[tuple[str, str], list[Object]] = {}
        for each in slices:
            meta = each["metadata"]
            found.setdefault((meta["namespace"], meta["labels"].get(SERVICE_OF, "")), []).append(each)
        wanted = {}
        for service in services:
            meta, spec = service["metadata"], service["spec"]
            behind = found.get((meta["namespace"], meta["name"]), [])
            if spec.get("clusterIP", "None") != "None":
                for port in spec.get("ports", ()):
                    wanted[f"{spec['clusterIP']}:{port['port']}"] = _targets(behind, port.get("name"))
        for listen in self._forwarded.keys() | wanted.keys():
            targets = wanted.get(listen, [])
            if targets != self._forwarded.get(listen, []):
                self._room.forward(listen, targets)
        self._forwarded = wanted


def _targets(slices: Iterable[Object], port: str | None) -> list[str]:
    """ip:port of those that get traffic now."""
    ready, leaving = [], []
    for each in slices:
        number = next((item["port"] for item in each.get("ports") or () if item.get("name") == port), None)
        if number is None:
            continue
        for end in each.get("endpoints") or ():
            says = end.get("conditions", {})
            chosen = ready if says.get("ready", True) else leaving if says.get("serving") else None
            if chosen is not None:
                chosen.append(f"{end['addresses'][0]}:{number}")
    return sorted(ready or leaving)
