"""The command ``sglang-cachedit``."""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import threading
from types import FrameType

from . import __version__
from .errors import CacheDitError, one_line


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for those that are no value."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        named = isinstance(action.default, str | int | float) and not isinstance(action.default, bool)
        return super()._get_help_string(action) if named and "default" not in (action.help or "") else action.help


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status. However it is ended, no process of its own is left behind."""
    in_charge = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminated) if in_charge else None
    try:
        parser = _parser()
        args = parser.parse_args(argv)
        status = int(args.run(args) or 0)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has gone. Nothing may be written at the exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("sglang-cachedit: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except CacheDitError as error:
        print(f"sglang-cachedit: error: {one_line(error)}", file=sys.stderr)
        return 1
    finally:
        if in_charge:
            signal.signal(signal.SIGTERM, before)


def _terminated(number: int, frame: FrameType | None) -> None:
    # As an exception, so that everything under way is closed.
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    from . import client
    from .bench import options as bench
    from .tune import options as tune

    parser = argparse.ArgumentParser(
        prog="sglang-cachedit", description="Cache-DiT in SGLang Diffusion: checks, requests, settings of running "
        "servers, tuning and comparison.",
    )
    parser.add_argument("--version", action="version", version=f"sglang-cachedit {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="command", parser_class=functools.partial(argparse.ArgumentParser, formatter_class=_Help)
    )
    _add_doctor(commands)
    said = "requests to a running server, with time and cache statistics"
    requests = commands.add_parser("client", help=said, description=said)
    client.add_arguments(requests)
    requests.set_defaults(run=client.run)
    client.add_control(commands)
    tune.add_arguments(commands.add_parser("tune", help="find the fastest schedule that keeps the quality you name"))
    bench.add_parser(commands)
    demo = commands.add_parser("demo-model", help="print the folder of the embedded demo model")
    demo.add_argument("--video", action="store_true", help="that of the one that makes videos")
    demo.set_defaults(run=_demo_model)
    commands.add_parser("schema", help="print the JSON Schema of config files, for editors").set_defaults(run=_schema)
    completion = commands.add_parser("completion", help="print a script that completes these commands in a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    completion.set_defaults(run=lambda args: _completion(parser, args.shell))
    return parser


def _add_doctor(commands: argparse._SubParsersAction) -> None:
    said = "versions, hooks and settings in force; status 1 if something is wrong"
    parser = commands.add_parser("doctor", help=said, description=said)
    parser.add_argument("--config", metavar="FILE", help="a file as --cache-dit-config takes it")
    parser.add_argument("--num-gpus", type=int, metavar="N", help="check the file's sizes and libraries for N ranks")
    parser.add_argument("--model-path", metavar="P", help="also say what of this model would be cached")
    parser.add_argument("--model-id", metavar="ID", help="as SGLang's --model-id, for folders of another name")
    parser.add_argument("--verbose", action="store_true", help="also every setting, hook point and version")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import report

    found = report.examine(args.config, args.num_gpus, args.model_path, args.model_id)
    print(json.dumps(found, indent=2) if args.json else "\n".join(report.lines(found, verbose=args.verbose)))
    return 0 if found["ok"] else 1


def _demo_model(args: argparse.Namespace) -> None:
    from .demo import model_dir, video_model_dir

    print(video_model_dir() if args.video else model_dir())


def _schema(args: argparse.Namespace) -> None:
    from .config.json_schema import config_schema

    print(json.dumps(config_schema(), indent=1))


def _completion(parser: argparse.ArgumentParser, shell: str) -> None:
    try:
        import shtab
    except ImportError:
        raise CacheDitError('completion needs shtab: pip install "sglang-cachedit-plugin[completion]"') from None
    print(shtab.complete(parser, shell))
