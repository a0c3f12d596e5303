"""Which engine answers: weights over routes, least in-flight within one, and health of our own.

Envoy goes on sending to a pinned host that it knows to be unhealthy, so what is picked here must be fit: an engine that
failed is not picked again before it has answered a probe. If no engine of an endpoint is fit there is no pick, and the
client is told 503; a dead one is never tried for luck.
"""

from extproc.picking.model import EngineState, HealthSettings, Outcome, Pick
from extproc.picking.picker import Picker

__all__ = ["EngineState", "HealthSettings", "Outcome", "Pick", "Picker"]
