"""Stage 1: train the Semantic-VAE on a prepared data folder.

    python train_vae.py                                                    # the demo, on two CPU cores
    python train_vae.py --preset paper --data data/libritts --out runs/vae-libritts
    torchrun --nproc_per_node 8 train_vae.py --preset paper --data ...     # the same training on 8 GPUs
    python train_vae.py --resume --out runs/vae                            # go on exactly where it stopped

The run folder holds model.safetensors + config.json (the EMA weights: all that sampling needs), state.pt (everything
needed to go on), args.json, log.csv, and samples/ with the same validation clips after every evaluation.
"""

import argparse
import contextlib
import copy
import csv
import datetime
import functools
import io
import math
import os
import shutil
import signal
import time
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.fx.experimental._config
import torch.nn.functional as F
import torchaudio
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from model import (PRESETS, InputError, LogMel, SemanticVAE, VAEConfig, Vocos, alignment_loss, at_rate, conv_head,
                   kl_loss, load_torch, local_folder, read_json, rebuild, upward_alignment_loss, write_atomic,
                   write_json)  # fmt: skip
from prepare import (Data, SSLModel, at_least, cli, frame_count, in_demo, layer_number, load_teacher, lock, repeat_last,
                     start_ranks, write_wave)  # fmt: skip

# --------------------------------------------------------------------------------------------------------------
# Spectral distances. All in float32.


def stft(wave, window: int):
    """[B, T] → complex [B, window / 2 + 1, frames]: periodic Hann window, hop of a quarter, centred with reflect padding."""
    return torch.stft(wave.float(), window, window // 4, window=torch.hann_window(window, device=wave.device), return_complex=True)


class MelDistance(nn.Module):
    """L1 between log10 mel magnitudes at seven scales, summed (DAC's multi-scale mel loss): short windows see when something sounds, long
    ones at which pitch; logs, since loudness is heard in ratios."""

    def __init__(self, sample_rate: int):
        super().__init__()
        mel = lambda window, bands: torchaudio.transforms.MelSpectrogram(
            sample_rate, window, hop_length=window // 4, n_mels=bands, power=1, norm="slaney", mel_scale="slaney")  # fmt: skip
        with warnings.catch_warnings():  # short windows leave some narrow filters empty, as in the reference
            warnings.simplefilter("ignore")
            self.mels = nn.ModuleList(mel(32 * 2**i, 5 * 2**i) for i in range(7))

    def scales(self, x, y) -> list[torch.Tensor]:
        """[B, T] twice → one scalar a scale."""
        log = lambda magnitude: magnitude.clamp(min=1e-5).log10()
        return [F.l1_loss(log(mel(x.float())), log(mel(y.float()))) for mel in self.mels]

    def forward(self, x, y):
        return sum(self.scales(x, y))


def stft_distance(x, y):
    """Logged and evaluated, not trained on: L1 of log10 power plus L1 of magnitude, windows 2048 and 512."""
    total = 0
    for window in (2048, 512):
        a, b = stft(x, window).abs(), stft(y, window).abs()
        total = total + F.l1_loss(a.clamp(min=1e-5).square().log10(), b.clamp(min=1e-5).square().log10()) + F.l1_loss(a, b)
    return total


# --------------------------------------------------------------------------------------------------------------
# The encoder first: what latents must carry can be learned without decoding any of them, at a fraction of the cost.


class LatentReader(nn.Module):
    """A small head that tells, from the sampled latents, the log-mels and the teacher's features of the same frames."""

    BANDS = 80

    def __init__(self, vae: VAEConfig, ssl_dim: int):
        super().__init__()
        self.mel = LogMel(vae.sample_rate, self.BANDS, vae.hop)
        self.head = conv_head(vae.latent_dim, 256, self.BANDS + ssl_dim)
        self.register_buffer("centre", torch.zeros(ssl_dim))  # of the teacher's features,
        self.register_buffer("spread", torch.ones(ssl_dim))  # and their standard deviation

    def forward(self, z, wave, features=None):
        """z [B, N, D], wave [B, T], features [B, S, ssl_dim] → distances by name: mel, the mean L1 of log10 magnitudes, times the seven scales of
        MelDistance, so that its weight means the same; teacher, the mean square."""
        told = self.head(z.mT).mT.float()  # [B, N, bands + ssl_dim]
        mel = self.mel(wave[:, None]).mT  # [B, N, bands]
        distances = dict(mel=7 / math.log(10) * F.l1_loss(told[..., : self.BANDS], mel))
        if features is not None and len(self.centre):
            wanted = (at_rate(features, z.shape[1]) - self.centre) / self.spread
            distances["teacher"] = F.mse_loss(told[..., self.BANDS :], wanted)
        return distances


class EncoderFirst(nn.Module):
    """SemanticVAE.forward with a reader in place of the decoder."""

    def __init__(self, vae: SemanticVAE, reader: LatentReader):
        super().__init__()
        self.vae = vae
        self.reader = reader

    def forward(self, wave, noise, features=None):
        mean, logvar = self.vae.encode(wave)
        z = mean + noise * (0.5 * logvar).exp()
        aligned = self.vae.projectors(z, features) if features is not None else None
        return self.reader(z, wave, features), z, mean, logvar, aligned


# --------------------------------------------------------------------------------------------------------------
# Discriminators (DAC): five look at the wave folded by a period, three at bands of a complex STFT.


def conv2d(*args, activate=True, **kwargs) -> nn.Module:
    layer = weight_norm(nn.Conv2d(*args, **kwargs))
    return nn.Sequential(layer, nn.LeakyReLU(0.1, inplace=True)) if activate else layer


class PeriodDiscriminator(nn.Module):
    """The wave folded to [B, 1, T/p, p], each column convolved by itself (HiFi-GAN, arXiv 2010.05646): samples that
    are p apart stand in one column, and errors of that period with them. Primes, so that no two see the same."""

    def __init__(self, period: int, width: float):
        super().__init__()
        self.period = period
        sizes = [1] + [max(4, int(c * width)) for c in (32, 128, 512, 1024, 1024)]
        self.convs = nn.ModuleList(
            conv2d(a, b, (5, 1), (3 if i < 4 else 1, 1), padding=(2, 0)) for i, (a, b) in enumerate(zip(sizes, sizes[1:])))
        self.conv_post = conv2d(sizes[-1], 1, (3, 1), padding=(1, 0), activate=False)

    def forward(self, wave):  # [B, T]
        p = self.period
        x = F.pad(wave[:, None], (0, p - wave.shape[-1] % p), mode="reflect")  # a whole period where nothing is missing
        x = x.unflatten(-1, (-1, p))  # [B, 1, T/p, p]
        maps = []
        for layer in self.convs:
            maps.append(x := layer(x))
        return [*maps, self.conv_post(x)]


class STFTDiscriminator(nn.Module):
    """Five bands of a complex STFT, each with convolutions of its own, joined for the logits."""

    EDGES = (0, 0.1, 0.25, 0.5, 0.75, 1)

    def __init__(self, window: int, width: float):
        super().__init__()
        self.window, c = window, max(4, int(32 * width))
        self.bands = [(int(a * (window // 2 + 1)), int(b * (window // 2 + 1))) for a, b in zip(self.EDGES, self.EDGES[1:])]
        wide = lambda inputs, stride: conv2d(inputs, c, (3, 9), (1, stride), padding=(1, 4))
        self.band_convs = nn.ModuleList(
            nn.ModuleList([wide(2, 1), wide(c, 2), wide(c, 2), wide(c, 2), conv2d(c, c, (3, 3), padding=(1, 1))]) for _ in self.bands)
        self.conv_post = conv2d(c, 1, (3, 3), padding=(1, 1), activate=False)

    def forward(self, wave):  # [B, T]
        hop = self.window // 4
        edge, more = (self.window - hop) // 2, -wave.shape[-1] % hop
        wave = F.pad(wave[:, None], (edge, edge + more), mode="reflect")[:, 0]
        x = torch.view_as_real(stft(wave, self.window)[..., 2:-2]).permute(0, 3, 2, 1)  # [B, 2, frames, bins]
        maps, ends = [], []
        for (low, high), layers in zip(self.bands, self.band_convs):
            band = x[..., low:high]
            for layer in layers:
                maps.append(band := layer(band))
            ends.append(band)
        return [*maps, self.conv_post(torch.cat(ends, dim=-1))]


class Discriminators(nn.Module):
    """All eight. Audio [B, T] → for each a list of feature maps, the last being its logits."""

    def __init__(self, width: float = 1.0):
        super().__init__()
        self.discriminators = nn.ModuleList(
            [PeriodDiscriminator(p, width) for p in (2, 3, 5, 7, 11)] + [STFTDiscriminator(w, width) for w in (2048, 1024, 512)])

    def forward(self, wave):
        wave = wave - wave.mean(-1, keepdim=True)
        wave = 0.8 * wave / (wave.abs().amax(-1, keepdim=True) + 1e-9)
        return [d(wave) for d in self.discriminators]


def discriminator_loss(fake, real):
    """Least squares (without ½), summed over the discriminators: real logits to 1, fake ones to 0."""
    return sum(f[-1].float().square().mean() + (1 - r[-1].float()).square().mean() for f, r in zip(fake, real))


def generator_losses(fake, real):
    """(adversarial: fake logits to 1; feature matching: L1 to the real signal's maps), summed over the discriminators."""
    adversarial = sum((1 - f[-1].float()).square().mean() for f in fake)
    matching = sum(F.l1_loss(a.float(), b.float()) for f, r in zip(fake, real) for a, b in zip(f[:-1], r[:-1]))
    return adversarial, matching


# --------------------------------------------------------------------------------------------------------------
# Data: crop number k of the whole training is a pure function of (seed, k), whatever the ranks, workers and resumptions.

# What a stream of random numbers is for stands before its seed: numpy pads seeds with zeros, so that [s, 1] and [s, 1, 0] are one stream.
ORDER = 1
DRAWS = 2

class Crops(torch.utils.data.Dataset):
    """Crops of the training clips, with the SSL frames of the same moments and the noise that will sample their latents."""

    def __init__(self, data: Data, vae: VAEConfig, seconds: float, seed: int, ssl: dict | None, context: float | None = None):
        """ssl: what the features are (None: no features); context: seconds around the crop that an online teacher hears."""
        self.data, self.latent_dim, self.seed, self.hop = data, vae.latent_dim, seed, vae.hop
        self.clips = data.split("train")
        if not self.clips:
            raise InputError(f"{data.folder} holds no training clips")
        # SSL frames per latent frame, 5/4 for 50 and 40 a second: crops start and end where both grids meet.
        self.ratio = Fraction(ssl["rate"]) * vae.hop / data.rate if ssl else Fraction(1)
        self.grid = self.ratio.denominator
        self.frames = round(seconds * data.rate / vae.hop / self.grid) * self.grid
        self.context = None if context is None else round(context * data.rate / vae.hop / self.grid) * self.grid
        self.features = int(self.frames * self.ratio) if ssl else 0  # SSL frames of a crop
        if not self.frames:
            raise InputError(f"--crop {seconds} is shorter than {self.grid} latent frames ({self.grid * vae.hop / data.rate} s)")

    @functools.lru_cache(2)  # every crop asks
    def order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([ORDER, self.seed, epoch]).permutation(len(self.clips))

    def clip(self, k: int) -> int:
        epoch, position = divmod(k, len(self.clips))
        return self.clips[self.order(epoch)[position]]

    def __getitem__(self, k: int):
        clip, rng = self.clip(k), np.random.default_rng([DRAWS, self.seed, k])
        whole = frame_count(int(self.data.samples[clip]), self.data.rate, Fraction(self.data.rate, self.hop))
        start = self.grid * int(rng.integers(0, max(0, whole - self.frames) // self.grid + 1))  # inside the clip where it is long enough
        wave = self.data.get("audio", clip, start * self.hop, self.frames * self.hop)
        item = dict(
            wave=F.pad(wave, (0, self.frames * self.hop - len(wave))),  # [T]
            noise=torch.from_numpy(rng.standard_normal((self.frames, self.latent_dim), dtype=np.float32)),  # [N, D]
            valid=torch.arange(self.frames) < math.ceil(len(wave) / self.hop))  # [N]  # fmt: skip
        if self.context is not None:
            first = max(0, start - self.context)
            heard = self.data.get("audio", clip, first * self.hop, (start - first + self.frames + self.context) * self.hop)
            room = (self.frames + 2 * self.context) * self.hop
            item |= dict(heard=F.pad(heard, (0, room - len(heard))), samples=len(heard), skip=int((start - first) * self.ratio))
        elif self.features:
            item["ssl"] = repeat_last(self.data.get("ssl", clip, int(start * self.ratio), self.features), self.features)  # [S, ssl_dim]
        return item


def listen(teacher: SSLModel, batch: dict, count: int) -> torch.Tensor:
    """The teacher's features [B, count, ssl_dim] of a batch of crops, from the crops and the context around them alone."""
    waves = [wave[:n].numpy() for wave, n in zip(batch.pop("heard"), batch.pop("samples").tolist())]
    features, skips = [None] * len(waves), batch.pop("skip").tolist()
    for part in teacher.batches([len(w) for w in waves], math.inf):
        for i, x in zip(part, teacher([waves[i] for i in part])):
            features[i] = repeat_last(x[skips[i] : skips[i] + count], count)
    return torch.stack(features)


class CropNumbers:
    """This rank's micro-batches, step after step: each step's crops are shared in order. The first steps may have crops of their own number."""

    def __init__(self, steps: range, per_step: int, early_steps: int, early_per_step: int, micro: int, rank: int, world: int):
        self.steps, self.rank, self.world, self.micro = steps, rank, world, micro
        self.per_step, self.early_steps, self.early_per_step = per_step, early_steps, early_per_step

    def parts(self, step: int) -> list[list[int]]:
        early = min(step, self.early_steps)
        share = (self.early_per_step if step < self.early_steps else self.per_step) // self.world
        micro = next(n for n in range(min(self.micro, share), 0, -1) if share % n == 0)  # the largest that divides the share
        first = early * self.early_per_step + (step - early) * self.per_step + self.rank * share
        return [list(range(k, k + micro)) for k in range(first, first + share, micro)]

    def __iter__(self):
        for step in self.steps:
            yield from self.parts(step)


# --------------------------------------------------------------------------------------------------------------
# The run: what both training scripts need around their loops.

STALLED = datetime.timedelta(minutes=30)  # a rank that another waits for this long hangs

def read_args(parser: argparse.ArgumentParser, kind: str, argv, bf16: bool) -> argparse.Namespace:
    """The flags, with those that both trainings share. Below them what --resume finds in the run folder, or else the preset's settings."""
    parser.add_argument("--preset", choices=list(PRESETS), help="the network's size, and settings in place of the defaults shown here, which are the paper's (default: for the demo's data demo)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out; its settings hold where no flag is given")
    parser.add_argument("--steps", type=at_least(1), default=600_000, help="updates (default %(default)s)")
    parser.add_argument("--ema", type=at_least(0, float, 1), default=0.9999, help="decay of the averaged weights (default %(default)s)")
    parser.add_argument("--eval-every", type=at_least(1), default=5000, help="steps between evaluations and checkpoints (default %(default)s)")
    parser.add_argument("--keep", type=at_least(0), default=0, help="also keep the last so many checkpoints whole, as OUT/step0005000, to go back to (default %(default)s)")
    parser.add_argument("--log-every", type=at_least(1), default=100, help="steps between log lines (default %(default)s)")
    parser.add_argument("--workers", type=at_least(0), default=4 if torch.cuda.is_available() else 0, help="loader processes a rank (default %(default)s)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=bf16, help="matrix products in bfloat16 (default: where that is faster, here %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    parser.add_argument("--seed", type=at_least(0), default=0, help="default %(default)s")
    known, _ = parser.parse_known_args(argv)
    there = [name for name in ("args.json", "state.pt", "config.json", "model.safetensors", "log.csv") if (known.out / name).exists()]
    if known.resume:
        if there[:2] != ["args.json", "state.pt"]:
            raise InputError(f"{known.out} holds no run to resume (args.json and state.pt, of its first checkpoint): begin it without --resume")
        parser.set_defaults(**{k: in_demo(v) for k, v in read_json(known.out / "args.json").items()})
    else:
        if "state.pt" in there:
            raise InputError(f"{known.out} already holds a run: add --resume to go on with it, or choose another --out")
        if there and not (known.out / ".lock").exists():
            raise InputError(f"{known.out} holds a {there[0]}, but no run that was begun here: choose another --out")
        parser.set_defaults(**PRESETS[known.preset or "demo"][kind])
    return parser.parse_args(argv)


def check_run(args, data: Data, device, **facts) -> None:
    """Refuse what would waste hours: no preset for a user's own data, a GPU's preset on a CPU, a warm-up that never ends, and a resumed run under
    which its data have changed. facts: what the run learns from, by name; kept in args.json."""
    demo = all(Path(source).parts[-2:] == ("demo", "corpus") for source in data.meta["sources"])
    if not args.preset and not demo:
        raise InputError(f"{args.data} is not the demo's: choose a --preset: {', '.join(PRESETS)}")
    args.preset = args.preset or "demo"
    if device.type == "cpu" and args.preset != "demo" and args.device != "cpu":
        raise InputError(f"--preset {args.preset} is made for GPUs, and none was found: --device cpu trains it on this CPU all the same, very slowly")
    warmup = getattr(args, "warmup", 0)
    if args.steps <= warmup:
        raise InputError(f"--steps {args.steps} ends within the --warmup of {warmup} steps: lower --warmup or raise --steps")
    facts = dict(data=data.identity, normalisation=data.meta["text"]) | facts
    for name, value in facts.items():
        before = getattr(args, "facts", facts).get(name, value)
        if before != value:
            raise InputError(f"{args.out} learned with {name} {before}, {args.data} now has {value}: give the --data of before, or begin anew in another --out")
    args.facts = facts


def save_args(args) -> None:
    write_json(args.out / "args.json", {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "resume"})


def load_state(path: Path, modules: dict) -> dict:
    """What save_run wrote: loads weights and optimisers, returns the rest."""
    try:
        state = load_torch(path)
        for name, module in modules.items():
            module.load_state_dict(state[name])
        return dict(step=int(state["step"]), means=state.get("means", {}), seconds=float(state.get("seconds", 0)), intelligible=float(state.get("intelligible", 0)))
    except Exception as e:  # torch raises many kinds for names, shapes and types that do not fit
        raise InputError(f"cannot resume from {path}: {str(e).splitlines()[0]}; choose another --out to begin anew") from e


def save_run(out: Path, step: int, model, notes: dict, modules: dict, means: dict, keep: int, **more) -> None:
    """The averaged weights for sampling, and all that --resume needs. Of the last `keep` checkpoints both also stay in OUT/step0005000: a
    training that has collapsed goes on from there with --resume --out OUT/step0005000."""
    state = dict(step=step, means=means, **more, **{name: module.state_dict() for name, module in modules.items()})
    for folder in [out, out / f"step{step:07d}"][: 2 if keep else 1]:
        vae = notes.get("vae", "")
        moved = dict(vae=os.path.join("..", vae)) if folder != out and vae and (out / vae).is_dir() else {}
        model.save_pretrained(folder, **notes | moved, step=step)
        write_atomic(folder / "state.pt", lambda p: torch.save(state, p))
    if keep:
        for name in ("args.json", "log.csv"):
            shutil.copyfile(out / name, folder / name)
        for old in sorted(out.glob("step" + 7 * "[0-9]"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)


def first_step(args, state: dict, rank: int) -> int:
    """The step that a run goes on with, and a word if none is left."""
    if state["step"] > args.steps:
        raise InputError(f"{args.out} has made {state['step']} steps, more than --steps {args.steps}: give more")
    if state["step"] == args.steps and rank == 0:
        print(f"{args.out} has made all of its {args.steps} steps: to go on, give more with --steps")
    return state["step"]


class Log:
    """log.csv: one row a line of the log. Rows of steps that were lost with a crash are dropped when a run resumes."""

    def __init__(self, path: Path, columns: list[str], step: int):
        self.path, self.columns = path, columns
        found = path.read_text(encoding="utf-8") if step and path.exists() else ""
        rows = csv.DictReader(io.StringIO(found.rpartition("\n")[0]))  # a crash may leave a part of a line
        text = "\n".join([",".join(columns), *(",".join(r.get(c, "") for c in columns) for r in rows if int(r["step"]) <= step)])
        write_atomic(path, lambda p: p.write_text(text + "\n", encoding="utf-8"))

    def row(self, **values) -> None:
        """Append a row and print it, without what is empty."""
        shown = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items()}
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(",".join(shown.get(c, "") for c in self.columns) + "\n")
        tqdm.write("  ".join(f"{k} {v}" for k, v in shown.items()))


class Means:
    """Running means of named scalars, kept on the device; read and reset once a log line, over all ranks."""

    def __init__(self, saved: dict[str, torch.Tensor], device):
        self.values = {k: list(v.to(device)) for k, v in saved.items()}
        self.streak = 0  # updates left out in a row

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for k, v in values.items():
            self.values.setdefault(k, []).append(v.detach().float())

    def state(self, world: int) -> dict[str, torch.Tensor]:
        """What has gathered since the last log line, averaged over ranks: resumed between two lines, a run loses none of it."""
        stacked = {k: torch.stack(v) * (k != "part") for k, v in self.values.items()}  # whose part it was has no mean
        for v in stacked.values() if world > 1 else ():
            dist.all_reduce(v.div_(world))
        return {k: v.cpu() for k, v in stacked.items()}

    def read(self, world: int) -> dict[str, float]:
        self.values.pop("part", None)  # not for the log
        means = torch.stack([v[v.isfinite()].mean() for v in map(torch.stack, self.values.values())])  # "skipped" counts the others
        if world > 1:
            dist.all_reduce(means)
        names, self.values = list(self.values), {}
        return dict(zip(names, (means / world).tolist()))

    def report_skipped(self, done: int, clips) -> None:
        """Name the first update since the last log line that was left out, what was not finite, and clips(step, micro-batch). Five updates in a
        row that were left out end the run; its checkpoints hold none of them."""
        skipped = torch.stack(self.values["skipped"]).tolist()
        if any(skipped):
            back = len(skipped) - next(i for i, one in enumerate(skipped) if one)
            name = next(name for name, v in self.values.items() if not torch.stack(v).isfinite().all())  # terms stand before their sum and its gradient
            names = clips(done - back, int(self.values["part"][-back])) if not name.startswith("grad") else ["unknown: each loss was finite"]
            tqdm.write(f"step {done - back + 1}: {name} was not finite; of {len(skipped)} updates since the last log line {sum(skipped):.0f} were left out; "
                       f"among the clips {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}")  # fmt: skip
        for one in skipped:
            self.streak = self.streak + 1 if one else 0
            if self.streak == 5:
                raise InputError(f"step {done}: five updates in a row were left out, since losses or gradients were not finite: lower --lr, or take out the clips named above, and --resume")


MATRIX_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71}  # dense bfloat16, by the makers' data


def forward_flops(module: nn.Module, *example) -> int:
    """Operations of one forward pass, counted without a compiler."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*example)
    return counter.get_total_flops()


class Speed:
    """For the log: seconds of audio a second, peak memory in GB on a GPU, and where the GPU's rate is known the share of it that is used
    (MFU): three times the operations of the forward pass, for backward costs two."""

    def __init__(self, device, flops: float):
        """flops: of a forward pass of all ranks over one second of audio."""
        self.device, self.flops, self.audio, self.begun = device, flops, 0.0, time.time()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.rate = next((1e12 * rate for part, rate in MATRIX_TFLOPS.items() if part in name), None)

    def row(self, world: int) -> dict[str, float]:
        """Of the time since the last row."""
        pace = self.audio / (time.time() - self.begun)
        self.audio, self.begun = 0.0, time.time()
        row = dict(audio=pace)
        if self.device.type == "cuda":
            row["memory"] = torch.cuda.max_memory_allocated() / 1e9
        if self.rate:
            row["mfu"] = 3 * pace * self.flops / (self.rate * world)
        return row


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema ← d · ema + (1 − d) · model with d rising from 0 to `decay`, so that short runs are not stuck at their start."""
    decay = min(decay, step / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def compiled(module: nn.Module, wanted: bool, *example, parts=None):
    """The module under torch.compile, tried on an example, forward and backward; itself, with a line that says why, if that fails. Where parts
    are named, they alone are compiled, in their places and for all shapes: alike, they share one graph, and training begins in seconds."""
    if not wanted:
        return module
    torch._dynamo.config.optimize_ddp = False  # would split graphs by DDP's buckets, and cannot where shapes are dynamic
    torch.fx.experimental._config.use_duck_shape = False  # sizes that agree in one batch may differ in the next
    begun, first = time.time(), not dist.is_initialized() or dist.get_rank() == 0
    if first:
        tqdm.write("compiling: the first step waits for it")
    try:
        fast = module if parts else torch.compile(module, dynamic=False)
        for part in parts or ():
            part.compile(dynamic=True)
        torch.autograd.backward([y.sum() for y in tree_leaves(fast(*example)) if torch.is_tensor(y) and y.requires_grad])
        if first:
            tqdm.write(f"compiled in {time.time() - begun:.0f} s")
        return fast
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever the compiler raises, training can go on without it
        tqdm.write(f"torch.compile cannot run here ({type(e).__name__}: {str(e).splitlines()[0][:120]}): training goes on eagerly")
        for part in parts or ():
            part._compiled_call_impl = None
        return module
    finally:
        module.zero_grad()


STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


def leave_signals_to_the_trainer(worker: int) -> None:
    """For loader processes: a signal to the whole process group must not kill them in the middle of the step that is to be finished."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


class Stop:
    """For loops that need not be interrupted in the middle: SIGTERM, Ctrl-C and a closed terminal are noted, and all ranks stop after the same
    step. A second Ctrl-C is at once; a second SIGTERM is not, since schedulers send it to torchrun and to the ranks alike."""

    def __init__(self):
        self.number = 0
        self.group = dist.new_group(backend="gloo", timeout=STALLED) if dist.is_initialized() else None  # the CPUs agree, no GPU is waited for
        for number in STOPS:
            if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.note)

    def note(self, number, frame):
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt(number)
        self.number = number

    def agreed(self) -> int:
        """The signal that any rank has heard; 0: none."""
        number = torch.tensor(self.number)
        if self.group:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return number.item()


def stopped_at(out: Path, step: int, signal: int, rank: int) -> int:
    """Say how a run that was stopped by a signal goes on; its exit code."""
    if rank == 0:
        print(f"stopped at step {step}, which is saved: go on with --resume --out {out}")
    return 128 + signal


def guarded_step(optimizer: torch.optim.AdamW, norm: torch.Tensor) -> torch.Tensor:
    """One update; left out if the gradients' norm is not finite, without the CPU waiting for the device. Returns 1 if it was left out."""
    optimizer.found_inf = (~norm.isfinite()).float()  # what torch's GradScaler sets, too: the fused step does nothing where it is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer.found_inf


# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def unit_latents(vae: SemanticVAE, waves: torch.Tensor, noise: float = 0.2) -> None:
    """Data-dependent initialisation (LSUV, arXiv 1511.06422): over `waves` [B, T] every convolution of the encoder gives unit variance, its bias 0;
    the posterior's mean has zero mean and unit variance a channel, its standard deviation is about `noise`.

    PyTorch's default makes speech smaller from layer to layer, until it drowns in the biases, and the means hardly vary under noise of 1:
    hundreds of steps pass before anything is heard through the latents. Long runs can afford that; a run of minutes cannot."""

    def unit_variance(conv, inputs, output):
        size = output.std()
        conv.parametrizations.weight.original0 /= size
        return output / size

    convs = [layer for layer in vae.encoder.modules() if isinstance(layer, nn.Conv1d)]
    for conv in convs:
        nn.init.zeros_(conv.bias)
    hooks = [conv.register_forward_hook(unit_variance) for conv in convs]
    mean, _ = vae.encode(waves)
    for hook in hooks:
        hook.remove()
    centre, scale = mean.mean((0, 1)), mean.std((0, 1))
    vae.fc_mu.weight /= scale[:, None]
    vae.fc_mu.bias.copy_((vae.fc_mu.bias - centre) / scale)
    vae.fc_var.bias += 2 * math.log(noise)


@torch.no_grad()
def evaluate(vae: SemanticVAE, reader, data: Data, clips: list[int], mel: MelDistance, device, folder: Path, step: int) -> dict:
    """Mean mel and STFT distance of whole validation clips, reconstructed from the posterior's mean and written as wav files. With a
    reader, while there is no decoder yet, the mel distance alone, of what it reads."""
    if reader:
        waves = [data.get("audio", clip)[None].to(device) for clip in clips]
        waves = [F.pad(wave, (0, -wave.shape[1] % vae.config.hop)) for wave in waves]
        return dict(valid_mel=float(np.mean([reader(vae.encode(wave)[0], wave)["mel"].item() for wave in waves])))
    totals = dict(valid_mel=0.0, valid_stft=0.0)
    for n, clip in enumerate(clips):
        wave = data.get("audio", clip)[None].to(device)
        again = vae.decode(vae.encode(wave)[0], wave.shape[-1])
        totals["valid_mel"] += mel(again, wave).item() / len(clips)
        totals["valid_stft"] += stft_distance(again, wave).item() / len(clips)
        if n < 4:
            write_wave(folder / f"{n}_original.wav", wave[0].cpu().numpy(), data.rate)
            write_wave(folder / f"{n}_step{step:07d}.wav", again[0].cpu().numpy(), data.rate)
    return totals


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="folder made by prepare.py (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/vae"), help="run folder (default %(default)s)")
    parser.add_argument("--init", help="start from the weights of this VAE (folder or hub id), to fine-tune it")
    parser.add_argument("--latent-dim", type=at_least(1), help="dimensions of the latent (paper: 64; its baselines: 16 and 64)")
    parser.add_argument("--mel", action=argparse.BooleanOptionalAction, default=False, help="the mel baseline: train a vocoder on log-mel frames of --latent-dim bands, which need no encoder")
    parser.add_argument("--align-weight", type=at_least(0, float), default=1, help="0 trains a vanilla VAE, without SSL features (default %(default)s)")
    parser.add_argument("--align", choices=["down", "up"], default="down", help="project the features to the latent (the paper), or the latent to the features, with margins (default %(default)s)")
    parser.add_argument("--ssl-online", help="teacher, as for prepare.py --ssl, to run inside each step, in place of stored features")
    parser.add_argument("--ssl-layer", type=layer_number, default=-1, help="its hidden state, as for prepare.py --layer (default %(default)s)")
    parser.add_argument("--ssl-context", type=at_least(0, float), default=1, help="seconds on either side of a crop that --ssl-online hears (default %(default)s)")
    parser.add_argument("--mel-weight", type=at_least(0, float), default=15, help="default %(default)s")
    parser.add_argument("--adv-weight", type=at_least(0, float), default=1, help="0 trains without discriminators (default %(default)s)")
    parser.add_argument("--feature-weight", type=at_least(0, float), default=2, help="feature matching (default %(default)s)")
    parser.add_argument("--kl-weight", type=at_least(0, float), default=0.01, help="default %(default)s")
    parser.add_argument("--adv-start", type=at_least(0), default=0, help="first step with discriminators (default %(default)s)")
    parser.add_argument("--disc-width", type=at_least(0.01, float), default=1, help="channels of the discriminators, relative to the paper's (default %(default)s)")
    parser.add_argument("--batch-seconds", type=at_least(0.01, float), default=192, help="audio in one update, over all ranks (default %(default)s)")
    parser.add_argument("--crop", type=at_least(0.01, float), default=3, help="seconds of a training crop (default %(default)s)")
    parser.add_argument("--micro-batch", type=at_least(1), default=8, help="crops a rank handles at once, best a divisor of its share: lower it if memory runs out (default %(default)s)")
    parser.add_argument("--lr", type=at_least(0, float), default=1e-4, help="of both optimisers, whatever the number of ranks (default %(default)s)")
    parser.add_argument("--lr-decay", type=at_least(0, float), default=0.999996, help="factor a step (default %(default)s)")
    parser.add_argument("--encoder-lr", type=at_least(0, float), default=1, help="factor on --lr for all but decoder and alignment head; 0: train the decoder alone (default %(default)s)")
    parser.add_argument("--encoder-steps", type=at_least(0), default=0, help="in the first so many steps the encoder learns alone, by what a small head reads from its latents; then it stays, and the decoder learns (default %(default)s)")
    parser.add_argument("--encoder-batch-seconds", type=at_least(0.01, float), default=192, help="audio in one of those updates (default %(default)s)")
    parser.add_argument("--teacher-weight", type=at_least(0, float), default=15, help="of the teacher's features in what the head reads; 0: log-mels alone (default %(default)s)")
    parser.add_argument("--unit-latents", action=argparse.BooleanOptionalAction, default=False, help="begin with informative latents: see unit_latents()")
    parser.add_argument("--clip", type=at_least(1e-9, float), default=10, help="largest gradient norm, of both networks (default %(default)s)")
    parser.add_argument("--eval-clips", type=at_least(1), default=16, help="validation clips (default %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="torch.compile, of the discriminators only on a GPU (default: on a GPU)")
    return read_args(parser, "train_vae", argv, torch.cuda.is_available())


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_ranks(args.device, STALLED)
    torch.backends.cudnn.benchmark = True  # all batches are alike
    held, stop = lock(args.out) if rank == 0 else None, Stop()
    with_ssl = args.align_weight > 0 and not args.mel
    data = Data(args.data, ("audio", "ssl") if with_ssl and not args.ssl_online else ("audio",))
    teacher = load_teacher(args.ssl_online, args.ssl_layer, data.rate, device) if with_ssl and args.ssl_online else None
    ssl = None if not with_ssl else data.meta["ssl"] if not teacher else teacher.facts() | dict(context=args.ssl_context)
    layers = ssl.get("layers", 1) if ssl else 1  # folders made before this was noted hold one
    check_run(args, data, device, teacher=ssl)
    torch.manual_seed(args.seed)

    # ---- networks and optimisers
    source = args.out if args.resume else args.init  # a run that goes on needs no longer what it began with
    if source:
        vae = SemanticVAE.from_pretrained(source).train()
        if isinstance(vae.decoder, Vocos):
            raise InputError(f"--init {source} is Vocos, which is used as it is: for a vocoder, --preset f5-mel")
        if args.latent_dim and args.latent_dim != vae.config.latent_dim:
            raise InputError(f"{source} has latents of {vae.config.latent_dim} dimensions, not {args.latent_dim}: drop --latent-dim")
        found, expected = (vae.config.ssl_layers * vae.config.ssl_dim, vae.config.align), (ssl["dim"], args.align) if with_ssl else None
        if with_ssl and found != expected:
            raise InputError(f"{source} was aligned {found[1]} with features of width {found[0]}, {ssl['model']} gives width {ssl['dim']} and --align is {args.align}")
    else:
        settings = PRESETS[args.preset]["vae"] | dict(sample_rate=data.rate, ssl_dim=ssl["dim"] // layers if with_ssl else 0, ssl_layers=layers, align=args.align, mel=args.mel)
        vae = SemanticVAE(VAEConfig(**settings | ({"latent_dim": args.latent_dim} if args.latent_dim else {})))
    if not data.split("valid"):
        raise InputError(f"{args.data} holds no validation clips: mark some as valid in its manifest's column split, or leave that column out, and prepare it anew")
    if not with_ssl and vae.projectors:
        vae.projectors.requires_grad_(False)  # of the VAE in --init: nothing is aligned
    if vae.config.sample_rate != data.rate:
        raise InputError(f"the VAE works at {vae.config.sample_rate} Hz, {args.data} holds {data.rate} Hz")
    vae.to(device)
    crops = Crops(data, vae.config, args.crop, args.seed, ssl, args.ssl_context if teacher else None)
    if args.unit_latents and not source and not args.mel:
        unit_latents(vae, torch.stack([crops[k]["wave"] for k in range(32)]).to(device))
    discriminators, mel = Discriminators(args.disc_width), MelDistance(data.rate).to(device)
    if args.init and not args.resume and (path := local_folder(args.init) / "discriminator" / "weights.pth").exists():
        tensors = load_torch(path).get("state_dict", {})
        discriminators = rebuild(Discriminators, args.disc_width, tensors, f"{path} (--disc-width {args.disc_width})")
    discriminators.to(device)
    early = 0 if args.mel else args.encoder_steps
    reader = LatentReader(vae.config, ssl["dim"] if with_ssl and args.teacher_weight else 0).to(device)
    if early and with_ssl and args.teacher_weight and not teacher:
        seen = torch.cat([crops[k]["ssl"] for k in range(64)])
        reader.centre.copy_(seen.mean(0))
        reader.spread.copy_(seen.std(0).clamp(min=1e-3))
    decoding = [p for name, p in vae.named_parameters() if name.startswith(vae.BEHIND_LATENTS)]
    encoding = [p for name, p in vae.named_parameters() if not name.startswith(vae.BEHIND_LATENTS)]
    adamw = lambda groups: torch.optim.AdamW(groups, lr=args.lr, betas=(0.8, 0.99), fused=True)
    optimizer = adamw([dict(params=decoding), dict(params=encoding), dict(params=reader.parameters())])
    optimizer_d = adamw(discriminators.parameters())
    ema = copy.deepcopy(vae).eval().requires_grad_(False)
    modules = dict(vae=vae, reader=reader, ema=ema, discriminators=discriminators, optimizer=optimizer, optimizer_d=optimizer_d)
    state = load_state(args.out / "state.pt", modules) if args.resume else dict(step=0, means={}, seconds=0)
    first, means = first_step(args, state, rank), Means(state["means"], device)

    # ---- the global batch, shared between ranks and micro-batches
    seconds = crops.frames * vae.config.hop / data.rate
    per_step = max(1, round(args.batch_seconds / seconds))
    per_early_step = max(1, round(args.encoder_batch_seconds / seconds))
    for flag, value, count in [("--batch-seconds", args.batch_seconds, per_step), ("--encoder-batch-seconds", args.encoder_batch_seconds, per_early_step)]:
        if count % world and (early or flag == "--batch-seconds"):
            raise InputError(f"{flag} {value} is {count} crops of {seconds} s, which {world} ranks cannot share evenly")
    numbers = CropNumbers(range(first, args.steps), per_step, early, per_early_step, args.micro_batch, rank, world)
    loader = iter(torch.utils.data.DataLoader(crops, batch_sampler=numbers, num_workers=args.workers, worker_init_fn=leave_signals_to_the_trainer,
                                              pin_memory=device.type == "cuda"))
    weights = dict(mel=args.mel_weight, adv=args.adv_weight, feature=args.feature_weight, kl=args.kl_weight, align=args.align_weight, teacher=args.teacher_weight)

    if rank == 0:
        save_args(args)
        columns = ["step", "loss", *weights, "wave", "disc", "grad", "grad_d", "skipped", "lr", "seconds", "audio", "memory", "mfu", "valid_mel", "valid_stft"]
        log = Log(args.out / "log.csv", columns, first)
        micro = len(numbers.parts(args.steps)[0])
        accumulate = per_step // world // micro
        count = lambda m: f"{sum(p.numel() for p in m.parameters()) / 1e6:.2f} M"
        print(f"{device}, {world} rank(s); VAE {count(vae)}, discriminators {count(discriminators)} parameters; {len(crops.clips)} clips, {data.meta['hours']} h; "
              f"a step is {per_step} crops of {seconds} s: {world} x {accumulate} x {micro}")  # fmt: skip

    # ---- compiled and distributed views of the same weights; checkpoints and evaluation use the plain ones
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    where = [device.index] if device.type == "cuda" else None
    wrap = lambda m: DistributedDataParallel(m, device_ids=where, gradient_as_bucket_view=True, broadcast_buffers=False) if world > 1 else m
    hold = lambda module, last: contextlib.nullcontext() if last or world == 1 else module.no_sync()  # ranks' gradients are summed once a step

    def begin(step: int):
        """The network that learns from this step on, and whether its encoder does."""
        encoder_first, learns = step < early, step < early or not early and args.encoder_lr > 0
        vae.decoder.requires_grad_(not encoder_first)
        if vae.projectors and with_ssl:
            vae.projectors.requires_grad_(encoder_first or not early)
        for p in encoding:
            p.requires_grad_(learns)  # else the latents stay as they are, and with them every DiT trained on them
        if not learns:  # the encoder that stays is the averaged one: the one that sampling knows
            for p, averaged in zip(encoding, (q for name, q in ema.named_parameters() if not name.startswith(vae.BEHIND_LATENTS))):
                p.data.copy_(averaged)
        crop_count = len(numbers.parts(step)[0])
        example = torch.zeros(crop_count, crops.frames * vae.config.hop, device=device)
        noise = torch.zeros(crop_count, crops.frames, vae.config.latent_dim, device=device)
        features = torch.zeros(crop_count, crops.features, ssl["dim"], device=device) if with_ssl and (encoder_first or not early) else None
        with autocast():
            network = compiled(EncoderFirst(vae, reader) if encoder_first else vae, args.compile, example, noise, features)
        return wrap(network), learns

    with autocast():
        example = torch.zeros(len(numbers.parts(args.steps)[0]), crops.frames * vae.config.hop, device=device)
        ddp_d = wrap(compiled(discriminators, args.compile and device.type == "cuda" and args.adv_weight > 0, example))
    fast_d = ddp_d.module if world > 1 else ddp_d
    network, learns = begin(first)

    def forward(batch):
        with autocast():
            return network(batch["wave"], batch["noise"], batch.get("ssl") if learns or not early else None)

    crop = torch.zeros(1, crops.frames * vae.config.hop, device=device)
    noise = torch.zeros(1, crops.frames, vae.config.latent_dim, device=device)
    flops = forward_flops(vae, crop, noise) + 3 * forward_flops(discriminators, crop)  # forward and backward in both steps, and again on the real
    speed = Speed(device, flops / seconds)
    start, clips = time.time() - state["seconds"], data.spread("valid", args.eval_clips)
    heard_at = lambda step, part: [data.clips[crops.clip(k)]["id"] for k in numbers.parts(step)[part]]
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=rank > 0 or None, mininterval=1, desc="vae")
    for step in bar:
        # ---- rates are pure functions of the step: resuming needs no scheduler state
        encoder_first = step < early
        if step == early and step > first:
            network, learns = begin(step)
        if encoder_first:
            rate = args.lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / early))
        else:
            rate = args.lr * args.lr_decay ** (step - early)
        for group in optimizer.param_groups + optimizer_d.param_groups:
            group["lr"] = rate
        optimizer.param_groups[1]["lr"] = rate * (1 if encoder_first else args.encoder_lr)
        adversarial = args.adv_weight > 0 and step >= args.adv_start and not encoder_first
        batches = [next(loader) for _ in numbers.parts(step)]
        accumulate = len(batches)
        if teacher and learns:
            batches = [b | dict(ssl=listen(teacher, b, crops.features)) for b in batches]
        batches = [{k: v.to(device, non_blocking=True) for k, v in b.items()} for b in batches]
        # One micro-batch: its forward pass serves both steps. Several: the fakes for the discriminators are made first, without a graph.
        outputs = [forward(batches[0])] if accumulate == 1 else None

        # ---- discriminator step: real and fake in one batch
        left_out = torch.zeros((), device=device)
        if adversarial:
            for i, batch in enumerate(batches):
                with torch.no_grad():
                    fake = (outputs[i] if outputs else forward(batch))[0].detach()
                with hold(ddp_d, i == accumulate - 1):
                    with autocast():
                        both = ddp_d(torch.cat([fake, batch["wave"]]))
                    fake_maps, real_maps = ([[m.chunk(2)[side] for m in maps] for maps in both] for side in (0, 1))
                    loss_d = discriminator_loss(fake_maps, real_maps)
                    (loss_d / accumulate).backward()
                means.add({"disc": loss_d})
            norm_d = nn.utils.clip_grad_norm_(discriminators.parameters(), args.clip)
            left_out = guarded_step(optimizer_d, norm_d)
            means.add({"grad_d": norm_d})

        # ---- generator step: gradients flow through the discriminators to the decoder, but none is kept for their weights, which are not
        # stepped here; none through the real signal
        discriminators.requires_grad_(False)
        parts = []
        for i, batch in enumerate(batches):
            with hold(network, i == accumulate - 1):
                wave, (again, z, mean, logvar, aligned) = batch["wave"], outputs[0] if outputs else forward(batch)
                losses = again if encoder_first else dict(mel=mel(again, wave))
                if not vae.config.mel:
                    losses["kl"] = kl_loss(mean, logvar)
                if aligned is not None:
                    losses["align"] = upward_alignment_loss(z, *aligned, batch["valid"]) if vae.config.align == "up" else alignment_loss(*aligned, batch["valid"])
                if adversarial:
                    with autocast():
                        with torch.no_grad():
                            real_maps = fast_d(wave)
                        losses["adv"], losses["feature"] = generator_losses(fast_d(again), real_maps)
                loss = sum(weights[k] * v for k, v in losses.items())
                (loss / accumulate).backward()
            parts.append(loss.detach())
            means.add({**losses, "loss": loss} | ({} if encoder_first else {"wave": F.l1_loss(again.detach(), wave)}))
        discriminators.requires_grad_(True)
        norm = nn.utils.clip_grad_norm_([*vae.parameters(), *reader.parameters()], args.clip)
        left_out = torch.maximum(guarded_step(optimizer, norm), left_out)
        means.add({"grad": norm, "skipped": left_out, "part": torch.stack(parts).isfinite().float().argmin()})  # the first micro-batch that is not finite
        update_ema(ema, vae, args.ema, step)

        # ---- log, evaluate, save: in this order, so that a checkpoint never lacks the rows before it
        done, last, stopped = step + 1, step + 1 == args.steps, stop.agreed()
        turning = done == early  # what has gathered is of other terms than what will
        logging = done == 1 or done % args.log_every == 0 or last or turning
        evaluating = done % args.eval_every == 0 or last or turning
        speed.audio += seconds * (per_early_step if encoder_first else per_step)
        if logging:
            means.report_skipped(done, heard_at)
            row = means.read(world) | speed.row(world)
        pause = time.time()
        if evaluating and rank == 0:
            scores = evaluate(ema, reader if encoder_first else None, data, clips, mel, device, args.out / "samples", done)
        if rank == 0 and (logging or evaluating):
            log.row(step=done, **(row if logging else {}), lr=rate, seconds=round(time.time() - start, 1), **(scores if evaluating else {}))
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if evaluating or stopped:
            gathered = means.state(world)
            if rank == 0:
                save_run(args.out, done, ema, dict(data=data.meta["sources"], ssl=ssl), modules, gathered, args.keep, seconds=time.time() - start)
        speed.begun += time.time() - pause
        if stopped:
            bar.close()
            raise SystemExit(stopped_at(args.out, done, stopped, rank))
    if rank == 0:
        print(f"{args.out}: {args.steps} steps; its weights are named {ema.content_hash()}")


if __name__ == "__main__":
    cli(main)
