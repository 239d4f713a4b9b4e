"""The kernel of `mosaic_gpu_chunks`: FlashAttention-3 over blocks, one persistent program a SM.

A work item is one query tile of one KV head: 64 rows for each consumer warpgroup, a row being one
token and one of the query heads that share the KV head, so that a short chunk still fills a tile
and the heads read K and V once. A producer warp copies queries and blocks into rings in shared
memory, running ahead into the next item while the consumers finish this one; the two consumers
take turns on the tensor cores (the ping-pong schedule of FlashAttention-3, section 3.1).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from jpaged.pallas_kernels.mosaic_gpu import swizzle_bytes, tile_transforms

LOG2E = math.log2(math.e)
# Masked logits lie far below where the running maximum starts, so that the weights of a fully
# masked row are exactly 0: with one value for both, the rounding residue of a fused multiply-add
# decides, and the result is infinite.
MASKED = -1e30
MAX_START = -1e20
ROWS = 64  # of a consumer: one wgmma
CONSUMERS = 2

MAX_PACKED_HEADS = 16
# Of each thread; at most 512 for the threads of two consumers and a producer.
CONSUMER_REGISTERS = 232
PRODUCER_REGISTERS = 40

ITEM_FIELDS = ("token", "num_tokens", "position", "seq", "seq_len", "head")


def heads_per_tile(group_size: int) -> int:
    """Query heads of one KV head that share a tile: the power of two in the group's size."""
    return min(group_size & -group_size, MAX_PACKED_HEADS)


def tokens_per_tile(group_size: int) -> int:
    """Tokens in a query tile of all consumers."""
    return CONSUMERS * ROWS // heads_per_tile(group_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes that change speed, not results.

    Attributes:
        tile_kv: Tokens of context in one step; a multiple of 64.
        stages: Steps of K and V in flight.
        ping_pong: Consumers take turns on the tensor cores, also from one item to the next: needs
            the next item's queries while this one runs, so a second buffer for queries.
    """

    tile_kv: int = 128
    stages: int = 2
    ping_pong: bool = True

    @property
    def query_buffers(self) -> int:
        """Items whose queries lie in shared memory."""
        return 2 if self.ping_pong else 1

    def __post_init__(self):
        if self.tile_kv % 64 or self.tile_kv < 64:
            raise ValueError(f"tile_kv must be a multiple of 64, got {self.tile_kv}")
        if self.stages < 2:
            raise ValueError(f"stages must be 2 or more, got {self.stages}")


def default_config(head_dim: int) -> Config:
    """What fits the 227 KiB of shared memory and the registers."""
    if head_dim > 128:
        return Config(tile_kv=64, ping_pong=False)
    return Config(stages=4 if head_dim <= 64 else 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is static about a call."""

    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: jnp.dtype
    scale: float
    sliding_window: int | None
    soft_cap: float | None

    @property
    def group_size(self) -> int:
        """Query heads of one KV head."""
        return self.num_heads // self.num_kv_heads

    def padded(self, q: jax.Array, interpret: Any) -> jax.Array:
        """Queries with at least the rows of a box.

        Boxes that hang over the end are cut by the hardware, but not by the interpreter.
        """
        tile = tokens_per_tile(self.group_size)
        num_tokens = max(self.num_tokens, tile // CONSUMERS)
        if interpret is not None:
            num_tokens = self.num_tokens + tile
        return jnp.pad(q, ((0, num_tokens - self.num_tokens), (0, 0), (0, 0)))


def launch(
    problem: Problem, config: Config, num_programs: int, interpret: Any, *, returns_out: bool
) -> Callable[..., Any]:
    """The kernel as a function of (items, num_items, block_tables, q, pool, out_ref).

    With `returns_out` it takes no `out_ref` and returns a new array.
    """
    dtype, head_dim = problem.dtype, problem.head_dim
    i32, f32 = jnp.int32, jnp.float32
    interpreted = interpret is not None
    tile_kv, stages, query_buffers = config.tile_kv, config.stages, config.query_buffers
    packed_heads = heads_per_tile(problem.group_size)
    rows_tokens = ROWS // packed_heads
    columns = swizzle_bytes(head_dim, dtype) // dtype.itemsize
    chunks = [pl.ds(start, columns) for start in range(0, head_dim, columns)]
    box_shape = (query_buffers, CONSUMERS, len(chunks), rows_tokens, packed_heads, columns)
    box_tokens = min(problem.block_size, tile_kv)
    boxes_per_block = problem.block_size // box_tokens
    window, soft_cap = problem.sliding_window, problem.soft_cap
    # Logits in units of log2, so that exp2 needs one fused multiply-add.
    scale = LOG2E if soft_cap else problem.scale * LOG2E

    def body(items, item_count, block_tables, q, pool, out, scoped):
        (query_memory, k_smem, v_smem, p_smem), barriers = scoped
        q_ready, k_ready, v_ready, q_free, k_free, v_free, v_clean, turn = barriers
        q_tiles, q_boxes = query_memory
        program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
        num_items = item_count[0]
        full_rounds = lax.div(num_items, i32(num_programs))

        def index_of(turn_number):
            odd = lax.rem(turn_number, i32(2)) == 1
            column = jnp.where(odd, num_programs - 1 - program, program)
            return turn_number * num_programs + column

        my_items = full_rounds + (index_of(full_rounds) < num_items).astype(i32)

        def read_item(turn_number):
            """The fields of an item; read an item ahead."""
            item = jnp.clip(index_of(turn_number), 0, jnp.maximum(num_items - 1, 0))
            return tuple(items[item * len(ITEM_FIELDS) + i] for i in range(len(ITEM_FIELDS)))

        def step_range(num_tokens, position):
            """Steps of context that some query of the tile sees."""
            last = pl.cdiv(position + num_tokens, i32(tile_kv))
            if window is None:
                return 0, last
            return lax.div(jnp.maximum(position - window + 1, 0), i32(tile_kv)), last

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def consume_item(turn_number, carry):
            first_stage, (token, num_tokens, position, _, seq_len, head) = carry
            next_item = read_item(turn_number + 1)
            buffer = lax.rem(turn_number, i32(query_buffers))
            first, last = step_range(num_tokens, position)
            position += warpgroup * rows_tokens  # of this consumer's first row
            # Steps below `whole` need no causal mask, those from `inside` on no window mask. The
            # last one always counts as masked: queries are released before it, see below.
            whole = jnp.clip(lax.div(position + 1, i32(tile_kv)), first, last - 1)
            inside = first
            if window is not None:
                edge = jnp.maximum(position + rows_tokens - window, 0)
                inside = jnp.clip(pl.cdiv(edge, i32(tile_kv)), first, whole)

            def slot_of(step):
                return lax.rem(first_stage + step - first, i32(stages))

            def visible(step):
                shape, layout = (ROWS, tile_kv), plgpu.Layout.WGMMA
                row = plgpu.broadcasted_iota(i32, shape, 0, layout=layout)
                key = plgpu.broadcasted_iota(i32, shape, 1, layout=layout) + step * tile_kv
                query = lax.div(row, i32(packed_heads)) + position
                seen = key <= query
                return seen if window is None else seen & (key > query - window)

            def clean_values(step):
                """Zeroes V past the sequence's end, shared between the consumers."""
                plgpu.barrier_wait(v_ready.at[slot_of(step)])
                values = v_smem.at[slot_of(step)]
                for part in range(tile_kv // ROWS):

                    @pl.when(warpgroup == part % CONSUMERS)
                    def _clean(part=part):
                        rows = values.at[pl.ds(part * ROWS, ROWS)]
                        layout = plgpu.Layout.WGMMA
                        row = plgpu.broadcasted_iota(i32, (ROWS, head_dim), 0, layout=layout)
                        is_real = row + (step * tile_kv + part * ROWS) < seq_len
                        loaded = plgpu.load(rows, layout=layout, optimized=False)
                        rows[...] = jnp.where(is_real, loaded, jnp.zeros((), dtype))

                plgpu.commit_smem()
                plgpu.barrier_arrive(v_clean)

            def multiply_keys(step, logits_ref):
                for i, chunk in enumerate(chunks):
                    queries = q_tiles.at[buffer, warpgroup, i]
                    keys = k_smem.at[slot_of(step), :, chunk]
                    plgpu.wgmma(logits_ref, queries, keys.transpose((1, 0)))

            def multiply_values(step, weights, acc_ref):
                if interpreted:  # takes both operands from shared memory
                    p_smem[warpgroup] = weights
                    plgpu.commit_smem()
                    weights = p_smem.at[warpgroup]
                plgpu.wgmma(acc_ref, weights, v_smem.at[slot_of(step)])

            def await_next_keys(step):
                @pl.when(step + 1 < last)
                def _await():
                    plgpu.barrier_wait(k_ready.at[slot_of(step + 1)])

            def add_values(step, weights, acc):
                if interpreted:  # an accumulator starts at zero

                    def product(acc_ref):
                        multiply_values(step, weights, acc_ref)
                        await_next_keys(step)
                        return acc_ref[...]

                    acc = acc + pl.run_scoped(product, plgpu.ACC(acc.shape, f32))
                else:

                    def accumulate(acc_ref):
                        multiply_values(step, weights, acc_ref)
                        await_next_keys(step)

                    acc = pl.run_state(accumulate)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[slot_of(step)])
                return acc

            def soften(step, logits, row_max, *, masked):
                """Weights, their row's maximum so far, and the decay of what came before."""
                plgpu.barrier_arrive(k_free.at[slot_of(step)])
                if soft_cap:
                    # tanh from exp2: the hardware's own has an error of 5e-4.
                    power = jnp.exp2(logits * (2 * LOG2E * problem.scale / soft_cap))
                    logits = soft_cap - (2 * soft_cap) / (power + 1)
                if masked:
                    logits = jnp.where(visible(step), logits, MASKED)
                new_max = jnp.maximum(row_max, logits.max(axis=1) * scale)
                shift = lax.broadcast_in_dim(new_max, logits.shape, [0])
                return jnp.exp2(logits * scale - shift), new_max, jnp.exp2(row_max - new_max)

            def end_softmax(step, *, masked):
                """Hands the other consumer its softmax, and waits for V and the tensor cores."""
                is_dirty = (step + 1) * tile_kv > seq_len
                if masked:
                    pl.when(is_dirty)(lambda: clean_values(step))
                if config.ping_pong:
                    plgpu.barrier_arrive(turn)
                if masked:
                    pl.when(is_dirty)(lambda: plgpu.barrier_wait(v_clean))
                    pl.when(~is_dirty)(lambda: plgpu.barrier_wait(v_ready.at[slot_of(step)]))
                else:
                    plgpu.barrier_wait(v_ready.at[slot_of(step)])
                if config.ping_pong:
                    plgpu.barrier_wait(turn)

            def kv_step(step, carry, *, masked):
                acc, row_max, row_sum = carry

                def product(logits_ref):
                    multiply_keys(step, logits_ref)
                    if config.ping_pong:
                        take_turn()
                    return logits_ref[...]

                logits = pl.run_scoped(product, plgpu.ACC((ROWS, tile_kv), f32))
                weights, row_max, decay = soften(step, logits, row_max, masked=masked)
                acc = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
                row_sum = row_sum * decay
                # The order decides what the compiler keeps in registers; as in jax's attention.
                if head_dim <= 128:
                    row_sum = row_sum + weights.sum(axis=1)
                    acc, row_sum, row_max, weights16 = lax.optimization_barrier(
                        (acc, row_sum, row_max, weights.astype(dtype))
                    )
                    end_softmax(step, masked=masked)
                else:
                    weights16 = weights.astype(dtype)
                    end_softmax(step, masked=masked)
                    row_sum = row_sum + weights.sum(axis=1)
                return add_values(step, weights16, acc), row_max, row_sum

            masked_step = functools.partial(kv_step, masked=True)
            plain_step = functools.partial(kv_step, masked=False)

            def release_queries(of_turn):
                """Lets the producer overwrite a query buffer whose output has been copied out."""

                @pl.when(of_turn >= 0)
                def _release():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(q_free.at[lax.rem(of_turn, i32(query_buffers))])

            row_layout = plgpu.Layout.WGMMA.reduce(1)
            acc = plgpu.layout_cast(jnp.zeros((ROWS, head_dim), f32), plgpu.Layout.WGMMA)
            row_max = plgpu.layout_cast(jnp.full((ROWS,), MAX_START, f32), row_layout)
            row_sum = plgpu.layout_cast(jnp.zeros((ROWS,), f32), row_layout)
            carry = (acc, row_max, row_sum)

            plgpu.barrier_wait(q_ready.at[buffer])
            plgpu.barrier_wait(k_ready.at[slot_of(first)])
            if interpreted:  # the views are not one memory there
                for i, _ in enumerate(chunks):
                    box = q_boxes[buffer, warpgroup, i]
                    q_tiles[buffer, warpgroup, i] = box.reshape(ROWS, columns)
                plgpu.commit_smem()
            if window is not None:
                carry = lax.fori_loop(first, inside, masked_step, carry)
            carry = lax.fori_loop(inside, whole, plain_step, carry)
            if query_buffers == 2:
                # The other consumer needs this one's next item to end its last step: it must have
                # released what that item waits for by then. Late enough for the copy to have ended.
                release_queries(turn_number - 1)
            acc, _, row_sum = lax.fori_loop(whole, last, masked_step, carry)

            inverse = 1.0 / jnp.maximum(row_sum, 1e-30)
            result = (acc * lax.broadcast_in_dim(inverse, acc.shape, [0])).astype(dtype)
            for i, _ in enumerate(chunks):
                rows = result[:, i * columns : (i + 1) * columns]
                if interpreted:
                    q_boxes[buffer, warpgroup, i] = rows.reshape(box_shape[3:])
                else:
                    q_tiles[buffer, warpgroup, i] = rows
            plgpu.commit_smem()
            store_rows(
                q_boxes.at[buffer, warpgroup],
                token + warpgroup * rows_tokens,
                jnp.clip(num_tokens - warpgroup * rows_tokens, 0, rows_tokens),
                head,
            )
            if query_buffers == 1:
                release_queries(turn_number)
            return first_stage + last - first, next_item

        def store_rows(boxes, token, count, head):
            """Copies `count` tokens out in boxes of static sizes.

            Halves of a tile down to eight rows, then what remains: every box starts at a swizzle
            atom of shared memory.
            """
            atom = max(8 // packed_heads, 1)

            def store(size, offset):
                if size > problem.num_tokens:
                    return
                for i, chunk in enumerate(chunks):
                    plgpu.copy_smem_to_gmem(
                        boxes.at[i, pl.ds(offset, size)],
                        out.at[pl.ds(token + offset, size), pl.ds(head, packed_heads), chunk],
                    )

            size = rows_tokens
            while size >= atom:
                offset = lax.div(count, i32(2 * size)) * (2 * size)
                pl.when((count & size) != 0)(lambda size=size, offset=offset: store(size, offset))
                size //= 2
            rest = lax.rem(count, i32(atom))
            for size in range(1, atom):
                pl.when(rest == size)(lambda size=size: store(size, count - rest))

        def produce_item(turn_number, carry):
            first_stage, (token, num_tokens, position, seq, seq_len, head) = carry
            next_item = read_item(turn_number + 1)
            buffer = lax.rem(turn_number, i32(query_buffers))
            first, last = step_range(num_tokens, position)
            last_block = lax.div(seq_len - 1, i32(problem.block_size))
            kv_head = lax.div(head, i32(problem.group_size))

            @pl.when(turn_number >= query_buffers)
            def _await_buffer():
                plgpu.barrier_wait(q_free.at[buffer])

            for consumer in range(CONSUMERS):
                rows = pl.ds(token + consumer * rows_tokens, rows_tokens)
                for i, chunk in enumerate(chunks):
                    plgpu.copy_gmem_to_smem(
                        q.at[rows, pl.ds(head, packed_heads), chunk],
                        q_boxes.at[buffer, consumer, i],
                        q_ready.at[buffer],
                    )

            def produce_step(step, stage):
                slot = lax.rem(stage, i32(stages))
                # Boxes past the end repeat the last block: finite, but for the slots after the
                # last token, and those are masked (K) or zeroed (V).
                boxes = []
                for start in range(0, tile_kv, box_tokens):
                    token = step * tile_kv + start
                    block = jnp.minimum(lax.div(token, i32(problem.block_size)), last_block)
                    # Spelled as a product, which shows that a box starts at a whole tile.
                    box = lax.rem(lax.div(token, i32(box_tokens)), i32(boxes_per_block))
                    slots = pl.ds(box * box_tokens if boxes_per_block > 1 else 0, box_tokens)
                    boxes.append((pl.ds(start, box_tokens), block_tables[seq, block], slots))
                for part, smem, ready, free in (
                    (0, k_smem, k_ready, k_free),
                    (1, v_smem, v_ready, v_free),
                ):

                    @pl.when(stage >= stages)
                    def _await_slot(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    for rows, block_id, slots in boxes:
                        index = (block_id * 2 + part) * problem.num_kv_heads + kv_head
                        plgpu.copy_gmem_to_smem(
                            pool.at[index, slots], smem.at[slot, rows], ready.at[slot]
                        )
                return stage + 1

            return lax.fori_loop(first, last, produce_step, first_stage), next_item

        def drain(num_steps):
            """The interpreter wants every completed phase of a barrier to be waited for."""

            def drain_slot(stage, _):
                slot = lax.rem(stage, i32(stages))
                plgpu.barrier_wait(k_free.at[slot])
                plgpu.barrier_wait(v_free.at[slot])

            lax.fori_loop(jnp.maximum(num_steps - stages, 0), num_steps, drain_slot, None)
            released = my_items - (query_buffers - 1)

            @pl.when(released > 0)
            def _drain_queries():
                plgpu.barrier_wait(q_free.at[lax.rem(released - 1, i32(query_buffers))])

        @pl.when(warpgroup < CONSUMERS)
        def _consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            if config.ping_pong:
                pl.when(warpgroup == 1)(take_turn)
            lax.fori_loop(0, my_items, consume_item, (i32(0), read_item(i32(0))))
            if config.ping_pong:
                pl.when(warpgroup == 0)(take_turn)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == CONSUMERS)
        def _produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            @plgpu.warp_map
            def _of_warp(warp):
                @pl.when(warp == 0)
                def _produce_all():
                    start = (i32(0), read_item(i32(0)))
                    num_steps, _ = lax.fori_loop(0, my_items, produce_item, start)
                    if interpreted:
                        drain(num_steps)

    # Two views of the same bytes. wgmma wants rows in tiles of eight; a copy that keeps tokens and
    # heads apart may start at any token, which one into tiled rows may not. A tile as wide as the
    # swizzle is contiguous, so tiling does not move a byte.
    tiling, swizzle = tile_transforms(columns, dtype)
    tiled_shape = (query_buffers, CONSUMERS, len(chunks), ROWS, columns)
    query_views = (
        plgpu.SMEM(tiled_shape, dtype, transforms=(tiling, swizzle)),
        plgpu.SMEM(box_shape, dtype, transforms=(swizzle,)),
    )
    query_memory = query_views if interpreted else plgpu.RefUnion(*query_views)
    kv_memory = plgpu.SMEM(
        (stages, tile_kv, head_dim), dtype, transforms=tile_transforms(head_dim, dtype)
    )
    weights_memory = plgpu.SMEM(
        (CONSUMERS, ROWS, tile_kv), dtype, transforms=tile_transforms(tile_kv, dtype)
    )
    kv_barrier = plgpu.Barrier(num_arrivals=tile_kv // box_tokens, num_barriers=stages)
    kv_free_barrier = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages)

    def entry(*refs):
        pl.run_scoped(
            lambda *scoped: body(*refs, scoped),
            (query_memory, kv_memory, kv_memory, weights_memory if interpreted else None),
            (
                plgpu.Barrier(num_arrivals=CONSUMERS * len(chunks), num_barriers=query_buffers),
                kv_barrier,
                kv_barrier,
                plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=query_buffers),
                kv_free_barrier,
                kv_free_barrier,
                plgpu.Barrier(num_arrivals=CONSUMERS),
                plgpu.Barrier(num_arrivals=CONSUMERS),
            ),
            collective_axes="warpgroup",
        )

    out_shape = (problem.num_tokens, problem.num_heads, head_dim)
    return plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct(out_shape, dtype) if returns_out else (),
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        interpret=interpret,
        kernel_name="paged_chunks",
    )
