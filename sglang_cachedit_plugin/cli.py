"""The command ``sglang-cachedit``."""

from __future__ import annotations

import argparse
import json


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="sglang-cachedit", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo_model(commands)
    _add_doctor(commands)
    _add_client(commands)
    _add_schema(commands)
    _add_bench(commands)
    _add_tune(commands)
    args = parser.parse_args(argv)
    return int(args.run(args) or 0)


def _add_demo_model(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo-model", help="print the folder of the embedded demo model")
    parser.add_argument("--video", action="store_true", help="that of the one that makes videos")
    parser.set_defaults(run=_demo_model)


def _demo_model(args: argparse.Namespace) -> None:
    from .demo import model_dir, video_model_dir

    print(video_model_dir() if args.video else model_dir())


def _add_tune(commands: argparse._SubParsersAction) -> None:
    from .tune import options

    options.add_arguments(
        commands.add_parser("tune", help="find the fastest schedule that keeps the quality you name")
    )


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("doctor", help="versions, hooks and settings in force; status 1 if something is wrong")
    parser.add_argument("--config", metavar="FILE", help="a file as --cache-dit-config takes it")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="check the file's sizes and libraries for N ranks")
    parser.add_argument("--model-path", metavar="P", help="also say what of this model would be cached")
    parser.add_argument("--model-id", metavar="ID", help="as SGLang's --model-id, for folders of another name")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import report

    found = report.examine(args.config, args.num_gpus, args.model_path, args.model_id)
    print(json.dumps(found, indent=2) if args.json else "\n".join(report.lines(found)))
    return 0 if found["ok"] else 1


def _add_client(commands: argparse._SubParsersAction) -> None:
    from . import client

    parser = commands.add_parser("client", help="requests to a running server, with time and cache statistics")
    client.add_arguments(parser)
    parser.set_defaults(run=client.run)


def _add_schema(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("schema", help="print the JSON Schema of config files, for editors")
    parser.set_defaults(run=_schema)


def _schema(args: argparse.Namespace) -> None:
    from .config.json_schema import config_schema

    print(json.dumps(config_schema(), indent=1))


def _add_bench(commands: argparse._SubParsersAction) -> None:
    from .bench.options import add_parser

    add_parser(commands)
