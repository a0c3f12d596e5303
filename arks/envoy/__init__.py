"""The gateway's Envoy: what is set, and the bootstrap made from it."""
