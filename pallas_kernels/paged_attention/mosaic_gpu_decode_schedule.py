"""How decode attention is laid over the chip: heads over tiles, contexts over programs.

Made once a step, in a few small XLA kernels, for all layers; `mosaic_gpu_decode` says what for.
"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jpaged.pallas_kernels import mosaic_gpu

# Rows of a wgmma tile.
ROWS = 64
# Ints of a program's row in the schedule: 8 fields, then the first block ids.
META_WIDTH = 32
META_FIELDS = 8
# Ints of a sequence's row: row of its block table, token, context length, first stage of context,
# place of that stage in the layout of all contexts.
INFO_WIDTH = 5
# Ints of a merge: number of partial results, token, head group, first slot, second slot.
MERGE_WIDTH = 8
# The last program to end merges up to so many partial results; of more, a kernel of its own does.
MAX_PARTS_INSIDE = 40


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How heads and slots are laid over tiles.

    Attributes:
        num_kv_heads: kv heads of the pool.
        group_size: query heads a kv head.
        head_dim: elements of a head.
        block_size: slots of a block.
        dtype: of queries and pool.
        consumers: warpgroups that compute, each with its own kv heads.
        heads: kv heads of one consumer's tile.
        stages: depth of the ring.
    """

    num_kv_heads: int
    group_size: int
    head_dim: int
    block_size: int
    dtype: Any
    consumers: int
    heads: int
    stages: int

    @property
    def slots(self) -> int:
        """Context slots of one stage."""
        return ROWS // self.heads

    @property
    def blocks(self) -> int:
        """Blocks that one stage reads from, whole ones or a part of one."""
        return max(self.slots // self.block_size, 1)

    @property
    def head_groups(self) -> int:
        """Groups of kv heads that are walked one after the other."""
        return self.num_kv_heads // (self.consumers * self.heads)

    @property
    def query_rows(self) -> int:
        """Query heads of one consumer."""
        return self.heads * self.group_size

    @property
    def padded_rows(self) -> int:
        """The same, in whole shared-memory tiles."""
        return -(-self.query_rows // 8) * 8

    @property
    def shares_tile(self) -> bool:
        """Whether two consumers take half a shared-memory tile of queries each, from one tile."""
        return self.consumers == 2 and self.query_rows == 4 and self.head_dim % 32 == 0

    @property
    def stored_rows(self) -> int:
        """Rows of a consumer in global memory."""
        return self.query_rows if self.shares_tile else self.padded_rows

    @property
    def stage_bytes(self) -> int:
        """Bytes of K and V of one stage."""
        return 2 * self.consumers * ROWS * self.head_dim * jnp.dtype(self.dtype).itemsize


def choose_geometry(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: jax.typing.DTypeLike,
    *,
    num_seqs: int = sys.maxsize,
    stages: int | None = None,
) -> Geometry:
    """The geometry for a model's heads, and for a batch of up to so many sequences.

    Consumers split the kv heads, never the context, so that none of them needs another's result. Of
    a head dim above 128 one consumer's tile is as large as two others'. Few sequences are walked in
    several groups of heads: a context is then cut into fewer partial results, of fewer rows.
    """
    consumers = 2 if num_kv_heads % 2 == 0 and head_dim <= 128 else 1
    group_size = num_heads // num_kv_heads
    fitting = [
        n
        for n in (4, 2, 1)
        if num_kv_heads // consumers % n == 0 and (n * group_size <= ROWS or n == 1)
    ]
    enough = mosaic_gpu.num_sms() * 9 // 10
    heads = next(
        (n for n in fitting if num_seqs * (num_kv_heads // (consumers * n)) >= enough), fitting[-1]
    )
    geometry = Geometry(
        num_kv_heads=num_kv_heads,
        group_size=group_size,
        head_dim=head_dim,
        block_size=block_size,
        dtype=jnp.dtype(dtype),
        consumers=consumers,
        heads=heads,
        stages=2,
    )
    # 128 KB in flight on every multiprocessor are enough for the full bandwidth; more only costs.
    if stages is None:
        stages = min(max(2, (128 * 1024) // geometry.stage_bytes), 8)
        stages = min(stages, (META_WIDTH - META_FIELDS) // geometry.blocks)
    return dataclasses.replace(geometry, stages=stages)


def unsupported_reasons(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: jax.typing.DTypeLike,
) -> list[str]:
    """Why the kernel cannot serve a problem; empty if it can."""
    reasons = []
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        reasons.append(f"dtype must be bfloat16 or float16, got {jnp.dtype(dtype)}")
    if head_dim not in (64, 80, 96, 128, 256):
        reasons.append(f"head_dim must be 64, 80, 96, 128 or 256, got {head_dim}")
    if block_size < 16:
        reasons.append(f"block_size must be at least 16, got {block_size}")
    if not reasons:
        geometry = choose_geometry(num_heads, num_kv_heads, head_dim, block_size, dtype)
        if geometry.padded_rows > ROWS:
            reasons.append(
                f"a tile of {ROWS} rows must hold the query heads of {geometry.heads} kv heads, "
                f"got {geometry.query_rows}"
            )
    return reasons


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["programs", "seqs", "sizes", "arrivals", "merges"],
    meta_fields=["geometry"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeSchedule:
    """Who walks which part of the context; the same for all layers of a step.

    Attributes:
        programs: a row a program, with all that its first loads need: stages to walk, parts of
            sequences (segments) among them, index of the first sequence, its head group, the stage
            it starts at, its token, length and first stage, and the first block ids.
        seqs: a row a decoding sequence: its row in the block tables, its token, its context length,
            the first stage of its context (0 without a sliding window), and how many stages of the
            sequences before it are laid out before that one.
        sizes: tokens of the batch that belong to a sequence, and stages of a program's run.
        arrivals: zeros, a counter a program and consumer; the kernel leaves zeros behind.
        merges: a row a sequence and head group that may have been cut, for `mosaic_gpu_combine`;
            None where the programs merge themselves.
        geometry: static.
    """

    programs: Int32[Array, " programs_x_META_WIDTH"]
    seqs: Int32[Array, " seqs_x_INFO_WIDTH"]
    sizes: Int32[Array, " 2"]
    arrivals: Int32[Array, " programs_x_consumers"]
    merges: Int32[Array, " merges_x_MERGE_WIDTH"] | None
    geometry: Geometry

    @property
    def expected_parts(self) -> int:
        """About how many partial results a context has that is cut."""
        return _expected_parts(
            self.programs.shape[0] // META_WIDTH,
            (self.seqs.shape[0] // INFO_WIDTH - 1) * self.geometry.head_groups,
        )


def _expected_parts(programs: int, units: int) -> int:
    return -(-programs // max(units, 1)) + 1


def make_schedule(
    block_tables: Int32[Array, "num_seqs max_blocks"],
    seq_lens: Int32[Array, " num_seqs"],
    query_start_loc: Int32[Array, " num_seqs_plus_1"],
    geometry: Geometry,
    *,
    sliding_window: int | None = None,
    num_programs: int | None = None,
    min_stages: int = 2,
    merge_inside: bool | None = None,
) -> DecodeSchedule:
    """The schedule of a step, in a few small XLA kernels.

    Args:
        block_tables: As `paged_attention`.
        seq_lens: As `paged_attention`.
        query_start_loc: As `paged_attention`.
        geometry: From `choose_geometry`.
        sliding_window: As `paged_attention`.
        num_programs: Programs to launch; one a multiprocessor if None.
        min_stages: The fewest stages worth a program of its own.
        merge_inside: Whether the programs merge partial results themselves; where few are expected
            if None.
    """
    programs = num_programs or mosaic_gpu.num_sms()
    slots, groups = geometry.slots, geometry.head_groups
    num_seqs = block_tables.shape[0]
    lens = jnp.where(query_start_loc[1:] - query_start_loc[:-1] == 1, seq_lens, 0)
    # Decodes first, in order, and nothing between them.
    index = jnp.arange(num_seqs, dtype=jnp.int32)
    rank = _running_sum(lens > 0)
    table_row = (rank[None, :] <= index[:, None]).sum(-1, dtype=jnp.int32)
    table_row = jnp.minimum(table_row, num_seqs - 1)
    token = query_start_loc[table_row]
    lens = jnp.where(index < rank[-1], lens[table_row], 0)
    last = -(-lens // slots)
    first = jnp.zeros_like(lens)
    if sliding_window is not None:
        first = jnp.maximum(lens - sliding_window, 0) // slots
    length = last - first  # stages of each sequence and head group
    end = _running_sum(length * groups)
    start = end - length * groups
    total = end[-1]

    c = jnp.arange(programs + 1, dtype=jnp.int32)
    # Whole stages a program: the longest run is not longer for it, and there are fewer cuts.
    share = jnp.maximum(-(-total // programs), min_stages)
    cut = jnp.minimum(c * share, total)

    def place(position):
        """Sequence, head group and stage at each position of the laid out context."""
        seq = (end <= position[..., None]).sum(-1, dtype=jnp.int32)
        seq = jnp.minimum(seq, num_seqs - 1)
        within = position - start[seq]
        stages = jnp.maximum(length[seq], 1)
        return seq, within // stages, first[seq] + within % stages

    count = cut[1:] - cut[:-1]
    seq, group, stage = place(cut[:-1])
    last_seq, last_group, _ = place(cut[1:] - 1)
    segments = (last_seq - seq) * groups + last_group - group + 1
    segments = jnp.where(count > 0, segments, 0)
    ahead = cut[:-1, None] + jnp.arange(geometry.stages, dtype=jnp.int32)
    ids = _block_ids(block_tables, table_row, *place(ahead)[::2], geometry)
    fields = [count, segments, seq, group, stage, token[seq], lens[seq], first[seq]]
    meta = jnp.concatenate([jnp.stack(fields, 1), ids.reshape(programs, -1)], axis=1)
    meta = jnp.pad(meta, ((0, 0), (0, META_WIDTH - meta.shape[1])))
    info = jnp.stack([table_row, token, lens, first, start], 1)
    if merge_inside is None:
        merge_inside = _expected_parts(programs, num_seqs * groups) <= MAX_PARTS_INSIDE
    merges = None if merge_inside else _merges(cut, start, length, first, token, groups, place)
    return DecodeSchedule(
        programs=meta.reshape(-1),
        seqs=jnp.pad(info.reshape(-1), (0, INFO_WIDTH)),
        sizes=jnp.stack([query_start_loc[-1], share]),
        arrivals=jnp.zeros(programs * geometry.consumers, jnp.int32),
        merges=merges,
        geometry=geometry,
    )


def _running_sum(x):
    """`jnp.cumsum` of a few numbers: one kernel, where XLA's has four."""
    index = jnp.arange(x.shape[0])
    return jnp.where(index <= index[:, None], x, 0).sum(-1, dtype=jnp.int32)


def _merges(cut, start, length, first, token, groups, place):
    """The rows of `DecodeSchedule.merges`."""
    num_seqs, programs = start.shape[0], cut.shape[0] - 1
    by_unit = num_seqs * groups < programs or programs == 1
    if by_unit:  # a candidate is a sequence and head group
        unit = jnp.arange(num_seqs * groups, dtype=jnp.int32)
        begin = start[unit // groups] + unit % groups * length[unit // groups]
    else:  # a candidate is a cut; it merges if it is the first one inside its sequence
        inside, inside_group, inside_stage = place(cut[1:-1])
        unit = inside * groups + inside_group
        begin = cut[1:-1] - (inside_stage - first[inside])
    unit_seq, unit_group = unit // groups, unit % groups
    stop = begin + length[unit_seq]
    # Programs whose run begins inside the unit, its own beginning aside.
    first_inside = (cut[:-1] <= begin[:, None]).sum(-1, dtype=jnp.int32)
    num_inside = (cut[:-1] < stop[:, None]).sum(-1, dtype=jnp.int32) - first_inside
    owner = first_inside - 1
    parts = jnp.where(num_inside > 0, num_inside + 1, 0)
    if not by_unit:
        c = jnp.arange(1, programs, dtype=jnp.int32)
        parts = jnp.where((first_inside == c) & (cut[1:-1] > begin), parts, 0)
    # A program's first segment has its slot c, any other that is cut has slot `programs + c`.
    slot = owner + jnp.where(cut[jnp.maximum(owner, 0)] < begin, programs, 0)
    none = jnp.zeros_like(parts)
    fields = [parts, token[unit_seq], unit_group, slot, first_inside, none, none, none]
    return jnp.stack(fields, 1).reshape(-1)


def _block_ids(block_tables, table_row, seq, stage, geometry):
    """Ids of the blocks of a stage, `[..., blocks]`; the last one again past a table's end."""
    at = stage[..., None] * geometry.slots // geometry.block_size
    at = at + jnp.arange(geometry.blocks, dtype=jnp.int32)
    at = jnp.minimum(at, block_tables.shape[1] - 1)
    return block_tables[table_row[seq][..., None], at]
