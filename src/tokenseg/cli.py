"""The command line: parsing, the command's work, printing, exit codes.

Results go to stdout, progress and logs to stderr. Exit code 0: done; 1: done, but some cases failed; 2: the request
cannot be met, said in one line; 130: interrupted; 141: whoever read the results went away, as `head` does. Nothing
heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import os
import sys
from itertools import takewhile
from typing import Any

import tyro

from tokenseg.about import NOTICE
from tokenseg.commands.benchmark import Benchmark
from tokenseg.commands.check import Check
from tokenseg.commands.demo import Demo
from tokenseg.commands.evaluate import Evaluate
from tokenseg.commands.info import Info
from tokenseg.commands.segment import Segment
from tokenseg.commands.synthetic import Synthetic
from tokenseg.commands.terminal import say
from tokenseg.commands.tokens import Tokens
from tokenseg.commands.train import Train
from tokenseg.errors import ConfigError, TokenSegError

COMMANDS: dict[str, Any] = {
    "demo": Demo,
    "check": Check,
    "train": Train,
    "segment": Segment,
    "evaluate": Evaluate,
    "tokens": Tokens,
    "info": Info,
    "synthetic": Synthetic,
    "benchmark": Benchmark,
}
_RENAMED = {"cohort": "synthetic"}
"""Commands by their earlier names, which scripts may still hold."""
_DESCRIPTION = f"3D medical image segmentation on the computer you have. {NOTICE} --version prints the version."


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _with_todays_name(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _run(arguments)
        finally:
            # What is still buffered would fail at exit, where nothing can be said of it.
            sys.stdout.flush()
    except TokenSegError as error:
        say(f"error: {error}")
        return 2
    except BrokenPipeError:
        _give_up_stdout()
        return 141
    except OSError as error:
        # What the library does not foresee: a folder that may not be listed, an unplugged disk.
        say(f"error: {error.filename or 'a file'}: {error.strerror or error}")
        _give_up_stdout()
        return 2
    except KeyboardInterrupt:
        say(f"interrupted; {_how_to_go_on(arguments)}")
        return 130


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        from tokenseg.about import __version__

        print(f"tokenseg {__version__}")
        return 0
    _check_given_once(arguments)
    try:
        command: Any = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="tokenseg",
            description=_DESCRIPTION,
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except ImportError as error:
        # The parser draws completion for some shells itself, and leaves the others to a package it does not require.
        if "shtab" not in str(error):
            raise
        raise ConfigError("completion is for bash, zsh and fish; for tcsh, pip install shtab first") from error
    return int(command.execute())


def _with_todays_name(arguments: list[str]) -> list[str]:
    """The same request, with a note where the command is given by an earlier name."""
    given = arguments[0] if arguments else ""
    if given not in _RENAMED:
        return arguments
    say(f"note: `tokenseg {given}` is now called `tokenseg {_RENAMED[given]}`")
    return [_RENAMED[given], *arguments[1:]]


def _check_given_once(arguments: list[str]) -> None:
    """The parser would take the last one, and forget the others without a word."""
    options = takewhile(lambda word: word != "--", arguments)
    names = [name.split("=")[0].replace("_", "-") for name in options if name.startswith("--")]
    for name in names:
        if names.count(name) > 1 and name != "--help":
            raise ConfigError(f"{name} is given {names.count(name)} times; give it once")


def _give_up_stdout() -> None:
    """Where the results cannot be printed, keep Python from trying again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _how_to_go_on(arguments: list[str]) -> str:
    if arguments[:1] == ["train"]:
        return "go on with the same command and --resume"
    going_on = arguments[:1] in (["demo"], ["synthetic"]) or arguments[:2] == ["benchmark", "accuracy"]
    return "go on with the same command" if going_on else "files written so far are complete"
