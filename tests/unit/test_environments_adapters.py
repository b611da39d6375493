"""What names of other libraries' environments mean without these libraries.

They are played for real in tests/environments.
"""

import sys

import pytest

from torchrft.environments.adapters import ADAPTERS, COLUMNS
from torchrft.environments.adapting import known, task_seed
from torchrft.environments.registry import make

MISSING = {library: library for library in ADAPTERS}
MISSING |= {"openenv": "openenv.core.env_server", "verifiers": "verifiers.v1"}


@pytest.mark.parametrize("library", sorted(ADAPTERS))
def test_a_missing_library_says_what_to_install(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, MISSING[library], None)
    name = f"{library}:{__file__}:Nothing" if library == "openenv" else f"{library}:some"
    with pytest.raises(ValueError, match=f"pip install {library.replace('_', '-')}$"):
        make(name, {})


def test_a_server_of_openenv_needs_websockets_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "websockets", None)
    with pytest.raises(ValueError, match=r"pip install websockets$"):
        make("openenv:http://127.0.0.1:1", {})


class Nothing:
    """No environment."""


@pytest.mark.parametrize("library", sorted(ADAPTERS))
def test_a_library_alone_does_not_say_which(library):
    for name in (library, f"{library}:"):
        with pytest.raises(ValueError, match=f"^'{name}' does not say which; write {library}:NAME"):
            make(name, {})


def test_names_that_come_near_are_told():
    assert known("it", "b", ["b", "a"]) == "b"
    with pytest.raises(ValueError, match=r"^it has no 'gsm8'; it has gsm8k, for example$"):
        known("it", "gsm8", ["gsm8k", "other"])
    with pytest.raises(ValueError, match=r"^it has no 'x'; it has none, for example$"):
        known("it", "x", [])


def test_the_column_seed_comes_before_the_episodes_own():
    assert task_seed({}, 2**31 + 5) == 5
    assert task_seed({"seed": 7}, 3) == 7
    for wrong in (None, "7", 7.0):
        with pytest.raises(ValueError, match=f'the column "seed" holds {wrong!r}, no whole number'):
            task_seed({"seed": wrong}, 3)


def test_columns_belong_to_known_libraries():
    assert {name.partition(":")[0] for name in COLUMNS} <= {*ADAPTERS}
