"""The HTTP side of the reward server: forms, limits and answers; see docs/rewards_remote.md."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import prometheus_client as prometheus
from fastapi import FastAPI, HTTPException, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.gzip import GZipMiddleware

from torchrft.rewards.server_gate import Gate, error_answer
from torchrft.rewards.source import RewardError, SampleError
from torchrft.tools.images import MAX_PIXELS, Image, ImageError, from_base64
from torchrft.tools.logging import logger
from torchrft.tools.payload import DEEPEST, is_deeper
from torchrft.types import Completion, FinishReason, Prompt, Score

if TYPE_CHECKING:
    from torchrft.rewards.scorer import Scorer

_WAITING = 256  # requests; further ones are sent away for a while
_MOST_SAMPLES = 1 << 16  # of a request
_MOST_PIXELS = 8 * MAX_PIXELS  # of a request's images: blank ones take thousands in a byte
# Lists beyond the common ones, and the arguments of functions that they fill.
_OWN = {"token_ids": "token_ids", "finish_reasons": "finish_reason"}
_MODELS_OWN = ("messages", "prompt_token_ids", *_OWN)


T = TypeVar("T")
# The first wrong entry ends the looking: there may be a million.
List = Annotated[list[T], Field(fail_fast=True)]


class ScoreRequest(BaseModel):
    """B samples to score, each list of length B. Either of `responses` and `query` may be missing.

    The predecessor's form, {"queries", "prompts", "references"}, is taken as well.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    prompts: List[str] = Field(max_length=_MOST_SAMPLES)
    """Prompts as the model saw them."""
    responses: List[str] | None = None
    """What the model answered."""
    query: List[str] | None = Field(None, validation_alias=AliasChoices("query", "queries"))
    """Prompts with their responses."""
    labels: List[Any] | None = Field(None, validation_alias=AliasChoices("labels", "references"))
    """The prompts' labels, any JSON."""
    images: List[List[str] | None] | None = None
    """The prompts' images, each an encoded file (PNG, JPEG, ...) in base64."""
    metadata: List[dict[str, Any] | None] | None = None
    """Further columns of the prompts' rows."""
    messages: List[List[dict[str, Any]]] | None = None
    """The chats that the prompts were made from."""
    prompt_token_ids: List[List[int]] | None = None
    """The prompts' token ids."""
    token_ids: List[List[int]] | None = None
    """The responses' token ids."""
    finish_reasons: List[FinishReason] | None = None
    """How the responses ended."""
    rows: List[int] | None = None
    """The prompts' row numbers, for messages."""

    @model_validator(mode="before")
    @classmethod
    def _knows(cls, body: Any) -> Any:
        """The first unknown key ends the looking."""
        for name in body if isinstance(body, dict) else ():
            if name not in {*cls.model_fields, "queries", "references"}:
                raise ValueError(f"{name!r:.80} is none of {', '.join(cls.model_fields)}")
        return body

    @model_validator(mode="after")
    def _fits(self) -> ScoreRequest:
        lengths = {name: len(value) for name, value in self if value is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the lists must be equally long, but there are {lengths}")
        if self.responses is None:
            if self.query is None:
                raise ValueError("responses are missing")
            for place, (text, prompt) in enumerate(zip(self.query, self.prompts, strict=True)):
                if not text.startswith(prompt):
                    raise ValueError(f"query {place} does not begin with its prompt")
            self.responses = list(map(str.removeprefix, self.query, self.prompts))
        return self

    def samples(self, looks: bool = True) -> tuple[list[Prompt], list[Completion]]:
        """What the scorer, which `looks` at images or not, is asked about. Raises ImageError for
        images that it cannot have, and SampleError for what is nested too deeply."""
        places, size = range(len(self.prompts)), len(self.prompts)
        for name in ("labels", "metadata", "messages"):
            if is_deeper(getattr(self, name), DEEPEST + 1):
                raise SampleError(f"{name}: nested more than {DEEPEST} deep")
        further = self.prompt_token_ids, self.labels, self.metadata, self.messages
        columns: list[Any] = [values or [None] * size for values in further]
        columns += [self.rows or places, self.prompts, self._pictures(looks)]
        prompts = [
            Prompt(row, text, tuple(ids or ()), label, metadata or {}, tuple(chat or ()), images)
            for ids, label, metadata, chat, row, text, images in zip(*columns, strict=True)
        ]
        no_ids: Any = [()] * size
        own = self.token_ids or no_ids, self.finish_reasons or ["stop"] * size
        return prompts, [
            Completion(place, 0, tuple(ids), (0.0,) * len(ids), text, reason)
            for place, text, ids, reason in zip(places, self.responses or (), *own, strict=True)
        ]

    def _pictures(self, looks: bool) -> Iterator[tuple[Image, ...]]:
        known: dict[str, tuple[Image, int]] = {}  # the samples of a prompt have the same
        sum_of_pixels = 0
        for place, texts in enumerate(self.images or [None] * len(self.prompts)):
            try:
                for text in texts or ():
                    if text not in known:
                        image = from_base64(text)
                        known[text] = image, math.prod(image.open().size) if looks else 0
                    sum_of_pixels += known[text][1]
                    if sum_of_pixels > _MOST_PIXELS:
                        many = f"the images up to here have {sum_of_pixels} pixels, more than"
                        raise ImageError(f"{many} {_MOST_PIXELS}; send fewer samples in one")
            except ImageError as error:
                raise ImageError(f"images.{place}: {error}") from error
            yield tuple(known[text][0] for text in texts or ())


class ScoreAnswer(BaseModel):
    """A reward per sample, and further numbers per sample: null where there is none."""

    rewards: list[float]
    extra_logs: dict[str, list[float | None]]


class ErrorAnswer(BaseModel):
    """What was wrong, in a sentence."""

    error: str


class HealthAnswer(BaseModel):
    """Whose rewards are mixed, and which lists are taken beyond the common ones.

    `authorized`: this request had the right token, or none is needed.
    """

    status: str
    sources: list[str]
    takes: list[str]
    authorized: bool


class _Service:
    """What is asked for at each path.

    One request is scored at a time, in one thread: sources need not be thread-safe.
    """

    def __init__(self, scorer: Scorer, zipped: bool) -> None:
        self.scorer, self.zipped = scorer, zipped
        self.turn, self.thread = asyncio.Lock(), ThreadPoolExecutor(1, "scorer")
        sources = scorer.sources.values()
        wanted = {name for source in sources for name in getattr(source, "arguments", ())}
        fields = {**_OWN, "images": "images"}
        self.needs = [field for field, argument in fields.items() if argument in wanted]
        # A model, which does not say what it wants, may want any.
        says = all(hasattr(source, "arguments") for source in sources)
        self.looks = not says or "images" in self.needs
        self.takes = ["rows", *((n for n in _OWN if n in self.needs) if says else _MODELS_OWN)]
        self.registry = prometheus.CollectorRegistry()
        of: Any = {"namespace": "torchrft_reward", "registry": self.registry}
        self.requests = prometheus.Counter("requests", "Requests.", ["status"], **of)
        self.samples = prometheus.Counter("samples", "Samples scored.", **of)
        self.seconds = prometheus.Histogram("seconds", "Seconds of scoring a request.", **of)
        self.waiting = 0
        gauge = prometheus.Gauge("waiting", "Requests in work or waiting.", **of)
        gauge.set_function(lambda: self.waiting)

    def count(self, status: int) -> None:
        self.requests.labels(status).inc()

    async def score(self, body: ScoreRequest, request: Request) -> ScoreAnswer:
        """Scores B samples."""
        if missing := [name for name in self.needs if getattr(body, name) is None]:
            raise HTTPException(422, f"the rewards served here need {', '.join(missing)}")
        if self.waiting >= _WAITING:
            raise HTTPException(503, "too many requests are waiting", {"Retry-After": "1"})
        self.waiting += 1
        try:
            async with self.turn:
                if await request.is_disconnected():
                    raise HTTPException(400, "the client has gone")
                loop = asyncio.get_running_loop()
                scores = await loop.run_in_executor(self.thread, self._score, body)
        finally:
            self.waiting -= 1
        logs = [{**score.parts, **score.metrics} for score in scores]
        names = dict.fromkeys(name for log in logs for name in log)
        extra_logs = {name: [log.get(name) for log in logs] for name in names}
        return ScoreAnswer(rewards=[score.value for score in scores], extra_logs=extra_logs)

    def _score(self, body: ScoreRequest) -> list[Score]:
        try:
            with self.seconds.time():
                scores = self.scorer.score(*body.samples(self.looks))
        except (ImageError, SampleError) as error:
            raise HTTPException(422, str(error)) from error
        except RewardError as error:
            raise HTTPException(500, str(error)) from error
        except Exception as error:
            logger.exception("scoring failed")
            raise HTTPException(500, f"{type(error).__name__}: {error}") from error
        self.samples.inc(len(scores))
        return scores

    async def health(self, request: Request, response: Response) -> HealthAnswer:
        """That the server is up, and what it takes; never needs the token."""
        if self.zipped:
            response.headers["Accept-Encoding"] = "gzip"  # of requests: RFC 7694
        told: Any = {"takes": self.takes, "authorized": request.state.authorized}
        return HealthAnswer(status="ok", sources=list(self.scorer.sources), **told)

    async def metrics(self) -> Response:
        """Counters for Prometheus."""
        text = prometheus.generate_latest(self.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)


async def _malformed(request: Request, error: Any) -> JSONResponse:
    places = (
        (".".join(f"{part!s:.80}" for part in e["loc"]), e["msg"]) for e in error.errors()[:5]
    )
    return error_answer(422, "; ".join(map(": ".join, places)))


async def _refused(request: Request, error: Any) -> JSONResponse:
    return error_answer(error.status_code, str(error.detail), dict(error.headers or {}))


def create_app(
    scorer: Scorer, token: str | None = None, max_bytes: int = 1 << 26, zipped: bool = True
) -> FastAPI:
    """The server of what `scorer` mixes, which it closes at its end.

    Args: token, that requests must bear but those to /health; max_bytes, of a request's body,
        compressed or not; zipped, whether clients are told that they may compress them.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        scorer.close()  # here, since uvicorn ends the process by the signal that it got

    def faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
        return {status: {"model": ErrorAnswer} for status in statuses}

    service = _Service(scorer, zipped)
    app = FastAPI(title="torchrft reward server", redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(GZipMiddleware, minimum_size=1024, compresslevel=1)
    app.add_middleware(Gate, token=token, limit=max_bytes, count=service.count)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(AnyHTTPException, _refused)
    secured: Any = {"dependencies": [Security(HTTPBearer(auto_error=False))] if token else []}
    responses = faults(400, 401, 413, 415, 422, 500, 503)
    app.post("/score", responses=responses, **secured)(service.score)
    for path in ("/", "/get_reward"):
        app.post(path, include_in_schema=False)(service.score)
    app.get("/health")(service.health)
    text: Any = {"response_class": PlainTextResponse, "responses": faults(401)}
    app.get("/metrics", **text, **secured)(service.metrics)
    return app
