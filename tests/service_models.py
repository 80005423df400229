"""Small models of every kind, a server of them in the process of the tests, and a client that needs no socket."""

import asyncio
import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from fastbert import BertModel, Tokenizer
from fastbert.models import heads
from small_bert import LETTERS, save_bert

pytest.importorskip("orjson", reason="needs the serve extra")
pytest.importorskip("prometheus_client", reason="needs the serve extra")
pytest.importorskip("starlette", reason="needs the serve extra")

PATIENCE = 120  # seconds; a process that takes longer counts as hanging
WORDS = [*LETTERS, *(f"##{c}" for c in "abcde")]
LABELS = {
    "ranks": {0: "LABEL_0"}, "feelings": {0: "entailment", 1: "contradiction", 2: "neutral"},
    "names": {0: "O", 1: "B-PER", 2: "I-PER"}, "answers": {0: "LABEL_0", 1: "LABEL_1"},
}  # fmt: skip
CLASSES = {
    "texts": BertModel, "ranks": heads.BertForSequenceClassification, "feelings": heads.BertForSequenceClassification,
    "names": heads.BertForTokenClassification, "answers": heads.BertForQuestionAnswering,
    "masks": heads.BertForMaskedLM,
}  # fmt: skip

PLAIN = {"dtype": "float32", "device": "cpu", "impl": "native"}
TEXTS = ["a b c", "", "d e f g h", "ab", "the quick [MASK]", "x " * 200]


def make_folder(folder, kind):
    """A checkpoint of two small layers whose vocabulary is the letters."""
    named = {} if kind not in LABELS else {"id2label": LABELS[kind]}
    save_bert(folder, WORDS, CLASSES[kind], num_hidden_layers=2, initializer_range=0.5, **named)
    if kind == "texts":
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 32}')
        st = "sentence_transformers.models"
        modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        (folder / "modules.json").write_text(
            json.dumps(
                [{"idx": i, "name": str(i), "path": p, "type": f"{st}.{kind}"} for i, (p, kind) in enumerate(modules)]
            )
        )
        (folder / "config_sentence_transformers.json").write_text(
            json.dumps({"prompts": {"query": "q q ", "document": "d "}})
        )
    return folder


def close(found, wanted, tolerance=1e-5):
    return np.abs(np.asarray(found, np.float32) - np.asarray(wanted, np.float32)).max() < tolerance


def logits_of(folder, kind, texts, pairs=None):
    model = getattr(heads, CLASSES[kind].__name__).from_pretrained(folder, dtype=torch.float32, impl="native")
    rows = []
    for i, text in enumerate(texts):
        encoded = Tokenizer.from_pretrained(folder)([text], None if pairs is None else [pairs[i]], max_length=64)
        ids, types = torch.tensor(encoded.input_ids), torch.tensor(encoded.token_type_ids)
        with torch.no_grad():
            rows.append(model(ids, token_type_ids=types).logits[0].double())
    return torch.stack(rows)


class Reply:
    def __init__(self, status, headers, content):
        self.status, self.headers, self.content = status, headers, content

    def json(self):
        return json.loads(self.content)


class Client:
    """A client of an ASGI application, which runs on an event loop in a thread of its own."""

    def __init__(self, application):
        self.application = application
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.messages, self.sent = asyncio.Queue(), asyncio.Queue()
        self.lifespan = asyncio.run_coroutine_threadsafe(self._lifespan(), self.loop)
        self._tell("lifespan.startup")

    async def _lifespan(self):
        await self.application({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, self.messages.get,
                               self.sent.put)  # fmt: skip

    def _tell(self, kind):
        self.loop.call_soon_threadsafe(self.messages.put_nowait, {"type": kind})
        answer = asyncio.run_coroutine_threadsafe(self.sent.get(), self.loop).result(60)
        assert answer["type"] == f"{kind}.complete", answer

    def close(self):
        self._tell("lifespan.shutdown")
        self.lifespan.result(60)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def start(self, method, path, body=b"", headers=None, gone=None, more=False):
        """A future of the request's Reply, which is None if the server gave the request up. gone: an event after which
        the client is disconnected. more: the client never sends the rest of the body."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        return asyncio.run_coroutine_threadsafe(self._ask(method, path, body, headers or {}, gone, more), self.loop)

    async def _ask(self, method, path, body, headers, gone, more):
        sent, messages = [], [{"type": "http.request", "body": body, "more_body": more}]

        async def receive():
            if messages:
                return messages.pop(0)
            await (asyncio.Event() if gone is None else gone).wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "root_path": "", "scheme": "http", "query_string": b"", "server": ("test", 80),
            "client": ("test", 1), "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
        }  # fmt: skip
        await self.application(scope, receive, send)
        if not sent:
            return None
        assert [m["type"] for m in sent] == ["http.response.start"] + ["http.response.body"] * (len(sent) - 1)
        assert [m.get("more_body", False) for m in sent[1:]] == [True] * (len(sent) - 2) + [False]
        found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
        content = b"".join(m["body"] for m in sent[1:])
        assert int(found.get("content-length", len(content))) == len(content)
        return Reply(sent[0]["status"], found, content)

    def ask(self, method, path, body=b"", headers=None):
        return self.start(method, path, body, headers).result(60)

    def post(self, path, body, headers=None):
        return self.ask("POST", path, body, headers)

    def get(self, path):
        return self.ask("GET", path)


class Process:
    """`fastbert serve` of models (NAME=FOLDER) in float32 as a process, and requests to its sockets.

    start: what the interpreter runs. variables: of the environment, beside those of this process.
    """

    def __init__(self, *models, start=("-m", "fastbert"), **variables):
        with contextlib.closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, *start, "serve", *models, "--port", str(self.port)]
        command += ["--dtype", "float32", "--impl", "native", "--max-batch-tokens", "512"]
        environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", **variables}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if self.ask("GET", "/ready")[0] == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(self.end())

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def end(self):
        """Kills the process if it still runs, and returns its standard error."""
        self.process.kill()
        return self.process.communicate()[1]

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body))
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())

    def send(self, body, path="/embed"):
        """A connection on which a request has been sent."""
        content = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        connection.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (path.encode(), len(content)))
        connection.sendall(content)
        return connection

    def waiting(self):
        """The number of waiting requests that the server reports."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        counts = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return float(counts.get('te_request_count{method="embed"}', 0)), float(counts["te_queue_tokens"])
