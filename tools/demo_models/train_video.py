"""Train the video demo: `python -m tools.demo_models.train_video FOLDER/Wan2.2-T2V-A14B-Diffusers`.

Emoji that cross the frame in one of four directions, named in the prompt ("red apple moving left"), in one of four
lanes, which the seed chooses. First the causal VAE on single frames, then on videos, then both experts and the text
encoder together, each expert on its own range of noise.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tools.demo_models import data, text, video_model
from tools.demo_models.loop import Loop
from tools.demo_models.placements import place
from tools.demo_models.train import DROP_TEXT, as_float, autocast
from tools.demo_models.video_model import BOUNDARY, FRAMES, SIDE, VideoNetworks

SHORT, FULL = 32, 512  # text tokens; the hosts pad to FULL
EVERY = 4  # every fourth name, so that few parameters suffice
SHARE = 0.5  # of the frame's side that the emoji takes
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}
LANES = (-0.75, -0.25, 0.25, 0.75)  # beside the middle, of what room the emoji leaves; see placements.py for why
TEMPLATES = ("{n} moving {d}", "a {n} moving {d}", "emoji of a {n} moving {d}", "A video of a {n} moving {d}.")
KL_WEIGHT = 1e-6


def moving(pictures: torch.Tensor, direction: tuple[float, float], lane: float) -> torch.Tensor:
    """(B, 3, 128, 128) -> (B, 3, 9, 64, 64): from one side of the frame to the other."""
    across = torch.tensor(direction).flip(0).abs() * lane
    small = F.interpolate(pictures, SIDE, mode="area")
    frames = []
    for step in torch.linspace(-1.0, 1.0, FRAMES).tolist():
        shift = (torch.tensor(direction) * step + across) * (1.0 - SHARE)
        matrix = torch.cat([torch.eye(2) / SHARE, -shift[:, None] / SHARE], dim=1)
        frames.append(place(small, matrix.to(pictures.device).expand(len(small), 2, 3)))
    return torch.stack(frames, dim=2)


def frames_of(videos: torch.Tensor, batch: int) -> torch.Tensor:
    """Random frames as videos of one frame, (batch, 3, 1, 64, 64)."""
    which = torch.randint(len(videos), (batch,), device=videos.device)
    frame = torch.randint(videos.shape[2], (batch,), device=videos.device)
    return videos[which, :, frame].unsqueeze(2).float()


def videos_of(videos: torch.Tensor, batch: int) -> torch.Tensor:
    """Random videos, (batch, 3, 9, 64, 64)."""
    return videos[torch.randint(len(videos), (batch,), device=videos.device)].float()


def vae_loss(vae, target: torch.Tensor) -> torch.Tensor:
    """L1, L2 and L1 of the spatial gradients, plus a little KL."""
    with autocast(target.device):
        posterior = vae.encode(target).latent_dist
        drawn = video_model.decode(vae, posterior.mean + torch.randn_like(posterior.mean) * posterior.std)
    edges = sum((drawn.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (-1, -2))
    kl = posterior.kl().mean()
    return (drawn - target).abs().mean() + F.mse_loss(drawn.float(), target) + edges + KL_WEIGHT * kl


@torch.no_grad()
def encode_videos(vae, videos: torch.Tensor) -> torch.Tensor:
    """Latent means, (N, 16, 3, 8, 8), before normalisation."""
    return torch.cat([vae.encode(part.float()).latent_dist.mean for part in videos.split(64)])


@torch.no_grad()
def reconstruction_psnr(vae, videos: torch.Tensor) -> float:
    """Mean PSNR over videos in [-1, 1], in dB."""
    drawn = video_model.decode(vae, encode_videos(vae, videos)).clamp(-1, 1)
    errors = ((drawn - videos.float()) / 2).square().mean(dim=(1, 2, 3, 4))
    return float((-10.0 * errors.log10()).mean())


def train_vae(vae, videos: torch.Tensor, args) -> None:
    """Train, keep the averages, and write the channels' mean and spread into the configuration.

    On videos alone it stays at a white frame for hundreds of steps; single frames get it out of there.
    """
    phases = (frames_of, 4 * args.vae_batch, args.frame_seconds), (videos_of, args.vae_batch, args.vae_seconds)
    for draw, batch, seconds in phases:
        loss = lambda draw=draw, batch=batch: vae_loss(vae, draw(videos, batch))  # noqa: E731
        loop = Loop(loss, [vae], rate=2e-3, ema=0.998, graph=args.graph)
        loop.run(seconds, watch_every=args.watch_every)
        loop.swap()
        print(f"VAE, single frames: {reconstruction_psnr(vae, videos[:: len(videos) // 64, :, :1]):.2f} dB", flush=True)
    latents = encode_videos(vae, videos[:: max(1, len(videos) // 512)])
    print(f"VAE: {reconstruction_psnr(vae, videos[:: len(videos) // 64]):.2f} dB", flush=True)
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in latents.mean(dim=(0, 2, 3, 4)).tolist()],
        latents_std=[round(v, 5) for v in latents.std(dim=(0, 2, 3, 4)).tolist()],
    )


def prompts_for(name: str, direction: str) -> list[str]:
    """Every template filled for one video."""
    return [template.format(n=name, d=direction) for template in TEMPLATES]


class Videos:
    """Latents of all videos, by name and direction and then lane, and the ids of their prompts."""

    def __init__(self, nets: VideoNetworks, videos: torch.Tensor, names: list[str]):
        device = videos.device
        latents = video_model.normalise(encode_videos(nets.vae, videos), nets.vae.config)
        self.latents = latents.unflatten(0, (-1, len(LANES)))  # (names * directions, lanes, 16, 3, 8, 8)
        lines = [line for name in names for direction in DIRECTIONS for line in prompts_for(name, direction)]
        ids = text.encode(nets.tokenizer, lines, SHORT)
        self.ids = torch.from_numpy(ids).view(len(self.latents), len(TEMPLATES), SHORT).to(device)
        self.empty = torch.from_numpy(text.encode(nets.tokenizer, [""], SHORT)).to(device)
        self.vocabulary = len(nets.tokenizer)

    def draw(self, batch: int):
        """Random latents with one of their prompts; some get none, and some get words without meaning.

        Both stand for "no prompt": the host's negative prompt is made of words this tokenizer does not know.
        """
        device = self.latents.device
        which = torch.randint(len(self.latents), (batch,), device=device)
        lane = torch.randint(len(LANES), (batch,), device=device)
        ids = self.ids[which, torch.randint(self.ids.shape[1], (batch,), device=device)]
        noise = torch.randint(2, self.vocabulary, (batch, SHORT), device=device)
        fate = torch.rand(batch, 1, device=device)
        ids = torch.where(fate < DROP_TEXT, self.empty, ids)
        return self.latents[which, lane], torch.where(fate > 1.0 - DROP_TEXT, noise, ids)


def expert_loss(expert, encoder, pool: Videos, batch: int, length: int, low: float, high: float):
    """Flow matching on sigmas between `low` and `high`."""
    clean, ids = pool.draw(batch)
    sigma = low + (high - low) * torch.rand(batch, device=clean.device)
    noise = torch.randn_like(clean)
    noisy = clean + sigma.view(-1, 1, 1, 1, 1) * (noise - clean)
    with autocast(clean.device):
        context = video_model.encode_text(encoder, ids, length)
        guess = expert(noisy, 1000.0 * sigma, context, return_dict=False)[0]
    return F.mse_loss(guess.float(), noise - clean)


def flow_loss(nets: VideoNetworks, pool: Videos, batch: int, length: int) -> torch.Tensor:
    """Both experts, each on its range, each on half of the batch."""
    half = batch // 2
    high = expert_loss(nets.high, nets.encoder, pool, half, length, BOUNDARY, 1.0)
    return high + expert_loss(nets.low, nets.encoder, pool, half, length, 0.0, BOUNDARY)


@torch.no_grad()
def retrieval(nets: VideoNetworks, pool: Videos, length: int, count: int, steps: int = 20) -> float:
    """Share of prompts whose drawn latent is nearest to one of the videos they name, plain Euler steps."""
    device = pool.latents.device
    chosen = torch.linspace(0, len(pool.latents) - 1, min(count, len(pool.latents)), device=device).long()
    x = torch.randn(len(chosen), *pool.latents.shape[2:], device=device)
    times = torch.linspace(1.0, 0.0, steps + 1).tolist()
    with autocast(device):
        context = video_model.encode_text(nets.encoder, pool.ids[chosen, 0], length)
        for now, then in itertools.pairwise(times):
            expert = nets.high if now >= BOUNDARY else nets.low
            timestep = torch.full((len(x),), 1000.0 * now, device=device)
            x = x + (then - now) * expert(x, timestep, context, return_dict=False)[0].float()
    nearest = torch.cdist(x.flatten(1), pool.latents.flatten(0, 1).flatten(1)).argmin(dim=1)
    return float((nearest // len(LANES) == chosen).float().mean())


def train_flow(nets: VideoNetworks, pool: Videos, args, length: int, seconds: float, rate: float) -> None:
    """One phase at one text length; the averaged weights are what is kept."""

    def watch(loop: Loop) -> str:
        loop.swap()
        share = retrieval(nets, pool, length, args.watch_count)
        loop.swap()
        return f"retrieval {share:.2f}"

    loss = lambda: flow_loss(nets, pool, args.batch, length)  # noqa: E731
    loop = Loop(loss, nets.conditioned(), rate, ema=0.9995, graph=args.graph)
    loop.run(seconds, watch, args.watch_every)
    loop.swap()
    print(f"{length} text tokens: retrieval {retrieval(nets, pool, length, 4 * args.watch_count):.3f}", flush=True)


def resume(folder: Path) -> VideoNetworks:
    """Networks of a folder that `save` wrote."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    return VideoNetworks(pipe.vae, pipe.transformer, pipe.transformer_2, pipe.text_encoder, pipe.tokenizer)


def start(names: list[str]) -> VideoNetworks:
    """Networks that know nothing."""
    lines = [line for name in names for direction in DIRECTIONS for line in prompts_for(name, direction)]
    tokenizer = text.train_t5_tokenizer(lines)
    return VideoNetworks(
        video_model.make_vae(),
        video_model.make_expert(),
        video_model.make_expert(),
        video_model.make_encoder(tokenizer),
        tokenizer,
    )


def load_videos(arrays: dict[str, np.ndarray], device) -> tuple[torch.Tensor, list[str]]:
    """Every video, (names * directions * lanes, 3, 9, 64, 64) in half precision, and the names."""
    names = arrays["names"].tolist()[::EVERY]
    pictures = as_float(arrays["images"][: len(arrays["names"]) : EVERY], device)
    ways = itertools.product(DIRECTIONS.values(), LANES)
    videos = torch.stack([moving(pictures, direction, lane).half() for direction, lane in ways], dim=1)
    return videos.flatten(0, 1), names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="folder to write, named Wan2.2-T2V-A14B-Diffusers")
    parser.add_argument("--data", type=Path, default=Path("outputs/emoji.npz"), help="built when missing")
    parser.add_argument("--resume", type=Path, help="a folder to go on from")
    parser.add_argument("--frame-seconds", type=float, default=70.0, help="the VAE on single frames")
    parser.add_argument("--vae-seconds", type=float, default=130.0, help="the VAE on videos; 0: as it is")
    parser.add_argument("--seconds", type=float, default=180.0, help="on 32 text tokens")
    parser.add_argument("--finish-seconds", type=float, default=40.0, help="on 512 text tokens")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--finish-rate", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--watch-every", type=int, default=1000)
    parser.add_argument("--watch-count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="run every step without CUDA graphs")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in train.py
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    videos, names = load_videos(data.load(args.data), device)
    nets = resume(args.resume) if args.resume else start(names)
    for net in (nets.vae, *nets.conditioned()):
        net.to(device).train().requires_grad_(True)
    if args.vae_seconds:
        train_vae(nets.vae, videos, args)
    nets.vae.requires_grad_(False).eval()
    pool = Videos(nets, videos, names)
    train_flow(nets, pool, args, SHORT, args.seconds, args.rate)
    train_flow(nets, pool, args, FULL, args.finish_seconds, args.finish_rate)
    video_model.save(nets, args.target)


if __name__ == "__main__":
    main()
