"""Names of machines and what they stand for."""

import pytest

from jpaged.plan.targets import DEFAULT_TARGETS, DEVICES, known_targets, parse_target, siblings


@pytest.mark.parametrize(
    ("name", "num_devices", "num_chips", "num_hosts", "topology", "accelerator"),
    [
        ("v5e-1", 1, 1, 1, "v5e:1x1", "v5litepod-1"),
        ("v5e-8", 8, 8, 1, "v5e:2x4", "v5litepod-8"),
        ("v6e-16", 16, 16, 4, "v6e:4x4", "v6e-16"),
        ("v5e-32", 32, 32, 8, "v5e:4x8", "v5litepod-32"),
        ("v5p-8", 4, 4, 1, "v5p:2x2x1", "v5p-8"),
        ("tpu7x-8", 8, 4, 1, "tpu7x:2x2x1", "tpu7x-8"),
        ("v5p:4x4x4", 64, 64, 16, "v5p:4x4x4", "v5p-128"),
        ("TPU7X:2x2x2", 16, 8, 2, "tpu7x:2x2x2", "tpu7x-16"),
    ],
)
def test_names_are_googles(name, num_devices, num_chips, num_hosts, topology, accelerator):
    target = parse_target(name)
    assert target.name == name
    assert (target.num_devices, target.num_chips) == (num_devices, num_chips)
    assert target.num_hosts == num_hosts
    assert (target.topology_name, target.accelerator_type) == (topology, accelerator)


@pytest.mark.parametrize(
    ("name", "kind", "num_devices"),
    [
        ("h200", "h200", 1),
        ("h200-8", "h200", 8),
        ("a100-40", "a100-40", 1),
        ("a100-80-2", "a100-80", 2),
    ],
)
def test_gpus_come_one_by_one_or_with_their_number(name, kind, num_devices):
    target = parse_target(name)
    assert (target.kind, target.num_devices) == (kind, num_devices)


@pytest.mark.parametrize(
    "name", ["v7-8", "v5e-3", "h200-9", "a100", "", "v5p-4", "tpu", "h200:2x2"]
)
def test_an_unknown_name_is_answered_with_those_there_are(name):
    with pytest.raises(ValueError, match="unknown target") as info:
        parse_target(name)
    for kind in DEVICES:
        assert kind in str(info.value)
    assert known_targets() in str(info.value)


def test_an_unknown_topology_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="must be one of 1x1, 2x2, 2x4"):
        parse_target("v6e:3x3")


def test_default_targets_exist():
    assert [parse_target(name).name for name in DEFAULT_TARGETS] == list(DEFAULT_TARGETS)


@pytest.mark.parametrize("name", ["v6e-8", "h200"])
def test_siblings_grow_and_exist(name):
    sizes = [parse_target(sibling).num_devices for sibling in siblings(parse_target(name))]
    assert sizes == sorted(set(sizes))
    assert parse_target(name).num_devices in sizes
