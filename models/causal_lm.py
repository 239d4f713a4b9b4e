"""What the engine sees of a model: pure functions of parameters, tokens and pools.

The Flax modules are built abstractly and split once; parameters live in a plain tree of dicts and
lists, because JAX flattens those in C++ on every step.
"""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jpaged.models.attention import AttentionMetadata
from jpaged.models.config import ModelConfig
from jpaged.models.registry import resolve_architecture

Params: TypeAlias = dict[str, Any]


class CausalLM:
    """A model without its weights; the weights are the `params` argument of its methods.

    Attributes:
        config: the model's shape.
        dtype: dtype of weights and of the residual stream.
        abstract_params: the parameter tree with a shape and dtype at each leaf.
    """

    def __init__(self, config: ModelConfig, *, dtype: jax.typing.DTypeLike = jnp.float32):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self._family = resolve_architecture(config.architecture)
        self._graphdef, state = nnx.split(
            nnx.eval_shape(lambda: self._family(config, dtype=self.dtype))
        )
        self._treedef = jax.tree.structure(state)
        self.abstract_params: Params = _plain(nnx.to_pure_dict(state))

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

    def logits(
        self, params: Params, hidden: Float[Array, "num_rows hidden_size"]
    ) -> Float[Array, "num_rows vocab_size"]:
        """Returns f32 logits of the given rows of the stream."""
        head = params["embed_tokens" if self.config.tie_word_embeddings else "lm_head"]
        return self._family.project(hidden, head["weight"])


def _plain(tree: Any) -> Any:
    """Returns nested dicts with those keyed 0..n-1 turned into lists."""
    if not isinstance(tree, dict):
        return tree
    if tree and all(isinstance(key, int) for key in tree):
        return [_plain(tree[key]) for key in sorted(tree)]
    return {key: _plain(value) for key, value in tree.items()}
