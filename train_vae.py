"""Stage 1: train the Semantic-VAE on a prepared data folder.

    python train_vae.py                                                    # the demo, on the CPU or a GPU
    python train_vae.py --preset paper --data data/libritts --out runs/vae-libritts
    torchrun --standalone --nproc_per_node 8 train_vae.py --preset paper --data ...   # the same training on 8 GPUs
    python train_vae.py --resume --out runs/vae                            # go on exactly where it stopped

The run folder holds model.safetensors + config.json (the averaged weights: all that sampling needs), state.pt (weights,
their average, both optimisers, the step: rates and random numbers follow from seed and step), args.json, log.csv, and
samples/ with the same validation clips after every evaluation once the decoder learns.
"""

import argparse
import copy
import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from model import (PRESETS, InputError, LogMel, MelDistance, SemanticVAE, VAEConfig, Vocos, at_rate, conv_head,
                   kl_loss, load_torch, local_folder, rebuild, stft, stft_distance)  # fmt: skip
from prepare import (DRAWS, ORDER, TRAINING, Data, Run, at_least, check_run, cli, clipped_step, compiled, distributed,
                     forward_flops, load_batches, moved, one_sum, read_args, repeat_last, start_ranks,
                     switch, update_ema, write_wave)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Data: crop k of the whole training is a pure function of (seed, k), whatever the ranks, workers and resumptions.


class Crops(torch.utils.data.Dataset):
    """Crops of the training clips, with the SSL frames of the same moments and the noise that samples their latents."""

    def __init__(self, data: Data, vae: VAEConfig, seconds: float, seed: int, ssl: dict | None):
        """ssl: what the features are, from the folder's meta.json (None: no features)."""
        self.data = data
        self.latent_dim = vae.latent_dim
        self.hop = vae.hop
        self.seed = seed
        self.clips = data.split("train")
        # A crop begins with an SSL frame (without features: each 20 ms too) and ends where frames of both kinds do.
        self.stride = data.rate / Fraction(ssl["rate"] if ssl else 50)  # samples
        ratio = vae.hop / self.stride if ssl else Fraction(1)  # SSL frames per latent frame: 5/4 for 50 and 40 a second
        self.frames = round(seconds * data.rate / vae.hop / ratio.denominator) * ratio.denominator
        self.features = int(self.frames * ratio) if ssl else 0  # SSL frames of a crop
        if self.frames * vae.hop <= 1024:  # half of the longest STFT window, or nothing
            raise InputError(f"--crop {seconds} is {self.frames} frames of {vae.hop} samples: 1025 are needed")

    @functools.lru_cache(2)  # every crop asks
    def order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([ORDER, self.seed, epoch]).permutation(len(self.clips))

    def __getitem__(self, k: int):
        epoch, position = divmod(k, len(self.clips))
        clip = self.clips[self.order(epoch)[position]]
        rng = np.random.default_rng([DRAWS, self.seed, k])
        room = max(0, int(self.data.samples[clip]) - self.frames * self.hop)
        start = int(rng.integers(0, room // self.stride + 1))  # in SSL frames
        wave = self.data.get("audio", clip, int(start * self.stride), self.frames * self.hop)
        noise = rng.standard_normal((self.frames, self.latent_dim), dtype=np.float32)
        crop = dict(
            wave=F.pad(wave, (0, self.frames * self.hop - len(wave))),  # [T]
            noise=torch.from_numpy(noise),  # [N, D]
            valid=torch.arange(self.frames) < math.ceil(len(wave) / self.hop),  # [N]
        )
        if self.features:
            ssl = self.data.get("ssl", clip, start, self.features)
            crop["features"] = repeat_last(ssl, self.features)  # [S, ssl_dim]
        return crop


@dataclass
class CropNumbers:
    """This rank's micro-batches: each step's crops are shared in order, in micro-batches of one size, so that a mean of
    their means is the step's mean. The first `early` steps have another number of crops."""

    per_step: int
    early: int  # steps of the encoder alone
    per_early_step: int
    micro: int
    rank: int
    world: int

    def parts(self, step: int) -> list[list[int]]:
        early = min(step, self.early)
        share = (self.per_early_step if step < self.early else self.per_step) // self.world
        micro = next(n for n in range(min(self.micro, share), 0, -1) if share % n == 0)  # the largest that divides it
        first = early * self.per_early_step + (step - early) * self.per_step + self.rank * share
        return [list(range(k, k + micro)) for k in range(first, first + share, micro)]


# ----------------------------------------------------------------------------------------------------------------------
# The encoder first: what latents must carry can be learned without decoding any of them, at a fraction of the cost.


class LatentReader(nn.Module):
    """A small head that predicts, from sampled latents, the log-mels and the teacher's features of the same frames."""

    BANDS = 80

    def __init__(self, vae: VAEConfig, ssl_dim: int):
        super().__init__()
        self.mel = LogMel(vae.sample_rate, self.BANDS, vae.hop)
        self.head = conv_head(vae.latent_dim, 256, self.BANDS + ssl_dim)
        self.register_buffer("mean", torch.zeros(ssl_dim))  # of the teacher's features
        self.register_buffer("std", torch.ones(ssl_dim))

    def forward(self, z, wave, features=None):
        """z [B, N, D], wave [B, T], features [B, S, ssl_dim] → losses by name. mel: L1 of log10 magnitudes, times 7,
        as MelDistance sums seven scales: one weight suits both; teacher: mean square."""
        predicted = self.head(z.mT).mT.float()  # [B, N, bands + ssl_dim]
        mel = self.mel(wave[:, None]).mT  # [B, N, bands]
        losses = dict(mel=7 / math.log(10) * F.l1_loss(predicted[..., : self.BANDS], mel))
        if features is not None and len(self.mean):
            target = (at_rate(features, z.shape[1]) - self.mean) / self.std
            losses["teacher"] = F.mse_loss(predicted[..., self.BANDS :], target)
        return losses


class EncoderFirst(nn.Module):
    """SemanticVAE.forward with a reader in place of the decoder: its losses stand for the reconstruction."""

    def __init__(self, vae: SemanticVAE, reader: LatentReader):
        super().__init__()
        self.vae = vae
        self.reader = reader

    def forward(self, wave, noise, features=None):
        z, mean, logvar, aligned = self.vae.sample_posterior(wave, noise, features)
        return self.reader(z, wave, features), z, mean, logvar, aligned


@torch.no_grad()
def unit_latents(vae: SemanticVAE, waves: torch.Tensor, noise: float = 0.2) -> None:
    """Data-dependent initialisation (LSUV, arXiv 1511.06422): over `waves` [B, T] each convolution of the encoder
    gets unit variance, the posterior's means 0 ± 1 a channel, and its sampling noise a deviation of about `noise`.

    PyTorch's default shrinks speech from layer to layer until it drowns in the biases: hundreds of steps pass before
    the latents tell anything. Long runs can afford that, a run of minutes cannot."""

    def unit_variance(conv, inputs, output):
        size = output.std()
        conv.parametrizations.weight.original0 /= size
        return output / size

    convs = [layer for layer in vae.encoder.modules() if isinstance(layer, nn.Conv1d)]
    for layer in convs:
        nn.init.zeros_(layer.bias)
    hooks = [layer.register_forward_hook(unit_variance) for layer in convs]
    mean, _ = vae.encode(waves)
    for hook in hooks:
        hook.remove()
    scale = mean.std((0, 1))
    vae.fc_mu.weight /= scale[:, None]
    vae.fc_mu.bias.copy_((vae.fc_mu.bias - mean.mean((0, 1))) / scale)
    vae.fc_var.bias += 2 * math.log(noise)


# ----------------------------------------------------------------------------------------------------------------------
# Discriminators (DAC): five look at the wave folded by a period, three at bands of a complex STFT.


def conv2d(*args, activate=True, **kwargs) -> nn.Module:
    layer = weight_norm(nn.Conv2d(*args, **kwargs))
    return nn.Sequential(layer, nn.LeakyReLU(0.1, inplace=True)) if activate else layer


class PeriodDiscriminator(nn.Module):
    """The wave folded to [B, 1, T/p, p], each column convolved by itself (HiFi-GAN, arXiv 2010.05646): errors of period
    p line up in a column. The periods are primes, so that no two see the same."""

    def __init__(self, period: int, width: float):
        super().__init__()
        self.period = period
        sizes = [1] + [max(4, int(c * width)) for c in (32, 128, 512, 1024, 1024)]
        strides = (3, 3, 3, 3, 1)
        layers = zip(sizes, sizes[1:], strides)
        self.convs = nn.ModuleList(conv2d(a, b, (5, 1), (stride, 1), padding=(2, 0)) for a, b, stride in layers)
        self.conv_post = conv2d(sizes[-1], 1, (3, 1), padding=(1, 0), activate=False)

    def forward(self, wave):  # [B, T]
        p = self.period
        x = F.pad(wave[:, None], (0, p - wave.shape[-1] % p), mode="reflect")  # a full extra period if p divides T
        x = x.unflatten(-1, (-1, p))  # [B, 1, T/p, p]
        maps = []
        for layer in self.convs:
            x = layer(x)
            maps.append(x)
        return [*maps, self.conv_post(x)]


class STFTDiscriminator(nn.Module):
    """Five bands of a complex STFT, each with convolutions of its own, joined for the logits."""

    EDGES = (0, 0.1, 0.25, 0.5, 0.75, 1)

    def __init__(self, window: int, width: float):
        super().__init__()
        self.window = window
        edges = [int(edge * (window // 2 + 1)) for edge in self.EDGES]
        self.bands = list(zip(edges, edges[1:]))
        c = max(4, int(32 * width))
        self.band_convs = nn.ModuleList()
        for _ in self.bands:
            wide = [conv2d(a, c, (3, 9), (1, stride), padding=(1, 4)) for a, stride in ((2, 1), (c, 2), (c, 2), (c, 2))]
            self.band_convs.append(nn.ModuleList([*wide, conv2d(c, c, (3, 3), padding=(1, 1))]))
        self.conv_post = conv2d(c, 1, (3, 3), padding=(1, 1), activate=False)

    def forward(self, wave):  # [B, T]
        hop = self.window // 4
        edge = (self.window - hop) // 2
        wave = F.pad(wave[:, None], (edge, edge + -wave.shape[-1] % hop), mode="reflect")[:, 0]
        x = torch.view_as_real(stft(wave, self.window)[..., 2:-2]).permute(0, 3, 2, 1)  # [B, 2, frames, bins]
        maps = []
        ends = []
        for (low, high), layers in zip(self.bands, self.band_convs):
            band = x[..., low:high]
            for layer in layers:
                band = layer(band)
                maps.append(band)
            ends.append(band)
        return [*maps, self.conv_post(torch.cat(ends, dim=-1))]


class Discriminators(nn.Module):
    """All eight. Audio [B, T] → for each a list of feature maps, the last of them its logits."""

    def __init__(self, width: float = 1.0):
        super().__init__()
        periods = [PeriodDiscriminator(period, width) for period in (2, 3, 5, 7, 11)]
        spectra = [STFTDiscriminator(window, width) for window in (2048, 1024, 512)]
        self.discriminators = nn.ModuleList([*periods, *spectra])

    def forward(self, wave):
        wave = wave - wave.mean(-1, keepdim=True)
        wave = 0.8 * wave / (wave.abs().amax(-1, keepdim=True) + 1e-9)
        return [discriminator(wave) for discriminator in self.discriminators]


def discriminator_loss(fake, real):
    """Least squares, summed over the discriminators: real logits to 1, fake ones to 0 (LSGAN, arXiv 1611.04076)."""
    return sum(f[-1].float().square().mean() + (1 - r[-1].float()).square().mean() for f, r in zip(fake, real))


def generator_losses(fake, real):
    """(adversarial: fake logits to 1; feature matching: L1 to the real audio's maps, MelGAN, arXiv 1910.06711)."""
    adversarial = sum((1 - f[-1].float()).square().mean() for f in fake)
    matching = sum(F.l1_loss(a.float(), b.float()) for f, r in zip(fake, real) for a, b in zip(f[:-1], r[:-1]))
    return adversarial, matching


# ----------------------------------------------------------------------------------------------------------------------
# The training.

MAX_NORM = 10  # largest gradient norm, of both networks


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_ranks(args.device, TRAINING)
    run = Run(args, rank, world, device)
    torch.backends.cudnn.benchmark = True  # few shapes
    with_ssl = args.align_weight > 0 and not args.mel
    data = Data(args.data, ("audio", "ssl") if with_ssl else ("audio",))
    ssl = data.meta["ssl"] if with_ssl else None
    check_run(args, data, device, teacher=ssl)
    torch.manual_seed(args.seed)

    # ---- networks and optimisers
    vae = make_vae(args, data, ssl).to(device)
    crops = Crops(data, vae.config, args.crop, args.seed, ssl)
    if args.unit_latents and not (args.resume or args.init or args.mel):
        unit_latents(vae, torch.stack([crops[k]["wave"] for k in range(32)]).to(device))
    discriminators = make_discriminators(args).to(device)
    early = 0 if args.mel or not args.encoder_lr else args.encoder_steps  # the steps in which the encoder learns alone
    if not (args.encoder_lr or args.init or args.resume or args.mel):
        raise InputError("--encoder-lr 0 keeps the encoder as it is: name it with --init")
    if early >= args.steps:
        raise InputError(f"--steps {args.steps} ends within --encoder-steps {early}: the decoder would learn nothing")
    reader = LatentReader(vae.config, ssl["dim"] if with_ssl and args.teacher_weight else 0).to(device)
    if early and len(reader.mean):
        features = torch.cat([crops[k]["features"] for k in range(64)])
        reader.mean.copy_(features.mean(0))
        reader.std.copy_(features.std(0).clamp(min=1e-3))
    encoding = [p for name, p in vae.named_parameters() if not name.startswith(vae.AFTER_LATENTS)]
    decoding = [p for name, p in vae.named_parameters() if name.startswith(vae.AFTER_LATENTS)]
    groups = [dict(params=decoding), dict(params=encoding), dict(params=reader.parameters())]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.8, 0.99), fused=True)
    optimizer_d = torch.optim.AdamW(discriminators.parameters(), lr=args.lr, betas=(0.8, 0.99), fused=True)
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    modules = dict(vae=vae, reader=reader, discriminators=discriminators, optimizer=optimizer, optimizer_d=optimizer_d)
    weights = dict(mel=15, adv=args.adv_weight, feature=2, kl=args.kl_weight)  # of the losses, the authors'
    weights |= dict(align=args.align_weight, teacher=args.teacher_weight)

    # ---- the global batch, shared between ranks and micro-batches
    seconds = crops.frames * vae.config.hop / data.rate
    per_step = share_evenly("--batch-seconds", args.batch_seconds, seconds, world)
    per_early_step = share_evenly("--encoder-batch-seconds", args.encoder_batch_seconds, seconds, world if early else 1)
    wave = torch.zeros(1, crops.frames * vae.config.hop, device=device)
    noise = torch.zeros(1, crops.frames, vae.config.latent_dim, device=device)
    flops = (forward_flops(vae, wave, noise) + 3 * forward_flops(discriminators, wave)) / seconds
    columns = ["loss", *weights, "wave", "disc", "grad", "grad_d", "valid_mel", "valid_stft"]
    run.begin(ema, dict(data=data.meta["sources"], ssl=ssl), modules, columns, flops, early)
    numbers = CropNumbers(per_step, early, per_early_step, args.micro_batch, rank, world)
    parts = (part for step in range(run.first, args.steps) for part in numbers.parts(step))
    loader = load_batches(crops, parts, args, device)
    if rank == 0:
        micro = len(numbers.parts(args.steps)[0])
        count = sum(p.numel() for p in vae.parameters()) / 1e6
        print(f"{device}, {world} rank(s); VAE {count:.2f} M parameters; {len(crops.clips)} clips, "
              f"{data.meta['hours']} h; a step is {per_step} crops of {seconds} s: "
              f"{world} x {per_step // world // micro} x {micro}")

    # ---- compiled and distributed views of the same weights; checkpoints and evaluation use the plain ones
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)

    def example(step: int):
        count = len(numbers.parts(step)[0])
        features = torch.zeros(count, crops.features, ssl["dim"], device=device) if ssl and aligns(step) else None
        return wave.expand(count, -1).contiguous(), noise.expand(count, -1, -1).contiguous(), features

    def aligns(step: int) -> bool:
        return with_ssl and (step < early or not early)

    def network_from(step: int):
        """The network that learns from this step on. Once frozen, the encoder holds its averaged weights, so that
        latents, and the DiTs trained on them, stay valid."""
        learns = step < early or not early and args.encoder_lr > 0
        vae.decoder.requires_grad_(step >= early)
        if vae.projectors:
            vae.projectors.requires_grad_(aligns(step))
        for (name, p), averaged in zip(vae.named_parameters(), ema.parameters()):
            if not name.startswith(vae.AFTER_LATENTS):
                p.requires_grad_(learns)
                if not learns:
                    p.data.copy_(averaged)
        with autocast():
            network = compiled(EncoderFirst(vae, reader) if step < early else vae, args.compile, *example(step))
        return distributed(network, world)

    with autocast():
        compile_d = args.compile and device.type == "cuda" and args.adv_weight > 0
        fast_d = compiled(discriminators, compile_d, example(args.steps)[0].repeat(2, 1))  # real and fake
    ddp_d = distributed(fast_d, world)
    network = network_from(run.first)
    mel = MelDistance(data.rate).to(device)
    clips = data.spread(data.split("valid"), args.eval_clips)

    def forward(network, batch, with_features: bool):
        with autocast():
            return network(batch["wave"], batch["noise"], batch["features"] if with_features else None)

    for step in run.steps():
        # ---- rates are pure functions of the step: resuming needs no scheduler state
        if step == early and step > run.first:
            network = network_from(step)
        rate = args.lr * args.lr_decay ** (step - early)
        if step < early:  # warm up, then along half a cosine to 0
            rate = args.lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / early))
        for group in optimizer.param_groups + optimizer_d.param_groups:
            group["lr"] = rate
        optimizer.param_groups[1]["lr"] = rate * args.encoder_lr
        adversarial = args.adv_weight > 0 and step >= max(args.adv_start, early)
        batches = [moved(next(loader), device) for _ in numbers.parts(step)]
        # One micro-batch: its forward pass serves both updates. Several: fakes are made first, without a graph.
        outputs = [forward(network, batches[0], aligns(step))] if len(batches) == 1 else None

        # ---- the discriminators' update: real and fake in one batch
        skipped = torch.zeros((), device=device)
        for i, batch in enumerate(batches if adversarial else ()):
            with torch.no_grad():
                fake = (outputs[i] if outputs else forward(network, batch, aligns(step)))[0].detach()
            with one_sum(ddp_d, i == len(batches) - 1):
                with autocast():
                    maps = ddp_d(torch.cat([fake, batch["wave"]]))
                fake_maps, real_maps = ([[m.chunk(2)[side] for m in each] for each in maps] for side in (0, 1))
                loss_d = discriminator_loss(fake_maps, real_maps)
                (loss_d / len(batches)).backward()
            run.note(disc=loss_d)
        if adversarial:
            norm_d, skipped = clipped_step(optimizer_d, discriminators.parameters(), MAX_NORM)
            run.note(grad_d=norm_d)

        # ---- the VAE's update: gradients flow through the discriminators, whose weights, updated above, get none
        discriminators.requires_grad_(False)
        for i, batch in enumerate(batches):
            with one_sum(network, i == len(batches) - 1):
                again, z, mean, logvar, aligned = outputs[i] if outputs else forward(network, batch, aligns(step))
                losses = again if step < early else dict(mel=mel(again, batch["wave"]))
                if not vae.config.mel:
                    losses["kl"] = kl_loss(mean, logvar)
                if aligned is not None:
                    losses["align"] = vae.projectors.loss(z, aligned, batch["valid"])
                if adversarial:
                    with autocast():
                        with torch.no_grad():
                            real_maps = fast_d(batch["wave"])
                        losses["adv"], losses["feature"] = generator_losses(fast_d(again), real_maps)
                if step >= early:
                    run.note(wave=F.l1_loss(again.detach(), batch["wave"]))
                loss = sum(weights[name] * value for name, value in losses.items())
                (loss / len(batches)).backward()
            run.note(loss=loss, **losses)
        discriminators.requires_grad_(True)
        norm, skipped_too = clipped_step(optimizer, [*vae.parameters(), *reader.parameters()], MAX_NORM)
        run.note(grad=norm, skipped=torch.maximum(skipped, skipped_too), lr=rate)
        update_ema(ema, vae, args.ema, step if step < early else step - early)  # the decoder's average begins anew
        run.audio += seconds * (per_early_step if step < early else per_step)
        if run.evaluating:
            run.score(evaluate, ema, reader if step < early else None, data, clips, mel, args.out / "samples", step + 1)
    if rank == 0:
        print(f"{args.out}: {args.steps} steps; its weights are named {ema.content_hash()}")


# ======================================================================================================================
# You can stop here. Below: evaluation, how a run begins, and the flags.


@torch.no_grad()
def evaluate(vae: SemanticVAE, reader, data: Data, clips: list[int], mel: MelDistance, folder: Path, step: int) -> dict:
    """Mean mel and STFT distance of whole validation clips, reconstructed from the posterior's mean and written as wav
    files. With a reader, while there is no decoder yet, the mel distance of what it reads."""
    totals = dict(valid_mel=0.0) if reader else dict(valid_mel=0.0, valid_stft=0.0)
    for n, clip in enumerate(clips):
        wave = data.get("audio", clip)[None].to(next(vae.parameters()).device)
        latents, _ = vae.encode(wave)
        if reader:
            whole = F.pad(wave, (0, -wave.shape[1] % vae.config.hop))
            totals["valid_mel"] += reader(latents, whole)["mel"].item() / len(clips)
            continue
        again = vae.decode(latents, wave.shape[-1])
        totals["valid_mel"] += mel(again, wave).item() / len(clips)
        totals["valid_stft"] += stft_distance(again, wave).item() / len(clips)
        if n < 4:
            write_wave(folder / f"{n}_original.wav", wave[0].cpu().numpy(), data.rate)
            write_wave(folder / f"{n}_step{step:07d}.wav", again[0].cpu().numpy(), data.rate)
    return totals


def share_evenly(flag: str, wanted: float, seconds: float, world: int) -> int:
    """Crops of `seconds` in a step of `wanted` seconds of audio."""
    count = max(1, round(wanted / seconds))
    if count % world:
        raise InputError(f"{flag} {wanted} is {count} crops of {seconds} s, which {world} ranks cannot share evenly")
    return count


def make_vae(args, data: Data, ssl: dict | None) -> SemanticVAE:
    """The network as --resume, --init or the preset says, if it fits the data."""
    source = args.out if args.resume else args.init  # a run that goes on no longer needs what it began with
    dim = ssl["dim"] if ssl else 0
    if not source:
        settings = dict(sample_rate=data.rate, ssl_dim=dim, align=args.align, mel=args.mel)
        if args.latent_dim:
            settings["latent_dim"] = args.latent_dim
        return SemanticVAE(VAEConfig(**PRESETS[args.preset]["vae"] | settings))
    vae = SemanticVAE.from_pretrained(source).train()
    config = vae.config
    if isinstance(vae.decoder, Vocos):
        raise InputError(f"--init {source} is Vocos, which is used as it is: for a vocoder, --preset f5-mel")
    if args.latent_dim not in (None, config.latent_dim):
        raise InputError(f"{source} has latents of {config.latent_dim} dimensions: drop --latent-dim {args.latent_dim}")
    if ssl and (config.ssl_dim, config.align) != (dim, args.align):
        raise InputError(f"{source} was aligned {config.align} with features of width {config.ssl_dim}, "
                         f"{ssl['model']} gives width {dim} and --align is {args.align}")
    if args.mel != config.mel:
        raise InputError(f"{source} was trained with{'' if config.mel else 'out'} --mel: do the same here")
    if config.sample_rate != data.rate:
        raise InputError(f"{source} works at {config.sample_rate} Hz, {args.data} holds {data.rate} Hz")
    return vae


def make_discriminators(args) -> Discriminators:
    """New ones, or those beside the authors' release that a run begins with."""
    if args.init and not args.resume:
        path = local_folder(args.init) / "discriminator" / "weights.pth"
        if path.exists():
            tensors = load_torch(path)
            tensors = tensors.get("state_dict", tensors)
            return rebuild(Discriminators, args.disc_width, tensors, f"{path} (--disc-width {args.disc_width})")
    return Discriminators(args.disc_width)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    positive = at_least(0.01, float)
    weight = at_least(0, float)
    flag("--latent-dim", type=at_least(1), help="dimensions of the latent (paper: 64; its baselines: 16 and 64)")
    flag("--mel", **switch(False), help="the mel baseline: train a vocoder on --latent-dim log-mel bands")
    flag("--align-weight", type=weight, default=1, help="0: a vanilla VAE, without SSL features (default %(default)s)")
    flag("--align", choices=["down", "up"], default="down", help="features to the latent (the paper), or the reverse")
    flag("--adv-weight", type=weight, default=1, help="0: no discriminators (default %(default)s)")
    flag("--kl-weight", type=weight, default=0.01, help="default %(default)s")
    flag("--adv-start", type=at_least(0), default=0, help="first step with discriminators (default %(default)s)")
    flag("--disc-width", type=positive, default=1, help="the discriminators' channels, relative to the paper's")
    flag("--batch-seconds", type=positive, default=192, help="audio in an update, over all ranks (default %(default)s)")
    flag("--crop", type=positive, default=3, help="seconds of a training crop (default %(default)s)")
    flag("--micro-batch", type=at_least(1), default=8, help="crops a rank handles at once: lower it if memory runs out")
    flag("--lr", type=weight, default=1e-4, help="of both optimisers, for any number of ranks (default %(default)s)")
    flag("--lr-decay", type=weight, default=0.999996, help="factor a step (default %(default)s)")
    flag("--encoder-lr", type=weight, default=1, help="factor on --lr for the encoder; 0: train the decoder alone")
    flag("--encoder-steps", type=at_least(0), default=0, help="steps in which the encoder learns first, alone")
    flag("--encoder-batch-seconds", type=positive, default=192, help="audio in one of those updates")
    flag("--teacher-weight", type=weight, default=15, help="of SSL features in those; 0: log-mels alone")
    flag("--unit-latents", **switch(False), help="begin with informative latents: see unit_latents()")
    flag("--eval-clips", type=at_least(1), default=16, help="validation clips (default %(default)s)")
    return read_args(parser, "train_vae", argv, torch.cuda.is_bf16_supported(including_emulation=False))


if __name__ == "__main__":
    cli(main)
