import jax
import jax.numpy as jnp
import pytest

from jpaged import memory
from jpaged.config import SchedulerConfig
from jpaged.engine_config import DEFAULT_CPU_CACHE_BYTES, EngineConfig
from jpaged.pallas_kernels import KVCacheSpec

SPEC = KVCacheSpec(block_size=16, num_kv_heads=2, head_dim=8, dtype=jnp.dtype("float32"))
NUM_LAYERS = 3
BLOCK_BYTES = NUM_LAYERS * 2 * 16 * 2 * 8 * 4
MAX_BLOCKS = 7  # of a sequence: 100 tokens in blocks of 16
TEMP_BYTES = 5 * BLOCK_BYTES


class FakeDevice:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def _num_blocks(temp_bytes=None, max_num_seqs=100, **options):
    def step_temp_bytes(num_blocks):
        assert temp_bytes is not None, "only asked for where memory is what limits"
        assert num_blocks == MAX_BLOCKS + 1, "the smallest pool the step can be compiled for"
        return temp_bytes

    return memory.num_blocks(
        EngineConfig(**options),
        SchedulerConfig(max_model_len=100, max_num_seqs=max_num_seqs),
        SPEC,
        num_layers=NUM_LAYERS,
        step_temp_bytes=step_temp_bytes,
        devices=jax.local_devices(),
    )


@pytest.fixture
def accelerator(monkeypatch):
    """Pretends to be on a GPU whose memory the returned dict describes."""
    stats = {"bytes_limit": 1000 * BLOCK_BYTES, "bytes_in_use": 200 * BLOCK_BYTES}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeDevice(stats)])
    return stats


def test_an_explicit_number_is_taken_as_it_is():
    assert _num_blocks(num_blocks=8) == 8
    assert _num_blocks(num_blocks=5000) == 5000


def test_bytes_are_rounded_down_to_blocks():
    assert _num_blocks(kv_cache_memory_bytes=10 * BLOCK_BYTES + 1) == 10
    assert _num_blocks(kv_cache_memory_bytes=11 * BLOCK_BYTES - 1) == 10


def test_a_cpu_takes_its_default_but_never_more_than_can_be_used(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert _num_blocks(max_num_seqs=10) == 10 * MAX_BLOCKS + 1
    assert _num_blocks(max_num_seqs=2048) == min(
        DEFAULT_CPU_CACHE_BYTES // BLOCK_BYTES, 2048 * MAX_BLOCKS + 1
    )


def test_an_accelerator_takes_what_weights_and_step_leave(accelerator):
    assert _num_blocks(TEMP_BYTES, memory_utilization=0.5) == 500 - 200 - 5
    assert _num_blocks(TEMP_BYTES, memory_utilization=1.0, max_num_seqs=20) == 20 * MAX_BLOCKS + 1


def test_an_explicit_number_needs_no_statistics(accelerator):
    accelerator.clear()
    assert _num_blocks(num_blocks=9) == 9


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 5}])
def test_a_device_that_does_not_tell_its_memory_needs_a_number(monkeypatch, accelerator, stats):
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeDevice(stats)])
    with pytest.raises(ValueError, match="set num_blocks or kv_cache_memory_bytes"):
        _num_blocks(TEMP_BYTES)


@pytest.mark.parametrize("name", ["num_blocks", "kv_cache_memory_bytes"])
def test_a_pool_too_small_for_one_sequence_is_refused_naming_what_to_raise(name):
    value = MAX_BLOCKS * (1 if name == "num_blocks" else BLOCK_BYTES)
    message = (
        r"max_model_len of 100 tokens needs 8 blocks of 16 \(0 MB, the null block included\), but "
        f"the pool has 7: raise {name} or lower max_model_len"
    )
    with pytest.raises(ValueError, match=message):
        _num_blocks(**{name: value})


def test_host_blocks_are_what_the_swap_space_holds():
    def num_host_blocks(**options):
        config = EngineConfig(**options)
        return memory.num_host_blocks(config, SPEC, num_layers=NUM_LAYERS, num_blocks=3)

    assert num_host_blocks() == 0
    # Left open it is gigabytes, but no more than can be of use.
    assert num_host_blocks(preemption_mode="swap") == 3 * memory.HOST_BLOCKS_A_BLOCK
    gib = BLOCK_BYTES / 2**30
    assert num_host_blocks(preemption_mode="swap", swap_space=7.5 * gib) == 7
    assert num_host_blocks(host_cache=True, swap_space=1.01 * gib) == 1
    with pytest.raises(ValueError, match=r"swap_space must be at least a block's .* GiB, got"):
        num_host_blocks(preemption_mode="auto", swap_space=0.99 * gib)


def test_an_accelerator_without_room_is_refused(accelerator):
    accelerator["bytes_in_use"] = 990 * BLOCK_BYTES
    with pytest.raises(ValueError, match="the pool has 0: raise memory_utilization or lower"):
        _num_blocks(TEMP_BYTES)
