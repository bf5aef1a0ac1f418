"""Turn a folder of speech into one data folder: audio, SSL features and latents as flat memory-mapped arrays.

    python prepare.py                                                      # the demo corpus and its tiny teacher
    python prepare.py --vae runs/vae                                       # add a trained VAE's latents, for stage 2
    python prepare.py LibriTTS/ --out data/libritts --ssl microsoft/wavlm-large
    torchrun --standalone --nproc_per_node 8 prepare.py ...                # shares the clips between 8 GPUs

The data folder, whose arrays hold the clips in the order of the index:
    index.tsv     one line a clip: id, split, speaker, samples, text
    audio.bin     int16   [samples of all clips]
    ssl.bin       float16 [SSL frames of all clips, width]
    starts.bin    float32 [bytes of all texts]: the second at which each byte begins; nan where a clip was not aligned
    latents-HASH.bin  float16 [latent frames of all clips, 2, latent_dim]: mean and log-variance, by that VAE
    meta.json     sample rate, teacher, VAEs, counts, hours, the latents' statistics
    settings.json how the folder was made, and from which texts and recordings: others are refused
    dropped.tsv   every clip that was dropped, with its reason; unaligned.tsv: those that could not be aligned

Killed at any moment and run again, it continues and ends with the same bytes.
"""

import argparse
import contextlib
import csv
import datetime
import errno
import glob
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import time
import traceback
import unicodedata
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import soundfile as sf
import torch
import torch.distributed as dist
import torch.fx.experimental._config
import torchaudio
from safetensors import SafetensorError
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from model import (LOCAL, PRESETS, InputError, SemanticVAE, fold_weight_norm, load_torch, read_json, write_atomic,
                   write_json, write_text)  # fmt: skip

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DEMO = Path(__file__).resolve().parent / "demo"

# ----------------------------------------------------------------------------------------------------------------------
# Text, audio and time.


JOINERS = "\u200c\u200d"  # which change how a word is written; other invisible marks (soft hyphens, …) say nothing


def normalize_text(text: str, mode: str) -> str:
    """NFC, straight apostrophes, single spaces, no invisible marks; "plain" also lower-cases and removes punctuation
    (all but apostrophes inside words). sample.py applies the checkpoint's mode: a model is asked what it was taught."""
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        raise InputError(f"not UTF-8: {text!r}")
    text = unicodedata.normalize("NFC", text).replace("’", "'")
    text = "".join(c for c in text if unicodedata.category(c) != "Cf" or c in JOINERS)
    if mode == "plain":
        text = "".join(c if unicodedata.category(c)[0] in "LMN" or c in "'" + JOINERS else " " for c in text.lower())
        text = " ".join(word.strip("'") for word in text.split())
    return " ".join(text.split())


FORMATS = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".ogg": ("OGG", "VORBIS"),
    ".opus": ("OGG", "OPUS"),
    ".mp3": ("MP3", None),
}


def read_audio(path: str | Path, rate: int) -> np.ndarray:
    """Any file soundfile reads → mono float32 [T] at `rate`. Raises InputError if it cannot be read or is empty."""
    blocks = []
    try:
        with sf.SoundFile(path) as f:
            source_rate = f.samplerate
            while len(block := f.read(1 << 20, dtype="float32", always_2d=True)):
                blocks.append(block.mean(1))
            read = sum(map(len, blocks))
            if read < 0.95 * f.frames < 1 << 40:  # a cut MP3; where no header tells, 2^63
                raise ValueError(f"it has {read} of {f.frames} samples, copy it anew")
            cut = re.search(r"^data : (\d+) \(should be (\d+)", f.extra_info, re.M)  # a WAV's header, and the file
            if cut and int(cut[2]) < int(cut[1]) < 1 << 31:  # a stream's header says 4 GB
                raise ValueError(f"it has {cut[2]} of {cut[1]} bytes, copy it anew")
    except (sf.SoundFileError, OSError, TypeError, ValueError) as e:  # TypeError: a file without a header
        reason = getattr(e, "error_string", e)
        why = f"{reason} (ffmpeg -i FILE FILE.wav converts what is not wav, flac, ogg, opus or mp3)"
        if os.path.exists(path) and not os.access(path, os.R_OK):
            why = "its permissions do not let you read it"
        elif not os.path.isfile(path):
            stem = os.path.splitext(path)[0]
            others = [suffix for suffix in FORMATS if os.path.isfile(stem + suffix)]
            why = f"no such file (but one that ends in {others[0]})" if others else "no such file"
        raise InputError(f"cannot read {path}: {why}") from e
    if not blocks:
        raise InputError(f"cannot read {path}: it holds no samples")
    wave = np.concatenate(blocks)
    if 4 < np.abs(wave).max() < math.inf:
        raise InputError(f"cannot read {path}: its samples are not within -1 and 1: divide them by their full scale")
    if source_rate * rate / math.gcd(source_rate, rate) ** 2 > 1 << 26:  # the resampling filters would fill the memory
        raise InputError(f"cannot read {path}: {source_rate} Hz and {rate} Hz have too little in common: resample it")
    return resample(wave, source_rate, rate)


def resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """[T] at `rate` → [T · wanted / rate]."""
    return torchaudio.functional.resample(torch.from_numpy(wave), rate, wanted).numpy()


def write_wave(path: Path, wave: np.ndarray, rate: int) -> None:
    container, subtype = FORMATS[path.suffix.lower()]
    write_atomic(path, lambda p: sf.write(p, wave, rate, format=container, subtype=subtype))


def loudness(wave: np.ndarray, rate: int) -> tuple[np.ndarray, float]:
    """RMS of each 20 ms of a wave [T] less its mean, and the fifth loudest of them (no mere click), 0 if silent."""
    frames = (wave - wave.mean())[: len(wave) // (rate // 50) * (rate // 50)].reshape(-1, rate // 50)
    levels = np.sqrt(np.square(frames).mean(1))
    loudest = np.sort(levels)[-5:].min(initial=1)
    return levels, float(loudest) if len(levels) and loudest > 2e-4 else 0.0


def frame_count(samples, sample_rate: int, frame_rate):
    """Frames that hold `samples` at `frame_rate` a second, rounded up: the one rule for all arrays.

    Latents have sample_rate / hop frames a second. SSL models make about one frame less than this, since their front
    end does not pad; their last frame is repeated. Frame i of any array thus starts at i / frame_rate seconds."""
    ratio = Fraction(frame_rate) / Fraction(sample_rate)
    return -(-samples * ratio.numerator // ratio.denominator)  # rounded up


def repeat_last(features: torch.Tensor, count: int) -> torch.Tensor:
    """Features [S, D] with S <= count → [count, D]."""
    return torch.cat([features, features[-1:].expand(count - len(features), -1)])


# ----------------------------------------------------------------------------------------------------------------------
# The data folder.


class Data:
    """A prepared folder, memory-mapped. Raises InputError if it is missing, incomplete or lacks what is asked for."""

    REMEDIES = {"ssl": "--ssl MODEL", "latents": "--vae RUN", "starts": "--aligner MODEL"}

    def __init__(self, folder: str | Path, need: tuple[str, ...] = ("audio",), vae_hash: str = ""):
        """need: the arrays to open. "latents" are those of the VAE with this latents_hash(), or the newest."""
        self.folder = Path(folder)
        if not (self.folder / "meta.json").exists():
            raise InputError(f"{folder} is not a prepared data folder (no meta.json): run python prepare.py SOURCE "
                             f"--ssl MODEL --out {folder} first (for the demo, without SOURCE and --ssl), or name the "
                             "folder with --data")
        self.meta = read_json(self.folder / "meta.json")
        latents = [name for name in self.meta if name.startswith(f"latents-{vae_hash}")]
        if latents and "latents" in need:
            self.meta["latents"] = self.meta[latents[-1]]
        for name in need:
            if name not in self.meta:
                whose = f" of VAE {vae_hash}" if name == "latents" and vae_hash else ""
                remedy = self.REMEDIES.get(name, "")
                raise InputError(f"{folder} holds no {name}{whose}: run python prepare.py --out {folder} {remedy}")
        try:
            index = self.folder / "index.tsv"
            names = ("id", "split", "speaker", "samples", "text")
            self.identity = f"{zlib.crc32(index.read_bytes()):08x}"  # of clips, texts and split
            self.clips = [dict(zip(names, line.split("\t"), strict=True)) for _, line in read_lines(index)[1:]]
            self.rate = self.meta["sample_rate"]
            self.samples = np.array([int(clip["samples"]) for clip in self.clips])
            self.arrays = {}
            self.offsets = {}
            for name in need:
                entry = self.meta[name]
                path = self.folder / f"{latents[-1] if name == 'latents' else name}.bin"
                offsets = self.offsets_at(entry["rate"])
                found = path.stat().st_size
                expected = math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize
                if found != expected or offsets[-1] != entry["shape"][0] or self.samples.min(initial=0) < 0:
                    raise ValueError(f"{path} has {found} bytes, expected {expected} in {offsets[-1]} rows")
                self.arrays[name] = np.memmap(path, entry["dtype"], "r", shape=tuple(entry["shape"]))
                self.offsets[name] = offsets
        except (ArithmeticError, AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as e:
            raise InputError(f"{folder} is damaged ({type(e).__name__}: {e}): remove it and prepare it again") from e

    def offsets_at(self, rate) -> np.ndarray:
        """Where each clip begins, and the end, in an array of `rate` rows a second ("byte": a row a byte of text)."""
        if rate == "byte":
            counts = [len(clip["text"].encode()) for clip in self.clips]
        else:
            counts = frame_count(self.samples, self.rate, rate)
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def split(self, name: str) -> list[int]:
        return [i for i, clip in enumerate(self.clips) if clip["split"] == name]

    def spread(self, clips: list[int], count: int) -> list[int]:
        """`count` of these clips, or all, spread evenly over their speakers."""
        clips = sorted(clips, key=lambda i: (self.clips[i]["speaker"], i))
        return [clips[round(k)] for k in np.linspace(0, len(clips) - 1, min(count, len(clips)))]

    def get(self, name: str, i: int, start: int = 0, count: int | None = None) -> torch.Tensor:
        """Rows start … start + count of clip i, cut at its end, as float32; audio within [-1, 1]."""
        first, end = self.offsets[name][i : i + 2]
        rows = self.arrays[name][first + start : end if count is None else min(end, first + start + count)]
        rows = torch.from_numpy(np.array(rows)).float()  # a copy: the map is read-only
        return rows / 32767 if name == "audio" else rows


# ----------------------------------------------------------------------------------------------------------------------
# The teacher, the aligner, and what they and the VAE add to the folder.


class SSLModel:
    """A frozen Hugging Face speech encoder: WavLM, HuBERT, wav2vec 2.0, XLS-R, w2v-BERT, a Whisper encoder…

    Waves go through the model's own feature extractor (zero mean and unit variance, where it was trained so)."""

    def __init__(self, name: str, layer: int | str = -1, device=torch.device("cpu"), sample_rate: int | None = None):
        """layer: a hidden state, -1 for the last one, or "logits" of a CTC model; sample_rate: what it must hear."""
        kind = "ModelForCTC" if layer == "logits" else "Model"
        flag = "--aligner" if layer == "logits" else "--ssl"
        self.extractor, model = from_hub(flag, name, "FeatureExtractor", kind)
        self.name = name
        self.layer = layer
        self.device = device
        self.revision = revision(name, model.config)
        states = getattr(model.config, "num_hidden_layers", 0) + 1
        if layer != "logits" and not -states <= layer < states:
            raise InputError(f"{name} has the hidden states 0 to {states - 1}, no --layer {layer}")
        self.whisper = model.config.model_type == "whisper"
        self.model = (model.get_encoder() if self.whisper else model).float().to(device).eval()
        self.sample_rate = self.extractor.sampling_rate
        # Group norm over time sees padding, and these models had no masks in training: only equal lengths are batched.
        self.equal_lengths = getattr(model.config, "feat_extract_norm", None) == "group"
        if self.whisper:
            self.rate = Fraction(model.config.max_source_positions, 30)
            self.width = model.config.d_model
        else:
            try:
                short, long = (self([np.zeros(s * self.sample_rate, np.float32)])[0] for s in (1, 11))
            except (AttributeError, TypeError, RuntimeError) as e:
                raise InputError(f"{name} is no encoder of speech like WavLM, HuBERT or Whisper: {e}") from e
            self.rate = Fraction(len(long) - len(short), 10)
            self.width = long.shape[1]
        if sample_rate not in (None, self.sample_rate):
            raise InputError(f"{flag} {name} hears {self.sample_rate} Hz, the data folder holds {sample_rate} Hz: "
                             f"prepare it with --sample-rate {self.sample_rate}")

    @torch.no_grad()
    def __call__(self, waves: list[np.ndarray]) -> list[torch.Tensor]:
        """float32 [T] waves → float32 features [S, D] of each wave's own length, as if alone."""
        if self.whisper and max(map(len, waves)) > 30 * self.sample_rate:
            raise InputError(f"{self.name} hears 30 s at most: prepare the data with --max-seconds 30")
        options = {} if self.whisper else dict(padding=True, return_attention_mask=not self.equal_lengths)
        inputs = self.extractor(waves, sampling_rate=self.sample_rate, return_tensors="pt", **options).to(self.device)
        out = self.model(**inputs, output_hidden_states=self.layer not in (-1, "logits"))
        if self.layer == "logits":
            states = out.logits
        else:
            states = out.last_hidden_state if self.layer == -1 else out.hidden_states[self.layer]
        if self.whisper:
            frames = [frame_count(len(w), self.sample_rate, self.rate) for w in waves]
        elif "input_features" in inputs:  # w2v-BERT: its extractor makes the frames
            frames = inputs["attention_mask"].sum(1).tolist()
        else:
            frames = [int(self.model._get_feat_extract_output_lengths(torch.tensor(len(w)))) for w in waves]
        return [state[:n].float() for state, n in zip(states, frames)]

    def batches(self, lengths: list[int], seconds: float) -> list[list[int]]:
        """Positions grouped by length into batches of at most `seconds` of padded audio."""
        batches = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            fits = batches and lengths[i] * (len(batches[-1]) + 1) <= seconds * self.sample_rate
            if fits and not (self.equal_lengths and lengths[i] != lengths[batches[-1][0]]):
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def of_clips(self, data: Data, clips, seconds: float):
        """(clip, features [S, D]) of all these clips, batch by batch."""
        for batch in self.batches([int(data.samples[i]) for i in clips], seconds):
            waves = [data.get("audio", clips[j]).numpy() for j in batch]
            yield from zip((clips[j] for j in batch), self(waves))


def fill_ssl(args, rank: int, world: int, device) -> None:
    """The teacher's features of every clip, over whole utterances."""
    data = Data(args.out)
    if known := data.meta.get("ssl"):
        if (known["model"], known["layer"]) != (args.ssl, args.layer):
            raise InputError(f"{args.out} already holds SSL features of {known['model']}, layer {known['layer']}, not "
                             f"{args.ssl}, layer {args.layer}: choose another --out")
        if Path(args.ssl).is_dir() and revision(args.ssl) != known["revision"]:
            raise InputError(f"{args.ssl} holds other weights than when {args.out} was made: choose another --out")
        return
    ssl = SSLModel(args.ssl, args.layer, device, data.rate)
    facts = dict(model=args.ssl, revision=ssl.revision, layer=args.layer, dim=ssl.width, rate=str(ssl.rate))

    def make(clips):
        features = {}
        for i, x in ssl.of_clips(data, clips, args.batch_seconds):
            x = x.half().cpu()
            if not torch.isfinite(x).all():
                name = data.clips[i]["id"]
                raise InputError(f"{args.ssl} gives non-finite float16 features for {name}: drop it, or change --layer")
            count = int(frame_count(data.samples[i], data.rate, ssl.rate))
            features[i] = repeat_last(x[:count], count)
        return torch.cat([features[i] for i in clips])

    array, _ = fill(data, args.out, "ssl", facts, (ssl.width,), make, rank, world)
    if rank == 0:
        finish(args.out, "ssl", array, facts)


class Aligner:
    """A CTC recogniser that finds where each byte of a text is said (torchaudio.functional.forced_align)."""

    WORST = -2.5  # mean log-probability a character below which text and speech differ: see demo/README.md

    def __init__(self, name: str, sample_rate: int, device):
        self.model = SSLModel(name, "logits", device, sample_rate)
        (tokenizer,) = from_hub("--aligner", name, "Tokenizer")
        self.blank = tokenizer.pad_token_id
        self.ids = {text: i for text, i in tokenizer.get_vocab().items() if len(text) == 1 and i != self.blank}
        self.ids[" "] = self.ids.get(getattr(tokenizer, "word_delimiter_token", None) or " ")

    def symbol(self, character: str) -> int | None:
        """Its id in the model's alphabet, in whichever case that has it."""
        found = (self.ids.get(c) for c in (character, character.upper(), character.lower()))
        return next((i for i in found if i is not None), None)

    def __call__(self, logits: torch.Tensor, text: str, seconds: float) -> torch.Tensor:
        """Logits [S, symbols] of a clip → the second at which each byte of its text begins [L]: halfway between the
        middles of the spans that are aligned to it and to the byte before. Characters that the model lacks are spread
        evenly between their neighbours. All nan if something else is said."""
        places = np.cumsum([0, *(len(c.encode()) for c in text)])  # of each character's first byte
        symbols = [(place, self.symbol(c)) for place, c in zip(places.tolist(), text)]
        known = [(place, symbol) for place, symbol in symbols if symbol is not None]
        targets = torch.tensor([[symbol for _, symbol in known]], dtype=torch.int32)
        length = len(text.encode())
        repeats = (targets[0, 1:] == targets[0, :-1]).sum().item()
        if not known or len(known) + repeats > len(logits):
            return torch.full((length,), math.nan)
        path, scores = torchaudio.functional.forced_align(logits.log_softmax(-1)[None].cpu(), targets, blank=self.blank)
        spans = torchaudio.functional.merge_tokens(path[0], scores[0], self.blank)
        if np.mean([span.score for span in spans]) < self.WORST:
            return torch.full((length,), math.nan)
        moments = [(span.start + span.end) / 2 / len(logits) * seconds for span in spans]
        peaks = np.interp(range(length), [-1, *(place for place, _ in known), length], [0, *moments, seconds])
        return torch.from_numpy(np.concatenate([[0], (peaks[1:] + peaks[:-1]) / 2])).float()


def fill_starts(args, rank: int, world: int, device) -> None:
    """Where each byte of every clip's text begins."""
    data = Data(args.out)
    aligner = Aligner(args.aligner, data.rate, device)
    facts = dict(aligner=args.aligner, revision=aligner.model.revision, rate="byte")
    if data.meta.get("starts", {}).get("revision", "none") == facts["revision"]:
        return

    def make(clips):
        starts = {}
        for i, logits in aligner.model.of_clips(data, clips, args.batch_seconds):
            starts[i] = aligner(logits, data.clips[i]["text"], data.samples[i] / data.rate)
        return torch.cat([starts[i] for i in clips])

    array, offsets = fill(data, args.out, "starts", facts, (), make, rank, world, "float32")
    if rank > 0:
        return
    lost = [clip["id"] for clip, offset in zip(data.clips, offsets) if np.isnan(array[offset])]
    write_text(args.out / "unaligned.tsv", "".join(f"{name}\n" for name in lost))
    finish(args.out, "starts", array, facts | dict(unaligned=len(lost)))
    lacks = Counter(c for clip in data.clips for c in clip["text"] if aligner.symbol(c) is None)
    if lacks:
        counts = ", ".join(f"{c!r} {count} times" for c, count in lacks.most_common(20))
        print(f"{args.aligner} lacks {counts}: placed between their neighbours")
    print(f"{len(lost)} of {len(data.clips)} clips cannot be aligned (listed in {args.out / 'unaligned.tsv'}): "
          "train_tts.py --text-place aligned skips them")


@torch.no_grad()
def fill_latents(args, rank: int, world: int, device) -> None:
    """The posterior of every clip, and each channel's mean and standard deviation over the training split."""
    data = Data(args.out)
    vae = SemanticVAE.from_pretrained(args.vae)
    dim = vae.config.latent_dim
    rate = Fraction(data.rate, vae.config.hop)
    facts = dict(vae=str(args.vae), vae_hash=vae.latents_hash(), dim=dim, hop=vae.config.hop, rate=str(rate))
    name = f"latents-{facts['vae_hash']}"
    known = data.meta.pop(name, None)
    if known and (args.out / f"{name}.bin").exists():
        if rank == 0:  # now the newest, and perhaps with another decoder
            write_json(args.out / "meta.json", data.meta | {name: known | dict(vae=facts["vae"])})
        return
    if vae.config.sample_rate != data.rate:
        raise InputError(f"{args.vae} works at {vae.config.sample_rate} Hz, {args.out} holds {data.rate} Hz")
    if not data.split("train"):
        raise InputError(f"{args.out} holds no training clips, for the latents' statistics")
    fold_weight_norm(vae).to(device)

    def make(clips):
        posteriors = [torch.stack(vae.encode(data.get("audio", i)[None].to(device)), dim=2)[0] for i in clips]
        return torch.cat(posteriors).half()  # [N, 2, D]

    array, offsets = fill(data, args.out, name, facts, (2, dim), make, rank, world)
    if rank > 0:
        return
    moments = np.zeros((2, dim))
    count = 0
    for i in data.split("train"):  # z = mean + ε · std has the moments E[mean] and E[mean² + std²]
        mean, logvar = array[offsets[i] : offsets[i + 1]].astype(np.float64).transpose(1, 0, 2)
        moments += (mean.sum(0), (mean**2 + np.exp(logvar)).sum(0))
        count += len(mean)
    mean, square = moments / count
    std = np.sqrt(square - mean**2)
    if not np.isfinite(std).all():
        raise InputError(f"the latents of {args.vae} are not finite: train it again")
    constant = np.flatnonzero(std < 1e-4)
    if len(constant):
        print(f"latent channels {constant.tolist()} of {args.vae} never change: they are not scaled")
        std[constant] = 1
    finish(args.out, name, array, facts | dict(mean=mean.tolist(), std=std.tolist()))


# ======================================================================================================================
# You can stop here. Below: where clips come from, passes that survive a kill, and what the other scripts share with
# this one: flags, ranks, locks, signals, and the folder of a training run.

# ----------------------------------------------------------------------------------------------------------------------
# Sources: each layout yields (id, path, speaker, text, split), with split "" where the source does not say.

ALIASES = dict.fromkeys(["audio_file", "file", "file_name", "filename", "path"], "audio")
ALIASES |= dict.fromkeys(["sentence", "transcript", "transcription"], "text")
ALIASES |= dict.fromkeys(["client_id", "speaker_id", "speaker_name"], "speaker")
CONVERT = ("awk -F'|' 'BEGIN {print \"audio|speaker|text\"} {print \"wavs/\" $1 \".wav|\" $3 \"|\" $2}' FILE > "
           "manifest.csv, with your separator after -F and your columns' numbers")


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) of all that are not blank. Only line feeds end them: str.splitlines() would cut texts in two."""
    lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    return [(n, line) for n, line in enumerate(lines, 1) if line.strip()]


def columns(line: str, mark: str) -> list[str]:
    """The values of a line. With commas as csv has it; otherwise quotes are the text's, if they are not doubled."""
    if mark == "," or '""' in line:
        return next(csv.reader([line.replace("\r", " ")], delimiter=mark, strict=True))
    return line.split(mark)


def from_manifest(path: Path):
    """audio|speaker|text with a header, and perhaps split (train, valid, or test: never trained on); paths are relative
    to it. Also with tabs or commas, and with others' ALIASES. Without speakers each clip is a voice of its own."""
    (_, header), *rows = read_lines(path) or [(1, "")]
    tables = [(mark, [ALIASES.get(name, name) for name in columns(header, mark)]) for mark in "|\t,"]
    mark, names = next((table for table in tables if {"audio", "text"} <= set(table[1])), ("", []))
    if not mark:
        raise InputError(f"{path} has no columns audio and text: its first line is {header!r}, expected "
                         f"audio|speaker|text. To convert it: {CONVERT}")
    if len(set(names)) < len(names):
        raise InputError(f"{path} has two columns of one meaning: its first line is {header!r}")
    for n, line in rows:
        try:
            values = columns(line, mark)
        except csv.Error as e:
            raise InputError(f"{path}, line {n}: {e}") from e
        if len(values) != len(names):
            raise InputError(f"{path}, line {n}: found {len(values)} columns, expected {len(names)}")
        row = {name: value.strip() for name, value in zip(names, values)}
        if row.get("split", "") not in ("", "train", "valid", "test"):
            raise InputError(f"{path}, line {n}: split is {row['split']!r}, expected train, valid or test")
        name = row["audio"]
        yield name, path.parent / name, row.get("speaker") or name, row["text"], row.get("split", "")


def below(root: Path, pattern: str):
    """Paths that match, also in folders that are links."""
    return (root / name for name in glob.iglob(pattern, root_dir=root, recursive=True))


def from_libritts(root: Path):
    """speaker/chapter/NAME.wav beside NAME.normalized.txt."""
    for path in below(root, "**/*.normalized.txt"):
        wave = path.with_name(path.name.replace(".normalized.txt", ".wav"))
        yield str(wave.relative_to(root)), wave, wave.name.split("_")[0], path.read_text(encoding="utf-8-sig"), ""


def from_librispeech(root: Path):
    """speaker/chapter/NAME.flac, with all texts of a chapter in one .trans.txt."""
    for path in below(root, "**/*.trans.txt"):
        for _, line in read_lines(path):
            name, _, text = line.partition(" ")
            wave = path.with_name(f"{name}.flac")
            yield str(wave.relative_to(root)), wave, name.split("-")[0], text, ""


def from_vctk(root: Path):
    """txt/SPEAKER/NAME.txt, and wav48_silence_trimmed/SPEAKER/NAME_mic1.flac or wav48/SPEAKER/NAME.wav."""
    for path in below(root, "txt/*/*.txt"):
        speaker = path.parent.name
        wave = root / "wav48_silence_trimmed" / speaker / f"{path.stem}_mic1.flac"
        if not wave.exists():
            wave = root / "wav48" / speaker / f"{path.stem}.wav"
        yield str(wave.relative_to(root)), wave, speaker, path.read_text(encoding="utf-8-sig"), ""


def from_ljspeech(root: Path):
    """metadata.csv (name|text, or name|text|normalised text) and wavs/NAME.wav; or, by that name, a manifest."""
    rows = [line.split("|") for _, line in read_lines(root / "metadata.csv")]
    full = [row for row in rows if len(row) == 3 and row[2].strip()]
    same = [set(normalize_text(a, "plain").split()) & set(normalize_text(b, "plain").split()) for _, a, b in full]
    unlike = sum(map(bool, same)) < len(full) / 2  # the third column is not the second's text
    if any(len(row) not in (2, 3) for row in rows) or unlike or {"audio", *ALIASES} & set(*rows[:1]):
        yield from from_manifest(root / "metadata.csv")  # which refuses it if it has no header
    else:
        for name, *texts in rows:
            yield f"wavs/{name}.wav", root / "wavs" / f"{name}.wav", "LJ", texts[-1].strip() or texts[0], ""


LAYOUTS = {  # a path that only this layout has: its reader
    "manifest.csv": lambda root: from_manifest(root / "manifest.csv"),
    "**/*.normalized.txt": from_libritts,
    "**/*.trans.txt": from_librispeech,
    "txt/*/*.txt": from_vctk,
    "metadata.csv": from_ljspeech,
}


def list_clips(source: Path, alone: bool = True) -> list[tuple]:
    """All clips of a manifest or folder, sorted by id. Beside other sources, ids and unnamed voices get its name."""
    if not source.exists():
        raise InputError(f"no such file or folder: {source}")
    found = [pattern for pattern in LAYOUTS if next(below(source, pattern), None)]
    if not found and not source.is_file():
        raise InputError(f"no speech found in {source} (looked for {', '.join(LAYOUTS)})")
    if len(found) > 1 and found[0] != "manifest.csv":
        raise InputError(f"{source} holds several corpora ({', '.join(found)}): name the folder of each")
    read = from_manifest if source.is_file() else LAYOUTS[found[0]]
    try:
        clips = sorted(read(source))
        "".join(name + speaker for name, _, speaker, _, _ in clips).encode()
    except (OSError, UnicodeError, csv.Error) as e:
        raise InputError(f"cannot read the transcripts of {source}: {e}") from e
    if not clips:
        raise InputError(f"{source} lists no clips")
    for name, _, speaker, _, _ in clips:  # which the index could not hold
        if set("\t\0") & set(name + speaker) or len(f"{name}.{speaker}.".splitlines()) > 1:
            raise InputError(f"{source}: {name!r} by {speaker!r} has a tab, a line break or a null byte in its name")
    mark = "" if alone else f"{source}:"
    return [(mark + name, path, (mark if who in ("LJ", name) else "") + who, *rest) for name, path, who, *rest in clips]


def download(subsets: str, root: Path = Path("downloads")) -> list[Path]:
    """Fetch LibriTTS subsets, or LibriSpeech's as librispeech:NAME, through torchaudio; returns their folders."""
    folders = []
    partial = root / WORK
    held = lock(partial)  # until this function ends
    datasets = dict(libritts="LibriTTS", librispeech="LibriSpeech")
    for name in subsets.split(","):
        corpus, _, subset = name.rpartition(":")
        if corpus not in ("", *datasets):
            raise InputError(f"cannot download {name}: expected {' or '.join(datasets)} before the colon")
        inside = datasets[corpus or "libritts"]
        folder = root / inside / subset
        if not folder.is_dir():
            shutil.rmtree(partial / inside / subset, ignore_errors=True)  # torchaudio would take half for the whole
            try:
                getattr(torchaudio.datasets, inside.upper())(partial, url=subset, download=True)
            except Exception as e:  # torchaudio raises what urllib, tarfile and its own checks raise
                raise InputError(f"cannot download {name}: {e}") from e
            folder.parent.mkdir(exist_ok=True)
            os.replace(partial / inside / subset, folder)
            (partial / f"{subset}.tar.gz").unlink(missing_ok=True)
        folders.append(folder)
    return folders


# ----------------------------------------------------------------------------------------------------------------------
# Passes over all clips, chunk by chunk: a chunk is the unit of sharing between ranks and of resuming.

CHUNK = 128  # clips
WORK = ".prepare"  # scratch space in --out, removed in the end: a name that no folder of the user's has


def each_chunk(out: Path, name: str, count: int, do, rank: int, world: int) -> list:
    """do(range of clips) for this rank's chunks that are not marked as done. Returns all chunks' results, to rank 0."""
    marks = [out / WORK / f"{name}-{k}" for k in range(math.ceil(count / CHUNK))]
    todo = [k for k in range(rank, len(marks), world) if not marks[k].exists()]
    pace = 1 if sys.stderr.isatty() else 60  # seconds between two updates of the bar: in a file, each is a line
    for k in tqdm(todo, desc=name, unit="chunk", disable=rank > 0, mininterval=pace):
        write_text(marks[k], json.dumps(do(range(count)[k * CHUNK : (k + 1) * CHUNK])))
    barrier()
    return [json.loads(mark.read_text(encoding="utf-8")) for mark in marks] if rank == 0 else []


def read_clip(clip, args) -> tuple[bytes, str, int]:
    """(int16 samples, "", rate of the recording) of a clip that is fit for training, else (none, why it is not, 0)."""
    _, path, _, text, _ = clip
    try:
        wave = read_audio(path, args.sample_rate)
    except InputError as e:
        return b"", str(e).removeprefix(f"cannot read {path}: "), 0
    checks = {
        "empty text": not any(map(str.isalnum, normalize_text(text, args.text))),
        "non-finite samples": not np.isfinite(wave).all(),
        f"shorter than {args.min_seconds} s": len(wave) < args.min_seconds * args.sample_rate,
        f"longer than {args.max_seconds} s": len(wave) > args.max_seconds * args.sample_rate,
        "silent": not loudness(wave, args.sample_rate)[1],
    }
    for why, found in checks.items():
        if found:
            return b"", why, 0
    wave = wave / max(1, np.abs(wave).max())
    return (wave * 32767).round().astype(np.int16).tobytes(), "", sf.info(path).samplerate


def fill_audio(clips, args, rank: int, world: int) -> None:
    """Read every clip; then write audio.bin, dropped.tsv, index.tsv and the first meta.json."""
    out = args.out

    def read(part):
        found = list(pool.map(lambda i: read_clip(clips[i], args), part))
        audio = b"".join(samples for samples, _, _ in found)
        write_atomic(out / WORK / f"{part.start}.audio", lambda p: p.write_bytes(audio))
        return [(len(samples) // 2, why, rate) for samples, why, rate in found]

    def join(path):
        with open(path, "wb") as f:
            for start in range(0, len(clips), CHUNK):
                f.write((out / WORK / f"{start}.audio").read_bytes())

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        verdicts = [verdict for part in each_chunk(out, "audio", len(clips), read, rank, world) for verdict in part]
    if rank > 0:
        return
    kept = [(*clip, samples) for clip, (samples, _, _) in zip(clips, verdicts) if samples]
    dropped = [(clip[0], why) for clip, (_, why, _) in zip(clips, verdicts) if why]
    low = Counter(rate for samples, _, rate in verdicts if samples and rate < args.sample_rate)
    for rate, count in sorted(low.items()):
        print(f"{count} clips were recorded at {rate} Hz: nothing above {rate // 2} Hz is in them")
    write_text(out / "dropped.tsv", "".join(f"{name}\t{why}\n" for name, why in dropped))
    if not kept:
        shutil.rmtree(out / WORK)  # mended, also by other settings, they are looked at again
        raise InputError(f"all {len(clips)} clips were dropped (see {out / 'dropped.tsv'}), the first: {dropped[0][1]}")
    if not any(split for *_, split, _ in kept):  # the hundredth of the clips whose names hash lowest is for validation
        order = sorted(range(len(kept)), key=lambda i: zlib.crc32(kept[i][0].encode()))
        chosen = set(order[: max(1, round(len(kept) / 100))] if len(kept) > 1 else [])
        kept = [(*clip[:4], "valid" if i in chosen else "train", clip[5]) for i, clip in enumerate(kept)]
    index = ["id\tsplit\tspeaker\tsamples\ttext\n"]
    for name, _, speaker, text, split, samples in kept:
        index.append(f"{name}\t{split or 'train'}\t{speaker}\t{samples}\t{normalize_text(text, args.text)}\n")
    write_text(out / "index.tsv", "".join(index))
    write_atomic(out / "audio.bin", join)
    total = sum(samples for *_, samples in kept)
    hours = round(total / args.sample_rate / 3600, 4)
    meta = dict(sample_rate=args.sample_rate, text=args.text, teacher=args.ssl, layer=args.layer, aligner=args.aligner)
    meta |= dict(sources=[str(source) for source in args.source], clips=len(kept), hours=hours)
    meta |= dict(speakers=len({speaker for _, _, speaker, *_ in kept}))
    write_json(out / "meta.json", meta | dict(audio=dict(shape=[total], dtype="int16", rate=args.sample_rate)))


def fill(data: Data, out: Path, name: str, facts: dict, width: tuple, make, rank: int, world: int, dtype="float16"):
    """The array `name` [rows, *width] as a file that is filled in place: make(clips) gives the rows of these clips.
    Returns it (to rank 0) and its offsets.

    Every rank writes its chunks into the one file; what another pass, model or VAE left unfinished is removed. Written,
    not mapped: a full disk would kill a process that writes through a map."""
    offsets = data.offsets_at(facts["rate"])
    path = out / WORK / f"{zlib.crc32(json.dumps(facts).encode())}.bin"
    row_bytes = np.dtype(dtype).itemsize * math.prod(width)
    if rank == 0 and not path.exists():
        shutil.rmtree(out / WORK, ignore_errors=True)
        free = shutil.disk_usage(out).free
        needed = int(offsets[-1]) * row_bytes
        if free < needed:
            raise InputError(f"{name} of {out} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left")
        write_atomic(path, lambda p: p.touch())
    barrier()

    def do(clips):
        rows = make(clips).cpu().numpy().astype(dtype, copy=False)
        try:
            with open(path, "rb+") as f:
                f.seek(int(offsets[clips.start]) * row_bytes)
                f.write(rows.tobytes())
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise InputError(f"cannot write {path}: {e}; what was there before is whole") from e

    each_chunk(out, name, len(data.clips), do, rank, world)
    shape = (int(offsets[-1]), *width)
    return (np.memmap(path, dtype, "r", shape=shape) if rank == 0 else None), offsets  # rank 0 moves it at once


def finish(out: Path, name: str, array: np.memmap, facts: dict) -> None:
    """Move the filled array to its place and enter it in meta.json as the newest; no entry ever names other rows."""
    meta = read_json(out / "meta.json")
    if meta.pop(name, None):
        write_json(out / "meta.json", meta)
    os.replace(array.filename, out / f"{name}.bin")
    write_json(out / "meta.json", meta | {name: facts | dict(shape=array.shape, dtype=array.dtype.name)})


def file_stamp(path: Path) -> tuple:
    """What changes with a file: its size and time; empty if it is missing."""
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ()


def differences(found: dict, wanted: dict) -> str:
    """What differs between two settings, in words."""
    differ = [f"{k}: {found.get(k)}, now {wanted.get(k)}" for k in found | wanted if found.get(k) != wanted.get(k)]
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    return "; ".join(differ[:3]) + more


def check_source(args, clips) -> None:
    """Refuse what would mix data, then note what the folder is made from."""
    settings = {name: getattr(args, name) for name in CHOICES} | dict(sources=list(map(str, args.source)))
    recordings = {name: [zlib.crc32(repr(texts).encode()), *file_stamp(path)] for name, path, *texts in clips}
    path = args.out / "settings.json"
    twice, count = Counter(os.path.realpath(clip[1]) for clip in clips).most_common(1)[0]
    if count > 1:
        raise InputError(f"{twice} is listed {count} times, perhaps for training and validation: list it once")
    names = ("meta.json", "index.tsv", "audio.bin", "dropped.tsv", "settings.json")
    foreign = [name for name in names if (args.out / name).exists()]
    if foreign and not (path.exists() and "recordings" in read_json(path)):
        raise InputError(f"{args.out} holds a {foreign[0]}, but no settings.json of ours: choose another --out")
    if (args.out / "meta.json").exists() or (args.out / WORK).exists():
        before = read_json(path)
        before |= before.pop("recordings", {})
        differ = differences(before, settings | recordings)
        if differ:
            raise InputError(f"{args.out} was made with other settings or recordings ({differ}): choose another "
                             "--out, or remove it")
    if int(os.environ.get("RANK", 0)) == 0:
        write_json(path, settings | dict(recordings=recordings))


def revision(name: str | Path, config=None) -> str:
    """Which weights: a hub model's revision, a hash of a local folder's or file's."""
    path = Path(name)
    if not path.exists():
        return config._commit_hash
    files = [path]
    if path.is_dir():  # .pt: a fine-tune of F5-TTS
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin")) or sorted(path.glob("*.pt"))
    return "sha256:" + hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


def from_hub(flag: str, name: str, *kinds: str) -> list:
    """What transformers' Auto classes of these kinds load, by hub id or folder; failing is an InputError."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # an unused CTC head is not worth a page of warning
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "Support for mismatched key_padding_mask")  # WavLM's masks: right all the same
    try:
        if str(name).startswith(LOCAL) and not Path(name).exists():
            raise OSError("no such folder")
        loaded = []
        for kind in kinds:
            auto = getattr(transformers, f"Auto{kind}")
            if kind.startswith("Model"):
                model, info = auto.from_pretrained(name, output_loading_info=True)
                missing = [key for key in info["missing_keys"] if not key.endswith("masked_spec_embed")]
                if missing:
                    raise ValueError(f"it is no {kind}, its weights lack {', '.join(sorted(missing)[:2])}")
                loaded.append(model)
            else:
                loaded.append(auto.from_pretrained(name))
        return loaded
    except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError, SafetensorError) as e:
        raise InputError(f"cannot load {flag} {name}: {str(e).splitlines()[0]}") from e


# ----------------------------------------------------------------------------------------------------------------------
# What all scripts share: flags, ranks, how a script ends, locks.


def at_least(least: float, kind=int, most: float = sys.maxsize):
    """What a flag may be, for add_argument(type=...): a number from `least` to `most`."""

    def number(text: str):
        if not least <= kind(text) <= most:  # nan is neither
            limit = f" and at most {most}" if most < sys.maxsize else ""
            raise argparse.ArgumentTypeError(f"must be at least {least}{limit}, found {text}")
        return kind(text)

    return number


def switch(value: bool) -> dict:
    """Options of a flag that is also there as --no-…."""
    return dict(action=argparse.BooleanOptionalAction, default=value)


NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
PREPARING = datetime.timedelta(hours=24)  # how long ranks wait for each other: here they meet once, at the end
TRAINING = datetime.timedelta(minutes=30)


def start_ranks(wanted: str | None = None, patience: datetime.timedelta = PREPARING):
    """(rank, world, device), joining the process group if torchrun started us: gloo for CPUs, NCCL for GPUs.

    wanted: "cpu" or "cuda" where only that will do. An NVIDIA GPU that cannot be used is an InputError: at a hundredth
    of the speed, a run would look as if all were well."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or wanted == "cpu"
    usable = torch.cuda.is_available()
    if wanted == "cuda" and not usable:
        raise InputError("--device cuda: torch finds no GPU that it can use")
    if not hidden and not usable and NVIDIA_DRIVER.exists():
        driver = NVIDIA_DRIVER.read_text(encoding="utf-8").splitlines()[0]
        raise InputError(f"torch {torch.__version__}, made for CUDA {torch.version.cuda} (13 needs driver 580), cannot "
                         f"use this machine's NVIDIA GPU; its driver: {driver}: update it, install torch from the "
                         "wheel index for its CUDA, or use the CPU with CUDA_VISIBLE_DEVICES= before the command "
                         "(trainings: --device cpu)")
    device = torch.device("cuda", local) if usable and not hidden else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"rank {local} has no GPU: found {torch.cuda.device_count()} here; lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length; flash attention does not
    torch.set_float32_matmul_precision("highest")  # what is not in bfloat16 is float32 in full: STFTs, losses, scores
    torch.backends.cudnn.allow_tf32 = False
    if sys.platform == "linux":  # loader processes share the mapped arrays; started afresh, each would get a copy
        multiprocessing.set_start_method("fork", force=True)
    if world > 1 and not dist.is_initialized():
        options = dict(backend="nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
        dist.init_process_group(**options, timeout=patience)
    return (dist.get_rank() if world > 1 else 0), world, device


def barrier():
    if dist.is_initialized():
        dist.barrier()


def has_bfloat16() -> bool:
    """Whether matrix products are faster in bfloat16: on GPUs and CPUs with instructions for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def unbroken(stream) -> None:
    """Let the reader of stdout or stderr go away (`| head`, a closed terminal): the work goes on, unseen."""
    write = stream.write

    def write_and_flush(text: str) -> None:
        try:
            write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    stream.write = write_and_flush


def leave(code: int) -> None:
    """End the process at once. Python's own way out has crashed in torch's libraries, after all was saved; and of a
    rank that failed, it would wait in NCCL for ranks that wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def cli(main) -> None:
    """Run main(). An InputError becomes one line and exit code 2; Ctrl-C and SIGTERM one line and 130 or 143."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter shows its number
    unbroken(sys.stdout)
    unbroken(sys.stderr)
    code = 0
    try:
        try:
            main()
        except SystemExit as e:  # --help; a training that was stopped, on all ranks after the same step
            code = e.code
        barrier()  # leave together: a rank that exits while gloo still holds its tensors may be aborted
        if dist.is_initialized():
            dist.destroy_process_group()
    except (InputError, OSError, torch.OutOfMemoryError) as e:  # OSError: a full disk, a folder of someone else's
        code = 2
        if int(os.environ.get("RANK", 0)):  # what all ranks find is said by the first; torchrun then ends the others
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        why = ""
        if isinstance(e, torch.OutOfMemoryError):
            why = ("the GPU is out of memory: lower --micro-batch (train_vae.py), --micro-seconds (train_tts.py), "
                   "--batch-seconds (prepare.py) or --batch-size (sample.py, evaluate.py): ")
        print(f"error: {why}{e}", file=sys.stderr)
    except KeyboardInterrupt as e:
        print("interrupted: run the command again, a training with --resume", file=sys.stderr)
        code = 128 + (e.args[0] if e.args else signal.SIGINT)
    except Exception:
        traceback.print_exc()
        code = 1
    leave(code)


def lock(folder: Path):
    """Refuse a folder that another process is writing to. The lock lasts as long as the returned file, or this process:
    its end, however sudden, frees it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")
        if not fcntl:
            raise OSError(errno.ENOSYS, "no file locks")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which a loader process would hold on to
        file.truncate(0)
        now = f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
        print(f"process {os.getpid()} on {platform.node()}, since {now}", file=file, flush=True)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise InputError(f"{folder} is in use by {owner}: wait for it, or choose another --out") from None
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # Windows; a cluster's file system
            raise InputError(f"cannot write in {folder}: {e}") from e
        print(f"this file system has no locks: start no second command that writes to {folder}")
    return file


# ----------------------------------------------------------------------------------------------------------------------
# What both trainings share: flags, the run folder, compilation, the update.


def in_demo(path):
    """A path into demo/ as it is now, if the checkout was moved since it was noted; any other value as it is."""
    if not isinstance(path, str) or "/demo/" not in path:
        return path
    moved = DEMO / path.rpartition("/demo/")[2]
    return str(moved) if moved.exists() and not Path(path).exists() else path


def read_args(parser: argparse.ArgumentParser, kind: str, argv, bf16: bool) -> argparse.Namespace:
    """The flags of a training, shared ones too. What is not given comes from the resumed run, else from the preset."""
    flag = parser.add_argument
    flag("--data", type=Path, default=Path("data/demo"), help="folder made by prepare.py (default %(default)s)")
    flag("--out", type=Path, default=Path(f"runs/{kind[6:]}"), help="run folder (default %(default)s)")
    flag("--preset", choices=list(PRESETS), help="sizes and settings; defaults shown are the paper's (demo data: demo)")
    flag("--resume", action="store_true", help="go on with the run in --out, with its settings but for flags given")
    flag("--init", help="start from the weights of this folder or hub id, to fine-tune them")
    flag("--steps", type=at_least(1), default=600_000, help="updates (default %(default)s)")
    flag("--ema", type=at_least(0, float, 1), default=0.9999, help="of the averaged weights (default %(default)s)")
    flag("--eval-every", type=at_least(1), default=5000, help="steps between checkpoints (default %(default)s)")
    flag("--keep", type=at_least(0), default=0, help="also keep the last so many checkpoints, as OUT/step0005000")
    flag("--log-every", type=at_least(1), default=100, help="steps between log lines (default %(default)s)")
    flag("--workers", type=at_least(0), default=4 if torch.cuda.is_available() else 0, help="loader processes a rank")
    flag("--bf16", **switch(bf16), help="matrix products in bfloat16 (default: where that is faster)")
    flag("--compile", **switch(torch.cuda.is_available()), help="torch.compile (default: on a GPU)")
    flag("--device", choices=["cpu", "cuda"], help="default: a GPU where there is one")
    flag("--seed", type=at_least(0), default=0, help="default %(default)s")
    known, _ = parser.parse_known_args(argv)
    files = ("args.json", "state.pt", "config.json", "model.safetensors", "log.csv")
    there = [name for name in files if (known.out / name).exists()]
    if known.resume:
        if there[:2] != ["args.json", "state.pt"]:
            raise InputError(f"{known.out} holds no run to resume (args.json and state.pt): begin it without --resume")
        saved = read_json(known.out / "args.json")
        for name in ("preset", "init"):
            if getattr(known, name) not in (None, saved.get(name)):
                raise InputError(f"--{name} is for the beginning of a run: with --resume, drop it")
        parser.set_defaults(**{name: in_demo(value) for name, value in saved.items()} | dict(out=known.out))
    else:
        if "state.pt" in there:
            raise InputError(f"{known.out} already holds a run: add --resume to go on with it, or choose another --out")
        if "model.safetensors" in there or there and not (known.out / ".lock").exists():
            raise InputError(f"{known.out} holds a {there[0]}, but no state.pt to go on from: choose another --out")
        if known.device == "cpu":
            parser.set_defaults(workers=0, bf16=False, compile=False)
        parser.set_defaults(**PRESETS[known.preset or "demo"][kind])
    return parser.parse_args(argv)


def check_run(args, data: Data, device, **facts) -> None:
    """Refuse what would waste hours. facts: what the run learns from, which a resumed run must find unchanged."""
    demo = all(Path(in_demo(source)).resolve() == DEMO / "corpus" for source in data.meta["sources"])
    if not args.preset and not demo:
        raise InputError(f"{args.data} is not the demo's: choose a --preset: {', '.join(PRESETS)}")
    args.preset = args.preset or "demo"
    if device.type == "cpu" and args.preset != "demo" and args.device != "cpu":
        raise InputError(f"--preset {args.preset} is made for GPUs, and none was found: --device cpu trains it, slowly")
    if args.steps <= getattr(args, "warmup", 0):
        raise InputError(f"--steps {args.steps} ends within the --warmup of {args.warmup} steps: change one of them")
    if not data.split("train") or not data.split("valid"):
        raise InputError(f"{args.data} holds {len(data.split('train'))} training and {len(data.split('valid'))} "
                         "validation clips, and both are needed: mark some as valid in its manifest's column split, "
                         "or drop that column, and prepare it anew")
    facts = dict(data=data.identity, normalisation=data.meta["text"]) | facts
    for name, value in facts.items():
        before = getattr(args, "facts", facts).get(name, value)
        if before != value:
            raise InputError(f"{args.out} learned with {name} {before}, {args.data} now has {value}: give the --data "
                             "of before, or begin anew in another --out")
    args.facts = facts


# What a stream of random numbers is for, before its seed: numpy pads seeds with zeros, so [s, 1] and [s, 1, 0] are one.
ORDER = 1
DRAWS = 2
STOPS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
MATRIX_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71}  # dense bfloat16


class Run:
    """A training's folder and the frame of its loop. It locks the folder, restores what --resume finds, yields the
    steps, and after each of them logs, saves and stops, in this order and on all ranks after the same step.

    Networks, batches, losses and updates are the script's."""

    def __init__(self, args, rank: int, world: int, device):
        self.args = args
        self.rank = rank
        self.world = world
        self.device = device
        self.held = lock(args.out) if rank == 0 else None
        self.group = dist.new_group(backend="gloo", timeout=TRAINING) if world > 1 else None  # CPUs agree on signals
        self.signal = 0
        for number in STOPS:
            if number != getattr(signal, "SIGHUP", 0) or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        """Note it: the step is finished and saved. A second Ctrl-C is at once; a second SIGTERM is not, since
        schedulers send it to torchrun and to the ranks alike."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt(number)
        self.signal = number

    def begin(self, ema, notes: dict, modules: dict, columns: list[str], flops: float, turn: int = 0) -> None:
        """ema and notes: what sampling needs; modules: what training goes on from; flops: of a forward pass over a
        second of audio; turn: one more step after which to evaluate and save."""
        args = self.args
        self.ema = ema
        self.notes = notes
        self.modules = modules | dict(ema=ema)
        self.columns = ["step", *columns, "skipped", "lr", "seconds", "audio", "memory", "mfu"]
        self.flops = flops
        self.turn = turn
        path = args.out / "state.pt"
        state = dict(step=0, kept={}, seconds=0.0)
        try:
            if args.resume:
                state = load_torch(path)
                for name, module in self.modules.items():
                    module.load_state_dict(state[name])
            self.first = int(state["step"])
            self.kept = dict(state["kept"])  # numbers that checkpoints keep
            self.seconds = float(state["seconds"])
        except Exception as e:  # torch raises many kinds for names, shapes and types that do not fit
            why = (str(e) or repr(e)).splitlines()[0]
            raise InputError(f"cannot resume from {path}: {why}; choose another --out to begin anew") from e
        if self.first > args.steps:
            raise InputError(f"{args.out} has made {self.first} steps, more than --steps {args.steps}: give more")
        self.means = {}
        self.scores = {}
        self.streak = torch.zeros((), device=self.device)  # updates skipped in a row, and the most of them
        self.longest = torch.zeros((), device=self.device)
        if self.rank > 0:
            return
        if self.first == args.steps:
            print(f"{args.out} has made all of its {args.steps} steps: to go on, give more with --steps")
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name != "resume"}
        write_json(args.out / "args.json", settings)
        log = args.out / "log.csv"
        rows = log.read_text("utf-8", "replace").split("\n")[1:-1] if self.first and log.exists() else []  # whole lines
        steps = [(row.partition(",")[0], row) for row in rows]
        rows = [row for step, row in steps if step.isdecimal() and int(step) <= self.first]  # others: lost in a crash
        write_text(log, "\n".join([",".join(self.columns), *rows, ""]))

    def steps(self):
        """Yield each step; `evaluating` says whether it ends with an evaluation, for which scripts call score()."""
        args = self.args
        self.start = time.time() - self.seconds
        self.pace_start = time.time()
        self.audio = 0.0  # seconds that were trained on since
        hidden = self.rank > 0 or None  # None: where there is no terminal
        steps = range(self.first, args.steps)
        self.bar = tqdm(steps, initial=self.first, total=args.steps, disable=hidden, desc=args.out.name)
        for step in self.bar:
            done = step + 1
            self.evaluating = done % args.eval_every == 0 or done in (args.steps, self.turn)
            yield step
            number = torch.tensor(self.signal)
            if self.group:
                dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
            saving = self.evaluating or number > 0
            if done == 1 or done % args.log_every == 0 or saving:
                self.log(done)
            if saving and self.rank == 0:
                self.save(done)
            if number > 0:
                self.bar.close()
                if self.rank == 0:
                    print(f"stopped at step {done}, which is saved: go on with --resume --out {args.out}")
                raise SystemExit(128 + int(number))

    def note(self, **values) -> None:
        """Scalars of this step: tensors, averaged over steps and ranks without a pause; numbers, logged as they are."""
        for name, value in values.items():
            if torch.is_tensor(value):
                self.means.setdefault(name, []).append(value.detach().float())
            else:
                self.scores[name] = value
        if "skipped" in values:
            self.streak = (self.streak + 1) * values["skipped"]
            self.longest = torch.maximum(self.longest, self.streak)

    def score(self, evaluate, *args) -> None:
        """Rank 0 logs the dict that evaluate(*args) returns. Its time does not count in the throughput."""
        begun = time.time()
        if self.rank == 0:
            self.scores |= evaluate(*args)
        self.pace_start += time.time() - begun

    def log(self, done: int) -> None:
        """One row in log.csv and on the screen. Five skipped updates in a row end the run before they are saved."""
        values = [torch.stack(v) for v in self.means.values()]
        means = torch.stack([v[v.isfinite()].mean() for v in values])  # "skipped" counts the others
        if self.world > 1:
            dist.all_reduce(means)
        row = dict(step=done) | dict(zip(self.means, (means / self.world).tolist())) | self.scores
        pace = self.audio / (time.time() - self.pace_start)
        row |= dict(seconds=round(time.time() - self.start, 1), audio=pace)
        if self.device.type == "cuda":
            row["memory"] = torch.cuda.max_memory_allocated() / 1e9
            name = torch.cuda.get_device_name(self.device)
            rate = [1e12 * rate for part, rate in MATRIX_TFLOPS.items() if part in name]
            if rate:  # backward costs two forward passes
                row["mfu"] = 3 * pace * self.flops / (rate[0] * self.world)
        if self.rank == 0:
            shown = {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in row.items()}
            with open(self.args.out / "log.csv", "a", encoding="utf-8") as f:
                f.write(",".join(shown.get(name, "") for name in self.columns) + "\n")
            tqdm.write("  ".join(f"{name} {value}" for name, value in shown.items()))
            self.bar.set_postfix(loss=shown["loss"])
        if self.longest >= 5:
            raise InputError(f"step {done}: five updates in a row were skipped, since their gradients were not "
                             "finite: lower --lr, or look for recordings that are not speech, then --resume")
        self.means = {}
        self.scores = {}
        self.longest.zero_()
        self.pace_start = time.time()
        self.audio = 0.0

    def save(self, done: int) -> None:
        """The averaged weights, which sampling needs, and state.pt. With --keep both also stay in OUT/step0005000, from
        where --resume --out OUT/step0005000 goes on."""
        args = self.args
        begun = time.time()
        keep = args.keep if self.evaluating else 0  # a signal's checkpoint replaces no other
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= dict(step=done, kept=self.kept, seconds=time.time() - self.start)
        folders = [args.out, args.out / f"step{done:07d}"] if keep else [args.out]
        for folder in folders:
            notes = self.notes | dict(step=done)
            vae = notes.get("vae", "")
            if folder != args.out and vae and (args.out / vae).is_dir():
                notes["vae"] = os.path.join("..", vae)
            self.ema.save_pretrained(folder, **notes)
            write_atomic(folder / "state.pt", lambda p: torch.save(state, p))
        for name in ("args.json", "log.csv") if keep else ():
            shutil.copyfile(args.out / name, folder / name)
        for old in sorted(args.out.glob("step" + 7 * "[0-9]"))[:-keep] if keep else ():
            shutil.rmtree(old, ignore_errors=True)
        self.pace_start += time.time() - begun


def ignore_signals(worker: int) -> None:
    """For loader processes: a signal to the whole process group must not kill them while the step is finished."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def load_batches(dataset, sampler, args, device, collate=None):
    """The batches of a sampler, loaded ahead by --workers processes."""
    options = dict(num_workers=args.workers, worker_init_fn=ignore_signals, pin_memory=device.type == "cuda")
    return iter(torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **options))


def moved(batch: dict, device) -> dict:
    """The batch's tensors on the device, copied while the CPU goes on."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def forward_flops(module: nn.Module, *example, **named) -> int:
    """Operations of one forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*example, **named)
    return counter.get_total_flops()


def compiled(module: nn.Module, wanted: bool, *example, parts=None, **named):
    """The module under torch.compile, tried on an example, forward and backward; itself, with a line that says why, if
    that fails. Parts that are named are compiled alone and for all shapes: alike, they share one graph, and training
    begins in seconds. They hold no convolutions: beside these, on a CPU, torch 2.11 keeps q, k and v for the backward
    pass in another order, with the first batch's strides for good."""
    if not wanted:
        return module
    torch._dynamo.config.optimize_ddp = False  # it would split graphs by DDP's buckets, and cannot for dynamic shapes
    torch.fx.experimental._config.use_duck_shape = False  # sizes that agree in one batch may differ in the next
    begun = time.time()
    first = int(os.environ.get("RANK", 0)) == 0
    if first:
        tqdm.write("compiling: the first step waits for it")
    try:
        fast = module if parts else torch.compile(module, dynamic=False)
        for part in parts or ():
            part.compile(dynamic=True)
        outputs = [y for y in tree_leaves(fast(*example, **named)) if torch.is_tensor(y) and y.requires_grad]
        torch.autograd.backward([y.sum() for y in outputs])
        if first:
            tqdm.write(f"compiled in {time.time() - begun:.0f} s")
        return fast
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # whatever the compiler raises, training can go on without it
        why = f"{type(e).__name__}: {str(e).splitlines()[0][:120]}"
        tqdm.write(f"torch.compile cannot run here ({why}): training goes on eagerly")
        for part in parts or ():
            part._compiled_call_impl = None
        return module
    finally:
        module.zero_grad()


def one_sum(module: nn.Module, last: bool):
    """Ranks sum their gradients once a step: in its last micro-batch."""
    return contextlib.nullcontext() if last or not hasattr(module, "no_sync") else module.no_sync()


def distributed(module: nn.Module, world: int):
    """The module with its gradients averaged over the ranks."""
    if world == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True, broadcast_buffers=False)


def clipped_step(optimizer: torch.optim.Optimizer, parameters, max_norm: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One update; skipped if the gradients' norm is not finite, without the CPU waiting for the device. Returns the
    norm before clipping, and 1 if it was skipped."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.found_inf = (~norm.isfinite()).float()  # as torch's GradScaler: the fused step does nothing where it is 1
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, optimizer.found_inf


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """ema ← d · ema + (1 − d) · model, with d rising from 0 to `decay`: short runs forget their start."""
    decay = min(decay, step / (10 + step))
    learned = [(e, p) for e, p in zip(ema.parameters(), model.parameters()) if p.requires_grad]
    averages, weights = map(list, zip(*learned))  # averaging a frozen -0 would make it 0, and the hash another
    torch._foreach_lerp_(averages, weights, 1 - decay)


# ----------------------------------------------------------------------------------------------------------------------

CHOICES = ("sample_rate", "text", "min_seconds", "max_seconds")  # flags by which clips are chosen and kept


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("source", type=Path, nargs="*", help="folders in LibriTTS, LibriSpeech, VCTK or LJSpeech layout, or manifests")
    flag("--out", type=Path, default=Path("data/demo"), help="the data folder to make or add to (default %(default)s)")
    flag("--download", help="LibriTTS subsets to fetch first (dev-clean,…), LibriSpeech's as librispeech:test-clean")
    flag("--ssl", help="teacher: hub id or folder of a speech encoder, or none (demo corpus: the demo's)")
    flag("--layer", type=int, help="the teacher's hidden state to store (default: the last)")
    flag("--aligner", help="CTC recogniser that finds where each letter is said (demo corpus: the demo's)")
    flag("--vae", help="add the latents of this VAE: a run, the authors' release, or a hub id")
    flag("--text", choices=["plain", "raw"], help="plain: lower case, no punctuation (default raw; demo: plain)")
    flag("--sample-rate", type=at_least(1000), default=16000, help="of the stored audio, in Hz (default %(default)s)")
    flag("--min-seconds", type=at_least(0.1, float), default=0.5, help="drop shorter clips (default %(default)s)")
    flag("--max-seconds", type=at_least(0.1, float), default=30, help="drop longer clips (default %(default)s)")
    flag("--batch-seconds", type=at_least(0.1, float), default=60, help="audio in a batch of teacher or aligner")
    args = parser.parse_args(argv)
    given = [name for name in CHOICES if getattr(args, name) != parser.get_default(name)]
    if args.source or args.download:
        if not args.ssl:
            raise InputError("name the teacher with --ssl: microsoft/wavlm-large in the paper; none for a vanilla VAE")
        if args.ssl == "none" and args.layer is not None:
            raise InputError("--layer names a hidden state of the teacher, and --ssl none names no teacher: drop it")
        args.text = args.text or "raw"
    elif given:
        raise InputError(f"--{given[0].replace('_', '-')} says how sources are read: name a folder or a manifest")
    elif not (args.out / "meta.json").exists():
        if args.ssl or args.layer or args.aligner or args.vae:
            raise InputError(f"{args.out} holds no data to add to, and no source is given: name the right --out, or a "
                             f"folder or manifest (the demo's: {DEMO / 'corpus'})")
        args.source = [DEMO / "corpus"]
        args.ssl = str(DEMO / "ssl")
        args.aligner = str(DEMO / "ssl")
        args.text = "plain"
    return args


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_ranks()
    out = args.out
    held = lock(out) if rank == 0 else None
    if args.download:  # the first rank fetches; others find it, or fetch it to their own node's disk
        for turn in range(world):
            if turn == rank:
                args.source += download(args.download)
            barrier()
    if args.source:
        clips = [clip for source in args.source for clip in list_clips(source, alone=len(args.source) == 1)]
        check_source(args, clips)
        if not (out / "meta.json").exists():
            if args.ssl != "none":  # each model is looked for now, not after hours of reading
                SSLModel(args.ssl, -1 if args.layer is None else args.layer, device, args.sample_rate)
            if args.aligner:
                Aligner(args.aligner, args.sample_rate, device)
            if args.vae:
                SemanticVAE.from_pretrained(args.vae)
            unnamed = sum(clip[0] == clip[2] for clip in clips)
            if rank == 0 and unnamed:
                print(f"{unnamed} clips name no speaker: each counts as a voice of its own")
            fill_audio(clips, args, rank, world)
            barrier()
    meta = read_json(out / "meta.json")
    if not args.ssl:  # the folder is added to: with what it was begun with
        begun = meta.get("ssl") or dict(model=meta["teacher"], layer=meta["layer"])
        args.ssl = begun["model"]
        args.layer = begun["layer"] if args.layer is None else args.layer
    if "starts" not in meta:
        args.aligner = args.aligner or in_demo(meta.get("aligner"))
    if args.ssl != "none":
        args.layer = -1 if args.layer is None else args.layer
        fill_ssl(args, rank, world, device)
    elif args.layer is not None:
        raise InputError(f"{out} was begun with --ssl none, which has no --layer: drop it")
    if args.aligner:
        fill_starts(args, rank, world, device)
    if args.vae:
        fill_latents(args, rank, world, device)
    if rank == 0:
        shutil.rmtree(out / WORK, ignore_errors=True)
        meta = read_json(out / "meta.json")
        dropped = [line.split("\t") for _, line in read_lines(out / "dropped.tsv")]
        for name, why in dropped[:20]:
            print(f"dropped {name}: {why}")
        for why, count in sorted(Counter(why for _, why in dropped).items()):
            print(f"dropped {count}: {why} (all listed in {out / 'dropped.tsv'})")
        has = ", ".join(f"{name} {entry['shape']}" for name, entry in meta.items() if isinstance(entry, dict))
        print(f"{out}: {meta['clips']} clips, {meta['hours']:.2f} hours, {meta['speakers']} speakers; {has}")


if __name__ == "__main__":
    cli(main)
