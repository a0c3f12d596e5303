"""Names of the headers that are the gateway's word, where Envoy's configuration and extproc must agree."""

PIN_HEADER = "x-gateway-destination-endpoint"
"""the engines of a request, `ip:port`, in order: Envoy sends it to the first, a retry to the next"""
DECIDED_HEADERS = ("model", "namespace", "username")
"""what extproc sets for routes to match on, as Arks does"""
