"""The step: one jitted function of parameters, pools, sampler state and a packed batch.

It is all that touches the pools. Over several devices the whole of it runs in one `shard_map`:
every device has its heads' share of weights and pools, the same batch and sampler state as the
others, and samples its share of the rows: sums, gathered tokens and logits traded for rows are all
that it exchanges.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jpaged import sampler
from jpaged.compile_plan import StepShape
from jpaged.input_batch import NO_TOKEN, PENDING_TOKEN, packed_size, unpack
from jpaged.models.attention import AttentionMetadata
from jpaged.models.causal_lm import CausalLM
from jpaged.models.sharding import pool_spec
from jpaged.pallas_kernels import KVCacheSpec, copy_blocks

# Rows of logits computed at a time for the log-probabilities of a prompt.
PROMPT_LOGPROB_ROWS = 16


class StepFunction:
    """Lowers the step for any shape, from shapes of its arguments alone.

    Args:
        model: The model, or the shares that it is cut into.
        kv_spec: One device's share of a layer's pool.
        num_rows: Rows of the sampler's state.
        max_blocks_per_seq: Width of the block tables.
        max_logprobs: Log-probabilities that a request may ask for; 0 leaves them out.
        mesh: The devices; None: the default one.
    """

    def __init__(
        self,
        model: CausalLM,
        kv_spec: KVCacheSpec,
        *,
        num_rows: int,
        max_blocks_per_seq: int,
        max_logprobs: int,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self._model = model
        self._kv_spec = kv_spec
        self._num_rows = num_rows
        self._max_blocks_per_seq = max_blocks_per_seq
        self._max_logprobs = max_logprobs
        self._mesh = mesh

    # What lies where.

    @property
    def replicated(self) -> NamedSharding | None:
        """Sharding of what every device has whole; None without a mesh."""
        return None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())

    @property
    def pool_sharding(self) -> NamedSharding | None:
        """Sharding of a layer's pool; None without a mesh."""
        return None if self._mesh is None else NamedSharding(self._mesh, pool_spec())

    def pool_shape(self, num_blocks: int) -> tuple[int, ...]:
        """Shape of a layer's pool on all devices together."""
        shape = list(self._kv_spec.shape(num_blocks))
        shape[2] *= self._model.tensor_parallel_size
        return tuple(shape)

    def allocate_pool(self, num_blocks: int) -> jax.Array:
        """A zeroed pool of a layer: masked weights times stale NaNs would still be NaN."""
        return jnp.zeros(
            self.pool_shape(num_blocks), self._kv_spec.dtype, device=self.pool_sharding
        )

    def abstract_state(self) -> sampler.SamplerState:
        """Shapes of the sampler's state."""
        vocab_size = self._model.config.vocab_size
        state = jax.eval_shape(lambda: sampler.SamplerState.zeros(self._num_rows, vocab_size))
        return self.on_all(state)

    def on_all(self, tree: Any) -> Any:
        """The same shapes, of arrays that every device has whole."""
        return _placed(tree, self.replicated)

    def jitted(
        self, shape: StepShape, num_blocks: int
    ) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
        """The step of a shape as a jitted function, and the shapes of its arguments.

        Args:
            shape: The step's padded size.
            num_blocks: Blocks of each pool.
        """

        def step(params, pools, state, packed):
            return self._step(shape, params, pools, state, packed)

        model = self._model
        pool = jax.ShapeDtypeStruct(
            self.pool_shape(num_blocks), self._kv_spec.dtype, sharding=self.pool_sharding
        )
        pools = (pool,) * model.config.num_layers
        params = model.abstract_params
        packed = jax.ShapeDtypeStruct((packed_size(shape, self._max_blocks_per_seq),), jnp.int32)
        run = step
        if (mesh := self._mesh) is not None:
            params = jax.tree.map(
                lambda leaf, spec: _placed(leaf, NamedSharding(mesh, spec)),
                params,
                model.param_specs,
            )
            on_all, by_heads = PartitionSpec(), (pool_spec(),) * len(pools)
            run = jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(model.param_specs, by_heads, on_all, on_all),
                out_specs=(by_heads, on_all, on_all),
                # What is the same on all devices is so by construction: sums and gathers.
                check_vma=False,
            )
        run.__name__ = f"step_{shape.name}"
        arguments = (params, pools, self.abstract_state(), self.on_all(packed))
        return jax.jit(run, donate_argnums=(1, 2)), arguments

    def lower(
        self, shape: StepShape, num_blocks: int, *, platform: str | None = None
    ) -> jax.stages.Lowered:
        """The step of a shape, ready to be compiled.

        Args:
            shape: The step's padded size.
            num_blocks: Blocks of each pool.
            platform: What to lower for, if not for the default device: "tpu" on a host without one;
                `pallas_kernels.set_target_platform` then chooses the kernels.
        """
        jitted, arguments = self.jitted(shape, num_blocks)
        platforms = None if platform is None else (platform,)
        return jitted.trace(*arguments).lower(lowering_platforms=platforms)

    def temp_bytes(self, shape: StepShape, num_blocks: int) -> int:
        """Bytes that a device needs for a step beside its arguments, from its compiled form."""
        analysis = self.lower(shape, num_blocks).compile().memory_analysis()
        if analysis is None:
            return 0
        not_aliased = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return analysis.temp_size_in_bytes + max(not_aliased, 0)

    # The step, traced once a shape.

    def _step(
        self,
        shape: StepShape,
        params: Any,
        pools: Any,
        state: sampler.SamplerState,
        packed: Any,
    ) -> tuple[Any, sampler.SamplerState, dict[str, Any]]:
        arrays = unpack(packed, shape, self._max_blocks_per_seq)
        # A pending token belongs to a decode row, and those stand at their sequence's index.
        rows = arrays.rows
        if not shape.decode_only:
            rows = rows[jnp.minimum(jnp.arange(shape.num_tokens), shape.num_seqs - 1)]
        token_ids = jnp.where(
            arrays.token_ids == PENDING_TOKEN, state.last_tokens[rows], arrays.token_ids
        )
        if shape.num_copies:
            pools = _copied(pools, arrays.copy_sources, arrays.copy_destinations)
        metadata = AttentionMetadata(
            slot_mapping=arrays.slot_mapping,
            block_tables=arrays.block_tables,
            seq_lens=arrays.seq_lens,
            query_start_loc=arrays.query_start_loc,
            max_query_len=1 if shape.decode_only else None,
        )
        hidden, pools = self._model.hidden_states(
            params, token_ids, arrays.positions, pools, metadata
        )
        last_hidden, last_tokens = hidden, token_ids
        if not shape.decode_only:
            last = jnp.maximum(arrays.query_start_loc[1:] - 1, 0)
            last_hidden, last_tokens = hidden[last], token_ids[last]
        inputs = sampler.unpack_sampling_inputs(
            arrays.sampling_rows,
            arrays.seq_lens,
            arrays.rows,
            last_tokens,
            arrays.samples,
            arrays.ban_tokens,
            arrays.ban_if_last,
        )
        # Logits are too large to be sent to all devices: each samples some of the rows.
        share = self._model.row_share(shape.num_seqs)
        logits = self._model.logits(params, last_hidden, share)
        if shape.plain:
            tokens, state = sampler.sample_plain(logits, inputs, state, share)
            return pools, state, {"tokens": tokens}
        sampled, state = sampler.sample(
            logits, inputs, state, max_logprobs=self._max_logprobs, share=share
        )
        outputs: dict[str, Any] = {"tokens": sampled.tokens, "sampled": sampled}
        if self._max_logprobs and not shape.decode_only:
            outputs["prompt"] = self._prompt_logprobs(params, hidden, arrays.next_token_ids)
        return pools, state, outputs

    def _prompt_logprobs(
        self, params: Any, hidden: jax.Array, next_token_ids: jax.Array
    ) -> sampler.TokenLogprobs:
        """Log-probabilities of the prompt tokens that follow; nothing is computed if none is asked.

        A few rows at a time: logits of a whole chunk would be the largest array of the step.
        """
        num_tokens = hidden.shape[0]
        rows = min(PROMPT_LOGPROB_ROWS, num_tokens)
        num_tiles = -(-num_tokens // rows)
        padding = num_tiles * rows - num_tokens
        hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
        asked = jnp.pad(next_token_ids, (0, padding), constant_values=NO_TOKEN)
        tile_asks = (asked.reshape(num_tiles, rows) != NO_TOKEN).any(axis=1)

        def tile(args: tuple[jax.Array, jax.Array]) -> sampler.TokenLogprobs:
            tile_hidden, tile_ids = args
            logits = self._model.logits(params, tile_hidden)
            return sampler.token_logprobs(
                logits, jnp.maximum(tile_ids, 0), max_logprobs=self._max_logprobs
            )

        def no_tile(args: tuple[jax.Array, jax.Array]) -> sampler.TokenLogprobs:
            return jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(tile, args)
            )

        def one(_: None, xs: tuple[jax.Array, ...]) -> tuple[None, sampler.TokenLogprobs]:
            asks, tile_hidden, tile_ids = xs
            return None, lax.cond(asks, tile, no_tile, (tile_hidden, tile_ids))

        tiles = (
            tile_asks,
            hidden.reshape(num_tiles, rows, -1),
            asked.reshape(num_tiles, rows),
        )
        _, found = lax.scan(one, None, tiles)
        return jax.tree.map(
            lambda leaf: leaf.reshape(num_tiles * rows, *leaf.shape[2:])[:num_tokens], found
        )


def _placed(tree: Any, sharding: NamedSharding | None) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _copied(pools: tuple[jax.Array, ...], src: jax.Array, dst: jax.Array) -> tuple[jax.Array, ...]:
    """The pools with the step's block copies made in every layer, if there are any."""
    return lax.cond(
        (dst != 0).any(),
        lambda pools: tuple(_copy_blocks(pool, src, dst) for pool in pools),
        lambda pools: pools,
        pools,
    )


# Traced and lowered once for all layers.
_copy_blocks = jax.jit(copy_blocks)
