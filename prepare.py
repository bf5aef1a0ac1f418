"""Turn a folder of speech into one data folder: audio, SSL features and latents as flat memory-mapped arrays.

    python prepare.py                                                      # the demo corpus and its tiny teacher
    python prepare.py --vae runs/vae                                       # add the latents of a trained VAE, for stage 2
    python prepare.py LibriTTS/ --out data/libritts --ssl microsoft/wavlm-large
    torchrun --nproc_per_node 8 prepare.py ...                             # shares the clips between 8 GPUs

The data folder, whose clips stand in every array in the order of the index:
    index.tsv    one line a clip: id, split, speaker, samples, text
    audio.bin    int16   [samples of all clips]
    ssl.bin      float16 [SSL frames of all clips, width]
    starts.bin   float32 [bytes of all texts]: the second at which each byte begins; nan in clips that could not be aligned
    latents-HASH.bin  float16 [latent frames of all clips, 2, latent_dim]: mean and log-variance, by the VAE with this latents_hash()
    meta.json    sample rate, teacher, VAEs, counts, hours, the latents' statistics
    settings.json what the folder was made with, and of which texts and recordings: others are refused
    dropped.tsv  every clip that was left out, with its reason

Killed at any moment and run again, it continues and ends with the same bytes.
"""

import argparse
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
import shutil
import signal
import sys
import time
import traceback
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torch.distributed as dist
import torchaudio
from tqdm import tqdm

from model import HERE, InputError, LogMel, SemanticVAE, fold_weight_norm, read_json, write_atomic, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DEMO = Path(__file__).resolve().parent / "demo"
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
PATIENCE = datetime.timedelta(hours=24)  # of ranks that share out clips: they meet once, at the end of a long job
WORK = ".prepare"  # scratch space in --out, removed in the end: a name that no folder of the user's has
FORMATS = {".wav": ("WAV", "PCM_16"), ".flac": ("FLAC", "PCM_16"), ".ogg": ("OGG", "VORBIS"), ".opus": ("OGG", "OPUS"), ".mp3": ("MP3", None)}


# --------------------------------------------------------------------------------------------------------------
# What every script shares: how it starts, and how it ends when the user's input is at fault.


def start_ranks(wanted: str | None = None, patience: datetime.timedelta = PATIENCE):
    """(rank, world, device), joining the process group if torchrun started us. CPU ranks talk by gloo, GPUs by NCCL.

    wanted: "cpu" where a GPU shall not be used, "cuda" where one must. An NVIDIA GPU that is there and cannot be used, or is missing for a rank, is an
    InputError: at a hundredth of the speed, a run would look as if all were well. patience: how long a rank waits for the others."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU that it can use")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == "" or wanted == "cpu"
    if not hidden and not torch.cuda.is_available() and NVIDIA_DRIVER.exists():
        driver = NVIDIA_DRIVER.read_text(encoding="utf-8").splitlines()[0]
        raise InputError(f"this machine has an NVIDIA GPU that torch {torch.__version__} cannot use; its CUDA {torch.version.cuda} needs driver 580 or later, "
                         f"found: {driver}: update it, install torch from a wheel index for an older CUDA, or use the CPU with "
                         "CUDA_VISIBLE_DEVICES= before the command (trainings: --device cpu)")  # fmt: skip
    device = torch.device("cpu") if hidden or not torch.cuda.is_available() else torch.device("cuda", local)
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"rank {local} of this machine has no GPU: found {torch.cuda.device_count()}; lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every batch size and length; flash attention does not
    torch.set_float32_matmul_precision("highest")  # what is not in bfloat16 is float32 in full: STFTs, losses, scores
    if sys.platform == "linux":  # loaders' processes share the mapped arrays; started afresh, as Python 3.14 has it, each would get a copy
        multiprocessing.set_start_method("fork", force=True)
    if world > 1 and not dist.is_initialized():
        options = dict(backend="nccl", device_id=device) if device.type == "cuda" else dict(backend="gloo")
        dist.init_process_group(**options, timeout=patience)
    return (dist.get_rank() if world > 1 else 0), world, device


def has_bfloat16() -> bool:
    """Whether matrix products are faster in bfloat16 than in float32: on GPUs, and on CPUs with instructions for it. Others would emulate it."""
    able = torch.cpu.get_capabilities()
    return torch.cuda.is_available() or bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def at_least(least: float, kind=int, most: float = sys.maxsize):
    """What a flag may be, for add_argument(type=...): a number from `least` to `most`."""

    def number(text: str):
        if not least <= kind(text) <= most:  # nan is neither
            raise argparse.ArgumentTypeError(f"must be at least {least}{f' and at most {most}' * (most < sys.maxsize)}, found {text}")
        return kind(text)

    return number


def barrier():
    if dist.is_initialized():
        dist.barrier()


class Unbroken:
    """stdout or stderr whose reader may go away (`| head`, a closed terminal): nothing is shown from then on, and the work goes on."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def flush(self) -> None:
        self.write("")


def cli(main) -> None:
    """Run main(); an InputError becomes one line and exit code 2, Ctrl-C and SIGTERM one line and 130 and 143. A rank that fails ends at once,
    and torchrun the others: to leave the process group in order, NCCL would wait for ranks that wait for this one."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, interrupt)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter shows its number
    sys.stdout, sys.stderr = Unbroken(sys.stdout), Unbroken(sys.stderr)
    try:
        try:
            main()
            code = 0
        except SystemExit as e:  # --help; a training that was stopped, on all ranks after the same step
            code = e.code
        barrier()  # leave together: a rank that exits while Gloo still holds its tensors may be aborted
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(code)
    except (InputError, torch.OutOfMemoryError) as e:
        code = 2
        flags = "--micro-batch (train_vae.py), --micro-seconds (train_tts.py), --batch-seconds (prepare.py) or --batch-size (sample.py, evaluate.py)"
        message = f"error: {'' if isinstance(e, InputError) else f'the GPU is out of memory: lower {flags}: '}{e}"
        if int(os.environ.get("RANK", 0)):  # what all ranks find is said once, by the first; then torchrun ends the others as they wait
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        print(message, file=sys.stderr)
    except KeyboardInterrupt as e:
        print("interrupted: run the command again, a training with --resume", file=sys.stderr)
        code = 128 + (e.args[0] if e.args else signal.SIGINT)
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code) if dist.is_initialized() else sys.exit(code)


def in_demo(path):
    """A path into demo/ that was noted before the checkout was moved, as it is now; else as it is."""
    moved = DEMO / str(path).rpartition("/demo/")[2]
    return str(moved) if "/demo/" in str(path) and not Path(path).exists() and moved.exists() else path


def lock(folder: Path):
    """Refuse a folder that another process is writing to. The lock lasts as long as what is returned, or this process: its end, however
    sudden, frees it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")
        try:
            if not fcntl:
                raise OSError(errno.ENOSYS, "no file locks")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which a loader's process would hold on to
        except OSError as e:  # Windows; a network's or cluster's file system
            if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print(f"this file system has no locks: start no second command that writes to {folder}")
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}, since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}", file=file, flush=True)
        return file
    except BlockingIOError:
        file.seek(0)
        raise InputError(f"{folder} is in use by {file.read().strip() or 'another process'}: wait for it, or choose another --out") from None
    except OSError as e:
        raise InputError(f"cannot write in {folder}: {e}") from e


# --------------------------------------------------------------------------------------------------------------
# Text, audio and time.


def normalize_text(text: str, mode: str) -> str:
    """NFC, straight apostrophes, single spaces; "plain" also lower-cases and removes punctuation (all but apostrophes inside words).

    Used here and by sample.py with the mode kept in the checkpoint, so that a model is asked only what it was taught."""
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        raise InputError(f"not UTF-8: {text!r}")
    text = unicodedata.normalize("NFC", text).replace("’", "'")
    if mode == "plain":
        text = "".join(c if unicodedata.category(c)[0] in "LMN" or c == "'" else " " for c in text.lower())
        text = " ".join(w.strip("'") for w in text.split())
    return " ".join(text.split())


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, line) of all that are not blank, ended by line feeds alone: str.splitlines() would cut texts at what only looks like one."""
    lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    return [(n, line) for n, line in enumerate(lines, 1) if line.strip()]


def file_stamp(path: Path) -> tuple:
    """What changes with a file: its size and time; empty, if it is missing."""
    return (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ()


def read_audio(path: str | Path, rate: int) -> np.ndarray:
    """Any file soundfile reads → mono float32 [T] at `rate`. Raises InputError if it cannot be read or is empty."""
    blocks = []
    try:
        with sf.SoundFile(path) as f:
            source_rate = f.samplerate
            while len(block := f.read(1 << 20, dtype="float32", always_2d=True)):  # as much as there is, not as the header says
                blocks.append(block.mean(1))
    except (sf.SoundFileError, OSError, TypeError, ValueError) as e:  # TypeError: a file without a header
        others = [f" (but one that ends in {suffix})" for suffix in FORMATS if os.path.isfile(os.path.splitext(path)[0] + suffix)]
        why = f"no such file{''.join(others[:1])}"
        if os.path.isfile(path):
            why = f"{getattr(e, 'error_string', e)} (wav, flac, ogg, opus and mp3 can be read; others after ffmpeg -i FILE FILE.wav)"
        raise InputError(f"cannot read {path}: {why}") from e
    if not blocks:
        raise InputError(f"cannot read {path}: it holds no samples")
    wave = np.concatenate(blocks)
    if 4 < np.abs(wave).max() < math.inf:
        raise InputError(f"cannot read {path}: its samples are not within -1 and 1: divide them by their full scale")
    if source_rate * rate / math.gcd(source_rate, rate) ** 2 > 1 << 26:  # its filters would fill the memory
        raise InputError(f"cannot read {path}: {source_rate} Hz has too little in common with {rate} Hz: resample it first")
    return resample(wave, source_rate, rate)


def loudness(wave: np.ndarray, rate: int) -> tuple[np.ndarray, float]:
    """(RMS of each 20 ms of a wave [T] without its mean, what five of them reach; 0: nothing is heard). Speech lasts so long, a click does not."""
    frames = (wave - wave.mean())[: len(wave) // (rate // 50) * (rate // 50)].reshape(-1, rate // 50)
    levels = np.sqrt(np.square(frames).mean(1))
    loudest = np.sort(levels)[-5:].min(initial=1)
    return levels, float(loudest) if len(levels) and loudest > 2e-4 else 0.0


def resample(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """[T] at `rate` → [T · wanted / rate]; as it is, where the rates agree."""
    return torchaudio.functional.resample(torch.from_numpy(wave), rate, wanted).numpy()


def write_wave(path: Path, wave: np.ndarray, rate: int) -> None:
    container, subtype = FORMATS[path.suffix.lower()]
    write_atomic(path, lambda p: sf.write(p, wave, rate, format=container, subtype=subtype))


def frame_count(samples, sample_rate: int, frame_rate):
    """Frames that `samples` fill at `frame_rate` a second, the last one perhaps in part: the one rule for all arrays.

    Latents have sample_rate / hop frames a second. SSL models make a frame or so less than this, since their front end
    does not pad; their last frame is then repeated. Frame i of any array thus starts at i / frame_rate seconds."""
    ratio = Fraction(frame_rate) / Fraction(sample_rate)
    return -(-samples * ratio.numerator // ratio.denominator)  # rounded up


def repeat_last(features: torch.Tensor, count: int) -> torch.Tensor:
    """Features [S, D] with S <= count → [count, D]."""
    return torch.cat([features, features[-1:].expand(count - len(features), -1)])


class Data:
    """A prepared folder, memory-mapped. Raises InputError if it is missing, incomplete or does not fit what is asked."""

    def __init__(self, folder: str | Path, need: tuple[str, ...] = ("audio",), vae_hash: str = ""):
        """need: the arrays to open. Of "latents" there may be several: those of the VAE with this latents_hash(), or else the newest."""
        self.folder = Path(folder)
        if not (self.folder / "meta.json").exists():
            raise InputError(f"{folder} is not a prepared data folder (no meta.json): run python prepare.py --out {folder} first, or name the folder with --data")
        self.meta = read_json(self.folder / "meta.json")
        files = {name: name for name in need}
        latents = [name for name in self.meta if name.startswith(f"latents-{vae_hash}")]
        if latents and "latents" in need:
            files["latents"] = latents[-1]
            self.meta["latents"] = self.meta[latents[-1]]
        for name in need:
            if name not in self.meta:
                remedy = {"ssl": "--ssl MODEL", "latents": "--vae RUN", "starts": "--aligner MODEL"}.get(name, "")
                whose = f" of VAE {vae_hash}" if name == "latents" and vae_hash else ""
                raise InputError(f"{folder} holds no {name}{whose}: run python prepare.py --out {folder} {remedy} first")
        try:
            index = self.folder / "index.tsv"
            lines = [line for _, line in read_lines(index)][1:]
            self.identity = f"{zlib.crc32(index.read_bytes()):08x}"  # of clips, texts and split
            self.clips = [dict(zip(("id", "split", "speaker", "samples", "text"), line.split("\t"), strict=True)) for line in lines]
            self.rate = self.meta["sample_rate"]
            self.samples = np.array([int(c["samples"]) for c in self.clips])
            self.arrays, self.offsets = {}, {}
            for name in need:
                shape, offsets = self.meta[name]["shape"], self.offsets_at(self.meta[name]["rate"])
                path, dtype = self.folder / f"{files[name]}.bin", np.dtype(self.meta[name]["dtype"])
                found, expected = path.stat().st_size, math.prod(shape) * dtype.itemsize
                if found != expected or offsets[-1] != shape[0] or self.samples.min(initial=0) < 0:
                    raise ValueError(f"{path} has {found} bytes, expected {expected} in {offsets[-1]} rows")
                self.arrays[name] = np.memmap(path, dtype, "r", shape=tuple(shape))
                self.offsets[name] = offsets
        except (ArithmeticError, AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as e:
            raise InputError(f"{folder} is damaged ({type(e).__name__}: {e}): remove it and run prepare.py again") from e

    def offsets_at(self, rate) -> np.ndarray:
        """Where each clip begins in an array of `rate` rows a second (or "byte": a row a byte of its text), and where the last one ends."""
        counts = [len(c["text"].encode()) for c in self.clips] if rate == "byte" else frame_count(self.samples, self.rate, rate)
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def counts(self, name: str) -> np.ndarray:
        """Rows of array `name` that each clip has."""
        return np.diff(self.offsets[name])

    def split(self, name: str) -> list[int]:
        return [i for i, c in enumerate(self.clips) if c["split"] == name]

    def spread(self, name: str, count: int) -> list[int]:
        """`count` clips of a split, or all it has, spread evenly over its speakers."""
        clips = sorted(self.split(name), key=lambda i: (self.clips[i]["speaker"], i))
        return [clips[round(k)] for k in np.linspace(0, len(clips) - 1, min(count, len(clips)))]

    def get(self, name: str, i: int, start: int = 0, count: int | None = None) -> torch.Tensor:
        """Rows start … start + count of clip i, cut at its end; audio as float32 in [-1, 1], all else as float32."""
        a, b = self.offsets[name][i : i + 2]
        rows = self.arrays[name][a + start : b if count is None else min(b, a + start + count)]
        rows = torch.from_numpy(np.array(rows)).float()  # a copy: the map is read-only
        return rows / 32767 if name == "audio" else rows


# --------------------------------------------------------------------------------------------------------------
# Where the clips come from: lists of (id, path, speaker, text, split), split "" where the source does not say.


ALIASES = dict(audio_file="audio", file_name="audio", transcription="text", speaker_name="speaker", speaker_id="speaker")  # in others' manifests
CONVERT = "awk -F'|' 'BEGIN {print \"audio|speaker|text\"} {print \"wavs/\" $1 \".wav|\" $3 \"|\" $2}' FILE > manifest.csv, with your columns' numbers"


def fields(line: str, mark: str) -> list[str]:
    return next(csv.reader([line.replace("\r", " ")])) if mark == "," else line.split(mark)


def from_manifest(path: Path):
    """audio|speaker|text with a header, and perhaps split (train, valid, or test: never trained on); paths relative to it. Also with tabs or
    commas between, and with ALIASES for names. Without speakers each clip counts as a voice of its own."""
    (_, header), *rows = read_lines(path) or [(1, "")]
    tables = [(mark, [ALIASES.get(name, name) for name in fields(header, mark)]) for mark in "|\t,"]
    mark, names = next((table for table in tables if {"audio", "text"} <= set(table[1])), ("", []))
    if not mark:
        raise InputError(f"{path} has no columns audio and text: its first line is {header!r}, expected audio|speaker|text. To convert it: {CONVERT}")
    for n, line in rows:
        values = fields(line, mark)
        if len(values) != len(names):
            raise InputError(f"{path}, line {n}: found {len(values)} columns, expected {len(names)}")
        row = dict(zip(names, values))
        if row.get("split", "") not in ("", "train", "valid", "test"):
            raise InputError(f"{path}, line {n}: split is {row['split']!r}, expected train, valid or test")
        yield row["audio"], path.parent / row["audio"], row.get("speaker") or row["audio"], row["text"], row.get("split", "")


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
        speaker, name = path.parent.name, path.stem
        places = [root / "wav48_silence_trimmed" / speaker / f"{name}_mic1.flac", root / "wav48" / speaker / f"{name}.wav"]
        wave = next((p for p in places if p.exists()), places[-1])
        yield str(wave.relative_to(root)), wave, speaker, path.read_text(encoding="utf-8-sig"), ""


def from_ljspeech(root: Path):
    """metadata.csv (name|text, or name|text|normalised text) and wavs/NAME.wav; or, by that name, a manifest with a header."""
    rows = [line.split("|") for _, line in read_lines(root / "metadata.csv")]
    words = [[set(normalize_text(text, "plain").split()) for text in row[1:]] for row in rows if len(row) == 3 and row[2].strip()]
    if any(len(row) not in (2, 3) for row in rows) or sum(bool(a & b) for a, b in words) < len(words) / 2 or {"audio", *ALIASES} & set(*rows[:1]):
        yield from from_manifest(root / "metadata.csv")  # refused, if it has no header
    else:
        for name, *texts in rows:
            yield f"wavs/{name}.wav", root / "wavs" / f"{name}.wav", "LJ", texts[-1].strip() or texts[0], ""


VALID = 0.01  # share of the clips
CHOICES = ("sample_rate", "text", "min_seconds", "max_seconds", "valid")  # of the flags: by what clips are chosen and how they are kept
LAYOUTS = {  # a path that only this layout has: its reader
    "manifest.csv": lambda root: from_manifest(root / "manifest.csv"),
    "**/*.normalized.txt": from_libritts,
    "**/*.trans.txt": from_librispeech,
    "txt/*/*.txt": from_vctk,
    "metadata.csv": from_ljspeech,
}


def list_clips(source: Path, alone: bool = True) -> list[tuple]:
    """All clips of a manifest or folder, sorted by id. Where it is not alone, ids and voices without a name are told by their source."""
    if not source.exists():
        raise InputError(f"no such file or folder: {source}")
    read = from_manifest if source.is_file() else next((read for pattern, read in LAYOUTS.items() if next(below(source, pattern), None)), None)
    if not read:
        raise InputError(f"no speech found in {source} (looked for {', '.join(LAYOUTS)})")
    try:
        clips = sorted(read(source))
        "".join(name + speaker for name, _, speaker, _, _ in clips).encode()
    except (OSError, UnicodeError, csv.Error) as e:
        raise InputError(f"cannot read the transcripts of {source}, or one, or a file's name, is not UTF-8: {e}") from e
    if not clips:
        raise InputError(f"{source} lists no clips")
    for name, _, speaker, _, _ in clips:  # which the index could not hold
        if set("\t\0") & set(name + speaker) or len(f"{name}.{speaker}.".splitlines()) > 1:
            raise InputError(f"{source}: {name!r} by {speaker!r} has a tab, a line break or a null byte in its name")
    if not alone:
        clips = [(f"{source}:{name}", path, f"{source}:{speaker}" if speaker in ("LJ", name) else speaker, *rest) for name, path, speaker, *rest in clips]
    return clips


def differences(found: dict, wanted: dict) -> str:
    """What differs between two settings, clip by clip, in words."""
    found, wanted = (settings | settings.get("recordings", {}) for settings in (found, wanted))
    differ = [f"{k}: {found.get(k)}, now {wanted.get(k)}" for k in found | wanted if k != "recordings" and found.get(k) != wanted.get(k)]
    return "; ".join(differ[:3]) + f" and {len(differ) - 3} more" * (len(differ) > 3)


def download(subsets: str, root: Path) -> list[Path]:
    """Fetch LibriTTS subsets, or LibriSpeech's as librispeech:NAME, through torchaudio; returns their folders."""
    folders = []
    for name in subsets.split(","):
        corpus, _, subset = name.rpartition(":")
        dataset, inside = (torchaudio.datasets.LIBRISPEECH, "LibriSpeech") if corpus == "librispeech" else (torchaudio.datasets.LIBRITTS, "LibriTTS")
        partial, folder = root / WORK, root / inside / subset
        if not folder.is_dir():
            shutil.rmtree(partial / inside / subset, ignore_errors=True)  # torchaudio would take a half unpacked one for the whole
            partial.mkdir(parents=True, exist_ok=True)
            try:
                dataset(partial, url=subset, download=True)
            except Exception as e:  # torchaudio raises what urllib, tarfile and its own checks raise
                raise InputError(f"cannot download {name}: {e}") from e
            folder.parent.mkdir(exist_ok=True)
            os.replace(partial / inside / subset, folder)
        folders.append(folder)
    return folders


# --------------------------------------------------------------------------------------------------------------
# The passes: audio, SSL features and latents, each chunk by chunk.


def each_chunk(args, name: str, count: int, do, rank: int, world: int) -> list[Path]:
    """do(part) for this rank's share of the clips 0 … count-1, args.chunk at a time, that is not marked as done. What it returns stands in
    the marks, which are returned."""
    marks = [args.out / WORK / f"{name}-{k}" for k in range(math.ceil(count / args.chunk))]
    todo = [k for k in range(rank, len(marks), world) if not marks[k].exists()]
    pace = 1 if sys.stderr.isatty() else 60  # seconds between two sights of the bar: in a file, each is a line
    for k in tqdm(todo, desc=name, unit="chunk", disable=rank > 0, mininterval=pace):
        note = json.dumps(do(range(count)[k * args.chunk : (k + 1) * args.chunk]))
        write_atomic(marks[k], lambda p: p.write_text(note, encoding="utf-8"))
    barrier()
    return marks


def read_clip(clip, args) -> tuple[bytes, str, int]:
    """The int16 samples of a clip that is fit for training; else none, and why it is not. And the rate it was recorded at."""
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
    why = next((reason for reason, found in checks.items() if found), "")
    return b"" if why else (wave.clip(-1, 1) * 32767).round().astype(np.int16).tobytes(), why, sf.info(path).samplerate


def fill_audio(clips, args, rank: int, world: int) -> None:
    """Read every clip; then write audio.bin, dropped.tsv, index.tsv and the first meta.json."""
    out, part_file = args.out, lambda start: args.out / WORK / f"{start}.audio"

    def read(part):
        found = list(pool.map(lambda i: read_clip(clips[i], args), part))
        write_atomic(part_file(part.start), lambda p: p.write_bytes(b"".join(samples for samples, _, _ in found)))
        return [(len(samples) // 2, why, rate) for samples, why, rate in found]

    def join(path):
        with open(path, "wb") as f:
            for start in range(0, len(clips), args.chunk):
                f.write(part_file(start).read_bytes())

    with ThreadPoolExecutor(args.workers) as pool:
        marks = each_chunk(args, "audio", len(clips), read, rank, world)
    if rank > 0:
        return
    verdicts = [v for mark in marks for v in json.loads(mark.read_text(encoding="utf-8"))]
    kept = [(*clip, samples) for clip, (samples, _, _) in zip(clips, verdicts) if samples]
    dropped = [(clip[0], why) for clip, (_, why, _) in zip(clips, verdicts) if why]
    for rate, count in sorted(Counter(rate for samples, _, rate in verdicts if samples and rate < args.sample_rate).items()):
        print(f"{count} clips were recorded at {rate} Hz: nothing above {rate // 2} Hz is in them (--sample-rate {args.sample_rate})")
    write_atomic(out / "dropped.tsv", lambda p: p.write_text("".join(f"{name}\t{why}\n" for name, why in dropped), encoding="utf-8"))
    if not kept:
        shutil.rmtree(out / WORK)  # mended, also by other settings, they are looked at again
        raise InputError(f"all {len(clips)} clips were dropped; the reasons are in {out / 'dropped.tsv'}, the first: {dropped[0][1]}")
    if not any(c[4] for c in kept):  # no split given: the clips whose names hash lowest are for validation
        order = sorted(range(len(kept)), key=lambda i: zlib.crc32(kept[i][0].encode()))
        chosen = set(order[: max(1, round(args.valid * len(kept)))] if len(kept) > 1 else [])
        kept = [(*c[:4], "valid" if i in chosen else "train", c[5]) for i, c in enumerate(kept)]
    line = lambda name, path, speaker, text, split, samples: f"{name}\t{split or 'train'}\t{speaker}\t{samples}\t{normalize_text(text, args.text)}\n"
    write_atomic(out / "index.tsv", lambda p: p.write_text("id\tsplit\tspeaker\tsamples\ttext\n" + "".join(line(*c) for c in kept), encoding="utf-8"))
    write_atomic(out / "audio.bin", join)
    total = sum(c[5] for c in kept)
    meta = dict(sample_rate=args.sample_rate, text=args.text, teacher=args.ssl, layer=args.layer, aligner=args.aligner, sources=[str(s) for s in args.source], clips=len(kept),
                hours=round(total / args.sample_rate / 3600, 4), speakers=len({c[2] for c in kept}), audio=dict(shape=[total], dtype="int16", rate=args.sample_rate))  # fmt: skip
    write_json(out / "meta.json", meta)


def fill(data: Data, args, name: str, entry: dict, width: tuple, make, rank: int, world: int, dtype="float16") -> tuple[np.memmap | None, np.ndarray]:
    """A file for array `name` [rows, *width], filled in place: make(part) gives the rows of these clips. Returns it, to rank 0, and its offsets.

    Every rank writes its chunks into the one file; what another pass, model or VAE left half-done is removed. Written, not mapped: a full disk
    would kill a process that writes through a map, without a word."""
    work, offsets = args.out / WORK, data.offsets_at(entry["rate"])
    path, shape = work / f"{zlib.crc32(json.dumps([entry, args.chunk]).encode())}.bin", (int(offsets[-1]), *width)
    row_bytes = np.dtype(dtype).itemsize * math.prod(width)
    if rank == 0 and not path.exists():
        shutil.rmtree(work, ignore_errors=True)
        free, needed = shutil.disk_usage(args.out).free, int(offsets[-1]) * row_bytes
        if free < needed:
            raise InputError(f"{name} of {args.out} needs {needed / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB left")
        write_atomic(path, lambda p: p.touch())
    barrier()

    def do(part):
        rows = make(part).cpu().numpy().astype(dtype, copy=False)
        try:
            with open(path, "rb+") as f:
                f.seek(int(offsets[part.start]) * row_bytes)
                f.write(rows.tobytes())
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise InputError(f"cannot write {path}: {e}; what was there before is whole") from e

    each_chunk(args, name, len(data.clips), do, rank, world)
    return (np.memmap(path, dtype, "r", shape=shape) if rank == 0 else None), offsets  # which rank 0 moves at once


def finish(out: Path, name: str, array: np.memmap, entry: dict) -> None:
    """Move the filled array to its place and enter it in meta.json as its newest, in an order that never pairs old numbers with new notes."""
    meta = read_json(out / "meta.json")
    if meta.pop(name, None):
        write_json(out / "meta.json", meta)
    os.replace(array.filename, out / f"{name}.bin")
    write_json(out / "meta.json", meta | {name: entry | dict(shape=array.shape, dtype=array.dtype.name)})


def revision(name: str | Path, config=None) -> str:
    """Which weights: a hub model's revision, a hash of a local folder's or file's."""
    path = Path(name)
    if not path.exists():
        return config._commit_hash
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin"))
    files = files or sorted(path.glob("*.pt"))  # a fine-tune of F5-TTS
    return "sha256:" + hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


def from_hub(what: str, name: str, *kinds: str) -> list:
    """What transformers' Auto classes of these kinds load by hub id or folder; failing is an InputError that says what was asked for."""
    import transformers

    flag = {"SSL model": "--ssl", "aligner": "--aligner", "recogniser": "--asr", "speaker model": "--sim"}[what]
    transformers.utils.logging.set_verbosity_error()  # a CTC head left out is not worth a page of warning
    transformers.utils.logging.disable_progress_bar()
    try:
        if str(name).startswith(HERE) and not Path(name).exists():
            raise OSError("no such folder")
        return [getattr(transformers, f"Auto{kind}").from_pretrained(name) for kind in kinds]
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"cannot load the {what} {name}: {str(e).splitlines()[0]}: if it was moved, name it with {flag}") from e


class SSLModel:
    """A frozen Hugging Face speech encoder: WavLM, HuBERT, wav2vec 2.0, XLS-R, w2v-BERT, a Whisper encoder…

    The waves go through the model's own feature extractor (zero mean and unit variance, where it was trained so)."""

    layers = 1  # side by side in the features

    def __init__(self, name: str, layer: int | str = -1, device=torch.device("cpu")):
        """layer: a hidden state, -1 for the last, "all": every one, side by side, or "logits": of a CTC model."""
        self.extractor, model = from_hub("SSL model", name, "FeatureExtractor", "ModelForCTC" if layer == "logits" else "Model")
        self.name, self.layer, self.device, self.revision = name, layer, device, revision(name, model.config)
        states = getattr(model.config, "num_hidden_layers", 0) + 1
        if isinstance(layer, int) and not -states <= layer < states:
            raise InputError(f"{name} has the hidden states 0 to {states - 1}, no --layer {layer}")
        self.layers = states if layer == "all" else 1
        self.whisper = model.config.model_type == "whisper"
        self.model = (model.get_encoder() if self.whisper else model).float().to(device).eval()  # float32, however it is stored
        self.sample_rate = self.extractor.sampling_rate
        # Group norm over time sees padding, and these models were trained without masks: only equal lengths are batched.
        self.equal_lengths = getattr(model.config, "feat_extract_norm", None) == "group"
        if self.whisper:
            self.rate, self.width = Fraction(model.config.max_source_positions, 30), model.config.d_model * self.layers
        else:
            short, long = (self([np.zeros(s * self.sample_rate, np.float32)])[0] for s in (1, 11))
            self.rate, self.width = Fraction(len(long) - len(short), 10), long.shape[1]

    @torch.no_grad()
    def __call__(self, waves: list[np.ndarray]) -> list[torch.Tensor]:
        """float32 [T] waves → float32 features [S, D] of each wave's own length, as if alone."""
        if self.whisper and max(map(len, waves)) > 30 * self.sample_rate:
            raise InputError(f"{self.name} hears 30 s at most: prepare the data with --max-seconds 30")
        options = {} if self.whisper else dict(padding=True, return_attention_mask=not self.equal_lengths)
        inputs = self.extractor(waves, sampling_rate=self.sample_rate, return_tensors="pt", **options).to(self.device)
        out = self.model(**inputs, output_hidden_states=self.layer not in (-1, "logits"))
        states = out.logits if self.layer == "logits" else out.last_hidden_state if self.layer == -1 else torch.cat(out.hidden_states, -1) if self.layer == "all" else out.hidden_states[self.layer]
        if self.whisper:
            frames = [frame_count(len(w), self.sample_rate, self.rate) for w in waves]
        elif "input_features" in inputs:  # w2v-BERT: its extractor already makes the frames
            frames = inputs["attention_mask"].sum(1).tolist()
        else:
            frames = [int(self.model._get_feat_extract_output_lengths(torch.tensor(len(w)))) for w in waves]
        return [s[:n].float() for s, n in zip(states, frames)]

    def facts(self) -> dict:
        return dict(model=self.name, revision=self.revision, layer=self.layer, layers=self.layers, dim=self.width, rate=str(self.rate))

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


class Teachers(SSLModel):
    """Several SSL models of the same frame rate, their features side by side: what each knows can shape the latents (after arXiv 2312.06709)."""

    def __init__(self, names: list[str], layer: int, device):
        self.models = [SSLModel(name, layer, device) for name in names]
        self.name, self.layer, self.revision = ",".join(names), layer, ",".join(str(m.revision) for m in self.models)
        self.sample_rate, self.rate, self.width = self.models[0].sample_rate, self.models[0].rate, sum(m.width for m in self.models)
        self.equal_lengths = any(m.equal_lengths for m in self.models)
        if layer == "all" or any((m.sample_rate, m.rate) != (self.sample_rate, self.rate) for m in self.models):
            raise InputError(f"{self.name}: several teachers need one layer, and sample and frame rates that agree: {[(m.sample_rate, float(m.rate)) for m in self.models]}")

    def __call__(self, waves):
        each = zip(*(model(waves) for model in self.models))
        return [torch.cat([f[: min(map(len, features))] for f in features], -1) for features in each]


class MelTeacher(SSLModel):
    """No SSL model: 80 log-mel bands, 50 frames a second, to see what the model contributes beyond a smooth view of the spectrum."""

    def __init__(self, sample_rate: int, device):
        self.name, self.layer, self.revision, self.device = "mel", -1, None, device
        self.sample_rate, self.rate, self.width, self.equal_lengths = sample_rate, Fraction(50), 80, False
        self.model = LogMel(sample_rate, self.width, sample_rate // 50).to(device)

    def __call__(self, waves):
        padded = (torch.from_numpy(np.pad(w, (0, -len(w) % self.model.hop))).to(self.device) for w in waves)
        return [self.model(w[None, None])[0].T for w in padded]  # each [S, 80]


def load_teacher(name: str, layer: int | str, sample_rate: int, device) -> SSLModel:
    """What --ssl names: a model, several ("A,B"), or "mel". Its sample rate must be the data's."""
    teacher = MelTeacher(sample_rate, device) if name == "mel" else Teachers(name.split(","), layer, device) if "," in name else SSLModel(name, layer, device)
    if teacher.sample_rate != sample_rate:
        raise InputError(f"{name} hears {teacher.sample_rate} Hz, the data folder holds {sample_rate} Hz: prepare it with --sample-rate {teacher.sample_rate}")
    return teacher


def layer_number(text: str) -> int | str:
    return text if text == "all" else int(text)


def fill_ssl(args, rank: int, world: int, device) -> None:
    data = Data(args.out)
    if known := data.meta.get("ssl"):
        if (known["model"], known["layer"]) != (args.ssl, args.layer):
            raise InputError(f"{args.out} already holds SSL features of {known['model']}, layer {known['layer']}, not {args.ssl}, layer {args.layer}: choose another --out")
        if Path(args.ssl).is_dir() and revision(args.ssl) != known.get("revision"):
            raise InputError(f"{args.ssl} holds other weights than when {args.out} was made: choose another --out")
        return
    ssl = load_teacher(args.ssl, args.layer, data.rate, device)

    def make(part):
        features = [None] * len(part)
        for batch in ssl.batches([int(data.samples[i]) for i in part], args.batch_seconds):
            for j, x in zip(batch, ssl([data.get("audio", part[j]).numpy() for j in batch])):
                x = x.half().cpu()
                if not torch.isfinite(x).all():
                    raise InputError(f"{args.ssl} gives features that are not finite in float16 for {data.clips[part[j]]['id']}: take the clip out or choose another --layer")
                count = int(frame_count(data.samples[part[j]], data.rate, ssl.rate))
                features[j] = repeat_last(x[:count], count)
        return torch.cat(features)

    array, _ = fill(data, args, "ssl", ssl.facts(), (ssl.width,), make, rank, world)
    if rank == 0:
        finish(args.out, "ssl", array, ssl.facts())


class Aligner:
    """A CTC recogniser that finds where each byte of a text is said (torchaudio.functional.forced_align)."""

    WORST = -2.5  # mean log-probability a character below which text and speech are not the same: see demo/README.md

    def __init__(self, name: str, device):
        self.model = SSLModel(name, "logits", device)
        (tokenizer,) = from_hub("aligner", name, "Tokenizer")
        self.blank = tokenizer.pad_token_id
        self.ids = {text: i for text, i in tokenizer.get_vocab().items() if len(text) == 1 and i != self.blank}
        self.ids[" "] = self.ids.get(getattr(tokenizer, "word_delimiter_token", None) or " ")

    def symbol(self, character: str) -> int | None:
        """Its id in the model's alphabet, in whichever case that has it."""
        return next((self.ids[c] for c in (character, character.upper(), character.lower()) if self.ids.get(c) is not None), None)

    def __call__(self, logits: torch.Tensor, text: str, seconds: float) -> torch.Tensor:
        """Logits [S, symbols] of a clip → the second at which each byte of its text begins [L]: halfway between the moments at which
        the model is surest of it and of the byte before. Characters that the model lacks stand evenly between their neighbours. All
        nan, if what is said is not this text."""
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
    data, aligner = Data(args.out), Aligner(args.aligner, device)
    if aligner.model.sample_rate != data.rate:
        raise InputError(f"{args.aligner} hears {aligner.model.sample_rate} Hz, {args.out} holds {data.rate} Hz")
    entry = dict(aligner=args.aligner, revision=aligner.model.revision, rate="byte")
    if data.meta.get("starts", {}).get("revision", "none") == entry["revision"]:
        return

    def make(part):
        starts = [None] * len(part)
        for batch in aligner.model.batches([int(data.samples[i]) for i in part], args.batch_seconds):
            for j, logits in zip(batch, aligner.model([data.get("audio", part[j]).numpy() for j in batch])):
                starts[j] = aligner(logits, data.clips[part[j]]["text"], data.samples[part[j]] / data.rate)
        return torch.cat(starts)

    array, offsets = fill(data, args, "starts", entry, (), make, rank, world, "float32")
    if rank == 0:
        lost = [data.clips[i]["id"] for i in range(len(data.clips)) if np.isnan(array[offsets[i]])]
        write_atomic(args.out / "unaligned.tsv", lambda p: p.write_text("".join(f"{name}\n" for name in lost), encoding="utf-8"))
        finish(args.out, "starts", array, entry | dict(unaligned=len(lost)))
        lacks = Counter(c for clip in data.clips for c in clip["text"] if aligner.symbol(c) is None)
        if lacks:
            counts = ", ".join(f"{c!r} {count} times" for c, count in lacks.most_common(20))
            print(f"{args.aligner} lacks {counts}: placed between their neighbours")
        print(f"{len(lost)} of {len(data.clips)} clips cannot be aligned (listed in {args.out / 'unaligned.tsv'}): train_tts.py --text-place aligned leaves them out")


@torch.no_grad()
def fill_latents(args, rank: int, world: int, device) -> None:
    """The posterior of every clip, and each channel's mean and standard deviation over the training split."""
    data, vae = Data(args.out), SemanticVAE.from_pretrained(args.vae)
    dim, rate = vae.config.latent_dim, Fraction(data.rate, vae.config.hop)
    entry = dict(vae=str(args.vae), vae_hash=vae.latents_hash(), dim=dim, hop=vae.config.hop, rate=str(rate))
    name = f"latents-{entry['vae_hash']}"
    if known := data.meta.pop(name, None):
        if rank == 0:  # now the newest, and perhaps with another decoder
            write_json(args.out / "meta.json", data.meta | {name: known | dict(vae=entry["vae"])})
        return
    if vae.config.sample_rate != data.rate:
        raise InputError(f"{args.vae} works at {vae.config.sample_rate} Hz, {args.out} holds {data.rate} Hz")
    if not data.split("train"):
        raise InputError(f"{args.out} holds no training clips, over which the latents' statistics run")
    fold_weight_norm(vae).to(device)

    def make(part):
        return torch.cat([torch.stack(vae.encode(data.get("audio", i)[None].to(device)), 2)[0] for i in part]).half()  # [N, 2, D]

    array, offsets = fill(data, args, name, entry, (2, dim), make, rank, world)
    if rank == 0:
        moments, count = np.zeros((2, dim)), 0
        for i in data.split("train"):  # z = mean + ε · std has the moments E[mean] and E[mean² + std²]
            mean, logvar = array[offsets[i] : offsets[i + 1]].astype(np.float64).transpose(1, 0, 2)
            moments, count = moments + (mean.sum(0), (mean**2 + np.exp(logvar)).sum(0)), count + len(mean)
        mean, square = moments / count
        std = np.sqrt(square - mean**2)
        if not np.isfinite(std).all():
            raise InputError(f"the latents of {args.vae} are not finite: train it again")
        constant = np.flatnonzero(std < 1e-4)
        if len(constant):
            print(f"latent channels {constant.tolist()} of {args.vae} never change: they are not scaled")
            std[constant] = 1
        finish(args.out, name, array, entry | dict(mean=mean.tolist(), std=std.tolist()))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="*", help="folders in LibriTTS, LibriSpeech, VCTK or LJSpeech layout, or manifests (audio|speaker|text with header); default: the demo corpus")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="the data folder to make or add to (default %(default)s)")
    parser.add_argument("--download", help="LibriTTS subsets to fetch first, e.g. train-clean-100,dev-clean; LibriSpeech's as librispeech:test-clean")
    parser.add_argument("--download-to", type=Path, default=Path("downloads"), help="where downloads are kept (default %(default)s)")
    parser.add_argument("--ssl", help="teacher: hub id or folder of a speech encoder, several with commas between, \"mel\", or \"none\" (default: for the demo corpus the demo's; the paper's is microsoft/wavlm-large)")
    parser.add_argument("--layer", type=layer_number, help="hidden state to store, -1 for the last, \"all\" for a learned mix (default -1)")
    parser.add_argument("--aligner", help="CTC recogniser that finds where each character is said, for text in its place: hub id or folder (default: for the demo corpus the demo's)")
    parser.add_argument("--vae", help="add the latents of this VAE: a run, an authors' release, or a hub id")
    parser.add_argument("--text", choices=["plain", "raw"], help="plain: lower case without punctuation; raw: with both (default: plain for the demo corpus, else raw)")
    parser.add_argument("--sample-rate", type=at_least(1000), default=16000, help="of the stored audio, in Hz (default %(default)s)")
    parser.add_argument("--min-seconds", type=at_least(0.1, float), default=0.5, help="drop shorter clips (default %(default)s)")
    parser.add_argument("--max-seconds", type=at_least(0.1, float), default=30, help="drop longer clips (default %(default)s)")
    parser.add_argument("--valid", type=at_least(0, float, 0.5), default=VALID, help="share of clips for validation where the source names none (default %(default)s)")
    parser.add_argument("--batch-seconds", type=at_least(0.1, float), default=60, help="audio in one batch of the teacher (default %(default)s)")
    parser.add_argument("--chunk", type=at_least(1), default=128, help="clips done together, the unit of sharing and of resuming (default %(default)s)")
    parser.add_argument("--workers", type=at_least(1), default=min(8, os.cpu_count() or 1), help="threads that read audio (default %(default)s)")
    args = parser.parse_args(argv)
    if args.source or args.download:
        if not args.ssl:
            raise InputError("name the teacher with --ssl: the paper's is microsoft/wavlm-large; none stores no features, for a vanilla VAE")
        args.text = args.text or "raw"
    elif given := [name for name in CHOICES if getattr(args, name) != parser.get_default(name)]:
        raise InputError(f"--{given[0].replace('_', '-')} says how sources are read, and none is given: name a folder or a manifest")
    elif not (args.out / "meta.json").exists():
        if args.ssl or args.layer or args.aligner or args.vae:
            raise InputError(f"{args.out} holds no data to add to, and no source is given: name the right --out, or a folder or manifest (the demo's: {DEMO / 'corpus'})")
        args.source, args.ssl, args.text = [DEMO / "corpus"], args.ssl or str(DEMO / "ssl"), args.text or "plain"
        args.aligner = args.aligner or str(DEMO / "ssl")
    return args


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_ranks()
    out, held = args.out, lock(args.out) if rank == 0 else None
    if args.download:
        # Once, and then once on every node that shares no disk with the first.
        for turn in (rank == 0, rank > 0 and os.environ.get("LOCAL_RANK") == "0"):
            if turn:
                download(args.download, args.download_to)
            barrier()
        args.source += download(args.download, args.download_to)
    if args.source:
        clips = [clip for source in args.source for clip in list_clips(source, alone=len(args.source) == 1)]
        settings = {name: getattr(args, name) for name in (*CHOICES, "chunk")} | dict(sources=list(map(str, args.source)))
        settings["recordings"] = {name: [zlib.crc32(repr(texts).encode()), *file_stamp(path)] for name, path, *texts in clips}
        path, begun = out / "settings.json", (out / "meta.json").exists() or (out / WORK).exists()
        twice, count = Counter(os.path.realpath(clip[1]) for clip in clips).most_common(1)[0]
        foreign = [name for name in ("meta.json", "index.tsv", "audio.bin", "dropped.tsv") if (out / name).exists() and not path.exists()]
        if args.valid != VALID and any(split for *_, split in clips):
            raise InputError("--valid is for sources that name no splits: change their column split, or leave it out")
        if count > 1:
            raise InputError(f"{twice} is listed {count} times, and could be trained on and validated with: take it out of the lists but once")
        if foreign:
            raise InputError(f"{out} holds a {foreign[0]}, but no settings.json that says how we made it: choose another --out")
        if begun and (differ := differences(read_json(path), settings)):
            raise InputError(f"{out} was made with other settings or recordings ({differ}): choose another --out, or remove it")
        if rank == 0:
            write_json(path, settings)
        if not (out / "meta.json").exists():
            if args.ssl != "none":  # each model is looked for now, not after hours of reading
                load_teacher(args.ssl, -1 if args.layer is None else args.layer, args.sample_rate, device)
            if args.aligner:
                Aligner(args.aligner, device)
            if args.vae:
                SemanticVAE.from_pretrained(args.vae)
            if rank == 0 and (alone := sum(clip[0] == clip[2] for clip in clips)):
                print(f"{alone} clips name no speaker: each counts as a voice of its own")
            fill_audio(clips, args, rank, world)
            barrier()
    if not args.ssl:  # a folder that is added to, or whose features were interrupted: what it was begun with
        meta = read_json(out / "meta.json")
        begun = meta.get("ssl") or dict(model=meta["teacher"], layer=meta.get("layer"))
        args.ssl, args.layer = begun["model"], begun["layer"] if args.layer is None else args.layer
    args.aligner = args.aligner or in_demo(read_json(out / "meta.json").get("aligner"))
    if args.ssl != "none":
        args.layer = -1 if args.layer is None else args.layer
        fill_ssl(args, rank, world, device)
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
