"""Fixtures for the tests of `fastbert serve`: small models, and servers of them."""

import time

import pytest

from fastbert import Encoder
from fastbert.service.app import application
from fastbert.service.models import Models, load
from fastbert.service.service import Service
from fastbert.service.settings import Settings
from service_models import CLASSES, PLAIN, Client, Process, make_folder

OF_MODELS = ("max_text_tokens", "max_batch_tokens", "default_prompt_name", "default_prompt")  # settings


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return {kind: make_folder(tmp_path_factory.mktemp(kind), kind) for kind in CLASSES}


@pytest.fixture(scope="module")
def served(folders):
    """serve(*kinds, **settings): a client of a server of these models; the first model is the server's default."""
    clients, loaded = [], {}

    def serve(*kinds, **changes):
        settings = Settings(**PLAIN | changes)
        own = {k: v for k, v in changes.items() if k in OF_MODELS}
        models = []
        for kind in kinds:
            key = (kind, tuple(sorted(own.items())))
            if key not in loaded:
                loaded[key] = load(kind, folders[kind], settings)
            models.append(loaded[key])
        service = Service(settings, Models(models))
        clients.append(Client(application(service)))
        clients[-1].service = service
        while not (service.is_warm or service.failure):
            time.sleep(0.001)
        return clients[-1]

    yield serve
    for client in clients:
        client.close()


@pytest.fixture(scope="module")
def client(served):
    return served(*CLASSES)


@pytest.fixture(scope="module")
def encoder(folders):
    return Encoder.from_pretrained(folders["texts"], **PLAIN)


@pytest.fixture
def server(tmp_path):
    """`fastbert serve` of one model, as a process."""
    process = Process(f"texts={make_folder(tmp_path / 'texts', 'texts')}")
    yield process
    process.end()
