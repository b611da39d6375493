"""Prompts with images: every way to name a picture, and every picture that cannot be used."""

import base64
import io
import json
import logging
import os
import pickle
import re
import shutil
from pathlib import Path

import datasets
import pytest
from PIL import Image as Pillow
from tokenizers import processors
from transformers import AutoTokenizer

from torchrft.config.job_config import Data
from torchrft.data.prompts import load_prompts
from torchrft.data.sources import Columns, open_source
from torchrft.models.loader import load_config
from torchrft.models.vision import Vision
from torchrft.tools import images as images_module
from torchrft.tools.images import Image, ImageError, image_of

MODEL = str(Path(__file__).parents[1] / "assets" / "debug_vlm")
IMAGE_TOKEN, TOKENS = 56, 9
COLORS = [(250, 10, 20), (30, 240, 40), (10, 20, 250)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def vision():
    return Vision.load(MODEL)


def encoded(color=COLORS[0], size=(24, 24), **options):
    buffer = io.BytesIO()
    Pillow.new(options.pop("mode", "RGB"), size, color).save(buffer, "PNG", **options)
    return buffer.getvalue()


def data(**options):
    return Data(**{"images_key": "images", "apply_chat_template": True} | options)


def write(folder, *rows, name="p.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def colors(prompt):
    return [image.open().getpixel((3, 3)) for image in prompt.images]


def test_every_way_to_name_a_picture(tmp_path, tokenizer, vision, monkeypatch):
    """Paths are relative to the file, wherever the job runs."""
    folder = tmp_path / "data"
    png = base64.b64encode(encoded()).decode()
    long = f"pictures/{'1' * 60}"  # a name that might be base64
    rows = [
        {"prompt": "a", "images": "pictures/1.png"},
        {"prompt": "a", "images": str(folder / "pictures" / "1.png")},
        {"prompt": "a", "images": png},
        {"prompt": "a", "images": [f"data:image/png;base64,{png}"]},
        {"prompt": "a", "images": {"bytes": None, "path": "pictures/1.png"}},
        {"prompt": "a", "images": f"file://{folder}/pictures/1.png"},
        {"prompt": "a", "images": f"FILE://{folder}/pictures/1.png"},
        {"prompt": "a", "images": [f"DATA:image/png;base64,{png}"]},
        {"prompt": "a", "images": long},
    ]
    path = write(folder, *rows)
    (folder / "pictures").mkdir()
    for name in ("pictures/1.png", long):
        (folder / name).write_bytes(encoded())
    monkeypatch.chdir(tmp_path)
    prompts = load_prompts(path, data(), tokenizer, vision=vision)
    assert [colors(prompt) for prompt in prompts] == [[COLORS[0]]] * len(rows)
    assert prompts.dropped == 0
    for prompt in prompts:  # the text has one placeholder, the ids one for each feature
        assert prompt.text == "<|user|><image>a\n<|assistant|>"
        assert list(prompt.token_ids) == [4, *[IMAGE_TOKEN] * TOKENS, 30, 6, 5]
    again = pickle.loads(pickle.dumps(prompts[2]))
    assert again == prompts[2]
    assert len(pickle.dumps(prompts[0])) < 600


@pytest.mark.parametrize("feature", [datasets.Image(), datasets.Value("binary")])
@pytest.mark.parametrize("several", [False, True])
def test_parquet_columns(tmp_path, tokenizer, vision, feature, several):
    """Of bytes, and of the images of a saved dataset, which stay encoded until they are needed."""
    values = [encoded(color) for color in COLORS]
    column = [values[:2], values[2:]] if several else values[:2]
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "images": datasets.List(feature) if several else feature,
        }
    )
    rows = datasets.Dataset.from_dict({"prompt": ["a", "b"], "images": column}, features=features)
    rows.to_parquet(tmp_path / "p.parquet")
    prompts = load_prompts(str(tmp_path / "p.parquet"), data(), tokenizer, vision=vision)
    wanted = [COLORS[:2], COLORS[2:]] if several else [COLORS[:1], COLORS[1:2]]
    assert [colors(prompt) for prompt in prompts] == wanted
    assert all(image.data in values for prompt in prompts for image in prompt.images)


def part(*pieces):
    kinds = {True: "text", False: "image"}
    made = []
    for piece in pieces:
        is_text = isinstance(piece, str)
        made.append({"type": kinds[is_text]} | ({"text": piece} if is_text else piece))
    return made


def test_pictures_in_messages_of_a_dataset_stay_encoded(tmp_path, tokenizer, vision):
    """So a damaged one is dropped, as in a column."""
    part = {"type": datasets.Value("string"), "image": datasets.Image()}
    message = {"role": datasets.Value("string"), "content": datasets.List(part)}
    features = datasets.Features({"prompt": datasets.List(message)})
    rows = [
        [{"role": "user", "content": [{"type": "image", "image": {"bytes": raw, "path": None}}]}]
        for raw in (encoded(), encoded()[:50])
    ]
    table = datasets.Dataset.from_dict({"prompt": rows}, features=features)
    table.to_parquet(str(tmp_path / "p.parquet"))
    prompts = load_prompts(
        str(tmp_path / "p.parquet"), data(mixed_mm_data=True), tokenizer, vision=vision
    )
    assert [prompt.row for prompt in prompts] == [0]
    assert prompts[0].images[0].data == encoded()


def test_where_images_stand_in_messages(tmp_path, tokenizer, vision):
    """At image parts, at <image> in a text, or in front of the first user message."""
    one, two, three = (base64.b64encode(encoded(color)).decode() for color in COLORS)
    user = {"role": "user"}
    cases = [
        ([{**user, "content": part("a", {}, "b", {})}], [one, two], "a<image>b<image>", COLORS[:2]),
        ([{**user, "content": "a<image>b<image>c"}], [one, two], "a<image>b<image>c", COLORS[:2]),
        ([{**user, "content": "ab"}], [one, two], "<image><image>ab", COLORS[:2]),
        ("a<image>", one, "a<image>", COLORS[:1]),
        ([{**user, "content": part({"image": three}, "a", {})}], [one], "<image>a<image>",
         [COLORS[2], COLORS[0]]),
        ([{**user, "content": [{"type": "image_url",
                                "image_url": {"url": f"data:image/png;base64,{two}"}},
                               {"type": "text", "text": "a"}]}], None, "<image>a", [COLORS[1]]),
        ([{"role": "system", "content": "s"}, {**user, "content": "a"}], one, None, COLORS[:1]),
    ]  # fmt: skip
    path = write(tmp_path, *({"prompt": p, "images": i} for p, i, _, _ in cases))
    prompts = load_prompts(path, data(), tokenizer, vision=vision)
    assert len(prompts) == len(cases)
    for prompt, (_, _, text, wanted) in zip(prompts, cases, strict=True):
        if text is None:
            assert prompt.text == "<|system|>s\n<|user|><image>a\n<|assistant|>"
        else:
            assert prompt.text == f"<|user|>{text}\n<|assistant|>"
        assert colors(prompt) == wanted
        assert prompt.token_ids.count(IMAGE_TOKEN) == TOKENS * len(wanted)
    plain = write(tmp_path, {"prompt": "a<image>b", "images": one})
    [prompt] = load_prompts(plain, data(apply_chat_template=False), tokenizer, vision=vision)
    assert list(prompt.token_ids) == [30, *[IMAGE_TOKEN] * TOKENS, 31]


PNG = base64.b64encode(encoded()).decode()
USER = {"role": "user"}
MALFORMED = [
    ({"prompt": "a", "imags": PNG}, {}, "have none; did you mean 'imags'?"),
    ({"prompt": "a", "images": []}, {}, "no image in 'images' (images_key); set mixed_mm_data"),
    ({"prompt": "a", "images": None}, {}, "no image in 'images' (images_key); set mixed_mm_data"),
    ({"prompt": "a<image>", "images": [PNG, PNG]}, {}, "places for 1 images, but 'images' holds 2"),
    ({"prompt": "a<image>"}, {"mixed_mm_data": True}, "places for 1 images, but 'images' holds 0"),
    ({"prompt": "a", "images": PNG}, {"apply_chat_template": False},
     "becomes a text with 0 times '<image>' for 1 images; write it once for each"),
    ({"prompt": [{**USER, "content": [{"type": "text", "text": "<image>"}, {"type": "image"}]}],
      "images": PNG}, {}, "2 times '<image>' for 1 images; take it out of the text"),
    ({"prompt": [{**USER, "content": [{"type": "video", "video": "v.mp4"}]}], "images": PNG}, {},
     "a part of type 'video'; prompts take text and images only"),
    ({"prompt": [{**USER, "content": [{"type": "audio"}]}], "images": PNG}, {},
     "a part of type 'audio'; prompts take text and images only"),
    ({"prompt": [{**USER, "content": [{"type": "text"}]}], "images": PNG}, {},
     'a part must be {"type": "text"'),
    ({"prompt": [{**USER, "content": []}], "images": PNG}, {}, "is empty"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "options", "message"), MALFORMED)
def test_malformed_rows_name_file_and_line(tmp_path, tokenizer, vision, row, options, message):
    path = write(tmp_path, row)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_prompts(path, data(**options), tokenizer, vision=vision)
    assert f"{path}, line 1" in str(caught.value)


def test_a_place_for_a_video_is_refused(tmp_path, tokenizer, vision, monkeypatch):
    """The model's own; with another model <video> is a text."""
    path = write(tmp_path, {"prompt": "a", "images": PNG}, {"prompt": "<video>", "images": PNG})
    assert len(load_prompts(path, data(), tokenizer, vision=vision)) == 2
    monkeypatch.setattr(vision.processor, "video_token", "<video>", raising=False)
    with pytest.raises(ValueError, match=r"line 2: 'prompt' has a place for a video \(<video>\)"):
        load_prompts(path, data(), tokenizer, vision=vision)


def test_parts_need_a_job_with_images(tmp_path, tokenizer):
    path = write(tmp_path, {"prompt": [{**USER, "content": part("a", {})}]})
    with pytest.raises(ValueError, match="parts other than text need images_key or mixed_mm_data"):
        load_prompts(path, Data(apply_chat_template=True), tokenizer)


def animated(kind):
    frames = [Pillow.new("RGB", (8, 8), color) for color in COLORS]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


BOMB = encoded(0, (10_000, 10_000), mode="1")
UNUSABLE = [
    ("missing.png", "missing.png does not exist"),
    (base64.b64encode(encoded()[:60] + bytes(60)).decode(), "cannot be decoded"),
    (base64.b64encode(b"this is a text and no picture at all, " * 3).decode(),
     "an image is none of PNG, JPEG, WEBP, GIF, BMP: save it as one of them"),
    (base64.b64encode(animated("PNG")).decode(), "is animated or has pages"),
    (base64.b64encode(animated("TIFF")).decode(), "an image is none of PNG, JPEG"),
    (base64.b64encode(BOMB).decode(), "10000 x 10000 pixels, more than 89478485"),
    ("https://example.org/a.png", "is a web address"),
    ("HTTP://example.org/a.png", "is a web address"),
    ("ftp://example.org/a.png", "is a web address"),
    ("s3://pictures/a.png", "is a web address"),
    ("data:text/plain,hello", "is no data URI of an image"),
    ("A" * 65, "is not valid base64"),
    (7, "7 is no path"),
    (None, "None is no path"),
    (base64.b64encode(encoded(0, (1, 201))).decode(), "an image is 1 x 201: one side is over 200"),
    ("pipe.png", "pipe.png is no file"),
    ("*" + "A" * 9000, "*" + "A" * 20),
]  # fmt: skip


def test_unusable_images_are_dropped_and_counted(tmp_path, tokenizer, vision, caplog):
    """They never end a run; what is wrong, and where, is said once."""
    caplog.set_level(logging.WARNING)
    bad = [{"prompt": "a", "images": [PNG, value]} for value, _ in UNUSABLE]
    os.mkfifo(tmp_path / "pipe.png")  # whose reader would wait for a writer
    path = write(tmp_path, {"prompt": "b", "images": PNG}, *bad)
    prompts = load_prompts(path, data(), tokenizer, vision=vision)
    assert [prompt.row for prompt in prompts] == [0]
    assert prompts.dropped == len(UNUSABLE)
    assert f"dropped 17 of 18 prompts of {path}, whose images cannot be used" in caplog.text
    assert f"{path}, line 2: {tmp_path}/missing.png does not exist; " in caplog.text
    for row, (_, reason) in zip(bad, UNUSABLE, strict=True):
        with pytest.raises(ValueError, match="no prompt's images can be used") as caught:
            load_prompts(write(tmp_path, row), data(), tokenizer, vision=vision)
        assert reason in str(caught.value)
        assert len(str(caught.value)) < 900


def test_what_is_said_where_nothing_is_left(tmp_path, tokenizer, vision):
    """Rows whose pictures are missing have their columns, too."""
    gone = {"prompt": "a", "answer": "b", "images": "missing.png"}
    with pytest.raises(ValueError, match=r"no prompt's images can be used; .*does not exist"):
        load_prompts(write(tmp_path, gone), data(label_key="answer"), tokenizer, vision=vision)
    path = write(tmp_path, {"prompt": "b"}, gone)
    mixed = data(mixed_mm_data=True)
    assert [p.row for p in load_prompts(path, mixed, tokenizer, vision=vision)] == [0]
    path = write(tmp_path, {"prompt": "b" * 40, "images": PNG}, gone)
    said = r"1 prompts are longer than 30 tokens .*; of 1 the images cannot be used: .*missing"
    with pytest.raises(ValueError, match=said):
        load_prompts(path, data(prompt_max_len=30), tokenizer, vision=vision)


def test_a_processor_of_another_vocabulary(tmp_path, tokenizer):
    other = shutil.copytree(MODEL, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    vocabulary = json.loads(text)
    ids = vocabulary["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    path = write(tmp_path, {"prompt": "a", "images": PNG})
    vision = Vision.load(MODEL, processor=str(other))
    with pytest.raises(ValueError, match="the processor's tokenizer has another vocabulary"):
        load_prompts(path, data(), tokenizer, vision=vision)


def test_mixed_data_may_lack_the_column(tmp_path, tokenizer, vision):
    """And its images are in `images` unless images_key says otherwise."""
    rows = [{"prompt": "a"}, {"prompt": "a", "images": PNG}, {"prompt": "a", "images": None}]
    path = write(tmp_path, *rows)
    options = {"images_key": None, "mixed_mm_data": True}
    prompts = load_prompts(path, data(**options), tokenizer, vision=vision)
    assert [len(prompt.images) for prompt in prompts] == [0, 1, 0]
    assert prompts[0].text == "<|user|>a\n<|assistant|>"
    assert prompts[0].token_ids == (4, 30, 6, 5)
    options["images_key"] = "image"
    with pytest.raises(ValueError, match=r"no row has the column 'image' .* did you mean 'images'"):
        load_prompts(path, data(**options), tokenizer, vision=vision)


def test_long_prompts_count_their_image_tokens(tmp_path, tokenizer, vision):
    path = write(tmp_path, {"prompt": "a", "images": PNG}, {"prompt": "a", "images": [PNG, PNG]})
    prompts = load_prompts(path, data(prompt_max_len=20), tokenizer, vision=vision)
    assert (len(prompts), prompts.dropped) == (1, 1)


def test_token_counts_come_from_the_pictures_sizes(vision, monkeypatch):
    """Once that was seen to be right; a processor that counts otherwise is asked every time."""
    fresh = Vision(vision.processor, load_config(MODEL))
    texts = ["a<image>b<image>", "<image>"]
    pictures = [image_of(PNG, Path()), Image(data=encoded(size=(30, 10)))]
    wanted = [[30, *[56] * 9, 31, *[56] * 9], [56] * 9]
    assert fresh.token_ids(texts[0], pictures) == wanted[0]
    assert fresh.by_size
    monkeypatch.setattr(fresh, "_process", None)
    assert fresh.token_ids(texts[1], pictures[:1]) == wanted[1]
    other = Vision(vision.processor, load_config(MODEL))
    monkeypatch.setattr(other, "_tokens_of", lambda size: [56])
    for _ in range(2):
        assert other.token_ids(texts[0], pictures) == wanted[0]


def test_size_bounds():
    """The shape is kept; the processor's own bounds come after."""
    big, small = Image(data=encoded(size=(400, 100))), Image(data=encoded(size=(10, 40)))
    bounded = Vision.load(MODEL, min_pixels=1600, max_pixels=10_000)
    assert bounded.open(big).size == (200, 50)
    width, height = bounded.open(small).size
    assert width * height >= 1600
    assert height / width == pytest.approx(4, rel=0.1)
    assert Vision.load(MODEL).open(big).size == (400, 100)


def test_transparent_rotated_and_gray_pictures():
    clear = Pillow.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert image_of(clear, Path()).open().getpixel((0, 0)) == (255, 255, 255)
    assert image_of(Pillow.new("L", (4, 4), 7), Path()).open().getpixel((0, 0)) == (7, 7, 7)
    turned = Pillow.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # lies on its side
    buffer = io.BytesIO()
    turned.save(buffer, "JPEG", exif=exif)
    assert Image(data=buffer.getvalue()).open().size == (4, 6)


def test_no_more_pixels_than_the_limit_are_decoded(monkeypatch):
    monkeypatch.setattr(images_module, "MAX_PIXELS", 100)
    Image(data=encoded(size=(10, 10))).open()
    with pytest.raises(ImageError, match="11 x 10 pixels"):
        Image(data=encoded(size=(11, 10))).open()


def test_processor_is_detected_or_named(tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(MODEL, bare)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (bare / name).unlink()
    with pytest.raises(ValueError, match="by `processor`"):
        Vision.load(str(bare))
    assert Vision.load(str(bare), processor=MODEL).placeholder == "<image>"
    text_only = str(Path(MODEL).with_name("debug_model"))
    with pytest.raises(ValueError, match="is a qwen2 model, which sees no images"):
        Vision.load(text_only)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


def test_only_listed_formats_are_opened(tmp_path, tokenizer, vision, monkeypatch, caplog):
    """Pillow starts Ghostscript for an EPS, whatever the file is called."""
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: started.append(1))
    red = Pillow.new("RGB", (8, 8), "red")
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        red.save(tmp_path / f"{kind}.img", kind)
        assert image_of(f"{kind}.img", tmp_path).open().getpixel((4, 4))[0] > 250
    (tmp_path / "eps.png").write_bytes(EPS)
    for kind in ("TIFF", "PPM", "TGA", "ICO", "PCX", "PDF", "ICNS", "JPEG2000", "DDS", "SGI"):
        red.save(tmp_path / f"{kind}.png", kind)
    other = "is none of PNG, JPEG, WEBP, GIF, BMP: save it as one of them"
    for path in tmp_path.glob("*.png"):
        for look in (Image.open, Image.data_uri):
            with pytest.raises(ImageError, match=f"{path.name} {other}"):
                look(image_of(path.name, tmp_path))
    rows = {"prompt": "a", "images": ["PNG.img"]}, {"prompt": "a", "images": ["eps.png"]}
    prompts = load_prompts(write(tmp_path, *rows), data(), tokenizer, vision=vision)
    assert [prompt.row for prompt in prompts] == [0]
    assert f"line 2: {tmp_path}/eps.png {other}" in caplog.text
    assert not started


def test_of_a_gif_the_first_frame_is_taken(tmp_path):
    (tmp_path / "two.gif").write_bytes(animated("GIF"))
    picture = image_of("two.gif", tmp_path).open()
    assert picture.size == (8, 8)
    assert picture.getpixel((0, 0)) == Pillow.new("RGB", (1, 1), COLORS[0]).getpixel((0, 0))


def test_pictures_in_columns_of_text_jobs_stay_encoded(tmp_path):
    """`datasets` would decode any format, as it hands a row out."""
    columns = {"prompt": ["a"], "shot": [{"bytes": EPS, "path": None}]}
    features = datasets.Features(prompt=datasets.Value("string"), shot=datasets.Image())
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"), Columns(["prompt"], ["shot"]), False)
    assert next(iter(source)).columns["shot"] == {"bytes": EPS, "path": None}


def test_sixteen_bits_second_pictures_and_odd_texts(tmp_path):
    """12% gray stays so; a phone's MPO gives its first picture; no path is an ImageError."""
    deep = Pillow.new("I;16", (4, 4), 0x2000)
    deep.save(tmp_path / "deep.png")
    assert image_of("deep.png", tmp_path).open().getpixel((0, 0)) == (31, 31, 31)
    red, blue = (Pillow.new("RGB", (8, 8), color) for color in ("red", "blue"))
    red.save(tmp_path / "two.mpo", format="MPO", save_all=True, append_images=[blue])
    assert image_of("two.mpo", tmp_path).open().getpixel((0, 0))[0] > 200
    with pytest.raises(ImageError, match="not valid base64"):
        image_of("data:image/png;base64,é", tmp_path)
    with pytest.raises(ImageError, match="does not exist"):
        image_of("~nosuchuser/x.png", tmp_path).open()


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "1", "images": "\\ud800.png"}',
        '{"prompt": "1", "images": ["a.png", {"path": "\\ud800.png"}]}',
    ],
)
def test_half_a_character_in_a_path_is_one_sentence(row, tokenizer, vision, tmp_path):
    (tmp_path / "p.jsonl").write_text(row)
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1: 'images' holds half a character"):
        load_prompts(str(tmp_path / "p.jsonl"), data(), tokenizer, vision=vision)


def test_a_null_in_a_path_is_one_sentence(tokenizer, vision, tmp_path):
    path = write(tmp_path / "n", {"prompt": "1", "images": "a\x00.png"})
    with pytest.raises(ValueError, match=r"no prompt's images can be used; .*line 1: .*null"):
        load_prompts(path, data(), tokenizer, vision=vision)


def test_variables_of_a_processors_template_and_calls_of_tools(tokenizer, tmp_path):
    vision = Vision.load(MODEL)
    vision.processor.chat_template += "{% if think is defined %}{{ think }}{% endif %}"
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": None,
            "tool_calls": call}, {"role": "user", "content": "2"}]  # fmt: skip
    path = write(tmp_path / "t", {"prompt": chat})
    mixed = {"mixed_mm_data": True, "images_key": None}
    thinks = data(**mixed, chat_template_kwargs={"think": False})
    (prompt,) = load_prompts(path, thinks, tokenizer, vision=vision)
    assert prompt.text.endswith("False")
    wrong = data(**mixed, chat_template_kwargs={"x": 1})
    with pytest.raises(ValueError, match=r"no 'x' in the chat template; takes .*think"):
        load_prompts(path, wrong, tokenizer, vision=vision)


def test_a_text_with_images_that_begins_with_bos_gets_no_second_one(tmp_path):
    tokenizer, vision = AutoTokenizer.from_pretrained(MODEL), Vision.load(MODEL)
    for one in (tokenizer, vision.processor.tokenizer):
        one.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|user|> $A", special_tokens=[("<|user|>", 4)]
        )
    picture = base64.b64encode(encoded()).decode()
    rows = [{"prompt": f"{bos}{vision.placeholder}1", "images": picture}
            for bos in ("", "<|user|>", "", "<|user|>")]  # fmt: skip
    plain = data(apply_chat_template=False)
    prompts = load_prompts(write(tmp_path / "b", *rows), plain, tokenizer, vision=vision)
    assert len({p.token_ids for p in prompts}) == 1
    assert prompts[0].token_ids[0] == 4 != prompts[0].token_ids[1]
