"""Commands on a host of rank above 0: its devices follow, and nothing else is started."""

import sys
import types

import pytest

from jpaged import EngineConfig, cli, multihost

HOSTS = ("--nnodes", "2", "--tensor-parallel-size", "4", "--master-addr", "10.0.0.4")


@pytest.fixture
def followed(monkeypatch):
    """The configs that were followed."""
    found = []
    monkeypatch.setattr(multihost, "follow", found.append)
    return found


@pytest.mark.parametrize(
    ("command", "others"),
    [
        (["serve", "some/model", "--port", "9"], {"model": "some/model"}),
        (["generate", "-m", "some/model", "hi", "--temperature", "0"], {"model": "some/model"}),
        (["chat"], {}),
        (["compile"], {}),
        (["run-batch", "-i", "in", "-o", "out", "--max-num-seqs", "7"], {"max_num_seqs": 7}),
    ],
)
def test_the_same_command_follows(command, others, followed, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert cli.main([*command, *HOSTS, "--node-rank", "1", "--master-port", "4000"]) == 0
    assert followed == [
        EngineConfig(
            nnodes=2,
            node_rank=1,
            master_addr="10.0.0.4",
            master_port=4000,
            tensor_parallel_size=4,
            **others,
        )
    ]


def test_a_tpu_vm_follows_by_its_number(followed, monkeypatch):
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert cli.main(["serve", "--nnodes", "2", "--tensor-parallel-size", "8"]) == 0
    assert [config.node_rank for config in followed] == [None]


def test_the_leader_serves(followed, monkeypatch):
    served = []
    module = types.ModuleType("jpaged.serving.server")
    module.run_server = lambda options, _: served.append(options) or 3  # pyright: ignore
    monkeypatch.setitem(sys.modules, "jpaged.serving.server", module)
    assert cli.main(["serve", *HOSTS, "--node-rank", "0"]) == 3
    assert (served[0]["nnodes"], served[0]["node_rank"], followed) == (2, 0, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nnodes", "0"], "nnodes must be an integer of at least 1, got 0"),
        (["--node-rank", "1"], "node_rank needs nnodes above 1, got 1"),
        ([*HOSTS, "--node-rank", "2"], "node_rank must be in [0, nnodes - 1 = 1], got 2"),
        ([*HOSTS], "node_rank and master_addr must be given both or, on TPU VMs, neither"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, followed, capsys):
    assert cli.main(["generate", "hi", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("jpaged: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not followed
