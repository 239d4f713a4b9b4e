"""What the engine sees of a model: pure functions of parameters, tokens and pools.

The Flax modules are built abstractly and split once; parameters live in a plain tree of dicts and
lists, because JAX flattens those in C++ on every step.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jpaged.models import sharding
from jpaged.models.attention import AttentionMetadata
from jpaged.models.config import ModelConfig
from jpaged.models.registry import resolve_architecture

Params: TypeAlias = dict[str, Any]


class CausalLM:
    """A model without its weights; the weights are the `params` argument of its methods.

    With a `tensor_parallel_size` above 1 the methods are to be called in a `jax.shard_map` over the
    mesh axis `sharding.MODEL_AXIS`, with a device's share of parameters and pools.

    Attributes:
        config: the model's shape.
        dtype: dtype of weights and of the residual stream.
        tensor_parallel_size: devices that hold a share each.
        local_config: the shape of one share.
        abstract_params: the parameter tree with the shape of all shares and a dtype at each leaf.
        param_specs: how each parameter lies over the devices.

    Raises:
        ValueError: The model cannot be cut into so many shares.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        tensor_parallel_size: int = 1,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.tensor_parallel_size = tensor_parallel_size
        self.local_config = sharding.local_config(config, tensor_parallel_size)
        self._axis = sharding.MODEL_AXIS if tensor_parallel_size > 1 else None
        self._family = resolve_architecture(config.architecture)
        share = nnx.eval_shape(
            lambda: self._family(self.local_config, dtype=self.dtype, axis=self._axis)
        )
        self._graphdef, state = nnx.split(share)
        self._treedef = jax.tree.structure(state)
        local = _plain(nnx.to_pure_dict(state))
        self.param_specs: Params = jax.tree_util.tree_map_with_path(
            lambda path, _: sharding.param_spec(path_keys(path)), local
        )
        self.abstract_params: Params = jax.tree.map(self._whole, local, self.param_specs)

    def _whole(
        self, share: jax.ShapeDtypeStruct, spec: jax.sharding.PartitionSpec
    ) -> jax.ShapeDtypeStruct:
        shape = list(share.shape)
        for axis, name in enumerate(spec):
            if name is not None:
                shape[axis] *= self.tensor_parallel_size
        return jax.ShapeDtypeStruct(tuple(shape), share.dtype)

    def hidden_states(
        self,
        params: Params,
        token_ids: Int[Array, "num_tokens"],
        positions: Int[Array, "num_tokens"],
        pools: tuple[Array, ...],
        metadata: AttentionMetadata,
    ) -> tuple[Float[Array, "num_tokens hidden_size"], tuple[Array, ...]]:
        """Returns the stream after the final norm, and the pools with this step's K and V."""
        # Dict keys and list indices flatten in the order of the module's own state.
        state = jax.tree.unflatten(self._treedef, jax.tree.leaves(params))
        model = nnx.merge(self._graphdef, state)
        return model(token_ids, positions, pools, metadata)

    def row_share(self, num_rows: int) -> sharding.RowShare | None:
        """The rows that a device of several should sample; None: all of them."""
        if self._axis is None or num_rows % self.tensor_parallel_size:
            return None
        return sharding.RowShare(self._axis, num_rows // self.tensor_parallel_size)

    def logits(
        self,
        params: Params,
        hidden: Float[Array, "num_rows hidden_size"],
        share: sharding.RowShare | None = None,
    ) -> Float[Array, "num_rows vocab_size"]:
        """Returns f32 logits of the given rows of the stream, or a share of them, over all tokens.

        Args:
            params: The parameters.
            hidden: Rows of the stream.
            share: What of them this device is to have, from `row_share`; None: all.
        """
        head = params["embed_tokens" if self.config.tie_word_embeddings else "lm_head"]
        logits = self._family.project(hidden, head["weight"])
        if self._axis is None:
            return logits
        if share is not None:
            whole = share.exchanged(logits)
        else:
            whole = sharding.gathered_columns(logits, self._axis)
        return whole[:, : self.config.vocab_size]


def path_keys(path: tuple[Any, ...]) -> list[str]:
    """Returns a path of a parameter tree as the names and numbers on it."""
    return [str(getattr(entry, "key", getattr(entry, "idx", ""))) for entry in path]


def _plain(tree: Any) -> Any:
    """Returns nested dicts with those keyed 0..n-1 turned into lists."""
    if not isinstance(tree, dict):
        return tree
    if tree and all(isinstance(key, int) for key in tree):
        return [_plain(tree[key]) for key in sorted(tree)]
    return {key: _plain(value) for key, value in tree.items()}
