"""Train the demo model from nothing: `python -m tools.demo_models.train FOLDER/FLUX.1-dev`.

First the VAE, then the transformer together with both text encoders, for most of the time on 32 text tokens
and at the end on the 512 that the hosts pad to. Takes about ten minutes on one NVIDIA H200.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tools.demo_models import data, model, text
from tools.demo_models.loop import Loop
from tools.demo_models.placements import centred, corners, jittered, place

SHORT, FULL = 32, 512  # text tokens; the hosts always pad to FULL
CLIP_SHORT = 24  # CLIP is causal, so what follows the end marker cannot change the pooled vector
DROP_TEXT = 0.05  # share of empty prompts, so that true classifier-free guidance has its second branch
KL_WEIGHT = 1e-5


def autocast(device):
    """bf16 on a GPU; without the weight cache, which a CUDA graph cannot record."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def augmented(images: torch.Tensor, batch: int) -> torch.Tensor:
    """A batch moved by a few pixels and mirrored at random, (B, 3, 128, 128) in [-1, 1]."""
    chosen = images[torch.randint(len(images), (batch,), device=images.device)]
    return place(chosen, jittered(batch, images.device))


def vae_loss(vae, images: torch.Tensor, batch: int) -> torch.Tensor:
    """L1, L2 and L1 of the gradients, which keeps edges sharp, plus a little KL."""
    device = images.device
    with autocast(device):
        target = augmented(images, batch)
        mean, logvar = vae.encoder(target).float().chunk(2, dim=1)
        logvar = logvar.clamp(-20.0, 10.0)
        drawn = vae.decoder(mean + torch.randn_like(mean) * (0.5 * logvar).exp()).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3)).mean()
    edges = sum((drawn.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (-1, -2))
    return (drawn - target).abs().mean() + F.mse_loss(drawn, target) + edges + KL_WEIGHT * kl


@torch.no_grad()
def encode_pictures(vae, images: torch.Tensor) -> torch.Tensor:
    """Latent means of pictures in [-1, 1], (N, 16, 16, 16), before normalisation."""
    return torch.cat([vae.encoder(part).chunk(2, dim=1)[0] for part in images.split(64)])


def as_float(images: np.ndarray, device) -> torch.Tensor:
    """(N, H, W, 3) bytes -> (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1.0


@torch.no_grad()
def reconstruction_psnr(vae, images: torch.Tensor) -> float:
    """Mean PSNR over at most 128 pictures, in dB."""
    images = images[:128]
    drawn = vae.decoder(encode_pictures(vae, images)).clamp(-1, 1)
    errors = ((drawn - images) / 2).square().mean(dim=(1, 2, 3))
    return float((-10.0 * errors.log10()).mean())


def train_vae(vae, images: torch.Tensor, seconds: float, batch: int) -> None:
    """Train, keep the averaged weights, and set shift and scale so that latents have unit spread."""
    loop = Loop(lambda: vae_loss(vae, images, batch), [vae], rate=2e-3, ema=0.998)
    loop.run(seconds)
    loop.swap()
    latents = encode_pictures(vae, images)
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 5), scaling_factor=round(1.0 / float(latents.std()), 5)
    )
    print(f"VAE: {reconstruction_psnr(vae, images):.2f} dB, {vae.config.shift_factor}, {vae.config.scaling_factor}")


class Pairs:
    """Named pictures as packed latents and all their prompts as token ids, on the training device."""

    def __init__(self, nets: model.Networks, arrays: dict[str, np.ndarray], placements, device):
        names, aliases = arrays["names"].tolist(), arrays["aliases"].tolist()
        images = as_float(arrays["images"][: len(names)], device)
        placed = []
        for placement in placements.to(device):
            latents = encode_pictures(nets.vae, place(images, placement.expand(len(images), 2, 3)))
            latents = (latents - nets.vae.config.shift_factor) * nets.vae.config.scaling_factor
            placed.append(model.pack(latents))
        self.latents = torch.stack(placed, dim=1)  # (names, placements, T, 64)
        tables = text.prompt_tables(names, aliases, nets.clip_tokenizer, nets.t5_tokenizer, CLIP_SHORT, SHORT)
        self.clip, self.t5 = (torch.from_numpy(table).to(device) for table in tables)
        self.empty_clip = torch.from_numpy(text.encode(nets.clip_tokenizer, [""], CLIP_SHORT)).to(device)
        self.empty_t5 = torch.from_numpy(text.encode(nets.t5_tokenizer, [""], SHORT)).to(device)

    def draw(self, batch: int):
        """Random latents (B, T, 64) with the ids of one of their prompts, sometimes of the empty one."""
        device = self.latents.device
        which = torch.randint(len(self.latents), (batch,), device=device)
        where = torch.randint(self.latents.shape[1], (batch,), device=device)
        prompt = torch.randint(self.clip.shape[1], (batch,), device=device)
        empty = torch.rand(batch, 1, device=device) < DROP_TEXT
        clip = torch.where(empty, self.empty_clip, self.clip[which, prompt])
        t5 = torch.where(empty, self.empty_t5, self.t5[which, prompt])
        return self.latents[which, where], clip, t5


def flow_loss(nets: model.Networks, pairs: Pairs, batch: int, length: int) -> torch.Tensor:
    """Flow matching: at x = (1 - s) picture + s noise the velocity is noise - picture."""
    clean, clip, t5 = pairs.draw(batch)
    device = clean.device
    t5 = F.pad(t5, (0, length - t5.shape[1]))  # T5's padding id is 0
    # Logit-normal times put the effort in the middle; a share of uniform ones keeps both ends known.
    sigma = torch.where(
        torch.rand(batch, device=device) < 0.3,
        torch.rand(batch, device=device),
        torch.randn(batch, device=device).sigmoid(),
    )
    noise = torch.randn_like(clean)
    noisy = clean + sigma[:, None, None] * (noise - clean)
    # The pictures do not depend on the guidance value: any that a request names is one the model has seen.
    guidance = 1.0 + 5.0 * torch.rand(batch, device=device)
    with autocast(device):
        guess = model.velocity(nets, noisy, sigma, clip, t5, guidance)
    return F.mse_loss(guess.float(), noise - clean)


@torch.no_grad()
def retrieval(nets: model.Networks, pairs: Pairs, length: int, count: int = 64, steps: int = 16) -> float:
    """Share of names whose drawn latent is nearest to one of the named pictures', plain Euler steps."""
    device = pairs.latents.device
    chosen = torch.linspace(0, len(pairs.latents) - 1, min(count, len(pairs.latents)), device=device).long()
    clip, t5 = pairs.clip[chosen, 0], F.pad(pairs.t5[chosen, 0], (0, length - SHORT))
    x = torch.randn(len(chosen), *pairs.latents.shape[2:], device=device)
    times = torch.linspace(1.0, 0.0, steps + 1, device=device)
    guidance = torch.full((len(chosen),), 3.5, device=device)
    with autocast(device):
        for now, then in itertools.pairwise(times):
            x = x + (then - now) * model.velocity(nets, x, now.expand(len(x)), clip, t5, guidance).float()
    nearest = torch.cdist(x.flatten(1), pairs.latents.flatten(0, 1).flatten(1)).argmin(dim=1)
    return float((nearest // pairs.latents.shape[1] == chosen).float().mean())


def train_flow(nets: model.Networks, pairs: Pairs, args, length: int, seconds: float, rate: float) -> None:
    """One phase at one text length; the averaged weights are what is kept."""
    batch = args.batch

    def watch(loop: Loop) -> str:
        loop.swap()
        share = retrieval(nets, pairs, length)
        loop.swap()
        return f"retrieval {share:.2f}"

    loop = Loop(lambda: flow_loss(nets, pairs, batch, length), nets.conditioned(), rate, ema=0.9995)
    loop.run(seconds, watch, args.watch_every)
    loop.swap()
    print(f"{length} text tokens: retrieval {retrieval(nets, pairs, length, 256, 28):.3f} of 256")


def build(args, arrays, device) -> model.Networks:
    """Networks at their start, or from `--resume`."""
    if args.resume:
        from diffusers import FluxPipeline

        pipe = FluxPipeline.from_pretrained(args.resume, torch_dtype=torch.float32)
        parts = (pipe.vae, pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)
        nets = model.Networks(*parts, pipe.tokenizer, pipe.tokenizer_2)
    else:
        lines = text.corpus(arrays["names"].tolist(), arrays["aliases"].tolist())
        clip, t5 = text.train_clip_tokenizer(lines), text.train_t5_tokenizer(lines)
        nets = model.Networks(
            model.make_vae(), model.make_transformer(), model.make_clip(clip), model.make_t5(t5), clip, t5
        )
    for net in (nets.vae, *nets.conditioned()):
        net.to(device).train().requires_grad_(True)
    return nets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="folder to write; the hosts want it named FLUX.1-dev")
    parser.add_argument("--data", type=Path, default=Path("outputs/emoji.npz"), help="built when missing")
    parser.add_argument("--resume", type=Path, help="a folder to go on from")
    parser.add_argument("--vae-seconds", type=float, default=120.0)
    parser.add_argument("--seconds", type=float, default=200.0, help="one placement, 32 text tokens")
    parser.add_argument("--spread-seconds", type=float, default=300.0, help="four placements, 32 text tokens")
    parser.add_argument("--finish-seconds", type=float, default=70.0, help="on 512 text tokens")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--finish-rate", type=float, default=2e-4)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--watch-every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=2026)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails for these head sizes in bf16
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arrays = data.load(args.data)
    nets = build(args, arrays, device)
    if args.vae_seconds:
        train_vae(nets.vae, as_float(arrays["images"], device), args.vae_seconds, 64)
    nets.vae.requires_grad_(False).eval()
    if device.type == "cuda":
        torch._dynamo.config.cache_size_limit = 64
        nets.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    if args.seconds:
        train_flow(nets, Pairs(nets, arrays, centred(), device), args, SHORT, args.seconds, args.rate)
    spread = Pairs(nets, arrays, corners(), device)
    if args.spread_seconds:
        train_flow(nets, spread, args, SHORT, args.spread_seconds, args.rate)
        model.save(nets, args.target)
    if args.finish_seconds:
        train_flow(nets, spread, args, FULL, args.finish_seconds, args.finish_rate)
    model.save(nets, args.target)


if __name__ == "__main__":
    main()
