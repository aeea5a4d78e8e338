"""The options of ``sglang-cachedit tune``; nothing heavy is imported to show them."""

from __future__ import annotations

import argparse
from pathlib import Path


def _tune(args: argparse.Namespace) -> int:
    from .command import tune

    return tune(args)


def _renamed(_: str) -> None:
    raise argparse.ArgumentTypeError("it is called --baselines")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sglang-cachedit tune``."""
    parser.add_argument("--model-path", required=True, help="folder of the model")
    parser.add_argument("--backend", choices=("native", "sglang", "diffusers"), default="native",
                        help="SGLang's backend")
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE", help="to tune on, one a line")
    parser.add_argument("--heldout", type=Path, metavar="FILE",
                        help="to report on; without it every third of --prompts is held out")
    parser.add_argument("--tune-limit", type=int, metavar="N",
                        help="tune on the first N prompts (12; with --share all)")
    parser.add_argument("--heldout-limit", type=int, default=16, metavar="N", help="report on the first N")
    parser.add_argument("--steps", required=True, help="denoising steps, several with commas")
    parser.add_argument("--size", required=True, help="WIDTHxHEIGHT, videos WIDTHxHEIGHTxFRAMES, several with commas")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--min-psnr", type=float, metavar="DB", help="fewest computed steps with this mean PSNR")
    target.add_argument("--min-ssim", type=float, metavar="S", help="fewest computed steps with this mean SSIM")
    target.add_argument("--speedup", type=float, metavar="X", help="best quality at 1/X of the steps computed")
    target.add_argument("--budget", type=int, metavar="N", help="best quality with N computed steps")
    parser.add_argument("--share", type=float, metavar="S", help="with --min-psnr or --min-ssim: no search, but the "
                        "largest error tolerance for which this share of unseen prompts reaches it, shown on --prompts")
    parser.add_argument("--confidence", type=float, default=0.9, metavar="C", help="of --share")
    parser.add_argument("--seed", type=int, default=1, help="of the search and of the first picture")
    parser.add_argument("--evaluations", type=int, default=6, metavar="N", help="trials in the host a budget")
    parser.add_argument("--baselines", default="plain", metavar="NAMES",
                        help="what is measured beside fewer steps: none, plain (growing window), all, or beginnings "
                        "of names with commas: growing, dpcache, dbcache, scm, taylorseer, dmd, profile, teacache, "
                        "spectrum")
    parser.add_argument("--peers", type=_renamed, help=argparse.SUPPRESS)
    parser.add_argument("--shares", default="0.25,0.35,0.5,0.6", metavar="PARTS",
                        help="parts of the steps computed in the named profiles")
    parser.add_argument("--work", type=Path, default=Path("outputs/tune"), metavar="DIR",
                        help="evaluations are kept here; an interrupted run goes on from them")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write the report here")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the config file to write")
    parser.add_argument("--request", action="append", default=[], metavar="NAME=VALUE",
                        help="a sampling parameter of all requests, such as guidance_scale=4")
    parser.add_argument("--server", action="append", default=[], metavar="NAME=VALUE",
                        help="a server argument of the host, such as num_gpus=2")
    parser.add_argument("--hosts", type=int, metavar="N",
                        help="hosts side by side, each with GPUs or CPU threads of its own; by default one, or one a "
                        "core where there is only a CPU, at most 4")
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    parser.set_defaults(run=_tune)
