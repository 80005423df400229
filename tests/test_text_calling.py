"""Long calls of the tokenizers library."""

import contextlib
import gc
import os
import signal
import threading
import weakref

import pytest

from fastbert.text import calling
from fastbert.text.tokenizer import Tokenizer

pytestmark = pytest.mark.once


@pytest.mark.parametrize("inputs", [["c" * calling.LONG_CALL, "d"], [("c" * calling.LONG_CALL, "d")]])
def test_signals_interrupt_the_tokenising_of_a_long_text(inputs):
    """The library tokenises a text in one call: with one word of 200 MB, SIGTERM and Ctrl-C had no effect for a minute.

    Tests in the background inherit an ignored SIGINT, so this test sets Python's handler.
    """
    over = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def encode_batch(inputs):
        assert threading.current_thread() is not threading.main_thread()
        os.kill(os.getpid(), signal.SIGINT)
        over.wait(60)

    try:
        with pytest.raises(KeyboardInterrupt):
            calling.encoded(encode_batch, inputs)
    finally:
        over.set()
        signal.signal(signal.SIGINT, before)


def test_a_long_call_has_the_results_of_a_short_one(monkeypatch):
    """The same result, and the library's errors in our words."""
    tokenizer = Tokenizer.from_words(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"], lowercase=True)
    short = tokenizer.input_ids(["a b a"])
    monkeypatch.setattr(calling, "LONG_CALL", 0)
    assert tokenizer.input_ids(["a b a"]) == short
    assert tokenizer(["a b a"]).input_ids == short
    with pytest.raises(ValueError, match=r"text 1 is not valid Unicode: lone surrogate U\+D800 at character 1"):
        tokenizer.input_ids(["a", "a\ud800"])


@pytest.mark.parametrize("is_long", [False, True])
def test_a_panic_of_the_library_is_an_error(is_long, monkeypatch):
    """It is no Exception, so that it ended the thread of a server in which it came."""

    class PanicException(BaseException):
        pass

    def encode_batch(inputs):
        raise PanicException("some of the text")

    if is_long:
        monkeypatch.setattr(calling, "LONG_CALL", 0)
    with pytest.raises(ValueError, match=r"^the tokenizers library failed on a text$"):
        calling.encoded(encode_batch, ["a"])


def test_an_error_does_not_keep_texts_in_memory(monkeypatch):
    """The error referred to frames, these to the future and that to the error, so the long texts stayed in memory."""

    class Texts(list):
        pass

    def encode_batch(inputs):
        raise OSError

    monkeypatch.setattr(calling, "LONG_CALL", 0)
    gc.disable()
    try:
        texts = Texts(["a"])
        kept = weakref.ref(texts)
        with contextlib.suppress(OSError):
            calling.encoded(encode_batch, texts)
        for thread in threading.enumerate():
            if thread.name == "tokenising a long text":
                thread.join()
        del texts
        assert kept() is None
    finally:
        gc.enable()
