import dataclasses

import pytest

from jpaged import EngineConfig, platform

_TWO = {"nnodes": 2, "tensor_parallel_size": 2}


def test_defaults_are_valid_and_frozen():
    config = EngineConfig()
    assert (config.block_size, config.memory_utilization, config.policy) == (16, 0.9, "fcfs")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_format": "pickle"}, "load_format must be one of"),
        ({"dtype": "int8"}, r"dtype must be one of \('auto', .*got 'int8'"),
        ({"policy": "lifo"}, "policy must be one of .*got 'lifo'"),
        ({"block_size": 12}, r"block_size must be one of \(8, 16, 32, 64, 128\), got 12"),
        ({"compilation": "never"}, "compilation must be one of"),
        ({"kv_cache_dtype": "int8"}, r"kv_cache_dtype must be one of .*fp8.*, got 'int8'"),
        ({"max_model_len": 1}, "max_model_len must be an integer of at least 2, got 1"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1, got 0"),
        ({"max_num_seqs": 2.0}, r"max_num_seqs must be an integer of at least 1, got 2\.0"),
        ({"max_num_batched_tokens": True}, "max_num_batched_tokens must be an integer"),
        ({"num_blocks": 1}, "num_blocks must be an integer of at least 2, got 1"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes must be an integer of at least 1"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold must be an integer"),
        ({"max_logprobs": -2}, "max_logprobs must be an integer of at least -1, got -2"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"memory_utilization": 0.0}, r"memory_utilization must be in \(0, 1\], got 0.0"),
        ({"memory_utilization": 1.01}, r"memory_utilization must be in \(0, 1\], got 1.01"),
        ({"memory_utilization": float("nan")}, r"memory_utilization must be in \(0, 1\]"),
        ({"memory_utilization": "0.5"}, r"memory_utilization must be in \(0, 1\], got '0.5'"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching must be True or False, got 'no'"),
        ({"async_scheduling": None}, "async_scheduling must be True or False, got None"),
        ({"skip_tokenizer_init": 1}, "skip_tokenizer_init must be True or False, got 1"),
        ({"strict_compilation": 0}, "strict_compilation must be True or False, got 0"),
        ({"preemption_mode": "spill"}, "preemption_mode must be one of .*got 'spill'"),
        ({"host_cache": 1}, "host_cache must be True or False, got 1"),
        (
            {"host_cache": True, "enable_prefix_caching": False},
            "host_cache needs enable_prefix_caching=True",
        ),
        ({"nnodes": 0}, "nnodes must be an integer of at least 1, got 0"),
        ({"node_rank": 0}, "node_rank needs nnodes above 1, got 0"),
        ({"master_addr": "a"}, "master_addr needs nnodes above 1, got 'a'"),
        (_TWO | {"node_rank": 0}, "node_rank and master_addr must be given both or, on TPU VMs"),
        (_TWO | {"master_addr": "a"}, "neither, got node_rank=None, master_addr='a'"),
        (
            _TWO | {"node_rank": 2, "master_addr": "a"},
            r"node_rank must be in \[0, nnodes - 1 = 1\]",
        ),
        (_TWO | {"node_rank": -1, "master_addr": "a"}, "node_rank must be an integer of at least"),
        (_TWO | {"master_port": 65535}, r"master_port must be in \[1, 65534\], got 65535"),
        (_TWO | {"master_port": 0}, "master_port must be an integer of at least 1, got 0"),
        ({"nnodes": 2}, "tensor_parallel_size must be a multiple of nnodes=2, got 1"),
        ({"swap_space": 1.0}, 'swap_space needs preemption_mode="swap" or "auto", or host_cache'),
        ({"swap_space": 0}, "swap_space must be GiB in .0, the host's memory., got swap_space=0 w"),
        ({"swap_space": -1.0}, "swap_space must be GiB in"),
        ({"swap_space": float("nan")}, "swap_space must be GiB in"),
        ({"swap_space": "4"}, "swap_space must be GiB in .*got swap_space='4' with .* GiB of host"),
        ({"swap_space": True}, "swap_space must be GiB in"),
        ({"num_blocks": 9, "kv_cache_memory_bytes": 9}, "exclude each other, got both"),
        ({"strict_compilation": True, "compilation": "lazy"}, "strict_compilation needs"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


def test_swap_space_is_at_most_the_hosts_memory(monkeypatch):
    monkeypatch.setattr(platform, "host_memory_bytes", lambda: 10 << 30)
    config = EngineConfig(preemption_mode="swap", swap_space=10)
    assert (config.swaps, config.swap_bytes) == (True, 10 << 30)
    message = (
        r"swap_space must be GiB in \(0, the host's memory\], got swap_space=10.5 with 10.0 GiB of "
        "host memory"
    )
    for mode in ("recompute", "swap"):
        with pytest.raises(ValueError, match=message):
            EngineConfig(preemption_mode=mode, swap_space=10.5)


def test_swap_space_that_is_left_open_is_taken_only_where_it_is_needed(monkeypatch):
    assert (EngineConfig().swaps, EngineConfig().swap_bytes) == (False, 0)
    for config in (
        EngineConfig(preemption_mode="swap"),
        EngineConfig(preemption_mode="auto"),
        EngineConfig(host_cache=True),
    ):
        monkeypatch.setattr(platform, "host_memory_bytes", lambda: 100 << 30)
        assert config.swap_bytes == 4 << 30
        monkeypatch.setattr(platform, "host_memory_bytes", lambda: 8 << 30)
        assert config.swap_bytes == 2 << 30


def test_an_unknown_option_names_the_nearest_one():
    with pytest.raises(ValueError, match="unknown engine option 'max_seqs'; did you mean max_num"):
        EngineConfig.from_options(max_seqs=3)
    with pytest.raises(ValueError, match="unknown engine option 'x'; known ones: model, tokenizer"):
        EngineConfig.from_options(x=3)


@pytest.mark.parametrize(
    ("backend", "options", "num_seqs", "num_tokens"),
    [
        ("cpu", {}, 32, 512),
        ("gpu", {}, 256, 8192),
        ("tpu", {}, 256, 2048),
        ("METAL", {}, 32, 512),
        ("cpu", {"max_num_seqs": 4}, 4, 512),
        ("cpu", {"max_num_seqs": 600}, 600, 600),
        ("cpu", {"max_num_batched_tokens": 8}, 8, 8),
        ("cpu", {"max_num_batched_tokens": 100}, 32, 100),
        ("cpu", {"max_num_batched_tokens": 9, "max_num_seqs": 3}, 3, 9),
    ],
)
def test_budgets_that_are_left_open_follow_the_device(backend, options, num_seqs, num_tokens):
    config = EngineConfig(**options).scheduler_config(backend, 2048)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (num_seqs, num_tokens)


def test_the_length_is_the_models_unless_it_is_lower():
    assert EngineConfig().scheduler_config("cpu", 2048).max_model_len == 2048
    assert EngineConfig(max_model_len=64).scheduler_config("cpu", 2048).max_model_len == 64
    with pytest.raises(ValueError, match="max_model_len must be at most the model's 2048, got 20"):
        EngineConfig(max_model_len=2049).scheduler_config("cpu", 2048)


def test_budgets_that_contradict_are_refused():
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=7)
    with pytest.raises(ValueError, match="max_num_batched_tokens must be at least max_num_seqs"):
        config.scheduler_config("cpu", 2048)


def test_parts_get_their_options():
    config = EngineConfig(
        policy="priority",
        long_prefill_token_threshold=9,
        block_size=32,
        enable_prefix_caching=False,
    )
    scheduler = config.scheduler_config("cpu", 64)
    assert (scheduler.policy, scheduler.long_prefill_token_threshold) == ("priority", 9)
    cache = config.cache_config(12)
    assert (cache.num_blocks, cache.block_size, cache.enable_prefix_caching) == (12, 32, False)
