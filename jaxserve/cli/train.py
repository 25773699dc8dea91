"""train: train or fine-tune a model as a TOML file says, and write a Hugging Face folder"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this command."""
    parser.add_argument("config", type=Path, help="what to train; models/recipes has examples")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> None:
    """Trains to the last step, from the newest checkpoint on, and prints where the model is."""
    from jaxserve.errors import ConfigError

    try:
        from jaxserve.cli.prepare import prepare
        from jaxserve.train.loop import train
    except ModuleNotFoundError as error:
        raise ConfigError(f"training needs {error.name}: pip install 'jaxserve[train]'") from None
    from jaxserve.plan import default_device
    from jaxserve.train.config import read_config

    config = read_config(args.config)
    default_device()  # raises where there is none
    job = prepare(config)
    print(train(job, progress=not args.quiet and sys.stderr.isatty()))
