"""A registry is a dict and a lookup whose error names the choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from moekit.errors import UnknownNameError, shown

__all__ = ["Registry"]

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to things of one kind.

    Raises `UnknownNameError` for a name that was never registered and `KeyError` for a name
    registered twice (a bug of ours, not of the user).

    >>> shapes = Registry[type]("shape")
    >>> @shapes.register("round")
    ... class Ball: ...
    >>> shapes["round"].__name__
    'Ball'
    >>> shapes["flat"]
    Traceback (most recent call last):
    ...
    moekit.errors.UnknownNameError: unknown shape 'flat'; choose from: round
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under `name`."""

        def add(item: T) -> T:
            if name in self._items:
                raise KeyError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return add

    def __getitem__(self, name: str) -> T:
        if not isinstance(name, str) or name not in self._items:
            raise UnknownNameError(f"unknown {self.kind} {shown(name)}; choose from: {', '.join(sorted(self._items))}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)
