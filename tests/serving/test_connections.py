"""Clients that leave, are slow, send too much, or have no key."""

import asyncio
import json
import logging

import asgi
import pytest
import sse

from jpaged.serving.app import create_app
from jpaged.serving.settings import ServerSettings
from jpaged.serving.streaming import KEEP_ALIVE

JSON = {"Content-Type": "application/json"}
BODIES = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
}
TIMEOUT_S = 30  # never waited for unless a test fails


@pytest.fixture
def run(engine):
    """Runs `test(make)`, where `make(path, **settings)` starts a request of one's own."""

    def run(test):
        def make(path="/v1/completions", headers=JSON, **settings):
            app = create_app(engine, ServerSettings(**settings))
            exchange = asgi.Exchange(app, "POST", path, headers)
            exchange.start()
            return exchange

        async def limited():
            async with asyncio.timeout(TIMEOUT_S):
                await test(make)

        asyncio.run(limited())

    return run


def body_of(path, **fields):
    return json.dumps(BODIES[path] | fields).encode()


@pytest.mark.parametrize("path", BODIES)
def test_client_that_leaves_a_stream_ends_its_request(run, engine, path):
    async def test(make):
        engine.hold = asyncio.Event()
        exchange = make(path)
        exchange.feed(body_of(path, stream=True))
        await exchange.until(lambda: b"Hel" in exchange.body)
        exchange.leave()
        await exchange.ended()
        assert engine.asked[0].was_cut
        assert not engine.asked[0].is_open
        assert not exchange.is_complete

    run(test)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"prompt": ["a", "b", "c"]}])
def test_client_that_leaves_before_the_answer_ends_its_requests(run, engine, fields):
    async def test(make):
        engine.hold = asyncio.Event()
        engine.pieces = ["", *engine.pieces]  # nothing can be told of the first token
        exchange = make()
        exchange.feed(body_of("/v1/completions", **fields))
        while not engine.asked:
            await asyncio.sleep(0)
        exchange.leave()
        await exchange.ended()
        assert all(asked.was_cut and not asked.is_open for asked in engine.asked)
        assert exchange.body == b""

    run(test)


def test_client_that_leaves_within_its_body_is_forgotten(run, engine, caplog):
    async def test(make):
        exchange = make()
        exchange.feed(b'{"prompt"', more=True)
        exchange.leave()
        await exchange.ended()
        assert not engine.asked
        assert not exchange.body

    with caplog.at_level(logging.INFO):
        run(test)
    assert " 499 " in caplog.text
    assert "Traceback" not in caplog.text


def test_open_requests_are_counted(run, engine):
    async def test(make):
        engine.hold = asyncio.Event()
        exchange = make()
        exchange.feed(body_of("/v1/completions", stream=True))
        await exchange.until(lambda: b"Hel" in exchange.body)
        load = asgi.Exchange(exchange.app, "GET", "/load", {})
        load.feed(b"")
        load.start()
        await load.ended()
        assert json.loads(load.body) == {"server_load": 1}
        engine.hold.set()
        await exchange.ended()

    run(test)


def test_silence_is_filled_with_comments(run, engine):
    async def test(make):
        engine.hold = asyncio.Event()
        exchange = make(sse_keep_alive_interval_s=0.01)
        exchange.feed(body_of("/v1/completions", stream=True))
        await exchange.until(lambda: exchange.body.count(KEEP_ALIVE) >= 3)
        engine.hold.set()
        await exchange.ended()
        texts = [e["choices"][0]["text"] for e in sse.parse(exchange.body, comments=True)]
        assert "".join(texts) == "Hello wörld!"

    run(test)


def test_comments_come_while_a_request_waits_for_its_first_token(run, engine):
    async def test(make):
        engine.hold = asyncio.Event()
        engine.pieces = ["", *engine.pieces]
        exchange = make(sse_keep_alive_interval_s=0.01)
        exchange.feed(body_of("/v1/completions", stream=True))
        await exchange.until(lambda: KEEP_ALIVE in exchange.body)
        assert exchange.status == 200
        engine.hold.set()
        await exchange.ended()
        assert sse.parse(exchange.body, comments=True)

    run(test)


def test_client_that_does_not_read_ends_its_request(run, engine):
    async def test(make):
        exchange = make(write_timeout_s=0.05)
        engine.hold = asyncio.Event()
        exchange.feed(body_of("/v1/completions", stream=True))
        await exchange.until(lambda: b"Hel" in exchange.body)
        exchange.can_send.clear()
        engine.hold.set()
        await exchange.ended()
        assert engine.asked[0].was_cut
        assert not exchange.is_complete

    run(test)


def test_slow_body_is_answered_408(run, engine):
    async def test(make):
        exchange = make(body_timeout_s=0.05)
        exchange.feed(b'{"prompt": ', more=True)
        await exchange.ended()
        assert exchange.status == 408
        assert exchange.headers["connection"] == "close"
        assert json.loads(exchange.body)["error"]["code"] == "request_timeout"

    run(test)


def test_large_body_is_answered_413_before_it_is_read(run, engine):
    async def test(make):
        told = make(max_body_bytes=1024, headers=JSON | {"Content-Length": "1025"})
        await told.ended()  # nothing was sent
        chunked = make(max_body_bytes=1024)
        chunked.feed(b"x" * 1000, more=True)
        chunked.feed(b"x" * 1000, more=True)
        await chunked.ended()
        for exchange in (told, chunked):
            assert exchange.status == 413
            assert exchange.headers["connection"] == "close"

    run(test)


def test_other_content_is_answered_415(client):
    for headers in (
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        JSON | {"Content-Encoding": "gzip"},
    ):
        answer = client.post("/v1/completions", content=b'{"prompt": "a"}', headers=headers)
        assert answer.status_code == 415, headers
    typed = {"Content-Type": "application/json; charset=utf-8"}
    answer = client.post("/v1/completions", content=b'{"prompt": "a"}', headers=typed)
    assert answer.status_code == 200


KEYS = ("first-key", "second-key")


@pytest.mark.parametrize("path", ["/", "/v1/models", "/metrics", "/docs", "/openapi.json", "/no"])
@pytest.mark.parametrize(
    "header",
    [
        *(
            None,
            "",
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            "first-key",
            "Bearer é",
            "Digest first-key",
        ),
        *("Basic", "Basic first-key", "Basic Zmlyc3Qta2V5", "Basic Og==", "Basic /w==", "Basic é"),
    ],
)
def test_wrong_key_is_401_everywhere(make_client, path, header):
    client = make_client(api_keys=KEYS)
    headers = {} if header is None else {"Authorization": header.encode()}
    answer = client.get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    challenge = answer.headers["WWW-Authenticate"]
    assert challenge.startswith("Basic realm=") if path == "/" else challenge == "Bearer"


def test_two_keys_at_once_are_none(make_client):
    client = make_client(api_keys=KEYS)
    both = [("Authorization", "Bearer first-key"), ("Authorization", "Bearer second-key")]
    assert client.get("/v1/models", headers=both).status_code == 401


@pytest.mark.parametrize("key", KEYS)
def test_any_right_key_opens(make_client, key):
    client = make_client(api_keys=KEYS)
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} {key}"}
        assert client.get("/v1/models", headers=headers).status_code == 200
        assert client.get("/no", headers=headers).status_code == 404


def test_a_browser_may_send_a_key_as_password(make_client):
    client = make_client(api_keys=KEYS)
    assert client.get("/v1/models", auth=("anybody", KEYS[1])).status_code == 200
    assert client.get("/v1/models", auth=(KEYS[1], "")).status_code == 401


def test_health_needs_no_key(make_client):
    client = make_client(api_keys=KEYS)
    assert client.get("/health").status_code == client.get("/ping").status_code == 200
    for path in ("/health/", "//health", "/health/../v1/models", "/Health"):
        assert client.get(path, follow_redirects=False).status_code in (401, 404), path


def test_fairness_is_by_key_or_else_by_address(engine, make_client):
    client = make_client(api_keys=KEYS)
    for key in (*KEYS, KEYS[0]):
        headers = {"Authorization": f"Bearer {key}"}
        assert client.post("/v1/completions", json={"prompt": "a"}, headers=headers).is_success
    first, second, again = (asked.fairness_key for asked in engine.asked)
    assert first == again != second
    assert not any(key in first for key in KEYS), "keys go no further"
    make_client().post("/v1/completions", json={"prompt": "a"})
    assert engine.asked[-1].fairness_key == "testclient"


def test_keys_under_a_root_path(engine):
    app = create_app(engine, ServerSettings(api_keys=KEYS))

    async def status(path):
        exchange = asgi.Exchange(app, "GET", path, {}, root_path="/api")
        exchange.start()
        await exchange.ended()
        return exchange.status

    assert asyncio.run(status("/api/health")) == 200
    assert asyncio.run(status("/api/v1/models")) == 401


def test_log_names_requests_but_not_their_text(make_client, caplog):
    caplog.set_level(logging.DEBUG)
    fields = {"prompt": "a secret", "request_id": "mine"}
    make_client().post("/v1/completions", json=fields)
    assert "mine POST /v1/completions 200" in caplog.text
    assert "secret" not in caplog.text
    caplog.clear()
    make_client(enable_log_requests=False).post("/v1/completions", json=fields)
    assert "mine" not in caplog.text
