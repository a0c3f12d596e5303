"""Prefix cache: which leading blocks of a prompt were seen before, least recently used ones forgotten first.

A block stands for `block_size_tokens` tokens of four bytes each and is known by everything up to its end. As in real
engines the last token is always computed, so a whole prompt is never a hit.
"""

from collections import OrderedDict
from hashlib import blake2b

from simengine.vocabulary import BYTES_PER_TOKEN


class PrefixCache:
    def __init__(self, blocks: int, block_size_tokens: int) -> None:
        self._capacity = blocks
        self._size = block_size_tokens
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def look_up(self, prompt: bytes, prompt_tokens: int) -> int:
        """Cached tokens of this prompt; from now on all its full blocks are known."""
        step = self._size * BYTES_PER_TOKEN
        reusable = (prompt_tokens - 1) // self._size
        parent = b""
        hits = 0
        unbroken = True
        known = self._known
        for block in range(len(prompt) // step):
            parent = blake2b(parent + prompt[block * step : (block + 1) * step], digest_size=8).digest()
            if parent in known:
                known.move_to_end(parent)
                hits += unbroken and block < reusable
            else:
                unbroken = False
                known[parent] = None
                if len(known) > self._capacity:
                    known.popitem(last=False)
        return hits * self._size

    def clear(self) -> None:
        self._known.clear()
