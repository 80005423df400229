"""Fixtures of the tests of compression: a model that was fine-tuned, and examples for it."""

import pytest

from compression_models import table, tuned


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A folder as `fastbert finetune` writes it. No test changes this folder."""
    return tuned(tmp_path_factory.mktemp("made") / "teacher")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """40 labelled examples."""
    return table(tmp_path_factory.mktemp("data") / "train.tsv", 40)
