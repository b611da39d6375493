"""The native engine against transformers: tokens, log-probs, limits, batching, weights."""

import dataclasses
import gc
import weakref
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

from torchrft.models.loader import load_tokenizer
from torchrft.rollout.native import engine as engine_module
from torchrft.rollout.native import kv_cache
from torchrft.rollout.native.engine import NativeEngine
from torchrft.rollout.native.kv_cache import SlotCache
from torchrft.rollout.native.scheduler import Request, Sample, Scheduler
from torchrft.rollout.weight_sync import named_full_tensors
from torchrft.types import Prompt, SamplingParams

EOS = 1
TOKENIZER = load_tokenizer(str(Path(__file__).parents[1] / "assets" / "debug_model"))
RAGGED = [[7, 8, 9], [20], [5, 6] * 7, [30, 2, 40, 41, 9, 10, 22]]


def prompts(token_ids):
    return [Prompt(row=i, text="", token_ids=tuple(ids)) for i, ids in enumerate(token_ids)]


def make(family="qwen2", stop=(EOS,), max_num_seqs=64, seed=0, **options):
    """An engine, and transformers' own model with the same weights and plain attention."""
    model = tiny.model(family, "eager", seed=seed, **options)
    engine = NativeEngine(model.config, TOKENIZER, stop, max_num_seqs)
    engine.update_weights(named_full_tensors(model), version=0)
    return engine, model


@pytest.fixture(scope="module")
def flat():
    """An engine whose next token is nearly uniform, so that samples differ and end by chance."""
    return make(initializer_range=0.02)


def seeds(num_prompts, n, first=0):
    return tuple(tuple(first + 1000 * i + j for j in range(n)) for i in range(num_prompts))


def tokens_of(completions):
    return [completion.token_ids for completion in completions]


FAMILIES = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "mistral, window 4": ("mistral", {}),
    "gemma": ("gemma", {}),
    "gemma3, window 4": ("gemma3_text", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_that_of_transformers(family):
    """Token for token over ragged prompts; the greedy paths differ and some end by themselves."""
    name, options = FAMILIES[family]
    engine, model = make(name, **options)
    got = engine.generate(prompts(RAGGED), SamplingParams(temperature=0.0, max_new_tokens=80))
    for ids, completion in zip(RAGGED, got, strict=True):
        wanted = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=80)
        assert list(completion.token_ids) == wanted[0, len(ids) :].tolist()
        stopped = completion.token_ids[-1] == EOS
        assert completion.finish_reason == ("stop" if stopped else "length")
    assert len({token for completion in got for token in completion.token_ids}) > 8


def test_greedy_with_other_weights_and_few_slots():
    """Some end by one of six stop tokens; slots are reused."""
    reasons, stop = Counter(), (1, 2, 3, 4, 5, 6)
    many = [[(3 * i + j) % 54 + 2 for j in range(1 + i % 7)] for i in range(16)]
    sampling = SamplingParams(temperature=0.0, max_new_tokens=16)
    for seed in range(2):
        engine, model = make(stop=stop, seed=seed, max_num_seqs=3, initializer_range=0.1)
        model.generation_config.eos_token_id = list(stop)
        got = engine.generate(prompts(many), sampling)
        for ids, completion in zip(many, got, strict=True):
            wanted = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16)
            assert list(completion.token_ids) == wanted[0, len(ids) :].tolist()
            reasons[completion.finish_reason] += 1
    assert min(reasons["stop"], reasons["length"]) >= 5


@torch.no_grad()
def check_log_probs(model, token_ids, completions, temperature):
    for completion in completions:
        ids = [*token_ids[completion.prompt_index], *completion.token_ids]
        first = len(token_ids[completion.prompt_index])
        log_p = (model(torch.tensor([ids])).logits[0, first - 1 : -1] / temperature).log_softmax(-1)
        wanted = log_p.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 9, "min_new_tokens": 10},
        {"temperature": 0.0},
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_log_probs_are_those_of_a_full_forward(family, options):
    """At the sampling temperature, over the whole vocabulary whatever top-p and top-k left out."""
    engine, model = make(family, initializer_range=0.1)
    sampling = SamplingParams(n=3, max_new_tokens=20, seeds=seeds(4, 3), **options)
    got = engine.generate(prompts(RAGGED), sampling)
    assert all(len(c.token_ids) == len(c.logprobs) for c in got)
    assert sum(len(c.token_ids) for c in got) > 150
    check_log_probs(model, RAGGED, got, options["temperature"] or 1.0)


def test_order_of_the_samples(flat):
    """Prompt by prompt, sample by sample; equal seeds give equal tokens."""
    sampling = SamplingParams(n=3, max_new_tokens=12, seeds=((1, 2, 1), (1, 2, 3)))
    got = flat[0].generate(prompts([[7, 8], [7, 8]]), sampling)
    assert [(c.prompt_index, c.sample_index) for c in got] == [
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2),
    ]  # fmt: skip
    tokens = tokens_of(got)
    assert tokens[0] == tokens[2] == tokens[3]
    assert tokens[1] == tokens[4]
    assert len(set(tokens)) == 3


def by_key(completions):
    return {(c.prompt_index, c.sample_index): c.token_ids for c in completions}


@pytest.mark.slow
def test_samples_do_not_depend_on_what_else_is_in_the_batch(flat):
    engine, _ = flat
    sampling = SamplingParams(n=4, temperature=0.9, max_new_tokens=60, top_p=0.9)
    whole = by_key(
        engine.generate(prompts(RAGGED), dataclasses.replace(sampling, seeds=seeds(4, 4)))
    )
    assert len({len(tokens) for tokens in whole.values()}) > 4  # ragged lengths
    for index, ids in enumerate(RAGGED):  # each prompt alone, each sample alone
        for sample, seed in enumerate(seeds(4, 4)[index]):
            alone = dataclasses.replace(sampling, n=1, seeds=((seed,),))
            assert tokens_of(engine.generate(prompts([ids]), alone)) == [whole[index, sample]]
    order = [2, 0, 3, 1]
    shuffled = dataclasses.replace(sampling, seeds=tuple(seeds(4, 4)[i] for i in order))
    got = by_key(engine.generate(prompts([RAGGED[i] for i in order]), shuffled))
    assert got == {(order.index(i), j): tokens for (i, j), tokens in whole.items()}
    assert by_key(engine.generate(prompts(RAGGED), sampling)) != whole  # without seeds: at random


@pytest.mark.slow
def test_max_num_seqs():
    """However many are decoded at once, the tokens are the same; never more than that many."""
    results = []
    for slots in (1, 3, 5, 64):
        engine, _ = make(initializer_range=0.02, max_num_seqs=slots)
        sizes = watch(engine)[1]
        sampling = SamplingParams(n=5, max_new_tokens=40, min_new_tokens=2, seeds=seeds(4, 5))
        results.append(tokens_of(engine.generate(prompts(RAGGED), sampling)))
        assert max(sizes) == min(slots, 20)
    assert results[0] == results[1] == results[2] == results[3]


def test_without_seeds_the_global_generator_decides(flat):
    sampling = SamplingParams(n=2, max_new_tokens=10)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(tokens_of(flat[0].generate(prompts(RAGGED), sampling)))
    assert drawn[0] == drawn[1] != drawn[2]


def test_number_of_seeds(flat):
    sampling = SamplingParams(n=2, seeds=((1, 2),))
    with pytest.raises(ValueError, match="2 seeds were given for 4 completions"):
        flat[0].generate(prompts([[7], [8]]), sampling)


# ------------------------------------------------------------------------------------- sampling


def one_step(engine, n=20_000, **options):
    """How often each token comes first after one prompt, over n seeds."""
    sampling = SamplingParams(n=n, max_new_tokens=1, seeds=(tuple(range(n)),), **options)
    return Counter(c.token_ids[0] for c in engine.generate(prompts([[7, 8, 9]]), sampling))


def next_probs(model, temperature=1.0):
    with torch.no_grad():
        return (model(torch.tensor([[7, 8, 9]])).logits[0, -1] / temperature).double().softmax(-1)


def check_frequencies(counts, probs):
    """Pearson's chi-square within 4 standard deviations; rare tokens count as one."""
    total = sum(counts.values())
    assert all(probs[token] > 0 for token in counts)
    rare = [t for t in range(len(probs)) if probs[t] * total < 10]
    cells = [([t], probs[t].item()) for t in range(len(probs)) if t not in rare]
    if rare and probs[rare].sum() * total >= 5:
        cells.append((rare, probs[rare].sum().item()))
    statistic = sum(
        (sum(counts[t] for t in cell) - p * total) ** 2 / (p * total) for cell, p in cells
    )
    freedom = len(cells) - 1
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.fixture(scope="module")
def peaked():
    """An engine whose next-token distribution is neither flat nor a single peak."""
    engine, model = make(initializer_range=0.3, max_num_seqs=20_000)
    top = next_probs(model).topk(5).values
    assert 0.1 < top[0] < 0.9
    assert top[4] > 0.005
    return engine, model


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_temperature(peaked, temperature):
    engine, model = peaked
    check_frequencies(one_step(engine, temperature=temperature), next_probs(model, temperature))


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_top_p(peaked, top_p):
    engine, model = peaked
    probs = next_probs(model)
    kept, mass = [], 0.0
    for token in probs.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept.append(token)
        mass += probs[token].item()
    allowed = torch.zeros_like(probs)
    allowed[kept] = probs[kept] / mass
    counts = one_step(engine, top_p=top_p)
    assert set(counts) <= set(kept)
    if len(kept) > 1:
        check_frequencies(counts, allowed)
    assert len(kept) < len(one_step(engine))


def test_top_k(peaked):
    engine, model = peaked
    probs = next_probs(model)
    kept = probs.topk(3).indices
    allowed = torch.zeros_like(probs)
    allowed[kept] = probs[kept] / probs[kept].sum()
    counts = one_step(engine, top_k=3)
    assert set(counts) == set(kept.tolist())
    check_frequencies(counts, allowed)


def test_top_k_of_one_is_greedy(flat):
    sampling = SamplingParams(n=2, top_k=1, max_new_tokens=30)
    greedy = SamplingParams(n=2, temperature=0.0, max_new_tokens=30)
    got = [tokens_of(flat[0].generate(prompts(RAGGED), s)) for s in (sampling, greedy)]
    assert got[0] == got[1]


# --------------------------------------------------------------------------------------- limits


def test_length_limits(flat):
    """max_total_tokens counts the prompt, max_new_tokens does not; the smaller one ends it."""
    engine, _ = flat
    for options, lengths in (
        ({"max_new_tokens": 9}, [9, 9, 9, 9]),
        ({"max_new_tokens": 1}, [1, 1, 1, 1]),
        ({"max_total_tokens": 20}, [17, 19, 6, 13]),
        ({"max_total_tokens": 20, "max_new_tokens": 10}, [10, 10, 6, 10]),
        ({"max_total_tokens": 15}, [12, 14, 1, 8]),
    ):
        # No stop token comes before the limits.
        sampling = SamplingParams(n=2, min_new_tokens=100, **options)
        got = engine.generate(prompts(RAGGED), sampling)
        assert [len(c.token_ids) for c in got[::2]] == lengths
        assert [len(c.token_ids) for c in got[1::2]] == lengths
        assert {c.finish_reason for c in got} == {"length"}


@pytest.mark.slow
def test_longer_than_one_step_of_the_cache(monkeypatch):
    """200 tokens: the cache grows several times, and nothing in it is lost."""
    monkeypatch.setattr(kv_cache, "_GROWTH", 64)
    capacities = []
    reserve = SlotCache.reserve

    def spy(cache, length):
        reserve(cache, length)
        assert cache.capacity >= length
        capacities.append(cache.capacity)

    monkeypatch.setattr(SlotCache, "reserve", spy)
    engine, model = make(stop=(), initializer_range=0.1)
    model.generation_config.eos_token_id = None
    sampling = SamplingParams(temperature=0.0, max_new_tokens=200)
    got = engine.generate(prompts(RAGGED), sampling)
    for ids, completion in zip(RAGGED, got, strict=True):
        wanted = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=200)
        assert list(completion.token_ids) == wanted[0, len(ids) :].tolist()
    assert sorted(set(capacities)) == [64, 96, 144, 215]  # at last the limit: 14 + 200 + 1
    check_log_probs(model, RAGGED, got, 1.0)


def test_long_prompts_beside_short_ones(monkeypatch):
    """A prompt longer than the cache of the sequences that are under way."""
    engine, model = make(max_num_seqs=2)
    token_ids = [[7, 8], [9, 10], [(7 * i) % 54 + 2 for i in range(150)], [11]]
    got = engine.generate(prompts(token_ids), SamplingParams(temperature=0.0, max_new_tokens=20))
    for ids, completion in zip(token_ids, got, strict=True):
        wanted = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20)
        assert list(completion.token_ids) == wanted[0, len(ids) :].tolist()


def test_stop_token_ids(flat):
    """A stop token is kept as the last one; ids of the call and of the engine both count."""
    engine, _ = flat
    base = SamplingParams(n=8, max_new_tokens=100, seeds=seeds(4, 8))
    more = dataclasses.replace(base, stop_token_ids=(30, 31, 32))
    before, after = (engine.generate(prompts(RAGGED), s) for s in (base, more))
    ends = set()
    for full, cut in zip(before, after, strict=True):
        stops = [i for i, token in enumerate(full.token_ids) if token in (EOS, 30, 31, 32)]
        end = stops[0] + 1 if stops else len(full.token_ids)
        assert cut.token_ids == full.token_ids[:end]
        assert cut.logprobs == pytest.approx(full.logprobs[:end], abs=1e-5)
        assert cut.finish_reason == ("stop" if stops else "length")
        assert cut.text == TOKENIZER.decode(cut.token_ids[: -1 if stops else None])
        ends.add(cut.token_ids[-1])
    assert {EOS, 30, 31, 32} <= ends
    assert {c.finish_reason for c in before} == {"stop", "length"}


def test_stop_at_the_last_token_of_the_budget(flat):
    """A stop token on the last place is a stop, not a length."""
    engine, _ = flat
    sampling = SamplingParams(n=200, max_new_tokens=5, stop_token_ids=(9, 10, 11))
    got = engine.generate(prompts([[7, 8]]), sampling)
    full = [c for c in got if len(c.token_ids) == 5]
    assert {c.finish_reason for c in full} == {"stop", "length"}
    for c in full:
        assert (c.finish_reason == "stop") == (c.token_ids[-1] in (EOS, 9, 10, 11))


def test_min_new_tokens(flat):
    """No stop token among the first so many; afterwards they come as before."""
    engine, _ = flat
    stops = tuple(range(2, 22))
    sampling = SamplingParams(n=300, max_new_tokens=30, min_new_tokens=4, stop_token_ids=stops)
    got = engine.generate(prompts([[30]]), sampling)
    lengths = Counter(len(c.token_ids) for c in got)
    for c in got:
        assert not set(c.token_ids[:4]) & {EOS, *stops}
        assert not set(c.token_ids[:-1]) & {EOS, *stops}
    assert min(lengths) == 5
    assert lengths[5] > 60  # 21 of 56 tokens end it
    without = dataclasses.replace(sampling, min_new_tokens=0)
    assert min(len(c.token_ids) for c in engine.generate(prompts([[30]]), without)) == 1


def test_stop_ids_that_the_model_does_not_know(flat):
    engine = NativeEngine(flat[1].config, TOKENIZER, (1, 10**6))
    engine.update_weights(named_full_tensors(flat[1]), version=0)
    sampling = SamplingParams(n=4, min_new_tokens=3, max_new_tokens=5, stop_token_ids=(3, 99_999))
    assert {len(c.token_ids) for c in engine.generate(prompts([[7]]), sampling)} <= {3, 4, 5}


def test_min_new_tokens_without_stop_tokens():
    engine, _ = make(stop=())
    (c,) = engine.generate(prompts([[7]]), SamplingParams(min_new_tokens=2, max_new_tokens=3))
    assert len(c.token_ids) == 3
    assert c.finish_reason == "length"


def first_stop(full, stops):
    """(tokens until a stop string is complete, the text before the first), or None."""
    for end in range(1, len(full.token_ids) + 1):
        text = TOKENIZER.decode(full.token_ids[:end])
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            return end, text[: min(found)]
    return None


def test_stop_strings(flat):
    """Strings over several tokens: the text ends before them, the tokens after them."""
    engine, _ = flat
    base = SamplingParams(n=6, max_new_tokens=60, seeds=seeds(4, 6))
    before = engine.generate(prompts(RAGGED), base)
    # Strings that do come: of one, two and four characters (one token each).
    longest = sorted(before, key=lambda c: len(c.text))[-3:]
    stops = (longest[0].text[10], longest[1].text[20:22], longest[2].text[12:16])
    for stop in [*((s,) for s in stops), stops, ("never comes",)]:
        got = engine.generate(prompts(RAGGED), dataclasses.replace(base, stop=stop))
        hits = 0
        for full, cut in zip(before, got, strict=True):
            found = first_stop(full, stop)
            if found is None:
                assert cut == dataclasses.replace(full, logprobs=cut.logprobs)
            else:
                end, text = found
                assert cut.token_ids == full.token_ids[:end]
                assert len(cut.logprobs) == end
                assert cut.text == text
                assert cut.finish_reason == "stop"
                hits += 1
        assert (hits > 0) is (stop != ("never comes",))


@pytest.mark.parametrize("least", [25, 55])
def test_stop_strings_and_min_new_tokens(flat, least):
    """A stop string that comes earlier ends the response at min_new_tokens, however far back."""
    engine, _ = flat
    base = SamplingParams(
        n=6, max_new_tokens=60, min_new_tokens=least, seeds=seeds(4, 6), stop=("never comes",)
    )
    before = engine.generate(prompts(RAGGED), base)
    stop = (max(before, key=lambda c: len(c.text)).text[10],)
    got = engine.generate(prompts(RAGGED), dataclasses.replace(base, stop=stop))
    early = 0
    for full, cut in zip(before, got, strict=True):
        found = first_stop(full, stop)
        end, text = found or (len(full.token_ids), full.text)
        assert cut.token_ids == full.token_ids[: max(end, least)]
        assert cut.text == text
        assert cut.finish_reason == ("stop" if found else full.finish_reason)
        early += end < least
    assert early > 3


def test_special_tokens_are_in_the_text_and_stop_strings_find_them(flat):
    """All that was sampled but the stop token, whether a tag is one special token or a text."""
    base = SamplingParams(n=4, max_new_tokens=40, seeds=seeds(8, 4))
    got = flat[0].generate(prompts([[7]] * 8), base)
    special = set(TOKENIZER.all_special_ids)
    assert any(special & set(c.token_ids[:-1]) for c in got)
    for c in got:
        ids = c.token_ids[:-1] if c.finish_reason == "stop" else c.token_ids
        assert c.text == TOKENIZER.decode(ids)
    user = TOKENIZER.convert_tokens_to_ids("<|user|>")
    stopped = flat[0].generate(prompts([[7]] * 8), dataclasses.replace(base, stop=("<|user|>",)))
    for full, cut in zip(got, stopped, strict=True):
        end = full.token_ids.index(user) + 1 if user in full.token_ids else len(full.token_ids)
        assert cut.token_ids == full.token_ids[:end]
        assert cut.finish_reason == ("stop" if user in full.token_ids else full.finish_reason)
        assert cut.text == full.text.partition("<|user|>")[0]
    assert any(user in c.token_ids[:-1] for c in stopped) is False
    assert sum(user in c.token_ids for c in stopped) > 3


def test_prompt_without_room(flat):
    sampling = SamplingParams(max_total_tokens=7)
    with pytest.raises(ValueError, match=r"prompt 2 \(row 2\) has 14 tokens, .* max_len is 7"):
        flat[0].generate(prompts(RAGGED), sampling)
    with pytest.raises(ValueError, match=r"prompt 1 \(row 1\) has 7 tokens"):
        flat[0].generate(prompts([[2] * 6, [2] * 7]), sampling)


def test_prompt_without_tokens(flat):
    with pytest.raises(ValueError, match=r"prompt 1 \(row 1\) has no tokens"):
        flat[0].generate(prompts([[7], []]), SamplingParams())


def test_no_prompts(flat):
    assert flat[0].generate([], SamplingParams()) == []


# ------------------------------------------------------------------------------------- batching


def watch(engine):
    """Lists that fill with the shape of every prefill and the batch size of every decode step."""
    prefills, decodes = [], []

    def hook(module, args):
        shape = tuple(args[0].shape)  # a step's tokens come without a dimension for the length
        decodes.append(shape[0]) if len(shape) == 1 else prefills.append(shape)

    engine.model.get_input_embeddings().register_forward_pre_hook(hook)
    return prefills, decodes


def test_a_prompt_is_prefilled_once_for_its_samples():
    engine, _ = make(initializer_range=0.02)
    prefills, decodes = watch(engine)
    sampling = SamplingParams(n=8, max_new_tokens=1)
    engine.generate(prompts([[7, 8, 9], [10, 11, 12]]), sampling)
    assert prefills == [(1, 6)]
    assert decodes == []


def test_a_prompt_whose_samples_are_more_than_the_slots_is_prefilled_once():
    engine, _ = make(initializer_range=0.02, max_num_seqs=3)
    prefills, _ = watch(engine)
    got = engine.generate(prompts([[7, 8, 9], [10, 11]]), SamplingParams(n=8, max_new_tokens=5))
    assert prefills == [(1, 3), (1, 2)]
    assert len(got) == 16


def test_prefill_is_bounded(monkeypatch):
    """Long prompts do not share one pass beyond the bound of padded tokens."""
    from torchrft.rollout.native import scheduler

    monkeypatch.setattr(scheduler, "_PREFILL_TOKENS", 30)
    engine, model = make()
    prefills, _ = watch(engine)
    token_ids = [[7] * 10, [8] * 9, [9] * 12, [10] * 40, [11], [12, 13]]
    got = engine.generate(prompts(token_ids), SamplingParams(temperature=0.0, max_new_tokens=6))
    assert prefills == [(1, 19), (1, 12), (1, 40), (1, 3)]
    for ids, completion in zip(token_ids, got, strict=True):
        wanted = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=6)
        assert list(completion.token_ids) == wanted[0, len(ids) :].tolist()


def schedule(lengths, slots):
    """Batch sizes of the decode steps: the first token of a sequence comes from its prefill."""
    waiting, active, sizes = list(lengths), [], []
    while waiting or active:
        while waiting and len(active) < slots:
            length = waiting.pop(0)
            active += [length - 1] if length > 1 else []
        if active:
            sizes.append(len(active))
        active = [left - 1 for left in active if left > 1]
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2, 5, 8, 100])
def test_continuous_batching(slots):
    """Every decoded token is a useful one, and a free slot is filled at once."""
    engine, _ = make(initializer_range=0.02, max_num_seqs=slots)
    _, decodes = watch(engine)
    sampling = SamplingParams(n=6, max_new_tokens=50, stop_token_ids=(9, 10), seeds=seeds(4, 6))
    got = engine.generate(prompts(RAGGED), sampling)
    lengths = [len(c.token_ids) for c in got]
    assert len(set(lengths)) > 8
    assert decodes == schedule(lengths, slots)
    assert sum(decodes) == sum(lengths) - len(lengths)
    if slots == 8:
        assert len(decodes) < 0.75 * 3 * max(lengths)  # three static batches of 8


# -------------------------------------------------------------------------------------- weights


def test_update_weights():
    """Outputs and versions are those of the newest weights."""
    engine, first = make(seed=0)
    second = tiny.model("qwen2", "eager", seed=1)
    greedy = SamplingParams(temperature=0.0, max_new_tokens=20)
    outputs = []
    for version, model in ((3, first), (4, second), (5, first)):
        engine.update_weights(named_full_tensors(model), version)
        got = engine.generate(prompts(RAGGED), greedy)
        assert {c.policy_version for c in got} == {version}
        wanted = model.generate(torch.tensor(RAGGED[:1]), do_sample=False, max_new_tokens=20)
        assert list(got[0].token_ids) == wanted[0, 3:].tolist()
        outputs.append(tokens_of(got))
    assert outputs[0] == outputs[2] != outputs[1]


def test_the_engine_has_weights_of_its_own():
    engine, model = make()
    greedy = SamplingParams(temperature=0.0, max_new_tokens=20)
    before = tokens_of(engine.generate(prompts(RAGGED), greedy))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert tokens_of(engine.generate(prompts(RAGGED), greedy)) == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update({"model.extra": torch.zeros(1)}), 'no parameter "model.extra"'),
        (lambda t: t.pop("model.norm.weight"), 'no value came for "model.norm.weight"'),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            r'"model.norm.weight" is \(3,\) in the trainer and \(32,\) in the engine',
        ),
    ],
)
def test_update_weights_errors(change, match):
    """The tensor is named, and half-new weights are never used."""
    engine, model = make()
    tensors = dict(named_full_tensors(model))
    change(tensors)
    with pytest.raises(ValueError, match=match):
        engine.update_weights(tensors.items(), version=1)
    with pytest.raises(ValueError, match="has no weights: call update_weights"):
        engine.generate(prompts(RAGGED), SamplingParams())
    engine.update_weights(named_full_tensors(model), version=2)
    assert engine.generate(prompts([[7]]), SamplingParams(max_new_tokens=1))[0].policy_version == 2


def held_bytes(engine):
    """Of the weights; joined projections share one storage."""
    storages = [p.untyped_storage() for p in engine.model.parameters()]
    return sum({s._cdata: s.size() for s in storages}.values())


@pytest.mark.parametrize("tied", [True, False])
def test_sleep_and_wake(tied):
    engine, model = make(tie_word_embeddings=tied)
    greedy = SamplingParams(temperature=0.0, max_new_tokens=10)
    before, size = engine.generate(prompts(RAGGED), greedy), held_bytes(engine)
    assert size == 4 * sum(p.numel() for p in engine.model.parameters())
    for _ in range(2):
        engine.sleep()
        engine.sleep()  # twice is once
        assert held_bytes(engine) == 0
        with pytest.raises(ValueError, match="has no weights"):
            engine.generate(prompts(RAGGED), greedy)
        with pytest.raises(ValueError, match="sleeps: call wake before update_weights"):
            engine.update_weights(named_full_tensors(model), version=1)
        engine.wake()
        assert held_bytes(engine) == size
        with pytest.raises(ValueError, match="has no weights: call update_weights"):
            engine.generate(prompts(RAGGED), greedy)
        engine.update_weights(named_full_tensors(model), version=0)
        assert engine.generate(prompts(RAGGED), greedy) == before


def test_waking_the_awake_keeps_the_weights(flat):
    greedy = SamplingParams(temperature=0.0, max_new_tokens=10)
    before = flat[0].generate(prompts(RAGGED), greedy)
    flat[0].wake()
    assert flat[0].generate(prompts(RAGGED), greedy) == before


def test_close_frees_everything():
    engine, _ = make()
    engine.close()
    assert held_bytes(engine) == 0
    with pytest.raises(ValueError, match="has no weights"):
        engine.generate(prompts(RAGGED), SamplingParams())


def test_before_the_first_weights():
    engine = NativeEngine(tiny.config("qwen2"), TOKENIZER, (EOS,))
    with pytest.raises(ValueError, match="has no weights: call update_weights"):
        engine.generate(prompts(RAGGED), SamplingParams())


def test_the_given_config_is_not_touched():
    config = tiny.config("qwen2")
    config._attn_implementation = "eager"
    NativeEngine(config, TOKENIZER, (EOS,))
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 0.5}),
        ("gpt_oss", {}),
    ],
)
def test_log_probs_of_scaled_and_capped_logits_and_of_changed_scores(family, options):
    engine, model = make(family, **options)
    sampling = SamplingParams(n=2, max_new_tokens=20, temperature=0.8, seeds=seeds(4, 2))
    check_log_probs(model, RAGGED, engine.generate(prompts(RAGGED), sampling), 0.8)


def test_attention_code_of_a_models_own_is_noticed():
    """Nemotron's layers do not pass keyword arguments on."""
    with pytest.raises(ValueError, match="does not pass `layout` on to NemotronAttention"):
        NativeEngine(tiny.config("nemotron"), TOKENIZER, (EOS,))


def test_bfloat16():
    """16-bit weights: log-probs are float32 of the 16-bit logits, near the exact ones."""
    model = tiny.model("qwen2", "eager", initializer_range=0.1)
    engine = NativeEngine(model.config, TOKENIZER, (EOS,), dtype=torch.bfloat16)
    engine.update_weights(named_full_tensors(model), version=0)
    got = engine.generate(prompts(RAGGED), SamplingParams(max_new_tokens=20, seeds=seeds(4, 1)))
    for c in got:
        ids = torch.tensor([[*RAGGED[c.prompt_index], *c.token_ids]])
        with torch.no_grad():
            log_p = model(ids).logits[0, len(RAGGED[c.prompt_index]) - 1 : -1].log_softmax(-1)
        wanted = log_p.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
        assert (torch.tensor(c.logprobs) - wanted).abs().max() < 0.15


def test_the_example_of_the_docs(capsys, monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    text = (root / "docs" / "native_engine.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["0"] * 4 + ["1"] * 4
    assert {line.split()[1] for line in lines} <= {"stop", "length"}


@pytest.mark.parametrize(
    ("finished", "order"),
    [
        ([0, 0, 0, 0], [0, 1, 2, 3]),
        ([1, 0, 0, 0], [3, 1, 2]),
        ([0, 1, 0, 1, 0, 0], [0, 4, 2, 5]),
        ([0, 0, 1], [0, 1]),
        ([1, 1], []),
    ],
)
def test_the_last_sequences_fill_the_holes(flat, finished, order):
    """Of those that end, by hand: state and cache move alike, and no more than must."""
    slots, engine = len(finished), flat[0]
    sampling = SamplingParams(n=slots)
    requests = [Request(0, prompts(RAGGED)[0], range(slots), budget=9)]
    scheduler = engine.scheduler(sampling, slots, 12, 9, False)
    scheduler.samples = {slot: Sample(requests[0], slot) for slot in range(slots)}
    state, cache, numbers = scheduler.state, scheduler.step.cache, torch.arange(slots)
    state.live[:] = ~torch.tensor(finished).bool()
    state.seed[:], state.length[:], state.generated[:] = numbers + 50, 1, 2
    state.out_token[:, 1] = numbers
    cache.keys = [numbers.view(-1, 1, 1, 1).clone()]
    ended = scheduler._retire()
    assert [sample.tokens for sample in ended] == [[0, i] for i in range(slots) if finished[i]]
    assert scheduler._fit() == len(order)
    assert [scheduler.samples[slot].index for slot in range(len(order))] == order
    assert state.seed[: len(order)].tolist() == [50 + row for row in order]
    assert state.live.tolist() == [slot < len(order) for slot in range(slots)]
    assert cache.keys[0].flatten()[: len(order)].tolist() == order


@pytest.mark.parametrize("captured", [False, True])
def test_requests_come_and_go_while_others_run(flat, monkeypatch, captured):
    """Added one by one at different looks: each sample is what it is beside all others."""
    monkeypatch.setattr(engine_module, "supports", lambda *_: captured)
    engine, sampling = flat[0], SamplingParams(n=2, max_new_tokens=20, seeds=seeds(4, 2))
    wanted = {
        key: list(tokens)
        for key, tokens in by_key(engine.generate(prompts(RAGGED), sampling)).items()
    }
    requests = engine._requests(prompts(RAGGED), sampling)
    scheduler, got = engine.scheduler(sampling, 2, 40, 20, False), {}
    with torch.inference_mode():
        for request in requests:
            scheduler.add(request)
            for sample in scheduler.advance():
                got[sample.request.number, sample.index] = sample.tokens
        while scheduler.busy:
            for sample in scheduler.advance():
                got[sample.request.number, sample.index] = sample.tokens
    assert got == wanted


@pytest.mark.parametrize("captured", [False, True])
def test_the_cache_is_freed_without_a_garbage_collection(flat, monkeypatch, captured):
    monkeypatch.setattr(engine_module, "supports", lambda *_: captured)
    schedulers, init = [], Scheduler.__init__

    def spy(scheduler, *arguments):
        init(scheduler, *arguments)
        schedulers.append(weakref.ref(scheduler.step.cache))

    monkeypatch.setattr(Scheduler, "__init__", spy)
    gc.collect()
    gc.disable()
    try:
        flat[0].generate(prompts(RAGGED), SamplingParams(max_new_tokens=3))
        assert [cache() for cache in schedulers] == [None]
    finally:
        gc.enable()


@pytest.mark.slow
def test_short_beside_long_sequences(monkeypatch):
    """Few slots and many samples of ragged lengths give the same tokens as one slot."""
    monkeypatch.setattr(kv_cache, "_GROWTH", 16)
    engine, model = make(stop=(), initializer_range=0.1)
    engine.max_num_seqs = 5
    stops = (3, 5, 7, 11, 13)
    sampling = SamplingParams(
        n=6,
        max_new_tokens=40,
        stop_token_ids=stops,
        seeds=tuple(tuple(range(6 * i, 6 * i + 6)) for i in range(len(RAGGED))),
    )
    got = engine.generate(prompts(RAGGED), sampling)
    engine.max_num_seqs = 1  # one after the other
    alone = engine.generate(prompts(RAGGED), sampling)
    assert [c.token_ids for c in got] == [c.token_ids for c in alone]
    assert len({len(c.token_ids) for c in got}) > 5
    check_log_probs(model, RAGGED, [c for c in got if c.sample_index == 0], 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 5},
        {"top_p": 0.9, "top_k": 9, "min_new_tokens": 10},
        {"top_p": 0.5, "first_token_temperature": 3.0},
        {"top_p": 0.9, "stop": ("a",)},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_replay_tells_what_was_sampled_among(family, options):
    """The kept tokens and the log-probs over them, computed anew in float64; draws stay equal."""
    engine, model = make(family, initializer_range=0.1, max_num_seqs=5)
    sampling = SamplingParams(n=3, max_new_tokens=12, seeds=seeds(4, 3), **options)
    got = engine.generate(prompts(RAGGED), dataclasses.replace(sampling, replay=True))
    assert tokens_of(got) == tokens_of(engine.generate(prompts(RAGGED), sampling))
    model, sizes = model.double(), set()
    for completion in got:
        first = len(RAGGED[completion.prompt_index])
        ids = [*RAGGED[completion.prompt_index], *completion.token_ids]
        logits = model(torch.tensor([ids])).logits[0, first - 1 : -1].detach()
        kept = completion.kept.mask(logits.shape[1])
        for place, token in enumerate(completion.token_ids):
            first_temperature = sampling.first_token_temperature if place == 0 else None
            drawn = logits[place] / (first_temperature or sampling.temperature)
            if place < sampling.min_new_tokens:
                drawn[list(engine.stop_token_ids)] = -torch.inf
            probs, order = drawn.softmax(-1).sort(descending=True)
            probs = probs[: sampling.top_k or None] / probs[: sampling.top_k or None].sum()
            nucleus = int((probs.cumsum(0) - probs < sampling.top_p).sum())
            assert kept[place].nonzero()[:, 0].tolist() == sorted(order[:nucleus].tolist())
            over = (logits[place] / sampling.temperature).masked_fill(~kept[place], -torch.inf)
            wanted = over.log_softmax(-1)[token].item()
            assert completion.logprobs[place] == pytest.approx(wanted, abs=1e-5)
            sizes.add(nucleus)
    assert len(sizes) > 1 or "top_k" in options


def test_an_fp32_head_of_the_engine():
    """bfloat16 states and weights make log-probs that are not rounded."""
    model, errors = tiny.model("qwen2").bfloat16(), {}
    weight = model.lm_head.weight.double()
    for fp32 in (True, False):
        engine = NativeEngine(model.config, TOKENIZER, (EOS,), dtype=torch.bfloat16)
        engine.update_weights(named_full_tensors(model), version=0)
        engine.fp32_head, states = fp32, []
        engine.model.model.norm.register_forward_hook(lambda *call, s=states: s.append(call[-1]))
        sampling = SamplingParams(n=8, max_new_tokens=1, seeds=seeds(1, 8))
        got = engine.generate(prompts(RAGGED[:1]), sampling)
        log_p = (states[0][0, -1].double() @ weight.t()).log_softmax(-1)
        errors[fp32] = max(abs(log_p[c.token_ids[0]].item() - c.logprobs[0]) for c in got)
    assert errors[True] < 3e-6
    assert errors[False] > 1e-3
