"""A model's own claim grows with its model: what the spec asks for in bytes is asked for in the claim, too.

Of a claim's spec only the request can change, and only upwards, where the storage class allows it. A claim that is
somebody else's is used as it is. How large a claim is, and is about to be, also says when a download that lacked room
is worth another try.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from controller.kube.client import Client, Object
from controller.kube.errors import ForbiddenError, InvalidError, NotFoundError
from controller.kube.resource import PERSISTENT_VOLUME_CLAIMS
from controller.reconcile.desired.quantity import amount
from controller.reconcile.objects import uid_of

REFUSED_AGAIN_S: Final = 300.0
"""a storage class that learns to grow is nothing that we see"""
_LASTING: Final = ("storageClassName", "accessModes", "volumeMode", "selector", "volumeName", "dataSource")
# The disk has grown and its file system will when the next pod mounts it: the next try is what it waits for.
_NEXT_MOUNT: Final = "FileSystemResizePending"


class _Refused(NamedTuple):
    wanted: str
    at_s: float
    why: str


def size_of(claim: Object | None) -> str:
    """What is asked for; what there is while that is less; and whether the next mount brings more.

    It differs when room was made. That a claim gets its first volume is not that: its pod waited for it.
    """
    if claim is None:
        return ""
    status: Mapping[str, Any] = claim.get("status") or {}
    asked, there = _request(claim), str((status.get("capacity") or {}).get("storage", ""))
    if not asked or not there or amount(there) >= amount(asked):
        return asked
    pending = any(each["type"] == _NEXT_MOUNT and each["status"] == "True" for each in status.get("conditions") or ())
    return f"{asked}, of which {there} is there{', more with the next mount' if pending else ''}"


def unlike(claim: Object, desired: Object) -> str:
    """The first field of the desired claim that differs and can never be changed; empty where there is none."""
    live = claim.get("spec") or {}
    for key in _LASTING:
        wanted, there = desired["spec"].get(key), live.get(key)
        if wanted and there and (sorted(wanted) != sorted(there) if isinstance(wanted, list) else wanted != there):
            return key
    return ""


class Growth:
    """One per leadership. A refusal is remembered for a while, so that a claim that cannot grow costs no writes."""

    def __init__(self, *, again_s: float = REFUSED_AGAIN_S, now_s: Callable[[], float] = time.monotonic) -> None:
        self._again_s, self._now_s = again_s, now_s
        self._refused: dict[str, _Refused] = {}

    async def bring(self, client: Client, claim: Object, desired: Object) -> str:
        """Why the live claim stays smaller than the desired one; empty where it does not, or cannot yet be known."""
        uid, wanted = uid_of(claim), _request(desired)
        try:
            if not wanted or amount(_request(claim) or "0") >= amount(wanted):
                self._refused.pop(uid, None)
                return ""
        except ValueError as error:  # the schema's pattern lets some pass that are none
            return str(error)
        if (claim.get("status") or {}).get("phase") != "Bound":
            return ""  # the API server takes no other size before
        known = self._refused.get(uid)
        if known is not None and known.wanted == wanted and self._now_s() < known.at_s + self._again_s:
            return known.why
        meta = claim["metadata"]
        grown = {"metadata": {"uid": uid}, "spec": {"resources": {"requests": {"storage": wanted}}}}
        try:
            await client.patch(PERSISTENT_VOLUME_CLAIMS, meta["name"], meta["namespace"], grown)
        except NotFoundError:
            return ""
        except (ForbiddenError, InvalidError) as error:
            why = f"the claim {meta['name']} stays at {_request(claim)}: {error.message}"
            self._refused[uid] = _Refused(wanted, self._now_s(), why)
            return why
        self._refused.pop(uid, None)
        return ""


def _request(claim: Object) -> str:
    resources = (claim.get("spec") or {}).get("resources") or {}
    return str((resources.get("requests") or {}).get("storage", ""))
