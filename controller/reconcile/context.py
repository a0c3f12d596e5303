"""What every reconciler works with, and what they all do alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from apis.resources import ArksEndpoint
from apis.resources.base import Resource as ArksResource
from controller.kube.client import Client
from controller.kube.events import Events
from controller.reconcile.claims import Growth
from controller.reconcile.desired.endpoint import Backend
from controller.reconcile.desired.metadata import kind_of, plain
from controller.reconcile.downloads import Downloads
from controller.reconcile.kinds import ARKS
from controller.reconcile.spending import Spending
from controller.reconcile.watches import Watches
from controller.reconcile.writing import Writer
from controller.status import About, StatusWriter

Weigh = Callable[[ArksEndpoint, Sequence[Backend]], Sequence[Backend]]
RESYNC_S = 600.0
"""everything is looked at again that often, should a change ever have been missed"""
UNSETTLED_S = 0.25
"""a watch is about to bring what we wait for; it wakes us earlier where it can"""
MODEL_RETRY_S = 300.0


def _as_they_are(_endpoint: ArksEndpoint, backends: Sequence[Backend]) -> Sequence[Backend]:
    return backends


@dataclass(frozen=True, slots=True)
class Context:
    """One leadership's tools. `weigh` has the last word on weights (an endpoint's `weightPolicy: load`)."""

    client: Client
    watches: Watches
    writer: Writer
    status: StatusWriter
    events: Events
    downloads: Downloads
    claims: Growth
    spending: Spending = field(default_factory=Spending)
    environment: Mapping[str, str] = field(default_factory=dict)
    weigh: Weigh = _as_they_are
    model_retry_s: float = MODEL_RETRY_S


def about(resource: ArksResource, version: str) -> About:
    """A typed resource as the status writer needs it."""
    meta = resource.metadata
    status = plain(getattr(resource, "status", None)) if getattr(resource, "status", None) is not None else {}
    return About(ARKS[kind_of(resource)], meta.namespace, meta.name, meta.uid, meta.generation, version, status)
