"""Commands over the devices of several processes: each runs the same one, and process 0 does it."""

from __future__ import annotations

import argparse
import os

from jaxserve.cli.options import load
from jaxserve.errors import ConfigError

_NAMES = ("coordinator_address", "num_processes", "process_id")


def joined(args: argparse.Namespace) -> int:
    """Joins the other processes, if there are any; the number of this one.

    What an option does not say is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID.

    Raises:
        ConfigError: a part of it is missing.
    """
    given = [getattr(args, name, None) for name in _NAMES]
    able = hasattr(args, "process_id")  # the command serves a model
    if not able or (given == [None] * 3 and not os.environ.get("JAX_COORDINATOR_ADDRESS")):
        return 0
    from sharding import multihost

    try:
        multihost.start(*given)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return multihost.process_id()


def follow(args: argparse.Namespace) -> None:
    """Has its share of the model, and does what process 0 does until that ends."""
    with load(args) as llm:
        llm.follow()
