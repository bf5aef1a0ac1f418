"""Turn a folder of speech into one data folder: audio, SSL features and latents as flat memory-mapped arrays.

    python prepare.py                                                      # the demo corpus and its tiny teacher
    python prepare.py --vae runs/vae                                       # add the latents of a trained VAE, for stage 2
    python prepare.py LibriTTS/ --out data/libritts --ssl microsoft/wavlm-large
    torchrun --nproc_per_node 8 prepare.py ...                             # shares the clips between 8 GPUs

The data folder, whose clips stand in every array in the order of the index:
    index.tsv    one line a clip: id, split, speaker, samples, text
    audio.bin    int16   [samples of all clips]
    ssl.bin      float16 [SSL frames of all clips, width]
    latents.bin  float16 [latent frames of all clips, 2, latent_dim]: the posterior's mean and log-variance
    meta.json    sample rate, teacher, VAE, counts, hours, the latents' statistics
    dropped.tsv  every clip that was left out, with its reason

Killed at any moment and run again, it continues and ends with the same bytes.
"""

import argparse
import csv
import datetime
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
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

from model import InputError, LogMel, SemanticVAE, read_json, write_atomic

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DEMO = Path(__file__).resolve().parent / "demo"


# --------------------------------------------------------------------------------------------------------------
# What every script shares: how it starts, and how it ends when the user's input is at fault.


def start_ranks():
    """(rank, world, device), joining the process group if torchrun started us. CPU ranks talk by gloo, GPUs by NCCL."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # Hours, not minutes: ranks wait for each other at the end of a long job.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=24))
    return (dist.get_rank() if world > 1 else 0), world, device


def barrier():
    if dist.is_initialized():
        dist.barrier()


def cli(main) -> None:
    """Run main(); an InputError becomes one line and exit code 2, Ctrl-C and SIGTERM one line and 130 and 143."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
        barrier()  # leave together: a rank that exits while Gloo still holds its tensors may be aborted
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as e:
        print(f"error: the GPU is out of memory: lower --micro-batch (train_vae.py), --micro-seconds (train_tts.py), --batch-seconds (prepare.py) or --batch-size (sample.py): {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as e:
        print("interrupted: nothing is lost, run the command again", file=sys.stderr)
        sys.exit(128 + (e.args[0] if e.args else signal.SIGINT))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Stop:
    """For loops that need not be interrupted in the middle: SIGTERM and Ctrl-C are noted, and all ranks stop after the same step."""

    def __init__(self):
        self.number = 0
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # the CPUs agree, no GPU is waited for
        signal.signal(signal.SIGTERM, self.note), signal.signal(signal.SIGINT, self.note)

    def note(self, number, frame):
        if self.number:  # twice: at once
            raise KeyboardInterrupt(number)
        self.number = number

    def agreed(self) -> int:
        """The signal that any rank has heard; 0: none."""
        number = torch.tensor(self.number)
        if self.group:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return number.item()


def lock(folder: Path):
    """Refuse a folder that another process is writing to. The lock lasts as long as what is returned, or this process: its end, however
    sudden, frees it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            print(f"this system has no file locks: start no second command that writes to {folder}")
    except BlockingIOError:
        file.seek(0)
        if not (owner := file.read().strip()).startswith(f"process {os.getpid()} on {platform.node()},"):
            raise InputError(f"{folder} is in use by {owner or 'another process'}: wait for it, or choose another --out") from None
        return file
    except OSError as e:
        raise InputError(f"cannot write in {folder}: {e}") from e
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}, since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n")
    file.flush()
    return file


# --------------------------------------------------------------------------------------------------------------
# Text, audio and time.


def normalize_text(text: str, mode: str) -> str:
    """NFC and single spaces; "plain" also lower-cases and removes punctuation (all but apostrophes inside words).

    Used here and by sample.py with the mode kept in the checkpoint, so that a model is asked only what it was taught."""
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        raise InputError(f"not UTF-8: {text!r}")
    text = unicodedata.normalize("NFC", text).replace("’", "'")
    if mode == "plain":
        text = "".join(c if unicodedata.category(c)[0] in "LMN'" or c == "'" else " " for c in text.lower())
        text = " ".join(w.strip("'") for w in text.split())
    return " ".join(text.split())


def read_audio(path: str | Path, rate: int) -> np.ndarray:
    """Any file soundfile reads → mono float32 [T] at `rate`. Raises InputError if it cannot be read or is empty."""
    blocks = []
    try:
        with sf.SoundFile(path) as f:
            source_rate = f.samplerate
            while len(block := f.read(1 << 20, dtype="float32", always_2d=True)):  # as much as there is, not as the header says
                blocks.append(block.mean(1))
    except (sf.SoundFileError, OSError, ValueError) as e:
        raise InputError(f"cannot read {path}: {e} (wav, flac, ogg, opus and mp3 can be read)") from e
    if not blocks:
        raise InputError(f"{path} holds no samples")
    if source_rate * rate / math.gcd(source_rate, rate) ** 2 > 1 << 26:  # its filters would fill the memory
        raise InputError(f"cannot read {path}: {source_rate} Hz has too little in common with {rate} Hz: resample it first")
    wave = torch.from_numpy(np.concatenate(blocks))
    return torchaudio.functional.resample(wave, source_rate, rate).numpy()


def write_wave(path: Path, wave: np.ndarray, rate: int) -> None:
    write_atomic(path, lambda p: sf.write(p, wave, rate, format="WAV", subtype="PCM_16"))


def frame_count(samples: int, sample_rate: int, frame_rate) -> int:
    """Frames that `samples` fill at `frame_rate` a second, the last one perhaps in part: the one rule for all arrays.

    Latents have sample_rate / hop frames a second. SSL models make a frame or so less than this, since their front end
    does not pad; their last frame is then repeated. Frame i of any array thus starts at i / frame_rate seconds."""
    return math.ceil(Fraction(samples, sample_rate) * Fraction(frame_rate))


def repeat_last(features: torch.Tensor, count: int) -> torch.Tensor:
    """Features [S, D] with S <= count → [count, D]."""
    return torch.cat([features, features[-1:].expand(count - len(features), -1)])


class Data:
    """A prepared folder, memory-mapped. Raises InputError if it is missing, incomplete or does not fit what is asked."""

    def __init__(self, folder: str | Path, need: tuple[str, ...] = ("audio",)):
        self.folder = Path(folder)
        if not (self.folder / "meta.json").exists():
            raise InputError(f"{folder} is not a prepared data folder (no meta.json): run python prepare.py --out {folder} first")
        self.meta = read_json(self.folder / "meta.json")
        for name in need:
            if name not in self.meta:
                remedy = {"ssl": "--ssl MODEL", "latents": "--vae RUN"}.get(name, "")
                raise InputError(f"{folder} holds no {name}: run python prepare.py --out {folder} {remedy} first")
        try:
            lines = (self.folder / "index.tsv").read_text(encoding="utf-8").splitlines()[1:]
            self.clips = [dict(zip(("id", "split", "speaker", "samples", "text"), line.split("\t"), strict=True)) for line in lines]
            self.rate = self.meta["sample_rate"]
            self.samples = np.array([int(c["samples"]) for c in self.clips])
            self.arrays, self.offsets = {}, {}
            for name in need:
                shape, counts = self.meta[name]["shape"], self.counts(name)
                path, dtype = self.folder / f"{name}.bin", np.dtype(self.meta[name]["dtype"])
                found, expected = path.stat().st_size, math.prod(shape) * dtype.itemsize
                if found != expected or counts.sum() != shape[0] or counts.min(initial=0) < 0:
                    raise ValueError(f"{path} has {found} bytes, expected {expected} in {counts.sum()} rows")
                self.arrays[name] = np.memmap(path, dtype, "r", shape=tuple(shape))
                self.offsets[name] = np.concatenate([[0], counts.cumsum()])
        except (ArithmeticError, AttributeError, IndexError, KeyError, OSError, TypeError, ValueError) as e:
            raise InputError(f"{folder} is damaged ({type(e).__name__}: {e}): remove it and run prepare.py again") from e

    def counts(self, name: str) -> np.ndarray:
        """Rows of array `name` that each clip has."""
        rate = Fraction(self.meta[name]["rate"])
        return np.array([frame_count(int(n), self.rate, rate) for n in self.samples])

    def split(self, name: str) -> list[int]:
        return [i for i, c in enumerate(self.clips) if c["split"] == name]

    def get(self, name: str, i: int, start: int = 0, count: int | None = None) -> torch.Tensor:
        """Rows start … start + count of clip i, cut at its end; audio as float32 in [-1, 1], all else as float32."""
        a, b = self.offsets[name][i : i + 2]
        rows = self.arrays[name][a + start : b if count is None else min(b, a + start + count)]
        rows = torch.from_numpy(np.array(rows)).float()  # a copy: the map is read-only
        return rows / 32767 if name == "audio" else rows


# --------------------------------------------------------------------------------------------------------------
# Where the clips come from: lists of (id, path, speaker, text, split), split "" where the source does not say.


def from_manifest(path: Path):
    """audio|speaker|text with a header, and perhaps split (train, valid, or test: never trained on); paths relative to it."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 (byte {e.start}): save it as UTF-8") from e
    csv.field_size_limit(1 << 30)
    rows = csv.DictReader((line for line in lines if line.strip()), delimiter="|", quoting=csv.QUOTE_NONE)
    for column in ("audio", "speaker", "text"):
        if column not in (rows.fieldnames or []):
            raise InputError(f"{path} has no column {column}: its first line is {'|'.join(rows.fieldnames or [])!r}, expected audio|speaker|text")
    for row in rows:
        if None in row or None in row.values():
            raise InputError(f"{path}, line {rows.line_num}: found {sum(v is not None for v in row.values())} columns, expected {len(rows.fieldnames)}")
        if row.get("split", "") not in ("", "train", "valid", "test"):
            raise InputError(f"{path}, line {rows.line_num}: split is {row['split']!r}, expected train, valid or test")
        yield row["audio"], path.parent / row["audio"], row["speaker"], row["text"], row.get("split", "")


def from_libritts(root: Path):
    """speaker/chapter/NAME.wav beside NAME.normalized.txt."""
    for path in root.rglob("*.normalized.txt"):
        wave = path.with_name(path.name.replace(".normalized.txt", ".wav"))
        yield str(wave.relative_to(root)), wave, wave.name.split("_")[0], path.read_text(encoding="utf-8-sig"), ""


def from_librispeech(root: Path):
    """speaker/chapter/NAME.flac, with all texts of a chapter in one .trans.txt."""
    for path in root.rglob("*.trans.txt"):
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            name, _, text = line.partition(" ")
            wave = path.with_name(f"{name}.flac")
            yield str(wave.relative_to(root)), wave, name.split("-")[0], text, ""


def from_vctk(root: Path):
    """txt/SPEAKER/NAME.txt, and wav48_silence_trimmed/SPEAKER/NAME_mic1.flac or wav48/SPEAKER/NAME.wav."""
    for path in root.glob("txt/*/*.txt"):
        speaker, name = path.parent.name, path.stem
        places = [root / "wav48_silence_trimmed" / speaker / f"{name}_mic1.flac", root / "wav48" / speaker / f"{name}.wav"]
        wave = next((p for p in places if p.exists()), places[-1])
        yield str(wave.relative_to(root)), wave, speaker, path.read_text(encoding="utf-8-sig"), ""


def from_ljspeech(root: Path):
    """metadata.csv (name|text|normalised text) and wavs/NAME.wav."""
    for line in (root / "metadata.csv").read_text(encoding="utf-8-sig").splitlines():
        name, *texts = line.split("|")
        yield f"wavs/{name}.wav", root / "wavs" / f"{name}.wav", "LJ", texts[-1] if texts else "", ""


LAYOUTS = {  # name: (a path that only this layout has, its reader)
    "manifest": ("manifest.csv", lambda root: from_manifest(root / "manifest.csv")),
    "libritts": ("**/*.normalized.txt", from_libritts),
    "librispeech": ("**/*.trans.txt", from_librispeech),
    "vctk": ("txt/*/*.txt", from_vctk),
    "ljspeech": ("metadata.csv", from_ljspeech),
}


def list_clips(source: Path, layout: str) -> list[tuple]:
    """All clips of a manifest or folder, sorted by id."""
    if source.is_file():
        clips = from_manifest(source)
    elif source.is_dir():
        found = [name for name, (pattern, _) in LAYOUTS.items() if layout in (name, "auto") and next(source.glob(pattern), None)]
        if not found:
            expected = "; ".join(f"{name}: {pattern}" for name, (pattern, _) in LAYOUTS.items() if layout in (name, "auto"))
            raise InputError(f"no speech found in {source} (looked for {expected})")
        clips = LAYOUTS[found[0]][1](source)
    else:
        raise InputError(f"no such file or folder: {source}")
    try:
        clips = sorted(clips)
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read the transcripts of {source}: {e}; they must be UTF-8") from e
    if not clips:
        raise InputError(f"{source} lists no clips")
    for name, _, speaker, _, _ in clips:  # which the index could not hold
        if "\t" in name + speaker or len(f"{name}.{speaker}.".splitlines()) > 1:
            raise InputError(f"{source}: {name!r} by {speaker!r} has a tab or a line break in its name")
    return clips


def download(subsets: str, root: Path) -> list[Path]:
    """Fetch LibriTTS subsets, or LibriSpeech's as librispeech:NAME, through torchaudio; returns their folders."""
    folders = []
    for name in subsets.split(","):
        corpus, _, subset = name.rpartition(":")
        dataset, inside = (torchaudio.datasets.LIBRISPEECH, "LibriSpeech") if corpus == "librispeech" else (torchaudio.datasets.LIBRITTS, "LibriTTS")
        root.mkdir(parents=True, exist_ok=True)
        try:
            dataset(root, url=subset, download=True)
        except Exception as e:  # torchaudio raises what urllib, tarfile and its own checks raise
            raise InputError(f"cannot download {name}: {e}") from e
        folders.append(root / inside / subset)
    return folders


# --------------------------------------------------------------------------------------------------------------
# The passes: check every clip, then fill audio, SSL features and latents, each chunk by chunk.


def each_chunk(work: Path, name: str, count: int, do, rank: int, world: int) -> None:
    """do(k) for this rank's share of the chunks 0 … count-1 that are not marked as done; do returns how to say "done"."""
    work.mkdir(parents=True, exist_ok=True)
    todo = [k for k in range(rank, count, world) if not (work / f"{name}-{k}").exists()]
    for k in tqdm(todo, desc=name, unit="chunk", disable=rank > 0, mininterval=1):
        note = do(k)
        write_atomic(work / f"{name}-{k}", lambda p: p.write_text(json.dumps(note), encoding="utf-8"))
    barrier()


def check_clip(clip, args):
    """(samples, "") of a clip that is fit for training, else (0, why it is not)."""
    _, path, _, text, _ = clip
    if not normalize_text(text, args.text):
        return 0, "empty text"
    try:
        wave = read_audio(path, args.sample_rate)
    except InputError as e:
        return 0, "no samples" if "no samples" in str(e) else "unreadable"
    if not np.isfinite(wave).all():
        return 0, "non-finite samples"
    if len(wave) < args.min_seconds * args.sample_rate:
        return 0, f"shorter than {args.min_seconds} s"
    if len(wave) > args.max_seconds * args.sample_rate:
        return 0, f"longer than {args.max_seconds} s"
    if np.abs(wave).max() < 1e-3:
        return 0, "silent"
    return len(wave), ""


def make_index(clips, args, out: Path, rank: int, world: int) -> None:
    """Check every clip, then write index.tsv, dropped.tsv and the first meta.json."""
    work = out / "work"
    chunks = math.ceil(len(clips) / args.chunk)
    with ThreadPoolExecutor(args.workers) as pool:
        each_chunk(work, "check", chunks, lambda k: list(pool.map(lambda c: check_clip(c, args), clips[k * args.chunk : (k + 1) * args.chunk])), rank, world)
    if rank > 0:
        return
    verdicts = [v for k in range(chunks) for v in json.loads((work / f"check-{k}").read_text())]
    kept = [(*clip, samples) for clip, (samples, _) in zip(clips, verdicts) if samples]
    dropped = [(clip[0], why) for clip, (_, why) in zip(clips, verdicts) if why]
    write_atomic(out / "dropped.tsv", lambda p: p.write_text("".join(f"{name}\t{why}\n" for name, why in dropped), encoding="utf-8"))
    if not kept:
        raise InputError(f"all {len(clips)} clips were dropped; the reasons are in {out / 'dropped.tsv'}, the first: {dropped[0][1]}")
    if not any(c[4] for c in kept):  # no split given: the clips whose names hash lowest are for validation
        order = sorted(range(len(kept)), key=lambda i: zlib.crc32(kept[i][0].encode()))
        chosen = set(order[: max(1, round(args.valid * len(kept)))] if len(kept) > 1 else [])
        kept = [(*c[:4], "valid" if i in chosen else "train", c[5]) for i, c in enumerate(kept)]
    line = lambda name, path, speaker, text, split, samples: f"{name}\t{split or 'train'}\t{speaker}\t{samples}\t{normalize_text(text, args.text)}\n"
    write_atomic(out / "index.tsv", lambda p: p.write_text("id\tsplit\tspeaker\tsamples\ttext\n" + "".join(line(*c) for c in kept), encoding="utf-8"))
    total = sum(c[5] for c in kept)
    meta = dict(format=1, sample_rate=args.sample_rate, text=args.text, teacher=args.ssl, layer=args.layer, sources=[str(s) for s in args.source], clips=len(kept),
                hours=round(total / args.sample_rate / 3600, 4), speakers=len({c[2] for c in kept}), dropped=len(dropped),
                max_seconds=round(max(c[5] for c in kept) / args.sample_rate, 3))  # fmt: skip
    write_atomic(out / "index.json", lambda p: p.write_text(json.dumps(meta)))  # becomes meta.json when the audio is there


def fill(out: Path, name: str, settings: dict, rows: int, width: tuple, dtype: str, make, chunks: int, rank: int, world: int) -> None:
    """Fill `name`.bin [rows, *width] in place: make(k) gives (first row, array) of chunk k of the clips.

    Every rank writes its chunks into one file that becomes `name`.bin when all are done; what another model or VAE left
    half-done is begun anew."""
    work, shape = out / "work", (rows, *width)
    stamp, path = work / f"{name}.json", work / f"{name}.bin"
    if rank == 0 and (not stamp.exists() or json.loads(stamp.read_text()) != settings or not path.exists()):
        for old in work.glob(f"{name}-*"):
            old.unlink()
        work.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as f:
            f.truncate(math.prod(shape) * np.dtype(dtype).itemsize)
        write_atomic(stamp, lambda p: p.write_text(json.dumps(settings)))
    barrier()
    array = np.memmap(path, dtype, "r+", shape=shape)

    def do(k):
        first, values = make(k)
        array[first : first + len(values)] = values
        array.flush()

    each_chunk(work, name, chunks, do, rank, world)


def finish(out: Path, name: str, entry: dict) -> None:
    """Move the filled array to its place and enter it in meta.json, in an order that never pairs old numbers with new notes."""
    path = out / "meta.json" if (out / "meta.json").exists() else out / "index.json"
    meta = read_json(path)
    if meta.pop(name, None) and path.name == "meta.json":
        write_atomic(path, lambda p: p.write_text(json.dumps(meta, indent=2), encoding="utf-8"))
    os.replace(out / "work" / f"{name}.bin", out / f"{name}.bin")
    meta[name] = entry
    write_atomic(out / "meta.json", lambda p: p.write_text(json.dumps(meta, indent=2), encoding="utf-8"))
    shutil.rmtree(out / "work")
    (out / "index.json").unlink(missing_ok=True)


def fill_audio(clips, args, out: Path, rank: int, world: int) -> None:
    lines = (out / "index.tsv").read_text(encoding="utf-8").splitlines()[1:]
    names, samples = [line.split("\t")[0] for line in lines], np.array([int(line.split("\t")[3]) for line in lines])
    paths, offsets = {c[0]: c[1] for c in clips}, np.concatenate([[0], samples.cumsum()])

    def make(k):
        part = slice(k * args.chunk, (k + 1) * args.chunk)
        with ThreadPoolExecutor(args.workers) as pool:
            waves = list(pool.map(lambda n: read_audio(paths[n], args.sample_rate), names[part]))
        for name, wave, expected in zip(names[part], waves, samples[part]):
            if len(wave) != expected:
                raise InputError(f"{paths[name]} changed while it was being read: remove {out} and run again")
        return offsets[part.start], (np.concatenate(waves).clip(-1, 1) * 32767).round().astype(np.int16)

    fill(out, "audio", dict(chunk=args.chunk), int(offsets[-1]), (), "int16", make, math.ceil(len(names) / args.chunk), rank, world)
    if rank == 0:
        finish(out, "audio", dict(shape=[int(offsets[-1])], dtype="int16", rate=args.sample_rate))
    barrier()


def weights_hash(folder: Path) -> str:
    """A hash of a local model's weights, in place of a hub revision."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    return "sha256:" + hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


class SSLModel:
    """A frozen Hugging Face speech encoder: WavLM, HuBERT, wav2vec 2.0, XLS-R, w2v-BERT, a Whisper encoder…

    The waves go through the model's own feature extractor (zero mean and unit variance, where it was trained so)."""

    layers = 1  # side by side in the features

    def __init__(self, name: str, layer: int | str = -1, device=torch.device("cpu")):
        """layer: a hidden state, -1 for the last, or "all": every one, side by side."""
        from transformers import AutoFeatureExtractor, AutoModel
        from transformers.utils import logging

        logging.set_verbosity_error()  # a CTC head left out is not worth a page of warning
        logging.disable_progress_bar()
        try:
            self.extractor = AutoFeatureExtractor.from_pretrained(name)
            model = AutoModel.from_pretrained(name)
        except (OSError, ValueError) as e:
            raise InputError(f"cannot load the SSL model {name}: {str(e).splitlines()[0]}") from e
        self.name, self.layer, self.device = name, layer, device
        self.revision = weights_hash(Path(name)) if Path(name).is_dir() else model.config._commit_hash
        self.layers = getattr(model.config, "num_hidden_layers", 0) + 1 if layer == "all" else 1
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
        options = {} if self.whisper else dict(padding=True, return_attention_mask=not self.equal_lengths)
        inputs = self.extractor(waves, sampling_rate=self.sample_rate, return_tensors="pt", **options).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            out = self.model(**inputs, output_hidden_states=self.layer != -1)
        states = out.last_hidden_state if self.layer == -1 else torch.cat(out.hidden_states, -1) if self.layer == "all" else out.hidden_states[self.layer]
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


def fill_ssl(args, out: Path, rank: int, world: int, device) -> None:
    data = Data(out)
    if "ssl" in data.meta and (found := (data.meta["ssl"]["model"], data.meta["ssl"]["layer"])) != (args.ssl, args.layer):
        raise InputError(f"{out} already holds SSL features of {found[0]}, layer {found[1]}, not {args.ssl}, layer {args.layer}: choose another --out")
    if "ssl" in data.meta:
        return
    ssl = load_teacher(args.ssl, args.layer, data.rate, device)
    counts = np.array([frame_count(int(n), data.rate, ssl.rate) for n in data.samples])
    offsets = np.concatenate([[0], counts.cumsum()])

    def make(k):
        part = range(k * args.chunk, min((k + 1) * args.chunk, len(counts)))
        features = [None] * len(part)
        for batch in ssl.batches([int(data.samples[i]) for i in part], args.batch_seconds):
            for j, x in zip(batch, ssl([data.get("audio", part[j]).numpy() for j in batch])):
                if not torch.isfinite(x).all() or x.abs().max() > 65000:
                    raise InputError(f"{args.ssl} gives features that are not finite in float16 for {data.clips[part[j]]['id']}: take the clip out or choose another --layer")
                features[j] = repeat_last(x[: counts[part[j]]], int(counts[part[j]]))
        return offsets[part.start], torch.cat(features).half().cpu().numpy()

    entry = ssl.facts()
    fill(out, "ssl", entry | dict(chunk=args.chunk), int(offsets[-1]), (ssl.width,), "float16", make, math.ceil(len(counts) / args.chunk), rank, world)
    if rank == 0:
        finish(out, "ssl", dict(entry, shape=[int(offsets[-1]), ssl.width], dtype="float16"))
    barrier()


@torch.no_grad()
def fill_latents(args, out: Path, rank: int, world: int, device) -> None:
    """The posterior of every clip, and each channel's mean and standard deviation over the training split."""
    data, vae = Data(out), SemanticVAE.from_pretrained(args.vae)
    vae_hash = vae.latents_hash()
    known = data.meta.get("latents", {})
    if known.get("vae_hash") == vae_hash:
        if rank == 0 and known["vae"] != str(args.vae):  # another decoder of the same latents
            meta = data.meta | dict(latents=known | dict(vae=str(args.vae)))
            write_atomic(out / "meta.json", lambda p: p.write_text(json.dumps(meta, indent=2), encoding="utf-8"))
        barrier()
        return
    if vae.config.sample_rate != data.rate:
        raise InputError(f"{args.vae} works at {vae.config.sample_rate} Hz, {out} holds {data.rate} Hz")
    vae, dim, rate = vae.to(device), vae.config.latent_dim, Fraction(data.rate, vae.config.hop)
    offsets = np.concatenate([[0], np.cumsum([frame_count(int(n), data.rate, rate) for n in data.samples])])

    def make(k):
        part = range(k * args.chunk, min((k + 1) * args.chunk, len(data.clips)))
        latents = [torch.stack(vae.encode(data.get("audio", i)[None].to(device)), 2)[0] for i in part]  # [N, 2, D]
        return offsets[part.start], torch.cat(latents).cpu().half().numpy()

    entry = dict(vae=str(args.vae), vae_hash=vae_hash, dim=dim, hop=vae.config.hop, rate=str(rate), shape=[int(offsets[-1]), 2, dim], dtype="float16")
    fill(out, "latents", entry | dict(chunk=args.chunk), int(offsets[-1]), (2, dim), "float16", make, math.ceil(len(data.clips) / args.chunk), rank, world)
    if rank == 0:
        array = np.memmap(out / "work" / "latents.bin", "float16", "r", shape=tuple(entry["shape"]))
        total, square, count = np.zeros(dim), np.zeros(dim), 0
        for i in data.split("train"):  # z = mean + ε · std has the moments E[mean] and E[mean² + std²]
            mean, logvar = array[offsets[i] : offsets[i + 1]].astype(np.float64).transpose(1, 0, 2)
            total, square, count = total + mean.sum(0), square + (mean**2 + np.exp(logvar)).sum(0), count + len(mean)
        mean = total / count
        std = np.sqrt(square / count - mean**2)
        if not np.isfinite(std).all():
            raise InputError(f"the latents of {args.vae} are not finite: train it again")
        finish(out, "latents", dict(entry, mean=mean.tolist(), std=std.tolist()))
    barrier()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="*", help="folders in LibriTTS, LibriSpeech, VCTK or LJSpeech layout, or manifests (audio|speaker|text with header); default: the demo corpus")
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="the data folder to make or add to (default %(default)s)")
    parser.add_argument("--layout", choices=["auto", *LAYOUTS], default="auto", help="how the source folders are laid out (default: detected)")
    parser.add_argument("--download", help="LibriTTS subsets to fetch first, e.g. train-clean-100,dev-clean; LibriSpeech's as librispeech:test-clean")
    parser.add_argument("--download-to", type=Path, default=Path("downloads"), help="where downloads are kept (default %(default)s)")
    parser.add_argument("--ssl", help="teacher: hub id or folder of a speech encoder, several with commas between, \"mel\", or \"none\" (default: for the demo corpus the demo's; the paper's is microsoft/wavlm-large)")
    parser.add_argument("--layer", type=layer_number, default=-1, help="hidden state to store, -1 for the last, \"all\" for a learned mix (default %(default)s)")
    parser.add_argument("--vae", help="add the latents of this VAE: a run, an authors' release, or a hub id")
    parser.add_argument("--text", choices=["plain", "raw"], help="plain: lower case without punctuation; raw: as written (default: plain for the demo corpus, else raw)")
    parser.add_argument("--sample-rate", type=int, default=16000, help="of the stored audio, in Hz (default %(default)s)")
    parser.add_argument("--min-seconds", type=float, default=0.5, help="drop shorter clips (default %(default)s)")
    parser.add_argument("--max-seconds", type=float, default=30, help="drop longer clips (default %(default)s)")
    parser.add_argument("--valid", type=float, default=0.01, help="share of clips for validation where the source names none (default %(default)s)")
    parser.add_argument("--batch-seconds", type=float, default=60, help="audio in one batch of the teacher (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=128, help="clips done together, the unit of sharing and of resuming (default %(default)s)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="threads that read audio (default %(default)s)")
    args = parser.parse_args(argv)
    if args.source or args.download:
        if not args.ssl:
            raise InputError("name the teacher with --ssl: the paper's is microsoft/wavlm-large; none stores no features, for a vanilla VAE")
        args.text = args.text or "raw"
    elif not (args.out / "meta.json").exists():
        args.source, args.ssl, args.text = [DEMO / "corpus"], args.ssl or str(DEMO / "ssl"), args.text or "plain"
    return args


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_ranks()
    out, held = args.out, lock(args.out) if rank == 0 else None
    if args.download:
        if rank == 0:
            download(args.download, args.download_to)
        barrier()
        args.source += download(args.download, args.download_to)
    if args.source:
        clips = [(f"{s}:{c[0]}" if len(args.source) > 1 else c[0], *c[1:]) for s in args.source for c in list_clips(s, args.layout)]
        made_of = [[str(s) for s in args.source], len(clips), args.sample_rate, args.text]
        settings, path = json.dumps([*made_of, args.min_seconds, args.max_seconds, args.valid, args.chunk]), out / "settings.json"
        if path.exists() and path.read_text() != settings:
            raise InputError(f"{out} was made with other settings ({path.read_text()}), not {settings}: choose another --out or remove it")
        if rank == 0:
            write_atomic(path, lambda p: p.write_text(settings))
        if not (out / "meta.json").exists():
            if not (out / "index.json").exists():
                make_index(clips, args, out, rank, world)
                barrier()
            fill_audio(clips, args, out, rank, world)
    if not args.ssl:  # a folder that is added to, or whose features were interrupted: what it was begun with
        meta = Data(out).meta
        args.ssl, args.layer = meta["teacher"], meta.get("ssl", meta).get("layer", -1)
    if args.ssl != "none":
        fill_ssl(args, out, rank, world, device)
    if args.vae:
        fill_latents(args, out, rank, world, device)
    if rank == 0:
        meta = read_json(out / "meta.json")
        dropped = [line.split("\t") for line in (out / "dropped.tsv").read_text(encoding="utf-8").splitlines()]
        for name, why in dropped[:20]:
            print(f"dropped {name}: {why}")
        for why, count in sorted(Counter(why for _, why in dropped).items()):
            print(f"dropped {count}: {why} (all listed in {out / 'dropped.tsv'})")
        has = ", ".join(f"{name} {meta[name]['shape']}" for name in ("audio", "ssl", "latents") if name in meta)
        print(f"{out}: {meta['clips']} clips, {meta['hours']:.2f} hours, {meta['speakers']} speakers; {has}")


if __name__ == "__main__":
    cli(main)
