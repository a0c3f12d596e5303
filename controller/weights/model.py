"""What is known of an engine's load, and what a backend's weight is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class EngineLoad(NamedTuple):
    """One engine, as its own metrics have it."""

    address: str
    healthy: bool
    """it answers; refused or silent several times in a row it does not"""
    known: bool = True
    """its metrics could be read: without, only `healthy` says anything"""
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    """0 to 1"""
    ttft_s: float = 0.0
    """time to first token, smoothed; 0: not known"""


class Share(NamedTuple):
    """One backend's part."""

    weight: int
    score: float = 1.0
    """0: dead; else between the floor and 1, smoothed: what fraction of its capacity's weight it should get"""


@dataclass(frozen=True, slots=True)
class Damping:
    """How weights follow. One step is one call, once a second."""

    alpha: float = 0.3
    """of the way to the wanted score, per step"""
    most: float = 0.1
    """of the full weight, per step"""
    floor: float = 0.1
    """a live backend keeps this share of its capacity: what gets nothing shows no load to judge by"""
    band: float = 0.05
    """a weight stays until it would move by more than this part of the full one"""
    scale: int = 100
    """weights of capacity 1 are this, so that they can move in steps of 1 %"""
    queue_half: float = 4.0
    """so many waiting requests per engine halve its score"""
    kv_cost: float = 0.7
    """of the score, at a full KV cache"""
    latency_floor: float = 0.5
    """the most that a slow first token costs"""
