"""The Jobs that load one model's weights: made, left alone, replaced, tried again.

A Job cannot be changed, so another request replaces it; a Job that loaded the very same weights is left alone, also
when the loader's image is another one by now. A failed one is tried again: at once when what its end may have hung on
is another by now (the spec, a Secret, the size of the claim), else after a while, for ever.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any, Final

from apis.resources import ArksModel
from controller.kube.client import Object
from controller.kube.resource import Key
from controller.reconcile.claims import size_of
from controller.reconcile.context import Context
from controller.reconcile.desired.metadata import owned_by
from controller.reconcile.loading import Loading, State, loading_of
from controller.reconcile.objects import uid_of
from controller.reconcile.watches import model_secrets
from controller.reconcile.writing import NAME_TAKEN, Refusal
from controller.workloads.model import TEMPLATE_HASH, Deletion

TRIED_ANNOTATION: Final = "arks.ai/tried-with"


class Jobs:
    """One pass over one model's. `status` is the model's latest; `claim` is the one that is filled, where it is one."""

    def __init__(self, context: Context, model: ArksModel, status: Mapping[str, Any]) -> None:
        self._context, self._model, self._status = context, model, status
        self._namespace = model.metadata.namespace
        self.claim: Object | None = None

    async def step(self, wanted: Object, *, remembered: bool) -> Loading | Refusal | None:
        """Bring one Job on; None while there is none to ask. `remembered`: what it would load is there already."""
        context, meta = self._context, wanted["metadata"]
        job = context.watches.jobs.get(Key(self._namespace, meta["name"]))
        if job is None:
            if remembered:
                return Loading(State.LOADED)  # the finished Job was cleaned away, the weights were not
            meta["annotations"][TRIED_ANNOTATION] = self._circumstances()
            return await context.writer.apply(self._model.metadata.uid, wanted)
        if context.writer.deleted(job):
            return None  # what it loaded may be gone, too: it no longer speaks for what is there
        if not owned_by(job, self._model):
            return Refusal("Job", meta["name"], NAME_TAKEN, "a Job of this name is not ours; rename one of them")
        pods = [pod for pod in self._pods() if _is_of(pod, job)]
        loading = loading_of(job, pods)
        same = (job["metadata"].get("annotations") or {}).get(TEMPLATE_HASH) == meta["annotations"][TEMPLATE_HASH]
        if not same and not (loading.state is State.LOADED and _same_weights(job, wanted)):
            return await self._drop(job)
        if loading.state is State.FAILED and self.retry_in_s(loading, job) <= 0:
            return await self._drop(job)
        return loading

    def was_loaded(self) -> bool:
        """This very request was loaded before, as far as the status remembers, and into the present claim."""
        conditions = self._status.get("conditions") or ()
        loaded = next((each for each in conditions if each["type"] == "ModelLoaded" and each["status"] == "True"), None)
        if loaded is None or not self.same_request():
            return False
        # Both are RFC 3339 in UTC: they compare as text.
        claimed_at = str(self.claim["metadata"].get("creationTimestamp", "")) if self.claim is not None else ""
        return str(loaded.get("lastTransitionTime", "")) >= claimed_at

    def same_request(self) -> bool:
        """Does the status speak of the present spec?"""
        return bool(self._status.get("observedGeneration") == self._model.metadata.generation)

    def retry_in_s(self, loading: Loading, job: Object | None = None) -> float:
        if job is not None:
            tried_with = (job["metadata"].get("annotations") or {}).get(TRIED_ANNOTATION, "")
            if tried_with != self._circumstances():
                return 0.0
        if loading.failed_at is None:
            return self._context.model_retry_s
        passed = dt.datetime.now(dt.UTC) - loading.failed_at
        return self._context.model_retry_s - passed.total_seconds()

    def _circumstances(self) -> str:
        """What a download's end may hang on: the spec, the Secrets' versions, the claim's size. When a failed one was
        tried with others, it is tried again at once; each change is one more try.
        """
        entries = [
            self._context.watches.secrets.entry(Key(self._namespace, reference.name))
            for _, reference in model_secrets(self._model)
        ]
        secrets = ",".join(entry.version if entry else "" for entry in entries)
        return f"generation={self._model.metadata.generation} secrets={secrets} claim={size_of(self.claim)}"

    def _pods(self) -> list[Object]:
        return self._context.watches.pods.by("model", (self._namespace, self._model.metadata.name))

    async def _drop(self, job: Object) -> Refusal | None:
        gone = Deletion("batch/v1", "Job", self._namespace, job["metadata"]["name"])
        return await self._context.writer.delete(gone)

    async def drop_others(self, kept: set[str]) -> None:
        """Downloads of ours that nobody wants any more: of a node that left, of a source that was removed."""
        for job in self._context.watches.jobs.by("owner", self._model.metadata.uid):
            if job["metadata"]["name"] not in kept and not self._context.writer.deleted(job):
                await self._drop(job)

    def running(self) -> int:
        jobs = self._context.watches.jobs.by("owner", self._model.metadata.uid)
        return sum(loading_of(job, ()).state is State.LOADING for job in jobs)


def _is_of(pod: Object, job: Object) -> bool:
    return any(owner["uid"] == uid_of(job) for owner in pod["metadata"].get("ownerReferences") or ())


def _same_weights(job: Object, wanted: Object) -> bool:
    """The same request to the same place; what else changed (an image, a limit) does not change the files."""
    before, after = (item["spec"]["template"]["spec"] for item in (job, wanted))
    volumes = [next(v for v in spec["volumes"] if v["name"] == "models") for spec in (before, after)]
    return bool(before["containers"][0].get("args") == after["containers"][0]["args"] and _plain_volume(*volumes))


def _plain_volume(live: Object, wanted: Object) -> bool:
    return all(live.get(key) == value for key, value in wanted.items())
