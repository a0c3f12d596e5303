"""What a store shows of itself, for metrics and an admin."""

from dataclasses import dataclass
from typing import NamedTuple


class CounterView(NamedTuple):
    key: str
    window_s: int
    start_s: int
    used: int
    """charged"""
    reserved: int
    """held by open leases"""


@dataclass(slots=True)
class StoreStats:
    expired: int = 0
    """leases that nobody settled in time"""
    corrected: int = 0
    """of these, settled or released later"""
    overspent: int = 0
    """settles above the reservation"""
