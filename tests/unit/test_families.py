"""Every causal language model of the installed transformers: right in all ways, or refused.

A new family that transformers brings is tried at once. `python tests/families.py` prints the table
of all families in all ways; here the ways that take two processes run on a selection.
"""

import re
from pathlib import Path

import families
import family_table
import pytest
from families import TOLERANCE

from torchrft.models.loader import load_config, load_tokenizer
from torchrft.rollout.native.engine import NativeEngine

TOKENIZER = load_tokenizer(str(Path(__file__).parents[1] / "assets/debug_model"))
SPREAD = [
    *("llama", "gemma", "gemma3_text", "qwen3_moe", "gpt2", "opt", "persimmon", "olmo2"),
    *("deepseek_v2", "gpt_neox", "phi3", "granite"),
    *("deepseek_v3", "glm4_moe_lite", "gemma4_text", "gpt_oss", "qwen3_5_text", "nemotron_h"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", families.names())
def test_each_family_is_right_or_refused(name, tmp_path):
    sentence = families.refusal(name)
    if sentence is not None:
        assert "\n" not in sentence
        assert "; use a model of another family" in sentence
        assert ("does not run on its own" in sentence) is (name in families.NOT_BUILT), sentence
        families.config(name).save_pretrained(tmp_path)  # and no weights
        with pytest.raises(ValueError, match=re.escape(sentence.partition(",")[0])):
            NativeEngine(load_config(str(tmp_path)), TOKENIZER, (1,))
        return
    differences = families.check([name], tmp_path, spread=False)[name]
    assert differences.keys() == {"padded", "packed", "native"}
    native = differences.pop("native")
    assert native < family_table.OWN_STEP.get(name, TOLERANCE), native
    assert max(differences.values()) < TOLERANCE, differences


def test_the_table_of_a_few(tmp_path):
    """Gradients and greedy tokens, too, and two ranks by fsdp, tp and sp."""
    chosen = ["granite", "gpt_oss", "qwen3_5_text", "mamba2", "mamba"]
    rows, refused = family_table.table(chosen, tmp_path)
    assert refused.keys() == {"mamba"}
    no = {name: {*row.reasons} for name, row in rows.items()}
    hybrid = {"tp", "sp"}
    assert no == {
        "granite": set(),
        "gpt_oss": {"tp"},
        "qwen3_5_text": hybrid,
        "mamba2": {*hybrid, "native"},
    }
    assert "*" not in family_table.text(rows, refused)  # no cell is beyond its tolerance


@pytest.mark.slow
def test_two_ranks_and_the_export(tmp_path):
    for name, differences in families.check(SPREAD, tmp_path).items():
        assert differences.keys() == {*families.WAYS}
        assert differences.pop("native") < family_table.OWN_STEP.get(name, TOLERANCE)
        assert max(differences.values()) < TOLERANCE, (name, differences)
