"""From the command line to a run: options, configuration files, and errors in one line."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentError, ArgumentParser, DefaultHelpFormatter

from dnw_graph.errors import InputError
from dnw_graph.stopping import Stopped
from dnw_graph.training.options import ModelOptions, RunOptions, flag
from dnw_graph.training.run import run

BAD_INPUT = 2

# Said by Lightning where it does not apply here, or is of no use to whoever runs an example.
NOISE = (
    "The '.*_dataloader' does not have many workers",
    "You're resuming from a checkpoint that ended before the epoch ended",
    "It is recommended to use .* when logging on epoch level in distributed",
    "Experiment logs directory .* exists and is not empty",
    "Detected call of `lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)


class ConfigFile(ActionConfigFile):
    """Reads a file with options, which must be one that ends."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Take the options of a file."""
        if not os.path.isfile(values):
            raise InputError(f"--config is {values!r}: expected a YAML file")
        super().__call__(parser, namespace, values, option_string)


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description as they are."""


def main(description: str, models: type[ModelOptions], defaults: RunOptions, argv: Sequence[str] | None = None) -> int:
    """Run an example from its command line.

    Args:
        description: What the example does, for ``--help``.
        models: The options that are the example's own, and how they make a model.
        defaults: Default values of the options that all examples share.
        argv: Arguments, if not those of the process.

    Returns:
        The exit status: 0; 2 after one line on stderr for input that cannot be used; 130 if the run was stopped by
        Ctrl-C and 143 if by SIGTERM, after one line that says how to go on.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    try:
        values = _values(description, models, defaults, argv)
        model_options = models(**{f.name: values[f.name] for f in fields(models)})
        options = RunOptions(**{f.name: values[f.name] for f in fields(RunOptions)})
        run(model_options.create, model_options.identity(), options)
    except (InputError, ArgumentError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except Stopped as stopped:
        return int(stopped.code or 0)
    return 0


def _values(
    description: str, models: type[ModelOptions], defaults: RunOptions, argv: Sequence[str] | None
) -> dict[str, Any]:
    parser = _parser(description, models, defaults)
    try:
        return vars(parser.parse_args(argv))
    except (InputError, ArgumentError):
        raise
    except Exception as error:  # what users write can fail anywhere in the parsers of YAML and of types
        raise InputError(
            f"the options cannot be read ({type(error).__name__}: {error}): give values as --help says, and with "
            "--config a YAML file of them"
        ) from error


def _parser(description: str, models: type[ModelOptions], defaults: RunOptions) -> ArgumentParser:
    parser = ArgumentParser(
        description=description, exit_on_error=False, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.add_argument("--config", action=ConfigFile, help="YAML file with any of these options; later ones win")
    for group, options, default in (("model", models, models()), ("run", RunOptions, defaults)):
        arguments = parser.add_argument_group(group)
        types = get_type_hints(options)
        for f in fields(options):
            kind: dict[str, Any] = {"type": types[f.name]}
            if types[f.name] is bool:
                kind = {"action": ActionYesNo(yes_prefix="", no_prefix="no-")}
            arguments.add_argument(flag(f.name), default=getattr(default, f.name), help=f.metadata["help"], **kind)
    return parser


def one_line(error: Exception) -> str:
    """Return the message of an error in one line."""
    text = str(error).strip()
    if isinstance(error, InputError):
        return text
    # jsonargparse: 'Parser key "batch_size":\n  Expected a <class 'int'>. Got value: x'
    text = re.sub(r'Parser key "(\w+)":', lambda match: f"{flag(match[1])}:", text)
    text = re.sub(r"Expected a <class '(\w+)'>\. Got value:", r"expected \1, got", " ".join(text.split()))
    return str(InputError(text))
