"""What is known of one kind right now: the objects by key, and indices over them.

A `Reflector` is its only writer; everyone else reads, synchronously, on the same event loop. Indices answer "which
endpoints name this model" without walking all objects; they follow every change.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from controller.kube.resource import Key

T = TypeVar("T")
IndexOf = Callable[[T], Iterable[Hashable]]


@dataclass(slots=True, frozen=True)
class Entry(Generic[T]):
    """One object and the identity under which the server knows it."""

    value: T
    uid: str
    version: str


class Store(Generic[T]):
    """Objects of one kind by `Key`."""

    def __init__(self, **indices: IndexOf[T]) -> None:
        self._entries: dict[Key, Entry[T]] = {}
        self._indices: dict[str, tuple[IndexOf[T], dict[Hashable, dict[Key, None]]]] = {}
        self.changes = 0  # grows with every change: cheap "did anything happen"
        for name, index_of in indices.items():
            self._indices[name] = (index_of, {})

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def get(self, key: Key) -> T | None:
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def entry(self, key: Key) -> Entry[T] | None:
        """The object with its uid and resourceVersion."""
        return self._entries.get(key)

    def values(self) -> list[T]:
        return [entry.value for entry in self._entries.values()]

    def items(self) -> list[tuple[Key, T]]:
        return [(key, entry.value) for key, entry in self._entries.items()]

    def keys_by(self, index: str, value: Hashable) -> list[Key]:
        """Keys of the objects that the index files under `value`."""
        return list(self._indices[index][1].get(value, ()))

    def by(self, index: str, value: Hashable) -> list[T]:
        """Objects that the index files under `value`."""
        return [self._entries[key].value for key in self._indices[index][1].get(value, ())]

    def put(self, key: Key, entry: Entry[T]) -> Entry[T] | None:
        """For the writer: store, and return what was there."""
        old = self._entries.get(key)
        # Indices first: if one raises, the object is refused whole.
        filed = [(places, list(index_of(entry.value))) for index_of, places in self._indices.values()]
        if old is not None:
            self._unfile(key, old)
        for places, values in filed:
            for value in values:
                places.setdefault(value, {})[key] = None
        self._entries[key] = entry
        self.changes += 1
        return old

    def pop(self, key: Key) -> Entry[T] | None:
        """For the writer: remove, and return what was there."""
        old = self._entries.pop(key, None)
        if old is not None:
            self._unfile(key, old)
            self.changes += 1
        return old

    def _unfile(self, key: Key, old: Entry[T]) -> None:
        for index_of, places in self._indices.values():
            for value in index_of(old.value):
                keys = places.get(value)
                if keys is not None:
                    keys.pop(key, None)
                    if not keys:
                        del places[value]
