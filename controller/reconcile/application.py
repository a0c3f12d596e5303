"""ArksApplication and ArksDisaggregatedApplication: one pass of the loop.

Level-triggered: every pass starts from what is there now, so a state called Failed is left as soon as its cause is.
With a blocking problem nothing is applied and nothing deleted: what runs, runs on. An object that is absent from the
plan is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from apis.resources import ArksApplication, ArksDisaggregatedApplication
from controller.kube.resource import Key
from controller.reconcile.context import RESYNC_S, UNSETTLED_S, Context, about
from controller.reconcile.desired.application import ROLE_NAME, desired_application
from controller.reconcile.desired.disaggregated import desired_disaggregated
from controller.reconcile.desired.leftovers import beside_workloads
from controller.reconcile.desired.metadata import owned_by
from controller.reconcile.desired.outcome import FRONTEND_ROLE, Desired, World
from controller.reconcile.desired.phase import Judgement, Verdict, judge
from controller.reconcile.desired.stuck import first_stuck
from controller.reconcile.finalizers import release
from controller.reconcile.kinds import ARKS
from controller.reconcile.writing import REFUSED_AGAIN_S, Refusal
from controller.workloads.lws import ROUTER_ROLE
from controller.workloads.model import APPLICATION_LABEL, ROLE_LABEL, Counts, Deletion

_STAGES: Final = {"router": ROUTER_ROLE, "prefill": "prefill", "decode": "decode"}


async def reconcile_application(context: Context, key: Key) -> float | None:
    watches = context.watches
    entry = watches.applications.entry(key)
    if entry is None:
        context.status.forget(ARKS["ArksApplication"], *key)
        return None
    app = entry.value
    if app.metadata.deletion_timestamp is not None:
        await release(context.client, ARKS["ArksApplication"], *key, app.metadata.finalizers, entry.version)
        return None
    world = _world(context, key)
    if world is None:
        return UNSETTLED_S
    model = watches.models.get(Key(key.namespace, app.spec.model.name))
    named = {item.model.name for item in app.spec.lora_adapters}
    adapters = {name: found for name in named if (found := watches.models.get(Key(key.namespace, name))) is not None}
    desired = desired_application(app, model, world, adapters=adapters)
    refusal = await _carry_out(context, app.metadata.uid, desired)
    counts = desired.counts(world.observed)
    wanted = {role.name: role.replicas for role in desired.serving.roles} if desired.serving else {}
    wanted = wanted or {ROLE_NAME: max(0, app.spec.replicas)}
    if desired.frontends:
        wanted[FRONTEND_ROLE] = desired.frontends
    judgement = _judged(desired, counts, wanted, refusal, first_stuck(world.observed.pods))
    total = Counts()
    for role, each in counts.items():
        total = total.plus(each) if role != FRONTEND_ROLE else total
    if refusal is None and _rolled_out(desired, wanted, counts):
        await _tidy(context, app, desired)
    status: dict[str, Any] = {
        "phase": judgement.phase,
        "replicas": total.replicas,
        "readyReplicas": total.ready,
        "updatedReplicas": total.updated,
        "selector": f"{APPLICATION_LABEL}={key.name},{ROLE_LABEL}=leader",
    }
    driver = desired.driver or app.status.driver
    if driver:
        status["driver"] = driver
    await context.status.write(about(app, entry.version), judgement.conditions, status)
    return REFUSED_AGAIN_S if refusal is not None else RESYNC_S


async def reconcile_disaggregated(context: Context, key: Key) -> float | None:
    watches = context.watches
    entry = watches.disaggregated.entry(key)
    if entry is None:
        context.status.forget(ARKS["ArksDisaggregatedApplication"], *key)
        return None
    app = entry.value
    if app.metadata.deletion_timestamp is not None:
        resource = ARKS["ArksDisaggregatedApplication"]
        await release(context.client, resource, *key, app.metadata.finalizers, entry.version)
        return None
    world = _world(context, key)
    if world is None:
        return UNSETTLED_S
    desired = desired_disaggregated(app, watches.models.get(Key(key.namespace, app.spec.model.name)), world)
    refusal = await _carry_out(context, app.metadata.uid, desired)
    counts = desired.counts(world.observed)
    wanted = {role.name: role.replicas for role in desired.serving.roles} if desired.serving else _asked(app)
    judgement = _judged(desired, counts, wanted, refusal, first_stuck(world.observed.pods))
    if refusal is None and _rolled_out(desired, wanted, counts):
        await _tidy(context, app, desired)
    status: dict[str, Any] = {"phase": judgement.phase}
    for name, role in _STAGES.items():
        found = counts.get(role, Counts())
        status[name] = {
            "replicas": found.replicas,
            "readyReplicas": found.ready,
            "updatedReplicas": found.updated,
        }
    driver = desired.driver or app.status.driver
    if driver:
        status["driver"] = driver
    await context.status.write(about(app, entry.version), judgement.conditions, status)
    return REFUSED_AGAIN_S if refusal is not None else RESYNC_S


def _asked(app: ArksDisaggregatedApplication) -> Mapping[str, int]:
    """Replicas by role, as the spec says them."""
    spec = app.spec
    router = spec.router.replicas
    return {
        ROUTER_ROLE: 1 if router is None or router < 0 else router,
        "prefill": 1 if spec.prefill.replicas is None else max(0, spec.prefill.replicas),
        "decode": 1 if spec.decode.replicas is None else max(0, spec.decode.replicas),
    }


def _world(context: Context, key: Key) -> World | None:
    """None while the stores are behind: a plan made of the past could repeat a step, or take one too many."""
    watches = context.watches
    if not watches.settled:
        return None
    observed = watches.observed(key)
    if context.writer.behind(observed.objects):
        return None
    return World(watches.served(), observed, context.environment)


async def _carry_out(context: Context, uid: str, desired: Desired) -> Refusal | None:
    if desired.blocked is not None:
        return None
    return await context.writer.carry_out(uid, (*desired.objects, *desired.plan.apply), desired.plan.delete)


def _rolled_out(desired: Desired, wanted: Mapping[str, int], counts: Mapping[str, Counts]) -> bool:
    """No pod of an older spec is left, nor one of another workload's."""
    if desired.blocked is not None or desired.moving or desired.plan.rolling:
        return False
    roles = {role: number for role, number in wanted.items() if role != FRONTEND_ROLE}
    found = {role: counts.get(role, Counts()) for role in roles}
    return all(found[role].updated == found[role].replicas == number for role, number in roles.items())


async def _tidy(context: Context, app: ArksApplication | ArksDisaggregatedApplication, desired: Desired) -> None:
    """What an earlier spec needed beside its workload, and the present one does not: another runtime's frontends,
    permissions and discovery. Its pods were the last that used them.
    """
    namespace, name = app.metadata.namespace, app.metadata.name
    made = {(item["kind"], item["metadata"]["name"]) for item in desired.objects}
    for kind, candidate in beside_workloads(name):
        live = context.watches.owned(kind, Key(namespace, candidate))
        if live is not None and (kind, candidate) not in made and owned_by(live, app):
            await context.writer.delete(Deletion(live["apiVersion"], kind, namespace, candidate))


def _judged(
    desired: Desired, counts: Mapping[str, Counts], wanted: Mapping[str, int], refusal: Refusal | None, stuck: str
) -> Judgement:
    """A refusal of the API server is no fault of the precheck: what serves goes on, else the application failed."""
    judgement = judge(desired, counts, wanted, stuck=stuck)
    if refusal is None:
        return judgement
    text = refusal.told("spec")
    by_type = {verdict.type: verdict for verdict in judgement.conditions}
    if by_type["Ready"].status == "True":
        note = Verdict("Degraded", "True", "UnderlayReconcileFailed", text)
        kept = [verdict for verdict in judgement.conditions if verdict.type != "Degraded"]
        return Judgement(judgement.phase, (*kept, note))
    by_type["Ready"] = Verdict("Ready", "False", "UnderlayReconcileFailed", text)
    return Judgement("Failed", tuple(by_type.values()))
