"""`fastbert serve`: serves models over HTTP."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import importlib.util
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from .options import DTYPES, IMPLS, POOLINGS, UsageError, default_model, positive

ORDER = 6
SUMMARY = "answer HTTP requests: vectors, scores, labels, entities, answers, masked words"
# How often a thread of torch's operators looks for the others before it sleeps: for about 20 us, longer than from one
# operator of a pass to the next. By GNU's default, 300,000, every operator may wait for milliseconds on a machine that
# does other work too.
SPINS = "1000"
# Blocks of memory from this size on go back to the system when they are freed. By default glibc raises the size to that
# of the largest block freed so far: then the texts, activations and answers of a busy server leave gaps between each
# other, and its memory grows for minutes.
# Smaller sizes cost time, as the activations of each batch would be in new pages: 4% of the texts a second at 512 KB.
LARGE_BLOCK = 4_194_304
MOST_AT_THE_TOP = 33_554_432  # bytes of the heap that stay when all behind them is free
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt
LIBRARIES = ("starlette", "uvicorn", "orjson", "prometheus_client")

DESCRIPTION = """\
Serve one model or several over HTTP. Requests are computed together, in packed batches without padding.

A MODEL is a folder or a hub id of an encoder; of a reranker or classifier, a word tagger or a question answerer, from
transformers or 'fastbert finetune'; or of a BERT with its head for masked words. NAME=MODEL gives it a name, which
requests use in "model". The first MODEL answers requests without a name. The default MODEL is all-MiniLM-L6-v2.

  OpenAI's clients           POST /v1/embeddings, GET /v1/models; base_url is http://HOST:PORT/v1
  vLLM's                     POST /v1/score
  text-embeddings-inference  POST /embed /embed_all /predict /rerank /similarity /tokenize /decode, GET /info
  Cohere's, Jina's           POST /v1/rerank /v2/rerank /v1/embed /v2/embed
  Ollama's                   POST /api/embed /api/embeddings /api/show, GET /api/tags /api/ps /api/version
  the hub's InferenceClient  POST / and /models/NAME
  entities, answers, masks   POST /token_classify /question_answer /fill_mask
  SageMaker                  POST /invocations, GET /ping
  for machines               GET /live /ready /health /metrics /openapi.json; for people: GET /

For clients whose base URL ends with /v1, most of these are also there: /v1/predict, /v1/token_classify, /v1/health; but
/v1/embed is Cohere's.

Texts longer than a model's limit are cut. "usage" counts the remaining tokens, and the header x-truncated-texts the cut
texts; with {"truncate": false} in a request, a long text is an error instead. If the queue is full, a request is
answered with 429 and Retry-After at once. On SIGTERM the server answers all accepted requests, then stops.

With a key in the environment variable API_KEY, or in a file (--api-key-file, or the variable API_KEY_FILE), requests
need 'Authorization: Bearer KEY'. These variables of text-embeddings-inference are used if a flag is not given:
MODEL_ID, SERVED_MODEL_NAME, PORT, DTYPE, POOLING, MAX_CONCURRENT_REQUESTS, MAX_BATCH_TOKENS, MAX_CLIENT_BATCH_SIZE,
AUTO_TRUNCATE, DEFAULT_PROMPT_NAME, DEFAULT_PROMPT, PAYLOAD_LIMIT, PROMETHEUS_PORT, CORS_ALLOW_ORIGIN."""

EXAMPLES = """\
examples:
  fastbert serve                                        MiniLM on http://127.0.0.1:8080
  curl -s http://127.0.0.1:8080/embed -H 'content-type: application/json' -d '{"inputs": "a text"}'
  fastbert serve BAAI/bge-small-en-v1.5 --port 9000 --dtype float32
  fastbert serve texts=intfloat/e5-small-v2 ranks=cross-encoder/ms-marco-MiniLM-L6-v2 ner=my-tagger
  API_KEY=secret fastbert serve --host 0.0.0.0 --max-text-tokens 256"""


class _Refused(argparse.Action):
    """Refuses a key. argparse would take the flag for --api-key-file, and print the key as a file that is missing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.error("others can read a command line: put the key into the variable API_KEY or a file (--api-key-file)")


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.description, p.epilog = DESCRIPTION, EXAMPLES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("models", metavar="MODEL", nargs="*", help="a folder or hub id, or NAME=MODEL (default: MiniLM)")
    p.add_argument("--host", help="the address to listen on; 0.0.0.0 for all (default: 127.0.0.1, this machine alone)")
    p.add_argument("--port", type=positive, metavar="N", help="default: 8080")
    p.add_argument("--prometheus-port", type=positive, metavar="N", help="serve /metrics there and not on --port")
    p.add_argument("--dtype", choices=DTYPES, help="precision of the models (default: auto, by device)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: cuda if there is a GPU")
    p.add_argument("--impl", choices=IMPLS, help="implementation of the operators (default: the fastest)")
    p.add_argument("--pooling", choices=POOLINGS, metavar="MODE", help="pooling of encoders (default: the model's)")
    p.add_argument("--default-prompt-name", metavar="NAME", help="the model's prompt for requests that name none")
    p.add_argument(
        "--default-prompt", metavar="TEXT", help="put before the texts of requests that name no prompt, as 'query: '"
    )
    p.add_argument(
        "--batch-invariant", action="store_true", default=None,
        help="a text's result does not depend on its batch, to the last bit; somewhat slower",
    )  # fmt: skip
    limits = p.add_argument_group("limits")
    limits.add_argument(
        "--max-batch-tokens", type=positive, metavar="N", help="tokens computed at once (default: by device)"
    )
    limits.add_argument(
        "--max-queue-tokens", type=positive, metavar="N", help="tokens that may wait for a model (default: 524,288)"
    )
    limits.add_argument(
        "--max-concurrent-requests", type=positive, metavar="N", help="most open requests (default: 512)"
    )
    limits.add_argument(
        "--max-client-batch-size", type=positive, metavar="N", help="texts of a request (default: 4,096)"
    )
    limits.add_argument("--max-text-tokens", type=positive, metavar="N", help="tokens of a text (default: the model's)")
    limits.add_argument("--payload-limit", type=positive, metavar="BYTES", help="size of a request (default: 16 MiB)")
    limits.add_argument(
        "--timeout", type=positive, metavar="SECONDS",
        help="time limit of a request, after which it is answered with an error (default: 120); the header "
        "x-timeout-seconds of a request can lower it",
    )  # fmt: skip
    limits.add_argument(
        "--auto-truncate", action=argparse.BooleanOptionalAction,
        help="cut texts that are too long, if a request does not say otherwise (default: yes)",
    )  # fmt: skip
    p.add_argument("--api-key-file", metavar="FILE", help="file with the key that requests must send")
    p.add_argument("--api-key", nargs="?", action=_Refused, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    p.add_argument(
        "--cors-allow-origin",
        metavar="ORIGIN",
        action="append",
        help="origin of web pages that may send requests; may be repeated",
    )
    p.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info",
        help="level of the JSON lines on standard error; debug: one for each request, without its texts (default: "
        "info)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        raise UsageError(f"fastbert serve needs {', '.join(missing)}: pip install {' '.join(missing)}")
    import os

    spin_shortly(os.environ)
    return_blocks(os.environ)
    from .. import batch_invariant
    from ..service.models import Models, load
    from ..service.service import Service
    from ..service.serving import bound_to, log_lines, serve
    from ..service.settings import Settings

    names = {field.name for field in dataclasses.fields(Settings)} | {"api_key_file"}
    given = {name: value for name, value in vars(args).items() if name in names}
    if given["cors_allow_origin"] is not None:
        given["cors_allow_origin"] = tuple(given["cors_allow_origin"])
    settings = Settings.read(given)
    sockets = bound_to(settings.host, settings.port)
    beside = [] if settings.prometheus_port is None else bound_to(settings.host, settings.prometheus_port)
    batch_invariant(settings.batch_invariant)
    environment = os.environ
    sources = args.models or [environment.get("MODEL_ID") or f"all-MiniLM-L6-v2={default_model()}"]
    named = [_named(source) for source in sources]
    if environment.get("SERVED_MODEL_NAME") and not args.models:
        named = [(environment["SERVED_MODEL_NAME"], named[0][1])]
    models = Models([load(name, source, settings) for name, source in named])
    log_lines(args.log_level)
    where = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.port}"
    print(f"fastbert: {', '.join(models.by_name)} on {where} ({where}/ in a browser)", file=sys.stderr, flush=True)
    gc.freeze()  # a collection of all garbage would visit torch's objects too, for 0.13 s in which nothing is answered
    return serve(Service(settings, models), sockets, beside)


def spin_shortly(environment: MutableMapping[str, str]) -> None:
    """Sets SPINS, unless the environment says how OpenMP's threads wait. It is read when torch is imported."""
    if "GOMP_SPINCOUNT" not in environment and "OMP_WAIT_POLICY" not in environment:
        environment["GOMP_SPINCOUNT"] = SPINS


def return_blocks(environment: Mapping[str, str]) -> None:
    """Sets LARGE_BLOCK where the C library is glibc, unless the environment sets that size."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt") and "MALLOC_MMAP_THRESHOLD_" not in environment:
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, MOST_AT_THE_TOP)


def _named(source: str) -> tuple[str, str]:
    """(name, folder or hub id). By default the name is the last part of a folder's path."""
    name, equals, rest = source.partition("=")
    if equals and name and "/" not in name:
        return name, rest
    return (Path(source).resolve().name if Path(source).exists() else source), source
