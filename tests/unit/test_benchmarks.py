"""Benchmarks need peers that CI does not install; what they take from torchrft must still exist."""

import ast
import importlib

import pytest
from tiny_job import ROOT

FILES = sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_benchmark_imports_exists(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchrft":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):  # or a module of its own
                    importlib.import_module(f"{node.module}.{alias.name}")
