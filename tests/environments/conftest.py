"""Environments of other libraries: see CONTRIBUTING.md.

In an environment without these libraries the tests are left out. `.ci/run` names the files that it
wants, which are then never left out: there a library that is missing is a failure.
"""

import importlib.util

collect_ignore = []
if importlib.util.find_spec("reasoning_gym") is None:
    collect_ignore.append("test_libraries.py")
if importlib.util.find_spec("verifiers") is None:
    collect_ignore.append("test_verifiers.py")
