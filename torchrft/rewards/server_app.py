"""The HTTP side of the reward server: forms, limits and answers; see docs/rewards_remote.md."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, Literal

import prometheus_client as prometheus
from fastapi import Body, FastAPI, HTTPException, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Discriminator, Tag, model_validator
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from torchrft.rewards.source import RewardError
from torchrft.tools.http import gunzip
from torchrft.tools.logging import logger
from torchrft.types import Completion, FinishReason, Prompt, Score

if TYPE_CHECKING:
    from torchrft.rewards.scorer import Scorer

_OWN = {
    "messages": "messages",
    "prompt_token_ids": "prompt_token_ids",
    "token_ids": "token_ids",
    "finish_reasons": "finish_reason",
}
"""Lists of `ScoreRequest` beyond the common ones, and the arguments of functions they fill."""

_WAITING = 256  # requests; further ones are sent away for a while


class ScoreRequest(BaseModel):
    """B samples to score, each list of length B. `responses` may be left out with `query`."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str]
    """Prompts as the model saw them."""
    responses: list[str] | None = None
    """What the model answered."""
    query: list[str] | None = None
    """Prompts with their responses."""
    labels: list[Any] | None = None
    """The prompts' labels, any JSON."""
    images: list[list[str] | None] | None = None
    """The prompts' images; this version takes none."""
    metadata: list[dict[str, Any] | None] | None = None
    """Further columns of the prompt's row."""
    messages: list[list[dict[str, Any]]] | None = None
    """The chats that the prompts were made from."""
    prompt_token_ids: list[list[int]] | None = None
    """The prompts' token ids."""
    token_ids: list[list[int]] | None = None
    """The responses' token ids."""
    finish_reasons: list[FinishReason] | None = None
    """How the responses ended."""
    rows: list[int] | None = None
    """The prompts' row numbers, for messages."""

    @model_validator(mode="after")
    def _fits(self) -> ScoreRequest:
        lengths = {name: len(value) for name, value in self if value is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the lists must be equally long, but there are {lengths}")
        if any(self.images or []):
            raise ValueError("images are not scored by this version; leave them out")
        if self.responses is None:
            if self.query is None:
                raise ValueError("responses are missing")
            for place, (prompt, text) in enumerate(zip(self.prompts, self.query, strict=True)):
                if not text.startswith(prompt):
                    raise ValueError(f"query {place} does not begin with its prompt")
        return self

    def samples(self) -> tuple[list[Prompt], list[Completion]]:
        """What the scorer is asked about."""
        prompts, completions = [], []
        for place, text in enumerate(self.prompts):
            response = (
                (self.query or [])[place][len(text) :]
                if self.responses is None
                else self.responses[place]
            )
            row = self.rows[place] if self.rows else place
            label = self.labels[place] if self.labels else None
            metadata = (self.metadata[place] if self.metadata else None) or {}
            given = tuple(self.prompt_token_ids[place]) if self.prompt_token_ids else ()
            chat = tuple(self.messages[place]) if self.messages else ()
            prompts.append(Prompt(row, text, given, label, metadata, chat))
            ids = tuple(self.token_ids[place]) if self.token_ids else ()
            reason: FinishReason = self.finish_reasons[place] if self.finish_reasons else "stop"
            completions.append(Completion(place, 0, ids, (0.0,) * len(ids), response, reason))
        return prompts, completions


class PredecessorRequest(BaseModel):
    """The predecessor's form: `queries` are prompts with their responses, `references` labels."""

    model_config = ConfigDict(extra="forbid")

    queries: list[str]
    prompts: list[str]
    references: list[Any] | None = None

    @model_validator(mode="after")
    def _fits(self) -> PredecessorRequest:
        self.as_score_request()
        return self

    def as_score_request(self) -> ScoreRequest:
        return ScoreRequest(query=self.queries, prompts=self.prompts, labels=self.references)


class ScoreAnswer(BaseModel):
    """A reward per sample, and further numbers per sample: null where there is none."""

    rewards: list[float]
    extra_logs: dict[str, list[float | None]]


class ErrorAnswer(BaseModel):
    """What was wrong, in a sentence."""

    error: str


class HealthAnswer(BaseModel):
    """That the server is up; whose rewards it mixes; what it takes beyond the common lists."""

    status: Literal["ok"]
    sources: list[str]
    takes: list[str]
    authorized: bool
    """Whether this request had the right token, or none is needed."""


def _form(body: Any) -> str:
    """Which of the two forms a body has, for messages about the right one."""
    old = body.__class__ is PredecessorRequest or (isinstance(body, dict) and "queries" in body)
    return "predecessor" if old else "torchrft"


AnyRequest = Annotated[
    Annotated[ScoreRequest, Tag("torchrft")] | Annotated[PredecessorRequest, Tag("predecessor")],
    Discriminator(_form),
]


def _error(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An ErrorAnswer; lone surrogates, which a request may hold, have no UTF-8."""
    text = text.encode(errors="backslashreplace").decode()
    return JSONResponse({"error": text}, status, headers)


class Gate:
    """Asks for the token and bounds the body, before anything reads it; unpacks gzip; counts.

    Args: token, None for an open server; limit, bytes of a body, as sent and decompressed.
    """

    def __init__(
        self, app: ASGIApp, token: str | None, limit: int, requests: prometheus.Counter
    ) -> None:
        self.app, self.limit, self.requests = app, limit, requests
        self.expected = None if token is None else b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.requests.labels(message["status"]).inc()
            await send(message)

        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        allowed = self.expected is None or hmac.compare_digest(given, self.expected)
        scope.setdefault("state", {})["authorized"] = allowed
        body = await self._read(receive, keep=allowed)
        encoding = headers.get(b"content-encoding", b"identity").strip().lower()
        fault: tuple[int, str] | None = None
        if not allowed and scope["path"] != "/health":
            fault = 401, "this server needs its bearer token"
        elif body is None:
            fault = 413, f"a request may have {self.limit} bytes; send fewer samples in one"
        elif encoding == b"gzip":
            try:
                body = gunzip(body, self.limit)
            except ValueError as error:
                fault = 413 if "more than" in str(error) else 400, f"the body is {error}"
        elif encoding != b"identity":
            fault = 415, f"Content-Encoding must be gzip, not {encoding.decode('latin-1')}"
        if fault is not None:
            extra = {"WWW-Authenticate": "Bearer"} if fault[0] == 401 else None
            return await _error(*fault, extra)(scope, receive, counted)
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"content-encoding"]
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return unread.pop() if unread else await receive()

        await self.app(scope, replay, counted)

    async def _read(self, receive: Receive, keep: bool) -> bytes | None:
        """The body; None for one that is too large. Much of that is taken in nevertheless, or the
        client would not get to the answer."""
        parts, size, more = [], 0, True
        while more and size <= 8 * self.limit:
            message = await receive()
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if keep and size <= self.limit:
                parts.append(part)
        return b"".join(parts) if size <= self.limit else None


class _Numbers:
    """What /metrics tells, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        name = "torchrft_reward_"
        self.requests = prometheus.Counter(
            f"{name}requests", "Requests by status.", ["status"], registry=self.registry
        )
        self.samples = prometheus.Counter(
            f"{name}samples", "Samples scored.", registry=self.registry
        )
        self.seconds = prometheus.Histogram(
            f"{name}seconds", "Seconds of scoring a request.", registry=self.registry
        )
        self.waiting = prometheus.Gauge(
            f"{name}waiting", "Requests in work or waiting.", registry=self.registry
        )


class _Turns:
    """Has one request scored at a time, in one thread: sources need not be thread-safe."""

    def __init__(self, scorer: Scorer, numbers: _Numbers) -> None:
        self.scorer, self.numbers = scorer, numbers
        self.turn, self.waiting = asyncio.Lock(), 0
        self.thread = ThreadPoolExecutor(1, "scorer")

    async def score(self, body: ScoreRequest, request: Request) -> list[Score]:
        if self.waiting >= _WAITING:
            raise HTTPException(503, "too many requests are waiting", {"Retry-After": "1"})
        self.waiting += 1
        self.numbers.waiting.set(self.waiting)
        try:
            async with self.turn:
                if await request.is_disconnected():
                    raise HTTPException(400, "the client has gone")
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self.thread, self._score, body)
        except RewardError as error:
            raise HTTPException(500, str(error)) from error
        except HTTPException:
            raise
        except Exception as error:
            logger.exception("scoring failed")
            raise HTTPException(500, f"{type(error).__name__}: {error}") from error
        finally:
            self.waiting -= 1
            self.numbers.waiting.set(self.waiting)

    def _score(self, body: ScoreRequest) -> list[Score]:
        with self.numbers.seconds.time():
            scores = self.scorer.score(*body.samples())
        self.numbers.samples.inc(len(scores))
        return scores


def create_app(
    scorer: Scorer, token: str | None = None, max_bytes: int = 1 << 26, zipped: bool = True
) -> FastAPI:
    """The server of what `scorer` mixes, which it closes at its end.

    Args: token, that requests must bear but those to /health; max_bytes, of a request's body,
        compressed or not; zipped, whether clients are told that they may compress them.
    """
    numbers = _Numbers()
    turns = _Turns(scorer, numbers)
    sources = scorer.sources.values()
    wanted = {name for source in sources for name in getattr(source, "arguments", ())}
    needs = [f for f, argument in {**_OWN, "images": "images"}.items() if argument in wanted]
    # A model, which does not say what it wants, may want any.
    takes_all = any(not hasattr(source, "arguments") for source in sources)
    takes = ["rows", *(_OWN if takes_all else (name for name in needs if name in _OWN))]

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        scorer.close()  # here, since uvicorn ends the process by the signal that it got

    app = FastAPI(title="torchrft reward server", redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(GZipMiddleware, minimum_size=1024, compresslevel=1)
    app.add_middleware(Gate, token=token, limit=max_bytes, requests=numbers.requests)
    faults: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer} for status in (400, 401, 413, 415, 422, 500, 503)
    }
    secured = [Security(HTTPBearer(auto_error=False))] if token else []

    async def score(body: Annotated[AnyRequest, Body()], request: Request) -> ScoreAnswer:
        """Scores B samples; torchrft's form or the predecessor's."""
        asked = body if isinstance(body, ScoreRequest) else body.as_score_request()
        for name in needs:
            if getattr(asked, name) is None:
                raise HTTPException(422, f"the rewards served here need {name}")
        scores = await turns.score(asked, request)
        logs = [{**score.parts, **score.metrics} for score in scores]
        names = dict.fromkeys(name for log in logs for name in log)
        extra_logs = {name: [log.get(name) for log in logs] for name in names}
        return ScoreAnswer(rewards=[score.value for score in scores], extra_logs=extra_logs)

    for path in ("/score", "/", "/get_reward"):
        app.post(path, responses=faults, dependencies=secured, include_in_schema=path == "/score")(
            score
        )

    @app.get("/health")
    async def health(request: Request, response: Response) -> HealthAnswer:
        """That the server is up, and what it takes; never needs the token."""
        if zipped:
            response.headers["Accept-Encoding"] = "gzip"  # of requests: RFC 7694
        authorized = request.state.authorized
        return HealthAnswer(
            status="ok", sources=list(scorer.sources), takes=takes, authorized=authorized
        )

    @app.get(
        "/metrics",
        dependencies=secured,
        response_class=PlainTextResponse,
        responses={401: {"model": ErrorAnswer}},
    )
    async def metrics() -> Response:
        """Counters for Prometheus."""
        kind = prometheus.CONTENT_TYPE_LATEST
        return Response(prometheus.generate_latest(numbers.registry), media_type=kind)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        told = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        return _error(422, "; ".join(told))

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail), error.headers)

    return app
