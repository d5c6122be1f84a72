"""A registry is a dict and a lookup whose error names the choices."""

from __future__ import annotations

import pytest

from moekit.errors import UnknownNameError
from moekit.registry import Registry


def test_lookup_names_the_choices():
    registry = Registry[int]("colour")
    registry.register("red")(1)
    registry.register("blue")(2)
    assert registry["red"] == 1
    assert list(registry) == ["blue", "red"]
    assert len(registry) == 2
    assert "red" in registry
    assert "green" not in registry
    with pytest.raises(UnknownNameError, match="unknown colour 'green'; choose from: blue, red"):
        registry["green"]


def test_registering_twice_is_our_bug():
    registry = Registry[int]("colour")
    registry.register("red")(1)
    with pytest.raises(KeyError, match="twice"):
        registry.register("red")(2)
