"""From the command line to a run: options, configuration files, and errors in one line."""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentError, ArgumentParser, DefaultHelpFormatter

from dnw_graph.checkpoint import SECTION
from dnw_graph.errors import InputError
from dnw_graph.loading import ModelFile, file_of
from dnw_graph.recipes.models import family_name, names_of
from dnw_graph.recipes.optimizers import OPTIMIZERS
from dnw_graph.recipes.options import ModelOptions, RunOptions, completed, flag
from dnw_graph.stopping import Stopped
from dnw_graph.wirings import WIRINGS

BAD_INPUT = 2
# One file per row of the paper's tables.
TRAINING_ONLY = ("compile", "recompute", "pictures", "wandb", "mlflow")  # Options without effect on an evaluation.
CONFIGS = Path(__file__).parents[1] / "configs"

# Names that other programs use for options of this one.
OTHER_NAMES = {
    "batch": "batch_size",
    "bs": "batch_size",
    "checkpoint": "resume",
    "data_dir": "data",
    "dataset": "data",
    "gpus": "devices",
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "num_workers": "workers",
    "pretrained": "init_from",
    "rule": "wiring",
    "save_dir": "output",
    "sparsity": "density",
    "wd": "weight_decay",
}

# Lightning's warnings that do not apply here, or do not help the user of an example.
NOISE = (
    "The '.*_dataloader' does not have many workers",
    "You're resuming from a checkpoint that ended before the epoch ended",
    "It is recommended to use .* when logging on epoch level in distributed",
    "Experiment logs directory .* exists and is not empty",
    "The epoch parameter in `scheduler.step\\(\\)` was not necessary",  # PyTorch 2.8's SequentialLR
    "Detected call of `lr_scheduler.step\\(\\)` before `optimizer.step\\(\\)`",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)


class ConfigFile(ActionConfigFile):
    """Reads a file with options; it must be a regular file."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Read the options of a file."""
        super().__call__(parser, namespace, str(config_file(values)), option_string)


def config_file(name: str) -> Path:
    """Return the file that ``--config`` names: a user's file, or a configuration of the package by its name.

    Raises:
        InputError: If there is no such file.
    """
    if os.path.isfile(name):
        return Path(name)
    known = {path.stem: path for path in CONFIGS.glob("*.yaml")}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(Path(name).stem, known, n=3, cutoff=0.6)
    hint = f", or a configuration of the package: did you mean {' or '.join(near)}?" if near else ""
    raise InputError(f"--config is {name!r}: expected a YAML file{hint}")


def read_yaml(name: str) -> dict[str, Any]:
    """Return the options in the file that ``--config`` names; none if it is not a mapping, which its reader reports."""
    try:
        content = yaml.safe_load(config_file(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {str(key).replace("-", "_"): value for key, value in content.items()} if isinstance(content, dict) else {}


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description."""


def main(
    description: str,
    models: type[ModelOptions],
    defaults: RunOptions,
    argv: Sequence[str] | None = None,
    file: ModelFile | None = None,
) -> int:
    """Run an example from its command line.

    With ``--resume`` and ``--evaluate`` the options are those in the file. Other options must agree with it, except
    those that may change (``RunOptions.machine``).

    Args:
        description: What the example does, for ``--help``.
        models: The options of the example, which create its model.
        defaults: Default values of the options that all examples share.
        argv: Arguments. Default: those of the process.
        file: The file that they start from, if already read.

    Returns:
        The exit status: 0; 2 after one line on stderr for input that cannot be used; 130 if the run was stopped by
        Ctrl-C and 143 if by SIGTERM, after one line that says how to continue.
    """
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    try:
        own, options, file = read_options(description, models, defaults, argv, file)
        from dnw_graph.training.runs import run  # takes seconds, which --help need not

        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING)
        run(own.create, own.identity(), options, None, family_name(models), file)
    except (InputError, ArgumentError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    except Stopped as stopped:
        return int(stopped.code or 0)
    return 0


def read_options(
    description: str,
    models: type[ModelOptions],
    defaults: RunOptions,
    argv: Sequence[str] | None,
    file: ModelFile | None = None,
) -> tuple[ModelOptions, RunOptions, ModelFile | None]:
    """Return the options of a command line, completed by the file that it names and by defaults; and that file.

    Raises:
        InputError: If an option is unknown or has a value that cannot be used.
    """
    parser = _parser(description, models, defaults)
    try:
        given = vars(parser.parse_args(argv, defaults=False))
    except InputError:
        raise
    except ArgumentError as error:
        if unknown := re.search(r"unrecognized arguments: (-\S+)|Option '(\S+)' is not accepted", str(error)):
            known = [flag(f.name) for cls in (models, RunOptions) for f in fields(cls)]
            raise unknown_option(unknown[1] or flag(unknown[2]), [*known, "--config"]) from error
        raise
    except Exception as error:  # user input can fail anywhere in the parsers of YAML and of types
        raise InputError(
            f"the options cannot be read ({type(error).__name__}: {error}): give values as --help says, and with "
            "--config a YAML file of them"
        ) from error
    if given.get("evaluate"):
        # Only what is typed: the configuration of a run may have them too.
        typed = {word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv)}
        for name in TRAINING_ONLY:
            if flag(name) in typed:
                raise InputError(f"{flag(name)} is for training, not for --evaluate: leave it out")
    started = launched()
    for name, number in started.items():
        if given.get(name, number) != number:
            raise InputError(
                f"{flag(name)} is {given[name]}, but the launcher started {number}: leave {flag(name)} out"
            )
    file = file or started_from(given)
    held = _held(given, models, file) if file else {}
    if file and given.get("evaluate") and "data" not in {**held, **given}:
        raise InputError(f"{file.path} does not name its test images: give them with --data")
    values = {**vars(parser.get_defaults()), **held, **started, **given}
    if "warmup_epochs" not in given and type(values["epochs"]) is int:  # the default depends on the given epochs
        values["warmup_epochs"] = max(0, min(values["warmup_epochs"], values["epochs"] - 1))
    own, run = (cls(**{f.name: values[f.name] for f in fields(cls)}) for cls in (models, RunOptions))
    return own, run, file  # type: ignore[return-value]  # of the two classes


def launched() -> dict[str, int]:
    """Return the devices per machine and the machines started by ``torchrun`` or ``srun``, if any."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here, all_ranks = (int(os.environ[name]) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
        return {"devices": here, "num_nodes": all_ranks // here}
    if "SLURM_STEP_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        all_ranks, machines = (int(os.environ.get(name, "1")) for name in ("SLURM_NTASKS", "SLURM_NNODES"))
        return {"devices": all_ranks // machines, "num_nodes": machines}
    return {}


def started_from(given: Mapping[str, Any]) -> ModelFile | None:
    """Return the file that a run resumes or starts from, or evaluates; None if there is none."""
    paths = {name: given.get(name) for name in ("resume", "evaluate", "init_from")}
    found = [(name, path) for name, path in paths.items() if isinstance(path, str) and path and "\0" not in path]
    return next((ModelFile(Path(path) if name == "resume" else file_of(Path(path))) for name, path in found), None)


def _held(given: Mapping[str, Any], models: type[ModelOptions], file: ModelFile) -> dict[str, Any]:
    """Return the options in a file: all of them to resume a run, those of the model to start one."""
    # Rules and optimisers given by class path must be given again: a file does not decide what is imported.
    known: dict[str, Container[str]] = {"wiring": WIRINGS, "optimizer": OPTIMIZERS}
    held = completed(file.card.options).items()
    options = {name: value for name, value in held if name not in known or value in known[name]}
    if not (given.get("resume") or given.get("evaluate")):
        return {f.name: options[f.name] for f in fields(models) if f.name in options}
    machine = file.checkpoint[SECTION].get("machine", {}) if file.checkpoint else {}
    if given.get("evaluate"):  # on the test images, unless the command line has some held out
        options["held_out"] = 0
        machine = {name: machine[name] for name in ("data",) if name in machine}
    return {**options, **machine}


def unknown_option(option: str, known: list[str]) -> InputError:
    """Return the error for an unknown option, with similar ones.

    Args:
        option: The option, perhaps with ``=`` and a value.
        known: The known flags.
    """
    option = option.partition("=")[0]
    name = option.lstrip("-").replace("-", "_")
    own = flag(OTHER_NAMES.get(name, name))
    near = [own] if own in known else difflib.get_close_matches(flag(name), known, n=2, cutoff=0.75)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return InputError(f"unknown option {option}: {hint}--help lists all")


def _parser(description: str, models: type[ModelOptions], defaults: RunOptions) -> ArgumentParser:
    parser = ArgumentParser(
        description=description, exit_on_error=False, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--config",
        action=ConfigFile,
        help="YAML file with any of these options, or the name of a configuration of the package; later options win",
    )
    for group, options, default in (("model", models, models()), ("run", RunOptions, defaults)):
        arguments = parser.add_argument_group(group)
        types = get_type_hints(options)
        for f in fields(options):
            kind: dict[str, Any] = {"type": types[f.name]}
            if types[f.name] is bool:
                kind = {"action": ActionYesNo(yes_prefix="", no_prefix="no-")}
            arguments.add_argument(flag(f.name), default=getattr(default, f.name), help=f.metadata["help"], **kind)
        if options is models and "model" not in types and (names := names_of(models)):
            arguments.add_argument("--model", choices=names, default=names[0], help="the model")
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
