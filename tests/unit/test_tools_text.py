"""What people get to see: short, on one line, and without secrets."""

import json
import logging

import pytest
import tiny_job

from torchrft.config.manager import ConfigError, load
from torchrft.tools import text as text_module
from torchrft.tools.credentials import bearer_token, check_url
from torchrft.tools.logging import logger, setup_logging
from torchrft.tools.text import is_secret, one_line, redact, shorten


@pytest.fixture(autouse=True)
def no_known_secrets(monkeypatch):
    monkeypatch.setattr(text_module, "_known", set())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pass@host:1/a", "http://***@host:1/a"),
        ("https://me@host/a", "https://***@host/a"),
        ('holds "http://me:pa/ss#?@host:1"', 'holds "http://***@host:1"'),
        ('"me:pass@host:1"', '"***@host:1"'),
        ("x?access_token=ab%20c&n=1", "x?access_token=***&n=1"),
        ("x?n=1&key=abc", "x?n=1&key=***"),
        ('{"api_key": "pass", "n": "1"}', '{"api_key": "***", "n": "1"}'),
        ("password = 'pa ss'", "password = '***'"),
        ("Authorization: Bearer x", "Authorization: Bearer ***"),
        ("'password': ['a', 'b']", "'password': ***]"),
        ("--wandb.api_key abc: unknown", "--wandb.api_key *** unknown"),
    ],
)
def test_secrets_do_not_show(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "token: 5",
        'eos_token = "</s>"',
        "the bearer bonds",
        "--tokenizer x --max_tokens 5",
        "no column 'tokens'",
        "token_ids = [1, 2]",
        "me@example.org",
        "http://host:1/a@b?monkey=1",
    ],
)
def test_other_text_stays(text):
    assert redact(text) == text


def test_the_tokens_of_this_process_do_not_show(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("MINE", " correct-horse\n")
    assert bearer_token("MINE", "token_env") == "correct-horse"
    assert redact("hf_abcdefgh is no correct-horse") == "*** is no ***"


@pytest.mark.parametrize("token", ["abc\ndefghijk", "abc defghijk", "abc\x07defghijk", "a\u2028b"])
def test_a_token_that_no_header_can_hold_is_refused_unseen(monkeypatch, token):
    monkeypatch.setenv("MINE", token)
    with pytest.raises(ValueError, match='token_env = "MINE": its token has a line') as raised:
        bearer_token("MINE", "token_env")
    assert "abc" not in str(raised.value)


@pytest.mark.parametrize("url", ["http://me:pass@a:1", "http://a:1/?token=pass", "me:pass@a:1"])
def test_a_server_of_a_url_with_credentials_is_refused_unseen(url):
    with pytest.raises(ValueError, match="remote_rm_url holds") as raised:
        check_url(url, "remote_rm_url")
    assert "pass@" not in str(raised.value)
    assert "=pass" not in str(raised.value)
    with pytest.raises(ConfigError) as refused:
        load(tiny_job.argv(remote_rm_url=url))
    assert "pass@" not in str(refused.value)
    assert "=pass" not in str(refused.value)


def test_log_lines_are_short_and_without_secrets(capsys):
    setup_logging()
    logger.warning("http://me:pass@host: %s", "x" * 5_000_000)
    logging.getLogger().handlers.clear()
    line = capsys.readouterr().err
    assert "WARNING http://***@host: xxx" in line
    assert "more characters" in line
    assert len(line) < 2000


def test_long_text_keeps_its_end():
    shown = one_line("a" * 5_000_000 + "\nremedy")
    assert len(shown) < 2000
    assert shown.endswith("a remedy")
    assert shorten("short", 5) == "short"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--pretrain", "x" * 5_000_000],
        ["--" + "x" * 5_000_000, "1"],
        ["--max_len", "x" * 5_000_000],
        ["--max_len", "9" * 5_000_000],
        ["--stop_token_ids", ",".join(["x"] * 100_000)],
        ["--metadata_keys", json.dumps([1] * 100_000)],
    ],
    ids=lambda words: words[0][:20],
)
def test_a_value_of_megabytes_is_not_echoed(words):
    with pytest.raises(ConfigError) as raised:
        load([*tiny_job.argv(), *words] if words[0] != "--pretrain" else [*words])
    assert len(str(raised.value)) < 210_000
    assert all(len(line) < 2000 for line in raised.value.faults)


SECRETS = [
    ("--functions", '[{name = "exact_match", options = {url = "http://a:hush1@h/"}}]'),
    (
        "--functions",
        '[{name = "exact_match", options = {headers = "Authorization: Bearer hush1"}}]',
    ),
    ("--functions", '[{name = "exact_match", options = {passwords = ["a"], password = 71234}}]'),
    ("--log_dir", "s3://key:hush1@bucket"),
    ("--pretrain", "https://me:hush1@host/model"),
    ("--token", "hush1"),
]


@pytest.mark.parametrize(("flag", "value"), SECRETS)
def test_a_secret_in_any_option_is_refused_unseen(flag, value):
    words = [word for word in tiny_job.argv() if word != flag]
    with pytest.raises(ConfigError) as refused:
        load([*tiny_job.argv(**{flag[2:]: value})] if flag != "--token" else [*words, flag, value])
    assert "holds a secret, " in str(refused.value) or flag == "--token"
    assert "hush1" not in str(refused.value)
    assert "71234" not in str(refused.value)


@pytest.mark.parametrize(
    "line", ['url = "http://a:hush1@h', 'api_key = "hush1', 'password = """hush1 x""" y', "b = 1 2"]
)
def test_a_toml_line_is_echoed_without_its_secret(tmp_path, line):
    (tmp_path / "job.toml").write_text(f"[model]\n{line}\n")
    with pytest.raises(ConfigError, match="line 2") as refused:
        load(["--config_file", str(tmp_path / "job.toml")])
    assert "hush1" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("url", "http://***@host", True),  # read back, it would be taken for the real one
        ("my_api_key", "x", True),
        ("token", "x", True),
        ("headers", "Bearer Sk123456", True),
        ("hf_token", True, False),
        ("eos_token", "</s>", False),
        ("tokenizer", "x", False),
        ("max_tokens", 5, False),
        ("wandb_run_name", "lr:1e-6@gpu8", False),
    ],
)
def test_what_counts_as_a_secret(name, value, secret):
    assert is_secret(name, value) is secret
