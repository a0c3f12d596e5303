"""ArksDisaggregatedApplication: prefill and decode groups, the router before them, its permissions, its Service.

One workload runs all three, so one change rolls each role by itself. The router's port is one value, read from
``router.port`` or from ``router.int32`` (Arks' name for it), and goes to its command, its probes, its Service's
target and its container port alike; routes always speak to the Service's port.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from apis.resources import ArksDisaggregatedApplication, ArksModel
from apis.resources.disaggregated import DisaggregatedRole
from controller.engines import router
from controller.engines.accelerator import accelerator_of
from controller.engines.arguments import split_entries
from controller.engines.images import router_image, runtime_image
from controller.engines.model import GroupVariables, Launch, LaunchSpec, Problem, Role, Stage
from controller.engines.registry import DEFAULT_DISAGGREGATED_RUNTIME, ENGINES, unsupported
from controller.reconcile.desired.application import ALLOW_UNKNOWN_ANNOTATION
from controller.reconcile.desired.gang import gang_of
from controller.reconcile.desired.leftovers import dynamo_account, leftovers, predecessors, router_account
from controller.reconcile.desired.metadata import application_labels, owner_reference
from controller.reconcile.desired.mounts import Weights, mounted_model
from controller.reconcile.desired.outcome import Desired, World, blocked, rolling
from controller.reconcile.desired.pod import PodInput, instance_dict, pod_template, pull_secrets
from controller.reconcile.desired.precheck import instance_problems, model_problems, name_problems
from controller.reconcile.desired.service import (
    DYNAMO_DISCOVERY,
    POD_READER,
    dynamo_discovery_service,
    permissions,
    service,
)
from controller.workloads.choice import WORKLOAD_ANNOTATION, choose
from controller.workloads.lws import ROUTER_ROLE
from controller.workloads.model import DYNAMO_METADATA, ROLE_LABEL, STAGE_LABEL, Object, RoleGroup, Serving

_STAGES = ("prefill", "decode")


def desired_disaggregated(app: ArksDisaggregatedApplication, model: ArksModel | None, world: World) -> Desired:
    spec = app.spec
    runtime = spec.runtime or DEFAULT_DISAGGREGATED_RUNTIME
    refused = blocked(
        unsupported(runtime),
        *instance_problems(spec.router.instance_spec, "spec.router.instanceSpec"),
        *instance_problems(spec.prefill.instance_spec, "spec.prefill.instanceSpec"),
        *instance_problems(spec.decode.instance_spec, "spec.decode.instanceSpec"),
        *model_problems(model, spec.model.name),
    )
    if refused is not None or model is None:
        return refused or Desired()
    builder = _Builder(app, runtime, mounted_model(model), world)
    return builder.desired()


class _Builder:
    """One pass over one resource; holds what every step needs."""

    def __init__(self, app: ArksDisaggregatedApplication, runtime: str, weights: Weights, world: World) -> None:
        self._app = app
        self._runtime = runtime
        self._weights = weights
        self._world = world
        self._identity = application_labels(app, app.spec.model.name)
        self._served = app.spec.served_model_name or app.spec.model.name
        self._allow_unknown = app.metadata.annotations.get(ALLOW_UNKNOWN_ANNOTATION) == "true"
        self._cluster_discovery = DYNAMO_METADATA in world.served

    def desired(self) -> Desired:
        spec, world = self._app.spec, self._world
        images: dict[str, str] = {}
        bad: list[Problem | None] = [*self._weights.problems]
        for stage in _STAGES:
            images[stage], problem = self._image(self._stage(stage))
            bad.append(problem)
        images["router"], problem = router_image(
            self._runtime, given=spec.router_image, engine_image=images["decode"], environment=world.environment
        )
        gang, bad_gang = gang_of(spec.pod_group_policy)
        workload, missing = choose(
            world.served,
            world.observed,
            application=self._app.metadata.name,
            size=max(1, spec.prefill.size, spec.decode.size),
            disaggregated=True,
            preferred=self._app.metadata.annotations.get(WORKLOAD_ANNOTATION, ""),
        )
        names = name_problems(self._app.metadata.name, workload.name if workload else "", disaggregated=True)
        refused = blocked(*bad, problem, bad_gang, missing, *names)
        if refused is not None or workload is None:
            return refused or Desired()
        variables = workload.variables
        launches = {stage: self._stage_launches(stage, images[stage], variables) for stage in _STAGES}
        front = self._router_launch(images["router"], variables)
        found = [front, *(item for pair in launches.values() for item in pair if item is not None)]
        problems = tuple(dict.fromkeys(p for p in (missing, *(q for item in found for q in item.problems)) if p))
        if any(item.blocking for item in problems):
            return Desired(problems=problems)
        roles = [self._router_role(front, images["router"])]
        roles += [self._stage_role(stage, launches[stage], images[stage]) for stage in _STAGES]
        serving = Serving(
            namespace=self._app.metadata.namespace,
            name=self._app.metadata.name,
            owner=owner_reference(self._app),
            labels=self._identity,
            roles=tuple(roles),
            disaggregated=True,
            gang=gang,
        )
        plan = workload.build(serving, world.observed)
        objects = (*self._permissions(), *self._discovery(), self._service(front))
        before = predecessors(self._app, workload, serving, plan, world.observed, objects)
        leaving = leftovers(workload, serving, world.observed, before)
        plan = replace(plan, delete=(*plan.delete, *leaving), rolling=plan.rolling or bool(before))
        return Desired(
            objects,
            plan,
            (*problems, *plan.problems),
            serving,
            workload,
            front.metrics_port,
            front.metrics,
            moving=bool(before),
        )

    def _stage(self, name: str) -> DisaggregatedRole:
        return self._app.spec.prefill if name == "prefill" else self._app.spec.decode

    def _image(self, role: DisaggregatedRole) -> tuple[str, Problem | None]:
        accelerator = accelerator_of(instance_dict(role.instance_spec), self._app.metadata.annotations)
        given = self._app.spec.runtime_image
        return runtime_image(
            self._runtime, accelerator, given=given, environment=self._world.environment, disaggregated=True
        )

    def _facts(self, stage: str, role: Role, image: str, variables: GroupVariables) -> LaunchSpec:
        given = self._stage(stage)
        instance = given.instance_spec
        names = frozenset(item.name for item in (instance.env if instance and instance.env else ()))
        known = names | {variables.leader_address, variables.rank, "LWS_GROUP_SIZE"}
        return LaunchSpec(
            namespace=self._app.metadata.namespace,
            application=self._app.metadata.name,
            role=role,
            stage=Stage(stage),
            model_path=self._weights.path,
            served_name=self._served,
            image=image,
            size=max(1, given.size),
            args=split_entries(given.runtime_common_args, known),
            args_field=f"spec.{stage}.runtimeCommonArgs",
            accelerator=accelerator_of(instance_dict(instance), self._app.metadata.annotations),
            group=variables,
            grace_s=instance.termination_grace_period_seconds if instance else None,
            env_names=names,
            cluster_discovery=self._cluster_discovery,
            allow_unknown=self._allow_unknown,
        )

    def _stage_launches(self, stage: str, image: str, variables: GroupVariables) -> tuple[Launch, Launch | None]:
        several = self._stage(stage).size > 1
        launch = ENGINES[self._runtime]
        leader = launch(self._facts(stage, Role.LEADER if several else Role.SINGLE, image, variables))
        return leader, launch(self._facts(stage, Role.WORKER, image, variables)) if several else None

    def _router_launch(self, image: str, variables: GroupVariables) -> Launch:
        spec = self._app.spec.router
        instance = spec.instance_spec
        shared = self._facts("decode", Role.SINGLE, image, variables)
        facts = LaunchSpec(
            namespace=shared.namespace,
            application=shared.application,
            role=Role.SINGLE,
            model_path=shared.model_path,
            served_name=shared.served_name,
            image=image,
            args_field="spec.router.routerArgs",
            grace_s=instance.termination_grace_period_seconds if instance else None,
            env_names=shared.env_names | {item.name for item in (instance.env if instance and instance.env else ())},
            cluster_discovery=self._cluster_discovery,
            allow_unknown=self._allow_unknown,
        )
        return router.launch(
            router.RouterSpec(
                engine=facts,
                runtime=self._runtime,
                port=spec.port or spec.int32 or router.DEFAULT_PORT,
                metrics_port=spec.metric_port or router.DEFAULT_METRICS_PORT,
                args=split_entries(spec.router_args, facts.env_names),
                prefill_selector=self._leaders("prefill"),
                decode_selector=self._leaders("decode"),
            )
        )

    def _leaders(self, stage: str) -> dict[str, str]:
        return {**self._identity, STAGE_LABEL: stage, ROLE_LABEL: "leader"}

    def _router_role(self, launch: Launch, image: str) -> RoleGroup:
        spec = self._app.spec.router
        replicas = 1 if spec.replicas is None or spec.replicas < 0 else spec.replicas
        template = pod_template(
            PodInput(
                launch=launch,
                instance=spec.instance_spec,
                image=image,
                labels={**self._identity, STAGE_LABEL: "router"},
                # Dynamo's frontend tokenizes; the other routers need no weights, and no claim ties them to a node.
                volumes=self._weights.volumes if self._runtime == "dynamo" else (),
                mounts=self._weights.mounts if self._runtime == "dynamo" else (),
                pull_secrets=self._pull_secrets(),
                override=spec.command_override,
                override_variable="ARKS_ROUTER_COMMAND",
                service_account=self._account("router"),
                shared_memory=False,
                annotations=self._weights.annotations if self._runtime == "dynamo" else {},
            )
        )
        return RoleGroup(ROUTER_ROLE, replicas, 1, template)

    def _stage_role(self, stage: str, launches: tuple[Launch, Launch | None], image: str) -> RoleGroup:
        given = self._stage(stage)
        leader, worker = launches

        def template(launch: Launch, role: str, override: Sequence[str]) -> Object:
            return pod_template(
                PodInput(
                    launch=launch,
                    instance=given.instance_spec,
                    image=image,
                    labels={**self._identity, STAGE_LABEL: stage, ROLE_LABEL: role},
                    volumes=self._weights.volumes,
                    mounts=self._weights.mounts,
                    pull_secrets=self._pull_secrets(),
                    override=override,
                    override_variable=f"ARKS_{role.upper()}_COMMAND",
                    serves=role == "leader",
                    service_account=self._account(stage),
                    annotations=self._weights.annotations,
                )
            )

        return RoleGroup(
            stage,
            1 if given.replicas is None else max(0, given.replicas),
            max(1, given.size),
            template(leader, "leader", given.leader_command_override),
            template(worker, "worker", given.worker_command_override) if worker else None,
            rolling(given.rolling_update),
        )

    def _pull_secrets(self) -> list[Object]:
        return pull_secrets(self._app.spec.runtime_image_pull_secrets)

    def _account(self, who: str) -> str:
        """The ServiceAccount for pods that read the Kubernetes API; empty where the namespace's default will do."""
        if self._runtime == "dynamo":
            return dynamo_account(self._app.metadata.name) if self._cluster_discovery else ""
        return router_account(self._app.metadata.name) if who == "router" else ""

    def _permissions(self) -> tuple[Object, ...]:
        account = self._account("router")
        instance = self._app.spec.router.instance_spec
        if not account or (self._runtime != "dynamo" and instance is not None and instance.service_account_name):
            return ()
        rules = DYNAMO_DISCOVERY if self._runtime == "dynamo" else POD_READER
        return permissions(self._app, account, rules)

    def _discovery(self) -> tuple[Object, ...]:
        if self._runtime != "dynamo" or not self._cluster_discovery:
            return ()
        selector = {**self._identity, ROLE_LABEL: "leader"}
        return (dynamo_discovery_service(self._app, selector=selector, labels=self._identity),)

    def _service(self, front: Launch) -> Object:
        """Port 8080 whatever the router's own is: routes and dashboards know the application by it."""
        return service(
            self._app,
            labels=self._identity,
            selector={**self._identity, STAGE_LABEL: "router"},
            target_port=front.serving_port,
            metrics_port=front.metrics_port,
        )
