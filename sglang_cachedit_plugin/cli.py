"""The command ``sglang-cachedit``."""

from __future__ import annotations

import argparse


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="sglang-cachedit", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo_model(commands)
    args = parser.parse_args(argv)
    return int(args.run(args) or 0)


def _add_demo_model(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo-model", help="print the folder of the embedded demo model")
    parser.set_defaults(run=_demo_model)


def _demo_model(args: argparse.Namespace) -> None:
    from .demo import model_dir

    print(model_dir())
