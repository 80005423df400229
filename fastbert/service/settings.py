"""Settings of `fastbert serve`, from flags and from environment variables, which are text-embeddings-inference's where
they mean the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# field -> (environment variables, of which the first one set counts; how its text is parsed)
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def _flag(text: str) -> bool:
    if text.lower() not in (*_TRUE, *_FALSE):
        raise ValueError(f"expected true or false, got {text!r}")
    return text.lower() in _TRUE


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"expected a whole number from 1 up, got {text!r}")
    return int(text)


VARIABLES: dict[str, tuple[str, Any]] = {
    "port": ("PORT", _count),
    "dtype": ("DTYPE", str),
    "pooling": ("POOLING", lambda text: {"last-token": "lasttoken"}.get(text, text)),
    "max_concurrent_requests": ("MAX_CONCURRENT_REQUESTS", _count),
    "max_batch_tokens": ("MAX_BATCH_TOKENS", _count),
    "max_client_batch_size": ("MAX_CLIENT_BATCH_SIZE", _count),
    "auto_truncate": ("AUTO_TRUNCATE", _flag),
    "default_prompt_name": ("DEFAULT_PROMPT_NAME", str),
    "default_prompt": ("DEFAULT_PROMPT", str),
    "payload_limit": ("PAYLOAD_LIMIT", _count),
    "prometheus_port": ("PROMETHEUS_PORT", _count),
    "cors_allow_origin": ("CORS_ALLOW_ORIGIN", lambda text: tuple(part.strip() for part in text.split(","))),
}


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        host, port: the address to listen on.
        prometheus_port: separate port for /metrics; None serves it on `port`.
        dtype, device, impl, pooling: for every model, as in `Encoder.from_pretrained`.
        max_batch_tokens: most tokens computed at once; None for the device's default.
        max_queue_tokens: most tokens that may wait for each model.
        max_concurrent_requests: most open requests.
        max_client_batch_size: most texts of a request.
        max_text_tokens: most tokens of a text, longer texts are cut; None for the model's own limit.
        payload_limit: most bytes of a request's body.
        timeout: seconds after which a request fails as too late.
        auto_truncate: whether too long texts are cut if the request does not say.
        default_prompt_name, default_prompt: prompt of requests that name none, by its name or as a text.
        batch_invariant: whether a text's bits are the same in any batch.
        api_key: key that requests must carry; None for none.
        cors_allow_origin: origins of web pages that may send requests; empty for none.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    prometheus_port: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    impl: str | None = None
    pooling: str | None = None
    max_batch_tokens: int | None = None
    max_queue_tokens: int = 524_288
    max_concurrent_requests: int = 512
    max_client_batch_size: int = 4096
    max_text_tokens: int | None = None
    payload_limit: int = 16_777_216
    timeout: float = 120.0
    auto_truncate: bool = True
    default_prompt_name: str | None = None
    default_prompt: str | None = None
    batch_invariant: bool = False
    api_key: str | None = None
    cors_allow_origin: tuple[str, ...] = ()

    @classmethod
    def read(cls, given: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Settings:
        """Settings from flags and environment variables. given: the flags by the names above, None for a flag that was
        not given. Flags override variables.

        The key is in API_KEY, or in the file that `api_key_file` or API_KEY_FILE names.

        Raises: ValueError, which names the variable or the file.
        """
        values = {name: value for name, value in given.items() if value is not None}
        file = values.pop("api_key_file", None) or environment.get("API_KEY_FILE")
        for name, (variable, read) in VARIABLES.items():
            if name not in values and environment.get(variable):
                try:
                    values[name] = read(environment[variable])
                except ValueError as error:
                    raise ValueError(f"the environment variable {variable}: {error}") from None
        key = Path(file).read_text(encoding="utf-8").strip() if file else environment.get("API_KEY")
        if file and not key:
            raise ValueError(f"{file} has no key in it")
        for name in ("port", "prometheus_port"):
            if values.get(name) is not None and values[name] > 65_535:
                raise ValueError(f"{name} must be from 1 to 65535, got {values[name]}")
        if {"default_prompt", "default_prompt_name"} <= values.keys():
            raise ValueError("give default_prompt or default_prompt_name, not both")
        if values.get("prometheus_port") == values.get("port", cls.port):
            raise ValueError(f"prometheus_port must differ from port, which is {values['prometheus_port']}")
        return cls(**values, api_key=key or None)
