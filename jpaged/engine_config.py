"""What a user may set on an engine, and how what is left open is decided from model and device."""

import dataclasses
import difflib
from typing import Any, Literal, get_args

from jpaged import platform
from jpaged.config import (
    BLOCK_SIZES,
    CacheConfig,
    PreemptionMode,
    SchedulerConfig,
    SchedulingPolicy,
    check_at_least,
)

Compilation = Literal["background", "eager", "lazy"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDType = Literal["auto", "fp8"]
LoadFormat = Literal["auto", "dummy"]
GenerationConfig = Literal["auto", "none"]

# On a CPU the pool shares memory with everything else, so it is small unless asked for.
DEFAULT_CPU_CACHE_BYTES = 1 << 30
DEFAULT_SWAP_SPACE = 4.0
"""GiB of host memory for swapping, or a quarter of it where that is less."""
DEFAULT_BUDGETS = {"cpu": (32, 512), "gpu": (256, 8192), "tpu": (256, 2048)}
"""Backend to default (max_num_seqs, max_num_batched_tokens)."""
_SWITCHES = (
    "skip_tokenizer_init",
    "enable_prefix_caching",
    "host_cache",
    "async_scheduling",
    "strict_compilation",
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Options of an engine; None leaves a value to model and device.

    Attributes:
        model: A name of the embedded model, a directory, a `.gguf` file or a hub id; None is the
            embedded default model.
        tokenizer: Where the tokenizer comes from if not from the model.
        skip_tokenizer_init: Runs without a tokenizer: prompts and outputs are token ids.
        revision: Revision of a hub id.
        load_format: "auto", or "dummy" for random weights of the right shapes.
        tensor_parallel_size: Devices, of all hosts together, that the model is cut over: by heads,
            MLP and vocabulary.
        nnodes: Hosts whose devices hold the model, with a process on each.
        node_rank: Which of them this is. Rank 0 leads: the others have no engine of their own but
            `jpaged.multihost.follow` it. On TPU VMs rank and address are found if None.
        master_addr: Address of the leader, where the others find it.
        master_port: Port of the leader for its calls; the next one is JAX's.
        dtype: Of weights, activations and the block pool; "auto" takes float32 on a CPU and
            bfloat16 on accelerators (float16 where the device is slow at bfloat16).
        generation_config: Where sampling that a request leaves open comes from: "auto" takes what
            the model's generation_config.json recommends, "none" the defaults of `SamplingParams`.
        seed: From which requests without a seed of their own draw theirs.
        max_model_len: Most tokens of a sequence, prompt and output; the model's own limit if None.
        max_num_seqs: Most sequences that run at once.
        max_num_batched_tokens: Most tokens of a step.
        long_prefill_token_threshold: Most prompt tokens of one sequence in a step; 0: no limit.
        policy: "fcfs" or "priority" (lower first).
        block_size: Tokens of a block.
        kv_cache_dtype: Of the block pool: "auto" is `dtype`, "fp8" is float8_e4m3fn with a scale of
            1, which clips K and V at 448. The TPU kernels serve it with a block_size of 32 or more;
            else, and on GPUs, XLA does.
        num_blocks: Blocks of the pool, instead of sizing it by memory.
        kv_cache_memory_bytes: Bytes of the pool, instead of sizing it by `memory_utilization`.
        memory_utilization: Share of an accelerator's memory for weights, step and pool together.
        enable_prefix_caching: Whether full blocks are kept and shared by content.
        preemption_mode: How running sequences make room for older ones: "recompute" forgets their
            blocks, "swap" moves them to the host while it has room, "auto" swaps groups of several
            sequences, and others where copying was measured to take less time than computing.
        swap_space: GiB of each host's memory for swapped and cached blocks; if it is needed and
            None, 4, or a quarter of that memory or eight times the pool where those are less.
        host_cache: Whether cached blocks that are evicted from the pool are kept in `swap_space`.
        max_logprobs: Largest `logprobs` and `prompt_logprobs` of a request; -1 for the vocabulary,
            0 leaves log-probabilities out of the compiled step.
        async_scheduling: Whether a step is dispatched before the one before it has been read.
        compilation: "background" serves while the compile plan is worked through, "eager"
            compiles all of it first, "lazy" compiles what a step needs when it needs it.
        strict_compilation: Makes a compilation after warm-up an error.
        compilation_cache_dir: Where compiled programs are kept; "auto" for the default, None leaves
            JAX's own setting as it is.
    """

    model: str | None = None
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    revision: str | None = None
    load_format: LoadFormat = "auto"
    tensor_parallel_size: int = 1
    nnodes: int = 1
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int = 29501
    dtype: DType = "auto"
    generation_config: GenerationConfig = "auto"
    seed: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    long_prefill_token_threshold: int = 0
    policy: SchedulingPolicy = "fcfs"
    block_size: int = 16
    kv_cache_dtype: KVCacheDType = "auto"
    num_blocks: int | None = None
    kv_cache_memory_bytes: int | None = None
    memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    preemption_mode: PreemptionMode = "recompute"
    swap_space: float | None = None
    host_cache: bool = False
    max_logprobs: int = 20
    async_scheduling: bool = True
    compilation: Compilation = "background"
    strict_compilation: bool = False
    compilation_cache_dir: str | None = "auto"

    def __post_init__(self) -> None:
        for name, choices in (
            ("load_format", get_args(LoadFormat)),
            ("dtype", get_args(DType)),
            ("generation_config", get_args(GenerationConfig)),
            ("policy", get_args(SchedulingPolicy)),
            ("block_size", BLOCK_SIZES),
            ("kv_cache_dtype", get_args(KVCacheDType)),
            ("preemption_mode", get_args(PreemptionMode)),
            ("compilation", get_args(Compilation)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name, minimum in (
            ("max_model_len", 2),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("num_blocks", 2),
            ("kv_cache_memory_bytes", 1),
        ):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), minimum)
        check_at_least("long_prefill_token_threshold", self.long_prefill_token_threshold, 0)
        check_at_least("max_logprobs", self.max_logprobs, -1)
        check_at_least("tensor_parallel_size", self.tensor_parallel_size, 1)
        check_at_least("seed", self.seed, 0)
        self._check_hosts()
        share = self.memory_utilization
        if not isinstance(share, (int, float)) or not 0.0 < share <= 1.0:
            raise ValueError(f"memory_utilization must be in (0, 1], got {share!r}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.num_blocks is not None and self.kv_cache_memory_bytes is not None:
            raise ValueError("num_blocks and kv_cache_memory_bytes exclude each other, got both")
        if self.strict_compilation and self.compilation == "lazy":
            raise ValueError('strict_compilation needs compilation="background" or "eager"')
        if self.host_cache and not self.enable_prefix_caching:
            raise ValueError("host_cache needs enable_prefix_caching=True")
        if self.swap_space is not None:
            self._check_swap_space(self.swap_space)

    def _check_hosts(self) -> None:
        check_at_least("nnodes", self.nnodes, 1)
        if self.nnodes == 1:
            for name in ("node_rank", "master_addr"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs nnodes above 1, got {getattr(self, name)!r}")
            return
        if (self.node_rank is None) != (self.master_addr is None):
            raise ValueError(
                "node_rank and master_addr must be given both or, on TPU VMs, neither, got "
                f"node_rank={self.node_rank!r}, master_addr={self.master_addr!r}"
            )
        if self.node_rank is not None:
            check_at_least("node_rank", self.node_rank, 0)
            if self.node_rank >= self.nnodes:
                raise ValueError(
                    f"node_rank must be in [0, nnodes - 1 = {self.nnodes - 1}], "
                    f"got {self.node_rank}"
                )
        check_at_least("master_port", self.master_port, 1)
        if self.master_port > 65534:
            raise ValueError(f"master_port must be in [1, 65534], got {self.master_port}")
        if self.tensor_parallel_size % self.nnodes:
            raise ValueError(
                f"tensor_parallel_size must be a multiple of nnodes={self.nnodes}, "
                f"got {self.tensor_parallel_size}"
            )

    def _check_swap_space(self, swap_space: float) -> None:
        host = platform.host_memory_bytes() / 2**30
        is_number = isinstance(swap_space, (int, float)) and not isinstance(swap_space, bool)
        if not is_number or not 0.0 < swap_space <= host:
            raise ValueError(
                "swap_space must be GiB in (0, the host's memory], got "
                f"swap_space={swap_space!r} with {host:.1f} GiB of host memory"
            )
        if not self.swaps:
            raise ValueError(
                'swap_space needs preemption_mode="swap" or "auto", or host_cache=True'
            )

    @property
    def swaps(self) -> bool:
        """Whether blocks may move to the host."""
        return self.preemption_mode != "recompute" or self.host_cache

    @property
    def swap_bytes(self) -> int:
        """Bytes of host memory for blocks; 0 where nothing is ever swapped."""
        if not self.swaps:
            return 0
        if self.swap_space is not None:
            return int(self.swap_space * 2**30)
        return min(int(DEFAULT_SWAP_SPACE * 2**30), platform.host_memory_bytes() // 4)

    @classmethod
    def from_options(cls, **options: Any) -> "EngineConfig":
        """A config of these options.

        Raises:
            ValueError: An option does not exist (with the nearest one that does), or its value is
                not allowed.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]}?" if near else f"; known ones: {', '.join(known)}"
                raise ValueError(f"unknown engine option {name!r}{hint}")
        return cls(**options)

    def scheduler_config(self, backend: str, max_position_embeddings: int) -> SchedulerConfig:
        """The scheduler's part, with what was left open decided.

        Raises:
            ValueError: The model cannot reach `max_model_len`, or the budgets contradict.
        """
        max_model_len = self.max_model_len or max_position_embeddings
        if max_model_len > max_position_embeddings:
            raise ValueError(
                f"max_model_len must be at most the model's {max_position_embeddings}, "
                f"got {max_model_len}"
            )
        num_seqs, num_tokens = DEFAULT_BUDGETS.get(backend, DEFAULT_BUDGETS["cpu"])
        if self.max_num_seqs is not None:
            num_seqs = self.max_num_seqs
        elif self.max_num_batched_tokens is not None:
            num_seqs = min(num_seqs, self.max_num_batched_tokens)
        return SchedulerConfig(
            max_model_len=max_model_len,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens or max(num_tokens, num_seqs),
            policy=self.policy,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
        )

    def cache_config(self, num_blocks: int, num_host_blocks: int = 0) -> CacheConfig:
        """The block pool's part."""
        return CacheConfig(
            num_blocks=num_blocks,
            block_size=self.block_size,
            enable_prefix_caching=self.enable_prefix_caching,
            num_host_blocks=num_host_blocks,
            host_cache=self.host_cache,
        )
