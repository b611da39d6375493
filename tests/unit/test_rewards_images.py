"""Images on their way to rewards: functions, servers, judges and reward models."""

import base64
import io
import shutil
from dataclasses import replace

import pytest
import tiny
import tiny_classifiers
import torch
from PIL import Image as Pillow
from reward_servers import app_server
from test_rewards_judge import Server, build, entry
from tiny_job import ASSETS, tiny_config
from tiny_vlm import picture
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
)

from torchrft.build.reward_models import build_scalar_model
from torchrft.config.reward_config import Reward, RewardFunction
from torchrft.config.reward_config import RewardModel as Entry
from torchrft.rewards import server_app
from torchrft.rewards.judge import JudgeTemplate
from torchrft.rewards.judge_server import ServerAnswers
from torchrft.rewards.registry import register
from torchrft.rewards.remote import RemoteRewards
from torchrft.rewards.scorer import build_scorer
from torchrft.rewards.server_app import create_app
from torchrft.rewards.source import RewardError, RewardRequest
from torchrft.tools.distributed import World
from torchrft.tools.images import MAX_PIXELS, Image, ImageError
from torchrft.types import Completion, Prompt

ALONE = World(0, 1, 0, torch.device("cpu"))

OWN = """
import sys

def width(images):
    assert "torch" not in sys.modules
    return float(sum(image.open().width for image in images))

def counts(responses, images):
    return [float(len(own)) for own in images]
"""


@register("test_height")
def height(images):
    return float(sum(image.open().height for image in images))


@pytest.fixture
def prompts(tmp_path):
    """With one picture in memory, none, and two, of which one is a file."""
    file = picture(24, 16, 3)
    (tmp_path / "a.png").write_bytes(file.data)
    images = (picture(16, 8, 1),), (), (Image(path=str(tmp_path / "a.png")), picture(32, 8, 4))
    return [Prompt(row, f"p{row}", (1,), images=own) for row, own in enumerate(images)]


def completions(prompts, n=2):
    return [
        Completion(place, sample, (1,), (0.0,), f"r{sample}", "stop")
        for place in range(len(prompts))
        for sample in range(n)
    ]


def requests(prompts):
    return [RewardRequest(prompts[c.prompt_index], c) for c in completions(prompts)]


@pytest.fixture
def reward(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    names = f"{path}:width", f"{path}:counts", "test_height"
    weights = (1.0, 100.0, 1000.0)
    functions = [RewardFunction(name=n, weight=w) for n, w in zip(names, weights, strict=True)]
    return Reward(functions=functions)


# Of each prompt's two samples: the sum of widths, 100 for each picture, 1000 times the heights.
EXPECTED = [8116.0] * 2 + [0.0] * 2 + [24256.0] * 2


def test_functions_get_them_in_workers_and_in_process(prompts, reward):
    scorer = build_scorer(reward)
    try:
        scores = scorer.score(prompts, completions(prompts))
    finally:
        scorer.close()
    assert [score.value for score in scores] == EXPECTED


# ------------------------------------------------------------------------ servers


def test_images_that_no_source_looks_at_are_not_decoded(prompts):
    """They may be anything in base64, and large, though they take a few bytes."""
    blind = Reward(functions=[RewardFunction(name="length", options={"target": 1, "limit": 2})])
    images = (Image(data=b"no picture"),)
    with app_server(create_app(build_scorer(blind))) as url:
        remote = RemoteRewards(Reward(remote_rm_url=[url]))
        results = remote.score(requests([replace(p, images=images) for p in prompts]))
    assert len(results) == 2 * len(prompts)


def test_the_pixels_of_a_request_are_bounded(prompts, reward, monkeypatch):
    """Over all of its samples: a source decodes them for each."""
    assert server_app._MOST_PIXELS == 8 * MAX_PIXELS
    monkeypatch.setattr(server_app, "_MOST_PIXELS", 128 * 3)
    twice = Prompt(0, "p", (1,), images=(picture(16, 8, 1),))
    three = replace(twice, images=(picture(16, 8, 1), picture(16, 8, 1), picture(8, 8, 2)))
    with app_server(create_app(build_scorer(reward))) as url:
        remote = RemoteRewards(Reward(remote_rm_url=[url]))
        assert [result.score for result in remote.score(requests([twice]))] == [8116.0] * 2
        with pytest.raises(RewardError) as raised:
            remote.score(requests([three]))
    assert (
        "HTTP 422: images.1: the images up to here have 448 pixels, more than 384; send fewer "
        "samples in one" in str(raised.value)
    )


def test_remote_rewards_equal_local_ones(prompts, reward):
    with app_server(create_app(build_scorer(reward))) as url:
        remote = RemoteRewards(Reward(remote_rm_url=[url], remote_rm_batch_size=4))
        assert [result.score for result in remote.score(requests(prompts))] == EXPECTED


def test_a_picture_that_is_none_is_422_and_names_its_place(prompts, reward):
    broken = picture(16, 8, 1).data[:60]
    with app_server(create_app(build_scorer(reward))) as url:
        remote = RemoteRewards(Reward(remote_rm_url=[url]))
        pairs = ((b"no picture", "is none of PNG"), (broken, "cannot be decoded"))
        for data, fault in pairs:
            image = Image(data=data)
            wrong = [prompts[0], Prompt(7, "p", (1,), images=(image,))]
            with pytest.raises(RewardError, match=rf"HTTP 422: images\.2: an image {fault}"):
                remote.score(requests(wrong))
        lost = Prompt(8, "p", (1,), images=(Image(path="lost.png"),))
        with pytest.raises(RewardError, match=r"prompt row 8: lost\.png cannot be read"):
            remote.score(requests([lost]))


# ------------------------------------------------------------------------ judges


def test_a_template_says_where_the_pictures_stand(prompts):
    template = JudgeTemplate("Is {{ response }} in {{ images }}?", "j")
    one, none, two = (template.render(prompt, "x") for prompt in prompts)
    assert one == ("Is x in ", prompts[0].images[0], "?")
    assert none == "Is x in ?"
    assert two == ("Is x in ", *prompts[2].images, "?")
    assert JudgeTemplate("{{ response }}", "j").render(prompts[0], "x") == "x"
    template.check(prompts)
    with pytest.raises(ValueError, match="judge 'j': its template shows images, but no prompt has"):
        template.check(prompts[1:2])


@pytest.fixture(scope="module")
def judge_folder(tmp_path_factory):
    """A tiny LLaVA with large random weights."""
    folder = tmp_path_factory.mktemp("judge")
    shutil.copytree(ASSETS / "debug_vlm", folder, dirs_exist_ok=True)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.initializer_range = config.vision_config.initializer_range = 0.3
    torch.manual_seed(3)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return str(folder)


def answer_of(folder, parts, images):
    """transformers' own greedy answer."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    given = {"images": [image.open() for image in images]} if images else {}
    inputs = processor(text=[text], return_tensors="pt", add_special_tokens=False, **given)
    eos = model.config.eos_token_id
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=eos)
    return processor.decode(out[0, inputs.input_ids.shape[1] :]).removesuffix("<eos>")


def test_a_native_judge_sees_what_transformers_shows_the_model(prompts, judge_folder):
    made = build(
        entry(pretrain=judge_folder, max_new_tokens=6, template="{{ response }}{{ images }}=?")
    )
    contents = [made.template.render(prompt, "1<image>2") for prompt in prompts]
    texts = [{"type": "text", "text": text} for text in ("12", "=?")]
    expected = []
    for prompt in prompts:
        parts = [texts[0], *({"type": "image"} for _ in prompt.images), texts[1]]
        expected.append([answer_of(judge_folder, parts, prompt.images)])
    assert made.answers(contents, [[1], [2], [3]]) == expected
    other = made.template.render(Prompt(0, "p", (1,), images=(picture(16, 8, 9),)), "12")
    assert made.answers([other], [[1]]) != expected[:1]  # the picture counts


def test_judges_seeds_depend_on_the_pictures_content(prompts, judge_folder, tmp_path):
    template = "{{ images }}{{ response }}"
    options = {"max_new_tokens": 2, "votes": 2, "temperature": 1.0, "template": template}
    made = build(entry(pretrain=judge_folder, **options))
    (tmp_path / "same.png").write_bytes(prompts[0].images[0].data)
    same = Prompt(0, "p", (1,), images=(Image(path=str(tmp_path / "same.png")),))
    seeds = [made._seeds(made.template.render(p, "x")) for p in (prompts[0], same, prompts[2])]
    assert seeds[0] == seeds[1] != seeds[2]


def test_a_judge_that_sees_nothing_is_refused(prompts):
    blind = str(ASSETS / "debug_model")
    with pytest.raises(ValueError, match="is a qwen2 model, which sees no images"):
        build(entry(pretrain=blind, template="{{ response }}{{ images }}", max_new_tokens=6))


def test_a_judge_on_a_server_gets_data_uris(prompts, tmp_path):
    server = Server()
    try:
        made = entry(engine="remote", server_url=[server.url], model="m")
        answers = ServerAnswers(made)
        buffer = io.BytesIO()
        Pillow.new("RGB", (4, 4)).save(buffer, "JPEG")
        jpeg = Image(data=buffer.getvalue())
        answers([("is ", prompts[0].images[0], jpeg, "?"), "plain"], [[1], [2]])
    finally:
        server.close()
    sent = {body["seed"]: body["messages"][0]["content"] for body in server.asked}
    png = base64.b64encode(prompts[0].images[0].data).decode()
    assert sent[1] == [
        {"type": "text", "text": "is "},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
        {
            "type": "image_url",
            "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(jpeg.data).decode()},
        },
        {"type": "text", "text": "?"},
    ]
    assert sent[2] == "plain"
    with pytest.raises(ImageError, match="an image is none of PNG"):
        Image(data=b"x").data_uri()


# ------------------------------------------------------------------------ reward models


@pytest.fixture(scope="module")
def scalar_folder(tmp_path_factory):
    """A tiny Gemma 3 with a head of one label, and its processor."""
    folder = tmp_path_factory.mktemp("scalar")
    marks = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"}
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "debug_model", extra_special_tokens=marks)
    tokenizer.chat_template = (ASSETS / "debug_vlm" / "chat_template.jinja").read_text()
    tokenizer.chat_template = tokenizer.chat_template.replace("<image>", "<boi>")
    size = {"height": 16, "width": 16}
    images = Gemma3ImageProcessorPil(size=size)
    Gemma3Processor(images, tokenizer, tokenizer.chat_template, image_seq_length=4).save_pretrained(
        folder
    )
    text = tiny.config("gemma3_text", vocab_size=len(tokenizer), num_labels=1).to_dict()
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config=tower,
        mm_tokens_per_image=4,
        num_labels=1,
        image_token_index=tokenizer.convert_tokens_to_ids("<soft>"),
        initializer_range=0.3,
    )
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # it is 0
    model.save_pretrained(folder)
    return str(folder)


def build_scalar(folder, world=ALONE, **options):
    made = Entry(pretrain=folder)
    return build_scalar_model(made, tiny_config(**options), world, torch.float32, None, None)


@torch.no_grad()
def test_a_vision_reward_model_gives_transformers_scores(prompts, scalar_folder):
    source = build_scalar(scalar_folder, reward_model_offload="true", reward_pretrain=scalar_folder)
    assert not source.collective
    parts = [({"type": "image"},) * len(prompt.images) for prompt in prompts]
    chats = [({"role": "user", "content": [*own, {"type": "text", "text": "1"}]},) for own in parts]
    asked = [replace(p, messages=chat) for p, chat in zip(prompts, chats, strict=True)]
    source.check(asked)
    scores = [result.score for result in source.score(requests(asked))]
    processor = AutoProcessor.from_pretrained(scalar_folder)
    model = AutoModelForSequenceClassification.from_pretrained(
        scalar_folder, attn_implementation="eager"
    ).eval()
    expected = []
    for request in requests(asked):
        chat = [*request.prompt.messages, {"role": "assistant", "content": request.completion.text}]
        text = processor.apply_chat_template(chat, tokenize=False)
        pictures = [image.open() for image in request.prompt.images] or None
        inputs = processor(
            text=[text], images=pictures, return_tensors="pt", add_special_tokens=False
        )
        expected.append(model(**inputs).logits.item())
    assert scores == pytest.approx(expected, abs=1e-5)
    blank = replace(asked[0], images=(picture(16, 8, 99),))
    [other] = source.score([RewardRequest(blank, completions([blank])[0])])
    assert abs(other.score - scores[0]) > 1e-3  # the picture counts
    source.close()


def test_what_a_reward_model_refuses_of_images(prompts, scalar_folder, tmp_path):
    source = build_scalar(tiny_classifiers.save(tmp_path))
    with pytest.raises(ValueError, match="prompt row 0 has images, which the reward model sees no"):
        source.check(prompts)
    with pytest.raises(RewardError, match="prompt row 2 has images"):
        source.score(requests(prompts[1:]))
    with pytest.raises(ValueError, match=r"rm_use_engine = true: the reward model .* sees images"):
        build_scalar(scalar_folder, rm_use_engine="true")
    bare = replace(prompts[0], images=())  # the first with pictures is looked at, too
    wrong = replace(prompts[0], text="no place", messages=(), row=9)
    source = build_scalar(scalar_folder)
    source.template = None
    with pytest.raises(ValueError, match="prompt row 9: "):
        source.check([bare, wrong])
    lost = replace(prompts[0], images=(Image(path="lost.png"),))
    with pytest.raises(RewardError, match=r"prompt row 0: lost\.png does not exist"):
        build_scalar(scalar_folder).score(requests([lost]))
