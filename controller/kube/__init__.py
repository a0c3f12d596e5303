"""Kubernetes, spoken by ourselves: list-and-watch, work queue, server-side apply, leader election.

    credentials ──▶ client ──▶ reflector ──▶ store ──▶ queue ──▶ (a reconciler) ──▶ apply, events
                       └─────▶ discovery, lease (fences every write)

One aiohttp session carries everything. Nothing here knows a kind of Arks.
"""
