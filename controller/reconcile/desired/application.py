"""ArksApplication: its pods' templates, the workload that runs them, and its Service.

Order of judgement: what is wrong with the resource, what is wrong with its model, what the cluster cannot run.
With a blocking problem nothing is built: whatever runs goes on as it is, until the cause is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from apis.resources import ArksApplication, ArksModel
from controller.engines import dynamo
from controller.engines.accelerator import accelerator_of
from controller.engines.arguments import split_entries
from controller.engines.images import runtime_image
from controller.engines.model import (
    Accelerator,
    GroupVariables,
    Launch,
    LaunchSpec,
    Problem,
    Role,
)
from controller.engines.registry import DEFAULT_RUNTIME, ENGINES, unsupported
from controller.reconcile.desired.gang import gang_of
from controller.reconcile.desired.leftovers import dynamo_account, frontend_name, leftovers, predecessors
from controller.reconcile.desired.metadata import SCRAPED, application_labels, owner_reference
from controller.reconcile.desired.mounts import Weights, mounted_weights
from controller.reconcile.desired.outcome import FRONTEND_ROLE, Desired, World, blocked, rolling
from controller.reconcile.desired.pod import PodInput, instance_dict, pod_template, pull_secrets
from controller.reconcile.desired.precheck import instance_problems, model_problems, name_problems
from controller.reconcile.desired.service import (
    DYNAMO_DISCOVERY,
    dynamo_discovery_service,
    permissions,
    service,
)
from controller.workloads.choice import WORKLOAD_ANNOTATION, choose
from controller.workloads.deployment import deployment
from controller.workloads.model import (
    DYNAMO_METADATA,
    ROLE_LABEL,
    Gang,
    Object,
    RoleGroup,
    Serving,
)

ALLOW_UNKNOWN_ANNOTATION = "arks.ai/allow-unknown-options"
ROLE_NAME = "inference"


def served_name(app: ArksApplication) -> str:
    return app.spec.served_model_name or app.spec.model.name


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
    mounted = mounted_weights(app, model, adapters or {})
    names = name_problems(app.metadata.name, workload.name if workload else "")
    refused = blocked(no_image, bad_gang, missing, *names, *mounted.problems)
    if refused is not None or workload is None:
        return refused or Desired()
    launches = _launches(app, runtime, image, accelerator, size, workload.variables, mounted, world)
    problems = tuple(dict.fromkeys((*((missing,) if missing else ()), *launches.problems)))
    if any(problem.blocking for problem in problems):
        return Desired(problems=problems)
    serving = _serving(app, launches, image, mounted, size, gang)
    plan = workload.build(serving, world.observed)
    objects = (*launches.extra_objects(app, serving, image, mounted), _service(app, launches))
    before = predecessors(app, workload, serving, plan, world.observed, objects)
    leaving = leftovers(workload, serving, world.observed, before)
    plan = replace(plan, delete=(*plan.delete, *leaving), rolling=plan.rolling or bool(before))
    return Desired(
        objects,
        plan,
        (*problems, *plan.problems),
        serving,
        workload,
        launches.leader.metrics_port,
        launches.leader.metrics,
        moving=bool(before),
        frontends=launches.frontends(app),
    )


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

    def frontends(self, app: ArksApplication) -> int:
        return min(max(0, app.spec.replicas), 2) if self.frontend is not None else 0

    def extra_objects(self, app: ArksApplication, serving: Serving, image: str, weights: Weights) -> tuple[Object, ...]:
        """Dynamo's frontends and what its discovery needs; nothing for the other engines."""
        objects: list[Object] = []
        if self.cluster_discovery:
            objects += permissions(app, dynamo_account(app.metadata.name), DYNAMO_DISCOVERY)
            selector = {**_identity(app), ROLE_LABEL: "worker"}
            objects.append(dynamo_discovery_service(app, selector=selector, labels=_identity(app)))
        if self.frontend is not None:
            template = _template(app, self.frontend, image, weights, "leader", account=self.account, bare=True)
            role = RoleGroup(FRONTEND_ROLE, self.frontends(app), 1, template)
            objects.append(deployment(serving, role, frontend_name(app.metadata.name)))
        return tuple(objects)


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
            annotations=weights.annotations,
        )
    )


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
