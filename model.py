"""Semantic-VAE (arXiv 2509.22167): the networks, the flow-matching objective and the sampler.

Stage 1 is a speech VAE. Its alignment head pulls the latents towards the features of a frozen self-supervised (SSL)
speech model. Stage 2 is a diffusion transformer (DiT, after F5-TTS) that learns to generate those latents from text and
a prompt in any voice.

    audio --encoder--> mean, logvar --sample--> z --decoder--> audio          stage 1: train_vae.py
                                                |
    SSL features --alignment head--> target ----+ cosine                      training only

    noise, prompt latents, text --DiT, 32 Euler steps--> z --decoder--> audio    stage 2: train_tts.py, sample.py

Axes: B batch, T audio samples, N latent frames (T / hop), S SSL frames, C channels, D features, W width of the DiT, H heads, L bytes of text.
Convolutions see [B, C, N]; attention, latents and everything between the two stages are [B, N, D]. Inside a network, N and D are its own.

Parameters carry the names of the authors' release (VAE) and of F5-TTS (DiT), so a state dict needs no translation.
"""

import contextlib
import hashlib
import importlib
import json
import math
import os
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations


class InputError(Exception):
    """A mistake in what the user gave: says what was found, what was expected and what mends it. Scripts exit with 2."""


# --------------------------------------------------------------------------------------------------------------
# Settings. One frozen dataclass a network, one table of presets for networks and training.


@dataclass(frozen=True)
class VAEConfig:
    """Stage 1. The defaults are the paper's: 40 latent frames a second of 64 dimensions at 16 kHz."""

    sample_rate: int = 16000
    encoder_dim: int = 64  # channels after the first conv; doubled by every block
    encoder_rates: tuple[int, ...] = (4, 4, 5, 5)
    latent_dim: int = 64
    decoder_dim: int = 1024  # channels before the first upsampling; halved by every stage
    decoder_rates: tuple[int, ...] = (5, 5, 2, 2, 2, 2)
    decoder_kernels: tuple[int, ...] = (9, 9, 4, 4, 4, 4)
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    ssl_dim: int = 1024  # width of the features that the alignment head projects; 0 leaves the head out
    ssl_layers: int = 1  # of how many layers side by side: more than 1 are mixed by learned weights
    align: str = "down"  # features projected to the latent (the paper), or the latent "up" to the features
    mel: bool = False  # the baseline: latent_dim log-mel bands in place of encoder and posterior

    @property
    def hop(self) -> int:
        """Audio samples in a latent frame: 400 by default, so 16000 / 400 = 40 frames a second."""
        return math.prod(self.decoder_rates)


@dataclass(frozen=True)
class DiTConfig:
    """Stage 2. The defaults are the paper's (F5-TTS "small"). The last five fields tie a checkpoint to its data and VAE."""

    latent_dim: int = 64
    width: int = 768
    depth: int = 18
    heads: int = 12
    ff_mult: int = 2
    text_symbols: int = 256  # UTF-8 bytes
    vocabulary: str = ""  # or else these symbols, one a line (F5-TTS's vocab.txt): see sample.to_symbols
    text_dim: int = 512
    text_layers: int = 4
    text_place: str = "left"  # where the text stands among the frames: left, even or aligned (see text_index)
    sample_rate: int = 16000
    hop: int = 400
    text: str = "raw"  # how the training text was normalised: see prepare.normalize_text
    max_seconds: float = 30.0  # the longest training utterance: prompt and target together must fit
    vae_hash: str = ""  # latents_hash() of the VAE whose latents these are


# Training settings use the flags' names. "paper" is the paper's; "demo" runs on two CPU cores in an hour.
PRESETS = {
    "demo": dict(
        vae=dict(encoder_dim=10, latent_dim=32, decoder_dim=192, decoder_rates=(5, 5, 4, 4), decoder_kernels=(9, 9, 8, 8),
                 resblock_kernels=(7,)),
        train_vae=dict(steps=8400, encoder_steps=5400, encoder_batch_seconds=9.6, batch_seconds=4.8, crop=1.2, micro_batch=8, lr=2e-3,
                       lr_decay=0.9996, unit_latents=True, adv_start=7700, disc_width=0.125, ema=0.998, eval_every=300, eval_clips=8,
                       log_every=50, compile=True),
        dit=dict(width=192, depth=6, heads=3, text_dim=96, text_place="aligned"),
        train_tts=dict(steps=2000, lr=2e-3, warmup=100, join=2, batch_seconds=40, micro_seconds=80, ema=0.998, eval_every=250,
                       eval_sentences=8, log_every=50, sample_steps=16, sample_cfg=3),
    ),
    "small": dict(
        vae=dict(encoder_dim=32, decoder_dim=512),
        train_vae=dict(steps=200_000, crop=1.5, batch_seconds=48, micro_batch=32, disc_width=0.5),
        dit=dict(width=512, depth=12, heads=8, text_dim=256, text_place="aligned"),
        train_tts=dict(steps=200_000, lr=2e-4, warmup=5_000, batch_seconds=600, micro_seconds=640),
    ),
    "paper": dict(vae={}, train_vae={}, dit={}, train_tts={}),  # every default is the paper's
    "f5-mel": dict(  # F5-TTS's mel-spectrograms: for data at 24 kHz
        vae=dict(decoder_rates=(4, 4, 2, 2, 2, 2), decoder_kernels=(8, 8, 4, 4, 4, 4)),
        train_vae=dict(mel=True, latent_dim=100), dit={}, train_tts={},
    ),  # fmt: skip
}
F5_MEL = VAEConfig(sample_rate=24000, latent_dim=100, ssl_dim=0, mel=True, **PRESETS["f5-mel"]["vae"])


class Pretrained(nn.Module):
    """A network that a folder with model.safetensors and config.json rebuilds. How files are read and written stands at the end."""

    READERS = {"metainfo.json": "from_authors", "config.yaml": "from_vocos", "vocab.txt": "from_f5"}  # others' files

    def save_pretrained(self, folder: str | Path, dtype=torch.float32, **notes) -> None:
        """Write model.safetensors and, beside it, config.json with the class, its config and any further notes."""
        folder = Path(folder)
        tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in self.state_dict().items()}
        write_atomic(folder / "model.safetensors", lambda p: save_file(tensors, p))
        write_json(folder / "config.json", dict(model=type(self).__name__, config=asdict(self.config), **notes))

    @classmethod
    def from_pretrained(cls, name: str | Path):
        """The network in a folder (or hub id), in eval mode on the CPU. Raises InputError if anything does not fit."""
        folder = local_folder(name)
        for file, reader in cls.READERS.items():
            if hasattr(cls, reader) and (folder / file).exists():
                return getattr(cls, reader)(folder)
        if not (folder / "config.json").exists():
            raise InputError(f"{folder} holds no config.json (train_vae.py's, train_tts.py's) or vocab.txt (F5-TTS's)")
        saved = read_json(folder / "config.json")
        if saved.get("model") != cls.__name__:
            raise InputError(f"{folder} holds a {saved.get('model')}, expected a {cls.__name__}")
        tensors = load_torch(folder / "model.safetensors")
        config = read_config(cls.__init__.__annotations__["config"], saved.get("config"), folder / "config.json", len(tensors))
        return rebuild(cls, config, tensors, folder)


# --------------------------------------------------------------------------------------------------------------
# Stage 1: the encoder (DAC, arXiv 2306.06546).


def conv(*args, **kwargs) -> nn.Module:
    """A weight-normalised 1-D convolution."""
    return weight_norm(nn.Conv1d(*args, **kwargs))


def fold_weight_norm(module: nn.Module) -> nn.Module:
    """For inference: every weight as it is after normalisation, no longer computed anew in each pass. Changes state_dict's names."""
    for part in list(module.modules()):
        if is_parametrized(part, "weight"):
            remove_parametrizations(part, "weight")
    return module


class Snake(nn.Module):
    """x + sin²(αx)/α, with one α a channel (arXiv 2006.08195). Voiced speech is periodic: a network of ReLUs has to put periods together from
    pieces, this one has them built in."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x):  # [B, C, N]
        return x + (self.alpha * x).sin().square() * (self.alpha + 1e-9).reciprocal()


class ResidualUnit(nn.Module):
    """x + conv₁(snake(conv₇(snake(x)))), the wide one dilated."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.block = nn.Sequential(
            Snake(channels), conv(channels, channels, 7, dilation=dilation, padding=3 * dilation),
            Snake(channels), conv(channels, channels, 1))  # fmt: skip

    def forward(self, x):  # [B, C, N]
        return x + self.block(x)


class EncoderBlock(nn.Module):
    """Three residual units, then a strided conv that doubles the channels."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.block = nn.Sequential(
            ResidualUnit(channels, 1), ResidualUnit(channels, 3), ResidualUnit(channels, 9), Snake(channels),
            conv(channels, 2 * channels, 2 * stride, stride, padding=math.ceil(stride / 2)))  # fmt: skip

    def forward(self, x):  # [B, C, N]
        return self.block(x)  # [B, 2C, N / stride]


class Encoder(nn.Module):
    """Block after block shortens the audio by its rate: 4 · 4 · 5 · 5 = 400 samples become a frame of 16 · `channels`."""

    def __init__(self, channels: int, rates: tuple[int, ...]):
        super().__init__()
        blocks = [EncoderBlock(channels * 2**i, rate) for i, rate in enumerate(rates)]
        self.out_channels = channels * 2 ** len(rates)
        self.block = nn.Sequential(
            conv(1, channels, 7, padding=3), *blocks,
            Snake(self.out_channels), conv(self.out_channels, self.out_channels, 3, padding=1))  # fmt: skip

    def forward(self, wave):  # [B, 1, T]
        return self.block(wave)  # [B, C, N]


class LogMel(nn.Module):
    """F5-TTS's frames in place of an encoder, without parameters: log of mel magnitudes (HTK scale), clamped at 1e-5, of
    windows of 1024 samples centred on every hop-th sample."""

    def __init__(self, sample_rate: int, bands: int, hop: int, window: int = 1024):
        super().__init__()
        self.window, self.hop = window, hop
        with torch.device("cpu"):
            bank = torchaudio.functional.melscale_fbanks(window // 2 + 1, 0, sample_rate / 2, bands, sample_rate).T
        self.register_buffer("bank", bank, persistent=False)

    def forward(self, wave):  # [B, 1, T]
        hann = torch.hann_window(self.window, device=wave.device)
        with torch.autocast(wave.device.type, enabled=False):
            magnitude = torch.stft(wave[:, 0].float(), self.window, self.hop, window=hann, return_complex=True).abs()
            return (self.bank @ magnitude[..., :-1]).clamp(min=1e-5).log()  # [B, bands, N]


# --------------------------------------------------------------------------------------------------------------
# Stage 1: from the encoder's features to a latent.


class CausalAttention(nn.Module):
    """y = W · pool(mean over the heads h of softmax(qₕkₕᵀ/√d + causal mask) vₕ): from a wide input to a narrow output, heads are averaged and
    pooled, not concatenated."""

    def __init__(self, dim: int, out_dim: int, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(out_dim, out_dim)

    def forward(self, x):  # [B, N, D]
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # a bias of the keys would cancel in the softmax
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, N, D/H]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).mean(1)  # [B, N, D/H]
        return self.proj(F.adaptive_avg_pool1d(y, self.proj.in_features))  # [B, N, out]


class GatedMLP(nn.Module):
    """w2(gelu(w0 v) · w1 v) of v = LayerNorm(x) (GEGLU, arXiv 2002.05202)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.w0, self.w1, self.w2 = nn.Linear(dim, 2 * dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):  # [B, N, D]
        v = self.norm(x)
        return self.w2(F.gelu(self.w0(v), approximate="tanh") * self.w1(v))


class AttentionProjection(nn.Module):
    """From the encoder's width to the latent's: y = proj(LN₃ x) + attn(LN₁ x), then y + mlp(LN₂ y).

    Causal, so that a latent frame never depends on how much speech follows it beyond the convolutions' reach: but for its
    last dozen frames, a prompt has the same latents alone as with speech behind it."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), CausalAttention(dim, out_dim)
        self.norm3, self.proj = nn.LayerNorm(dim), nn.Linear(dim, out_dim)
        self.norm2, self.mlp = nn.LayerNorm(out_dim), GatedMLP(out_dim)

    def forward(self, x):  # [B, N, D]
        y = self.proj(self.norm3(x)) + self.attn(self.norm1(x))
        return y + self.mlp(self.norm2(y))  # [B, N, out]


# --------------------------------------------------------------------------------------------------------------
# Stage 1: the decoder (BigVGAN-v2, arXiv 2206.04658), which first needs resampling by two.


def lowpass() -> torch.Tensor:
    """Kaiser-windowed sinc [1, 1, 12] with cut-off at half of the band and unit sum."""
    window = torch.kaiser_window(12, periodic=False, beta=0.1102 * (2.285 * 5 * math.pi * 4 * 0.3 + 7.95 - 8.7), dtype=torch.float64)
    filter = window * torch.sinc(0.5 * (torch.arange(12, dtype=torch.float64) - 5.5))
    return (filter / filter.sum()).float()[None, None]


class Stencil(torch.autograd.Function):
    """y[n] = Σᵢ taps[i] · x[n + i], the same for all channels: [B, C, N] → [B, C, N - len(taps) + 1].

    A sum of shifted inputs is what a compiler turns into one pass over memory. Its gradient is written down since it is a
    stencil again, the taps reversed, where autograd would scatter the slice of each tap into zeros of its own."""

    @staticmethod
    def forward(ctx, x, taps):
        ctx.taps, n = taps, x.shape[-1] - len(taps) + 1
        (i, tap), *others = ((i, tap) for i, tap in enumerate(taps) if tap)
        y = tap * x[..., i : i + n]
        for i, tap in others:
            y = torch.add(y, x[..., i : i + n], alpha=tap)
        return y

    @staticmethod
    def backward(ctx, gradient):
        zeros = gradient.new_zeros(*gradient.shape[:-1], len(ctx.taps) - 1)
        return Stencil.apply(torch.cat([zeros, gradient, zeros], dim=-1), ctx.taps[::-1]), None


def extend(x, first, last, left: int, right: int):
    """x [B, C, N] with `first` [B, C, 1] repeated before it, `last` after it. Unlike F.pad's clamped indices, compiles to plain copies."""
    return torch.cat([first.expand(-1, -1, left), x, last.expand(-1, -1, right)], dim=-1)  # [B, C, left + N + right]


TAPS = tuple(lowpass().flatten().tolist())
DOWN_EVEN, DOWN_ODD = TAPS[1::2], TAPS[0::2]  # weights of the 2x signal's even and odd samples in an output
# Weights of the inputs in those: the filter, which is symmetric, twice as high, since every other sample is a zero put between. A 0 is added, so
# that both stencils read the same 7 inputs.
UP_EVEN, UP_ODD = (*(2 * f for f in DOWN_ODD), 0.0), (0.0, *(2 * f for f in DOWN_EVEN))


class SnakeBeta(nn.Module):
    """x + sin²(eᵅx)/eᵝ, one α and β a channel (BigVGAN-v2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x):  # [B, C, N]
        alpha, beta = self.alpha.exp()[:, None], self.beta.exp()[:, None]
        return x + (alpha * x).sin().square() * (beta + 1e-9).reciprocal()


class AntiAliasedSnake(nn.Module):
    """down₂(SnakeBeta(up₂(x))): the harmonics that an activation adds would, above half the rate, fold back to wrong and audible
    frequencies. At twice the rate they are filtered out first.

    up₂(x) = 2 · filter ∗ (x with zeros between), down₂(y) = every other sample of filter ∗ y. Both are stencils: the 2x signal's even
    and odd samples are 6-tap sums of inputs, and each output is a 12-tap sum over both. The interleaved 2x signal is never
    formed. tests/plain.py holds the convolution form that this equals."""

    def __init__(self, channels: int):
        super().__init__()
        self.act = SnakeBeta(channels)

    def forward(self, x):  # [B, C, N]
        x = extend(x, x[..., :1], x[..., -1:], 3, 3)
        even, odd = self.act(Stencil.apply(x, UP_EVEN)), self.act(Stencil.apply(x, UP_ODD))  # [B, C, N] each
        first, last = even[..., :1], odd[..., -1:]  # the 2x signal's ends, replicated
        return Stencil.apply(extend(even, first, last, 2, 3), DOWN_EVEN) + Stencil.apply(extend(odd, first, last, 3, 2), DOWN_ODD)


class AMPBlock(nn.Module):
    """Anti-aliased multi-periodicity block: x += conv(act(conv_dilated(act(x)))) for dilations 1, 3, 5."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...] = (1, 3, 5)):
        super().__init__()
        same = lambda d: conv(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2)
        self.convs1 = nn.ModuleList(same(d) for d in dilations)
        self.convs2 = nn.ModuleList(same(1) for _ in dilations)
        self.activations = nn.ModuleList(AntiAliasedSnake(channels) for _ in range(2 * len(dilations)))

    def forward(self, x):  # [B, C, N]
        for i, (dilated, plain) in enumerate(zip(self.convs1, self.convs2)):
            x = x + plain(self.activations[2 * i + 1](dilated(self.activations[2 * i](x))))
        return x


class Decoder(nn.Module):
    """Stage after stage: upsample, then (1/K) Σₖ AMPₖ(x), the mean of AMP blocks with K kernels."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.decoder_dim
        self.conv_pre = conv(config.latent_dim, channels, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in zip(config.decoder_rates, config.decoder_kernels):
            up = nn.ConvTranspose1d(channels, channels // 2, kernel, rate, padding=(kernel - rate) // 2)
            self.ups.append(nn.ModuleList([weight_norm(up)]))
            channels //= 2
            self.resblocks.extend(AMPBlock(channels, k) for k in config.resblock_kernels)
        self.activation_post = AntiAliasedSnake(channels)
        self.conv_post = conv(channels, 1, 7, padding=3, bias=False)

    def forward(self, z):  # [B, D, N]
        kernels = len(self.resblocks) // len(self.ups)
        x = self.conv_pre(z)
        for i, (up,) in enumerate(self.ups):
            x = up(x)  # [B, C/2, N · rate]
            x = sum(block(x) for block in self.resblocks[i * kernels : (i + 1) * kernels]) / kernels
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round the waveform itself to eight bits
            return self.conv_post(self.activation_post(x.float())).clamp(-1, 1)  # [B, 1, T]


class Vocos(nn.Module):
    """The vocoder of the library of that name (arXiv 2306.00814), with the settings of its config.yaml."""

    def __init__(self, config: dict):
        super().__init__()
        vocos = importlib.import_module("vocos")
        self.backbone = vocos.models.VocosBackbone(**config["backbone"]["init_args"])
        self.head = vocos.heads.ISTFTHead(**config["head"]["init_args"])

    def forward(self, mel):  # [B, bands, N]
        mel = F.pad(mel, (0, 1), mode="replicate")  # N hops have N + 1 ends, and Vocos has a frame at each
        return self.head(self.backbone(mel))[:, None]  # [B, 1, N · hop]


# --------------------------------------------------------------------------------------------------------------
# Stage 1: the alignment.


def conv_head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three convolutions on [B, inputs, N], the head with which the authors project features: → [B, outputs, N]."""
    return nn.Sequential(
        nn.Conv1d(inputs, hidden, 3, padding=1), nn.GroupNorm(1, hidden), nn.Mish(),
        nn.Conv1d(hidden, hidden, 3, padding=1), nn.GroupNorm(1, hidden), nn.Mish(),
        nn.Conv1d(hidden, outputs, 1))  # fmt: skip


def at_rate(features, frames: int):
    """SSL features [B, S, D] interpolated to another number of frames over the same time: [B, frames, D]."""
    return F.interpolate(features.mT, frames, mode="linear", align_corners=False).mT


class AlignmentHead(nn.Module):
    """The two vectors a frame that alignment makes alike. SSL features are interpolated to the latent's frame rate and projected *down* to its
    width (the paper; the layers are the authors'), so that latents can be predicted from the features.

    `up` projects the latent to the features' width (VA-VAE, arXiv 2501.01423), so that the features can be predicted from the latents."""

    def __init__(self, ssl_dim: int, latent_dim: int, layers: int = 1, up: bool = False):
        super().__init__()
        self.up = up
        self.mix = nn.Parameter(torch.zeros(layers)) if layers > 1 else None
        self.model = nn.Linear(latent_dim, ssl_dim, bias=False) if up else conv_head(ssl_dim, 2 * latent_dim, latent_dim)

    def forward(self, z, features):  # [B, N, latent], [B, S, layers · ssl_dim]
        if self.mix is not None:  # a weighted sum of the layers (SUPERB, arXiv 2105.01051)
            features = self.mix.softmax(0) @ features.unflatten(-1, (len(self.mix), -1))  # [B, S, ssl_dim]
        features = at_rate(features, z.shape[1])  # [B, N, ssl_dim]
        return (self.model(z).float(), features.float()) if self.up else (z, self.model(features.mT).mT.float())


def alignment_loss(z, target, valid=None):
    """−cos(z, target) over the features, mean over the valid frames, mean over the batch (the paper's alignment loss).

    z is the *sampled* latent [B, N, D], which is what decoder and DiT will see: noise that drowned its direction would cost. target is the
    head's output, valid [B, N] marks real frames (all, if None). Both sides move: the gradient reaches the encoder through z
    and the head through target; the SSL model is frozen."""
    cosine = F.cosine_similarity(z, target, dim=-1)  # [B, N]
    valid = torch.ones_like(cosine) if valid is None else valid
    return -((cosine * valid).sum(1) / valid.sum(1).clamp(min=1)).mean()


def upward_alignment_loss(z, projected, features, valid, margin: float = 0.5, pair_margin: float = 0.25):
    """mean ReLU(1 − m₁ − cos(Wzᵢ, fᵢ)) + mean ReLU(|cos(zᵢ, zⱼ) − cos(fᵢ, fⱼ)| − m₂), over the valid frames i and pairs i, j of an
    utterance, mean over the utterances (VA-VAE, arXiv 2501.01423, section 3). z [B, N, D]; projected Wz and features f [B, N, ssl_dim]; valid [B, N]."""
    unit = lambda x: F.normalize(x, dim=-1)
    frames = F.relu(1 - margin - F.cosine_similarity(projected, features, dim=-1))  # [B, N]
    pairs = F.relu((unit(z) @ unit(z).mT - unit(features) @ unit(features).mT).abs() - pair_margin)  # [B, N, N]
    both = valid[:, :, None] & valid[:, None]
    frames = (frames * valid).sum(1) / valid.sum(1).clamp(min=1)  # [B]
    pairs = (pairs * both).sum((1, 2)) / both.sum((1, 2)).clamp(min=1)  # [B]
    return (frames + pairs).mean()


def kl_loss(mean, logvar):
    """KL(q(z|x) ‖ N(0, 1)): summed over the features, mean over batch and frames (VAE, arXiv 1312.6114). The 1e-6 is the authors'.

    It keeps latents bounded and their neighbours alike, so that a DiT's small errors stay small. Its weight is small too: at 1, what the decoder
    needs would be smoothed away."""
    return -0.5 * (1 + logvar - mean.square() - (logvar.exp() + 1e-6)).sum(-1).mean()


# --------------------------------------------------------------------------------------------------------------
# Stage 1: the VAE.


class SemanticVAE(Pretrained):
    """The speech VAE, with the alignment head beside it."""

    BEHIND_LATENTS = ("decoder.", "projectors.")  # the weights that no latent depends on
    CONTEXT = 32  # latent frames on either side are more than any sample depends on, with the paper's kernels (tests/test_model.py)

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        if config.mel:
            self.encoder = LogMel(config.sample_rate, config.latent_dim, config.hop)
        else:
            if math.prod(config.encoder_rates) != config.hop:
                raise InputError(f"encoder_rates {config.encoder_rates} make frames of {math.prod(config.encoder_rates)} samples, decoder_rates {config.decoder_rates} of {config.hop}")
            self.encoder = Encoder(config.encoder_dim, config.encoder_rates)
            self.pre_block = AttentionProjection(self.encoder.out_channels, config.latent_dim)
            self.fc_mu = nn.Linear(config.latent_dim, config.latent_dim)
            self.fc_var = nn.Linear(config.latent_dim, config.latent_dim)
        self.decoder = Decoder(config)
        self.projectors = AlignmentHead(config.ssl_dim, config.latent_dim, config.ssl_layers, config.align == "up") if config.ssl_dim else None

    def encode(self, wave):
        """Audio [B, T] → mean, logvar, each [B, N, D] with N = ceil(T / hop). The last frame is filled up with silence."""
        wave = F.pad(wave, (0, -wave.shape[-1] % self.config.hop))
        x = self.encoder(wave[:, None]).transpose(1, 2)  # [B, N, C]
        if self.config.mel:
            return x, torch.full_like(x, -math.inf)  # a variance of 0: what is sampled is the mel itself
        return self.posterior(self.pre_block(x))

    def posterior(self, x):
        """[B, N, D] → mean, logvar, both float32."""
        return self.fc_mu(x).float(), self.fc_var(x).float().clamp(-12, 12)

    def decode(self, z, samples: int | None = None):
        """Latents [B, N, D] → audio [B, samples], float32 within [-1, 1]; N · hop samples if not told."""
        return self.decoder(z.transpose(1, 2))[:, 0, :samples].float()  # [B, T]

    def decode_in_pieces(self, z, piece: int = 400, context: int = CONTEXT):
        """decode(z), `piece` frames at a time, so that memory does not grow with the length."""
        waves = []
        for start in range(0, z.shape[1], piece):
            left = min(start, context)
            wave = self.decode(z[:, start - left : start + piece + context])
            waves.append(wave[:, left * self.config.hop : (left + piece) * self.config.hop])
        return torch.cat(waves, dim=1)  # [B, N · hop]

    def forward(self, wave, noise, features=None):
        """One training pass: audio [B, T], noise [B, N, D], SSL features [B, S, ssl_layers · ssl_dim] → reconstruction [B, T], sampled
        latents z, mean, logvar, all [B, N, D], and (if there are features) the two that are to be aligned."""
        mean, logvar = self.encode(wave)
        z = mean + noise * (0.5 * logvar).exp()
        aligned = self.projectors(z, features) if features is not None else None
        return self.decode(z, wave.shape[-1]), z, mean, logvar, aligned

    def content_hash(self, without: tuple[str, ...] = ("projectors.",)) -> str:
        """Names these weights (less the alignment head, which no sound depends on) in 16 hex digits: for tables of scores."""
        silent = ("ssl_dim", "ssl_layers", "align")  # the alignment head's
        settings = {f.name: getattr(self.config, f.name) for f in fields(self.config) if f.name not in silent and getattr(self.config, f.name) != f.default}
        digest = hashlib.sha256(json.dumps(settings).encode())  # without the defaults, so that a new setting renames nothing
        for name, value in sorted(self.state_dict().items()):
            if not name.startswith(without):
                digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def latents_hash(self) -> str:
        """Names the latents: VAEs that differ in their decoder's weights alone (train_vae.py --encoder-lr 0) can decode each other's."""
        return self.content_hash(without=self.BEHIND_LATENTS)

    @classmethod
    def from_authors(cls, folder: Path):
        """The authors' weights, every key accounted for by name and shape; sizes are read off the shapes."""
        path = folder / "dac" / "ema_state_dict.pth"
        path = path if path.exists() else folder / "dac" / "weights.pth"
        tensors = load_torch(path)
        try:
            tensors = tensors.get("state_dict", tensors)
            tensors = {k.removeprefix("ema_model."): v for k, v in tensors.items() if k not in ("initted", "step")}  # the EMA's own counters
            first, head = tensors["encoder.block.0.bias"], tensors.get("projectors.model.0.weight")
            config = VAEConfig(encoder_dim=len(first), latent_dim=len(tensors["fc_mu.bias"]), ssl_dim=0 if head is None else head.shape[1],
                               decoder_dim=len(tensors["decoder.conv_pre.bias"]))  # fmt: skip
            for kind, expected in (("filter", lowpass()), ("zero_k_bias", torch.zeros(1))):  # buffers that we compute: only checked
                for name in [k for k in tensors if k.endswith(kind)]:
                    if not torch.allclose(tensors.pop(name).float(), expected, atol=1e-6):
                        raise InputError(f"{path}: {name} differs from the {kind} this model computes")
            return rebuild(cls, config, tensors, path)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as e:
            raise InputError(f"{path} is not the authors' release: {type(e).__name__} {e}") from e

    @classmethod
    def from_vocos(cls, folder: Path):
        """F5-TTS's frames, and Vocos as it is published for their decoder: used, not trained."""
        package("vocos", "to decode F5-TTS's frames")
        tensors = load_torch(folder / "pytorch_model.bin")
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            frames = config["feature_extractor"]["init_args"]
            if frames != dict(sample_rate=24000, n_fft=1024, hop_length=256, n_mels=100, padding="center"):
                raise InputError(f"{folder} decodes {frames}, not F5-TTS's frames: expected charactr/vocos-mel-24khz")
            with torch.device("meta"):  # the decoder that is replaced; nothing else has weights
                vae = cls(F5_MEL)
            tensors = {k: v for k, v in tensors.items() if not k.startswith("feature_extractor.")}  # LogMel's part
            vae.decoder = rebuild(Vocos, config, tensors, folder)
            return vae.eval()
        except (AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as e:
            raise InputError(f"{folder} does not hold Vocos: {' '.join(repr(e).split())}") from e


# --------------------------------------------------------------------------------------------------------------
# Stage 2: the DiT, which reads text, ...


def angles(position, dim: int):
    """Positions [N] → [N, dim / 2]: position · 10000^(−2i / dim), for sinusoidal and rotary positions (arXiv 1706.03762, 2104.09864)."""
    return position[:, None] * 10000.0 ** (-torch.arange(0, dim, 2, device=position.device) / dim)


def text_index(place: str, starts, counts, lengths, frames: int):
    """Which byte of the text each frame gets, [B, frames] (behind the end of the text: filler).

    left     byte i stands at frame i, whatever is said there (F5-TTS): the DiT has to find out.
    even     each of n bytes gets frames // n frames, the last (frames % n) bytes one more (average upsampling, ZipVoice, arXiv
             2506.13053): near the diagonal on which speech runs.
    aligned  from its start in the speech to the next byte's: starts [B, L] in frames, ascending, infinite behind the text.

    counts [B] <= lengths [B]: bytes and frames of each utterance."""
    frame = torch.arange(frames, device=lengths.device)
    if place == "left":
        return frame.expand(len(lengths), -1)
    if place == "aligned":
        middle = (frame + 0.5).expand(len(lengths), -1)
        return (torch.searchsorted(starts, middle.contiguous(), right=True) - 1).clamp(min=0)
    n = counts.clamp(min=1)[:, None]
    each = (lengths[:, None] // n).clamp(min=1)
    last = lengths[:, None] - 1 - frame  # the same index counted from the end; the smaller of the two is right
    return torch.minimum(frame // each, n - 1 - last // (each + 1))


class GlobalResponseNorm(nn.Module):
    """γ · (x · n) + β + x, where n is each channel's norm over the frames, relative to the mean channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x, inside):  # [B, N, D]; inside [B, N, 1] keeps a batch's padding out of the norm
        norm = (x * inside).norm(dim=1, keepdim=True)  # [B, 1, D]
        return self.gamma * (x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class ConvNeXtBlock(nn.Module):
    """x + W₂ GRN(gelu(W₁ LN(depthwise conv₇ x))) (ConvNeXt-V2, arXiv 2301.00808)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.grn, self.pwconv2 = nn.Linear(dim, 2 * dim), GlobalResponseNorm(2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x, inside):  # [B, N, D]
        y = self.norm(self.dwconv(x.transpose(1, 2)).transpose(1, 2))
        return x + self.pwconv2(self.grn(F.gelu(self.pwconv1(y)), inside))  # 2D between the two linear layers


class TextEmbedding(nn.Module):
    """Bytes → one vector a latent frame: embedding and position, ConvNeXt-V2 blocks, then each byte's vector to its frames.

    Text is shorter than speech: behind its end stand zeros. Dropped, each byte becomes the filler, a vector learned for this
    alone (row 0): length and placement stay known."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.place = config.text_place
        self.text_embed = nn.Embedding(config.text_symbols + 1, config.text_dim)  # row b + 1 is byte b
        self.text_blocks = nn.ModuleList(ConvNeXtBlock(config.text_dim) for _ in range(config.text_layers))

    def forward(self, text, lengths, frames: int, drop=None, starts=None):
        """text [B, L] of symbols, -1 behind its end; lengths [B] in frames; drop [B] bool; starts [B, L] where each symbol begins, in
        frames, for aligned placement alone → [B, frames, text_dim]."""
        text = F.pad(text + 1, (0, frames - text.shape[1]))  # [B, N], padded or cut
        frame = torch.arange(frames, device=text.device)
        inside = frame < lengths[:, None]  # [B, N]
        has_text = (text > 0) & inside  # also where it is dropped
        if drop is not None:
            text = text.masked_fill(drop[:, None], 0)
        angle = angles(frame, self.text_embed.embedding_dim)  # [N, D/2]
        x = (self.text_embed(text) + torch.cat([angle.cos(), angle.sin()], dim=-1)) * has_text[..., None]  # [B, N, D]
        for block in self.text_blocks:
            x = block(x, inside[..., None]) * has_text[..., None]
        index = text_index(self.place, starts, has_text.sum(1), lengths, frames).clamp(max=frames - 1)  # [B, N]
        return x.gather(1, index[..., None].expand_as(x)) * inside[..., None]


class DurationPredictor(nn.Module):
    """How long each byte lasts, for text that nobody has spoken yet: the logarithm of its duration relative to its neighbours'.

    Only ratios matter: the prompt, whose length is known, sets the rate (see sample.plan)."""

    def __init__(self, symbols: int, width: int = 128):
        super().__init__()
        self.embed = nn.Embedding(symbols + 1, width // 2)
        self.convs = nn.ModuleList(nn.Conv1d(c, width, 5, padding=2) for c in (width // 2, width, width))
        self.out = nn.Linear(width, 1)

    def forward(self, text):  # [B, L], -1 behind its end
        inside = (text >= 0)[:, None]  # [B, 1, L]
        x = self.embed(text + 1).mT  # [B, C, L]
        for conv in self.convs:
            x = F.gelu(conv(x * inside))
        return self.out(x.mT)[..., 0].float()  # [B, L]


def duration_loss(predicted, text, starts, lengths):
    """|log duration − predicted|, both relative to their utterance's mean, mean over the bytes that last: [B].

    predicted and text [B, L]; starts [B, L] and lengths [B] in frames. A byte lasts from its start to the next one's."""
    starts = torch.minimum(starts, lengths[:, None])  # infinite behind the text
    duration = torch.cat([starts[:, 1:], lengths[:, None]], dim=1) - starts  # [B, L]
    lasts = (text >= 0) & (duration > 0)  # the space between two joined clips does not
    count = lasts.sum(1, keepdim=True).clamp(min=1)
    error = duration.clamp(min=1e-3).log() - predicted
    error = error - (error * lasts).sum(1, keepdim=True) / count
    return (error.abs() * lasts).sum(1) / count[:, 0]


# --------------------------------------------------------------------------------------------------------------
# ... and fills in latents (F5-TTS, arXiv 2410.06885).


class InputEmbedding(nn.Module):
    """Noised latents, prompt and text, side by side: x = linear(…), then x + two grouped convolutions, which mark each frame's place among its neighbours."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.proj = nn.Linear(2 * config.latent_dim + config.text_dim, config.width)
        grouped = lambda: nn.Conv1d(config.width, config.width, 31, padding=15, groups=16)
        self.conv_pos_embed = nn.ModuleDict(dict(conv1d=nn.Sequential(grouped(), nn.Mish(), grouped(), nn.Mish())))

    def forward(self, x, prompt, text, inside):  # [B, N, latent] twice, [B, N, text_dim], [B, N, 1]
        x = self.proj(torch.cat([x, prompt, text], dim=-1))  # [B, N, W]
        first, mish, second, _ = self.conv_pos_embed["conv1d"]
        y, inside = (x * inside).transpose(1, 2), inside.transpose(1, 2)  # [B, W, N]; padding is zeroed around each convolution
        y = mish(second(mish(first(y)) * inside)) * inside
        return x + y.transpose(1, 2)


class TimeEmbedding(nn.Module):
    """An MLP of the sines and cosines of 1000t · 10000^(−i / 127), i = 0 … 127."""

    def __init__(self, width: int):
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):  # [B]
        angle = t[:, None] * (1000 * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 127))  # [B, 128]
        return self.time_mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))  # [B, W]


class Modulation(nn.Module):
    """Adaptive LayerNorm (AdaLN, arXiv 2212.09748): `chunks` vectors [B, 1, W] from the time embedding: shifts, scales and gates."""

    def __init__(self, width: int, chunks: int):
        super().__init__()
        self.linear, self.chunks = nn.Linear(width, chunks * width), chunks

    def forward(self, t):  # [B, W]
        return self.linear(F.silu(t))[:, None].chunk(self.chunks, dim=-1)


def modulate(x, shift, scale):
    """LN(x) · (1 + scale) + shift, the LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def rotate(x, angle):
    """Rotary position (arXiv 2104.09864): turn each adjacent pair of channels of x [B, N, H, D] by angle [N, D/2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle[:, None].cos(), angle[:, None].sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    """softmax(R(q) R(k)ᵀ / √d) v over the frames inside, R the rotary position, in every head.

    Padding is masked, so that an utterance comes out the same in any batch. attn_mask would rule the fastest kernels out, and its backward
    pass, compiled for dynamic lengths, fails at the second length (torch 2.11). Instead q, k and v get eight more channels (those kernels
    want multiples of 8): 1 in q, 0 in v, and in k 0 or, behind the end, −10,000, which no softmax lets through."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x, angle, inside):  # [B, N, W]; angle [N, W/H/2]; inside [B, N, 1]
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)) for p in (self.to_q, self.to_k, self.to_v))  # [B, N, H, W/H]
        size, penalty = q.shape[-1], ((~inside) * -1e4)[..., None].expand(-1, -1, self.heads, 8).type_as(k)
        q, k, v = torch.cat([rotate(q, angle), torch.ones_like(penalty)], -1), torch.cat([rotate(k, angle), penalty], -1), F.pad(v, (0, 8))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, H, N, W/H + 8]
        y = F.scaled_dot_product_attention(q, k, v, scale=size**-0.5)[..., :size]
        return self.to_out(y.transpose(1, 2).flatten(2))  # [B, N, W]


class FeedForward(nn.Module):
    """W₂ gelu(W₁ x), the gelu in its tanh form."""

    def __init__(self, width: int, mult: int):
        super().__init__()
        self.ff = nn.Sequential(
            nn.Sequential(nn.Linear(width, mult * width), nn.GELU(approximate="tanh")),
            nn.Identity(),  # a dropout in F5-TTS: keeps the parameters' names
            nn.Linear(mult * width, width))  # fmt: skip

    def forward(self, x):  # [B, N, W]
        return self.ff(x)


class DiTBlock(nn.Module):
    """x += g₁ · attention(LN(x)(1 + s₁) + b₁), then x += g₂ · feed-forward(LN(x)(1 + s₂) + b₂), with (b, s, g) = AdaLN(t)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.attn_norm = Modulation(config.width, 6)
        self.attn = Attention(config.width, config.heads)
        self.ff = FeedForward(config.width, config.ff_mult)

    def forward(self, x, t, angle, inside):  # [B, N, W]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.attn_norm(t)
        x = x + gate1 * self.attn(modulate(x, shift1, scale1), angle, inside)
        return x + gate2 * self.ff(modulate(x, shift2, scale2))


class DiT(Pretrained):
    """Velocity field of the flow from noise to standardised latents, given prompt and text."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.time_embed = TimeEmbedding(config.width)
        self.text_embed = TextEmbedding(config)
        self.input_embed = InputEmbedding(config)
        self.transformer_blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.norm_out = Modulation(config.width, 2)
        self.proj_out = nn.Linear(config.width, config.latent_dim)
        if config.text_place not in ("left", "even", "aligned"):
            raise InputError(f"text_place is {config.text_place!r}, expected left, even or aligned")
        if (lines := config.vocabulary.split("\n")) != [""] and (len(lines), lines[0]) != (config.text_symbols, " "):
            raise InputError(f"its vocabulary has {len(lines)} lines, the first {lines[0]!r}, expected "
                             f"{config.text_symbols}, the first ' ': take the vocab.txt of its training")  # fmt: skip
        self.durations = DurationPredictor(config.text_symbols) if config.text_place == "aligned" else None
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim))  # of the VAE's latents, over the training split
        self.register_buffer("latent_std", torch.ones(config.latent_dim))
        # Zero AdaLN and output: at first every block is the identity, and the velocity 0, so that a deep network starts
        # stable and each block adds its share as it learns one. All else, but for GRN, is PyTorch's default.
        for linear in [self.norm_out.linear, self.proj_out] + [b.attn_norm.linear for b in self.transformer_blocks]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    @classmethod
    def from_f5(cls, folder: Path):
        """F5-TTS's averaged weights, every key accounted for by name and shape; sizes are read off the shapes."""
        if "F5TTS_Base" in folder.resolve().name:  # the weights' names and shapes do not tell
            raise InputError(f"{folder} is an old base (one head rotary, text padding not masked): use F5TTS_v1_Base")
        if len(paths := [*folder.glob("model_*.safetensors")] or [*folder.glob("model_*.pt")]) != 1:
            raise InputError(f"{folder} holds {len(paths)} model_*.safetensors (or .pt), expected one: move the rest")
        tensors = load_torch(paths[0])
        try:
            tensors = tensors.get("ema_model_state_dict", tensors)  # of a whole training state; "_orig_mod.": compiled
            tensors = {k.replace("_orig_mod.", "").removeprefix("ema_model."): v for k, v in tensors.items()}
            for name in ("initted", "step", "update", "transformer.rotary_embed.inv_freq"):  # counters; what we compute
                tensors.pop(name, None)
            tensors = {k.removeprefix("transformer."): v for k, v in tensors.items() if not k.startswith("mel_spec.")}
            rows, text_dim = tensors["text_embed.text_embed.weight"].shape
            width = len(tensors["norm_out.linear.bias"]) // 2
            with torch.device("meta"):  # the frames' name depends on no weights
                vae_hash = SemanticVAE(F5_MEL).latents_hash()
            config = DiTConfig(
                latent_dim=100, sample_rate=24000, hop=256, max_seconds=24.0, vae_hash=vae_hash,  # half is the prompt's
                width=width, heads=width // 64, depth=sum(k.endswith(".attn.to_q.bias") for k in tensors),
                ff_mult=len(tensors["transformer_blocks.0.ff.ff.0.0.bias"]) // width, text_dim=text_dim,
                text_symbols=rows - 1, vocabulary=(folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n"),
                text_layers=sum(k.endswith(".dwconv.bias") for k in tensors))  # fmt: skip
            tensors |= dict(latent_mean=torch.zeros(100), latent_std=torch.ones(100))  # its frames are used as they are
            return rebuild(cls, config, tensors, folder)
        except (ArithmeticError, AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as e:
            raise InputError(f"{folder} does not hold what F5-TTS publishes: {type(e).__name__} {e}") from e

    def standardize(self, z):
        """The VAE's latents [..., D] → zero mean, unit variance a channel: of the noise's size, and every channel of the same weight in the loss."""
        return (z - self.latent_mean) / self.latent_std

    def destandardize(self, x):
        return x * self.latent_std + self.latent_mean

    def forward(self, x, prompt, text, t, lengths, read: tuple[int, ...] = ()):
        """Velocity [B, N, D] at time t [B] of noised latents x, prompt latents (zero elsewhere), both [B, N, D], and
        text [B, N, text_dim] from `text_embed`. lengths [B] in frames: what lies behind is ignored, and what comes out there means nothing.
        Where blocks are to be read: a tuple of the velocity and of what comes out of each of these, [B, N, W]."""
        frame = torch.arange(x.shape[1], device=x.device)
        inside = frame < lengths[:, None]  # [B, N]
        angle = angles(frame, self.config.width // self.config.heads)  # [N, W/H/2]
        t = self.time_embed(t)  # [B, W]
        x = self.input_embed(x, prompt, text, inside[..., None]).float()  # [B, N, W]; blocks add to it in float32, whatever they compute in
        states = []
        for block in self.transformer_blocks:
            x = block(x, t, angle, inside[..., None])
            states.append(x)
        scale, shift = self.norm_out(t)
        velocity = self.proj_out(modulate(x, shift, scale))  # [B, N, latent]
        return (velocity, *(states[i] for i in read)) if read else velocity


# --------------------------------------------------------------------------------------------------------------
# Flow matching (arXiv 2210.02747), as text-guided speech infilling (Voicebox, arXiv 2306.15687).


def flow_matching_loss(dit, x, noise, t, span, text, lengths, drop_prompt, drop_text, starts=None, read=()):
    """‖v(x_t, t) − (x − noise)‖² over the span, x_t = (1 − t) · noise + t · x: at t = 0 noise, at t = 1 data, and between them the constant
    velocity of the straight path. Sum over the span's frames (mean over features), and the number of those frames.

    x standardised latents and noise [B, N, D]; t [B]; span [B, N] bool, the frames to generate; text [B, L]; lengths [B];
    drop_* [B] bool where prompt or text is hidden, so that the network learns the velocity without them too; starts [B, L] where the
    bytes begin, for aligned text. Returns two scalars, to be divided over the whole (global) batch, and the states of the blocks in `read`."""
    x_t = (1 - t)[:, None, None] * noise + t[:, None, None] * x
    prompt = x.masked_fill((span | drop_prompt[:, None])[..., None], 0)
    embedded = dit.text_embed(text, lengths, x.shape[1], drop_text, starts)
    velocity = dit(x_t, prompt, embedded, t, lengths, read)
    velocity, *states = velocity if read else (velocity,)
    error = (velocity.float() - (x - noise)).square().mean(-1)  # [B, N]
    return ((error * span).sum(), span.sum(), *states)


# Few steps are best spent near the noise: these are places on a grid of 32 (EPSS, arXiv 2505.19931).
EPSS = {
    7: (0, 2, 4, 6, 8, 16, 24, 32),
    10: (0, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32),
    16: (*range(9), 10, 12, 14, 16, 20, 24, 28, 32),
}


def time_steps(steps: int, sway: float) -> list[float]:
    """The times 0 … 1 between which the flow is integrated, steps + 1 of them. Sway (F5-TTS), t ← t + sway · (cos(πt/2) − 1 + t), makes steps
    smaller near the noise where it is negative: there it is decided what will be said where, and errors cost most."""
    even = [i / 32 for i in EPSS[steps]] if steps in EPSS else [i / steps for i in range(steps + 1)]
    return [t + sway * (math.cos(math.pi / 2 * t) - 1 + t) for t in even]


@torch.no_grad()
def sample(dit, noise, prompt, prompt_lengths, text, lengths, steps=32, cfg=2.0, sway=-1.0, starts=None, cfg_until=1.0):
    """Integrate the flow by Euler's method from `noise` to latents, both [B, N, D] and standardised.

    prompt [B, N, D] holds each prompt's latents in its first prompt_lengths frames; text [B, L] is prompt and target
    text, starts [B, L] where its bytes begin, for aligned text; lengths [B] prompt and target frames. Guidance (arXiv 2207.12598) goes
    beyond what prompt and text ask for: v + cfg · (v − v without them), at times before cfg_until. The prompt is written over the result."""
    given = (torch.arange(noise.shape[1], device=noise.device) < prompt_lengths[:, None])[..., None]
    prompt = prompt * given
    nobody = torch.zeros_like(lengths, dtype=torch.bool)
    embedded = dit.text_embed(text, lengths, noise.shape[1], nobody, starts)
    if cfg:  # one batch of two: with and without prompt and text
        without = dit.text_embed(text, lengths, noise.shape[1], ~nobody, starts)
        both = torch.cat([prompt, torch.zeros_like(prompt)]), torch.cat([embedded, without])
    times = time_steps(steps, sway)
    x = noise
    for now, after in zip(times[:-1], times[1:]):
        t = torch.full((len(x),), now, device=x.device)
        if cfg and now < cfg_until:
            v = dit(torch.cat([x, x]), *both, torch.cat([t, t]), torch.cat([lengths, lengths]))
            v, without = v.float().chunk(2)
            v = v + cfg * (v - without)
        else:
            v = dit(x, prompt, embedded, t, lengths).float()
        x = x + (after - now) * v
    return torch.where(given, prompt, x)


# --------------------------------------------------------------------------------------------------------------
# Files. What cannot be read or written, or does not fit, is an InputError; nothing is ever left half-written.


def write_atomic(path: Path, write) -> None:
    """Call write(temporary path), flush it to the disk, then rename: `path` is always whole, old or new. Failing is an InputError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as e:  # a full disk as Python, torch and soundfile, and safetensors report it
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"cannot write {path}: {str(e).splitlines()[0]}; what was there before is whole") from e


def write_json(path: Path, value) -> None:
    """Lists, names and numbers as a JSON file, written whole."""
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=2), encoding="utf-8"))


def read_json(path: Path) -> dict:
    """The object in a JSON file. Anything else is an InputError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"cannot read {path}: {e}") from e
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected an object with names and values")
    return value


def load_torch(path: Path) -> dict:
    """What torch.save or safetensors wrote: tensors and numbers by name, never code. Anything else is an InputError."""
    try:
        if zipfile.is_zipfile(path) and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("its entries are compressed, which torch.save never does")  # a small file could unfold to any size
        return (load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)) | {}
    except Exception as e:  # torch raises many kinds
        raise InputError(f"cannot read {path}: {(str(e) or repr(e)).splitlines()[0]}; copy the file anew") from e


def package(name: str, purpose: str):
    """A library that only some need, imported where it is used. Its absence is an InputError."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise InputError(f"{name} is needed {purpose}, and cannot be imported ({e}): run pip install {name}") from e


HERE = (".", "/", "data/", "demo/", "downloads/", "runs/")  # how paths of ours begin, for which the hub is never asked


def local_folder(name: str | Path) -> Path:
    """A folder on this disk, or a hub id such as zkniu/Semantic-VAE/semantic_vae, which is downloaded."""
    if Path(name).is_dir():
        return Path(name)
    parts = str(name).split("/")
    if len(parts) < 2 or str(name).startswith(HERE) or Path(parts[0]).exists():
        raise InputError(f"no folder {name} (expected a checkpoint folder, or a hub id such as zkniu/Semantic-VAE/semantic_vae): "
                         "if it was moved, name it with its flag: --vae, --tts or --init")  # fmt: skip
    from huggingface_hub import snapshot_download

    repository, subfolder = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        where = snapshot_download(repository, allow_patterns=[f"{subfolder}/**"] if subfolder else None)
        os.listdir(Path(where) / subfolder)  # it may hold no such folder, or none that was downloaded before
    except Exception as e:  # the hub's own errors are many; each means that the name led nowhere
        raise InputError(f"no folder {name} here, none from the hub: {(str(e) or repr(e)).splitlines()[0]}") from e
    return Path(where) / subfolder


def read_config(config_class, values, path: Path, most: int):
    """The dataclass of these values; what they lack is the default. A name or kind of value that it does not know, a size beyond reason, or
    more layers than `most`, is an InputError."""
    try:
        config = config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (AttributeError, TypeError) as e:  # not an object, or a name that is not a setting
        raise InputError(f"{path} has other settings than {config_class.__name__}: {e}") from e
    for name, value in vars(config).items():
        entries = value if isinstance(value, tuple) else [value]
        if type(value) is not type(getattr(config_class, name)) or isinstance(value, tuple) and any(type(n) is not int for n in entries):
            raise InputError(f"{path} has a setting of the wrong kind: {name} {value!r}")
        layers = value if name in ("depth", "text_layers") else len(entries)
        if layers > most or any(type(n) is int and not 0 <= n < 200_000 for n in entries):
            raise InputError(f"{path} has a size that its weights cannot have: {name} {value}")
    return config


def rebuild(kind, config, tensors: dict[str, torch.Tensor], source) -> nn.Module:
    """kind(config) with these weights, in eval mode. What is missing, left over or of another shape is an InputError that names it."""
    try:
        with torch.device("meta"):  # sizes are held against the file before memory is spent on them
            module = kind(config)
    except (ArithmeticError, IndexError, InputError, RuntimeError, TypeError, ValueError) as e:
        raise InputError(f"{source} does not describe a {kind.__name__}: {e}") from e
    own, found = ({k: list(getattr(v, "shape", "")) for k, v in d.items()} for d in (module.state_dict(), tensors))
    wrong = [f"lacks {k}" for k in own if k not in found] + [f"has unknown {k}" for k in found if k not in own]
    wrong += [f"has other shapes: {k}: found {found[k]}, expected {own[k]}" for k in own if k in found and found[k] != own[k]]
    if wrong:
        raise InputError(f"{source} does not fit {kind.__name__}: it {', '.join(wrong[:3])}{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}")
    module.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in tensors.items()}, assign=True)  # a copy: the file is mapped
    return module.eval()
