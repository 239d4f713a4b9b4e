import fake_engine
import pytest
from starlette.testclient import TestClient

from jpaged.serving.app import create_app
from jpaged.serving.settings import ServerSettings


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return fake_engine.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine(tokenizer):
    return fake_engine.FakeEngine(tokenizer)


@pytest.fixture
def make_client(engine):
    """Makes clients of apps with other settings; all use the same engine."""
    open_clients = []

    def make(**settings):
        client = TestClient(create_app(engine, ServerSettings(**settings)))
        open_clients.append(client.__enter__())
        return client

    yield make
    for client in open_clients:
        client.__exit__(None, None, None)


@pytest.fixture
def client(make_client):
    return make_client()
