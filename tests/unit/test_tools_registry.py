import doctest

import pytest

from torchrft.tools import registry
from torchrft.tools.registry import Registry


def test_doctest():
    assert doctest.testmod(registry).failed == 0


def test_get_register_names():
    colors: Registry[object] = Registry("color")
    red = object()
    assert colors.register("red")(red) is red
    colors.register("red")(red)  # the same object again is fine
    colors.register("blue")(object())
    assert colors.get("red") is red
    assert colors.names() == ["blue", "red"]


def test_duplicate_is_refused():
    colors: Registry[object] = Registry("color")
    colors.register("red")("a")
    with pytest.raises(ValueError, match='color "red" is registered already'):
        colors.register("red")("b")


def test_unknown_name_lists_the_valid_ones_and_suggests():
    colors: Registry[object] = Registry("color")
    with pytest.raises(ValueError, match='unknown color "red"; Valid names: none is registered'):
        colors.get("red")
    colors.register("red")("a")
    colors.register("blue")("b")
    with pytest.raises(ValueError, match='"redd"; did you mean "red"\\? Valid names: blue, red'):
        colors.get("redd")
