"""Errors for clients. Each face (API) has its own form of them."""

from __future__ import annotations

import math

# kind -> (status for OpenAI's and Cohere's clients, status and error_type of text-embeddings-inference)
KINDS: dict[str, tuple[int, int, str]] = {
    "invalid": (400, 422, "Validation"),
    "not_json": (400, 400, "Validation"),
    "empty": (400, 400, "Empty"),
    "too_large": (413, 413, "Validation"),
    "tokenizer": (400, 422, "Tokenizer"),
    "unable": (400, 424, "Backend"),  # the model has no such head
    "encoded": (415, 415, "Validation"),  # compressed
    "unauthorized": (401, 401, "Unauthorized"),
    "no_model": (404, 404, "Validation"),
    "no_path": (404, 404, "Validation"),
    "no_method": (405, 405, "Validation"),
    "overloaded": (429, 429, "Overloaded"),
    "failed": (500, 500, "Backend"),
    "not_ready": (503, 503, "Unhealthy"),
    "late": (504, 504, "Overloaded"),
}
# kind -> OpenAI's type; all other kinds are invalid_request_error.
OPENAI_TYPES = {"unauthorized": "authentication_error", "overloaded": "rate_limit_error", "failed": "server_error",
                "not_ready": "server_error", "late": "server_error"}  # fmt: skip
LONGEST_WAIT = 59  # most seconds of Retry-After: OpenAI's client sleeps for 60 or more without a message


class ServiceError(Exception):
    """The error of a request.

    Args:
        kind: one of KINDS.
        message: one line for the client, without any of its texts.
        param: the field with the error.
        code: a name of the error for programs.
        retry_after: in seconds; for "overloaded" and "not_ready".
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.kind, self.message, self.param, self.code = kind, message, param, code
        self.retry_after = None if retry_after is None else min(max(math.ceil(retry_after), 1), LONGEST_WAIT)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Retry-After in whole seconds, how to authenticate, and which encoding of bodies is read."""
        if self.kind == "unauthorized":
            return [(b"www-authenticate", b"Bearer")]
        if self.kind == "encoded":
            return [(b"accept-encoding", b"identity")]
        return [] if self.retry_after is None else [(b"retry-after", b"%d" % self.retry_after)]


def openai_form(error: ServiceError) -> tuple[int, dict]:
    """OpenAI's form: an object under "error". langchain's class for Jina shows "detail"."""
    body = {"message": error.message, "type": OPENAI_TYPES.get(error.kind, "invalid_request_error"),
            "param": error.param, "code": error.code or error.kind}  # fmt: skip
    return KINDS[error.kind][0], {"error": body, "detail": error.message}


def tei_form(error: ServiceError) -> tuple[int, dict]:
    """text-embeddings-inference's form: an object with error and error_type."""
    _, status, error_type = KINDS[error.kind]
    return status, {"error": error.message, "error_type": error_type}


def ollama_form(error: ServiceError) -> tuple[int, dict]:
    """Ollama's form: an object with error."""
    return KINDS[error.kind][0], {"error": error.message}


def cohere_form(error: ServiceError) -> tuple[int, dict]:
    """Cohere's form, whose clients show "message", and Jina's, whose clients show "detail"."""
    return KINDS[error.kind][0], {"message": error.message, "detail": error.message}
