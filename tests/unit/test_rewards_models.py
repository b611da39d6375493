"""Scalar reward models beside transformers' own forward: what they read, batches, ranks, memory."""

import json
import os
import random
from pathlib import Path

import pytest
import tiny_classifiers
import tiny_job
import torch
from helpers import run_ranks
from safetensors.torch import load_file, save_file
from tiny_job import MODEL, records, rollout, tiny_config
from tokenizers import processors
from transformers import AutoTokenizer

from torchrft.build.reward_models import build_scalar_model
from torchrft.config.job_config import Parallel
from torchrft.config.reward_config import RewardModel as Entry
from torchrft.models.reward_model import HostWeights, load_reward_model
from torchrft.rewards.models import Batches, Reader, ScalarModel, text_or_file
from torchrft.rewards.source import RewardError, RewardRequest
from torchrft.tools.distributed import World
from torchrft.trainer import Trainer
from torchrft.types import Completion, Prompt

ALONE = World(0, 1, 0, torch.device("cpu"))


def load(folder, world=ALONE):
    return load_reward_model(folder, Parallel(), world, torch.float32)


def policy_tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def requests(count=7, seed=0, prompts=3):
    """Prompts of 1 to 12 tokens, in a row for all their responses of 1 to 20."""
    rng = random.Random(seed)

    def ids(longest):
        return tuple(rng.randrange(2, 56) for _ in range(rng.randint(1, longest)))

    rows = [Prompt(row, "", ids(12)) for row in range(prompts)]
    made = []
    for index in range(count):
        place = index * prompts // count
        tokens = ids(20)
        completion = Completion(place, index, tokens, (0.0,) * len(tokens), "", "stop")
        made.append(RewardRequest(rows[place], completion))
    return made


def ids_of(asked):
    return [[*r.prompt.token_ids, *r.completion.token_ids] for r in asked]


def source(folder, size=4, world=ALONE, offload=False):
    reader = Reader(Entry(pretrain=folder), policy_tokenizer())
    return ScalarModel("rm", reader, Batches(load(folder, world), size, offload))


def scores(scalar, asked):
    return [result.score for result in scalar.score(asked)]


@pytest.mark.parametrize(
    ("family", "packs", "options"),
    [
        ("qwen2", True, {}),
        ("llama", True, {"pad_token_id": None}),
        ("mistral", True, {}),
        ("gpt2", False, {"pad_token_id": None}),
        ("bert", False, {}),
    ],
)
def test_scores_are_transformers_own_in_any_batch(family, packs, options, tmp_path):
    folder = tiny_classifiers.save(tmp_path, family, **options)
    asked = requests(12)
    expected = tiny_classifiers.reference(folder, ids_of(asked))
    assert max(expected) - min(expected) > 0.1
    scalar = source(folder)
    assert scalar.forward.model.packs is packs
    mixed = random.Random(1).sample(range(12), 12)  # siblings apart
    for size in (1, 3, 12):
        scalar.forward.size = size
        assert scores(scalar, asked) == pytest.approx(expected, abs=1e-5)
        found = scores(scalar, [asked[index] for index in mixed])
        assert found == pytest.approx([expected[index] for index in mixed], abs=1e-5)
    assert scalar.score([]) == []


def test_padding_tokens_within_a_sample(tmp_path):
    """transformers scores the last token that is no padding token, wherever that stands."""
    samples = [[5, 0, 7], [5, 6, 0], [8, 0, 0, 0], [0, 0]]
    for family in ("qwen2", "gpt2"):
        folder = tiny_classifiers.save(tmp_path / family, family)
        expected = tiny_classifiers.reference(folder, samples)
        with torch.no_grad():
            found = load(folder)([samples[:2], samples[2:]])
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_siblings_share_what_they_begin_with(tmp_path):
    """A sample may be the beginning of another, or have nothing in common with its siblings."""
    model = load(tiny_classifiers.save(tmp_path))
    groups = [[[5, 6, 7], [5, 6, 7, 8], [5, 6, 9]], [[5], [6, 7]], [[9, 9]]]
    seen = []
    model.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        found = model(groups)
    expected = tiny_classifiers.reference(str(tmp_path), [s for group in groups for s in group])
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert seen == [(4 + 1) + (1 + 2) + 2]  # of 15 tokens


def test_a_model_that_padding_changes_is_refused(tmp_path):
    """XLNet reads its score from the end of the row; alone in its batch a sample has no padding."""
    options = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "pad_token_id": 0}
    tiny_classifiers.save(tmp_path, "xlnet", initializer_range=0.5, **options)
    with pytest.raises(ValueError, match=r"XLNetFor.* gives .* set micro_rollout_batch_size = 1"):
        source(str(tmp_path), size=2)
    expected = tiny_classifiers.reference(str(tmp_path), ids_of(requests()))
    assert scores(source(str(tmp_path), size=1), requests()) == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------ bad folders


def test_folders_that_are_no_reward_models(tmp_path):
    causal = tmp_path / "causal"
    tiny_job_model = tiny_classifiers.tiny.model("qwen2")
    tiny_job_model.save_pretrained(causal)
    with pytest.raises(ValueError, match="no classification head: it is a Qwen2ForCausalLM"):
        load(str(causal))
    two = tiny_classifiers.save(tmp_path / "two", num_labels=2)
    with pytest.raises(ValueError, match="num_labels = 2, but a reward is one number"):
        load(two)
    headless = tiny_classifiers.save(tmp_path / "headless")
    weights = load_file(Path(headless, "model.safetensors"))
    del weights["score.weight"]
    save_file(weights, Path(headless, "model.safetensors"), {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of the model: score.weight"):
        load(headless)
    Path(headless, "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"headless\" do not load"):
        load(headless)
    with pytest.raises(ValueError, match=r"nowhere\" is no folder here: correct the path"):
        load(str(tmp_path / "nowhere"))
    Path(two, "config.json").write_text(json.dumps({"model_type": "t5", "num_labels": 1}))
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        load(two)


def test_what_the_config_asks_for_and_cannot_have(tmp_path):
    folder = tiny_classifiers.save(tmp_path / "rm", max_position_embeddings=20)

    def build(entry, **options):
        config = tiny_config(reward_pretrain=folder, functions=None, **options)
        return build_scalar_model(
            entry, config, ALONE, torch.float32, policy_tokenizer(), lambda *_: None
        )

    assert build(Entry(pretrain=folder)).name == "rm"
    assert build(Entry(pretrain=folder, name="taste")).name == "taste"
    with pytest.raises(ValueError, match="reads at most 20 tokens, but max_len = 21"):
        build(Entry(pretrain=folder), max_len=21)
    with pytest.raises(ValueError, match=r"nothing\" is no folder here: correct the path"):
        build(Entry(pretrain=folder, tokenizer=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match=r"chat_template = .*lost.jinja\" is no text file"):
        build(Entry(pretrain=folder, chat_template="lost.jinja"))
    path = tmp_path / "t.jinja"
    path.write_text("text")
    assert text_or_file(str(path), "x") == "text"
    assert text_or_file("{{ a }}", "x") == "{{ a }}"


# ------------------------------------------------------------------------ what is read

CHAT = ({"role": "system", "content": "be"}, {"role": "user", "content": "12="})
TURNS = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }},{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def request(text="12=", response="2", messages=(), tokens=(9, 10, 18), answer=(10, 1)):
    completion = Completion(0, 0, answer, (0.0,) * len(answer), response, "stop")
    return RewardRequest(Prompt(3, text, tokens, messages=messages), completion)


def other_tokenizer(folder):
    """The debug model's, with one token more, and without a chat template."""
    tokenizer = policy_tokenizer()
    tokenizer.add_tokens(["12"])
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    Path(folder, "chat_template.jinja").unlink(missing_ok=True)
    return str(folder)


def read(reader, asked):
    """The text of what a reader reads, special tokens included."""
    return [reader.tokenizer.decode(ids) for ids in reader([asked])]


def test_the_policys_own_vocabulary_is_read_as_token_ids(tmp_path):
    folder = tiny_classifiers.save(tmp_path)
    reader = Reader(Entry(pretrain=folder), policy_tokenizer())
    assert reader.direct
    # With the end token, and what text could not say.
    assert reader([request(answer=(10, 9, 1))]) == [[9, 10, 18, 10, 9, 1]]
    # A server's client may send texts alone.
    assert read(reader, request(tokens=(), answer=())) == ["12=2"]


def test_another_vocabulary_is_read_as_text(tmp_path):
    entry = Entry(pretrain="rm", tokenizer=other_tokenizer(tmp_path))
    reader = Reader(entry, policy_tokenizer())
    assert not reader.direct
    [ids] = reader([request()])
    assert ids[0] == len(policy_tokenizer().get_vocab())  # its own token, "12"
    assert read(reader, request()) == ["12=2"]
    with pytest.raises(ValueError, match=r"no chat template, but the prompts are chats"):
        reader.check([Prompt(0, "x", (1,), messages=CHAT)])
    reader.check([Prompt(0, "x", (1,))])


def test_another_chat_template_is_written_anew(tmp_path):
    folder = tiny_classifiers.save(tmp_path)
    given = Reader(Entry(pretrain=folder, chat_template=TURNS), policy_tokenizer())
    assert read(given, request(messages=CHAT)) == ["s:be,u:12=,a:2,"]
    assert read(given, request()) == ["u:12=,a:2,"]
    # The tokenizer's own counts where it is another than the policy's.
    policy = policy_tokenizer()
    policy.chat_template = TURNS
    own = Reader(Entry(pretrain=folder), policy)
    assert read(own, request(messages=CHAT)) == ["<|system|>be\n<|user|>12=\n<|assistant|>2<eos>"]
    refusing = "{{ raise_exception('no system') }}"
    broken = Reader(Entry(pretrain=folder, chat_template=refusing), policy)
    with pytest.raises(ValueError, match="row 3: the chat template refuses it: no system"):
        broken.check([request().prompt])
    broken = Reader(Entry(pretrain=folder, chat_template="{{ messages[0].content + 1 }}"), policy)
    with pytest.raises(ValueError, match="row 3: the chat template refuses it: TypeError: "):
        broken.check([request().prompt])
    policy.chat_template, several = None, policy_tokenizer()
    several.chat_template = {"default": TURNS, "other": "x"}
    several.save_pretrained(folder)
    assert read(Reader(Entry(pretrain=folder), policy), request()) == ["u:12=,a:2,"]


def test_without_a_policy_texts_are_joined(tmp_path):
    folder = tiny_classifiers.save(tmp_path)
    reader = Reader(Entry(pretrain=folder), None)
    assert read(reader, request(text="<|user|>1=<|assistant|>")) == ["<|user|>1=<|assistant|>2"]
    assert read(Reader(Entry(pretrain=folder, chat_template=TURNS), None), request()) == [
        "u:12=,a:2,"
    ]


def test_a_prompt_that_begins_with_bos_is_read_with_one(tmp_path):
    """Where the tokenizer puts one in front of a text, and where it does not."""
    tokenizer = AutoTokenizer.from_pretrained(other_tokenizer(tmp_path))
    for special, ids in (([("<|user|>", 4)], [4, 56, 18, 10]), ([], [4, 56, 18, 10])):
        single = "<|user|> $A" if special else "$A"
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=special
        )
        tokenizer.save_pretrained(tmp_path)
        reader = Reader(Entry(pretrain="rm", tokenizer=str(tmp_path)), policy_tokenizer())
        assert reader([request(text="<|user|>12=")]) == [ids]
        assert reader([request()]) == [ids if special else ids[1:]]


def test_a_sample_that_is_too_long_stops_the_run(tmp_path):
    folder = tiny_classifiers.save(tmp_path)
    scalar = source(folder)
    scalar.reader.max_len = 5
    scalar.score([request()])
    with pytest.raises(RewardError, match=r"'rm', prompt row 3: prompt and response have 6 tokens"):
        scalar.score([request(), request(answer=(9, 9, 1))])


# ------------------------------------------------------------------------ memory


def test_offloaded_weights_are_on_the_device_only_while_used(tmp_path):
    """Shown on the CPU, whose storage is freed and filled like a GPU's."""
    folder = tiny_classifiers.save(tmp_path, tie_word_embeddings=True)
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():  # safetensors' own memory cannot be freed
            parameter.set_(parameter.clone())
        before = model([[[5, 6, 7]]])
    tensors = [*model.parameters(), *model.buffers()]
    places = [id(tensor) for tensor in tensors]
    host = HostWeights(model, "cpu")
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
    for _ in range(2):
        with torch.no_grad(), host.on_device():
            assert all(tensor.untyped_storage().nbytes() > 0 for tensor in tensors)
            assert torch.equal(model([[[5, 6, 7]]]), before)
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == places


def test_the_job_offloads_between_rewards(tmp_path, monkeypatch):
    """`reward_model_offload` reaches the source, which has the weights only while it scores."""
    folder = tiny_classifiers.save(tmp_path / "rm")
    seen = []
    monkeypatch.setattr("torchrft.rewards.models.HostWeights", lambda model: Resident(seen))
    options = {"reward_pretrain": folder, "functions": None, "max_steps": 1}
    tiny_job.run(tmp_path / "kept", **options)
    assert not seen
    tiny_job.run(tmp_path / "away", **options, reward_model_offload=True)
    assert seen == ["on", "off"]
    assert Batches(load(folder), 2, offload=True)([]) == []
    assert seen == ["on", "off"]  # nothing to score, nothing moved
    kept, away = (rollout(tmp_path / name, 1) for name in ("kept", "away"))
    assert [row["reward"] for row in kept] == [row["reward"] for row in away]


class Resident:
    def __init__(self, seen):
        self.seen = seen

    def on_device(self):
        return self

    def __enter__(self):
        self.seen.append("on")

    def __exit__(self, *_):
        self.seen.append("off")


# ------------------------------------------------------------------------ ranks


def score_on_a_rank(rank, folders):
    return [score_with(folder, rank) for folder in folders]


def score_with(folder, rank):
    """Uneven parts of 12 samples, one of them nothing; then even ones, with weights on the host."""
    scalar = source(folder, 3, World(rank, 2, rank, torch.device("cpu")))
    model = scalar.forward.model
    whole = sum(p.numel() for p in model.parameters())
    mine = sum(p.to_local().numel() for p in model.parameters())
    asked, found = requests(12), []
    for parts in ((7, 5), (12, 0), (1, 11)):
        first = sum(parts[:rank])
        found.append(scores(scalar, asked[first : first + parts[rank]]))
    after = sum(p.to_local().numel() for p in model.parameters())
    scalar.forward.host = HostWeights(model, "cpu")
    assert all(p.to_local().untyped_storage().nbytes() == 0 for p in model.parameters())
    found.append(scores(scalar, asked[6 * rank : 6 * rank + 6]))
    scalar.forward.host = None
    scalar.reader.max_len = 8
    try:
        scalar.score([request()] if rank else [request(answer=(9,) * 20)])
    except RuntimeError as error:
        failure = f"{type(error).__name__}: {error}"
    return found, mine / whole, after / whole, failure


@pytest.mark.slow
def test_ranks_share_one_model_and_score_their_own(tmp_path):
    folders = [tiny_classifiers.save(tmp_path / name, name) for name in ("qwen2", "bert")]
    results = zip(*run_ranks(score_on_a_rank, 2, folders), strict=True)
    for folder, ((one, share, after, failure), (two, _, _, other)) in zip(
        folders, results, strict=True
    ):
        expected = tiny_classifiers.reference(folder, ids_of(requests(12)))
        for mine, theirs in zip(one, two, strict=True):
            assert [*mine, *theirs] == pytest.approx(expected, abs=1e-5)
        assert [len(part) for part in two] == [5, 0, 11, 6]
        assert 0.4 < share < 0.6
        assert after == share  # sharded again after each layer
        assert failure.startswith("SampleError: reward source 'rm', prompt row 3")
        assert other.startswith("RankError: rank 0 failed in phase 'reward': SampleError")


def test_weights_in_other_files_than_safetensors_are_loaded_whole(tmp_path):
    folder = tiny_classifiers.save(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    os.remove(tmp_path / "model.safetensors")
    expected = tiny_classifiers.reference(folder, ids_of(requests(2)))
    assert scores(source(folder), requests(2)) == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------ the job


def test_the_job_trains_with_scalar_models(tmp_path):
    """Two models, their sum by weight; rewards are transformers' own, parts and metrics show it."""
    folders = [tiny_classifiers.save(tmp_path / name, name, seed=3) for name in ("qwen2", "llama")]
    models = (
        f'[{{pretrain = "{folders[0]}"}}, {{pretrain = "{folders[1]}", weight = 0.5, name = "b"}}]'
    )
    asked = []
    with tiny_job.trainer(tmp_path / "run", models=models, functions=None) as job:
        score = job.collector.scorer.score

        def spy(prompts, completions):
            asked.extend(RewardRequest(prompts[c.prompt_index], c) for c in completions)
            return score(prompts, completions)

        job.collector.scorer.score = spy
        before = tiny_job.weights(job)
        assert job.train() is None
        moved = [
            not torch.equal(value, before[name]) for name, value in tiny_job.weights(job).items()
        ]
    assert all(moved)
    parts = [tiny_classifiers.reference(folder, ids_of(asked)) for folder in folders]
    rows = rollout(tmp_path / "run", 1) + rollout(tmp_path / "run", 2)
    assert [row["reward_parts"]["qwen2"] for row in rows] == pytest.approx(parts[0], abs=1e-5)
    assert [row["reward_parts"]["b"] for row in rows] == pytest.approx(parts[1], abs=1e-5)
    for row in rows:
        own = row["reward_parts"]
        assert row["reward"] == pytest.approx(own["qwen2"] + 0.5 * own["b"])
    line = records(tmp_path / "run")[0]
    mean = sum(parts[0][:16]) / 16
    assert line["reward_parts/qwen2"] == pytest.approx(mean, abs=1e-5)


def train(rank, folder, world_size, options):
    torch.set_num_threads(1)
    job = Trainer(
        tiny_config(world_size, save_path=folder, **options),
        World(rank, world_size, rank, torch.device("cpu")),
    )
    assert job.train() is None


@pytest.mark.slow
def test_two_ranks_give_the_rewards_of_one(tmp_path):
    """Also where they share their samples."""
    options = {
        "reward_pretrain": tiny_classifiers.save(tmp_path / "rm"),
        "functions": None,
        "actor_learning_rate": 1e-4,
        "lr_warmup_ratio": 0.0,
    }
    tiny_job.run(tmp_path / "one", **options)
    for layout in ({}, {"tp_size": 2}):
        two = tmp_path / f"two{len(layout)}"
        run_ranks(train, 2, str(two), 2, options | layout)
        for step in (1, 2):
            one, other = rollout(tmp_path / "one", step), rollout(two, step)
            assert [row["response"] for row in one] == [row["response"] for row in other]
            expected = [row["reward"] for row in one]
            assert [row["reward"] for row in other] == pytest.approx(expected, abs=1e-5)
            assert max(expected) - min(expected) > 0.1
