"""Train the scenes model from nothing on one GPU, in calls of a few minutes that go on from each other.

    python -m tools.demo_models.scenes_train vae flow --seconds 460 --data DATA --out OUT
    python -m tools.demo_models.scenes_train flow guided check --seconds 460 --data DATA --resume OUT --out OUT2
    python -m tools.demo_models.scenes_train export --data DATA --resume OUT2 --out FOLDER/FLUX.1-dev

DATA holds `sprites.npz` (scenes_sprites.py) and the tokenizers (the phase `tokenizers` writes them; needs no GPU).
Phases, run in this order whatever the order they are named in:

| phase | what it does |
|---|---|
| vae | trains the VAE, then the detector of the check |
| flow | trains transformer and text encoders on 48 text tokens, in all the time that the other phases leave |
| guided | trains them to draw what classifier-free guidance would, as FLUX.1-dev does; at the end on 512 text tokens |
| check | counts objects, measures what fewer steps change, draws contact sheets |
| few | trains a second transformer that draws in eight steps, a student of `guided` |
| export | writes a diffusers folder |
"""

import argparse
import copy
import functools
import itertools
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from tools.demo_models import model
from tools.demo_models import scenes_check as check
from tools.demo_models.loop import Loop
from tools.demo_models.scenes_data import Composer, draw_scenes, encode, make_tokenizers
from tools.demo_models.train import autocast, encode_pictures, reconstruction_psnr

TOKENIZERS = ("tokenizer", "tokenizer_2")
SHORT, FULL = 48, 512  # text tokens
SECONDS = {"vae": 150.0, "detector": 35.0, "guided": (60.0, 65.0), "few": (45.0, 45.0)}  # a pair: short, full texts
MARGIN = 20.0  # seconds to compile, capture, check and save, each training of those
CHECK_SECONDS = 20.0
DROP_TEXT = 0.1
KL_WEIGHT = 1e-5
JOINT_DIM = 128
FEW = 8  # steps of the student
SUBSTEPS = 4  # of its teacher for each of its own


class Sizes:
    """How much of everything."""

    def __init__(self, tiny: bool):
        self.pictures = 128 if tiny else 65536  # that the VAE and the detector see
        self.captions = 128 if tiny else 204_800
        self.drawings = 1 if tiny else 2  # of each caption
        self.chunk = 32 if tiny else 1024  # pictures composed at once
        self.vae_batch = 4 if tiny else 64
        self.detector_batch = 8 if tiny else 256
        self.batch = 4 if tiny else 256
        self.full_batch = 2 if tiny else 128  # on FULL text tokens
        self.held_out = 4 if tiny else 100
        self.watch_every = 10 if tiny else 500  # steps
        self.save_every = 5.0 if tiny else 75.0  # seconds
        self.pace = 0.03 if tiny else 1.0  # of all times above


class Clock:
    """Seconds since the start, and until the end."""

    def __init__(self, seconds: float):
        self.start, self.seconds = time.monotonic(), seconds

    def spent(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> float:
        return self.seconds - self.spent()

    def say(self, line: str) -> None:
        print(f"[{self.spent():6.1f} s] {line}", flush=True)


def make_transformer():
    """2 double and 8 single blocks, 4 heads of 48, guidance embedding; 7.4 M parameters."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * model.LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=8,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=JOINT_DIM,
        pooled_projection_dim=model.POOLED_DIM,
        guidance_embeds=True,
        axes_dims_rope=(8, 20, 20),
    )


def make_networks(data: Path) -> model.Networks:
    """Networks at their start, with the tokenizers of `data`."""
    from transformers import CLIPTokenizer, T5Tokenizer

    clip = CLIPTokenizer.from_pretrained(data / TOKENIZERS[0])
    t5 = T5Tokenizer.from_pretrained(data / TOKENIZERS[1])
    # Three layers: FLUX gives text no positions, so T5 alone says which place belongs to which object.
    encoder = model.make_t5(t5, d_model=JOINT_DIM, d_kv=32, d_ff=256, num_layers=3)
    return model.Networks(model.make_vae(80), make_transformer(), model.make_clip(clip), encoder, clip, t5)


class Files:
    """What a call leaves for the next: weights in bf16, one file a phase, each under 17 MB."""

    def __init__(self, nets: model.Networks, detector: check.Detector, out: Path | None = None):
        conditioned = {"transformer": nets.transformer, "clip": nets.clip, "t5": nets.t5}
        self.parts = {
            "vae": {"vae": nets.vae, "detector": detector},
            "flow": conditioned,
            "guided": conditioned,
            "few": {"transformer": nets.transformer},
        }
        self.vae, self.out = nets.vae, out

    def save(self, phase: str) -> None:
        state = {
            name: {key: value.to(torch.bfloat16).cpu() for key, value in module.state_dict().items()}
            for name, module in self.parts[phase].items()
        }
        state["latents"] = {name: self.vae.config[name] for name in ("shift_factor", "scaling_factor")}
        torch.save(state, self.out / "part")
        (self.out / "part").replace(self.out / f"{phase}.pt")  # whole or not at all, should the call be stopped

    def load(self, phase: str, folder: Path) -> None:
        state = torch.load(folder / f"{phase}.pt", weights_only=True)
        self.vae.register_to_config(**state["latents"])
        for name, module in self.parts[phase].items():
            module.load_state_dict(state[name])


class Pictures:
    """Composed pictures as bytes and their scenes, what the VAE and the detector learn from."""

    def __init__(self, composer: Composer, sizes: Sizes, seed: int):
        scenes, _ = draw_scenes(composer.names, sizes.pictures, seed)
        self.scenes = torch.from_numpy(scenes).to(composer.device)
        parts = [(composer.compose(part) * 255).round().byte() for part in self.scenes.split(sizes.chunk)]
        self.bytes = torch.cat(parts)

    def draw(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] and their rows."""
        which = torch.randint(len(self.bytes), (batch,), device=self.bytes.device)
        return self.bytes[which].float() / 127.5 - 1, self.scenes[which]


def vae_loss(vae, pictures: Pictures, batch: int) -> torch.Tensor:
    """L1, L2 and L1 of the gradients, which keeps edges sharp, plus a little KL.

    A halved latent must give the halved picture: latents that are smooth like pictures are easier to learn.
    """
    target, _ = pictures.draw(batch)
    half = F.avg_pool2d(target, 2)
    with autocast(target.device):
        mean, logvar = vae.encoder(target).float().chunk(2, dim=1)
        logvar = logvar.clamp(-20.0, 10.0)
        latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        drawn = vae.decoder(latents).float()
        drawn_half = vae.decoder(F.avg_pool2d(latents, 2)).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3)).mean()
    edges = sum((drawn.diff(dim=d) - target.diff(dim=d)).abs().mean() for d in (-1, -2))
    fit = (drawn - target).abs().mean() + F.mse_loss(drawn, target) + edges
    return fit + 0.25 * (drawn_half - half).abs().mean() + KL_WEIGHT * kl


def train_vae(nets: model.Networks, pictures: Pictures, sizes: Sizes, clock: Clock) -> None:
    """Train, keep the averaged weights, and set shift and scale so that latents have unit spread."""
    loop = Loop(lambda: vae_loss(nets.vae, pictures, sizes.vae_batch), [nets.vae], rate=2e-3, ema=0.998)

    def watch(loop: Loop) -> str:
        loop.swap()
        quality = reconstruction_psnr(nets.vae, sample)
        loop.swap()
        return f"{quality:.2f} dB"

    sample, _ = pictures.draw(min(512, sizes.pictures))
    loop.run(sizes.pace * SECONDS["vae"], watch, sizes.watch_every)
    loop.swap()
    latents = encode_pictures(nets.vae, sample)
    nets.vae.register_to_config(
        shift_factor=round(float(latents.mean()), 5), scaling_factor=round(1.0 / float(latents.std()), 5)
    )
    clock.say(
        f"VAE {reconstruction_psnr(nets.vae, sample):.2f} dB, latents {latents.mean():.3f} +- {latents.std():.3f}"
    )


@torch.no_grad()
def redraw(vae, pictures: Pictures, chunk: int) -> None:
    """Every second picture as the VAE draws it, so that the detector knows both."""
    for part in pictures.bytes[::2].split(chunk):  # views
        with autocast(part.device):
            mean, _ = vae.encoder(part.float() / 127.5 - 1).chunk(2, dim=1)
            drawn = vae.decoder(mean).float()
        part.copy_(((drawn.clamp(-1, 1) + 1) * 127.5).round().byte())


def detector_loss(detector: check.Detector, pictures: Pictures, batch: int) -> torch.Tensor:
    shown, scenes = pictures.draw(batch)
    with autocast(shown.device):
        logits = detector(shown + 0.03 * torch.randn_like(shown)).float()
    wanted = check.named(scenes, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / batch


class Bank:
    """Latents (N, T, 64) in bf16 and the token ids of their captions, on the training device."""

    @torch.no_grad()
    def __init__(self, nets: model.Networks, composer: Composer, sizes: Sizes, seed: int):
        scenes, captions = draw_scenes(composer.names, sizes.captions, seed)
        rows = torch.from_numpy(scenes).to(composer.device).repeat(sizes.drawings, 1)
        shift, scale = nets.vae.config.shift_factor, nets.vae.config.scaling_factor
        parts = []
        for part in rows.split(sizes.chunk):
            with autocast(composer.device):
                mean, _ = nets.vae.encoder(composer.compose(part) * 2 - 1).chunk(2, dim=1)
            parts.append(model.pack((mean.float() - shift) * scale).bfloat16())
        self.latents = torch.cat(parts)
        # The last row is the empty caption.
        self.clip = torch.from_numpy(encode(nets.clip_tokenizer, [*captions, ""], SHORT)).to(composer.device)
        self.t5 = torch.from_numpy(encode(nets.t5_tokenizer, [*captions, ""], SHORT)).to(composer.device)

    def draw(self, batch: int):
        """Random latents (B, T, 64) in float32 with the ids of their captions, sometimes of the empty one."""
        device, captions = self.latents.device, len(self.clip) - 1
        which = torch.randint(len(self.latents), (batch,), device=device)
        empty = torch.rand(batch, device=device) < DROP_TEXT
        caption = (which % captions).masked_fill(empty, captions)
        return self.latents[which].float(), self.clip[caption], self.t5[caption]


def noised(clean: torch.Tensor):
    """Sigma (B,), x = (1 - s) picture + s noise, and the velocity noise - picture."""
    batch, device = len(clean), clean.device
    # Logit-normal times put the effort in the middle; a share of uniform ones keeps both ends known.
    sigma = torch.where(
        torch.rand(batch, device=device) < 0.3,
        torch.rand(batch, device=device),
        torch.randn(batch, device=device).sigmoid(),
    )
    direction = torch.randn_like(clean) - clean
    return sigma, clean + sigma[:, None, None] * direction, direction


def any_guidance(batch: int, device) -> torch.Tensor:
    return 1.0 + 5.0 * torch.rand(batch, device=device)


def flow_loss(nets: model.Networks, bank: Bank, batch: int) -> torch.Tensor:
    """Flow matching; the guidance value says nothing yet."""
    clean, clip, t5 = bank.draw(batch)
    sigma, noisy, direction = noised(clean)
    with autocast(clean.device):
        guess = model.velocity(nets, noisy, sigma, clip, t5, any_guidance(batch, clean.device))
    return F.mse_loss(guess.float(), direction)


def guided_loss(nets: model.Networks, teacher: model.Networks, bank: Bank, batch: int, length: int) -> torch.Tensor:
    """What the teacher draws under classifier-free guidance of scale 1 + (g - 1) / 2 for a guidance value of g."""
    clean, clip, t5 = bank.draw(batch)
    sigma, noisy, _ = noised(clean)
    guidance = any_guidance(batch, clean.device)
    with autocast(clean.device):
        with torch.no_grad():
            both = model.velocity(
                teacher,
                noisy.repeat(2, 1, 1),
                sigma.repeat(2),
                torch.cat([clip, bank.clip[-1:].expand(batch, -1)]),
                torch.cat([t5, bank.t5[-1:].expand(batch, -1)]),
                guidance.repeat(2),
            )
            cond, uncond = both.float().chunk(2)
            target = uncond + (0.5 + 0.5 * guidance[:, None, None]) * (cond - uncond)
        guess = model.velocity(nets, noisy, sigma, clip, F.pad(t5, (0, length - SHORT)), guidance)  # T5 pads with 0
    return F.mse_loss(guess.float(), target)


def few_loss(nets: model.Networks, teacher: model.Networks, bank: Bank, batch: int, length: int, grid) -> torch.Tensor:
    """One step of the student goes where SUBSTEPS steps of the teacher go, on the times (FEW + 1,) of the student."""
    clean, clip, t5 = bank.draw(batch)
    t5 = F.pad(t5, (0, length - SHORT))
    index = torch.randint(FEW, (batch,), device=clean.device)
    start, end = grid[index], grid[index + 1]
    noisy = torch.lerp(clean, torch.randn_like(clean), start[:, None, None])
    guidance = any_guidance(batch, clean.device)
    step = (end - start) / SUBSTEPS
    with autocast(clean.device):
        with torch.no_grad():
            x = noisy
            for part in range(SUBSTEPS):
                slope = model.velocity(teacher, x, start + part * step, clip, t5, guidance).float()
                x = x + step[:, None, None] * slope
            target = (x - noisy) / (end - start)[:, None, None]
        guess = model.velocity(nets, noisy, start, clip, t5, guidance)
    return F.mse_loss(guess.float(), target)


def times(steps: int, device) -> torch.Tensor:
    """The sigmas of the hosts' FLUX pipelines for pictures of this size, (steps + 1,), the last one 0."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = model.make_scheduler()
    config = scheduler.config
    mu = calculate_shift(
        model.GRID**2,
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu, device="cpu")
    return scheduler.sigmas.to(device)


class HeldOut:
    """Captions of sets of objects that nobody trained on, the scenes they describe, and one noise for each."""

    def __init__(self, nets: model.Networks, detector: check.Detector, composer: Composer, count: int):
        scenes, self.captions = draw_scenes(composer.names, count, seed=7, held_out=True)
        self.nets, self.detector, self.device = nets, detector, composer.device
        self.scenes = torch.from_numpy(scenes).to(self.device)
        self.pictures = composer.compose(self.scenes) * 2 - 1
        noise = torch.randn(count, model.GRID**2, 4 * model.LATENT_CHANNELS, generator=torch.Generator().manual_seed(7))
        self.noise = noise.to(self.device)

    @torch.no_grad()
    def draw(self, steps: int, length: int, guidance: float = 3.5) -> torch.Tensor:
        """Pictures (count, 3, H, W) in [-1, 1], Euler steps as the hosts'."""
        nets = uncompiled(self.nets)
        clip = torch.from_numpy(encode(nets.clip_tokenizer, self.captions, 77)).to(self.device)
        t5 = torch.from_numpy(encode(nets.t5_tokenizer, self.captions, length)).to(self.device)
        x, count = self.noise, len(self.noise)
        strength = torch.full((count,), guidance, device=self.device)
        with autocast(self.device):
            for now, then in itertools.pairwise(times(steps, self.device)):
                x = x + (then - now) * model.velocity(nets, x, now.expand(count), clip, t5, strength).float()
            latents = model.unpack(x) / nets.vae.config.scaling_factor + nets.vae.config.shift_factor
            return torch.cat([nets.vae.decoder(part).float() for part in latents.split(64)]).clamp(-1, 1)

    def share(self, steps: int, length: int) -> str:
        share, extra = check.found(self.detector, self.draw(steps, length), self.scenes)
        return f"found {share:.3f}, {extra:.2f} more"

    def report(self, out: Path, length: int, shown: int) -> None:
        """The closing table, and the contact sheet of `shown` steps."""
        pictures = {steps: self.draw(steps, length) for steps in (28, 20, 14, 10, FEW)}
        print("| pictures | named objects found | others a picture | dB to 28 steps, mean | least |")
        print("|---|---|---|---|---|")
        share, extra = check.found(self.detector, self.pictures, self.scenes)
        print(f"| composed | {share:.3f} | {extra:.2f} | | |")
        for steps, drawn in pictures.items():
            share, extra = check.found(self.detector, drawn, self.scenes)
            apart = check.psnr(drawn, pictures[28])
            print(f"| {steps} steps | {share:.3f} | {extra:.2f} | {apart.mean():.2f} | {apart.min():.2f} |", flush=True)
        check.contact_sheet(pictures[shown][:32], self.captions[:32], out / f"sheet-{shown}.png")


def uncompiled(nets: model.Networks) -> model.Networks:
    """A copy whose shapes need not be compiled; the VAE is shared."""
    copies = [copy.deepcopy(net).requires_grad_(False) for net in nets.conditioned()]
    return model.Networks(nets.vae, *copies, nets.clip_tokenizer, nets.t5_tokenizer)


class Session:
    """The trainings of transformer and text encoders that one call makes."""

    def __init__(self, nets, files: Files, held_out: HeldOut, bank: Bank, sizes: Sizes, clock: Clock):
        self.nets, self.files, self.held_out, self.bank = nets, files, held_out, bank
        self.sizes, self.clock = sizes, clock

    def _train(self, phase: str, loss_fn, modules, rate: float, floor: float, seconds: float, length: int) -> None:
        """The averaged weights are kept, and saved on the way."""
        steps = FEW if phase == "few" else 14
        loop = Loop(loss_fn, modules, rate, ema=0.9995)
        saved = self.clock.spent()

        def watch(loop: Loop) -> str:
            nonlocal saved
            if self.clock.spent() - saved < self.sizes.save_every:
                return ""
            loop.swap()
            self.files.save(phase)
            note = self.held_out.share(steps, length)
            loop.swap()
            saved = self.clock.spent()
            return note

        self.clock.say(f"{phase}: {seconds:.0f} s on {length} text tokens")
        loop.run(seconds, watch, self.sizes.watch_every, floor)
        loop.swap()
        self.files.save(phase)
        self.clock.say(f"{phase}: {self.held_out.share(steps, length)}")

    def flow(self, until: float, first: bool, last: bool) -> None:
        """Until `until` on the clock. The rate stays high while another call of it is to follow."""
        rate, floor = 1e-3 if first else 7e-4, 0.02 if last else 0.5
        loss = functools.partial(flow_loss, self.nets, self.bank, self.sizes.batch)
        loss().backward()  # compiles
        self._train("flow", loss, self.nets.conditioned(), rate, floor, until - self.clock.spent(), SHORT)

    def student(self, phase: str, loss_fn, modules) -> None:
        """The networks become students of what they were; on short texts, then on full ones."""
        teacher = uncompiled(self.nets)
        settings = ((SHORT, self.sizes.batch, 3e-4), (FULL, self.sizes.full_batch, 2e-4))
        for (length, batch, rate), seconds in zip(settings, SECONDS[phase], strict=True):
            loss = functools.partial(loss_fn, self.nets, teacher, self.bank, batch, length)
            loss().backward()
            self._train(phase, loss, modules, rate, 0.02, self.sizes.pace * seconds, length)


def run(args, sizes: Sizes, clock: Clock) -> None:
    """The phases that were asked for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # What a later call draws is new.
    seed = 2026 + 100 * bool(args.resume)
    torch.manual_seed(seed)
    composer = Composer(args.data / "sprites.npz", device)
    nets, detector = make_networks(args.data), check.Detector(len(composer.names))
    files = Files(nets, detector, args.out)
    trained = [phase for phase in ("flow", "guided", "few") if phase in args.phases]
    if args.resume:
        files.load("vae", args.resume)
        # Whoever draws or teaches next starts from what was trained last before it.
        files.load("flow" if trained[:1] in (["flow"], ["guided"]) else "guided", args.resume)
    for net in (nets.vae, detector, *nets.conditioned()):
        net.to(device).train().requires_grad_(True)
    args.out.mkdir(parents=True, exist_ok=True)
    clock.say(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, phases {' '.join(args.phases)}")
    if "vae" in args.phases:
        pictures = Pictures(composer, sizes, seed + 1)
        clock.say(f"{len(pictures.bytes)} pictures composed")
        train_vae(nets, pictures, sizes, clock)
        redraw(nets.vae, pictures, sizes.chunk)
        loop = Loop(lambda: detector_loss(detector, pictures, sizes.detector_batch), [detector], 2e-3, ema=0.995)
        loop.run(sizes.pace * SECONDS["detector"], None, 2 * sizes.watch_every)
        loop.swap()
        del pictures, loop
    files.save("vae")
    nets.vae.requires_grad_(False)
    held_out = HeldOut(nets, detector, composer, sizes.held_out)
    share, extra = check.found(detector, held_out.pictures, held_out.scenes)
    clock.say(f"detector on held-out composed pictures: found {share:.3f}, {extra:.2f} more")

    if device.type == "cuda":
        torch._dynamo.config.cache_size_limit = 64
        nets.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    bank = None
    if trained:
        bank = Bank(nets, composer, sizes, seed + 2)
        clock.say(f"{len(bank.latents)} latents, spread {bank.latents[:4096].float().std():.3f}")
    session = Session(nets, files, held_out, bank, sizes, clock)
    if "flow" in trained:
        later = sum(2 * MARGIN + sum(SECONDS[phase]) for phase in trained[1:]) + CHECK_SECONDS
        session.flow(clock.seconds - sizes.pace * later, first=not args.resume, last="guided" in trained)
    if "guided" in trained:
        session.student("guided", guided_loss, nets.conditioned())
    if "check" in args.phases:
        held_out.report(args.out, FULL, 28)
        clock.say("checked")
    if "few" in trained:
        nets.clip.requires_grad_(False), nets.t5.requires_grad_(False)
        session.student("few", functools.partial(few_loss, grid=times(FEW, device)), [nets.transformer])
        held_out.report(args.out, FULL, FEW)
    clock.say("done")


def export(data: Path, folder: Path, target: Path) -> None:
    """The diffusers folder; beside it the detector, and the transformer of few steps if there is one."""
    from safetensors.torch import save_file

    names = np.load(data / "sprites.npz")["names"].tolist()
    nets, detector = make_networks(data), check.Detector(len(names))
    files = Files(nets, detector)
    for phase in ("vae", "guided"):
        files.load(phase, folder)
    model.save(nets, target)
    shutil.copy(Path(__file__).with_name("scenes_notices.txt"), target / "NOTICES.txt")
    weights = {key: value.bfloat16() for key, value in detector.state_dict().items()}
    save_file(weights, target.with_name("detector.safetensors"), metadata={"objects": ", ".join(names)})
    if (folder / "few.pt").exists():
        files.load("few", folder)
        model.bf16_copy(nets.transformer).save_pretrained(target.with_name("few") / "transformer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phases", nargs="+", choices=("tokenizers", "vae", "flow", "guided", "check", "few", "export"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="where the phases leave their files")
    parser.add_argument("--resume", type=Path, help="the folder of an earlier call")
    parser.add_argument(
        "--seconds", type=float, default=460.0, help="of the whole call; what the other phases leave is for `flow`"
    )
    parser.add_argument("--tiny", action="store_true", help="a trial of every line on a CPU")
    args = parser.parse_args()
    clock = Clock(args.seconds)
    if args.phases == ["tokenizers"]:
        names = np.load(args.data / "sprites.npz")["names"].tolist()
        for tokenizer, name in zip(make_tokenizers(names), TOKENIZERS, strict=True):
            tokenizer.save_pretrained(args.data / name)
    elif args.phases == ["export"]:
        export(args.data, args.resume, args.out)
    else:
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails for such head sizes in bf16
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        run(args, Sizes(args.tiny), clock)


if __name__ == "__main__":
    main()
