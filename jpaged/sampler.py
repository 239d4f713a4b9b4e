"""The jitted sampler: logits -> one token a row, for all sampling parameters at once.

One program serves every mix of parameters: they are traced values, and each feature sits under a
`lax.cond` that runs only if some row of the step uses it. The vocabulary is never sorted. A row's
result depends on its own logits, parameters and state only, never on its neighbours; its random
draw depends only on (seed, sequence index, position).

Order of processing, as vLLM: logit bias with allowed and banned tokens, the mask of structured
output, penalties, temperature, min_p, top_k, top_p. Logprobs are those of the logits before any of
it.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.models.sharding import RowShare
from jpaged.sampling_params import GREEDY_EPSILON
from jpaged.sampling_rows import Column
from jpaged.structured_outputs import mask_width
from jpaged.token_choice import argmax, choose, draw, kept_weights, top_k, uniforms


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingInputs:
    """What one step needs to know of its S rows; see `unpack_sampling_inputs`.

    `samples` is False for rows whose token is not wanted (padding, unfinished prefill): nothing is
    stored for them and their results mean nothing. `rows` are their rows in `SamplerState`.
    `position` is the index of the token being sampled, `input_token` the token before it. A token
    of `ban_tokens` (-1: unused) is banned if `ban_if_last` is -1 or equals `input_token`.
    """

    temperature: jax.Array  # f32[S]
    top_p: jax.Array  # f32[S]
    min_p: jax.Array  # f32[S]
    presence_penalty: jax.Array  # f32[S]
    frequency_penalty: jax.Array  # f32[S]
    repetition_penalty: jax.Array  # f32[S]
    top_k: jax.Array  # i32[S], 0 = all
    seed: jax.Array  # u32[S, 2]
    seq_index: jax.Array  # i32[S]
    num_logprobs: jax.Array  # i32[S], -1 = none
    has_bias: jax.Array  # bool[S]
    has_mask: jax.Array  # bool[S]
    position: jax.Array  # i32[S]
    rows: jax.Array  # i32[S]
    input_token: jax.Array  # i32[S]
    samples: jax.Array  # bool[S]
    ban_tokens: jax.Array  # i32[S, M]
    ban_if_last: jax.Array  # i32[S, M]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerState:
    """What the sampler keeps of R sequences between steps; donated through them.

    Only `last_tokens` is kept for every sequence. A row of the others must be initialised by
    `init_row` before a sequence that needs it (`RequestSampling.needs_state`) is first sampled, and
    a row of `allowed` be written before each token of structured output.
    """

    last_tokens: jax.Array  # i32[R], the token sampled last
    output_counts: jax.Array  # i32[R, V], occurrences of each token in the output
    prompt_mask: jax.Array  # bool[R, V], whether the prompt has the token
    bias: jax.Array  # f32[R, V], added to the logits
    allowed: jax.Array  # i32[R, W], a bit for each token that structured output allows

    @classmethod
    def zeros(cls, num_rows: int, vocab_size: int) -> "SamplerState":
        """Returns the state of `num_rows` rows that nothing was sampled for."""
        shape = (num_rows, vocab_size)
        return cls(
            last_tokens=jnp.zeros(num_rows, jnp.int32),
            output_counts=jnp.zeros(shape, jnp.int32),
            prompt_mask=jnp.zeros(shape, jnp.bool_),
            bias=jnp.zeros(shape, jnp.float32),
            allowed=jnp.zeros((num_rows, mask_width(vocab_size)), jnp.int32),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Logprobs of N given tokens and of the most likely ones in their place.

    `rank` is one more than the number of tokens strictly more likely than the given one. Without
    logprobs (`max_logprobs=0`) all values are zero and the last axis of the others is empty.
    """

    logprobs: jax.Array  # f32[N]
    ranks: jax.Array  # i32[N]
    top_token_ids: jax.Array  # i32[N, max_logprobs]
    top_logprobs: jax.Array  # f32[N, max_logprobs]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerOutput:
    """The sampled tokens and, where asked for, their logprobs (see `TokenLogprobs`).

    Top logprobs of a row beyond the number it asked for mean nothing.
    """

    tokens: jax.Array  # i32[S]
    logprobs: jax.Array  # f32[S]
    ranks: jax.Array  # i32[S]
    top_token_ids: jax.Array  # i32[S, max_logprobs]
    top_logprobs: jax.Array  # f32[S, max_logprobs]


def unpack_sampling_inputs(
    packed_rows: jax.Array,
    position: jax.Array,
    rows: jax.Array,
    input_token: jax.Array,
    samples: jax.Array,
    ban_tokens: jax.Array,
    ban_if_last: jax.Array,
) -> SamplingInputs:
    """Returns the step's inputs from rows of `sampling_rows.empty_rows` and what changes a step.

    Args:
        packed_rows: i32[S, NUM_COLUMNS].
        position: i32[S].
        rows: i32[S].
        input_token: i32[S].
        samples: bool[S] or i32[S].
        ban_tokens: i32[S, M].
        ban_if_last: i32[S, M].
    """

    def as_float(column: Column) -> jax.Array:
        return lax.bitcast_convert_type(packed_rows[:, column], jnp.float32)

    seed = packed_rows[:, Column.SEED_LOW : Column.SEED_HIGH + 1]
    return SamplingInputs(
        temperature=as_float(Column.TEMPERATURE),
        top_p=as_float(Column.TOP_P),
        min_p=as_float(Column.MIN_P),
        presence_penalty=as_float(Column.PRESENCE_PENALTY),
        frequency_penalty=as_float(Column.FREQUENCY_PENALTY),
        repetition_penalty=as_float(Column.REPETITION_PENALTY),
        top_k=packed_rows[:, Column.TOP_K],
        seed=lax.bitcast_convert_type(seed, jnp.uint32),
        seq_index=packed_rows[:, Column.SEQ_INDEX],
        num_logprobs=packed_rows[:, Column.NUM_LOGPROBS],
        has_bias=packed_rows[:, Column.HAS_BIAS] != 0,
        has_mask=packed_rows[:, Column.HAS_MASK] != 0,
        position=position,
        rows=rows,
        input_token=input_token,
        samples=samples.astype(jnp.bool_),
        ban_tokens=ban_tokens,
        ban_if_last=ban_if_last,
    )


def init_row(
    state: SamplerState,
    row: jax.Array,
    token_ids: jax.Array,
    num_prompt_tokens: jax.Array,
    bias_token_ids: jax.Array,
    bias_values: jax.Array,
    only_listed: jax.Array,
) -> SamplerState:
    """Clears one row and fills it for a sequence that is admitted or resumed.

    Args:
        state: the state to update.
        row: i32[].
        token_ids: i32[L], prompt and output so far, padded with -1.
        num_prompt_tokens: i32[], how many of them are the prompt.
        bias_token_ids: i32[E], padded with -1.
        bias_values: f32[E].
        only_listed: bool[], whether tokens not in `bias_token_ids` are banned.
    """
    vocab_size = state.bias.shape[1]
    is_prompt = jnp.arange(token_ids.shape[0], dtype=jnp.int32) < num_prompt_tokens
    # Negative indices would wrap: an index past the end is dropped.
    token_ids = jnp.where(token_ids < 0, vocab_size, token_ids)
    prompt = jnp.where(is_prompt, token_ids, vocab_size)
    output = jnp.where(is_prompt, vocab_size, token_ids)
    bias_token_ids = jnp.where(bias_token_ids < 0, vocab_size, bias_token_ids)
    counts = jnp.zeros(vocab_size, jnp.int32).at[output].add(1, mode="drop")
    mask = jnp.zeros(vocab_size, jnp.bool_).at[prompt].set(True, mode="drop")
    base = jnp.where(only_listed, -jnp.inf, 0.0).astype(jnp.float32)
    bias = jnp.full(vocab_size, base).at[bias_token_ids].set(bias_values, mode="drop")
    return dataclasses.replace(
        state,
        output_counts=state.output_counts.at[row].set(counts),
        prompt_mask=state.prompt_mask.at[row].set(mask),
        bias=state.bias.at[row].set(bias),
    )


def sample(
    logits: jax.Array,
    inputs: SamplingInputs,
    state: SamplerState,
    *,
    max_logprobs: int,
    share: RowShare | None = None,
) -> tuple[SamplerOutput, SamplerState]:
    """Returns one token a row, and the state with these tokens counted and stored.

    Args:
        logits: f32[S, V]; with a share its rows only.
        inputs: the step's S rows.
        state: donate it.
        max_logprobs: static; width of the top logprobs, 0 to compute no logprobs.
        share: the rows that this device samples, if not all.
    """
    own = inputs if share is None else share.of(inputs)
    output = _choose(logits.astype(jnp.float32), own, state, max_logprobs)
    if share is not None:
        output = share.gathered(output)
    counted_rows = jnp.where(_penalised(inputs), inputs.rows, state.last_tokens.shape[0])
    counts = state.output_counts.at[counted_rows, output.tokens].add(1, mode="drop")
    return output, dataclasses.replace(_stored(output.tokens, inputs, state), output_counts=counts)


def _choose(
    logits: jax.Array, inputs: SamplingInputs, state: SamplerState, max_logprobs: int
) -> SamplerOutput:
    biased = inputs.samples & inputs.has_bias
    masked = inputs.samples & inputs.has_mask
    bans = _active_bans(inputs)
    penalised = _penalised(inputs)
    random = inputs.samples & (inputs.temperature >= GREEDY_EPSILON)

    def process(logits: jax.Array) -> jax.Array:
        x = _if_any(biased, partial(_add_bias, biased, inputs, state), logits)
        x = _if_any(masked, partial(_mask, masked, inputs, state, logits), x)
        x = _if_any(bans, partial(_ban, bans, inputs), x)
        return _if_any(penalised, partial(_penalise, penalised, inputs, state), x)

    def choose(x: jax.Array) -> jax.Array:
        return lax.cond(random.any(), partial(_draw, random, inputs), argmax, x)

    # Two branches, so that logits which need no processing are not copied.
    processed = biased.any() | masked.any() | bans.any() | penalised.any()
    tokens = lax.cond(processed, lambda x: choose(process(x)), choose, logits)

    num_logprobs = jnp.where(inputs.samples, inputs.num_logprobs, -1)
    found = _logprobs_if_asked(logits, tokens, num_logprobs, max_logprobs)
    return SamplerOutput(
        tokens=tokens,
        logprobs=found.logprobs,
        ranks=found.ranks,
        top_token_ids=found.top_token_ids,
        top_logprobs=found.top_logprobs,
    )


def sample_plain(
    logits: jax.Array,
    inputs: SamplingInputs,
    state: SamplerState,
    share: RowShare | None = None,
) -> tuple[jax.Array, SamplerState]:
    """Returns one token a row, i32[S], and the state with them stored.

    What `sample` does, without its conditions, for rows that take the most likely token or draw
    from all of them and ask for nothing else (`RequestSampling.is_plain`).

    Args:
        logits: f32[S, V]; with a share its rows only.
        inputs: the step's S rows.
        state: donate it.
        share: the rows that this device samples, if not all.
    """
    x = logits.astype(jnp.float32)
    own = inputs if share is None else share.of(inputs)
    random = own.samples & (own.temperature >= GREEDY_EPSILON)
    temperature = jnp.where(random, own.temperature, 1.0)
    numbers = uniforms(own.seed, own.seq_index, own.position)
    tokens = choose(x, temperature, random, numbers)
    if share is not None:
        tokens = share.gathered(tokens)
    return tokens, _stored(tokens, inputs, state)


def _stored(tokens: jax.Array, inputs: SamplingInputs, state: SamplerState) -> SamplerState:
    num_rows = state.last_tokens.shape[0]
    sampled_rows = jnp.where(inputs.samples, inputs.rows, num_rows)  # past the end: dropped
    last_tokens = state.last_tokens.at[sampled_rows].set(tokens, mode="drop")
    return dataclasses.replace(state, last_tokens=last_tokens)


def token_logprobs(logits: jax.Array, token_ids: jax.Array, *, max_logprobs: int) -> TokenLogprobs:
    """Returns the logprobs of given tokens, as for the next tokens of a prompt.

    Args:
        logits: f32[N, V].
        token_ids: i32[N].
        max_logprobs: static; number of most likely tokens to return for each of the N.
    """
    num_logprobs = jnp.full(token_ids.shape, max_logprobs, jnp.int32)
    return _logprobs(logits.astype(jnp.float32), token_ids, num_logprobs, max_logprobs)


def _if_any(flags: jax.Array, function, x: jax.Array) -> jax.Array:
    return lax.cond(flags.any(), function, lambda x: x, x)


def _rows_of(array: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns `array[rows]`, [S, V] of [R, V], for rows that exist.

    As slices: for rows as an index the TPU compiler copies all of the array into fast memory
    first, and takes two seconds to say how.
    """
    return jax.vmap(lambda row: lax.dynamic_index_in_dim(array, row, keepdims=False))(rows)


def _penalised(inputs: SamplingInputs) -> jax.Array:
    """Returns bool[S]: which rows have a penalty."""
    return inputs.samples & (
        (inputs.presence_penalty != 0.0)
        | (inputs.frequency_penalty != 0.0)
        | (inputs.repetition_penalty != 1.0)
    )


def _active_bans(inputs: SamplingInputs) -> jax.Array:
    """Returns bool[S, M]: which of the bans hold."""
    holds = (inputs.ban_if_last < 0) | (inputs.ban_if_last == inputs.input_token[:, None])
    return inputs.samples[:, None] & (inputs.ban_tokens >= 0) & holds


def _add_bias(
    biased: jax.Array, inputs: SamplingInputs, state: SamplerState, x: jax.Array
) -> jax.Array:
    return jnp.where(biased[:, None], x + _rows_of(state.bias, inputs.rows), x)


def _mask(
    masked: jax.Array, inputs: SamplingInputs, state: SamplerState, logits: jax.Array, x: jax.Array
) -> jax.Array:
    """Bans what structured output does not allow; what left a row no token before gives way."""
    words = _rows_of(state.allowed, inputs.rows)
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    allowed = bits.reshape(words.shape[0], -1)[:, : x.shape[1]] != 0
    y = jnp.where(allowed, x, -jnp.inf)
    is_left = (y.max(axis=1) > -jnp.inf)[:, None]
    y = jnp.where(is_left, y, jnp.where(allowed, logits, -jnp.inf))
    return jnp.where(masked[:, None], y, x)


def _ban(bans: jax.Array, inputs: SamplingInputs, x: jax.Array) -> jax.Array:
    """Bans tokens; a row that would have no token left keeps them all."""
    num_rows, vocab_size = x.shape
    rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    tokens = jnp.where(bans, inputs.ban_tokens, vocab_size)  # past the end: dropped
    banned = x.at[rows, tokens].set(-jnp.inf, mode="drop")
    return jnp.where((banned.max(axis=1) > -jnp.inf)[:, None], banned, x)


def _penalise(
    penalised: jax.Array, inputs: SamplingInputs, state: SamplerState, x: jax.Array
) -> jax.Array:
    counts = _rows_of(state.output_counts, inputs.rows)
    in_output = counts > 0
    in_prompt = _rows_of(state.prompt_mask, inputs.rows)
    repeated = in_output | in_prompt
    repetition = inputs.repetition_penalty[:, None]
    y = jnp.where(repeated, jnp.where(x > 0, x / repetition, x * repetition), x)
    y = y - inputs.frequency_penalty[:, None] * counts.astype(jnp.float32)
    y = y - inputs.presence_penalty[:, None] * in_output.astype(jnp.float32)
    return jnp.where(penalised[:, None], y, x)


def _draw(random: jax.Array, inputs: SamplingInputs, x: jax.Array) -> jax.Array:
    """Returns a random token for the rows of `random` and the most likely one for the others."""
    weights = kept_weights(
        x,
        jnp.where(random, inputs.temperature, 1.0),
        jnp.where(random, inputs.min_p, 0.0),
        jnp.where(random, inputs.top_k, 0),
        jnp.where(random, inputs.top_p, 1.0),
    )
    drawn = draw(weights, uniforms(inputs.seed, inputs.seq_index, inputs.position))
    return jnp.where(random, drawn, argmax(x))


def _no_logprobs(num_rows: int, max_logprobs: int) -> TokenLogprobs:
    return TokenLogprobs(
        logprobs=jnp.zeros(num_rows, jnp.float32),
        ranks=jnp.zeros(num_rows, jnp.int32),
        top_token_ids=jnp.zeros((num_rows, max_logprobs), jnp.int32),
        top_logprobs=jnp.zeros((num_rows, max_logprobs), jnp.float32),
    )


def _logprobs_if_asked(
    logits: jax.Array, tokens: jax.Array, num_logprobs: jax.Array, max_logprobs: int
) -> TokenLogprobs:
    num_rows = tokens.shape[0]
    if not max_logprobs:
        return _no_logprobs(num_rows, 0)
    return lax.cond(
        (num_logprobs >= 0).any(),
        lambda: _logprobs(logits, tokens, num_logprobs, max_logprobs),
        lambda: _no_logprobs(num_rows, max_logprobs),
    )


def _logprobs(
    logits: jax.Array, tokens: jax.Array, num_logprobs: jax.Array, max_logprobs: int
) -> TokenLogprobs:
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    normaliser = jax.nn.logsumexp(logits, axis=1, keepdims=True)
    none = _no_logprobs(tokens.shape[0], max_logprobs)
    top_logits, top_token_ids = lax.cond(
        (num_logprobs > 0).any(),
        lambda: top_k(logits, max_logprobs),
        lambda: (none.top_logprobs, none.top_token_ids),
    )
    return TokenLogprobs(
        logprobs=(chosen - normaliser)[:, 0],
        ranks=1 + (logits > chosen).sum(axis=1, dtype=jnp.int32),
        top_token_ids=top_token_ids,
        top_logprobs=top_logits - normaliser,
    )
