"""Tests with a real vLLM, in an environment of their own: see CONTRIBUTING.md.

Without vLLM they are left out; nothing here stands in for it.
"""

import importlib.util
import os

collect_ignore_glob = []
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob.append("test_*.py")
else:
    # Before vLLM or torch are imported: there is nothing worth compiling for so few tokens.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
