"""The application: the table of addresses, and how an answer or an error becomes a reply."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, Router

from .engine import log_failure
from .errors import ServiceError, cohere_form, ollama_form, openai_form, tei_form
from .faces import cohere, ollama, openai, own, tei
from .metrics import CONTENT_TYPE
from .openapi import description
from .service import Call, Gone, Service

log = logging.getLogger("fastbert.service")
Form = Callable[[ServiceError], tuple[int, dict]]
JSON = b"application/json"
LARGE = 32_768  # numbers in one part of an answer; their JSON takes a millisecond or two


class Way(NamedTuple):
    """One function of the API.

    Attributes:
        name: its name in metrics.
        answer: computes the answer, which is sent as JSON.
        form: the form of its errors.
        paths: its addresses.
        method: the HTTP method.
        is_open: whether it can be called without a key.
    """

    name: str
    answer: Callable[[Service, Call], Awaitable[Any]]
    form: Form
    paths: tuple[str, ...]
    method: str = "POST"
    is_open: bool = False


async def _rerank(service: Service, call: Call) -> Any:
    """Scores of `texts` as in text-embeddings-inference's API, or of `documents` as in Cohere's, the best first."""
    return await (tei if _reranks_texts(call) else cohere).rerank(service, call)


def _reranks_texts(call: Call) -> bool:
    """Which of the two APIs a request is of. Where neither field is there, the address tells."""
    if "documents" in call.body or "texts" in call.body:
        return "documents" not in call.body
    return call.scope["path"] == "/rerank"


WAYS = (
    Way("embed", openai.embeddings, openai_form, ("/v1/embeddings", "/embeddings")),
    Way("models", openai.models, openai_form, ("/v1/models", "/models"), "GET"),
    Way("models", openai.model, openai_form, ("/v1/models/{name:path}",), "GET"),
    Way("embed", tei.embed, tei_form, ("/embed",)),
    Way("embed_all", tei.embed_all, tei_form, ("/embed_all", "/v1/embed_all")),
    Way("predict", tei.predict, tei_form, ("/predict", "/v1/predict")),
    Way("rerank", _rerank, tei_form, ("/rerank",)),
    Way("similarity", tei.similarity, tei_form, ("/similarity", "/v1/similarity")),
    Way("tokenize", tei.tokenize, tei_form, ("/tokenize", "/v1/tokenize")),
    Way("decode", tei.decode, tei_form, ("/decode", "/v1/decode")),
    Way("info", tei.info, tei_form, ("/info", "/v1/info"), "GET"),
    Way("rerank", _rerank, cohere_form, ("/v1/rerank", "/v2/rerank")),
    Way("score", openai.score, openai_form, ("/v1/score", "/score")),
    Way("embed", cohere.embed_v1, cohere_form, ("/v1/embed",)),
    Way("embed", cohere.embed_v2, cohere_form, ("/v2/embed",)),
    Way("embed", ollama.embed, ollama_form, ("/api/embed",)),
    Way("embed", ollama.embeddings, ollama_form, ("/api/embeddings",)),
    Way("models", ollama.tags, ollama_form, ("/api/tags", "/api/ps"), "GET"),
    Way("models", ollama.show, ollama_form, ("/api/show",)),
    Way("models", ollama.version, ollama_form, ("/api/version",), "GET"),
    Way("token_classify", own.token_classify, tei_form, ("/token_classify", "/v1/token_classify")),
    Way("question_answer", own.question_answer, tei_form, ("/question_answer", "/v1/question_answer")),
    Way("fill_mask", own.fill_mask, tei_form, ("/fill_mask", "/v1/fill_mask")),
    Way("hub", own.hub, tei_form, ("/", "/v1", "/invocations", "/models/{name:path}")),
)


class Endpoint:
    """A function of the API as an ASGI application. It replies with one message for the head and one for the body."""

    def __init__(self, service: Service, way: Way):
        self.service, self.way = service, way

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        service, way = self.service, self.way
        call = Call(way.name, scope, receive)
        form, status, headers = way.form, 200, []
        service.open += 1
        service.metrics.count("te_request_count", method=way.name)
        try:
            service.admit(call)
            if way.method == "POST":
                await service.read(call)
                if way.name == "rerank":
                    form = tei_form if _reranks_texts(call) else cohere_form
            content = await as_json(await way.answer(service, call))
            service.metrics.count("te_request_success", method=way.name)
        except ServiceError as error:
            status, body = form(error)
            content, headers = [orjson.dumps(body)], error.headers()
            is_unread = service.is_stopping and not call.is_read
            if way.method == "POST" and (call.has_long_rest or is_unread):  # the transport discards some of the rest
                headers.append((b"connection", b"close"))
            service.metrics.count("te_request_failure", err=error.kind)
        except Gone:
            service.metrics.count("te_request_failure", err="gone")
            return
        except Exception as error:
            log_failure(error)
            status, body = form(ServiceError("failed", f"the server failed on this request ({type(error).__name__})"))
            content = [orjson.dumps(body)]
            service.metrics.count("te_request_failure", err="failed")
        finally:
            service.open -= 1
        try:
            await reply(send, status, content, JSON, [*call.report, *headers])
        finally:
            service.observe(call)
            if log.isEnabledFor(logging.DEBUG):
                log.debug(
                    "request", extra={"method": way.name, "path": scope["path"], "status": status, "texts": call.texts,
                                      "tokens": call.tokens, "cut": call.cut},
                )  # fmt: skip


async def reply(
    send: Callable, status: int, parts: Sequence[bytes], kind: bytes, headers: list[tuple[bytes, bytes]]
) -> None:
    """Sends a reply. parts: of the body; each is sent as one message."""
    own_headers = [(b"content-type", kind), (b"content-length", b"%d" % sum(map(len, parts)))]
    await send({"type": "http.response.start", "status": status, "headers": own_headers + headers})
    for part in parts[:-1]:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": parts[-1]})


async def as_json(answer: Any) -> list[bytes]:
    """An answer as JSON, in one part, or in several if it is large.

    Between the parts the event loop serves other requests, which thus wait for one part only. A thread would not help,
    since orjson holds the interpreter's lock.
    """
    size = _size(answer)
    if size <= LARGE:
        if isinstance(answer, np.ndarray):
            answer = np.ascontiguousarray(answer)
        return [orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)]
    parts = []
    if isinstance(answer, dict):
        for name, value in answer.items():
            parts += [b",", orjson.dumps(name), b":", *await as_json(value)]
        return [b"{", *parts[1:], b"}"]
    step = LARGE * len(answer) // size
    for i in range(0, len(answer), max(step, 1)):
        # A single row may be large too: the vectors of all tokens of a long text.
        found = await as_json(answer[i : i + step] if step else answer[i])
        if step:  # removes the brackets around the slice
            found = [found[0][1:-1]] if len(found) == 1 else found[1:-1]
        parts += [b",", *found]
        await asyncio.sleep(0)
    return [b"[", *parts[1:], b"]"]


def _size(answer: Any) -> int:
    """Estimate of the numbers in an answer; the first item of a list is taken as typical."""
    if isinstance(answer, np.ndarray):
        return answer.size
    if isinstance(answer, dict):
        return sum(map(_size, answer.values()))
    if not isinstance(answer, list) or not answer:
        return 1
    return sum(row.size for row in answer) if isinstance(answer[0], np.ndarray) else len(answer) * _size(answer[0])


# ---- addresses of no client's API --------------------------------------------------------------------------


class Plain:
    """An address for GET without a key. `answer(service)` gives (status, content, content type)."""

    def __init__(self, service: Service, answer: Callable[[Service], tuple[int, bytes, bytes]]):
        self.service, self.answer = service, answer

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        status, content, kind = self.answer(self.service)
        await reply(send, status, [content], kind, [(b"cache-control", b"no-store")])


def live(service: Service) -> tuple[int, bytes, bytes]:
    """Replies 200 as long as the process runs."""
    return 200, b"{}", JSON


def ready(service: Service) -> tuple[int, bytes, bytes]:
    """Replies 200 once a first batch of every model has run, until the server is stopping."""
    if service.is_ready:
        return 200, b"{}", JSON
    why = service.failure or "the first batch has not run yet"
    if service.is_stopping or service.is_warm:
        why = "the server is stopping" if service.is_stopping else "a thread of the server has ended"
    status, body = tei_form(ServiceError("not_ready", why))
    return status, orjson.dumps(body), JSON


def metrics(service: Service) -> tuple[int, bytes, bytes]:
    return 200, service.metrics.text(), CONTENT_TYPE


def page(service: Service) -> tuple[int, bytes, bytes]:
    return 200, resources.files(__package__).joinpath("page.html").read_bytes(), b"text/html; charset=utf-8"


def openapi(service: Service) -> tuple[int, bytes, bytes]:
    return 200, orjson.dumps(description(service.version, [way for way in WAYS if way.method == "POST"])), JSON


PLAIN = {
    "/live": live, "/ready": ready, "/health": ready, "/ping": ready, "/openapi.json": openapi, "/": page,
    "/v1/live": live, "/v1/ready": ready, "/v1/health": ready,
}  # fmt: skip


def _unknown(kind: str, message: str) -> Callable:
    async def answer(request: Any, error: Any) -> Any:
        path = request.url.path
        form = openai_form if path.startswith("/v1") else tei_form
        status, body = form(ServiceError(kind, message))
        return Response(orjson.dumps(body), status, media_type="application/json", headers=error.headers)

    return answer


class Application:
    """Starlette with a short way to the functions of the API. Their requests pass neither the search through all routes
    nor the layers around it, which take 0.1 ms after a pause.

    Attributes:
        endpoints: by method and path.
        rest: what all other requests pass.
    """

    def __init__(self, service: Service, endpoints: dict[tuple[str, str], Endpoint], rest: Callable):
        self.service, self.endpoints, self.rest = service, endpoints, rest

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        endpoint = None
        if scope["type"] == "http" and not scope.get("root_path"):
            endpoint = self.endpoints.get((scope["method"], scope["path"]))
        await (self.rest if endpoint is None else endpoint)(scope, receive, send)


def application(service: Service) -> Application:
    """The application of a service. It starts the service's threads, and ends them."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await service.start()
        warming = asyncio.create_task(service.warm_up())
        yield
        warming.cancel()
        await service.stop()

    plain = dict(PLAIN)
    if service.settings.prometheus_port is None:
        plain["/metrics"] = metrics
    routes: list[BaseRoute] = [Route(path, Plain(service, answer), methods=["GET"]) for path, answer in plain.items()]
    endpoints = {(way.method, path): Endpoint(service, way) for way in WAYS for path in way.paths}
    routes += [Route(path, endpoint, methods=[method]) for (method, path), endpoint in endpoints.items()]
    cors = service.settings.cors_allow_origin
    middleware = [Middleware(CORSMiddleware, allow_origins=cors, allow_methods=["*"], allow_headers=["*"])]
    app = Starlette(
        routes=routes,
        middleware=middleware if cors else None,
        exception_handlers={404: _unknown("no_path", "there is nothing at this address"),
                            405: _unknown("no_method", "this address needs another method")},
        lifespan=lifespan,
    )  # fmt: skip
    app.router.redirect_slashes = False
    app.router.default = Plainer(app.router)
    direct = {} if cors else {address: made for address, made in endpoints.items() if "{" not in address[1]}
    return Application(service, direct, app)


class Plainer:
    """Answers at an address with other slashes, "//embed" or "/embed/", as at "/embed": many clients join the server's
    URL and the address without looking whether there is a slash at the end."""

    def __init__(self, router: Router):
        self.router = router

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        path = "/" + "/".join(filter(None, scope["path"].split("/")))
        if path == scope["path"]:
            raise HTTPException(404)
        await self.router.app({**scope, "path": path}, receive, send)


def metrics_application(service: Service) -> Starlette:
    """An application with only /metrics, for a separate port."""
    return Starlette(routes=[Route("/metrics", Plain(service, metrics), methods=["GET"])])
