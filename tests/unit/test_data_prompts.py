"""Reading, formatting and tokenizing prompts: values, and the message of every refusal."""

import json
import logging
import re
from pathlib import Path

import datasets
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from torchrft.config.job_config import Data
from torchrft.data import prompts as prompts_module
from torchrft.data.prompts import load_prompts

ASSETS = Path(__file__).parents[1] / "assets"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "debug_model")


@pytest.fixture
def write(tmp_path):
    def write_lines(*lines, name="p.jsonl"):
        path = tmp_path / name
        text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        return str(path)

    return write_lines


ROWS = [{"prompt": "1+1=", "label": "2"}, {"prompt": "12+1=", "label": "13"}]


def summary(prompts):
    return [(p.row, p.text, p.label) for p in prompts]


def test_jsonl_values(write, tokenizer):
    rows = [{**ROWS[0], "level": 3, "tags": ["a", {"b": None}]}, "", {**ROWS[1], "level": None,
            "tags": {}}]  # fmt: skip
    prompts = load_prompts(write(*rows), Data(metadata_keys=["level", "tags"]), tokenizer)
    assert len(prompts) == 2
    assert prompts.dropped == 0
    first, second = prompts
    assert (first.row, first.text, first.token_ids, first.label) == (0, "1+1=", (9, 19, 9, 18), "2")
    assert first.metadata == {"level": 3, "tags": ["a", {"b": None}]}
    assert second.row == 2  # the blank line counts: row + 1 is the line in an editor
    assert second.token_ids == tuple(tokenizer("12+1=")["input_ids"])
    assert second.metadata == {"level": None, "tags": {}}
    assert prompts[-1] == prompts[1] == second
    assert prompts[0:2] == [first, second]
    with pytest.raises(IndexError):
        prompts[2]


def test_labels_of_any_type_pass_untouched(write, tokenizer):
    labels = [1, "1", 1.5, True, None, [1, "a"], {"x": 1}, {"y": [2]}]
    rows = [{"prompt": f"{i}", "label": label} for i, label in enumerate(labels)]
    prompts = load_prompts(write(*rows, {"prompt": "8"}), Data(), tokenizer)
    assert [p.label for p in prompts] == [*labels, None]
    assert [type(p.label) for p in prompts][:4] == [int, str, float, bool]


def test_json_array_and_json_lines_in_a_json_file(write, tokenizer):
    array = load_prompts(write(json.dumps(ROWS), name="a.json"), Data(), tokenizer)
    lines = load_prompts(write(*ROWS, name="b.json"), Data(), tokenizer)
    assert summary(array) == summary(lines) == [(0, "1+1=", "2"), (1, "12+1=", "13")]


def test_line_separators_inside_a_string_do_not_end_the_line(write, tokenizer):
    line = '{"prompt": "1\u2028\u00852", "label": "x"}'
    assert load_prompts(write(line), Data(), tokenizer)[0].text == "1\u2028\u00852"


def test_parquet_saved_folder_and_folder_of_files(write, tokenizer, tmp_path):
    expected = [(0, "1+1=", "2"), (1, "12+1=", "13")]
    table = datasets.Dataset.from_list([{**row, "other": 1.0} for row in ROWS])
    table.to_parquet(tmp_path / "p.parquet")
    table.save_to_disk(tmp_path / "saved")
    splits = datasets.DatasetDict(train=table, test=table.select([1]))
    splits.save_to_disk(tmp_path / "splits")
    (tmp_path / "files").mkdir()
    write(*ROWS, name="files/train.jsonl")
    for name in ("p.parquet", "saved", "splits", "splits:train", "files"):
        assert summary(load_prompts(str(tmp_path / name), Data(), tokenizer)) == expected, name
    test = load_prompts(f"{tmp_path}/splits:test", Data(), tokenizer)
    assert summary(test) == [(0, "12+1=", "13")]


def test_evaluation_never_reads_train_by_default(tokenizer, tmp_path):
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=r"eval_data: .*say which split .*d:test; .*train, test"):
        load_prompts(str(tmp_path / "d"), Data(), tokenizer, name="eval_data")
    assert len(load_prompts(f"{tmp_path}/d:test", Data(), tokenizer, name="eval_data")) == 2


def test_hub_id(tokenizer, monkeypatch):
    calls = []

    def load(*args):
        calls.append(args)
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert summary(load_prompts("openai/gsm8k/main:train", Data(), tokenizer))[0][1] == "1+1="
    load_prompts("owner/name", Data(), tokenizer)
    assert calls == [("openai/gsm8k", "main"), ("owner/name",)]


def test_hub_failure_says_what_was_tried(tokenizer, monkeypatch):
    def load(*args):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"prompt_data: a/b is no file or folder here.*hub: Conn"):
        load_prompts("a/b", Data(), tokenizer)


PROMPT = '{"prompt": "1"}'


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([PROMPT, '{"prompt": '], {}, "line 2: invalid JSON: Expecting value"),
        ([PROMPT, "", '{"prompt": NaN}'], {}, "line 3: invalid JSON: NaN is not JSON"),
        (['["a"]'], {}, "line 1: expected a JSON object, got ['a']"),
        (['{"prompt": "\udcff"}'], {}, "line 1: not valid UTF-8 (invalid start byte)"),
        (
            [PROMPT, '{"promt": "1", "x": 2}'],
            {},
            "line 2: no column 'prompt'; did you mean 'promt'? columns are 'promt', 'x'",
        ),
        ([PROMPT], {"metadata_keys": ["level"]}, "line 1: no column 'level'; columns are 'prompt'"),
        (
            ['{"prompt": "1", "lable": 1}'],
            {"label_key": "labl"},
            "no row has the column 'labl' (label_key); did you mean 'lable'?",
        ),
        (['{"prompt": 7}'], {}, "line 1: 'prompt' must be a string or a list of chat messages"),
        (['{"prompt": null}'], {}, "line 1: 'prompt' must be a string or a list of chat messages"),
        ([PROMPT, '{"prompt": " \\n"}'], {}, "line 2: 'prompt' is empty"),
        (['{"prompt": []}'], {}, "line 1: 'prompt' is an empty list of messages"),
        ([PROMPT, '{"prompt": "ABC"}'], {}, "line 2: the prompt becomes no token at all"),
        (['{"prompt": "ABC"}'], {}, "line 1: the prompt becomes no token at all"),
        (
            ['{"prompt": [{"role": "user", "content": "1"}]}'],
            {},
            "line 1: 'prompt' holds chat messages; they need apply_chat_template = true",
        ),
        ([PROMPT], {"system_prompt": "s"}, "system_prompt needs apply_chat_template = true"),
        (
            ['{"prompt": [{"role": "user"}]}'],
            {"apply_chat_template": True},
            'line 1: \'prompt\': a message must be {"role": string, "content": string}, got {',
        ),
        (
            ['{"prompt": [{"role": "user", "content": ""}]}'],
            {"apply_chat_template": True},
            "line 1: 'prompt' is empty",
        ),
        (
            ['{"prompt": [{"role": "assistant", "content": "1"}]}'],
            {"apply_chat_template": True},
            "line 1: 'prompt' ends with the assistant's message",
        ),
        (
            ['{"prompt": [{"role":"system","content":"a"},{"role":"user","content":"1"}]}'],
            {"apply_chat_template": True, "system_prompt": "b"},
            "line 1: the messages start with a system message already",
        ),
        ([], {}, "holds no rows"),
        (["", " "], {}, "holds no rows"),
    ],
)
def test_malformed_rows_name_file_and_line(write, tokenizer, lines, options, message):
    path = write(*lines)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_prompts(path, Data(**options), tokenizer)
    assert str(caught.value).startswith("prompt_data: ")
    if "line" in message:
        assert f"{path}, {message}" in str(caught.value)


def test_malformed_tables_name_file_and_row(tokenizer, tmp_path):
    table = datasets.Dataset.from_list([{"question": "1"}, {"question": ""}])
    path = str(tmp_path / "p.parquet")
    table.to_parquet(path)
    with pytest.raises(ValueError, match=r"p\.parquet: no column 'prompt'; columns are 'question'"):
        load_prompts(path, Data(), tokenizer)
    with pytest.raises(ValueError, match=r"p\.parquet, row 1: 'question' is empty"):
        load_prompts(path, Data(input_key="question"), tokenizer)
    with pytest.raises(ValueError, match=r"p\.parquet: no column 'a'; columns"):
        load_prompts(path, Data(input_key="question", metadata_keys=["a"]), tokenizer)
    table.select([0]).to_parquet(path)
    with pytest.raises(ValueError, match=r"no row has the column 'questio' .*did you mean 'quest"):
        load_prompts(path, Data(input_key="question", label_key="questio"), tokenizer)


def test_sources_that_cannot_be_read(write, tokenizer, tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.txt").write_text("1")
    for source, message in (
        (f"{tmp_path}/none.jsonl", r"none\.jsonl: no such file"),
        (f"{tmp_path}/none/at/all", r"none/at/all: no such file or folder"),
        ("./none", r"\./none: no such file or folder"),
        (f"{tmp_path}/bad.parquet", r"bad\.parquet is not a readable parquet file: .*"),
        (f"{tmp_path}/empty", r"empty is not a dataset folder that `datasets` can load"),
        (f"{tmp_path}/p.txt", r"p\.txt: expected a file ending in \.jsonl, \.json, \.parquet"),
        (write(PROMPT) + ":test", r"p\.jsonl: no split 'test'; splits are train"),
        (write("[1]", name="x.json"), r"x\.json, row 0: expected a JSON object, got 1"),
        (write("[1", name="y.json"), r"y\.json: invalid JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            load_prompts(source, Data(), tokenizer)
    assert len(load_prompts(write(PROMPT) + ":train", Data(), tokenizer)) == 1


def test_chat_template_and_system_prompt(write, tokenizer):
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"},
            {"role": "user", "content": "3"}]  # fmt: skip
    path = write({"prompt": "1+1="}, {"prompt": chat})
    plain, turns = load_prompts(path, Data(apply_chat_template=True), tokenizer)
    assert plain.text == "<|user|>1+1=\n<|assistant|>"
    assert plain.token_ids == (4, 9, 19, 9, 18, 6, 5)
    assert turns.text == "<|user|>1\n<|assistant|>2<eos><|user|>3\n<|assistant|>"
    system = load_prompts(path, Data(apply_chat_template=True, system_prompt="be"), tokenizer)
    assert system[0].text == "<|system|>be\n" + plain.text
    # What a reward model with another template starts from.
    assert turns.messages == tuple(chat)
    assert [message["role"] for message in system[0].messages] == ["system", "user"]
    assert load_prompts(write({"prompt": "1+1="}), Data(), tokenizer)[0].messages == ()


def test_messages_from_parquet_lose_the_keys_arrow_adds(tokenizer, tmp_path):
    prompt = [{"role": "system", "content": "s", "name": None}, {"role": "user", "content": "1",
              "name": "a"}]  # fmt: skip
    datasets.Dataset.from_list([{"prompt": prompt}]).to_parquet(tmp_path / "p.parquet")
    tokenizer.chat_template = "{% for m in messages %}{{ m | length }}{% endfor %}"
    data = Data(apply_chat_template=True)
    assert load_prompts(str(tmp_path / "p.parquet"), data, tokenizer)[0].text == "23"


def test_template_faults(write, tokenizer):
    data = Data(apply_chat_template=True)
    tokenizer.chat_template = "{{ raise_exception('only users here') }}"
    with pytest.raises(ValueError, match=r"line 1: the chat template refuses it: only users here"):
        load_prompts(write(PROMPT), data, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"apply_chat_template: the tokenizer of .* has no chat"):
        load_prompts(write(PROMPT), data, tokenizer)


def add_specials(tokenizer, template):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<eos>", 1), ("<|user|>", 4)]
    )


def test_special_tokens_of_the_tokenizer(write, tokenizer, caplog):
    path = write({"prompt": "1"}, {"prompt": "2<eos>"})
    add_specials(tokenizer, "<|user|> $A <eos>")
    prompts = load_prompts(path, Data(), tokenizer)
    # A first token that the model expects stays; the appended one goes, the user's own stays.
    assert [p.token_ids for p in prompts] == [(4, 9), (4, 10, 1)]
    assert caplog.messages == [
        "the tokenizer appends special tokens to a text; "
        "they are cut off, so that the response continues the prompt"
    ]
    templated = load_prompts(path, Data(apply_chat_template=True), tokenizer)
    assert templated[0].token_ids == (4, 9, 6, 5)  # no second <|user|>, no <eos>
    with pytest.raises(ValueError, match="line 1: the prompt becomes no token at all"):
        load_prompts(write({"prompt": "A"}), Data(), tokenizer)


@pytest.mark.parametrize(
    ("prompt_max_len", "max_len", "kept"),
    [(4, 100, [0, 1]), (3, 100, [0]), (100, 5, [0, 1]), (100, 4, [0]), (5, 6, [0, 1, 2])],
)
def test_over_long_prompts_are_dropped_and_counted(
    write, tokenizer, caplog, prompt_max_len, max_len, kept
):
    path = write(*({"prompt": "1" * length, "label": length} for length in (3, 4, 5)))
    data = Data(prompt_max_len=prompt_max_len, max_len=max_len)
    with caplog.at_level(logging.WARNING):
        prompts = load_prompts(path, data, tokenizer)
    assert [p.row for p in prompts] == kept
    assert [p.label for p in prompts] == [row + 3 for row in kept]
    assert prompts.dropped == 3 - len(kept)
    if prompts.dropped:
        (message,) = caplog.messages
        assert message.startswith(f"prompt_data: dropped {prompts.dropped} of 3 prompts of {path}")
    else:
        assert not caplog.messages


def test_nothing_left_is_an_error(write, tokenizer):
    path = write({"prompt": "1111"}, {"prompt": "111"})
    with pytest.raises(ValueError, match=r"all 2 prompts are longer than 2 tokens .* has 3 tokens"):
        load_prompts(path, Data(prompt_max_len=2), tokenizer)


def test_more_rows_than_one_batch(write, tokenizer):
    rows = [{"prompt": str(i), "label": i} for i in range(2500)]
    prompts = load_prompts(write(*rows), Data(), tokenizer)
    assert [p.label for p in prompts] == list(range(2500))
    assert prompts[2499].token_ids == (10, 12, 17, 17)


def test_long_sources_show_progress(write, tokenizer, monkeypatch, capsys):
    path = write(*({"prompt": str(i)} for i in range(5)))
    load_prompts(path, Data(), tokenizer)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(prompts_module, "_ROWS_WORTH_A_BAR", 5)
    load_prompts(path, Data(), tokenizer)
    assert "tokenizing prompt_data" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    load_prompts(path, Data(), tokenizer)
    assert capsys.readouterr().out == ""


def test_debug_task_loads(tokenizer):
    prompts = load_prompts(str(ASSETS / "max_digit/train.jsonl"), Data(), tokenizer)
    assert len(prompts) == 1800
    assert {len(p.token_ids) for p in prompts} == {5}
