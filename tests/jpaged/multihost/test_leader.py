"""Hosts come together, or say what keeps them apart; and what the leader says, and hears."""

import atexit
import dataclasses
import socket
import threading
import time

import numpy as np
import pytest

from jpaged import EngineConfig
from jpaged.multihost import agreement, channel, follower, leader
from jpaged.multihost.leader import Leader
from jpaged.multihost.location import Location

TIMEOUT_S = 60  # never waited for unless a test fails


@pytest.fixture
def location():
    with socket.create_server(("127.0.0.1", 0)) as one:
        return Location(0, "127.0.0.1", one.getsockname()[1])


@pytest.fixture(autouse=True)
def ends(monkeypatch):
    """How often a process would have been ended."""
    found = []
    monkeypatch.setattr(agreement, "end_process_soon", lambda *_: found.append(1))
    return found


def _config(num_hosts=2, **options):
    return EngineConfig(nnodes=num_hosts, tensor_parallel_size=num_hosts, **options)


def _in_thread(call, *args):
    """Starts a call; what it came to is told by the function returned."""
    found = []

    def run():
        try:
            found.append(call(*args))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result():
        thread.join(TIMEOUT_S)
        assert found, "it still runs"
        return found[0]

    return result


def _hello(location, rank, **others):
    """A host's first message, with other facts than the leader's where named."""
    connection = socket.create_connection((location.leader, location.port), TIMEOUT_S)
    facts = agreement.facts(_config()) | others
    connection.sendall(channel.encode("hello", rank, list(facts.items())))
    return connection


def _connected(location, rank, **others):
    ends_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return _hello(location, rank, **others)
        except ConnectionRefusedError:
            assert time.monotonic() < ends_s
            time.sleep(0.01)


@pytest.fixture
def together(location):
    """A leader, and the end of the connection that its one follower has."""
    starting = _in_thread(Leader, _config(), location)
    connection = _connected(location, 1)
    found = starting()
    assert isinstance(found, Leader), found
    with connection:
        assert channel.receive(connection)[0] == "welcome"
        yield found, connection
    _forget(found)


def _forget(found):
    """Waits until a leader has noticed that its followers are gone."""
    atexit.unregister(found._at_exit)
    for other in found._followers:
        other._receiver.join(TIMEOUT_S)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"block_size": 32},
            "block_size must be the same on all hosts, got 16 on the host of rank",
        ),
        ({"max_model_len": 9}, "max_model_len must be the same on all hosts, got None on"),
        ({"dtype": "bfloat16"}, "dtype must be the same on all hosts, got 'auto' on"),
    ],
)
def test_other_options_are_refused_on_both_sides(options, text, location):
    starting = _in_thread(Leader, _config(), location)
    with pytest.raises(ValueError, match=text):
        follower._Following(_config(**options), dataclasses.replace(location, rank=1))
    assert text in str(starting())


def test_another_version_is_refused(location):
    starting = _in_thread(Leader, _config(), location)
    with _connected(location, 1, version="0.0.0") as connection:
        call, (text,) = channel.receive(connection)
    assert call == "failed"
    assert text.startswith("version must be the same on all hosts, got ")
    assert text.endswith("and '0.0.0' on that of rank 1")
    assert str(starting()) == text


def test_two_hosts_of_one_rank_are_refused(location):
    starting = _in_thread(Leader, _config(3), location)
    facts = agreement.facts(_config(3))
    with _connected(location, 1, **facts) as one, _connected(location, 1, **facts) as other:
        found = str(starting())
        assert found == "node_rank must differ on all hosts, got 1 twice"
        for connection in (one, other):
            assert channel.receive(connection) == ("failed", [found])


def test_hosts_that_do_not_come_are_named(location, monkeypatch):
    monkeypatch.setattr(leader, "JOIN_TIMEOUT_S", 0.2)
    with pytest.raises(RuntimeError, match=r"hosts of ranks \[1, 2\] have not come to 127.0.0.1"):
        Leader(_config(3), location)


def test_an_address_of_another_host_is_refused(location):
    with pytest.raises(ValueError, match="master_addr and master_port must be an address of the"):
        Leader(_config(), Location(0, "192.0.2.1", location.port))


def test_a_leader_that_is_not_there_is_an_error(location, monkeypatch):
    monkeypatch.setattr(follower, "JOIN_TIMEOUT_S", 0.1)
    with pytest.raises(RuntimeError, match=r"there is no host of rank 0 at 127\.0\.0\.1"):
        follower._Following(_config(), location)


def test_strangers_are_sent_away(location):
    starting = _in_thread(Leader, _config(), location)
    ends_s = time.monotonic() + TIMEOUT_S
    while True:
        try:
            with socket.create_connection((location.leader, location.port), TIMEOUT_S) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
                break
        except ConnectionRefusedError:
            assert time.monotonic() < ends_s
    with _connected(location, 1):
        found = starting()
        assert isinstance(found, Leader)
    _forget(found)


def test_calls_come_in_order_and_figures_by_rank(together):
    found, connection = together
    connection.sendall(channel.encode("figure", "num_blocks", 7))
    assert found.exchange("num_blocks", 9) == [9, 7]
    assert channel.receive(connection) == ("figures", ["num_blocks", [9, 7]])
    packed = np.arange(5, dtype=np.int32)
    found.tell("prepare", "decode_4")
    with found.together("run", "decode_4", packed):
        packed[:] = 0  # what was told is told
    with found.together("reset"):
        pass
    assert channel.receive(connection) == ("prepare", ["decode_4"])
    call, (name, array) = channel.receive(connection)
    assert (call, name, array.tolist()) == ("run", "decode_4", [0, 1, 2, 3, 4])
    assert channel.receive(connection) == ("reset", [])


class _Step:
    """What a step brings, when it is told to."""

    def __init__(self):
        self.done = threading.Event()

    def block_until_ready(self):
        assert self.done.wait(TIMEOUT_S)


class _FailingStep:
    def block_until_ready(self):
        raise ZeroDivisionError


def test_a_lost_host_ends_the_wait_for_a_step(together, ends):
    found, connection = together
    woken = threading.Event()
    found.on_lost(woken.set)
    step = _Step()
    waiting = _in_thread(found.wait, step)
    connection.close()
    assert str(waiting()) == "the host of rank 1 (127.0.0.1) is gone"
    assert woken.wait(TIMEOUT_S)
    assert found.is_lost
    assert ends == [1], "whatever else waits for the device"
    for call in (found.check, lambda: found.tell("reset")):
        with pytest.raises(RuntimeError, match="is gone"):
            call()
    step.done.set()


def test_a_step_that_is_there_is_waited_for_no_longer(together):
    found, _ = together
    step = _Step()
    waiting = _in_thread(found.wait, step)
    step.done.set()
    assert waiting() is None


def test_a_step_that_failed_ends_the_engine_unless_a_host_is_why(together, monkeypatch):
    monkeypatch.setattr(leader, "_EXPLANATION_S", 0.01)
    found, connection = together
    step = _FailingStep()
    with found.together("run"):
        found.wait(step)  # its error is for whoever reads it
    with pytest.raises(RuntimeError, match="a call that may have failed on some hosts has ended"):
        found.check()
    monkeypatch.setattr(leader, "_EXPLANATION_S", TIMEOUT_S)
    waiting = _in_thread(found.wait, step)
    connection.close()
    assert str(waiting()) == "the host of rank 1 (127.0.0.1) is gone"


def test_what_ended_a_host_is_told(together):
    found, connection = together
    connection.sendall(channel.encode("failed", "no memory"))
    answer = _in_thread(found.exchange, "num_blocks", 1)()
    assert str(answer) == "the host of rank 1 (127.0.0.1) has ended with an error: no memory"


def test_nothing_goes_on_after_a_call_that_was_cut_short(together):
    found, _ = together
    with pytest.raises(KeyboardInterrupt), found.together("run"):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="a call that may have failed on some hosts has ended"):
        found.check()


def test_an_engine_that_cannot_start_says_why(together):
    found, connection = together
    found.close(ValueError("model is not there"))
    assert channel.receive(connection) == ("failed", ["model is not there"])
