"""When nothing changes, nothing is written: not by a pass, not by a restart, not by an API server that came back."""

from __future__ import annotations

from controller.kube.client import FIELD_MANAGER
from tests.reconcile.conftest import Running, condition
from tests.reconcile.resources import PAIR, QUICKSTART

CHANGING = ("Lease", "Event")


def written(room):
    """Everything in the namespace that we wrote, and when; what others write of it, late or again, is theirs."""
    found = {}
    for api_version, kind in list(room.api._kinds):
        if kind in {*CHANGING, "Binding"}:
            continue
        if not room.api._kinds[api_version, kind][1]:
            continue
        for item in room.api.list(api_version, kind, room.namespace):
            meta = item["metadata"]
            ours = [each for each in meta.get("managedFields", ()) if each["manager"] == FIELD_MANAGER]
            if ours:
                found[kind, meta["name"]] = (meta["uid"], ours)
    return found


async def settled(room, running):
    await room.phase("ArksApplication", "app-qwen", "Running")
    await room.phase("ArksDisaggregatedApplication", "pd", "Running")
    await room.condition("ArksEndpoint", "qwen-7b", "Programmed", "True")
    await room.condition("ArksToken", "example-token", "Accepted", "True")
    await running.quiet(1.0)
    room.api._discover()


async def test_a_resync_of_everything_writes_nothing(room, running, actor, gateway):
    room.apply(QUICKSTART, PAIR)
    await settled(room, running)
    before, sent = written(room), running.writes()
    assert len(before) > 15
    for _ in range(3):
        running.controller.reconciler._changed("", ("", ""), None, None)
        for kind, reflector in running.controller.watches.reflectors.items():
            for key, item in reflector.store.items():
                running.controller.reconciler._changed(kind, key, item, item)
        await running.quiet()
    assert written(room) == before
    assert running.writes() == sent


async def test_a_restart_changes_nothing(room, actor, gateway):
    first = Running(room.api, room.namespace)
    await first.start()
    try:
        room.apply(QUICKSTART, PAIR)
        await settled(room, first)
    finally:
        await first.stop()
    before = written(room)
    events = len(room.api.list("v1", "Event", room.namespace))
    second = Running(room.api, room.namespace)
    await second.start()
    try:
        await second.quiet(1.5)
        assert written(room) == before
        assert len(room.api.list("v1", "Event", room.namespace)) == events
    finally:
        await second.stop()


async def test_a_transition_has_one_event_and_a_condition_keeps_its_time(room, running, actor):
    room.apply(QUICKSTART)
    await room.phase("ArksApplication", "app-qwen", "Running")
    await running.quiet()
    since = condition(room.get("ArksApplication", "app-qwen"), "Precheck")["lastTransitionTime"]
    running_since = condition(room.get("ArksApplication", "app-qwen"), "Ready")["lastTransitionTime"]
    room.patch("ArksApplication", "app-qwen", {"spec": {"instanceSpec": {"annotations": {"a": "b"}}}})
    generation = room.get("ArksApplication", "app-qwen")["metadata"]["generation"]
    await room.until(
        "ArksApplication", "app-qwen", lambda app: condition(app, "Precheck")["observedGeneration"] == generation
    )
    await running.quiet()
    app = room.get("ArksApplication", "app-qwen")
    assert condition(app, "Precheck")["lastTransitionTime"] == since
    assert condition(app, "Ready")["lastTransitionTime"] >= running_since
    assert room.events("app-qwen").count(("Normal", "PrecheckPass")) == 1


async def test_conditions_and_fields_of_others_stay(room, running, actor):
    room.apply(QUICKSTART)
    await room.condition("ArksQuota", "basic-quota", "Accepted", "True")
    quota = room.get("ArksQuota", "basic-quota")
    used = [{"type": "total", "used": 17}]
    mine = {
        "type": "Audited",
        "status": "True",
        "reason": "Yes",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    conditions = [*quota["status"]["conditions"], mine]
    room.api.set_status(quota, quotaStatus=used, conditions=conditions)
    room.patch("ArksQuota", "basic-quota", {"spec": {"quotas": [{"type": "total", "value": 5}]}})
    found = await room.until(
        "ArksQuota", "basic-quota", lambda item: item["status"]["observedGeneration"] == item["metadata"]["generation"]
    )
    assert found["status"]["quotaStatus"] == used
    assert condition(found, "Audited")["status"] == "True"


async def test_a_status_that_somebody_spoiled_is_put_right(room, running, actor):
    room.apply(QUICKSTART)
    app = await room.phase("ArksApplication", "app-qwen", "Running")
    room.api.set_status(app, phase="Failed", readyReplicas=7)
    mended = await room.phase("ArksApplication", "app-qwen", "Running")
    assert mended["status"]["readyReplicas"] == 1
