"""Speak any text in the voice of a reference recording.

    python sample.py --text "did you see the bird again"                   # the demo's weights, in a demo voice
    python sample.py --tts runs/tts --ref voice.wav --ref-text "What it says." --text "What it shall say." \\
        --out said.wav
    python sample.py --list demo/corpus/test.lst --out runs/samples        # many, in batches; keeps what is there
    torchrun --standalone --nproc_per_node 8 sample.py --list ...          # shared between 8 GPUs

Without --ref-text the prompt is transcribed by --asr. Long text is cut at sentence ends, so that prompt and piece
together stay within the length the model was trained on; the pieces are joined by a short cross-fade. Interrupted, what
was said so far is kept beside --out.
"""

import argparse
import functools
import math
import re
import time
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm, trange

from evaluate import UNSPACED, Recognizer, error_rates, find_audio, read_list
from model import (DiT, DiTConfig, InputError, SemanticVAE, fold_weight_norm, local_folder, package, read_json, sample,
                   write_json)  # fmt: skip
from prepare import (DEMO, FORMATS, at_least, barrier, cli, differences, file_stamp, has_bfloat16, lock, loudness,
                     normalize_text, read_audio, revision, start_ranks, switch, write_wave)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# From text to symbols, and to places in time.


@dataclass
class Request:
    """What to say and in whose voice."""

    prompt: np.ndarray  # float32 [T] at the model's rate
    prompt_text: str  # what the prompt says
    text: str  # what to say
    seconds: float | None = None  # how long (None: at the prompt's rate)


def to_bytes(text: str) -> torch.Tensor:
    """UTF-8 bytes as symbols [L]: any language, nothing out of vocabulary."""
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.long)


def to_symbols(text: str, vocabulary: str) -> torch.Tensor:
    """A text as lines of the vocabulary [L], 0 for what it lacks; as bytes if there is none. F5-TTS's symbols are
    characters, with a space between words that touch, and for each Chinese one a space and its pinyin."""
    if not vocabulary:
        return to_bytes(text)
    symbols = []
    text = text.translate(str.maketrans(";“”‘’", ",\"\"''"))
    words = re.findall(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*%?|[+#&._%-]+|.", text, re.S)  # as rjieba cuts English
    chinese = re.compile("[\u3100-\u9fff]+")
    if chinese.search(text):
        words = package("rjieba", "to find Chinese words").cut(text)
        pinyin = package("pypinyin", "to read Chinese")
    for word in words:
        if word.isascii() and len(word) > 1 and symbols and symbols[-1] not in " :'\"":
            symbols.append(" ")
        for part in [word] if chinese.fullmatch(word) else word:
            if chinese.match(part):
                for sound in pinyin.lazy_pinyin(part, pinyin.Style.TONE3, tone_sandhi=True):
                    symbols += [" ", sound]
            else:
                symbols.append(part)
    places = {symbol: i for i, symbol in enumerate(vocabulary.split("\n"))}
    return torch.tensor([places.get(symbol, 0) for symbol in symbols])


@torch.no_grad()
def plan(dit: DiT, prompt_frames: int, request: Request, speed: float = 1.0) -> tuple[int, torch.Tensor]:
    """(frames of prompt and target, the frame at which each byte of `prompt_text text` starts [L]).

    Bytes last as long as the DiT's duration predictor says, or all alike if it has none. The prompt's durations are
    scaled to its frames, and the target continues at that rate. Never fewer frames than bytes."""
    prompt = to_bytes(request.prompt_text + " ")
    target = to_bytes(request.text)
    text = torch.cat([prompt, target])
    durations = torch.ones(len(text), dtype=torch.float64)
    if dit.durations:  # each text alone: together, the target would begin like the middle of a sentence
        parts = [part[None].to(dit.latent_mean.device) for part in (prompt[:-1], target)]
        said, following = (dit.durations(part)[0].exp().double().cpu() for part in parts)
        durations = torch.cat([said, torch.zeros(1), following])  # the space between lasts for nothing, as in training
    elif len(target) < 10:
        speed *= 0.3  # F5-TTS's rule: a word alone would be rushed
    durations *= prompt_frames / durations[: len(prompt)].sum()
    frames = int(durations[len(prompt) :].sum() / speed + 1e-6)
    if request.seconds:
        frames = round(request.seconds * dit.config.sample_rate / dit.config.hop)
        if prompt_frames + frames <= len(text):
            raise InputError(f"--duration {request.seconds} is too short: prompt and text have {len(text)} bytes, for "
                             f"{prompt_frames + frames} frames")
    total = max(prompt_frames + frames, prompt_frames + 1, len(text) + 1)
    durations[len(prompt) :] *= (total - prompt_frames) / durations[len(prompt) :].sum()
    return total, (durations.cumsum(0) - durations).float()


# ----------------------------------------------------------------------------------------------------------------------
# From requests to audio.


@torch.no_grad()
def synthesize(dit, vae, requests, steps=32, cfg=2.0, speed=1.0, seed=0, batch_size=8, bf16=False):
    """float32 audio of each Request's text alone, in order. A result does not depend on its batch: noise is drawn on
    the CPU from (seed, text). Silence or non-finite audio is an InputError."""
    device = dit.latent_mean.device
    config = dit.config
    gains = [1.0] * len(requests)
    if config.vocabulary:  # F5-TTS raises quiet prompts to an RMS of 0.1
        gains = [max(1.0, 0.1 / np.square(r.prompt).mean() ** 0.5) for r in requests]
    waves = [torch.from_numpy(r.prompt * np.float32(gain))[None].to(device) for r, gain in zip(requests, gains)]
    prompts = [dit.standardize(vae.encode(wave)[0])[0] for wave in waves]  # each [P, D]; the means
    texts = [to_symbols(f"{r.prompt_text} {r.text}", config.vocabulary) for r in requests]
    plans = [plan(dit, len(prompt), r, speed) for prompt, r in zip(prompts, requests)]
    totals = [max(total, len(text) + 1) for (total, _), text in zip(plans, texts)]  # symbols may outnumber bytes
    draws = [torch.Generator().manual_seed(zlib.crc32(f"{seed} {r.text}".encode())) for r in requests]
    noises = [torch.randn(total, config.latent_dim, generator=draw) for total, draw in zip(totals, draws)]

    def pad(tensors, value=0.0) -> torch.Tensor:
        return pad_sequence(tensors, batch_first=True, padding_value=value).to(device)

    results = [None] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: totals[i])
    for batch in [order[i : i + batch_size] for i in range(0, len(order), batch_size)]:
        x = pad([noises[i] for i in batch])  # [B, N, D]
        prompt = pad([F.pad(prompts[i], (0, 0, 0, totals[i] - len(prompts[i]))) for i in batch])  # [B, N, D]
        prompt_lengths = torch.tensor([len(prompts[i]) for i in batch], device=device)
        lengths = torch.tensor([totals[i] for i in batch], device=device)
        text = pad([texts[i] for i in batch], -1)
        starts = pad([plans[i][1] for i in batch], math.inf)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            latents = sample(dit, x, prompt, prompt_lengths, text, lengths, steps, cfg, starts=starts)  # [B, N, D]
        for z, i in zip(dit.destandardize(latents), batch):
            first = max(0, len(prompts[i]) - vae.CONTEXT)  # of the prompt, only what the target's samples depend on
            wave = vae.decode(z[None, first : totals[i]])[0].cpu().numpy()
            wave = wave[(len(prompts[i]) - first) * config.hop :]
            if not np.isfinite(wave).all() or np.abs(wave).max() < 1e-4:
                what = "silence" if np.isfinite(wave).all() else "non-finite audio"
                raise InputError(f"the model made {what} of {requests[i].text!r}: try another --seed (of a --list, "
                                 "also another --out), or train longer")
            results[i] = wave / np.float32(gains[i])
    return results


def check_prompt(wave, text: str, rate: int, limit: float, what="the prompt") -> tuple[np.ndarray, list[str]]:
    """The prompt without its silent edges, and what a user should know of it. What cannot work is an InputError."""
    if not np.isfinite(wave).all():
        raise InputError(f"{what} holds non-finite samples")
    levels, loudest = loudness(wave, rate)
    if not loudest:
        raise InputError(f"{what} is silent")
    loud = np.flatnonzero(levels > 0.03 * loudest) * (rate // 50)
    edge = rate // 10
    trimmed = wave[max(0, loud[0] - edge) : loud[-1] + rate // 50 + edge]
    seconds = len(trimmed) / rate
    cut = (len(wave) - len(trimmed)) / rate
    if seconds < 0.5:
        raise InputError(f"{what} holds {seconds:.2f} s of speech, too little to hear a voice in: give at least "
                         "0.5 s, better 2 s or more")
    if seconds > limit:
        raise InputError(f"{what} is {seconds:.1f} s, limit {limit:.1f} s for this model: cut audio and transcript "
                         "together")
    pace = len(text) / seconds
    notes = {
        f"trimmed {cut:.2f} s of silence from its edges": cut > 0.05,
        f"it is short ({seconds:.1f} s): 2 s or more catch a voice better": seconds < 2,
        "it is clipped": (np.abs(trimmed) > 0.99).mean() > 1e-3,
        f"its transcript has {pace:.0f} characters a second: does it say what is heard?": text and not 2 < pace < 30,
    }
    return trimmed, [note for note, found in notes.items() if found]


MARKS = "".join(c for c in map(chr, range(0x3100)) if unicodedata.category(c)[0] == "M")  # they follow their character
CUTS = (  # sentence ends, commas, spaces, and characters where no spaces are written
    r"(?<=[.!?])(?=\s)|(?<=[.!?][\"'”’)])(?=\s)|(?<=[。！？])(?![」』”])|(?<=[。！？][」』”])",
    r"(?<=[,;:])(?=\s)|(?<=[，；：])",
    r"(?=\s)",
    f"(?<=[{UNSPACED}])(?=[{UNSPACED}])(?![{MARKS}])",
)


def split_text(text: str, limit: int) -> list[str]:
    """Pieces of at most `limit` bytes, cut at the first of CUTS that will do."""
    pieces = [text]
    for pattern in CUTS:
        finer = []
        for piece in pieces:
            first, *parts = re.split(pattern, piece) if len(piece.encode()) > limit else [piece]
            finer.append(first)
            for part in parts:
                if len((finer[-1] + part).encode()) <= limit:
                    finer[-1] += part
                else:
                    finer.append(part.lstrip())
        pieces = [piece for piece in finer if piece]
    if any(len(piece.encode()) > limit for piece in pieces):
        raise InputError(f"a word of the text is longer than the {limit} bytes that fit after this prompt: give a "
                         "shorter prompt")
    return pieces


def join(waves: list[np.ndarray], rate: int) -> np.ndarray:
    """One after another with 20 ms of cross-fade, so that no joint clicks."""
    out = waves[0]
    fade = rate // 50
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    for wave in waves[1:]:
        out = np.concatenate([out[:-fade], out[-fade:] * (1 - ramp) + wave[:fade] * ramp, wave[fade:]])
    return out


# ======================================================================================================================
# You can stop here. Below: one text or a list, files, messages and flags.


def load(tts: str, vae: str | None, device) -> tuple[DiT, SemanticVAE, dict]:
    """The DiT, the VAE whose latents it speaks in (any other is refused), and the notes in the DiT's config.json."""
    folder = local_folder(tts)
    dit = DiT.from_pretrained(folder).to(device)
    notes = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if not isinstance(notes.get("vae", ""), str) or not isinstance(notes.get("sampling", {}), dict):
        raise InputError(f"{folder / 'config.json'} is damaged: its vae or sampling is not as train_tts.py writes it")
    if not vae:
        vae = notes.get("vae", "charactr/vocos-mel-24khz" if dit.config.vocabulary else "")
        vae = folder / vae if vae and (folder / vae).is_dir() else vae  # noted from there
    if not vae:
        raise InputError(f"{tts} does not say where its VAE is: name it with --vae")
    decoder = SemanticVAE.from_pretrained(vae).to(device)
    if decoder.latents_hash() != dit.config.vae_hash:
        raise InputError(f"{tts} was trained on the latents of VAE {dit.config.vae_hash}, {vae} is "
                         f"{decoder.latents_hash()}: name the right one with --vae")
    notes |= dict(tts_name=revision(folder), vae_name=decoder.content_hash())  # before folding, which renames weights
    return dit, fold_weight_norm(decoder), notes


def normalized(text: str, mode: str, what: str) -> str:
    """A text as the model was taught it; one that says nothing is an InputError."""
    said = normalize_text(text, mode)
    if not any(map(str.isalnum, said)):
        raise InputError(f"nothing to say: {what} is empty, or punctuation alone")
    return said


def warn_of_unknown(texts: list[str], notes: dict, config: DiTConfig) -> None:
    """Normalisation drops signs. Bytes can spell what no training text had: the model says something, but hardly that.
    A vocabulary cannot."""
    found = sorted(set(normalize_text(" ".join(texts), config.text)))
    signs = (c for c in set("".join(texts)).difference(found) if c in "&%@#" or unicodedata.category(c)[0] == "S")
    lost = " ".join(sorted(signs))
    if lost:
        print(f"the model was taught no signs: {lost} will not be said; write words for them")
    unknown = sorted(set(found) - set(notes.get("characters", found)))
    why = "the training texts had no {}: what the model makes of that is a guess"
    if config.vocabulary:
        unknown = [c for c in found if c != " " and to_symbols(c, config.vocabulary)[-1] == 0]
        why = "the vocabulary has no {}: the model reads a space there"
    if unknown:
        print(why.format(" ".join(unknown)))


def make_requests(args, dit: DiT, device) -> list[Request]:
    """The text in pieces that fit after the prompt."""
    rate = dit.config.sample_rate
    limit = dit.config.max_seconds
    text = normalized(args.text, dit.config.text, "the text")
    wave = read_audio(args.ref, rate)
    check_prompt(wave, "", rate, limit / 2)  # before a recogniser, whose memory a long one would fill
    ref_text = args.ref_text
    if ref_text is None:
        asr = Recognizer(args.asr, device, args.language)
        ref_text = asr([wave], rate)[0]
        unsure = "; the demo's recogniser knows 150 words: if that is wrong, give --ref-text" if asr.demo else ""
        print(f"the prompt's transcript, by {args.asr}: {ref_text!r}{unsure}")
    ref_text = normalized(ref_text, dit.config.text, "the transcript of the prompt")
    if dit.config.vocabulary and ref_text[-1] not in ".。":  # F5-TTS's prompts end so
        ref_text += "."
    wave, notes = check_prompt(wave, ref_text, rate, limit / 2)
    for note in notes:
        print(f"prompt: {note}")
    seconds = len(wave) / rate
    if args.duration and args.duration + seconds > limit * 1.01:
        raise InputError(f"prompt and --duration make {args.duration + seconds:.1f} s, the model was trained on at "
                         f"most {limit:.1f} s")
    frames = math.ceil(len(wave) / dit.config.hop)
    requests = [Request(wave, ref_text, text, args.duration)]
    most = limit * rate / dit.config.hop
    room = len(text.encode())  # of a piece: less and less, until the longest fits into what was trained on
    while not args.duration and room > 1:
        longest = max(plan(dit, frames, r, args.speed)[0] for r in requests)
        if longest <= most:
            break
        room = int(room * max(0.5, 0.99 * (most - frames) / (longest - frames)))
        requests = [Request(wave, ref_text, piece) for piece in split_text(text, max(1, room))]
    slow = sum(total == len(starts) + 1 for total, starts in (plan(dit, frames, r, args.speed) for r in requests))
    if slow and not args.duration:
        print(f"{slow} of {len(requests)} pieces have more bytes than frames at this pace: they are drawn out")
    return requests


def say(args, dit, vae, generate, notes, device) -> None:
    """One text in one voice."""
    rate = dit.config.sample_rate
    requests = make_requests(args, dit, device)
    warn_of_unknown([args.text, args.ref_text or ""], notes, dit.config)
    text = " ".join(request.text for request in requests)
    asr = Recognizer(args.asr, device, args.language) if args.takes > 1 else None
    if asr:
        asr.warn([text])
    start = time.time()
    takes = []
    for take in range(args.takes):
        waves = []
        try:
            short = len(requests) <= args.batch_size
            for i in trange(0, len(requests), args.batch_size, desc="batches", disable=short):
                waves += generate(dit, vae, requests[i : i + args.batch_size], seed=args.seed + take)
        except (KeyboardInterrupt, InputError, torch.OutOfMemoryError):
            if takes:
                print(f"{args.out}: the best of {len(takes)} takes")
            elif waves:
                part = args.out.with_stem(args.out.stem + ".part")
                write_wave(part, join(waves, rate), rate)
                following = requests[len(waves)].text
                print(f"{part}: the first {len(waves)} of {len(requests)} pieces; the next is {following!r}")
            raise
        said = join(waves, rate)
        error = 0.0
        if args.takes > 1:
            error = error_rates([text], asr([said], rate))["cer"]
            print(f"take {take} (seed {args.seed + take}): character error rate {error:.1%} by {args.asr}")
        takes.append((error, take, said))
        write_wave(args.out, min(takes)[2], rate)  # the best so far; no two have one number: waves are not compared
    error, take, said = min(takes)
    spent = time.time() - start
    for request in requests if len(requests) > 1 else []:
        print(f"piece: {request.text}")
    seconds = len(said) / rate
    chosen = f", take {take}" if args.takes > 1 else ""
    print(f"{args.out}: {seconds:.2f} s, {len(text) / seconds:.0f} characters a second{chosen}; real-time factor "
          f"{spent / seconds / args.takes:.2f}")


def say_list(args, dit, vae, generate, notes, rank, world) -> None:
    """Every line of a list in LibriSpeech-PC's six columns; wavs that are there already are kept."""
    rate = dit.config.sample_rate
    limit = dit.config.max_seconds
    lines = read_list(args.list)[: args.limit]
    prompts = {line.ref: find_audio(args.ref_dir or args.list.parent, line.ref) for line in lines}
    settings = {name: getattr(args, name) for name in ("seed", "steps", "cfg", "speed", "bf16")}
    settings |= dict(list=args.list.name, tts=notes["tts_name"], vae=notes["vae_name"])
    said = {line.wav: [line.says, *file_stamp(prompts[line.ref])] for line in lines}
    stamp = args.out / "settings.json"
    found = read_json(stamp) if stamp.exists() else {}
    before = found.pop("said", {})
    there = [wav for wav in said if (args.out / wav).exists()]
    differ = differences(found | {wav: before.get(wav) for wav in there}, settings | {wav: said[wav] for wav in there})
    if differ and (found or there):
        raise InputError(f"{args.out} was made with other settings, texts or prompts ({differ}): choose another --out")
    todo = [line for line in lines if line.wav not in there]

    def request(line) -> Request:  # the prompt whole: the protocol's lengths are those of whole prompts
        ref_text = normalized(line.ref_text, dit.config.text, f"the text of {line.ref}")
        text = normalized(line.text, dit.config.text, f"the text of {line.gen}")
        return Request(read_audio(prompts[line.ref], rate), ref_text, text)

    for line in todo:  # all of them, before anything is spent
        wanted = request(line)
        check_prompt(wanted.prompt, wanted.prompt_text, rate, limit, f"{line.ref}: the prompt")
        frames, _ = plan(dit, math.ceil(len(wanted.prompt) / dit.config.hop), wanted, args.speed)
        seconds = frames * dit.config.hop / rate
        if seconds > 2 * limit:
            raise InputError(f"{line.gen} takes {seconds:.1f} s with its prompt, the model was trained on at most "
                             f"{limit:.1f} s: shorten text or prompt")
    held = lock(args.out) if rank == 0 else None
    barrier()  # all ranks have seen the same files before the first is written
    if rank == 0:
        print(f"{len(lines)} lines, {len(there)} there already")
        warn_of_unknown([text for line in todo for text in (line.text, line.ref_text)], notes, dit.config)
        write_json(stamp, settings | dict(said=before | said))
    todo = sorted(todo, key=lambda line: line.ref_seconds + line.gen_seconds)[rank::world]
    start = time.time()
    seconds = 0.0
    for i in tqdm(range(0, len(todo), args.batch_size), desc="batches", disable=rank > 0):
        batch = todo[i : i + args.batch_size]
        for line, wave in zip(batch, generate(dit, vae, [request(line) for line in batch], seed=args.seed)):
            write_wave(args.out / line.wav, wave, rate)
            seconds += len(wave) / rate
    if rank == 0 and seconds:
        print(f"{args.out}: rank 0 made {seconds:.1f} s at a real-time factor of {(time.time() - start) / seconds:.2f}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--tts", default=str(DEMO / "tts"), help="run folder of train_tts.py, or hub id (default: the demo's)")
    flag("--vae", help="folder or hub id of its VAE (default: where the TTS run says; F5-TTS's: Vocos)")
    flag("--ref", type=Path, help="recording of the voice (default: the demo's)")
    flag("--ref-text", help="what the recording says (default: transcribed by --asr)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", help="what to say (default without --ref: a demo sentence)")
    file = argparse.FileType(encoding="utf-8-sig", errors="surrogateescape")
    text.add_argument("--text-file", type=file, help="a file that holds what to say")
    flag("--out", type=Path, help=f"file in {', '.join(FORMATS)}, or folder with --list")
    flag("--list", type=Path, help="say every line of a list in LibriSpeech-PC's six columns")
    flag("--ref-dir", type=Path, help="where the list's recordings are (default: beside the list)")
    flag("--limit", type=at_least(1), help="only the first so many lines of the list")
    flag("--steps", type=at_least(1), help="Euler steps (default: the model's; the paper's 32)")
    flag("--cfg", type=at_least(0, float), help="guidance strength (default: the model's; the paper's 2)")
    flag("--speed", type=at_least(0.3, float, 3), default=1, help="relative to the prompt's rate (default %(default)s)")
    flag("--duration", type=at_least(0.1, float), help="seconds of the result (default: at the prompt's rate)")
    flag("--takes", type=at_least(1), default=1, help="make several and keep the one that --asr understands best")
    flag("--asr", default=str(DEMO / "ssl"), help="recogniser, hub id or folder (default: the demo's)")
    flag("--language", default="en", help="of a multilingual Whisper (default %(default)s)")
    flag("--bf16", **switch(has_bfloat16()), help="the DiT's matrix products in bfloat16 (default: where faster)")
    flag("--batch-size", type=at_least(1), default=8, help="utterances at once (default %(default)s)")
    flag("--seed", type=at_least(0), default=0, help="default %(default)s")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/samples" if args.list else "sample.wav")
    if args.text_file:
        args.text = args.text_file.read()
    single = ("ref", "ref_text", "text", "duration", "takes", "asr", "language")
    for name in single if args.list else ("ref_dir", "limit"):
        if getattr(args, name) != parser.get_default(name):
            which = "with" if args.list else "without"
            raise InputError(f"--{name.replace('_', '-')} has no use {which} --list: drop it")
    if args.list:
        return args
    if args.duration and args.speed != 1:
        raise InputError("--duration says how long the result is: drop --speed")
    if args.out.suffix.lower() not in FORMATS:
        raise InputError(f"--out {args.out}: expected a file that ends in {', '.join(FORMATS)}")
    if args.ref_text is not None and not args.ref:
        raise InputError("--ref-text says what a recording says: name it with --ref")
    if not args.ref:  # a voice held out from all training
        demo = max(read_list(DEMO / "corpus" / "test.lst"), key=lambda line: line.ref_seconds)
        args.ref = DEMO / "corpus" / demo.ref
        args.ref_text = demo.ref_text
        args.text = demo.text if args.text is None else args.text
    if args.text is None:
        raise InputError("nothing to say: give --text")
    if args.out.resolve() == args.ref.resolve():
        raise InputError(f"--out {args.out} is the recording {args.ref}: choose another --out")
    return args


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_ranks()
    dit, vae, notes = load(args.tts, args.vae, device)
    usual = dict(steps=32, cfg=2) | notes.get("sampling", {})
    args.steps = usual["steps"] if args.steps is None else args.steps
    args.cfg = usual["cfg"] if args.cfg is None else args.cfg
    options = {name: getattr(args, name) for name in ("steps", "cfg", "speed", "batch_size", "bf16")}
    generate = functools.partial(synthesize, **options)
    if rank == 0:
        precision = "bfloat16" if args.bf16 else "float32"
        print(f"device {device}, {precision}, seed {args.seed}, {args.steps} steps, guidance {args.cfg}")
        if dit.config.vocabulary and "F5TTS_v1" not in str(Path(args.tts).resolve()):  # weights do not tell
            print(f"{args.tts} is taken for a fine-tune of F5TTS_v1_Base: one of another base would babble")
    if args.list:
        say_list(args, dit, vae, generate, notes, rank, world)
    elif rank == 0:
        say(args, dit, vae, generate, notes, device)


if __name__ == "__main__":
    cli(main)
