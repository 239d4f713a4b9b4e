"""Any command on a host of rank above 0: its devices follow the command on the host of rank 0."""

import argparse
import logging

from jpaged.cli import engine, serve

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def is_wanted(args: argparse.Namespace) -> bool:
    """Whether this host has a part in a command that another one leads.

    Raises:
        ValueError: An option is wrong, or the hosts cannot be told apart.
    """
    if not {"nnodes", "node_rank", "master_addr"} & engine.engine_options(args).keys():
        return False
    from jpaged.multihost.location import locate

    config = _config(args)
    return config.nnodes > 1 and locate(config).rank > 0


def run(args: argparse.Namespace) -> int:
    """Follows until the leader ends and returns the exit code."""
    from jpaged.multihost import follow

    logging.basicConfig(level=logging.INFO, format=_FORMAT)
    logging.getLogger("jax").setLevel(logging.WARNING)
    follow(_config(args))
    return 0


def _config(args: argparse.Namespace):
    from jpaged.engine_config import EngineConfig

    is_server = args.command == "serve"
    options = serve.engine_options(args) if is_server else engine.engine_options(args)
    return EngineConfig.from_options(**options)
