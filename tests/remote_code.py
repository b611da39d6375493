"""Model folders with Python code of their own, which leaves a mark when it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
_MARK = "from pathlib import Path\nPath({mark!r}).write_text('ran')\n"
_CODE = {
    "configuration_own.py": """
from transformers import Qwen2Config
class OwnConfig(Qwen2Config):
    model_type = "own_qwen"
""",
    "modeling_own.py": """
from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Model
from .configuration_own import OwnConfig
class OwnModel(Qwen2Model):
    config_class = OwnConfig
class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig
class OwnForSequenceClassification(Qwen2ForSequenceClassification):
    config_class = OwnConfig
""",
    "tokenization_own.py": """
from transformers import PreTrainedTokenizerFast
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
""",
    "processing_own.py": """
from transformers import ProcessorMixin
class OwnProcessor(ProcessorMixin):
    pass
""",
}


def edit(path: Path, **values: Any) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **values}))


def folder(path: Path, *parts: str, asset: str = "debug_model") -> Path:
    """A copy of an asset whose `parts` ("config", "model", "tokenizer", "processor") are code that
    comes with it; any of it, when it runs, writes the file that `mark(path)` names."""
    shutil.copytree(ASSETS / asset, path)
    for name, code in _CODE.items():
        (path / name).write_text(_MARK.format(mark=str(mark(path))) + code)
    maps: dict[str, str] = {}
    if "config" in parts:
        maps["AutoConfig"] = "configuration_own.OwnConfig"
        edit(path / "config.json", model_type="own_qwen")
    if "model" in parts:
        maps["AutoModel"] = "modeling_own.OwnModel"
        maps["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM"
        maps["AutoModelForSequenceClassification"] = "modeling_own.OwnForSequenceClassification"
    edit(path / "config.json", auto_map=maps)
    if "tokenizer" in parts:
        edit(
            path / "tokenizer_config.json",
            tokenizer_class="OwnTokenizer",
            auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
        )
    if "processor" in parts:
        for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
            edit(
                path / file,
                processor_class="OwnProcessor",
                auto_map={"AutoProcessor": "processing_own.OwnProcessor"},
            )
    return path


def mark(path: Path) -> Path:
    return path.parent / f"{path.name}-ran"
