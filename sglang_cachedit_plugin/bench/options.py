"""Options of the subcommand; light, since every command line builds them."""

from __future__ import annotations

import argparse
from pathlib import Path

_VARIANT = "NAME:K=V,..."


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Register ``bench``."""
    parser = commands.add_parser(
        "bench", help="uncached, stock Cache-DiT and this plugin side by side: time, quality, memory",
        epilog="Host flags follow after --, for example: -- --attention-backend torch_sdpa --dit-cpu-offload false",
    )
    _add_work(parser.add_argument)
    _add_variants(parser.add_argument)
    _add_run(parser.add_argument)
    parser.add_argument("host_flags", nargs="*", metavar="-- HOST FLAGS", help="passed to every host as they are")
    parser.set_defaults(run=_bench)


def _add_work(add) -> None:
    add("--model-path", help="folder or name of the model; not needed with --url")
    add("--backend", choices=("sglang", "diffusers"), default="sglang", help="SGLang's backend")
    add("--num-gpus", type=int, default=1, help="GPUs of each host")
    add("--url", help="a running server instead of processes; the uncached and the plugin's variants only")
    add("--prompt", action="append", default=[], help="repeatable")
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line")
    add("--limit", type=int, metavar="N", help="only the first N prompts of the file")
    add("--steps", type=int, default=28, help="denoising steps")
    add("--size", default="1024x1024", metavar="WxH", help="of the pictures")
    add("--frames", type=int, help="frames of a video")
    add("--seed", type=int, default=1, help="of the first prompt; each next one adds 1")
    add("--request", action="append", default=[], metavar="K=V", help="more sampling parameters of every request")


def _add_variants(add) -> None:
    add("--variant", action="append", default=[], metavar=_VARIANT, help="the plugin with settings; repeatable")
    add("--stock", action="append", default=[], metavar=_VARIANT, help="stock with settings; repeatable")
    add("--no-stock", action="store_true", help="leave the stock integration out")
    add("--profile", help="the plugin with this profile")
    add("--set", action="append", default=[], metavar="K=V,...", help="settings of the plugin, and stock's where it "
        "has them")
    add("--cache-dit-config", metavar="FILE", help="a file for the plugin's variants; its profiles can be named")


def _add_run(add) -> None:
    add("--repeat", type=int, default=3, help="timed rounds; medians are reported")
    add("--warmup", type=int, default=1, help="untimed requests after the first one")
    add("--switches", type=int, default=3, help="pairs of requests with one knob changed and changed back; 0: none")
    add("--hosts", choices=("each", "shared", "one"), default="each",
        help="a process for each variant (turns by request), the plugin's process shared with uncached, "
        "or one process at a time (least memory, turns are not taken)")
    add("--no-sync", action="store_true", help="do not wait for the device at the ends of stages and steps")
    add("--timeout", type=float, default=3600.0, help="seconds that a start or a request may take")
    add("--keep-arrays", action="store_true", help="keep the pictures as .npy too, not only as .png")
    add("--out", type=Path, default=Path("outputs/bench"), help="folder for figures and pictures")


def _bench(args: argparse.Namespace) -> int:
    from .command import bench

    return bench(args)
