"""Malformed TOML files and flags: each ends with 2 and a line that names key and value.

By hand, generated from every field's type, and at random: never a traceback.
"""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrft.config.fields import FIELDS, SECTIONS, branches, show
from torchrft.config.flags import kind_of
from torchrft.config.manager import ConfigError, load, read

REQUIRED = ["--pretrain", "m", "--train_batch_size", "64", "--rollout_batch_size", "16"]
HEAD = '[model]\npretrain = "m"\n[training]\ntrain_batch_size = 64\n[rollout]\n'
HEAD += "rollout_batch_size = 16\n"


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "NGPU", "NNODES"):
        monkeypatch.delenv(name, raising=False)


def refusal(argv, capsys) -> str:
    """What `read` prints when it refuses `argv`: one line per fault, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        read([*argv, "--dry_run"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert "Traceback" not in err
    assert all(line.startswith("error: ") for line in err.splitlines())
    return err


FLAGS = [
    # unknown names
    (["--max_leng", "5"], "--max_leng 5: unknown flag; did you mean --max_len?"),
    (["--max-len", "5"], "--max-len 5: unknown flag; did you mean --max_len?"),
    (["--MAX_LEN", "5"], "--MAX_LEN 5: unknown flag; did you mean --max_len?"),
    (["--data.max_leng=5"], "--data.max_leng 5: unknown flag; did you mean --data.max_len?"),
    (["--dat.max_len", "5"], "--dat.max_len 5: unknown flag; did you mean --data.max_len?"),
    (["--data.top_p", "1"], "--data.top_p 1: unknown flag; did you mean --rollout.top_p?"),
    (["--reward.functions.0.weight", "1"], "--reward.functions.0.weight 1: unknown flag"),
    (["--no_bf16"], "--no_bf16: unknown flag; write --bf16 false"),
    (["--disable_compile"], "--disable_compile: unknown flag; write --compile false"),
    (["--zzz", "1"], "--zzz 1: unknown flag; --help lists all flags"),
    (["--max_len", "9\nx = 1"], "--max_len 9 x = 1: expected integer > 0"),
    (["--"], "--: unknown flag"),
    (["--=5"], "-- 5: unknown flag"),
    (["--data.", "5"], "--data. 5: unknown flag"),
    # the shape of the line
    (["--max_len"], "--max_len: its value is missing; expected integer > 0"),
    (["--max_len", "--bf16"], "--max_len: its value is missing"),
    (["--max_len="], "--max_len : expected integer > 0"),
    (["--max_len", "5", "6"], '--max_len 5 6: takes one value; "6" is too much'),
    (["--max_len=5", "6"], '--max_len 5 6: takes one value; "6" is too much'),
    (["--bf16", "true", "x"], '--bf16 true x: takes one value; "x" is too much'),
    (["--max_len", "9", "--max_len", "9"], "--max_len 9: given twice, first as --max_len 9"),
    (["--max_len", "9", "--data.max_len", "8"], "--data.max_len 8: given twice"),
    (
        ["--enable_engine_sleep", "--disable_engine_sleep"],
        "--disable_engine_sleep: given twice, first as --enable_engine_sleep",
    ),
    (["--config_file"], "--config_file: its value is missing; expected a .toml file"),
    (["--config_file", "no.toml"], "--config_file no.toml: no such file"),
    (["--config_file", "/"], "--config_file /: is a directory; give the path of a .toml file"),
    (["--dry_run=maybe"], "--dry_run maybe: expected true or false"),
    # values
    (["--max_len", "1.5"], "--max_len 1.5: expected integer > 0"),
    (["--max_len", "1e3"], "--max_len 1e3: expected integer > 0"),
    (["--max_len", "0"], "--max_len 0: expected integer > 0"),
    (["--max_len", "-4"], "--max_len -4: expected integer > 0"),
    (["--max_len", "9" * 5000], "--max_len 999"),
    (["--bf16", "yes"], "--bf16 yes: expected true or false"),
    (["--bf16", "1"], "--bf16 1: expected true or false"),
    (["--disable_engine_sleep", "no"], "--disable_engine_sleep no: expected true or false"),
    (["--temperature", "nan"], "--temperature nan: must be finite; expected number >= 1e-05"),
    (["--temperature", "inf"], "--temperature inf: must be finite"),
    (["--temperature", "1e999"], "--temperature 1e999: must be finite"),
    (["--temperature", "0"], "--temperature 0: expected number >= 1e-05"),
    (["--temperature", "0,7"], "--temperature 0,7: expected number >= 1e-05"),
    (["--top_p", "1.1"], "--top_p 1.1: expected number > 0 and <= 1"),
    (["--seed", "4294967296"], "--seed 4294967296: expected integer >= 0 and < 4294967296"),
    (["--adam_betas", "0.9"], "--adam_betas 0.9: "),
    (["--adam_betas", "0.9,1.0"], "--adam_betas 0.9,1.0: adam_betas[1] = 1.0: expected 2 values"),
    (["--adam_betas", "0.9", "x"], '--adam_betas 0.9 x: adam_betas[1] = "x": expected 2 values'),
    (["--adam_betas", "1,2,3"], "--adam_betas 1,2,3: "),
    (["--adam_betas", "[0.9, "], "--adam_betas [0.9, : expected 2 values"),
    (["--stop_token_ids", "1,-2"], "stop_token_ids[1] = -2: expected list of integer >= 0"),
    (["--stop_token_ids", "1,,2"], 'stop_token_ids[1] = "": expected list of integer'),
    (["--stop", "a,"], 'stop[1] = "": must not be empty'),
    (["--kl_estimator", "k33"], "--kl_estimator k33: expected one of k1, k2, k3; did you mean k3?"),
    (["--engine_type", "vlm"], "--engine_type vlm: expected one of vllm, sglang, native; did you"),
    (["--advantage_estimator", "GRPO"], "did you mean group_norm?"),
    (["--zero_stage", "4"], "--zero_stage 4: expected one of 1, 2, 3"),
    (["--dp_shard", "0"], "--dp_shard 0: expected -1 or integer > 0"),
    (["--wandb_org", ""], "--wandb_org : must not be empty"),
    (["--wandb_org", " "], "--wandb_org : must not be empty"),
    (
        ["--functions", "[{name = 'x', wieght = 1}]"],
        "functions[0].wieght = 1: unknown key; did you",
    ),
    (["--functions", "[{weight = 1}]"], "functions[0].name"),
    (["--functions", "[{name = 'x', weight = nan}]"], "functions[0].weight = nan"),
    (["--functions", "[3]"], "functions[0] = 3: expected list of { name, weight } or text"),
    (["--wandb_org", "a\nb"], '[logging] wandb_org = "a\\nb" has no effect without use_wandb'),
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), FLAGS, ids=lambda value: str(value)[:50])
def test_flags(words, message, capsys):
    assert message in refusal([*REQUIRED, *words], capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["junk", *REQUIRED], '"junk": not a flag; write --key "junk"'),
        (["-x", *REQUIRED], '"-x": not a flag'),
        (["-1", *REQUIRED], '"-1": not a flag'),
        (REQUIRED[2:], "[model] pretrain is missing; set it there or pass --pretrain (text)"),
        (REQUIRED[:4], "[rollout] rollout_batch_size is missing"),
        ([*REQUIRED[:2], *REQUIRED[4:]], "[training] train_batch_size is missing"),
    ],
)
def test_whole_command_lines(words, message, capsys):
    assert message in refusal(words, capsys)


TOMLS = [
    ("[data\n", 'line 1: "[data": TOML syntax error'),
    ("[data]\nmax_len =\n", 'line 2: "max_len =": TOML syntax error'),
    ("[data]\nmax_len = 1\nmax_len = 2\n", 'line 3: "max_len = 2": TOML syntax error'),
    ("[data]\n[data]\n", 'line 2: "[data]": TOML syntax error'),
    ('[data]\ninput_key = "a\n', 'line 2: "input_key = '),
    ("[data]\nmax_len = 0x\n", "line 2"),
    ("[data]\nmax_len = yes\n", 'line 2: "max_len = yes": TOML syntax error'),
    ("x = " + "[" * 5000, "TOML syntax error"),
    ("x = " + "9" * 5000, "TOML syntax error"),
    ("[dta]\nmax_len = 5\n", "[dta]: unknown section; did you mean [data]?"),
    ("[Data]\nmax_len = 5\n", "[Data]: unknown section; did you mean [data]?"),
    ("[qqq]\n", "[qqq]: unknown section; valid: model, data, training"),
    ("[[data]]\nmax_len = 5\n", "must be a table; write [data]"),
    ("data = 5\n", "data = 5: must be a table; write [data]"),
    ("max_len = 5\n", "max_len = 5: unknown section; did you mean max_len under [data]?"),
    ("zzz = 5\n", "zzz = 5: unknown section; valid:"),
    ("[data]\nmax_leng = 5\n", "[data] max_leng = 5: unknown key; did you mean max_len?"),
    (
        "[data]\ntop_p = 1.0\n",
        "[data] top_p = 1.0: unknown key; did you mean top_p under [rollout]?",
    ),
    ("[data]\ntemprature = 1.0\n", "did you mean temperature under [rollout]?"),
    ("[data]\nqqqq = 1\n", "[data] qqqq = 1: unknown key; valid: prompt_data"),
    ('[data]\n"a\\nb" = 1\n', "unknown key"),
    ("[data.max_len]\nx = 1\n", '[data] max_len = {"x": 1}: expected integer > 0'),
    ('[data]\nmax_len = "5"\n', '[data] max_len = "5": expected integer > 0'),
    ("[data]\nmax_len = 5.0\n", "[data] max_len = 5.0: expected integer > 0"),
    ("[data]\nmax_len = true\n", "[data] max_len = true: expected integer > 0"),
    ("[data]\nmax_len = [5]\n", "[data] max_len = [5]: expected integer > 0"),
    ("[data]\nmax_len = 2024-01-01\n", '[data] max_len = "2024-01-01": expected integer > 0'),
    ("[data]\ninput_key = 5\n", "[data] input_key = 5: expected text"),
    ('[data]\ninput_key = ""\n', '[data] input_key = "": must not be empty'),
    ('[data]\ninput_key = "a\\u0000"\n', "must not contain a null character"),
    ('[data]\nmetadata_keys = "a"\n', '[data] metadata_keys = "a": expected list of text'),
    ("[data]\nmetadata_keys = [1]\n", "metadata_keys[0] = 1: expected list of text"),
    ("[data]\nmixed_mm_data = 1\n", "[data] mixed_mm_data = 1: expected true or false"),
    ('[data]\nmixed_mm_data = "true"\n', '[data] mixed_mm_data = "true": expected true or false'),
    ("[optimizer]\nl2 = nan\n", "[optimizer] l2 = nan: must be finite; expected number >= 0"),
    ("[optimizer]\nl2 = -inf\n", "[optimizer] l2 = -inf: must be finite"),
    ("[optimizer]\nl2 = -0.1\n", "[optimizer] l2 = -0.1: expected number >= 0"),
    ('[optimizer]\nl2 = "0.1"\n', '[optimizer] l2 = "0.1": expected number >= 0'),
    ("[optimizer]\nl2 = true\n", "[optimizer] l2 = true: expected number >= 0"),
    ("[optimizer]\nl2 = 1" + "0" * 400 + "\n", "[optimizer] l2 = 1000"),
    ("[optimizer]\nadam_betas = [0.9]\n", "[optimizer] adam_betas = [0.9]: expected 2 values"),
    ("[optimizer]\nadam_betas = 0.9\n", "[optimizer] adam_betas = 0.9: expected 2 values"),
    ("[optimizer]\nadam_betas = [true, 0]\n", "adam_betas[0] = true: expected 2 values"),
    ("[parallel]\nzero_stage = true\n", "[parallel] zero_stage = true: expected one of 1, 2, 3"),
    ("[parallel]\nzero_stage = 2.0\n", "[parallel] zero_stage = 2.0: expected one of 1, 2, 3"),
    ('[parallel]\nzero_stage = "2"\n', '[parallel] zero_stage = "2": '),
    ("[parallel]\ndp_shard = -1.0\n", "[parallel] dp_shard = -1.0: expected -1 or integer > 0"),
    ("[parallel]\ndp_shard = -2\n", "[parallel] dp_shard = -2: expected -1 or integer > 0"),
    ('[algorithm]\nkl_estimator = "K3"\n', 'kl_estimator = "K3": expected one of k1, k2, k3; did'),
    ("[algorithm]\nkl_estimator = 3\n", "[algorithm] kl_estimator = 3: expected one of k1, k2, k3"),
    ("[algorithm]\ndual_clip = 1\n", "[algorithm] dual_clip = 1: expected number > 1"),
    ("[reward]\nfunctions = [3]\n", "functions[0] = 3: expected list of"),
    ('[reward]\nfunctions = "x"\n', '[reward] functions = "x": expected list of'),
    ('[reward]\nfunctions = [""]\n', "functions[0].name"),
    ('[reward]\nfunctions = [{ name = "x", weight = "1" }]\n', 'functions[0].weight = "1"'),
    ("[reward]\nremote_rm_url = [5]\n", "remote_rm_url[0] = 5: expected list of text or text"),
    ("[reward]\nremote_rm_url = 5\n", "[reward] remote_rm_url = 5: expected list of text or text"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "message"), TOMLS, ids=lambda value: str(value)[:50])
def test_tomls(text, message, tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    err = refusal(["--config_file", str(path), *REQUIRED], capsys)
    assert message in err
    assert "bad.toml" in err


def test_other_faults_of_the_file(tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe[data]")
    assert "is not UTF-8 text at byte 0" in refusal(["--config_file", str(path)], capsys)
    near = refusal(["--config_file", str(tmp_path / "bda.toml")], capsys)
    assert f"did you mean {path}?" in near
    assert "error:" in refusal(["--config_file", "a\0b"], capsys)


def test_an_unreadable_file_does_not_make_required_fields_missing(tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text("[data\n")
    err = refusal(["--config_file", str(path), "--max_len", "x"], capsys)
    assert len(err.splitlines()) == 2
    assert "--max_len x: expected integer > 0" in err


WRONG = {
    "object": ["", "1", "{a = }", "{a = [1]}"],
    "boolean": ["yes", "0"],
    "integer": ["1.5", "-9", "x"],
    "number": ["nan", "-1", "x"],
    "string": [""],
    "array": [""],
}


def wrong_words(name: str) -> list[str]:
    if any("enum" in part for part in branches(FIELDS[name].schema)):
        return ["nonsense", ""]
    words = WRONG[kind_of(name)]
    lowest = ("minimum", "exclusiveMinimum")
    parts = branches(FIELDS[name].schema)
    is_positive = any(part.get(key, -1) >= 0 for part in parts for key in lowest)
    return words if is_positive else [word for word in words if word != "-1"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_wrong_flags(name):
    rest = [*REQUIRED, "--dry_run"]
    if f"--{name}" in rest:
        at = rest.index(f"--{name}")
        rest = rest[:at] + rest[at + 2 :]
    for word in wrong_words(name):
        with pytest.raises(ConfigError) as error:
            load([*rest, f"--{name}", word])
        assert all(f"--{name} {word}".strip() in fault for fault in error.value.faults)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_every_field_refuses_wrong_types_in_toml(name, tmp_path):
    kind, path = kind_of(name), tmp_path / "a.toml"
    values = ["1979-05-27", "{ a = [1] }", "nan"]
    values += ["true"] if kind != "boolean" else ['"true"', "1"]
    values += ['"1"'] if kind in ("integer", "number") else ["3"]
    section = FIELDS[name].section
    required = {word[2:]: value for word, value in zip(REQUIRED[::2], REQUIRED[1::2], strict=True)}
    required.pop(name, None)
    flags = [word for key, value in required.items() for word in (f"--{key}", value)]
    for value in values:
        path.write_text(f"[{section}]\n{name} = {value}\n")
        with pytest.raises(ConfigError) as error:
            load([*flags, "--dry_run", "--config_file", str(path)])
        assert all(f"[{section}] {name} = " in fault for fault in error.value.faults)


def faults_of(argv: list[str]) -> list[str]:
    try:
        load(argv)
    except ConfigError as error:
        return error.faults
    return []


words = st.one_of(
    st.sampled_from([f"--{name}" for name in FIELDS]),
    st.sampled_from([f"--{entry.section}.{name}" for name, entry in FIELDS.items()]),
    st.sampled_from(["true", "0", "-1", "1.5", "nan", "[", "[1]", "(", "--dry_run", "k3", ""]),
    st.text(max_size=8).filter(lambda text: text not in ("-h", "--help")),
)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(st.lists(words, max_size=8))
def test_random_words_never_crash(argv):
    assert all(fault and fault.isprintable() for fault in faults_of(argv))


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([])
)


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.sampled_from(list(FIELDS)), values, max_size=5))
def test_random_toml_values_never_crash(tmp_path_factory, chosen):
    lines = [HEAD] if not chosen.keys() & {"pretrain", "train_batch_size"} else []
    for section in SECTIONS:
        keys = [key for key in chosen if FIELDS[key].section == section]
        if keys and f"[{section}]" not in "".join(lines):
            lines.append(f"[{section}]\n")
            lines += [f"{key} = {show(chosen[key])}\n" for key in keys]
    path = tmp_path_factory.mktemp("r") / "a.toml"
    path.write_text("".join(lines), errors="replace")
    faults = faults_of(["--config_file", str(path), "--dry_run"])
    assert all(fault and fault.isprintable() for fault in faults)


def test_show_writes_what_toml_cannot_hold():
    assert show(math.nan) == "nan"
    assert show(-math.inf) == "-inf"
    assert show("\x1b") == '"\\u001b"'
    assert len(show("x" * 1000)) == 90
    assert show(10**5000) == "<int too large to show>"
