"""A download that lacked room goes on as soon as there may be more: the claim grew, or the model asks for more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from controller.kube.errors import ForbiddenError
from controller.permissions import NAMESPACE
from controller.reconcile.claims import Growth, size_of
from controller.reconcile.desired.quantity import amount
from tests.harness.rights import grant
from tests.models.hubs import Hub
from tests.models.pods import LoaderPods
from tests.reconcile.conftest import Running, condition, wait_for
from tests.reconcile.resources import MODEL

FULL = {"ARKS_LOADER_MARGIN_BYTES": str(1 << 60)}  # the loader keeps more free than any disk has


@pytest.fixture
async def hub():
    server = await Hub().start()
    server.push({"config.json": b"{}"})
    yield server
    await server.stop()


@pytest.fixture
async def loaders(room, tmp_path):
    async with LoaderPods(room.api, room.namespace, tmp_path) as found:
        yield found


@pytest.fixture
async def running(room):
    """With the rights that the manifests grant: claims are patched."""
    grant(room.api)
    found = Running(room.api, NAMESPACE)
    await found.start(user="controller")
    try:
        await found.leading()
        yield found
    finally:
        await found.stop()


@pytest.fixture
def storage_class(room):
    """Makes a class and returns its name; claims of it grow where it says so."""
    made = []

    def make(*, grows):
        name = f"{room.namespace}-{grows}".lower()
        kind = {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": name}}
        room.api.apply({**kind, "provisioner": "test/none", "allowVolumeExpansion": grows})
        made.append(name)
        return name

    yield make
    for name in made:
        room.api.delete("storage.k8s.io/v1", "StorageClass", name)


def claim_spec(storage_class, size):
    return {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": storage_class,
        "resources": {"requests": {"storage": size}},
    }


def apply_model(room, hub, storage_class, size="2Gi"):
    pvc = {"name": "qwen-7b", "spec": claim_spec(storage_class, size)}
    room.apply(MODEL, model="org/model", source={"huggingface": {"endpoint": hub.api.url}}, storage={"pvc": pvc})


def provisioned(room, size):
    """What a provisioner and a node report of the claim."""
    room.api.set_status(room.get("PersistentVolumeClaim", "qwen-7b"), phase="Bound", capacity={"storage": size})


def requested(room):
    return room.get("PersistentVolumeClaim", "qwen-7b")["spec"]["resources"]["requests"]["storage"]


async def lacking(room, running, loaders, tries):
    """Failed for want of room after so many tries, and quiet: no more of them without a cause."""
    await wait_for(lambda: len(loaders.started) == tries)
    await room.condition("ArksModel", "qwen-7b", "ModelLoaded", "False", "NoSpace")
    await room.phase("ArksModel", "qwen-7b", "Failed")
    await running.quiet(1.0)
    assert len(loaders.started) == tries


async def test_a_claim_that_grows_under_a_failed_download(room, running, hub, loaders, storage_class):
    loaders.environment = FULL
    apply_model(room, hub, storage_class(grows=True))
    await room.until("PersistentVolumeClaim", "qwen-7b", lambda _: True)
    await lacking(room, running, loaders, 1)
    provisioned(room, "2Gi")  # its first volume is no more room than there was
    await lacking(room, running, loaders, 1)
    room.patch("PersistentVolumeClaim", "qwen-7b", {"spec": {"resources": {"requests": {"storage": "4Gi"}}}})
    await lacking(room, running, loaders, 2)
    loaders.environment = {}
    provisioned(room, "4Gi")
    await room.phase("ArksModel", "qwen-7b", "Ready")
    assert len(loaders.started) == 3


async def test_a_model_that_asks_for_more_gets_a_larger_claim_and_another_try(
    room, running, hub, loaders, storage_class
):
    loaders.environment = FULL
    apply_model(room, hub, storage_class(grows=True))
    await room.until("PersistentVolumeClaim", "qwen-7b", lambda _: True)
    provisioned(room, "2Gi")
    await lacking(room, running, loaders, 1)
    loaders.environment = {}
    room.patch("ArksModel", "qwen-7b", {"spec": {"storage": {"pvc": {"spec": claim_spec(None, "3Gi")}}}})
    await wait_for(lambda: requested(room) == "3Gi")
    await room.phase("ArksModel", "qwen-7b", "Ready")
    # Less is no wish that a claim could be granted, and no error either.
    room.patch("ArksModel", "qwen-7b", {"spec": {"storage": {"pvc": {"spec": claim_spec(None, "1Gi")}}}})
    generation = room.get("ArksModel", "qwen-7b")["metadata"]["generation"]
    model = await room.until("ArksModel", "qwen-7b", lambda item: item["status"]["observedGeneration"] == generation)
    assert (requested(room), condition(model, "Degraded"), model["status"]["phase"]) == ("3Gi", None, "Ready")


async def test_a_claim_that_cannot_grow_is_said_once_and_does_not_stop_the_model(
    room, running, hub, loaders, storage_class
):
    apply_model(room, hub, storage_class(grows=False))
    await room.until("PersistentVolumeClaim", "qwen-7b", lambda _: True)
    provisioned(room, "2Gi")
    await room.phase("ArksModel", "qwen-7b", "Ready")
    room.patch("ArksModel", "qwen-7b", {"spec": {"storage": {"pvc": {"spec": claim_spec(None, "3Gi")}}}})
    found = await room.condition("ArksModel", "qwen-7b", "Degraded", "True", "ClaimNotEnlarged")
    field = "spec.storage.pvc.spec.resources.requests.storage"
    assert found["message"].startswith(f"{field}: the claim qwen-7b stays at 2Gi: ")
    await room.event("qwen-7b", "Warning", "ClaimNotEnlarged")
    assert room.get("ArksModel", "qwen-7b")["status"]["phase"] == "Ready"
    for value in ("a", "b", "c"):  # whatever wakes the loop, the API server is not asked again
        room.patch("PersistentVolumeClaim", "qwen-7b", {"metadata": {"annotations": {"test/x": value}}})
        await running.quiet()
    refused = [
        count for call, count in running.writes().items() if call[2] == "persistentvolumeclaims" and call[3][0] == "4"
    ]
    assert refused == [1]
    room.patch("ArksModel", "qwen-7b", {"spec": {"storage": {"pvc": {"spec": claim_spec(None, "2Gi")}}}})
    await room.until("ArksModel", "qwen-7b", lambda item: condition(item, "Degraded") is None)


async def test_a_strangers_claim_is_not_enlarged_but_a_changed_spec_is_another_try(
    room, running, hub, loaders, storage_class
):
    name = storage_class(grows=True)
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "qwen-7b"}}
    room.apply(claim, **claim_spec(name, "2Gi"))
    provisioned(room, "2Gi")
    loaders.environment = FULL
    apply_model(room, hub, name)
    await lacking(room, running, loaders, 1)
    apply_model(room, hub, name, "3Gi")
    await lacking(room, running, loaders, 2)
    assert requested(room) == "2Gi"
    loaders.environment = {}
    apply_model(room, hub, name, "4Gi")
    await room.phase("ArksModel", "qwen-7b", "Ready")


# -- without a cluster ------------------------------------------------------------------------------------------------


def claim(size, capacity=None, phase="Bound", conditions=()):
    status = {"phase": phase, "conditions": [{"type": each, "status": "True"} for each in conditions]}
    if capacity:
        status["capacity"] = {"storage": capacity}
    meta = {"name": "c", "namespace": "n", "uid": "u"}
    return {"metadata": meta, "spec": {"resources": {"requests": {"storage": size}}}, "status": status}


class _Api:
    def __init__(self, error=None):
        self.error, self.sent = error, []

    async def patch(self, _resource, _name, _namespace, body):
        self.sent.append(body["spec"]["resources"]["requests"]["storage"])
        if self.error:
            raise self.error


async def test_only_what_is_bound_and_smaller_is_enlarged():
    growth = Growth()
    for live, wanted in (("2Gi", "2048Mi"), ("2Gi", "1Gi"), ("3G", "2Gi"), ("1Ti", "1e12")):
        api = _Api()
        assert await growth.bring(api, claim(live), claim(wanted)) == ""
        assert api.sent == []
    api = _Api()
    assert await growth.bring(api, claim("1Gi", phase="Pending"), claim("2Gi")) == ""
    assert api.sent == []
    await growth.bring(api, claim("2G"), claim("2Gi"))
    assert api.sent == ["2Gi"]


async def test_a_refusal_is_asked_about_again_after_a_while_or_for_another_size():
    clock = SimpleNamespace(now_s=0.0)
    growth = Growth(again_s=300.0, now_s=lambda: clock.now_s)
    api = _Api(ForbiddenError(403, "the class does not grow"))
    for _ in range(5):
        assert "does not grow" in await growth.bring(api, claim("1Gi"), claim("2Gi"))
    assert api.sent == ["2Gi"]
    await growth.bring(api, claim("1Gi"), claim("3Gi"))
    assert api.sent == ["2Gi", "3Gi"]
    clock.now_s = 301.0
    api.error = None
    assert await growth.bring(api, claim("1Gi"), claim("3Gi")) == ""
    assert api.sent == ["2Gi", "3Gi", "3Gi"]


def test_a_claims_size_differs_with_each_step_of_its_growth():
    steps = [
        claim("2Gi", "2Gi"),
        claim("4Gi", "2Gi"),
        claim("4Gi", "2Gi", conditions=["FileSystemResizePending"]),
        claim("4Gi", "4Gi"),
    ]
    assert len({size_of(step) for step in steps}) == 4
    assert size_of(claim("2Gi", "2Gi", conditions=["Resizing"])) == size_of(claim("2Gi", "2Gi"))


@pytest.mark.parametrize(
    ("text", "number"),
    [("4Gi", 4 << 30), ("500M", 500_000_000), ("1e9", 10**9), ("1E3", 1000), ("1E", 10**18), (".5k", 500), (7, 7)],
)
def test_quantities_are_numbers(text, number):
    assert amount(text) == number
    assert amount("1500m") == amount("1.5")


def test_what_is_no_quantity_is_none():
    for text in ("", "Gi", "4 Gi", "4gi", "0x10", "1e1.5"):
        with pytest.raises(ValueError, match="no quantity"):
            amount(text)
