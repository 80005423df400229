"""`fastbert serve`: models over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path

from .options import DTYPES, IMPLS, POOLINGS, UsageError, default_model, positive

ORDER = 6
SUMMARY = "answer requests over HTTP: vectors, scores, labels, entities, answers, filled words"
LIBRARIES = ("starlette", "uvicorn", "orjson", "prometheus_client")

DESCRIPTION = """\
Serve one model or several over HTTP, on packed batches that contain no padding whoever asks together.

A MODEL is a folder or a hub id: of an encoder; of a reranker or classifier, a tagger of words or a finder of answers,
from transformers or 'fastbert finetune'; or of a BERT with its head for masked words. NAME=MODEL gives it a name, which
requests put into "model". Without MODEL it is all-MiniLM-L6-v2. The first MODEL answers requests that name none.

  OpenAI's clients           POST /v1/embeddings, GET /v1/models; base_url is http://HOST:PORT/v1
  text-embeddings-inference  POST /embed /embed_all /predict /rerank /similarity /tokenize /decode, GET /info
  Cohere's, Jina's           POST /v1/rerank /v2/rerank /v1/embed /v2/embed
  the hub's InferenceClient  POST / and /models/NAME
  entities, answers, masks   POST /token_classify /question_answer /fill_mask
  for machines               GET /live /ready /health /metrics /openapi.json; for people: GET /

Texts longer than a model's limit are cut, usage counts what is left, and the header x-truncated-texts says how many
texts were cut; {"truncate": false} in a request refuses to cut. A request that finds the queue full is answered 429
at once, with Retry-After. SIGTERM stops the server after what it has accepted is answered.

A key comes from the environment's API_KEY, or from a file (--api-key-file, or the environment's API_KEY_FILE); requests
then need 'Authorization: Bearer KEY'. Of text-embeddings-inference's variables these are read where a flag is not
given: MODEL_ID, SERVED_MODEL_NAME, PORT, DTYPE, POOLING, MAX_CONCURRENT_REQUESTS, MAX_BATCH_TOKENS,
MAX_CLIENT_BATCH_SIZE, AUTO_TRUNCATE, DEFAULT_PROMPT_NAME, PAYLOAD_LIMIT, PROMETHEUS_PORT, CORS_ALLOW_ORIGIN."""

EXAMPLES = """\
examples:
  fastbert serve                                        MiniLM on http://127.0.0.1:8080
  curl -s http://127.0.0.1:8080/embed -H 'content-type: application/json' -d '{"inputs": "a text"}'
  fastbert serve BAAI/bge-small-en-v1.5 --port 9000 --dtype float32
  fastbert serve texts=intfloat/e5-small-v2 ranks=cross-encoder/ms-marco-MiniLM-L6-v2 ner=my-tagger
  API_KEY=secret fastbert serve --host 0.0.0.0 --max-text-tokens 256"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.description, p.epilog = DESCRIPTION, EXAMPLES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("models", metavar="MODEL", nargs="*", help="a folder or hub id, or NAME=MODEL (default: MiniLM)")
    p.add_argument("--host", help="the address to listen on; 0.0.0.0 for all (default: 127.0.0.1, this machine alone)")
    p.add_argument("--port", type=positive, metavar="N", help="default: 8080")
    p.add_argument("--prometheus-port", type=positive, metavar="N", help="serve /metrics there and not on --port")
    p.add_argument("--dtype", choices=DTYPES, help="precision of the models (default: auto, by device)")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--impl", choices=IMPLS, help="who computes the operators (default: the fastest)")
    p.add_argument("--pooling", choices=POOLINGS, metavar="MODE", help="of encoders (default: what the model says)")
    p.add_argument("--default-prompt-name", metavar="NAME", help="the prompt of requests that name none")
    p.add_argument(
        "--batch-invariant", action="store_true", default=None,
        help="the same bits for a text whatever it shares a batch with; somewhat slower",
    )  # fmt: skip
    limits = p.add_argument_group("limits")
    limits.add_argument(
        "--max-batch-tokens", type=positive, metavar="N", help="tokens computed at once (default: by device)"
    )
    limits.add_argument(
        "--max-queue-tokens", type=positive, metavar="N", help="tokens that may wait for a model (default: 524,288)"
    )
    limits.add_argument(
        "--max-concurrent-requests", type=positive, metavar="N", help="requests open at once (default: 512)"
    )
    limits.add_argument("--max-client-batch-size", type=positive, metavar="N", help="texts a request (default: 4,096)")
    limits.add_argument("--max-text-tokens", type=positive, metavar="N", help="tokens a text (default: the model's)")
    limits.add_argument("--payload-limit", type=positive, metavar="BYTES", help="of a request (default: 16 MiB)")
    limits.add_argument(
        "--timeout", type=positive, metavar="SECONDS",
        help="within which a request is answered, or told that it is late (default: 120); the header x-timeout-seconds "
        "asks for less",
    )  # fmt: skip
    limits.add_argument(
        "--auto-truncate", action=argparse.BooleanOptionalAction,
        help="cut texts that are too long where a request does not say (default: yes)",
    )  # fmt: skip
    p.add_argument("--api-key-file", metavar="FILE", help="with the key that requests must have")
    p.add_argument(
        "--cors-allow-origin", metavar="ORIGIN", action="append", help="a page's origin that may ask; may be repeated"
    )
    p.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info",
        help="of the JSON lines on standard error; debug: one for each request, without its texts (default: info)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        raise UsageError(f"fastbert serve needs {', '.join(missing)}: pip install {' '.join(missing)}")
    import os

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
    return serve(Service(settings, models), sockets, beside)


def _named(source: str) -> tuple[str, str]:
    """(name, folder or id); a folder's name is its last part."""
    name, equals, rest = source.partition("=")
    if equals and name and "/" not in name:
        return name, rest
    return (Path(source).resolve().name if Path(source).exists() else source), source
