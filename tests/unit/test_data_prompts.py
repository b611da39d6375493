"""Reading, formatting and tokenizing prompts: values, and the message of every refusal."""

import json
import logging
import re
from pathlib import Path

import datasets
import huggingface_hub
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


def wrapped(message, cause):
    """As `datasets` raises it."""
    error = datasets.exceptions.DatasetNotFoundError(message)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            ConnectionError("no network"),
            'the dataset "a/b" is no folder here and not in the cache, and the hub is out of '
            "reach, or run `hf download --repo-type dataset a/b` where",
        ),
        (
            wrapped("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.", None),
            '"a/b" is neither a folder here nor a dataset on the hub for this user: check the sp',
        ),
        (
            wrapped("Dataset 'a/b' is a gated dataset on the Hub. Visit the page.", OSError()),
            'the dataset "a/b" is gated: accept its terms at https://huggingface.co/datasets/a/b '
            "and log in by `hf auth login`",
        ),
        (
            ValueError("BuilderConfig 'c' not found. Available: ['x', 'y']"),
            "a/b is no file or folder here, and could not be loaded from the Hugging Face hub: "
            "ValueError: BuilderConfig 'c' not found. Available: ['x', 'y']",
        ),
    ],
)
def test_hub_failure_says_what_was_tried(tokenizer, monkeypatch, fault, message):
    def load(*args):
        raise fault

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="^" + re.escape(f"prompt_data: {message}")):
        load_prompts("a/b", Data(), tokenizer)


PROMPT = '{"prompt": "1"}'


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([PROMPT, '{"prompt": '], {}, "line 2: invalid JSON: Expecting value"),
        (
            [PROMPT, '{"prompt": "a", "label": ' + "[" * 900 + "]" * 900 + "}"],
            {},
            "line 2: nested more than 64 deep; store it as text",
        ),
        (
            [PROMPT, '{"prompt": "a", "label": ' + '{"a":' * 99_999 + "1" + "}" * 100_000],
            {},
            "line 2: nested too deeply; store it as text",
        ),
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


USER = '{"role": "user", "content": '
SECOND = '[{"role": "user", "content": "1"}]'


@pytest.mark.parametrize(
    ("line", "column"),
    [
        ('{"prompt": "1\\ud800"}', "prompt"),
        ('{"prompt": "\\udc001"}', "prompt"),
        ('{"prompt": [' + USER + '"1\\ud83d"}]}', "prompt"),
        ('{"prompt": [{"role": "user", "content": "1", "name": "\\udfff"}]}', "prompt"),
        ('{"prompt": "1", "label": "\\ud800"}', "label"),
        ('{"prompt": "1", "label": {"a": ["\\udbff"]}}', "label"),
        ('{"prompt": "1", "label": {"\\udbff": 1}}', "label"),
        ('{"prompt": "1", "level": "\\udbff"}', "level"),
    ],
)
def test_half_a_character_names_file_line_and_column(write, tokenizer, line, column):
    data = Data(apply_chat_template=True, metadata_keys=["level"] if column == "level" else [])
    path = write('{"prompt": "1", "level": 1}', line)
    start = re.escape(f"prompt_data: {path}, line 2: {column!r} holds half a character (lone surr")
    with pytest.raises(ValueError, match=start):
        load_prompts(path, data, tokenizer)


def test_whole_characters_null_and_columns_that_are_not_read_pass(write, tokenizer):
    path = write('{"prompt": "1\\ud83d\\ude00", "x": "\\ud800"}', '{"prompt": "1\\u00002"}')
    assert [p.text for p in load_prompts(path, Data(), tokenizer)] == ["1\U0001f600", "1\x002"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('[{"type": "text", "text": "1+"}, {"type": "text", "text": "2"}]', "1+2"),
        ('[{"type": "text", "text": "1+2", "image": null}]', "1+2"),
        ('[{"type": "text", "text": ""}, {"type": "text", "text": "1+2"}]', "1+2"),
    ],
)
def test_lists_of_text_parts_are_texts(write, tokenizer, content, text):
    path = write(f'{{"prompt": [{USER}{content}}}]}}')
    (prompt,) = load_prompts(path, Data(apply_chat_template=True), tokenizer)
    assert prompt.text == f"<|user|>{text}\n<|assistant|>"
    assert prompt.messages == ({"role": "user", "content": text},)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (f'[{USER}[{{"type": "image"}}]}}]', "parts other than text need images_key or mixed_mm"),
        (
            f'[{USER}["1"]}}]',
            'a part must be {"type": "text", "text": …} or {"type": "image"}, got \'1',
        ),
        (
            f'[{USER}[{{"text": 1, "type": "text"}}]}}]',
            'a part must be {"type": "text", "text": …}',
        ),
        (f"[{USER}[]}}]", "'prompt' is empty"),
        (f'[{USER}[{{"type": "text", "text": " "}}]}}]', "'prompt' is empty"),
        (f"[{USER}null}}]", 'a message must be {"role": string, "content": string}, got {'),
        (f'[{USER}null, "tool_calls": []}}]', 'a message must be {"role": string, "content"'),
        ('["1+1="]', 'a message must be {"role": string, "content": string}, got \'1+1=\''),
        ('[{"from": "human", "value": "1"}]', 'a message must be {"role": string, "content"'),
        ('[{"role": 1, "content": "1"}]', 'a message must be {"role": string, "content"'),
        ('{"role": "user", "content": "1"}', "must be a string or a list of chat messages, got {"),
        ("[[]]", 'a message must be {"role": string, "content": string}, got []'),
        ("true", "must be a string or a list of chat messages, got True"),
    ],
)
def test_messages_of_other_forms_are_refused(write, tokenizer, prompt, message):
    path = write(PROMPT, f'{{"prompt": {prompt}}}')
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_prompts(path, Data(apply_chat_template=True), tokenizer)
    assert f"{path}, line 2: 'prompt'" in str(caught.value)


def test_a_call_of_a_tool_needs_no_text(write, tokenizer):
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": None,
            "tool_calls": call}, {"role": "tool", "content": "2"}]  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] + m.content }}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}{% endfor %}"
    )
    (prompt,) = load_prompts(write({"prompt": chat}), Data(apply_chat_template=True), tokenizer)
    assert prompt.text == 'u1a{"name": "add", "arguments": {"a": 1}}t2'


def test_messages_that_are_stored_as_json(write, tokenizer, tmp_path):
    chat = [{"role": "system", "content": "s"}, {"content": "1\n[2]", "role": "user"}]
    data = Data(apply_chat_template=True)
    stored = [json.dumps(chat), " " + json.dumps(chat, indent=2) + "\n"]
    path = write(*({"prompt": text} for text in stored))
    datasets.Dataset.from_dict({"prompt": stored}).to_parquet(tmp_path / "p.parquet")
    for source in (path, str(tmp_path / "p.parquet")):
        for prompt in load_prompts(source, data, tokenizer):
            assert prompt.text == "<|system|>s\n<|user|>1\n[2]\n<|assistant|>"
            assert prompt.messages == tuple(chat)
    with pytest.raises(ValueError, match="line 1: 'prompt' holds chat messages; they need apply"):
        load_prompts(path, Data(), tokenizer)
    turns = json.dumps([{"from": "human", "value": "x"}])  # of ShareGPT: refused as its list is
    with pytest.raises(ValueError, match="line 1: 'prompt': a message must be"):
        load_prompts(write({"prompt": turns}), data, tokenizer)
    for text in (str(chat), str(chat).replace("}, {", "}\n {"), json.dumps(chat).replace(",", "")):
        with pytest.raises(ValueError, match="line 1: 'prompt' looks like a list of chat messages"):
            load_prompts(write({"prompt": text}), data, tokenizer)
    with pytest.raises(ValueError, match="line 1: the chat template refuses it: UnicodeEncod"):
        load_prompts(write({"prompt": SECOND.replace('"1"', '"\\ud800"')}), data, tokenizer)
    texts = ['[{"role": "admin"}] is a role: content?', '[{"role": 1}, {"content": 2}]', "[1]"]
    for text in (*texts, '[{"a": {"role": "x", "content": "y"}}]', "[{'role': content}]"):
        (prompt,) = load_prompts(write({"prompt": text}), data, tokenizer)
        assert prompt.text == f"<|user|>{text}\n<|assistant|>"


def test_a_saved_dataset_hands_out_lists_whatever_its_format(tokenizer, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "1"}], "label": [1, 2]}]
    datasets.Dataset.from_list(rows).with_format("numpy").save_to_disk(tmp_path / "d")
    (prompt,) = load_prompts(str(tmp_path / "d"), Data(apply_chat_template=True), tokenizer)
    assert prompt.text == "<|user|>1\n<|assistant|>"
    assert prompt.label == [1, 2]
    assert type(prompt.label) is list


THINKING = "{{ messages[0].content }}{% if think is defined %}{{ think }}{% endif %}{{ depth }}"


def test_variables_of_the_chat_template(write, tokenizer):
    tokenizer.chat_template = THINKING
    for given, text in (({}, "1"), ({"think": False}, "1False"), ({"depth": "low"}, "1low")):
        data = Data(apply_chat_template=True, chat_template_kwargs=given)
        assert load_prompts(write(PROMPT), data, tokenizer)[0].text == text
    for name in ("thinking", "messages", "add_generation_prompt", "tokenize", "chat_template"):
        data = Data(apply_chat_template=True, chat_template_kwargs={"think": 1, name: "x"})
        fault = f"chat_template_kwargs: no '{name}' in the chat template; takes depth, think$"
        with pytest.raises(ValueError, match=fault):
            load_prompts(write(PROMPT), data, tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "the chat template refuses it: TypeError: can only"),
        ("{{ messages[1].content }}", "the chat template refuses it: list object has no element 1"),
        ("{{ 1 // 0 }}", "the chat template refuses it: ZeroDivisionError: "),
        ("{{ ''.__class__ }}{{ messages.clear() }}", "the chat template refuses it: "),
    ],
)
def test_templates_that_raise_name_file_and_line(write, tokenizer, template, message):
    tokenizer.chat_template = template
    path = write(PROMPT)
    with pytest.raises(ValueError, match=re.escape(f"prompt_data: {path}, line 1: {message}")):
        load_prompts(path, Data(apply_chat_template=True), tokenizer)


def test_a_prompt_that_begins_with_bos_gets_no_second_one(write, tokenizer):
    add_specials(tokenizer, "<|user|> $A <eos>")
    path = write(*({"prompt": text} for text in ("<|user|>", "<|user|>12", "12", "1<|user|>")))
    prompts = load_prompts(path, Data(), tokenizer)
    assert [p.token_ids for p in prompts] == [(4,), (4, 9, 10), (4, 9, 10), (4, 9, 4)]
    add_specials(tokenizer, "$A <eos>")
    path = write(*({"prompt": text} for text in ("<eos>", "<eos><eos>1", "1<eos>")))
    assert [p.token_ids for p in load_prompts(path, Data(), tokenizer)] == [(1,), (1, 1, 9), (9, 1)]
