"""Speak any text in the voice of a reference recording.

    python sample.py --text "did you see the bird again"              # the demo's weights, in a demo voice
    python sample.py --tts runs/tts --ref voice.wav --ref-text "What it says." --text "What it shall say." --out said.wav
    python sample.py --list demo/corpus/test.lst --out runs/samples         # many, in batches; skips what is done
    torchrun --nproc_per_node 8 sample.py --list ...                        # shared between 8 GPUs

Without --ref-text the prompt is transcribed with --asr. Long text is split at sentence ends, so that prompt and piece
together stay within the length the model was trained on; the pieces are joined with a short cross-fade. Interrupted, what
was said so far is kept beside --out.
"""

import argparse
import math
import re
import time
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm, trange

from evaluate import UNSPACED, Recognizer, error_rates, find_audio, read_list
from model import DiT, InputError, SemanticVAE, fold_weight_norm, local_folder, package, read_json, sample, write_json
from prepare import (DEMO, FORMATS, at_least, barrier, cli, differences, file_stamp, has_bfloat16, lock, loudness, normalize_text, read_audio,
                     revision, start_ranks, write_wave)  # fmt: skip


MARKS = "".join(c for c in map(chr, range(0x3100)) if unicodedata.category(c)[0] == "M")  # which stand with the character before


@dataclass
class Request:
    """What to say and in whose voice."""

    prompt: np.ndarray  # float32 [T] at the model's rate
    prompt_text: str  # what the prompt says
    text: str  # what to say
    seconds: float | None = None  # how long; None: at the prompt's rate


def to_bytes(text: str) -> torch.Tensor:
    """UTF-8 bytes as symbols [L]: any language, nothing out of vocabulary."""
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.long)


def to_symbols(text: str, vocabulary: str) -> torch.Tensor:
    """A text as lines of the vocabulary [L], 0 for what it lacks; as bytes where there is none. F5-TTS's symbols are
    characters, with a space between words that touch, and for each Chinese one a space and its pinyin in that word."""
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
            sounds = pinyin.lazy_pinyin(part, pinyin.Style.TONE3, tone_sandhi=True) if chinese.match(part) else []
            symbols += [symbol for sound in sounds for symbol in (" ", sound)] or [part]
    places = {symbol: i for i, symbol in enumerate(vocabulary.split("\n"))}
    return torch.tensor([places.get(symbol, 0) for symbol in symbols])


@torch.no_grad()
def plan(dit: DiT, prompt_frames: int, request: Request, speed: float = 1.0) -> tuple[int, torch.Tensor]:
    """(frames of prompt and target, where each byte of `prompt_text text` starts [L], in frames).

    Bytes weigh as long as the DiT's duration predictor says, or all alike where it has none. The prompt's weights fill its frames, and
    the target goes on at that rate. Never fewer frames than symbols."""
    prompt, target = to_bytes(request.prompt_text + " "), to_bytes(request.text)
    text = torch.cat([prompt, target])
    durations = torch.ones(len(text), dtype=torch.float64)
    if dit.durations:
        durations = dit.durations(text[None].to(dit.latent_mean.device))[0].exp().double().cpu()
        durations[len(prompt) - 1] = 0  # the space between, as in training
    durations *= prompt_frames / durations[: len(prompt)].sum()
    frames = int(durations[len(prompt) :].sum() / speed + 1e-6)
    if request.seconds:
        frames = round(request.seconds * dit.config.sample_rate / dit.config.hop)
        if prompt_frames + frames <= len(text):
            raise InputError(f"--duration {request.seconds} is too short: prompt and text have {len(text)} bytes, for {prompt_frames + frames} frames")
    total = max(prompt_frames + frames, prompt_frames + 1, len(text) + 1)
    durations[len(prompt) :] *= (total - prompt_frames) / durations[len(prompt) :].sum()
    return total, (durations.cumsum(0) - durations).float()


def load(tts: str, vae: str | None, device) -> tuple[DiT, SemanticVAE, dict]:
    """The DiT, the VAE whose latents it speaks in (refused if its hash is another's), and the DiT's config.json."""
    folder = local_folder(tts)
    dit = DiT.from_pretrained(folder).to(device)
    notes = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    vae = vae or notes.get("vae", "charactr/vocos-mel-24khz" if dit.config.vocabulary else None)
    if not vae:
        raise InputError(f"{tts} does not say where its VAE is: name it with --vae")
    vae = folder / vae if (folder / vae).is_dir() else vae
    decoder = SemanticVAE.from_pretrained(vae).to(device)
    if decoder.latents_hash() != dit.config.vae_hash:
        raise InputError(f"{tts} was trained on the latents of VAE {dit.config.vae_hash}, {vae} is {decoder.latents_hash()}: name the right one with --vae")
    notes |= dict(tts_name=revision(folder), vae_name=decoder.content_hash())  # before folding, which changes names
    return dit, fold_weight_norm(decoder), notes


@torch.no_grad()
def synthesize(dit, vae, requests: list[Request], steps=32, cfg=2.0, sway=-1.0, speed=1.0, seed=0, batch_size=8, cfg_until=1.0,
               bf16=False) -> list[np.ndarray]:  # fmt: skip
    """float32 audio of each request's text alone, in order. What one gets does not depend on its batch: noise is drawn on
    the CPU from (seed, text), so a seed gives the same clip anywhere. Non-finite or silent output is an InputError."""
    device, config = dit.latent_mean.device, dit.config
    gains = [max(1, 0.1 / np.square(r.prompt).mean() ** 0.5) if config.vocabulary else 1 for r in requests]  # RMS 0.1
    heard = [torch.from_numpy(r.prompt * gain)[None].to(device) for r, gain in zip(requests, gains)]
    prompts = [dit.standardize(vae.encode(wave)[0])[0] for wave in heard]  # each [P, D]
    texts = [to_symbols(f"{r.prompt_text} {r.text}", config.vocabulary) for r in requests]
    plans = [plan(dit, len(p), r, speed) for p, r in zip(prompts, requests)]
    totals = [max(total, len(text) + 1) for (total, _), text in zip(plans, texts)]  # symbols may be more than bytes
    waves = [None] * len(requests)
    order = sorted(range(len(requests)), key=lambda i: totals[i])
    for batch in [order[i : i + batch_size] for i in range(0, len(order), batch_size)]:
        draw = lambda i: torch.randn(totals[i], config.latent_dim, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {requests[i].text}".encode())))
        pad = lambda tensors, value=0.0: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value).to(device)
        noise, text = pad([draw(i) for i in batch]), pad([texts[i] for i in batch], -1)
        prompt = pad([torch.nn.functional.pad(prompts[i], (0, 0, 0, totals[i] - len(prompts[i]))) for i in batch])
        lengths, prompt_lengths = (torch.tensor(v, device=device) for v in ([totals[i] for i in batch], [len(prompts[i]) for i in batch]))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = sample(dit, noise, prompt, prompt_lengths, text, lengths, steps, cfg, sway, pad([plans[i][1] for i in batch], math.inf), cfg_until)
        z = dit.destandardize(x)
        for row, i in enumerate(batch):
            first = max(0, len(prompts[i]) - vae.CONTEXT)  # of the prompt, only what the target's samples depend on is decoded
            wave = vae.decode_in_pieces(z[row : row + 1, first : totals[i]])[0].cpu().numpy()
            wave = wave[(len(prompts[i]) - first) * config.hop :]
            if not np.isfinite(wave).all() or np.abs(wave).max() < 1e-4:
                raise InputError(f"the model made {'silence' if np.isfinite(wave).all() else 'non-finite audio'} of {requests[i].text!r}: nothing written; try another --seed, or train longer")
            waves[i] = wave / gains[i]
    return waves


# --------------------------------------------------------------------------------------------------------------
# The prompt and the text, before a generation is spent on them.


def normalized(text: str, mode: str, what: str) -> str:
    """A text as the model was taught it; one that says nothing is an InputError."""
    text = normalize_text(text, mode)
    if not any(map(str.isalnum, text)):
        raise InputError(f"nothing to say: {what} is empty, or punctuation alone")
    return text


def check_prompt(wave: np.ndarray, text: str, rate: int, limit: float) -> tuple[np.ndarray, list[str]]:
    """The prompt with its silent edges trimmed, and what a user should know of it. What cannot work is an InputError."""
    if not np.isfinite(wave).all():
        raise InputError("the prompt holds non-finite samples")
    levels, loudest = loudness(wave, rate)
    if not loudest:
        raise InputError("the prompt is silent")
    loud, edge = np.flatnonzero(levels > 0.03 * loudest) * (rate // 50), rate // 10
    trimmed = wave[max(0, loud[0] - edge) : loud[-1] + rate // 50 + edge]
    seconds, cut = len(trimmed) / rate, (len(wave) - len(trimmed)) / rate
    if seconds < 0.5:
        raise InputError(f"the prompt holds {seconds:.2f} s of speech, too little to hear a voice in: give at least 0.5 s, better 2 s or more")
    if seconds > limit:
        raise InputError(f"the prompt is {seconds:.1f} s, limit {limit:.1f} s for this model: cut audio and transcript together")
    pace = len(text) / seconds
    notes = {
        f"trimmed {cut:.2f} s of silence from its edges": cut > 0.05,
        f"it is short ({seconds:.1f} s): 2 s or more catch a voice better": seconds < 2,
        "it is clipped": (np.abs(trimmed) > 0.99).mean() > 1e-3,
        f"its transcript has {pace:.0f} characters a second of speech: check that it says just what is heard": text and not 2 < pace < 30,
    }
    return trimmed, [note for note, found in notes.items() if found]


def split_text(text: str, limit: int) -> list[str]:
    """Pieces of at most `limit` bytes, cut at sentence ends, else at commas, else between words, or characters where no spaces are written."""
    pieces = [text]
    for pattern in (r"(?<=[.!?])(?=\s)|(?<=[。！？])", r"(?<=[,;:])(?=\s)|(?<=[，；：])", r"(?=\s)", f"(?<=[{UNSPACED}])(?=[{UNSPACED}])(?![{MARKS}])"):
        finer = []
        for piece in pieces:
            first, *parts = re.split(pattern, piece) if len(piece.encode()) > limit else [piece]
            finer.append(first)
            for part in parts:  # as few pieces as fit
                if len((finer[-1] + part).encode()) <= limit:
                    finer[-1] += part
                else:
                    finer.append(part.lstrip())
        pieces = [p for p in finer if p]
    if any(len(p.encode()) > limit for p in pieces):
        raise InputError(f"a word of the text is longer than the {limit} bytes that fit after this prompt: give a shorter prompt")
    return pieces


def join(waves: list[np.ndarray], rate: int) -> np.ndarray:
    """One after another with 20 ms of cross-fade, so that no joint clicks."""
    out, fade = waves[0], rate // 50
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    for wave in waves[1:]:
        out = np.concatenate([out[:-fade], out[-fade:] * (1 - ramp) + wave[:fade] * ramp, wave[fade:]])
    return out


# --------------------------------------------------------------------------------------------------------------


def say(args, dit, vae, device) -> None:
    """One text in one voice."""
    rate, limit = dit.config.sample_rate, dit.config.max_seconds
    text, wave = normalized(args.text, dit.config.text, "the text"), read_audio(args.ref, rate)
    check_prompt(wave, "", rate, limit / 2)  # before a recogniser, whose memory a long one would fill
    asr = Recognizer(args.asr, device, args.language) if args.ref_text is None or args.takes > 1 else None
    ref_text = normalized(asr([wave], rate)[0] if args.ref_text is None else args.ref_text, dit.config.text, "the transcript of the prompt")
    if args.ref_text is None:
        print(f"the prompt's transcript, by {args.asr}: {ref_text!r}")
    if dit.config.vocabulary and ref_text[-1:] not in ".。":  # F5-TTS's prompts end so; an empty one is refused below
        ref_text += "."
    wave, notes = check_prompt(wave, ref_text, rate, limit / 2)
    for note in notes:
        print(f"prompt: {note}")
    room = (limit - len(wave) / rate) / (len(wave) / rate) * len(ref_text.encode()) * args.speed
    pieces = [text] if args.duration else split_text(text, max(1, int(room)))
    if args.duration and args.duration + len(wave) / rate > limit * 1.01:
        raise InputError(f"prompt and --duration make {args.duration + len(wave) / rate:.1f} s, the model was trained on at most {limit:.1f} s")
    requests = [Request(wave, ref_text, piece, args.duration) for piece in pieces]
    frames = math.ceil(len(wave) / dit.config.hop)
    slow = 0 if args.duration else sum(plan(dit, frames, r, args.speed)[0] == len(f"{ref_text} {r.text}".encode()) + 1 for r in requests)
    if slow:
        print(f"{slow} of {len(pieces)} pieces have more bytes than frames at the prompt's pace: they are said more slowly")
    start, takes = time.time(), []
    for take in range(args.takes):
        waves, part = [], args.out.with_stem(args.out.stem + ".part")
        try:
            for i in trange(0, len(requests), args.batch_size, desc="batches", disable=len(requests) <= args.batch_size):
                batch = requests[i : i + args.batch_size]
                waves += synthesize(dit, vae, batch, args.steps, args.cfg, args.sway, args.speed, args.seed + take, args.batch_size, args.cfg_until, args.bf16)
        except KeyboardInterrupt:
            if waves:
                write_wave(part, join(waves, rate), rate)
                print(f"{part}: the first {len(waves)} of {len(pieces)} pieces; the next is {pieces[len(waves)]!r}")
            raise
        said = join(waves, rate)
        error = error_rates([text], asr([said], rate))["cer"] if args.takes > 1 else 0
        takes.append((error, take, said))
        if args.takes > 1:
            print(f"take {take} (seed {args.seed + take}): character error rate {error:.1%} by {args.asr}")
    error, take, said = min(takes)  # no two have the same number: waves are never compared
    spent, seconds = time.time() - start, len(said) / rate
    write_wave(args.out, said, rate)
    for piece in pieces if len(pieces) > 1 else []:
        print(f"piece: {piece}")
    print(f"{args.out}: {seconds:.2f} s, {len(text) / seconds:.0f} characters a second{f', take {take}' if args.takes > 1 else ''}; "
          f"real-time factor {spent / seconds / args.takes:.2f}")  # fmt: skip


def say_list(args, dit, vae, notes, rank, world) -> None:
    """Every line of a list in LibriSpeech-PC's six columns; wavs that are there already are kept."""
    rate, limit, lines, root = dit.config.sample_rate, dit.config.max_seconds, read_list(args.list)[: args.limit], args.ref_dir or args.list.parent
    settings = dict(list=args.list.name, seed=args.seed, steps=args.steps, cfg=args.cfg, cfg_until=args.cfg_until, sway=args.sway, speed=args.speed, bf16=args.bf16, tts=notes["tts_name"], vae=notes["vae_name"])
    stamp = args.out / "settings.json"
    prompts = {line.ref: find_audio(root, line.ref) for line in lines}  # all of them, before anything is spent
    said = {line.wav: [line.says, *file_stamp(prompts[line.ref])] for line in lines}
    found = read_json(stamp) if stamp.exists() else {}
    before = found.pop("said", {})
    there = [wav for wav in said if (args.out / wav).exists()]
    differ = differences(found | {wav: before.get(wav) for wav in there}, settings | {wav: said[wav] for wav in there})
    if differ and (found or there):
        raise InputError(f"{args.out} was made with other settings, texts or prompts ({differ}): choose another --out")
    todo = [line for line in lines if line.wav not in there]
    for line in todo:
        wave, ref_text = read_audio(prompts[line.ref], rate), normalized(line.ref_text, dit.config.text, f"the text of {line.ref}")
        check_prompt(wave, ref_text, rate, limit)
        request = Request(wave, ref_text, normalized(line.text, dit.config.text, f"the text of {line.gen}"))
        seconds = plan(dit, math.ceil(len(wave) / dit.config.hop), request, args.speed)[0] * dit.config.hop / rate
        if seconds > 2 * limit:
            raise InputError(f"{line.gen} takes {seconds:.1f} s with its prompt, the model was trained on at most {limit:.1f} s: shorten text or prompt")
    if args.dry_run:
        print(f"{args.list}: {len(lines)} lines, {len(todo)} to be said; every prompt is there")
        return
    held = lock(args.out) if rank == 0 else None
    barrier()  # all ranks have seen the same files before the first is written
    if rank == 0:
        print(f"{len(lines)} lines, {len(lines) - len(todo)} there already")
        write_json(stamp, settings | dict(said=before | said))
    todo = sorted(todo, key=lambda line: line.ref_seconds + line.gen_seconds)[rank::world]
    start, seconds = time.time(), 0.0
    for i in tqdm(range(0, len(todo), args.batch_size), desc="batches", disable=rank > 0):
        batch, requests = todo[i : i + args.batch_size], []
        for line in batch:
            wave, ref_text = read_audio(prompts[line.ref], rate), normalize_text(line.ref_text, dit.config.text)
            requests.append(Request(wave, ref_text, normalize_text(line.text, dit.config.text)))  # whole: the protocol's lengths are those of whole prompts
        for line, wave in zip(batch, synthesize(dit, vae, requests, args.steps, args.cfg, args.sway, args.speed, args.seed, args.batch_size, args.cfg_until, args.bf16)):
            write_wave(args.out / line.wav, wave, rate)
            seconds += len(wave) / rate
    if rank == 0 and seconds:
        print(f"{args.out}: rank 0 made {seconds:.1f} s at a real-time factor of {(time.time() - start) / seconds:.2f}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tts", default=str(DEMO / "tts"), help="run folder of train_tts.py, or hub id (default: the demo's)")
    parser.add_argument("--vae", help="folder or hub id of its VAE (default: where the TTS run says; F5-TTS's: Vocos)")
    parser.add_argument("--ref", type=Path, help="recording of the voice (default: the demo's)")
    parser.add_argument("--ref-text", help="what the recording says (default: transcribed with --asr)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", help="what to say (default without --ref: a demo sentence)")
    text.add_argument("--text-file", type=argparse.FileType(encoding="utf-8-sig", errors="surrogateescape"), help="a file that holds what to say")
    parser.add_argument("--out", type=Path, help=f"file in {', '.join(FORMATS)}, or folder for --list (default: sample.wav, runs/samples)")
    parser.add_argument("--list", type=Path, help="say every line of a list: ref_utt, ref_seconds, ref_text, gen_utt, gen_seconds, gen_text, tab-separated")
    parser.add_argument("--ref-dir", type=Path, help="where the list's recordings are (default: beside the list)")
    parser.add_argument("--limit", type=at_least(1), help="only the first so many lines of the list")
    parser.add_argument("--dry-run", action="store_true", help="with --list: only look whether every prompt is there")
    parser.add_argument("--steps", type=at_least(1), help="Euler steps (default: the model's, the paper's 32)")
    parser.add_argument("--cfg", type=at_least(0, float), help="guidance strength (default: the model's, the paper's 2)")
    parser.add_argument("--cfg-until", type=at_least(0, float, 1), default=1, help="guide only at times before this one, of 0 (noise) to 1: less work (default %(default)s)")
    parser.add_argument("--sway", type=at_least(-1, float, 1), default=-1, help="sway of the time steps, negative: denser near the noise (default %(default)s)")
    parser.add_argument("--speed", type=at_least(0.3, float, 3), default=1, help="relative to the prompt's rate of speech (default %(default)s)")
    parser.add_argument("--duration", type=at_least(0.1, float), help="seconds of the result (default: by the prompt's rate)")
    parser.add_argument("--takes", type=at_least(1), default=1, help="make several and keep the one --asr understands best (default %(default)s)")
    parser.add_argument("--asr", default=str(DEMO / "ssl"), help="recogniser for --takes and for prompts without transcript: hub id or folder (default: the demo's)")
    parser.add_argument("--language", default="en", help="what a multilingual Whisper listens for (default %(default)s)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=has_bfloat16(), help="matrix products of the DiT in bfloat16 (default: on GPUs and CPUs that are faster so)")
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="utterances at once (default %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="default %(default)s")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs/samples" if args.list else "sample.wav")
    if args.text_file:
        args.text = args.text_file.read()
    for name in ("ref", "ref_text", "text", "duration", "takes", "asr", "language") if args.list else ("ref_dir", "limit", "dry_run"):
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} has no use {'with' if args.list else 'without'} --list: drop it")
    if not args.list and args.out.suffix.lower() not in FORMATS:
        raise InputError(f"--out {args.out}: expected a file that ends in {', '.join(FORMATS)}")
    if args.ref_text is not None and not args.ref:
        raise InputError("--ref-text says what a recording says: name it with --ref")
    if not args.list and not args.ref:
        demo = max(read_list(DEMO / "corpus" / "test.lst"), key=lambda line: line.ref_seconds)  # a voice held out from all training
        args.ref, args.ref_text, args.text = DEMO / "corpus" / demo.ref, demo.ref_text, demo.text if args.text is None else args.text
    if not args.list and args.text is None:
        raise InputError("nothing to say: give --text")
    if not args.list and args.out.resolve() == args.ref.resolve():
        raise InputError(f"--out {args.out} is the recording {args.ref}: choose another --out")
    return args


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_ranks()
    dit, vae, notes = load(args.tts, args.vae, device)
    usual = dict(steps=32, cfg=2) | notes.get("sampling", {})
    args.steps = usual["steps"] if args.steps is None else args.steps
    args.cfg = usual["cfg"] if args.cfg is None else args.cfg
    if rank == 0:
        print(f"device {device}, {'bfloat16' if args.bf16 else 'float32'}, seed {args.seed}, {args.steps} steps, guidance {args.cfg}")
    if args.list:
        say_list(args, dit, vae, notes, rank, world)
    elif rank == 0:
        say(args, dit, vae, device)


if __name__ == "__main__":
    cli(main)
