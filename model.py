"""Semantic-VAE (arXiv 2509.22167): the networks, their losses, the flow-matching objective and the sampler.

Stage 1 is a speech VAE. Its alignment head pulls the latents towards the features of a frozen self-supervised (SSL)
speech model. Stage 2 is a diffusion transformer (DiT, after F5-TTS) that generates such latents from text and a prompt.

    audio --encoder--> mean, logvar --sample--> z --decoder--> audio             stage 1: train_vae.py
                                                |
    SSL features --alignment head--> target ----+ cosine                         in training only

    noise, prompt latents, text --DiT, 32 Euler steps--> z --decoder--> audio    stage 2: train_tts.py, sample.py

Axes: B batch, T audio samples, N latent frames (T / hop), S SSL frames, C channels, D features, W width of the DiT,
H heads, L bytes of text. Convolutions see [B, C, N]; attention and latents are [B, N, D]. Parameters carry the names of
the authors' release (VAE) and of F5-TTS (DiT), so that published state dicts need no translation.
"""

import contextlib
import hashlib
import importlib
import json
import math
import os
import warnings
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio
import yaml
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations


class InputError(Exception):
    """A mistake in the user's input: what was found, what was expected, what mends it. Scripts exit with code 2."""


# ----------------------------------------------------------------------------------------------------------------------
# Settings: one dataclass a network, one table of presets.


@dataclass(frozen=True)
class VAEConfig:
    """Stage 1. The defaults are the paper's: 40 latent frames a second of 64 dimensions at 16 kHz."""

    sample_rate: int = 16000
    encoder_dim: int = 64  # channels after the first convolution; every block doubles them
    encoder_rates: tuple[int, ...] = (4, 4, 5, 5)
    latent_dim: int = 64
    decoder_dim: int = 1024  # channels before the first upsampling; every stage halves them
    decoder_rates: tuple[int, ...] = (5, 5, 2, 2, 2, 2)
    decoder_kernels: tuple[int, ...] = (9, 9, 4, 4, 4, 4)
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    ssl_dim: int = 1024  # width of the SSL features; 0: no alignment head
    align: str = "down"  # project the features to the latent (the paper), or the latent "up" to the features
    mel: bool = False  # the baseline: latent_dim log-mel bands in place of encoder and posterior

    @property
    def hop(self) -> int:
        """Audio samples in a latent frame: 400 by default, so 16000 / 400 = 40 frames a second."""
        return math.prod(self.decoder_rates)


@dataclass(frozen=True)
class DiTConfig:
    """Stage 2. The defaults are the paper's (F5-TTS "small"). The last five fields tie it to its data and VAE."""

    latent_dim: int = 64
    width: int = 768
    depth: int = 18
    heads: int = 12
    ff_mult: int = 2
    text_symbols: int = 256  # UTF-8 bytes
    vocabulary: str = ""  # or these symbols, one a line (F5-TTS's vocab.txt): see sample.to_symbols
    text_dim: int = 512
    text_layers: int = 4
    text_place: str = "left"  # which frames the text is given to: left, even or aligned (see text_index)
    sample_rate: int = 16000
    hop: int = 400
    text: str = "raw"  # normalisation of the training text: see prepare.normalize_text
    max_seconds: float = 30.0  # the longest training example: prompt and target together must fit
    vae_hash: str = ""  # latents_hash() of the VAE


# Training settings carry the names of the flags. "demo" runs on two CPU cores in an hour; every default is the paper's.
PRESETS = {
    "demo": dict(
        vae=dict(encoder_dim=10, latent_dim=32, decoder_dim=192, decoder_rates=(5, 5, 4, 4),
                 decoder_kernels=(9, 9, 8, 8), resblock_kernels=(7,)),
        train_vae=dict(steps=8400, encoder_steps=5400, encoder_batch_seconds=9.6, batch_seconds=4.8, crop=1.2,
                       micro_batch=8, lr=2e-3, lr_decay=0.9996, unit_latents=True, adv_start=7700, disc_width=0.125,
                       ema=0.998, eval_every=300, eval_clips=8, log_every=50, compile=True),
        dit=dict(width=192, depth=6, heads=3, text_dim=96, text_place="aligned"),
        train_tts=dict(steps=2000, lr=2e-3, warmup=100, join=2, batch_seconds=40, micro_seconds=80, ema=0.998,
                       eval_every=250, eval_sentences=8, log_every=50, sample_steps=16, sample_cfg=3),
    ),
    "small": dict(
        vae=dict(encoder_dim=32, decoder_dim=512),
        train_vae=dict(steps=200_000, crop=1.5, batch_seconds=48, micro_batch=32, disc_width=0.5),
        dit=dict(width=512, depth=12, heads=8, text_dim=256, text_place="aligned"),
        train_tts=dict(steps=200_000, lr=2e-4, warmup=5_000, batch_seconds=600, micro_seconds=640),
    ),
    "paper": dict(vae={}, train_vae={}, dit={}, train_tts={}),
    "f5-mel": dict(  # F5-TTS's mel-spectrograms, for data at 24 kHz
        vae=dict(decoder_rates=(4, 4, 2, 2, 2, 2), decoder_kernels=(8, 8, 4, 4, 4, 4)),
        train_vae=dict(mel=True, latent_dim=100), dit={}, train_tts={},
    ),
}  # fmt: skip
F5_MEL = VAEConfig(sample_rate=24000, latent_dim=100, ssl_dim=0, mel=True, **PRESETS["f5-mel"]["vae"])


class Pretrained(nn.Module):
    """A network that its folder rebuilds (model.safetensors and config.json). How files are read is at the end."""

    def save_pretrained(self, folder: str | Path, dtype=torch.float32, **notes) -> None:
        """Write the weights and, beside them, config.json with the class, its config and any further notes."""
        tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in self.state_dict().items()}
        data = to_safetensors(tensors)  # its save_file lets no one else read the file
        write_atomic(Path(folder) / "model.safetensors", lambda p: p.write_bytes(data))
        write_json(Path(folder) / "config.json", dict(model=type(self).__name__, config=asdict(self.config), **notes))

    @classmethod
    def from_pretrained(cls, name: str | Path):
        """The network in a folder or of a hub id, in eval mode on the CPU. Raises InputError if anything differs."""
        return load_network(cls, name)


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1: the encoder (DAC, arXiv 2306.06546).


def conv(*args, **kwargs) -> nn.Module:
    """A weight-normalised 1-D convolution."""
    return weight_norm(nn.Conv1d(*args, **kwargs))


class Snake(nn.Module):
    """x + sin²(αx)/α with one α a channel (arXiv 2006.08195): voiced speech is periodic, so the network should
    be. Squared, since the sum then never falls (its slope is 1 + sin 2αx)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x):  # [B, C, N]
        return x + (self.alpha * x).sin().square() * (self.alpha + 1e-9).reciprocal()


class ResidualUnit(nn.Module):
    """x + conv₁(snake(conv₇(snake(x)))), the wide convolution dilated."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        wide = conv(channels, channels, 7, dilation=dilation, padding=3 * dilation)
        self.block = nn.Sequential(Snake(channels), wide, Snake(channels), conv(channels, channels, 1))

    def forward(self, x):  # [B, C, N]
        return x + self.block(x)


class EncoderBlock(nn.Module):
    """Three residual units, then a strided convolution that doubles the channels."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        units = [ResidualUnit(channels, dilation) for dilation in (1, 3, 9)]
        down = conv(channels, 2 * channels, 2 * stride, stride, padding=math.ceil(stride / 2))
        self.block = nn.Sequential(*units, Snake(channels), down)

    def forward(self, x):  # [B, C, N]
        return self.block(x)  # [B, 2C, N / stride]


class Encoder(nn.Module):
    """Each block shortens the audio by its rate: 4 · 4 · 5 · 5 = 400 samples become a frame of 16 · `channels`."""

    def __init__(self, channels: int, rates: tuple[int, ...]):
        super().__init__()
        blocks = [EncoderBlock(channels * 2**i, rate) for i, rate in enumerate(rates)]
        self.out_channels = channels * 2 ** len(rates)
        first = conv(1, channels, 7, padding=3)
        last = conv(self.out_channels, self.out_channels, 3, padding=1)
        self.block = nn.Sequential(first, *blocks, Snake(self.out_channels), last)

    def forward(self, wave):  # [B, 1, T]
        return self.block(wave)  # [B, C, N]


class LogMel(nn.Module):
    """F5-TTS's frames, in place of an encoder: log of mel magnitudes (HTK scale), clamped at 1e-5, of windows of 1024
    samples centred on every hop-th sample. No parameters."""

    WINDOW = 1024

    def __init__(self, sample_rate: int, bands: int, hop: int):
        super().__init__()
        self.hop = hop
        with torch.device("cpu"):
            bank = torchaudio.functional.melscale_fbanks(self.WINDOW // 2 + 1, 0, sample_rate / 2, bands, sample_rate).T
        self.register_buffer("bank", bank, persistent=False)

    def forward(self, wave):  # [B, 1, T]
        hann = torch.hann_window(self.WINDOW, device=wave.device)
        with torch.autocast(wave.device.type, enabled=False):  # bfloat16 has eight bits, too few for audio
            spectrum = torch.stft(wave[:, 0].float(), self.WINDOW, self.hop, window=hann, return_complex=True)
            return (self.bank @ spectrum.abs()[..., :-1]).clamp(min=1e-5).log()  # [B, bands, N]


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1: from the encoder's features to a latent.


class CausalAttention(nn.Module):
    """y = W · pool(mean over eight heads h of softmax(qₕkₕᵀ/√d + causal mask) vₕ). From a wide input to a
    narrow output: heads are averaged and pooled, not concatenated."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(out_dim, out_dim)

    def forward(self, x):  # [B, N, D]
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # a key's bias cancels in softmax
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)  # each [B, 8, N, D/8]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).mean(1)  # [B, N, D/8]
        return self.proj(F.adaptive_avg_pool1d(y, self.proj.in_features))  # [B, N, out]


class GatedMLP(nn.Module):
    """w2(gelu(w0 v) · w1 v) of v = LayerNorm(x) (GEGLU, arXiv 2002.05202)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.w0 = nn.Linear(dim, 2 * dim)
        self.w1 = nn.Linear(dim, 2 * dim)
        self.w2 = nn.Linear(2 * dim, dim)

    def forward(self, x):  # [B, N, D]
        v = self.norm(x)
        return self.w2(F.gelu(self.w0(v), approximate="tanh") * self.w1(v))


class AttentionProjection(nn.Module):
    """From the encoder's width to the latent's: y = proj(LN₃ x) + attn(LN₁ x), then y + mlp(LN₂ y).

    Causal: alone (sampling), a prompt has the latents that it has in an utterance (training), save the last dozen, for
    which convolutions look ahead."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CausalAttention(dim, out_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, out_dim)
        self.norm2 = nn.LayerNorm(out_dim)
        self.mlp = GatedMLP(out_dim)

    def forward(self, x):  # [B, N, D]
        y = self.proj(self.norm3(x)) + self.attn(self.norm1(x))
        return y + self.mlp(self.norm2(y))  # [B, N, out]


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1: the decoder (BigVGAN-v2, arXiv 2206.04658), which first needs resampling by two.


def lowpass() -> torch.Tensor:
    """Kaiser-windowed sinc [1, 1, 12] with its cut-off at half of the band and a sum of 1."""
    beta = 0.1102 * (2.285 * 5 * math.pi * 4 * 0.3 + 7.95 - 8.7)
    window = torch.kaiser_window(12, periodic=False, beta=beta, dtype=torch.float64)
    taps = window * torch.sinc(0.5 * (torch.arange(12, dtype=torch.float64) - 5.5))
    return (taps / taps.sum()).float()[None, None]


class Stencil(torch.autograd.Function):
    """y[n] = Σᵢ taps[i] · x[n + i], the same for all channels: [B, C, N] → [B, C, N - len(taps) + 1].

    A compiler turns a sum of shifted inputs into one pass over memory. The gradient is written by hand, as a stencil of
    the reversed taps: autograd would fill a tensor of zeros for each tap."""

    @staticmethod
    def forward(ctx, x, taps):
        ctx.taps = taps
        n = x.shape[-1] - len(taps) + 1
        return sum(tap * x[..., i : i + n] for i, tap in enumerate(taps) if tap)

    @staticmethod
    def backward(ctx, gradient):
        zeros = gradient.new_zeros(*gradient.shape[:-1], len(ctx.taps) - 1)
        return Stencil.apply(torch.cat([zeros, gradient, zeros], dim=-1), ctx.taps[::-1]), None


def extend(x, first, last, left: int, right: int):
    """x [B, C, N] with `first` [B, C, 1] repeated before it and `last` after it; compiles to copies, unlike F.pad."""
    return torch.cat([first.expand(-1, -1, left), x, last.expand(-1, -1, right)], dim=-1)  # [B, C, left + N + right]


TAPS = tuple(lowpass().flatten().tolist())
DOWN_EVEN = TAPS[1::2]  # weights of the 2x signal's even samples in an output
DOWN_ODD = TAPS[0::2]
UP_EVEN = (*(2 * tap for tap in DOWN_ODD), 0.0)  # doubled: the zeros put between samples halve the level
UP_ODD = (0.0, *(2 * tap for tap in DOWN_EVEN))  # with a 0, so that both stencils read the same 7 inputs


class SnakeBeta(nn.Module):
    """x + sin²(eᵅx)/eᵝ with one α and β a channel (BigVGAN-v2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x):  # [B, C, N]
        alpha = self.alpha.exp()[:, None]
        beta = self.beta.exp()[:, None]
        return x + (alpha * x).sin().square() * (beta + 1e-9).reciprocal()


class AntiAliasedSnake(nn.Module):
    """down₂(SnakeBeta(up₂(x))): the harmonics that an activation adds above half the rate would fold back to wrong,
    audible frequencies. At twice the rate they are filtered out first.

    up₂(x) = 2 · filter ∗ (x with zeros between), down₂(y) = every other sample of filter ∗ y. Both are
    stencils: the 2x signal's even and odd samples are 6-tap sums of inputs, and an output is a 12-tap sum over both.
    The interleaved 2x signal is never formed. tests/plain.py holds the convolutions that this equals."""

    def __init__(self, channels: int):
        super().__init__()
        self.act = SnakeBeta(channels)

    def forward(self, x):  # [B, C, N]
        x = extend(x, x[..., :1], x[..., -1:], 3, 3)
        even = self.act(Stencil.apply(x, UP_EVEN))  # [B, C, N]
        odd = self.act(Stencil.apply(x, UP_ODD))
        first = even[..., :1]  # the 2x signal's ends are replicated
        last = odd[..., -1:]
        down = Stencil.apply(extend(even, first, last, 2, 3), DOWN_EVEN)
        return down + Stencil.apply(extend(odd, first, last, 3, 2), DOWN_ODD)  # [B, C, N]


class AMPBlock(nn.Module):
    """Anti-aliased multi-periodicity block: x += conv(act(conv_dilated(act(x)))) for dilations 1, 3, 5."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...] = (1, 3, 5)):
        super().__init__()
        half = (kernel - 1) // 2
        self.convs1 = nn.ModuleList(conv(channels, channels, kernel, dilation=d, padding=d * half) for d in dilations)
        self.convs2 = nn.ModuleList(conv(channels, channels, kernel, padding=half) for _ in dilations)
        self.activations = nn.ModuleList(AntiAliasedSnake(channels) for _ in range(2 * len(dilations)))

    def forward(self, x):  # [B, C, N]
        for i, (dilated, plain) in enumerate(zip(self.convs1, self.convs2)):
            x = x + plain(self.activations[2 * i + 1](dilated(self.activations[2 * i](x))))
        return x


class Decoder(nn.Module):
    """Each stage upsamples, then takes the mean of AMP blocks of different kernels."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.decoder_dim
        self.conv_pre = conv(config.latent_dim, channels, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
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
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round the waveform to eight bits
            return self.conv_post(self.activation_post(x.float())).clamp(-1, 1)  # [B, 1, T]


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1: the alignment, and the other losses of the VAE itself.


def conv_head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three convolutions, the head with which the authors project features: [B, inputs, N] → [B, outputs, N]."""
    first = nn.Conv1d(inputs, hidden, 3, padding=1), nn.GroupNorm(1, hidden), nn.Mish()
    second = nn.Conv1d(hidden, hidden, 3, padding=1), nn.GroupNorm(1, hidden), nn.Mish()
    return nn.Sequential(*first, *second, nn.Conv1d(hidden, outputs, 1))


def at_rate(features, frames: int):
    """SSL features [B, S, D] interpolated to another number of frames over the same time: [B, frames, D]."""
    return F.interpolate(features.mT, frames, mode="linear", align_corners=False).mT


class AlignmentHead(nn.Module):
    """SSL features, interpolated to the latents' frame rate and projected *down* to their width: latents become
    predictable from the features (the paper; the layers are the authors')."""

    def __init__(self, ssl_dim: int, latent_dim: int):
        super().__init__()
        self.model = conv_head(ssl_dim, 2 * latent_dim, latent_dim)

    def forward(self, z, features):  # [B, N, latent], [B, S, ssl_dim]
        return z, self.model(at_rate(features, z.shape[1]).mT).mT.float()  # [B, N, latent] twice

    def loss(self, z, aligned, valid):
        """The paper's −cos(z, target), averaged over an utterance's valid frames [B, N], then over the batch.

        z is the *sampled* latent, which decoder and DiT will see: too much noise in it raises this loss. The gradient
        reaches the encoder through z and the head through target; the SSL model is frozen."""
        return -masked_mean(F.cosine_similarity(*aligned, dim=-1), valid).mean()


class UpwardAlignmentHead(nn.Module):
    """VA-VAE's alignment (arXiv 2501.01423, section 3): the latent is projected *up* to the features, so that the
    features become predictable from the latents."""

    def __init__(self, ssl_dim: int, latent_dim: int):
        super().__init__()
        self.model = nn.Linear(latent_dim, ssl_dim, bias=False)

    def forward(self, z, features):  # [B, N, latent], [B, S, ssl_dim]
        return self.model(z).float(), at_rate(features, z.shape[1]).float()  # [B, N, ssl_dim] twice

    def loss(self, z, aligned, valid):
        """mean ReLU(0.5 - cos(Wz_i, f_i)) + mean ReLU(|cos(z_i, z_j) - cos(f_i, f_j)| - 0.25) over the valid frames i,
        and pairs of frames i, j, of an utterance; then over the batch. The margins, 0.5 and 0.25, are VA-VAE's."""
        projected, features = aligned
        frames = F.relu(0.5 - F.cosine_similarity(projected, features, dim=-1))  # [B, N]
        z = F.normalize(z, dim=-1)
        features = F.normalize(features, dim=-1)
        pairs = F.relu((z @ z.mT - features @ features.mT).abs() - 0.25)  # [B, N, N]
        both = valid[:, :, None] & valid[:, None]
        return (masked_mean(frames, valid) + masked_mean(pairs.flatten(1), both.flatten(1))).mean()


def masked_mean(x, valid):
    """Mean of x [B, N] over the valid entries [B, N] of each row: [B]."""
    return (x * valid).sum(1) / valid.sum(1).clamp(min=1)


def kl_loss(mean, logvar):
    """KL(q(z|x) ‖ N(0, 1)): summed over the features, averaged over batch and frames (VAE, arXiv 1312.6114).

    It keeps latents bounded and smooth, so that a DiT's small errors stay small. Its weight is small too: at 1, what
    the decoder needs would be smoothed away."""
    return -0.5 * (1 + logvar - mean.square() - (logvar.exp() + 1e-6)).sum(-1).mean()  # 1e-6: the authors'


def stft(wave, window: int):
    """[B, T] → complex [B, window / 2 + 1, frames]: periodic Hann window, hop of a quarter, centred, reflected."""
    hann = torch.hann_window(window, device=wave.device)
    return torch.stft(wave.float(), window, window // 4, window=hann, return_complex=True)


class MelDistance(nn.Module):
    """L1 between log10 mel magnitudes at seven scales, summed (DAC's multi-scale mel loss), in float32. Short windows
    see when something sounds, long ones at which pitch; logarithms, since loudness is heard in ratios."""

    def __init__(self, sample_rate: int):
        super().__init__()
        self.mels = nn.ModuleList()
        with warnings.catch_warnings():  # short windows leave some narrow filters empty, as in the reference
            warnings.simplefilter("ignore")
            for window, bands in zip((32, 64, 128, 256, 512, 1024, 2048), (5, 10, 20, 40, 80, 160, 320)):
                options = dict(hop_length=window // 4, n_mels=bands, power=1, norm="slaney", mel_scale="slaney")
                self.mels.append(torchaudio.transforms.MelSpectrogram(sample_rate, window, **options))

    def scales(self, x, y) -> list[torch.Tensor]:
        """Two waves [B, T] → one scalar a scale."""
        distances = []
        for mel in self.mels:
            a = mel(x.float()).clamp(min=1e-5).log10()
            b = mel(y.float()).clamp(min=1e-5).log10()
            distances.append(F.l1_loss(a, b))
        return distances

    def forward(self, x, y):
        return sum(self.scales(x, y))


def stft_distance(x, y):
    """Logged, not trained on: L1 of log10 power plus L1 of magnitude, for windows of 2048 and 512. x, y [B, T]."""
    total = 0
    for window in (2048, 512):
        a = stft(x, window).abs()
        b = stft(y, window).abs()
        log_power = F.l1_loss(a.clamp(min=1e-5).square().log10(), b.clamp(min=1e-5).square().log10())
        total = total + log_power + F.l1_loss(a, b)
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1: the VAE.


class SemanticVAE(Pretrained):
    """The speech VAE, with its alignment head."""

    AFTER_LATENTS = ("decoder.", "projectors.")  # the weights that no latent depends on
    CONTEXT = 32  # no audio sample depends on latents further away (tests/test_model.py)

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        if config.mel:
            self.encoder = LogMel(config.sample_rate, config.latent_dim, config.hop)
        else:
            if math.prod(config.encoder_rates) != config.hop:
                raise InputError(f"encoder_rates {config.encoder_rates} make frames of other than {config.hop} samples")
            self.encoder = Encoder(config.encoder_dim, config.encoder_rates)
            self.pre_block = AttentionProjection(self.encoder.out_channels, config.latent_dim)
            self.fc_mu = nn.Linear(config.latent_dim, config.latent_dim)
            self.fc_var = nn.Linear(config.latent_dim, config.latent_dim)
        self.decoder = Decoder(config)
        head = UpwardAlignmentHead if config.align == "up" else AlignmentHead
        self.projectors = head(config.ssl_dim, config.latent_dim) if config.ssl_dim else None

    def encode(self, wave):
        """Audio [B, T] → mean, logvar, each [B, N, D] with N = ceil(T / hop). Silence fills the last frame up."""
        wave = F.pad(wave, (0, -wave.shape[-1] % self.config.hop))
        x = self.encoder(wave[:, None]).transpose(1, 2)  # [B, N, C]
        if self.config.mel:
            return x, torch.full_like(x, -math.inf)  # a variance of 0: what is sampled is the mel itself
        return self.posterior(self.pre_block(x))

    def posterior(self, x):
        """[B, N, D] → mean, logvar, both float32."""
        return self.fc_mu(x).float(), self.fc_var(x).float().clamp(-12, 12)

    def decode(self, z, samples: int | None = None):
        """Latents [B, N, D] → float32 audio [B, samples] within [-1, 1]; by default all N · hop samples."""
        return self.decoder(z.transpose(1, 2))[:, 0, :samples].float()  # [B, T]

    def sample_posterior(self, wave, noise, features=None):
        """Audio [B, T], noise [B, N, D], SSL features [B, S, ssl_dim] → sampled latents z, mean, logvar, all [B,
        N, D], and (if there are features) the two vectors a frame that are to be aligned."""
        mean, logvar = self.encode(wave)
        z = mean + noise * (0.5 * logvar).exp()
        aligned = self.projectors(z, features) if features is not None else None
        return z, mean, logvar, aligned

    def forward(self, wave, noise, features=None):
        """One training pass: the reconstruction [B, T], then as sample_posterior."""
        z, mean, logvar, aligned = self.sample_posterior(wave, noise, features)
        return self.decode(z, wave.shape[-1]), z, mean, logvar, aligned

    def content_hash(self, without: tuple[str, ...] = ("projectors.",)) -> str:
        """Names these weights, less the alignment head's, in 16 hex digits: for tables of scores."""
        usual = vars(VAEConfig())  # left out, so that a new setting renames nothing
        settings = {k: v for k, v in vars(self.config).items() if v != usual[k] and k not in ("ssl_dim", "align")}
        digest = hashlib.sha256(json.dumps(settings).encode())
        for name, value in sorted(self.state_dict().items()):
            if not name.startswith(without):
                digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def latents_hash(self) -> str:
        """Names the latents: VAEs that differ in their decoders' weights alone can decode each other's."""
        return self.content_hash(without=self.AFTER_LATENTS)


# ----------------------------------------------------------------------------------------------------------------------
# Stage 2: the DiT reads text …


def angles(position, dim: int):
    """Positions [N] → [N, dim / 2]: position · 10000^(−2i / dim) (arXiv 1706.03762, 2104.09864)."""
    return position[:, None] * 10000.0 ** (-torch.arange(0, dim, 2, device=position.device) / dim)


def text_index(place: str, starts, counts, lengths, frames: int):
    """Which byte of the text each frame gets: [B, frames].

    left     frame i gets byte i, whatever is said there (F5-TTS): the DiT has to find out.
    even     each of n bytes gets frames // n frames, the last (frames % n) bytes one more (average upsampling,
             ZipVoice, arXiv 2506.13053): close to where it is said.
    aligned  from the byte's start in the speech to the next byte's: starts [B, L] in frames, ascending, infinite after
             the text.

    counts [B] <= lengths [B]: bytes and frames of each utterance."""
    frame = torch.arange(frames, device=lengths.device)
    if place == "left":
        return frame.expand(len(lengths), -1)
    if place == "aligned":
        middle = (frame + 0.5).expand(len(lengths), -1)
        return (torch.searchsorted(starts, middle.contiguous(), right=True) - 1).clamp(min=0)
    n = counts.clamp(min=1)[:, None]
    each = (lengths[:, None] // n).clamp(min=1)
    last = lengths[:, None] - 1 - frame  # frames after this one; below, the index from either end
    return torch.minimum(frame // each, n - 1 - last // (each + 1))


class GlobalResponseNorm(nn.Module):
    """γ · (x · n) + β + x, with n the norm of each channel over the frames relative to the mean channel's."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x, inside):  # [B, N, D]; inside [B, N, 1] keeps padding out of the norm
        norm = (x * inside).norm(dim=1, keepdim=True)  # [B, 1, D]
        return self.gamma * (x * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


class ConvNeXtBlock(nn.Module):
    """x + W₂ GRN(gelu(W₁ LN(depthwise conv₇ x))) (ConvNeXt-V2, arXiv 2301.00808)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 2 * dim)
        self.grn = GlobalResponseNorm(2 * dim)
        self.pwconv2 = nn.Linear(2 * dim, dim)

    def forward(self, x, inside):  # [B, N, D]
        y = self.norm(self.dwconv(x.transpose(1, 2)).transpose(1, 2))
        y = F.gelu(self.pwconv1(y))  # [B, N, 2D]
        return x + self.pwconv2(self.grn(y, inside))


class TextEmbedding(nn.Module):
    """Bytes → a vector a frame: embedding, position, ConvNeXt-V2 blocks, then each byte's vector to its frames.

    Dropped text: each byte becomes the filler (row 0, learned for this alone); length and places stay known."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.place = config.text_place
        self.text_embed = nn.Embedding(config.text_symbols + 1, config.text_dim)  # row b + 1 is byte b
        self.text_blocks = nn.ModuleList(ConvNeXtBlock(config.text_dim) for _ in range(config.text_layers))

    def forward(self, text, lengths, frames: int, drop=None, starts=None):
        """text [B, L] of symbols, padded with -1; lengths [B] in frames; drop [B] bool; starts [B, L] where each symbol
        begins, in frames (aligned placement only) → [B, frames, text_dim]."""
        text = F.pad(text + 1, (0, frames - text.shape[1]))  # [B, N], padded or cut
        frame = torch.arange(frames, device=text.device)
        inside = frame < lengths[:, None]  # [B, N]
        has_text = (text > 0) & inside  # also where it is dropped
        if drop is not None:
            text = text.masked_fill(drop[:, None], 0)
        angle = angles(frame, self.text_embed.embedding_dim)  # [N, D/2]
        position = torch.cat([angle.cos(), angle.sin()], dim=-1)  # [N, D]
        x = (self.text_embed(text) + position) * has_text[..., None]  # [B, N, D]
        for block in self.text_blocks:
            x = block(x, inside[..., None]) * has_text[..., None]
        index = text_index(self.place, starts, has_text.sum(1), lengths, frames).clamp(max=frames - 1)  # [B, N]
        return x.gather(1, index[..., None].expand_as(x)) * inside[..., None]


class DurationPredictor(nn.Module):
    """The logarithm of each byte's duration, up to a constant: the prompt, whose length is known, sets the rate (see
    sample.plan). From it come the `starts` of text that nobody has spoken yet."""

    def __init__(self, symbols: int, width: int = 128):
        super().__init__()
        self.embed = nn.Embedding(symbols + 1, width // 2)
        self.convs = nn.ModuleList(nn.Conv1d(c, width, 5, padding=2) for c in (width // 2, width, width))
        self.out = nn.Linear(width, 1)

    def forward(self, text):  # [B, L], padded with -1
        inside = (text >= 0)[:, None]  # [B, 1, L]
        x = self.embed(text + 1).mT  # [B, C, L]
        for conv in self.convs:
            x = F.gelu(conv(x * inside))
        return self.out(x.mT)[..., 0].float()  # [B, L]


def duration_loss(predicted, text, starts, lengths):
    """|log duration − predicted|, each less its utterance's mean, averaged over the bytes with a duration: [B].

    predicted and text [B, L]; starts [B, L] and lengths [B] in frames. A byte lasts until the next one starts."""
    starts = torch.minimum(starts, lengths[:, None])  # infinite after the text
    duration = torch.cat([starts[:, 1:], lengths[:, None]], dim=1) - starts  # [B, L]
    lasts = (text >= 0) & (duration > 0)  # the space between two joined clips does not
    error = duration.clamp(min=1e-3).log() - predicted
    error = error - masked_mean(error, lasts)[:, None]
    return masked_mean(error.abs(), lasts)


# ----------------------------------------------------------------------------------------------------------------------
# … and fills in latents (F5-TTS, arXiv 2410.06885).


class InputEmbedding(nn.Module):
    """x = linear(noised latents, prompt, text), then x + two grouped convolutions, which give relative positions."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.proj = nn.Linear(2 * config.latent_dim + config.text_dim, config.width)
        first, second = (nn.Conv1d(config.width, config.width, 31, padding=15, groups=16) for _ in range(2))
        self.conv_pos_embed = nn.ModuleDict(dict(conv1d=nn.Sequential(first, nn.Mish(), second, nn.Mish())))

    def forward(self, x, prompt, text, inside):  # [B, N, latent] twice, [B, N, text_dim], [B, N, 1]
        x = self.proj(torch.cat([x, prompt, text], dim=-1))  # [B, N, W]
        first, mish, second, _ = self.conv_pos_embed["conv1d"]
        inside = inside.transpose(1, 2)  # [B, 1, N]
        y = x.transpose(1, 2) * inside  # [B, W, N]; padding is zeroed before each convolution
        y = mish(first(y)) * inside
        y = mish(second(y)) * inside
        return x + y.transpose(1, 2)


class TimeEmbedding(nn.Module):
    """An MLP of the sines and cosines of 1000t · 10000^(−i / 127), i = 0 … 127."""

    def __init__(self, width: int):
        super().__init__()
        self.time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):  # [B]
        frequency = 1000 * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 127)
        angle = t[:, None] * frequency  # [B, 128]
        return self.time_mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))  # [B, W]


class Modulation(nn.Module):
    """Adaptive LayerNorm (AdaLN, arXiv 2212.09748): shifts, scales and gates [B, 1, W] from the time embedding."""

    def __init__(self, width: int, chunks: int):
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * width)

    def forward(self, t):  # [B, W]
        return self.linear(F.silu(t))[:, None].chunk(self.chunks, dim=-1)


def modulate(x, shift, scale):
    """LN(x) · (1 + scale) + shift, the LayerNorm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def rotate(x, angle):
    """Rotary position (arXiv 2104.09864): turn each adjacent pair of channels of x [B, N, H, D] by angle [N, D/2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos = angle[:, None].cos()
    sin = angle[:, None].sin()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    """softmax(R(q) R(k)ᵀ / √d) v over the frames inside, with R the rotary position, in every head.

    Padding is masked, so that an utterance's result is the same in any batch. attn_mask would rule out the fastest
    kernels. Instead q, k and v get eight more channels (those kernels want multiples of 8): 1 in q, 0 in v, and in k
    −10,000 at padding, whose weight becomes 0."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x, angle, inside):  # [B, N, W]; angle [N, W/H/2]; inside [B, N, 1]
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.to_q, self.to_k, self.to_v))
        size = q.shape[-1]
        penalty = ((~inside) * -1e4)[..., None].expand(-1, -1, self.heads, 8).type_as(k)  # [B, N, H, 8]
        q = torch.cat([rotate(q, angle), torch.ones_like(penalty)], dim=-1)  # [B, N, H, W/H + 8]
        k = torch.cat([rotate(k, angle), penalty], dim=-1)
        v = F.pad(v, (0, 8))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, H, N, W/H + 8]
        y = F.scaled_dot_product_attention(q, k, v, scale=size**-0.5)[..., :size]
        return self.to_out(y.transpose(1, 2).flatten(2))  # [B, N, W]


class DiTBlock(nn.Module):
    """x += g₁ · attention(LN(x)(1 + s₁) + b₁), then x += g₂ · W₂ gelu(W₁(LN(x)(1 + s₂) + b₂)).

    (b, s, g) = AdaLN(t)."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.attn_norm = Modulation(config.width, 6)
        self.attn = Attention(config.width, config.heads)
        inner = config.ff_mult * config.width
        hidden = nn.Sequential(nn.Linear(config.width, inner), nn.GELU(approximate="tanh"))
        dropout = nn.Identity()  # F5-TTS's, which keeps the parameters' names
        self.ff = nn.ModuleDict(dict(ff=nn.Sequential(hidden, dropout, nn.Linear(inner, config.width))))

    def forward(self, x, t, angle, inside):  # [B, N, W]
        shift1, scale1, gate1, shift2, scale2, gate2 = self.attn_norm(t)
        x = x + gate1 * self.attn(modulate(x, shift1, scale1), angle, inside)
        return x + gate2 * self.ff["ff"](modulate(x, shift2, scale2))


class DiT(Pretrained):
    """Velocity field of the flow from noise to standardised latents, given prompt and text."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        if config.text_place not in ("left", "even", "aligned"):
            raise InputError(f"text_place is {config.text_place!r}, expected left, even or aligned")
        self.time_embed = TimeEmbedding(config.width)
        self.text_embed = TextEmbedding(config)
        self.input_embed = InputEmbedding(config)
        self.transformer_blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.norm_out = Modulation(config.width, 2)
        self.proj_out = nn.Linear(config.width, config.latent_dim)
        self.durations = DurationPredictor(config.text_symbols) if config.text_place == "aligned" else None
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim))  # over the training split
        self.register_buffer("latent_std", torch.ones(config.latent_dim))
        # Zero AdaLN and output: at first every block is the identity and the velocity 0, so that a deep network starts
        # stable. All else, but for GRN, is PyTorch's default.
        for linear in [self.norm_out.linear, self.proj_out, *(b.attn_norm.linear for b in self.transformer_blocks)]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def standardize(self, z):
        """Latents [..., D] → zero mean, unit variance a channel: as large as the noise, and equal in weight."""
        return (z - self.latent_mean) / self.latent_std

    def destandardize(self, x):
        return x * self.latent_std + self.latent_mean

    def forward(self, x, prompt, text, t, lengths, read: tuple[int, ...] = ()):
        """Velocity [B, N, D] at time t [B] of noised latents x, given prompt latents (zero elsewhere), both [B, N, D],
        and text [B, N, text_dim] from `text_embed`. lengths [B] in frames: what is after them is padding.

        `read` names blocks whose outputs [B, N, W] are returned too, as (velocity, *outputs)."""
        frame = torch.arange(x.shape[1], device=x.device)
        inside = (frame < lengths[:, None])[..., None]  # [B, N, 1]
        angle = angles(frame, self.config.width // self.config.heads)  # [N, W/H/2]
        t = self.time_embed(t)  # [B, W]
        x = self.input_embed(x, prompt, text, inside).float()  # [B, N, W]; blocks add to it in float32
        states = {}
        for i, block in enumerate(self.transformer_blocks):
            x = block(x, t, angle, inside)
            if i in read:
                states[i] = x
        scale, shift = self.norm_out(t)  # in this order, as F5-TTS has it
        velocity = self.proj_out(modulate(x, shift, scale))  # [B, N, latent]
        return (velocity, *(states[i] for i in read)) if read else velocity


# ----------------------------------------------------------------------------------------------------------------------
# Flow matching (arXiv 2210.02747), as text-guided speech infilling (Voicebox, arXiv 2306.15687).


def flow_matching_loss(dit, x, noise, t, span, text, lengths, drop_prompt, drop_text, starts=None, read=()):
    """‖v(x_t, t) − (x − noise)‖² over the span, with x_t = (1 − t) · noise + t · x: noise at t = 0, data
    at t = 1, and between them a straight path of constant velocity.

    x standardised latents and noise [B, N, D]; t [B]; span [B, N] bool, the frames to generate; text [B, L]; lengths
    [B]; drop_* [B] bool where prompt or text is hidden, so that the velocity without them is learned too; starts [B, L]
    for aligned text. Returns the sum over the span's frames (mean over features) and the number of those frames, both
    to be divided over the whole (global) batch, then the outputs of the blocks in `read`."""
    x_t = (1 - t)[:, None, None] * noise + t[:, None, None] * x
    prompt = x.masked_fill((span | drop_prompt[:, None])[..., None], 0)
    embedded = dit.text_embed(text, lengths, x.shape[1], drop_text, starts)
    velocity = dit(x_t, prompt, embedded, t, lengths, read)
    velocity, *states = velocity if read else (velocity,)
    error = (velocity.float() - (x - noise)).square().mean(-1)  # [B, N]
    return ((error * span).sum(), span.sum(), *states)


# A few steps are best spent near the noise: these are places on a grid of 32 (EPSS, arXiv 2505.19931).
EPSS = {
    5: (0, 2, 4, 8, 16, 32),
    6: (0, 2, 4, 6, 8, 16, 32),
    7: (0, 2, 4, 6, 8, 16, 24, 32),
    10: (0, 2, 4, 6, 8, 12, 16, 20, 24, 28, 32),
    12: (0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32),
    16: (*range(9), 10, 12, 14, 16, 20, 24, 28, 32),
}


def time_steps(steps: int, sway: float) -> list[float]:
    """The steps + 1 times between which the flow is integrated, from 0 to 1. Sway (F5-TTS) maps t to t + sway ·
    (cos(πt/2) − 1 + t): negative, it shortens the steps near the noise, which settle what is said and when."""
    times = [i / 32 for i in EPSS[steps]] if steps in EPSS else [i / steps for i in range(steps + 1)]
    return [t + sway * (math.cos(math.pi / 2 * t) - 1 + t) for t in times]


@torch.no_grad()
def sample(dit, noise, prompt, prompt_lengths, text, lengths, steps=32, cfg=2.0, sway=-1.0, starts=None):
    """Integrate the flow by Euler's method from `noise` to latents, both [B, N, D] and standardised.

    prompt [B, N, D] holds each prompt's latents in its first prompt_lengths frames; text [B, L] is prompt and target
    text, starts [B, L] where its bytes begin (aligned text); lengths [B] prompt and target frames. Guidance (arXiv
    2207.12598) takes v further from its value u without prompt and text, for clearer speech: v + cfg · (v − u)."""
    given = (torch.arange(noise.shape[1], device=noise.device) < prompt_lengths[:, None])[..., None]
    prompt = prompt * given
    shown = torch.zeros_like(lengths, dtype=torch.bool)
    texts = [dit.text_embed(text, lengths, noise.shape[1], drop, starts) for drop in (shown, ~shown)]
    both = torch.cat([prompt, torch.zeros_like(prompt)]), torch.cat(texts)  # with prompt and text, and without
    times = time_steps(steps, sway)
    x = noise
    for now, following in zip(times[:-1], times[1:]):
        t = torch.full((2 * len(x),), now, device=x.device)
        v, without = dit(torch.cat([x, x]), *both, t, torch.cat([lengths, lengths])).float().chunk(2)
        x = x + (following - now) * (v + cfg * (v - without))
    return torch.where(given, prompt, x)


# ======================================================================================================================
# You can stop here. Above is the method; below are files. What cannot be read or written, or does not fit, is an
# InputError; no file is ever left half-written.


def write_atomic(path: Path, write) -> None:
    """Call write(temporary path), flush it to the disk, then rename: `path` is always whole, old or new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # a full disk, as Python and torch say
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"cannot write {path}: {str(e).splitlines()[0]}; what was there before is whole") from e


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=2))


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
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and any(entry.compress_type for entry in zipfile.ZipFile(path).infolist()):
            raise ValueError("its entries are compressed, which torch.save never does")  # they may unfold to any size
        return torch.load(path, "cpu", weights_only=True) | {}
    except Exception as e:  # torch raises many kinds
        raise InputError(f"cannot read {path}: {(str(e) or repr(e)).splitlines()[0]}; copy the file anew") from e


def package(name: str, purpose: str):
    """A library that only some need, imported where it is used. Its absence is an InputError."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise InputError(f"{name} is needed {purpose}, and cannot be imported ({e}): run pip install {name}") from e


LOCAL = (".", "/", "data/", "demo/", "downloads/", "runs/")  # beginnings of paths, for which the hub is never asked


def local_folder(name: str | Path) -> Path:
    """A folder on this disk, or one of a hub id such as zkniu/Semantic-VAE/semantic_vae, which is downloaded."""
    if Path(name).is_dir():
        return Path(name)
    parts = str(name).split("/")
    if len(parts) < 2 or str(name).startswith(LOCAL) or Path(parts[0]).exists():
        raise InputError(f"no folder {name} (expected a checkpoint folder, or a hub id such as "
                         "zkniu/Semantic-VAE/semantic_vae): if it was moved, name it with its flag (--vae, "
                         "--tts, --init, --reconstruct)")
    from huggingface_hub import snapshot_download

    repository = "/".join(parts[:2])
    subfolder = "/".join(parts[2:])
    try:
        folder = Path(snapshot_download(repository, allow_patterns=[f"{subfolder}/**"] if subfolder else None))
        os.listdir(folder / subfolder)  # it may hold no such folder, or none that was downloaded before
    except Exception as e:  # the hub's errors are many; each means that the name led nowhere
        raise InputError(f"no folder {name} here, none on the hub: {(str(e) or repr(e)).splitlines()[0]}") from e
    return folder / subfolder


def load_network(kind, name: str | Path):
    """A checkpoint of ours; the authors' release and Vocos for a SemanticVAE; F5-TTS's for a DiT."""
    folder = local_folder(name)
    if kind is SemanticVAE and (folder / "metainfo.json").exists():
        return from_authors(folder)
    if kind is SemanticVAE and (folder / "config.yaml").exists():
        return from_vocos(folder)
    if kind is DiT and (folder / "vocab.txt").exists():
        return from_f5(folder)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no config.json (train_vae.py's, train_tts.py's) or vocab.txt (F5-TTS's)")
    saved = read_json(folder / "config.json")
    if saved.get("model") != kind.__name__:
        raise InputError(f"{folder} holds a {saved.get('model')}, expected a {kind.__name__}")
    tensors = load_torch(folder / "model.safetensors")
    config_class = kind.__init__.__annotations__["config"]
    config = read_config(config_class, saved.get("config"), folder / "config.json", len(tensors))
    return rebuild(kind, config, tensors, folder)


def read_config(config_class, values, path: Path, most: int):
    """The dataclass of these values. Unknown names, wrong types, and sizes beyond reason are an InputError."""
    try:
        config = config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        for name, value in vars(config).items():
            entries = value if isinstance(value, tuple) else (value,)
            numbers = [n for n in entries if type(n) is int]
            layers = value if name in ("depth", "text_layers") else len(entries)
            mixed = isinstance(value, tuple) and entries != (*numbers,)
            if type(value) is not type(getattr(config_class, name)) or mixed:
                raise TypeError(f"{name} is {value!r}")
            if layers > most or any(not 0 <= n < 200_000 for n in numbers):
                raise TypeError(f"{name} is {value}, which weights of {most} tensors cannot have")
    except (AttributeError, TypeError) as e:  # no object, an unknown name, or a value that cannot be
        raise InputError(f"{path} does not describe a {config_class.__name__}: {e}") from e
    return config


def rebuild(kind, config, tensors: dict[str, torch.Tensor], source) -> nn.Module:
    """kind(config) with these weights, in eval mode. InputError: one is missing, left over or of another shape."""
    try:
        with torch.device("meta"):  # sizes are compared with the file's before memory is spent on them
            module = kind(config)
        module.load_state_dict(tensors, assign=True)  # names and shapes
        copies = {name: value.to(torch.float32, copy=True) for name, value in tensors.items()}  # the file is mapped
        module.load_state_dict(copies, assign=True)
    except (ArithmeticError, AttributeError, IndexError, InputError, RuntimeError, TypeError, ValueError) as e:
        raise InputError(f"{source} does not fit {kind.__name__}: {' '.join(str(e).split())[:300]}") from e
    return module.eval()


def fold_weight_norm(module: nn.Module) -> nn.Module:
    """For inference: every weight as it is after normalisation, not computed anew in each pass. Renames weights."""
    for part in list(module.modules()):
        if is_parametrized(part, "weight"):
            remove_parametrizations(part, "weight")
    return module


# ----------------------------------------------------------------------------------------------------------------------
# What others published, every weight accounted for by name and shape. Sizes are read off the shapes.


def from_authors(folder: Path) -> SemanticVAE:
    """The authors' release of the VAE."""
    path = folder / "dac" / "ema_state_dict.pth"
    if not path.exists():
        path = folder / "dac" / "weights.pth"
    tensors = load_torch(path)
    try:
        tensors = tensors.get("state_dict", tensors)
        tensors = {k.removeprefix("ema_model."): v for k, v in tensors.items() if k not in ("initted", "step")}
        for kind, expected in (("filter", lowpass()), ("zero_k_bias", torch.zeros(1))):  # buffers that we compute
            for name in [k for k in tensors if k.endswith(kind)]:
                if not torch.allclose(tensors.pop(name).float(), expected, atol=1e-6):
                    raise InputError(f"{path}: {name} differs from the {kind} this model computes")
        head = tensors.get("projectors.model.0.weight")
        config = VAEConfig(
            encoder_dim=len(tensors["encoder.block.0.bias"]),
            latent_dim=len(tensors["fc_mu.bias"]),
            decoder_dim=len(tensors["decoder.conv_pre.bias"]),
            ssl_dim=0 if head is None else head.shape[1],
        )
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as e:
        raise InputError(f"{path} is not the authors' release: {type(e).__name__} {e}") from e
    return rebuild(SemanticVAE, config, tensors, path)


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


def from_vocos(folder: Path) -> SemanticVAE:
    """F5-TTS's mel frames, decoded by Vocos as it is published: used, not trained."""
    package("vocos", "to decode F5-TTS's frames")
    tensors = load_torch(folder / "pytorch_model.bin")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        frames = config["feature_extractor"]["init_args"]
        if frames != dict(sample_rate=24000, n_fft=1024, hop_length=256, n_mels=100, padding="center"):
            raise InputError(f"{folder} decodes {frames}, not F5-TTS's frames: expected charactr/vocos-mel-24khz")
        with torch.device("meta"):  # its decoder is replaced, and nothing else has weights
            vae = SemanticVAE(F5_MEL)
        tensors = {k: v for k, v in tensors.items() if not k.startswith("feature_extractor.")}  # LogMel's part
        vae.decoder = rebuild(Vocos, config, tensors, folder)
        return vae.eval()
    except (AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as e:
        raise InputError(f"{folder} does not hold Vocos: {' '.join(repr(e).split())}") from e


def from_f5(folder: Path) -> DiT:
    """F5-TTS's averaged weights, as published or as its fine-tuning saves them."""
    if "F5TTS_Base" in folder.resolve().name:  # names and shapes of the weights do not tell
        raise InputError(f"{folder} is an old base (one head rotary, text padding not masked): use F5TTS_v1_Base")
    paths = [*folder.glob("model_*.safetensors")] or [*folder.glob("model_*.pt")]
    if len(paths) != 1:
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
        depth = sum(k.endswith(".attn.to_q.bias") for k in tensors)
        ff_mult = len(tensors["transformer_blocks.0.ff.ff.0.0.bias"]) // width
        text_layers = sum(k.endswith(".dwconv.bias") for k in tensors)
        vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n")
        lines = vocabulary.split("\n")
        if (len(lines), lines[0]) != (rows - 1, " "):
            raise InputError(f"{folder / 'vocab.txt'} has {len(lines)} lines, the first {lines[0]!r}, expected "
                             f"{rows - 1}, the first ' ': take the vocab.txt of its training")
        config = DiTConfig(
            latent_dim=100, width=width, depth=depth, heads=width // 64, ff_mult=ff_mult, text_symbols=rows - 1,
            vocabulary=vocabulary, text_dim=text_dim, text_layers=text_layers, sample_rate=24000, hop=256,
            max_seconds=24.0, vae_hash=vae_hash)  # fmt: skip
    except (ArithmeticError, AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as e:
        raise InputError(f"{folder} does not hold what F5-TTS publishes: {type(e).__name__} {e}") from e
    tensors |= dict(latent_mean=torch.zeros(100), latent_std=torch.ones(100))  # its frames are used as they are
    return rebuild(DiT, config, tensors, folder)
