"""However many look at the pool, the engine is asked a few times a second."""

import types

import pytest

from jpaged.serving import system


@pytest.fixture
def looks(engine, monkeypatch):
    """Times at which the engine was asked; the clock is `looks.now`."""
    clock = types.SimpleNamespace(now=100.0, asked=[])

    async def pool_view():
        clock.asked.append(clock.now)
        return {"block_size": len(clock.asked)}

    monkeypatch.setattr(engine, "pool_view", pool_view)
    fake_time = types.SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(system, "time", fake_time)
    return clock


def test_one_look_serves_all_who_ask_meanwhile(looks, client):
    for _ in range(5):
        assert client.get("/pool").json() == {"block_size": 1}
    looks.now += system.POOL_MAX_AGE_S + 0.01
    assert client.get("/pool").json() == {"block_size": 2}
    assert len(looks.asked) == 2


def test_failed_look_is_not_kept(looks, client, engine, monkeypatch):
    async def fail():
        raise ValueError("not now")

    working = engine.pool_view
    monkeypatch.setattr(engine, "pool_view", fail)
    assert client.get("/pool").status_code == 400
    monkeypatch.setattr(engine, "pool_view", working)
    assert client.get("/pool").json() == {"block_size": 1}
