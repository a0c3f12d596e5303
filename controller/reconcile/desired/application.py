"""ArksApplication: its pods' templates, the workload that runs them, and its Service.

Order of judgement: what is wrong with the resource, what is wrong with its model, what the cluster cannot run.
With a blocking problem nothing is built: whatever runs goes on as it is, until the cause is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from apis.resources import ArksApplication, ArksModel
from apis.resources.workload import RollingUpdate
from controller.engines import dynamo
from controller.engines.accelerator import accelerator_of
from controller.engines.arguments import split_entries
from controller.engines.images import runtime_image
from controller.engines.model import (
    MODELS_MOUNT,
    SERVING_PORT,
    Accelerator,
    GroupVariables,
    Launch,
    LaunchSpec,
    LoraAdapter,
    MetricNames,
    Problem,
    Role,
)
from controller.engines.registry import DEFAULT_RUNTIME, ENGINES, unsupported
from controller.reconcile.desired.gang import gang_of
from controller.reconcile.desired.metadata import SCRAPED, application_labels, owned_by, owner_reference
from controller.reconcile.desired.pod import PodInput, instance_dict, pod_template
from controller.reconcile.desired.precheck import instance_problems, model_problems, name_problems
from controller.reconcile.desired.service import (
    DYNAMO_DISCOVERY,
    dynamo_discovery_service,
    permissions,
    service,
)
from controller.reconcile.desired.storage import MODELS_VOLUME, storage_of
from controller.workloads.choice import WORKLOAD_ANNOTATION, choose
from controller.workloads.deployment import deployment
from controller.workloads.model import (
    DYNAMO_METADATA,
    GVK,
    ROLE_LABEL,
    Counts,
    Deletion,
    Gang,
    Object,
    Observed,
    Plan,
    RoleGroup,
    Serving,
    Surge,
    Workload,
    pods_serving,
)

ALLOW_UNKNOWN_ANNOTATION = "arks.ai/allow-unknown-options"
ROLE_NAME = "inference"
_KINDS_OF_OURS = ("Deployment", "LeaderWorkerSet", "RoleBasedGroup")


@dataclass(frozen=True, slots=True)
class World:
    """What the functions may know of the cluster besides the resource itself."""

    served: AbstractSet[GVK]
    observed: Observed = field(default_factory=Observed)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Desired:
    """``objects`` to apply beside the plan's; ``driver`` is the workload's name for the status."""

    objects: tuple[Object, ...] = ()
    plan: Plan = field(default_factory=Plan)
    problems: tuple[Problem, ...] = ()
    serving: Serving | None = None
    workload: Workload | None = None
    metrics_port: int = SERVING_PORT
    metrics: MetricNames = field(default_factory=MetricNames)

    @property
    def blocked(self) -> Problem | None:
        return next((problem for problem in self.problems if problem.blocking), None)

    @property
    def driver(self) -> str:
        return self.workload.name if self.workload else ""

    def counts(self, observed: Observed) -> Mapping[str, Counts]:
        """Per role, over all groups; when blocked, what the pods themselves tell."""
        if self.workload is None or self.serving is None:
            return pods_serving(observed.pods)
        return self.workload.status(self.serving, observed)


def served_name(app: ArksApplication) -> str:
    return app.spec.served_model_name or app.spec.model.name


def rolling(given: RollingUpdate | None) -> Surge | None:
    return Surge(given.max_unavailable, given.max_surge, given.partition) if given is not None else None


def blocked(*problems: Problem | None) -> Desired | None:
    found = tuple(problem for problem in problems if problem is not None)
    return Desired(problems=found) if any(problem.blocking for problem in found) else None


def desired_application(
    app: ArksApplication,
    model: ArksModel | None,
    world: World,
    *,
    adapters: Mapping[str, ArksModel] | None = None,
) -> Desired:
    """``adapters`` are the ArksModels that ``spec.loraAdapters`` names, by name, as far as they exist."""
    spec = app.spec
    runtime = spec.runtime or DEFAULT_RUNTIME
    refused = blocked(
        unsupported(runtime),
        *name_problems(app.metadata.name),
        *instance_problems(spec.instance_spec, "spec.instanceSpec"),
        *model_problems(model, spec.model.name),
    )
    if refused is not None or model is None:
        return refused or Desired()
    accelerator = accelerator_of(instance_dict(spec.instance_spec), app.metadata.annotations)
    image, no_image = runtime_image(runtime, accelerator, given=spec.runtime_image, environment=world.environment)
    gang, bad_gang = gang_of(spec.pod_group_policy)
    size = max(1, spec.size)
    workload, missing = choose(
        world.served,
        world.observed,
        application=app.metadata.name,
        size=size,
        preferred=app.metadata.annotations.get(WORKLOAD_ANNOTATION, ""),
    )
    mounted = _mounted_weights(app, model, adapters or {})
    refused = blocked(no_image, bad_gang, missing, *mounted.problems)
    if refused is not None or workload is None:
        return refused or Desired()
    launches = _launches(app, runtime, image, accelerator, size, workload.variables, mounted, world)
    problems = tuple(dict.fromkeys((*((missing,) if missing else ()), *launches.problems)))
    if any(problem.blocking for problem in problems):
        return Desired(problems=problems)
    serving = _serving(app, launches, image, mounted, size, gang)
    plan = workload.build(serving, world.observed)
    objects = (*launches.extra_objects(app, serving, image, mounted), _service(app, launches))
    leaving = _leftovers(app, workload, serving, plan, world.observed)
    plan = Plan(plan.apply, (*plan.delete, *leaving), plan.problems, plan.rolling or bool(leaving))
    return Desired(
        objects,
        plan,
        (*problems, *plan.problems),
        serving,
        workload,
        launches.leader.metrics_port,
        launches.leader.metrics,
    )


@dataclass(frozen=True, slots=True)
class Weights:
    """Volumes and mounts of the base model and its adapters."""

    path: str = ""
    volumes: tuple[Object, ...] = ()
    mounts: tuple[Object, ...] = ()
    adapters: tuple[LoraAdapter, ...] = ()
    problems: tuple[Problem, ...] = ()


def mounted_model(model: ArksModel) -> Weights:
    storage, problem = storage_of(model)
    if storage is None:
        return Weights(problems=(problem,) if problem else ())
    mount = {"name": MODELS_VOLUME, "mountPath": MODELS_MOUNT, "readOnly": True}
    return Weights(storage.path, (storage.volume(),), (mount,))


def _mounted_weights(app: ArksApplication, model: ArksModel, known: Mapping[str, ArksModel]) -> Weights:
    base = mounted_model(model)
    if base.problems:
        return base
    volumes, mounts, adapters = list(base.volumes), list(base.mounts), []
    problems: list[Problem] = []
    for index, wanted in enumerate(app.spec.lora_adapters):
        path = f"spec.loraAdapters[{index}].model.name"
        found = known.get(wanted.model.name)
        state = model_problems(found, wanted.model.name)
        if state or found is None:
            problems += [Problem(item.reason, path, item.message) for item in state]
            continue
        mount = f"/adapters/{index}"
        storage, problem = storage_of(found, mount=mount)
        if storage is None:
            problems += [problem] if problem else []
            continue
        same = storage.source == {key: value for key, value in volumes[0].items() if key != "name"}
        name = MODELS_VOLUME if same else f"adapter-{index}"
        if not same:
            volumes.append(storage.volume(name))
        mounts.append({"name": name, "mountPath": mount, "readOnly": True})
        adapters.append(LoraAdapter(wanted.name, storage.path))
    return Weights(base.path, tuple(volumes), tuple(mounts), tuple(adapters), tuple(problems))


@dataclass(frozen=True, slots=True)
class Launches:
    """How the leader, the workers, and (Dynamo with discovery) the frontends run."""

    leader: Launch
    worker: Launch | None
    frontend: Launch | None
    cluster_discovery: bool

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(p for item in (self.leader, self.worker, self.frontend) if item for p in item.problems)

    @property
    def account(self) -> bool:
        return self.cluster_discovery

    def extra_objects(self, app: ArksApplication, serving: Serving, image: str, weights: Weights) -> tuple[Object, ...]:
        """Dynamo's frontends and what its discovery needs; nothing for the other engines."""
        objects: list[Object] = []
        if self.cluster_discovery:
            objects += permissions(app, dynamo_account(app.metadata.name), DYNAMO_DISCOVERY)
            selector = {**_identity(app), ROLE_LABEL: "worker"}
            objects.append(dynamo_discovery_service(app, selector=selector, labels=_identity(app)))
        if self.frontend is not None:
            replicas = min(max(0, app.spec.replicas), 2)
            template = _template(app, self.frontend, image, weights, "leader", account=self.account, bare=True)
            role = RoleGroup("frontend", replicas, 1, template)
            objects.append(deployment(serving, role, f"{app.metadata.name}-frontend"))
        return tuple(objects)


def dynamo_account(application: str) -> str:
    return f"arks-dynamo-{application}"


def _launches(
    app: ArksApplication,
    runtime: str,
    image: str,
    accelerator: Accelerator,
    size: int,
    variables: GroupVariables,
    weights: Weights,
    world: World,
) -> Launches:
    spec = app.spec
    names = frozenset(item.name for item in spec.instance_spec.env or ())
    known = names | {variables.leader_address, variables.rank, "LWS_GROUP_SIZE"}

    def facts(role: Role) -> LaunchSpec:
        return LaunchSpec(
            namespace=app.metadata.namespace,
            application=app.metadata.name,
            role=role,
            model_path=weights.path,
            served_name=served_name(app),
            image=image,
            size=size,
            tensor_parallel=spec.tensor_parallel_size,
            pipeline_parallel=spec.pipeline_parallel_size,
            args=split_entries(spec.runtime_common_args, known),
            accelerator=accelerator,
            group=variables,
            lora=weights.adapters,
            grace_s=spec.instance_spec.termination_grace_period_seconds,
            env_names=names,
            cluster_discovery=DYNAMO_METADATA in world.served,
            allow_unknown=app.metadata.annotations.get(ALLOW_UNKNOWN_ANNOTATION) == "true",
        )

    leader_facts = facts(Role.LEADER if size > 1 else Role.SINGLE)
    launch = ENGINES[runtime]
    leader = launch(leader_facts)
    worker = launch(facts(Role.WORKER)) if size > 1 else None
    found = dynamo.discovery(leader_facts) if runtime == "dynamo" else dynamo.Discovery.POD
    frontend = dynamo.frontend(leader_facts) if found is not dynamo.Discovery.POD else None
    return Launches(leader, worker, frontend, found is dynamo.Discovery.CLUSTER)


def _identity(app: ArksApplication) -> dict[str, str]:
    return application_labels(app, app.spec.model.name)


def _template(
    app: ArksApplication,
    launch: Launch,
    image: str,
    weights: Weights,
    role: str,
    *,
    serves: bool = True,
    account: bool = False,
    bare: bool = False,
) -> Object:
    """``bare``: a frontend, which needs neither the engine's devices nor its probes."""
    instance = app.spec.instance_spec
    if bare:
        instance = instance.model_copy(
            update={"resources": None, "liveness_probe": None, "readiness_probe": None, "startup_probe": None}
        )
    return pod_template(
        PodInput(
            launch=launch,
            instance=instance,
            image=image,
            labels={**_identity(app), ROLE_LABEL: role},
            volumes=weights.volumes,
            mounts=weights.mounts,
            pull_secrets=pull_secrets(app.spec.runtime_image_pull_secrets),
            serves=serves,
            service_account=dynamo_account(app.metadata.name) if account else "",
            shared_memory=not bare,
        )
    )


def pull_secrets(references: Sequence[object]) -> list[Object]:
    return [{"name": getattr(item, "name", "")} for item in references]


def _serving(
    app: ArksApplication, launches: Launches, image: str, weights: Weights, size: int, gang: Gang | None
) -> Serving:
    # Behind frontends of their own, engines answer no client: every one of them is a worker to the Service.
    role = "worker" if launches.frontend is not None else "leader"
    leader = _template(app, launches.leader, image, weights, role, account=launches.account)
    worker = None
    if launches.worker is not None:
        worker = _template(app, launches.worker, image, weights, "worker", serves=False, account=launches.account)
    group = RoleGroup(ROLE_NAME, max(0, app.spec.replicas), size, leader, worker, rolling(app.spec.rolling_update))
    return Serving(
        namespace=app.metadata.namespace,
        name=app.metadata.name,
        owner=owner_reference(app),
        labels=_identity(app),
        roles=(group,),
        gang=gang,
    )


def _service(app: ArksApplication, launches: Launches) -> Object:
    speaker = launches.frontend or launches.leader
    return service(
        app,
        labels={**_identity(app), **SCRAPED},
        selector={"arks.ai/application": app.metadata.name, ROLE_LABEL: "leader"},
        target_port=speaker.serving_port,
    )


def _leftovers(
    app: ArksApplication, workload: Workload, serving: Serving, plan: Plan, observed: Observed
) -> tuple[Deletion, ...]:
    """Objects of a workload that ran this application before; they go once the new one serves."""
    if serving.roles[0].replicas and workload.status(serving, observed)[ROLE_NAME].ready == 0:
        return ()
    ours = {(item["kind"], item["metadata"]["name"]) for item in plan.apply}
    ours |= {(item.kind, item.name) for item in plan.delete} | {("Deployment", f"{serving.name}-frontend")}
    kinds = {kind.kind for kind in workload.kinds}
    return tuple(
        Deletion(item["apiVersion"], item["kind"], serving.namespace, item["metadata"]["name"])
        for item in observed.objects
        if item["kind"] in _KINDS_OF_OURS
        and (item["kind"], item["metadata"]["name"]) not in ours
        and not (workload.name == "rbg" and item["kind"] in kinds)
        and owned_by(item, app)
    )
