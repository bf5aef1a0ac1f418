"""The VAE-GAN step as one would write it first: what train_vae.py must equal (test_train.py).

Resampling by depthwise convolutions, real and fake through the discriminators one after the other, gradients for every
weight in both steps, no compiler. Everything else (networks, losses, crops, schedules) is the project's own."""

import copy
import functools

import torch
import torch.nn.functional as F

import train_vae
from model import AntiAliasedSnake, MelDistance, SemanticVAE, VAEConfig, kl_loss, lowpass
from prepare import Data, update_ema


def convolved(self, x):
    """AntiAliasedSnake.forward by BigVGAN's own operations."""
    channels = x.shape[1]
    filter = lowpass().to(x).expand(channels, -1, -1)
    x = 2 * F.conv_transpose1d(F.pad(x, (5, 5), "replicate"), filter, stride=2, groups=channels)[..., 15:-15]
    return F.conv1d(F.pad(self.act(x), (5, 6), "replicate"), filter, stride=2, groups=channels)


def convolve(vae) -> None:
    """Have this VAE resample by convolutions."""
    for layer in vae.modules():
        if isinstance(layer, AntiAliasedSnake):
            layer.forward = functools.partial(convolved, layer)


def train(argv, device=torch.device("cpu")) -> list[dict]:
    """Train with train_vae.py's flags; the losses of each step."""
    args = train_vae.parse_args(argv)
    data = Data(args.data, ("audio", "ssl"))
    torch.manual_seed(args.seed)
    settings = train_vae.PRESETS[args.preset]["vae"] | dict(sample_rate=data.rate, ssl_dim=data.meta["ssl"]["dim"])
    vae = SemanticVAE(VAEConfig(**settings)).to(device)
    crops = train_vae.Crops(data, vae.config, args.crop, args.seed, data.meta["ssl"])
    if args.unit_latents:
        train_vae.unit_latents(vae, torch.stack([crops[k]["wave"] for k in range(32)]).to(device))
    discriminators = train_vae.Discriminators(args.disc_width).to(device)
    mel = MelDistance(data.rate).to(device)
    encoding = [p for name, p in vae.named_parameters() if not name.startswith(vae.AFTER_LATENTS)]
    decoding = [p for name, p in vae.named_parameters() if name.startswith(vae.AFTER_LATENTS)]
    optimizer = torch.optim.AdamW([dict(params=decoding), dict(params=encoding)], betas=(0.8, 0.99))
    optimizer_d = torch.optim.AdamW(discriminators.parameters(), betas=(0.8, 0.99))
    ema = copy.deepcopy(vae)
    per_step = round(args.batch_seconds / (crops.frames * vae.config.hop / data.rate))
    numbers = train_vae.CropNumbers(per_step, 0, per_step, per_step, 0, 1)
    parts = (part for step in range(args.steps) for part in numbers.parts(step))
    loader = iter(torch.utils.data.DataLoader(crops, batch_sampler=parts))
    rows = []
    convolve(vae)
    for step in range(args.steps):
        rate = args.lr * args.lr_decay**step
        for group in optimizer.param_groups + optimizer_d.param_groups:
            group["lr"] = rate
        optimizer.param_groups[1]["lr"] = rate * args.encoder_lr
        batch = {k: v.to(device) for k, v in next(loader).items()}
        fake, z, mean, logvar, aligned = vae(batch["wave"], batch["noise"], batch["features"])
        losses = dict(
            mel=mel(fake, batch["wave"]),
            kl=kl_loss(mean, logvar),
            align=vae.projectors.loss(z, aligned, batch["valid"]),
        )
        if step >= args.adv_start:
            losses["disc"] = train_vae.discriminator_loss(discriminators(fake.detach()), discriminators(batch["wave"]))
            optimizer_d.zero_grad()
            losses["disc"].backward()
            torch.nn.utils.clip_grad_norm_(discriminators.parameters(), train_vae.MAX_NORM)
            optimizer_d.step()
            losses["adv"], losses["feature"] = train_vae.generator_losses(
                discriminators(fake), discriminators(batch["wave"])
            )
        weights = dict(mel=15, adv=args.adv_weight, feature=2, kl=args.kl_weight, align=args.align_weight)
        loss = sum(weights[k] * v for k, v in losses.items() if k in weights)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), train_vae.MAX_NORM)
        optimizer.step()
        update_ema(ema, vae, args.ema, step)
        rows.append({k: v.item() for k, v in (losses | dict(loss=loss, grad=norm)).items()})
    return rows
