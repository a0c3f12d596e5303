"""ArksModel: the claim, then the download, then ready; again from wherever the cluster says it stands.

A Job cannot be changed, so another request replaces it; a Job that loaded the very same weights is left alone, also
when the loader's image is another one by now. A failed download is tried again: at once when its Secret changes, else
after a while, for ever. `preload` runs one Job per chosen node, a few at a time.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from apis.resources import ArksModel
from controller.engines.model import Problem
from controller.kube.client import Object
from controller.kube.resource import Key
from controller.models.report import Report
from controller.reconcile.context import RESYNC_S, Context, about
from controller.reconcile.desired.metadata import owned_by
from controller.reconcile.desired.model import DesiredModel, desired_model, job_name, secret_keys
from controller.reconcile.desired.phase import Verdict
from controller.reconcile.downloads import fields, words
from controller.reconcile.finalizers import release
from controller.reconcile.kinds import ARKS
from controller.reconcile.loading import LOAD_FAILED, Loading, State, loading_of
from controller.reconcile.objects import uid_of
from controller.reconcile.watches import model_secrets
from controller.reconcile.writing import REFUSED_AGAIN_S, Refusal
from controller.workloads.model import TEMPLATE_HASH, Deletion

_RESOURCE: Final = ARKS["ArksModel"]
CREDENTIALS_ANNOTATION: Final = "arks.ai/credentials-version"


@dataclass(slots=True)
class _Pass:
    """What one pass found out; becomes the status."""

    storage: Verdict | None = None
    loaded: Verdict | None = None
    failed: bool = False
    revision: str = ""
    progress: Report | None = None
    nodes: list[str] = field(default_factory=list)
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
    return [storage, loaded, ready]


class _Model:
    """One pass over one resource."""

    def __init__(self, context: Context, model: ArksModel, status: Mapping[str, Any]) -> None:
        self._context, self._model, self._status = context, model, status
        self._namespace = model.metadata.namespace
        self._key = Key(model.metadata.namespace, model.metadata.name)
        self._claimed_at = ""  # when the present claim was made
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
            text = f"spec.storage.pvc: the claim {claim['metadata']['name']} is lost or being deleted"
            found.storage = Verdict("StorageCreated", "False", "StorageCreating", text)
            return found
        self._claimed_at = str(claim["metadata"].get("creationTimestamp", "")) if claim is not None else ""
        found.storage = Verdict("StorageCreated", "True", "CreateSucceeded", "The storage is there")
        if first.job is None:
            await self._drop_jobs(set())
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
        await self._drop_jobs(set())
        refusal = await self._context.writer.apply(self._model.metadata.uid, claim)
        if refusal is None:
            name = claim["metadata"]["name"]
            found.storage = Verdict("StorageCreated", "False", "StorageCreating", f"making the claim {name}")
            return
        found.fail("BoundFailed", f"spec.storage.pvc: the API server refused {refusal}", storage=True)
        found.again_s = REFUSED_AGAIN_S

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
        await self._drop_jobs({desired.job["metadata"]["name"]})
        loading = await self._job_step(desired.job, remembered=self._was_loaded())
        await self._tell(loading)

    async def _tell(self, loading: Loading | Refusal | None) -> None:
        found = self._found
        if isinstance(loading, Refusal):
            found.fail("CreateWorkerPodFailed", f"spec: the API server refused {loading}")
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
            found.again_s = min(found.again_s, self._retry_in_s(loading) + 1.0)

    async def _ask(self, loading: Sequence[Loading]) -> None:
        """How far downloads are that are under way."""
        if not loading:
            return
        found, downloads = self._found, self._context.downloads
        pods = [each.running for each in loading if each.running]
        found.progress = await downloads.progress(self._key, pods)
        if pods:
            found.again_s = min(found.again_s, downloads.due_s(self._key))

    async def _job_step(self, wanted: Object, *, remembered: bool) -> Loading | Refusal | None:
        """Bring one Job on; None while there is none to ask. `remembered`: what it would load is there already."""
        context, meta = self._context, wanted["metadata"]
        job = context.watches.jobs.get(Key(self._namespace, meta["name"]))
        if job is None:
            if remembered:
                return Loading(State.LOADED)  # the finished Job was cleaned away, the weights were not
            meta["annotations"][CREDENTIALS_ANNOTATION] = self._credentials()
            return await context.writer.apply(self._model.metadata.uid, wanted)
        if job["metadata"].get("deletionTimestamp"):
            return None
        if not owned_by(job, self._model):
            return Refusal("Job", meta["name"], "NameTaken", "a Job of this name is not ours")
        pods = [pod for pod in self._pods() if _is_of(pod, job)]
        loading = loading_of(job, pods)
        same = (job["metadata"].get("annotations") or {}).get(TEMPLATE_HASH) == meta["annotations"][TEMPLATE_HASH]
        if not same and not (loading.state is State.LOADED and _same_weights(job, wanted)):
            return await self._drop(job)
        if loading.state is State.FAILED and self._retry_in_s(loading, job) <= 0:
            return await self._drop(job)
        return loading

    def _was_loaded(self) -> bool:
        """This very request was loaded before, as far as the status remembers, and into the present claim."""
        conditions = self._status.get("conditions") or ()
        loaded = next((each for each in conditions if each["type"] == "ModelLoaded" and each["status"] == "True"), None)
        if loaded is None or not self._same_request():
            return False
        # Both are RFC 3339 in UTC: they compare as text.
        return str(loaded.get("lastTransitionTime", "")) >= self._claimed_at

    def _same_request(self) -> bool:
        """Does the status speak of the present spec?"""
        return bool(self._status.get("observedGeneration") == self._model.metadata.generation)

    def _retry_in_s(self, loading: Loading, job: Object | None = None) -> float:
        if job is not None:
            used = (job["metadata"].get("annotations") or {}).get(CREDENTIALS_ANNOTATION, "")
            if used != self._credentials():
                return 0.0
        if loading.failed_at is None:
            return self._context.model_retry_s
        passed = dt.datetime.now(dt.UTC) - loading.failed_at
        return self._context.model_retry_s - passed.total_seconds()

    def _credentials(self) -> str:
        """Which Secrets the download would use now: another version is a reason to try again."""
        entries = [
            self._context.watches.secrets.entry(Key(self._namespace, reference.name))
            for _, reference in model_secrets(self._model)
        ]
        return ",".join(entry.version if entry else "" for entry in entries)

    def _pods(self) -> list[Object]:
        return self._context.watches.pods.by("model", (self._namespace, self._model.metadata.name))

    async def _drop(self, job: Object) -> Refusal | None:
        gone = Deletion("batch/v1", "Job", self._namespace, job["metadata"]["name"])
        return await self._context.writer.delete(gone)

    async def _drop_jobs(self, kept: set[str]) -> None:
        """Downloads of ours that nobody wants any more: of a node that left, of a source that was removed."""
        for job in self._context.watches.jobs.by("owner", self._model.metadata.uid):
            if job["metadata"]["name"] not in kept and not job["metadata"].get("deletionTimestamp"):
                await self._drop(job)

    # -- a download per node ------------------------------------------------------------------------------------------

    async def _preload(self) -> None:
        found = self._found
        nodes = self._nodes()
        await self._drop_jobs({job_name(self._model, node) for node in nodes})
        if not nodes:
            text = "spec.preload.nodeSelector: no ready node matches"
            found.loaded = Verdict("ModelLoaded", "False", "Waiting", text)
            return
        room = self._parallel(len(nodes)) - self._running()
        filled = set(self._status.get("preloadedNodes") or ()) if self._same_request() else set()
        failed: list[tuple[str, str]] = []
        running: list[Loading] = []
        for node in nodes:
            desired = self._desired(claim_exists=True, node=node)
            assert desired.job is not None
            there = Key(self._namespace, desired.job["metadata"]["name"]) in self._context.watches.jobs
            remembered = node in filled
            if not there and not remembered and room <= 0:
                continue
            loading = await self._job_step(desired.job, remembered=remembered)
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

    def _running(self) -> int:
        jobs = self._context.watches.jobs.by("owner", self._model.metadata.uid)
        return sum(loading_of(job, ()).state is State.LOADING for job in jobs)

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


def _is_of(pod: Object, job: Object) -> bool:
    return any(owner["uid"] == uid_of(job) for owner in pod["metadata"].get("ownerReferences") or ())


def _same_weights(job: Object, wanted: Object) -> bool:
    """The same request to the same place; what else changed (an image, a limit) does not change the files."""
    before, after = (item["spec"]["template"]["spec"] for item in (job, wanted))
    volumes = [next(v for v in spec["volumes"] if v["name"] == "models") for spec in (before, after)]
    return bool(before["containers"][0].get("args") == after["containers"][0]["args"] and _plain_volume(*volumes))


def _plain_volume(live: Object, wanted: Object) -> bool:
    return all(live.get(key) == value for key, value in wanted.items())
