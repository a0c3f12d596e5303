"""Everything that the controller knows of the cluster: one store per kind, each kept by a reflector.

All replicas watch, so that a new leader starts at once. Kinds of other projects are watched from the moment discovery
finds them, and forgotten when they go. Stores are read synchronously; `subscribe` tells of every change, after the
store has it. Life cycle: `run()` is a task of the owner; `synced()` returns when the first picture is whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeAlias, TypeVar

from apis.fragments import SecretFragment
from apis.resources import ArksApplication, ArksDisaggregatedApplication, ArksEndpoint, ArksModel, ArksQuota
from apis.resources.base import LocalObjectReference
from apis.resources.model import HubSource, OciSource, S3Source
from controller.kube import resource as core
from controller.kube.client import Client, Decode, Object
from controller.kube.discovery import Discovery
from controller.kube.reflector import Reflector
from controller.kube.resource import Key, Resource
from controller.kube.store import Store
from controller.reconcile import kinds
from controller.reconcile.desired.application import served_name
from controller.reconcile.desired.storage import storage_of
from controller.reconcile.objects import (
    decode_node,
    decode_object,
    decode_pod,
    decode_resource,
    decode_secret,
    owners,
)
from controller.reconcile.tokens import Holders, TokenView, decode_token
from controller.workloads.model import APPLICATION_LABEL, GVK, MODEL_LABEL, Observed

T = TypeVar("T")
Changed: TypeAlias = Callable[[str, Key, Any, Any], None]  # kind, key, new, old
Malformed: TypeAlias = Callable[[str, Key], None]

SOFT_SYNC_S = 10.0
# Releases, certificates and account tokens are large, many, and never what a token or a model refers to.
_SECRETS = "type!=helm.sh/release.v1,type!=kubernetes.io/tls,type!=kubernetes.io/service-account-token"


class Watches:
    """Stores by kind. One per process."""

    def __init__(self, client: Client, discovery: Discovery) -> None:
        self._client, self._discovery = client, discovery
        self._changed: list[Changed] = []
        self._malformed: list[Malformed] = []
        self._served_changed = asyncio.Event()
        self._served_changed.set()
        self._tasks: dict[kinds.Installed, tuple[Resource, asyncio.Task[None]]] = {}
        self.reflectors: dict[str, Reflector[Any]] = {}

        self.applications: Store[ArksApplication] = Store(
            served=lambda app: [(app.metadata.namespace, served_name(app))], model=_models_of
        )
        self.disaggregated: Store[ArksDisaggregatedApplication] = Store(served=_pair_serves, model=_model_of_pair)
        self.endpoints: Store[ArksEndpoint] = Store(model=_endpoint_models, gateway=_gateway_of)
        self.models: Store[ArksModel] = Store(secret=_secrets_of, claim=_claim_of)
        self.quotas: Store[ArksQuota] = Store(name=lambda quota: [quota.metadata.name])
        self.secrets: Store[SecretFragment] = Store()
        self.tokens: Store[TokenView] = Store(endpoint=_granted, quota=_budgets, secret=_sealed)
        self.holders = Holders(self.secrets)
        self.pods: Store[Object] = Store(application=_labelled_application, model=_loader_of)
        self.claims: Store[Object] = Store()
        self.jobs: Store[Object] = Store(owner=_owner_uids)
        self.nodes: Store[Object] = Store()
        self.services: Store[Object] = Store()
        self.deployments: Store[Object] = Store(application=applications_of)
        self._owned: dict[str, Store[Object]] = {
            "Service": self.services,
            "Deployment": self.deployments,
            "PersistentVolumeClaim": self.claims,
            "Job": self.jobs,
        }
        for permission in (core.SERVICE_ACCOUNTS, kinds.ROLES, kinds.ROLE_BINDINGS):
            self._owned[permission.kind] = Store()
        for kind in kinds.INSTALLED:
            self._owned[kind.kind] = Store(application=applications_of)
        self.routes, self.gateways = self._owned["HTTPRoute"], self._owned["Gateway"]
        self._always()

    def _always(self) -> None:
        ours = kinds.ARKS
        self._reflect(ours["ArksApplication"], self.applications, decode_resource(ArksApplication))
        self._reflect(
            ours["ArksDisaggregatedApplication"], self.disaggregated, decode_resource(ArksDisaggregatedApplication)
        )
        self._reflect(ours["ArksEndpoint"], self.endpoints, decode_resource(ArksEndpoint))
        self._reflect(ours["ArksModel"], self.models, decode_resource(ArksModel))
        self._reflect(ours["ArksQuota"], self.quotas, decode_resource(ArksQuota))
        # A token that became unreadable must not stay valid in its last good form.
        self._reflect(ours["ArksToken"], self.tokens, decode_token, keep_last_good=False)
        self._reflect(core.SECRETS, self.secrets, decode_secret, fields=_SECRETS, keep_last_good=False)
        self._reflect(core.PODS, self.pods, decode_pod, labels=MODEL_LABEL)
        self._reflect(core.NODES, self.nodes, decode_node)
        for resource, labels in (
            (core.SERVICES, APPLICATION_LABEL),
            (core.DEPLOYMENTS, APPLICATION_LABEL),
            (core.PERSISTENT_VOLUME_CLAIMS, ""),
            (core.JOBS, MODEL_LABEL),
            (core.SERVICE_ACCOUNTS, "managed-by=arks"),
            (kinds.ROLES, "managed-by=arks"),
            (kinds.ROLE_BINDINGS, "managed-by=arks"),
        ):
            self._reflect(resource, self._owned[resource.kind], decode_object(resource), labels=labels)

    # -- what reconcilers ask -----------------------------------------------------------------------------------------

    def owned(self, kind: str, key: Key) -> Object | None:
        return self._owned[kind].get(key) if kind in self._owned else None

    def observed(self, key: Key) -> Observed:
        """Workloads and pods of one application."""
        found: list[Object] = list(self.deployments.by("application", key))
        for kind in kinds.INSTALLED:
            found += self._owned[kind.kind].by("application", key)
        return Observed(tuple(found), tuple(self.pods.by("application", key)))

    def served(self) -> frozenset[GVK]:
        """Workload APIs that this cluster offers."""
        found = [kind for kind in kinds.CHOSEN_FROM if self._discovery.find(kind.group, kind.kind, (kind.version,))]
        return frozenset(found)

    def serves(self, group: str, kind: str) -> bool:
        return self._discovery.find(group, kind) is not None

    def find(self, api_version: str, kind: str) -> Resource | None:
        group, _, version = api_version.rpartition("/")
        return self._discovery.find(group, kind, (version,))

    @property
    def settled(self) -> bool:
        """Are the kinds that discovery knows watched, and their stores filled? If not, plans must wait."""
        for kind in kinds.INSTALLED:
            resource = self._discovery.find(kind.group, kind.kind, kind.versions)
            running = self._tasks.get(kind)
            if (resource is None) != (running is None) or (running and running[0] != resource):
                return False
        return all(self.reflectors[kind.kind].synced.is_set() for kind in self._tasks)

    @property
    def secrets_known(self) -> bool:
        """False where we may not read Secrets, or not yet: then none counts as missing."""
        return self.reflectors["Secret"].synced.is_set()

    def malformed(self, kind: str, key: Key) -> str:
        """What is wrong with an object that does not decode; empty if nothing is."""
        return self.reflectors[kind].malformed.get(key, "")

    def unsynced(self) -> list[str]:
        """Kinds whose first picture is not there yet."""
        waiting = [name for name, reflector in self.reflectors.items() if not reflector.synced.is_set()]
        return [name for name in waiting if name != "Secret"]

    def uninstalled(self) -> list[str]:
        """Kinds of our own that the cluster does not know."""
        return [kind for kind in kinds.ARKS if self.reflectors[kind].absent]

    # -- life ---------------------------------------------------------------------------------------------------------

    def subscribe(self, changed: Changed, malformed: Malformed) -> None:
        self._changed.append(changed)
        self._malformed.append(malformed)

    def unsubscribe(self, changed: Changed, malformed: Malformed) -> None:
        self._changed.remove(changed)
        self._malformed.remove(malformed)

    async def synced(self) -> None:
        """Wait for the first whole picture. Secrets are waited for a while only: we may not be allowed to see them."""
        await self._discovery.ready.wait()
        while not self.settled or self.unsynced():  # noqa: ASYNC110 - kinds come and go: no one event tells of all
            await asyncio.sleep(0.02)
        try:
            async with asyncio.timeout(SOFT_SYNC_S):
                await self.reflectors["Secret"].synced.wait()
        except TimeoutError:
            return

    async def run(self) -> None:
        """Watch for ever."""
        self._discovery.subscribe(self._served_changed.set)
        async with asyncio.TaskGroup() as group:
            for reflector in list(self.reflectors.values()):
                group.create_task(reflector.run(), name=f"watch {reflector.resource}")
            await self._discovery.ready.wait()
            while True:
                await self._served_changed.wait()
                self._served_changed.clear()
                await self._follow(group)

    async def _follow(self, group: asyncio.TaskGroup) -> None:
        """Start and stop the watches of installed kinds, as discovery has it now."""
        for kind in kinds.INSTALLED:
            resource = self._discovery.find(kind.group, kind.kind, kind.versions)
            running = self._tasks.get(kind)
            if running is not None and running[0] != resource:
                running[1].cancel()
                await asyncio.wait([running[1]])
                del self._tasks[kind]
                self._forget(kind.kind)
                running = None
            if running is None and resource is not None:
                reflector = self._reflect(resource, self._owned[kind.kind], decode_object(resource))
                self._tasks[kind] = (resource, group.create_task(reflector.run(), name=f"watch {resource}"))
        self._tell("", Key("", ""), None, None)

    def _forget(self, kind: str) -> None:
        """The kind is gone, or comes in another version: its objects are no longer known."""
        store = self._owned[kind]
        for key in list(store):
            old = store.pop(key)
            self._tell(kind, key, None, old.value if old else None)
        del self.reflectors[kind]

    def _reflect(
        self,
        resource: Resource,
        store: Store[T],
        decode: Decode[T],
        *,
        labels: str = "",
        fields: str = "",
        keep_last_good: bool = True,
    ) -> Reflector[T]:
        kind = resource.kind

        def changed(key: Key, new: T | None, old: T | None) -> None:
            self._tell(kind, key, new, old)

        def malformed(key: Key, _what: str) -> None:
            for subscriber in list(self._malformed):
                subscriber(kind, key)

        reflector = Reflector(
            self._client,
            resource,
            decode,
            store=store,
            label_selector=labels,
            field_selector=fields,
            on_change=changed,
            on_malformed=malformed,
            keep_last_good=keep_last_good,
        )
        self.reflectors[kind] = reflector
        return reflector

    def _tell(self, kind: str, key: Key, new: Any, old: Any) -> None:
        if kind == "ArksToken":
            self._hold(key, new)
        elif kind == "Secret":
            for holder in self.tokens.keys_by("secret", (key.namespace, key.name)):
                self._hold(holder, self.tokens.get(holder))
        for subscriber in list(self._changed):
            subscriber(kind, key, new, old)

    def _hold(self, key: Key, token: TokenView | None) -> None:
        """Tokens that share a secret hear of each other."""
        for peer in self.holders.update(key, token):
            known = self.tokens.get(peer)
            for subscriber in list(self._changed):
                subscriber("ArksToken", peer, known, known)


# -- indices ----------------------------------------------------------------------------------------------------------


def _models_of(app: ArksApplication) -> Iterable[Hashable]:
    names = {app.spec.model.name, *(adapter.model.name for adapter in app.spec.lora_adapters)}
    return [(app.metadata.namespace, name) for name in names]


def _pair_serves(app: ArksDisaggregatedApplication) -> Iterable[Hashable]:
    return [(app.metadata.namespace, app.spec.served_model_name or app.spec.model.name)]


def _model_of_pair(app: ArksDisaggregatedApplication) -> Iterable[Hashable]:
    return [(app.metadata.namespace, app.spec.model.name)]


def _endpoint_models(endpoint: ArksEndpoint) -> Iterable[Hashable]:
    names = {endpoint.metadata.name, endpoint.spec.model_name or endpoint.metadata.name}
    return [(endpoint.metadata.namespace, name) for name in names]


def _gateway_of(endpoint: ArksEndpoint) -> Iterable[Hashable]:
    reference = endpoint.spec.gateway_ref
    return [(reference.namespace or endpoint.metadata.namespace, reference.name)]


def model_secrets(model: ArksModel) -> list[tuple[str, LocalObjectReference]]:
    """The Secrets that a model's download needs, by the field that names them."""
    source = model.spec.source
    if source is None:
        return []
    found: list[tuple[str, LocalObjectReference]] = []
    for name, hub in (("huggingface", source.huggingface), ("modelscope", source.modelscope)):
        if isinstance(hub, HubSource) and hub.token_secret_ref is not None:
            found.append((f"spec.source.{name}.tokenSecretRef.name", hub.token_secret_ref))
    if isinstance(source.s3, S3Source) and source.s3.credentials_secret_ref is not None:
        found.append(("spec.source.s3.credentialsSecretRef.name", source.s3.credentials_secret_ref))
    if isinstance(source.oci, OciSource) and source.oci.pull_secret_ref is not None:
        found.append(("spec.source.oci.pullSecretRef.name", source.oci.pull_secret_ref))
    return found


def _secrets_of(model: ArksModel) -> Iterable[Hashable]:
    return [(model.metadata.namespace, reference.name) for _, reference in model_secrets(model)]


def _claim_of(model: ArksModel) -> Iterable[Hashable]:
    storage, _ = storage_of(model)
    source = model.spec.source.pvc if model.spec.source else None
    name = source.claim_name if source is not None else (storage.claim if storage else None)
    return [(model.metadata.namespace, name)] if name else []


def _granted(token: TokenView) -> Iterable[Hashable]:
    return {(token.fragment.ident.namespace, endpoint) for endpoint, _ in token.qos}


def _budgets(token: TokenView) -> Iterable[Hashable]:
    # By name alone: a quota of that name in another namespace changes what the condition says.
    return {quota for _, quota in token.qos if quota}


def _sealed(token: TokenView) -> Iterable[Hashable]:
    secret = token.fragment.secret
    return [(token.fragment.ident.namespace, secret[0])] if secret else []


def _labelled_application(pod: Object) -> Iterable[Hashable]:
    name = (pod["metadata"].get("labels") or {}).get(APPLICATION_LABEL)
    return [(pod["metadata"].get("namespace", ""), name)] if name else []


def _loader_of(pod: Object) -> Iterable[Hashable]:
    labels = pod["metadata"].get("labels") or {}
    if APPLICATION_LABEL in labels or MODEL_LABEL not in labels:
        return []
    return [(pod["metadata"].get("namespace", ""), labels[MODEL_LABEL])]


def _owner_uids(item: Object) -> Iterable[Hashable]:
    return [reference["uid"] for reference in owners(item)]


def applications_of(item: Object) -> list[tuple[str, str]]:
    """The application of a workload's object: by label, by owner, or as a group that Arks' set left behind."""
    meta = item["metadata"]
    names = {(meta.get("labels") or {}).get(APPLICATION_LABEL)}
    names |= {owner["name"] for owner in owners(item) if owner["kind"] in kinds.APPLICATION_KINDS}
    if item["kind"] == "RoleBasedGroup":
        names.add(_set_of(item))
    return [(meta.get("namespace", ""), name) for name in names if name]


def _set_of(group: Object) -> str:
    """`<app>` of a group `<app>-<i>` that a RoleBasedGroupSet owns, or owned: its pods name the application."""
    stem, _, index = str(group["metadata"]["name"]).rpartition("-")
    if not stem or not index.isdecimal():
        return ""
    if any(owner["kind"] == "RoleBasedGroupSet" and owner["name"] == stem for owner in owners(group)):
        return stem
    for role in (group.get("spec") or {}).get("roles") or ():
        labels = ((role.get("template") or {}).get("metadata") or {}).get("labels") or {}
        if labels.get(APPLICATION_LABEL) == stem:
            return stem
    return ""
