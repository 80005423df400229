"""Calls of the tokenizers library, with readable errors, and interruptible by signals."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

# Characters from which on a call is made interruptible. The library takes a second for a few million characters, and
# Python handles no signal in the calling thread until the library returns.
LONG_CALL = 1_000_000


def encoded(encode_batch: Callable[..., list], inputs: list, **options: Any) -> list:
    """encode_batch(inputs, **options), with readable errors. It runs outside the GIL, on all cores."""
    try:
        characters = sum(len(item) if isinstance(item, str) else len(item[0]) + len(item[1]) for item in inputs)
        if characters > LONG_CALL and threading.current_thread() is threading.main_thread():
            return _beside(encode_batch, inputs, options).result()
        return encode_batch(inputs, **options)
    except (TypeError, UnicodeEncodeError):  # all inputs are str, so one of them cannot be encoded as UTF-8
        for i, item in enumerate(inputs):
            for text in (item,) if isinstance(item, str) else item:
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    code = ord(text[error.start])
                    raise ValueError(
                        f"text {i} is not valid Unicode: lone surrogate U+{code:04X} at character {error.start}"
                    ) from None
        raise
    except BaseException as error:
        # A panic of the library is no Exception. Its message may have some of the text in it.
        if type(error).__name__ == "PanicException":
            raise ValueError("the tokenizers library failed on a text") from error
        if not isinstance(error, Exception) or "runcation" not in str(error):
            raise
        raise ValueError(f"cannot truncate: {error}") from error  # the library raises plain Exception


def _beside(encode_batch: Callable[..., list], inputs: list, options: dict[str, Any]) -> Future[list]:
    """encode_batch(inputs, **options) in another thread, while the main thread waits and handles signals.

    Ctrl-C and SIGTERM then end the wait at once; the result of the call is dropped.
    """
    future: Future[list] = Future()
    threading.Thread(
        target=settle, args=(future, encode_batch, inputs), kwargs=options, daemon=True, name="tokenising a long text"
    ).start()
    return future


def settle(future: Future, function: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Gives the future the result of function(*args, **options), or what that raises."""
    try:
        future.set_result(function(*args, **options))
    except BaseException as error:
        future.set_exception(error)
    finally:
        # The future holds the error, which holds this frame. If the frame held the future, all three and the texts
        # would stay in memory until Python collects garbage.
        del future
