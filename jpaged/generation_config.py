"""The sampling that a model's makers recommend: defaults of requests, from its generation config.

Host only: no JAX here.
"""

import logging
from pathlib import Path
from typing import Any

from jpaged.models.sources import read_json
from jpaged.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

FILE_NAME = "generation_config.json"
FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What is read, by the names of `SamplingParams`. As in vLLM `do_sample` is not."""


def read_default_sampling(source: Path) -> dict[str, Any]:
    """Fields of `SamplingParams` that a model's generation config sets.

    One that is out of range is left out with a warning: it is the model's fault, not a request's.

    Args:
        source: Directory of the model, or its config.json; any other file has none.

    Raises:
        ValueError: The file is not JSON.
    """
    if source.is_file() and source.suffix != ".json":
        return {}
    file = source.with_name(FILE_NAME) if source.is_file() else source / FILE_NAME
    raw = read_json(file)
    found = {}
    for name in FIELDS:
        if raw.get(name) is None:
            continue
        try:
            SamplingParams(**{name: raw[name]})
        except ValueError as error:
            logger.warning("%s: %s; it is ignored", file, error)
        else:
            found[name] = raw[name]
    return found
