"""ArksModel: the claim, then the download, then ready; again from wherever the cluster says it stands.

One Job fills the storage that all share (`jobs`); `preload` runs one per chosen node, a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from apis.resources import ArksModel
from controller.engines.model import Problem
from controller.kube.client import Object
from controller.kube.resource import Key
from controller.models.report import Report
from controller.reconcile.claims import unlike
from controller.reconcile.context import RESYNC_S, Context, about
from controller.reconcile.desired.metadata import owned_by
from controller.reconcile.desired.model import DesiredModel, desired_model, job_name, secret_keys
from controller.reconcile.desired.phase import Verdict
from controller.reconcile.downloads import fields, words
from controller.reconcile.finalizers import release
from controller.reconcile.jobs import Jobs
from controller.reconcile.kinds import ARKS
from controller.reconcile.loading import LOAD_FAILED, Loading, State
from controller.reconcile.watches import model_secrets
from controller.reconcile.writing import REFUSED_AGAIN_S, Refusal

_RESOURCE: Final = ARKS["ArksModel"]


@dataclass(slots=True)
class _Pass:
    """What one pass found out; becomes the status."""

    storage: Verdict | None = None
    loaded: Verdict | None = None
    failed: bool = False
    revision: str = ""
    progress: Report | None = None
    nodes: list[str] = field(default_factory=list)
    warning: Verdict | None = None
    again_s: float = RESYNC_S

    def fail(self, reason: str, message: str, *, storage: bool = False) -> None:
        self.failed = True
        if storage:
            self.storage = Verdict("StorageCreated", "False", reason, message)
        else:
            self.loaded = Verdict("ModelLoaded", "False", reason, message)


async def reconcile_model(context: Context, key: Key) -> float | None:
    entry = context.watches.models.entry(key)
    if entry is None:
        context.status.forget(_RESOURCE, *key)
        context.downloads.forget(key)
        return None
    model = entry.value
    if model.metadata.deletion_timestamp is not None:
        await release(context.client, _RESOURCE, *key, model.metadata.finalizers, entry.version)
        return None
    told = about(model, entry.version)
    found = await _Model(context, model, context.status.latest(told)).step()
    status: dict[str, Any] = {"phase": _phase(found)}
    revision = found.revision or (model.status.revision if _is_loaded(found) else "")
    if revision:
        status["revision"] = revision
    if found.progress is None:
        context.downloads.forget(key)
    elif progress := fields(found.progress):
        status["progress"] = progress
    if found.nodes:
        status["preloadedNodes"] = found.nodes
    await context.status.write(told, _verdicts(found), status)
    return found.again_s


def _is_loaded(found: _Pass) -> bool:
    return found.loaded is not None and found.loaded.status == "True"


def _phase(found: _Pass) -> str:
    if found.failed:
        return "Failed"
    if found.storage is None or found.storage.status != "True":
        return "StorageCreating"
    return "Ready" if _is_loaded(found) else "ModelLoading"


def _verdicts(found: _Pass) -> list[Verdict]:
    storage = found.storage or Verdict("StorageCreated", "False", "NotStarted", "the storage was not looked at yet")
    loaded = found.loaded or Verdict("ModelLoaded", "False", "NotStarted", "waits for the storage")
    if storage.status == loaded.status == "True":
        ready = Verdict("Ready", "True", "Ready", "The model is ready")
    else:
        cause = storage if storage.status != "True" else loaded
        ready = Verdict("Ready", "False", cause.reason, cause.message)
    return [storage, loaded, ready, *([found.warning] if found.warning is not None else [])]


class _Model:
    """One pass over one resource."""

    def __init__(self, context: Context, model: ArksModel, status: Mapping[str, Any]) -> None:
        self._context, self._model, self._status = context, model, status
        self._namespace = model.metadata.namespace
        self._key = Key(model.metadata.namespace, model.metadata.name)
        self._jobs = Jobs(context, model, status)
        self._found = _Pass()

    async def step(self) -> _Pass:
        context, found = self._context, self._found
        first = self._desired(claim_exists=False)
        blocking = next((problem for problem in first.problems if problem.blocking), None)
        if blocking is not None:
            found.fail(blocking.reason, str(blocking), storage=True)
            return found
        claim = None
        if first.storage is not None and first.storage.claim is not None:
            claim = context.watches.claims.get(Key(self._namespace, first.storage.claim))
        if first.claim is not None and claim is None:
            await self._make_claim(first.claim)
            return found
        given = self._given_claim()
        if given and Key(self._namespace, given) not in context.watches.claims:
            text = f"spec.source.pvc.claimName: there is no PersistentVolumeClaim {given} in this namespace"
            found.fail("ClaimNotFound", text, storage=True)
            return found
        if claim is not None and (claim["metadata"].get("deletionTimestamp") or _lost(claim)):
            text = f"spec.storage.pvc: the claim {claim['metadata']['name']} has lost its volume"
            if claim["metadata"].get("deletionTimestamp"):
                text = (
                    f"spec.storage.pvc: the claim {claim['metadata']['name']} is being deleted and will be made anew; "
                    "it goes when the last pod that mounts it has ended"
                )
            found.storage = Verdict("StorageCreated", "False", "StorageCreating", text)
            return found
        self._jobs.claim = claim
        if claim is not None and first.claim is not None and owned_by(claim, self._model):
            await self._grow(claim, first.claim)
        found.storage = Verdict("StorageCreated", "True", "CreateSucceeded", "The storage is there")
        if first.job is None:
            await self._jobs.drop_others(set())
            found.loaded = Verdict("ModelLoaded", "True", "ModelLoadSucceeded", "The model is in existing storage")
            return found
        problem = self._missing_secret()
        if problem is not None:
            found.fail(problem.reason, str(problem))
            return found
        if self._model.spec.preload is not None:
            await self._preload()
        else:
            await self._load(first)
        return found

    def _desired(self, *, claim_exists: bool, job: Object | None = None, node: str = "") -> DesiredModel:
        return desired_model(
            self._model, environment=self._context.environment, claim_exists=claim_exists, job=job, node=node
        )

    def _given_claim(self) -> str:
        source = self._model.spec.source
        return source.pvc.claim_name if source is not None and source.pvc is not None else ""

    async def _make_claim(self, claim: Object) -> None:
        """Weights that were in a claim of this name are gone with it, so whatever was loaded must be loaded again."""
        found = self._found
        await self._jobs.drop_others(set())
        refusal = await self._context.writer.apply(self._model.metadata.uid, claim)
        if refusal is None:
            name = claim["metadata"]["name"]
            found.storage = Verdict("StorageCreated", "False", "StorageCreating", f"making the claim {name}")
            return
        found.fail("BoundFailed", refusal.told("spec.storage.pvc"), storage=True)
        found.again_s = REFUSED_AGAIN_S

    async def _grow(self, claim: Object, desired: Object) -> None:
        why = await self._context.claims.bring(self._context.client, claim, desired)
        if why:
            text = f"spec.storage.pvc.spec.resources.requests.storage: {why}"
            self._found.warning = Verdict("Degraded", "True", "ClaimNotEnlarged", text)
            return
        lasting = unlike(claim, desired)
        if lasting:
            text = (
                f"spec.storage.pvc.spec.{lasting}: the claim {claim['metadata']['name']} was made with another and a "
                "claim cannot change; name another claim in spec.storage.pvc.name, or delete this one"
            )
            self._found.warning = Verdict("Degraded", "True", "ClaimUnchangeable", text)

    def _missing_secret(self) -> Problem | None:
        watches = self._context.watches
        if not watches.secrets_known:
            return None
        for path, reference in model_secrets(self._model):
            secret = watches.secrets.get(Key(self._namespace, reference.name))
            if secret is None:
                text = f"there is no Secret {reference.name} in this namespace"
                return Problem("SecretNotFound", path, text)
            missing = [key for key in secret_keys(self._model) if key not in secret.digests]
            if missing:
                text = f"the Secret {reference.name} has no key {' and no key '.join(missing)}"
                return Problem("SecretKeyNotFound", path, text)
        return None

    # -- one download -------------------------------------------------------------------------------------------------

    async def _load(self, desired: DesiredModel) -> None:
        """One Job fills the storage that all share."""
        assert desired.job is not None
        await self._jobs.drop_others({desired.job["metadata"]["name"]})
        loading = await self._jobs.step(desired.job, remembered=self._jobs.was_loaded())
        await self._tell(loading)

    async def _tell(self, loading: Loading | Refusal | None) -> None:
        found = self._found
        if isinstance(loading, Refusal):
            found.fail("CreateWorkerPodFailed", loading.told("spec"))
            found.again_s = REFUSED_AGAIN_S
        elif loading is None or loading.state is State.LOADING:
            await self._ask([loading] if loading is not None else [])
            text = (loading.message if loading else "") or (words(found.progress) if found.progress else "")
            found.loaded = Verdict("ModelLoaded", "False", "ModelLoading", text or "The model is being loaded")
        elif loading.state is State.LOADED:
            found.revision = loading.revision
            found.loaded = Verdict("ModelLoaded", "True", "ModelLoadSucceeded", "The model is loaded")
        else:
            found.fail(loading.reason, loading.message)
            found.again_s = min(found.again_s, self._jobs.retry_in_s(loading) + 1.0)

    async def _ask(self, loading: Sequence[Loading]) -> None:
        """How far downloads are that are under way."""
        if not loading:
            return
        found, downloads = self._found, self._context.downloads
        pods = [each.running for each in loading if each.running]
        found.progress = await downloads.progress(self._key, pods)
        if pods:
            found.again_s = min(found.again_s, downloads.due_s(self._key))

    # -- a download per node ------------------------------------------------------------------------------------------

    async def _preload(self) -> None:
        found = self._found
        nodes = self._nodes()
        await self._jobs.drop_others({job_name(self._model, node) for node in nodes})
        if not nodes:
            text = "spec.preload.nodeSelector: no ready node matches"
            found.loaded = Verdict("ModelLoaded", "False", "Waiting", text)
            return
        room = self._parallel(len(nodes)) - self._jobs.running()
        filled = set(self._status.get("preloadedNodes") or ()) if self._jobs.same_request() else set()
        failed: list[tuple[str, str]] = []
        running: list[Loading] = []
        for node in nodes:
            desired = self._desired(claim_exists=True, node=node)
            assert desired.job is not None
            there = Key(self._namespace, desired.job["metadata"]["name"]) in self._context.watches.jobs
            remembered = node in filled
            if not there and not remembered and room <= 0:
                continue
            loading = await self._jobs.step(desired.job, remembered=remembered)
            if isinstance(loading, Refusal):
                failed.append(("CreateWorkerPodFailed", f"{node}: {loading}"))
            elif loading is not None and loading.state is State.LOADED:
                found.nodes.append(node)
                found.revision = loading.revision or found.revision
            elif loading is not None and loading.state is State.FAILED:
                failed.append((loading.reason, f"{node}: {loading.message}"))
            else:
                room -= 0 if there else 1
                running += [loading] if loading is not None else []
        if failed:
            found.again_s = REFUSED_AGAIN_S
        found.nodes.sort()
        await self._ask(running)
        self._tell_nodes(len(nodes), failed)

    def _tell_nodes(self, wanted: int, failed: list[tuple[str, str]]) -> None:
        """`failed`: reason and words for each node."""
        found = self._found
        text = f"{len(found.nodes)} of {wanted} nodes have the model"
        if failed:
            reasons = {reason for reason, _ in failed}
            told = "; ".join(text_of_one for _, text_of_one in failed)
            found.fail(reasons.pop() if len(reasons) == 1 else LOAD_FAILED, f"{text}; failed on {told}")
        elif len(found.nodes) == wanted:
            found.loaded = Verdict("ModelLoaded", "True", "ModelLoadSucceeded", text)
        else:
            if found.progress is not None:
                text = f"{text}; {words(found.progress)}"
            found.loaded = Verdict("ModelLoaded", "False", "ModelLoading", text)

    def _nodes(self) -> list[str]:
        preload = self._model.spec.preload
        selector: Mapping[str, str] = preload.node_selector if preload is not None else {}
        nodes: Iterable[Object] = self._context.watches.nodes.values()
        return sorted(
            node["metadata"]["name"]
            for node in nodes
            if selector.items() <= node["metadata"]["labels"].items()
            and not node["spec"]["unschedulable"]
            and any(each["status"] == "True" for each in node["status"]["conditions"])
        )

    def _parallel(self, nodes: int) -> int:
        given = self._model.spec.preload.max_parallel if self._model.spec.preload else 1
        if isinstance(given, str) and given.endswith("%") and given[:-1].isdecimal():
            return max(1, -(-int(given[:-1]) * nodes // 100))
        return max(1, int(given) if str(given).isdecimal() else 1)


def _lost(claim: Object) -> bool:
    return bool((claim.get("status") or {}).get("phase") == "Lost")
