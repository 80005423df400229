"""What a client is told when a request is not answered. Each face puts it into its own form."""

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
    "unauthorized": (401, 401, "Unauthorized"),
    "no_model": (404, 404, "Validation"),
    "no_path": (404, 404, "Validation"),
    "no_method": (405, 405, "Validation"),
    "overloaded": (429, 429, "Overloaded"),
    "failed": (500, 500, "Backend"),
    "not_ready": (503, 503, "Unhealthy"),
    "late": (504, 504, "Overloaded"),
}
# OpenAI's names of kinds; all others are invalid_request_error.
OPENAI_TYPES = {"unauthorized": "authentication_error", "overloaded": "rate_limit_error", "failed": "server_error",
                "not_ready": "server_error", "late": "server_error"}  # fmt: skip
LONGEST_WAIT = 59  # seconds: from 60 on OpenAI's client waits for as long as it is told, with no answer in sight


class ServiceError(Exception):
    """A request that is not answered.

    Args:
        kind: one of KINDS.
        message: one line for the client, without any of its texts.
        param: the field that is meant.
        code: a name for programs.
        retry_after: in seconds; of "overloaded" and "not_ready".
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
        """Retry-After in whole seconds, and how to authenticate."""
        if self.kind == "unauthorized":
            return [(b"www-authenticate", b"Bearer")]
        return [] if self.retry_after is None else [(b"retry-after", b"%d" % self.retry_after)]


def openai_form(error: ServiceError) -> tuple[int, dict]:
    """Nested under "error"; "detail" is what langchain's class for Jina shows."""
    body = {"message": error.message, "type": OPENAI_TYPES.get(error.kind, "invalid_request_error"),
            "param": error.param, "code": error.code or error.kind}  # fmt: skip
    return KINDS[error.kind][0], {"error": body, "detail": error.message}


def tei_form(error: ServiceError) -> tuple[int, dict]:
    """Flat, with an error_type."""
    _, status, error_type = KINDS[error.kind]
    return status, {"error": error.message, "error_type": error_type}


def cohere_form(error: ServiceError) -> tuple[int, dict]:
    """Cohere's clients show "message", Jina's "detail"."""
    return KINDS[error.kind][0], {"message": error.message, "detail": error.message}
