"""Model definitions in Flax NNX, their registry, and checkpoint loading. Knows no requests."""

from jpaged.models.attention import AttentionMetadata as AttentionMetadata
from jpaged.models.causal_lm import CausalLM as CausalLM
from jpaged.models.causal_lm import Params as Params
from jpaged.models.config import ModelConfig as ModelConfig
from jpaged.models.loader import DEFAULT_MODEL as DEFAULT_MODEL
from jpaged.models.loader import LoadedModel as LoadedModel
from jpaged.models.loader import OpenedModel as OpenedModel
from jpaged.models.loader import load_model as load_model
from jpaged.models.loader import open_model as open_model
from jpaged.models.registry import ARCHITECTURES as ARCHITECTURES
from jpaged.models.rope import RopeScaling as RopeScaling
