"""The six kinds of group arks.ai, one module each, and the foreign kinds that a policy folder may hold."""

from apis.resources.application import ArksApplication
from apis.resources.base import Resource
from apis.resources.disaggregated import ArksDisaggregatedApplication
from apis.resources.endpoint import ArksEndpoint
from apis.resources.model import ArksModel
from apis.resources.quota import ArksQuota
from apis.resources.token import ArksToken

KINDS: dict[str, type[Resource]] = {
    kind.__name__: kind
    for kind in (ArksApplication, ArksDisaggregatedApplication, ArksEndpoint, ArksModel, ArksQuota, ArksToken)
}

__all__ = [
    "KINDS",
    "ArksApplication",
    "ArksDisaggregatedApplication",
    "ArksEndpoint",
    "ArksModel",
    "ArksQuota",
    "ArksToken",
]
