"""What a user is told of models that the hub does not hand out, with a hub that answers so."""

import sys
from pathlib import Path

import huggingface_hub
import pytest

from torchrft.config.reward_config import RewardModel as Entry
from torchrft.models.loader import load_config, load_model, load_tokenizer
from torchrft.models.reward_model import reward_config
from torchrft.models.vision import Vision
from torchrft.rewards.models import Reader
from torchrft.tools.hub import hub_fault

VLM = str(Path(__file__).parents[1] / "assets" / "debug_vlm")
LOADERS = {
    "config": load_config,
    "tokenizer": load_tokenizer,
    "model": load_model,
    "vision": Vision.load,
    "processor": lambda source: Vision.load(VLM, processor=source),
    "reward model": reward_config,
    "reward tokenizer": lambda source: Reader(Entry(pretrain=source), None),
}
MISSING = '"own/name" is neither a folder here nor a model on the hub for this user: check'
GATED = (
    'the model "own/name" is gated: accept its terms at https://huggingface.co/own/name and log in '
    "by `hf auth login` (or HF_TOKEN)"
)
AWAY = 'the model "own/name" is no folder here and not in the cache, and '
GET = ", or run `hf download own/name` where there is a network"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Makes the hub answer every request by (status, headers), or with no connection for None."""
    session = huggingface_hub.get_session()
    http = sys.modules[type(session).__module__.partition(".")[0]]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub's retries

    def answer(status, headers):
        def respond(request):
            if status is None:
                raise http.ConnectError("no route to host", request=request)
            return http.Response(status, headers=headers, request=request)

        transport = http.MockTransport(respond)
        huggingface_hub.set_client_factory(lambda: http.Client(transport=transport))

    yield answer
    from huggingface_hub.utils._http import default_client_factory

    huggingface_hub.set_client_factory(default_client_factory)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, MISSING),
        (401, {"X-Error-Message": "Invalid username or password."}, MISSING),
        (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}, GATED),
        (None, {}, AWAY + "the hub is out of reach" + GET),
    ],
)
def test_what_the_hub_says_is_a_sentence(hub, kind, status, headers, message):
    hub(status, headers)
    with pytest.raises(ValueError, match="own/name") as caught:
        LOADERS[kind]("own/name")
    assert str(caught.value).startswith(message)


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for load in LOADERS.values():
        with pytest.raises(ValueError, match="own/name") as caught:
            load("own/name")
        assert str(caught.value).startswith(AWAY + "HF_HUB_OFFLINE is set: unset it" + GET)


def test_a_repository_without_the_file_is_not_called_missing(hub):
    hub(404, {"X-Error-Code": "EntryNotFound"})
    with pytest.raises(ValueError, match=r'"own/name" holds no config.json that trans'):
        load_config("own/name")


@pytest.mark.parametrize("kind", LOADERS)
def test_paths_are_never_looked_for_on_the_hub(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.safetensors").write_bytes(b"")
    for source in (str(tmp_path / "lost"), "./lost", "../lost", "~/lost", "a/b/lost"):
        with pytest.raises(ValueError, match=f'"{source}" is no folder here: correct the path'):
            LOADERS[kind](source)
    with pytest.raises(ValueError, match=r'safetensors" is no folder here: correct the path'):
        LOADERS[kind]("file.safetensors")


def test_what_lies_in_a_folder_is_not_the_hubs(tmp_path):
    error = OSError("no file")
    error.__cause__ = ConnectionError()
    assert hub_fault(str(tmp_path), error) is None
    assert hub_fault("own/name", ValueError("unknown model type")) is None
    assert "is no folder" in hub_fault("own/name", error)
    circle = ValueError("x")
    circle.__context__ = other = ValueError("y")
    other.__context__ = circle
    assert hub_fault("own/name", circle) is None
