"""Stage 2: train the DiT on the latents of a prepared data folder.

    python train_tts.py                                                    # the demo, on two CPU cores
    python train_tts.py --preset paper --data data/libritts --out runs/tts-libritts --asr openai/whisper-base.en
    torchrun --nproc_per_node 8 train_tts.py --preset paper --data ...     # the same training on 8 GPUs
    python train_tts.py --resume --out runs/tts                            # go on exactly where it stopped

The loss does not tell when a model has begun to speak; the character error rate (cer) of a few fixed sentences does.
Every evaluation but the first synthesises them with sample.py's own function and weights, and writes them to samples/ in the run folder.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from evaluate import Recognizer, error_rates
from model import PRESETS, DiT, DiTConfig, InputError, SemanticVAE, at_rate, conv_head, duration_loss, flow_matching_loss
from prepare import DEMO, Data, at_least, cli, has_bfloat16, lock, start_ranks, write_wave
from sample import Request, synthesize, to_bytes
from train_vae import (DRAWS, ORDER, STALLED, Log, Means, Speed, Stop, check_run, compiled, first_step, forward_flops, guarded_step,
                       leave_signals_to_the_trainer, load_state, read_args, save_args, save_run, stopped_at, update_ema)  # fmt: skip

# --------------------------------------------------------------------------------------------------------------
# Data: what a step sees is a pure function of (seed, step), whatever the ranks, workers and resumptions.


class Utterances(torch.utils.data.Dataset):
    """Training examples: `join` clips of one speaker in a row (1: each clip by itself), grouped by length into steps."""

    def __init__(self, data: Data, split: str, batch_seconds: float, join: int, seed: int):
        self.data, self.join, self.seed = data, join, seed
        self.aligned = "starts" in data.arrays  # clips that the aligner could not place have nan
        self.clips = [i for i in data.split(split) if not self.aligned or data.get("starts", i).isfinite().all()]
        latents = data.meta["latents"]
        self.mean, self.std = torch.tensor(latents["mean"]), torch.tensor(latents["std"])
        self.frames, self.rate = data.counts("latents"), data.rate / latents["hop"]
        # A text of more bytes than frames would be cut in mid-word; where clips are joined, a space stands between.
        fits = {i: len(to_bytes(data.clips[i]["text"])) + (join > 1) <= self.frames[i] for i in self.clips}
        self.left_out = [i for i in fits if not fits[i]]
        self.clips = [i for i in fits if fits[i]]
        self.groups = max(1, int(sum(self.frames[i] for i in self.clips) / self.rate / batch_seconds))  # steps in an epoch

    def examples(self, rng) -> list[list[int]]:
        """All clips once, in random runs of `join` of the same speaker."""
        runs, last = [], {}
        for clip in rng.permutation(self.clips).tolist():
            speaker = self.data.clips[clip]["speaker"]
            if speaker not in last or len(last[speaker]) == self.join:
                runs.append(last.setdefault(speaker, []))
                last[speaker] = runs[-1] = []
            last[speaker].append(clip)
        return runs

    @functools.lru_cache(2)  # every step asks, and the loader runs ahead
    def epoch(self, epoch: int) -> list[list[list[int]]]:
        """The examples of an epoch's steps, each step's shortest first: sorted by length with some jitter, cut into equal sums, shuffled."""
        rng = np.random.default_rng([ORDER, self.seed, epoch])
        runs = self.examples(rng)
        length = np.array([sum(self.frames[i] for i in run) for run in runs])
        order = np.argsort(length * rng.uniform(0.9, 1.1, len(runs)), kind="stable")
        group = ((length[order].cumsum() - length[order] / 2) * self.groups / length.sum()).astype(int)  # by where an example's middle lies
        steps = [order[group == g] for g in rng.permutation(self.groups)]
        return [[runs[i] for i in step[np.argsort(length[step], kind="stable")]] for step in steps]

    def step(self, step: int) -> list[list[int]]:
        epoch, position = divmod(step, self.groups)
        return self.epoch(epoch)[position]

    def __getitem__(self, key):
        """key (step, run of clips) → one example with all of its random draws: to be generated is a span of 70 to 100 % of the frames, at a
        random place; what is left on either side is the prompt. Hidden are prompt and text in 20 % of the examples, else the prompt in 30 %."""
        step, run = key
        rng = np.random.default_rng([DRAWS, self.seed, step + 1, run[0]])
        rows = torch.cat([self.data.get("latents", i) for i in run])  # [N, 2, D]
        n, shape = len(rows), rows[:, 0].shape
        normal = lambda: torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        z = rows[:, 0] + normal() * (0.5 * rows[:, 1]).exp()  # sampled from the posterior
        length = int(rng.uniform(0.7, 1.0) * n)
        start = int(rng.uniform() * (n - length))
        drop_both = rng.uniform() < 0.2
        frame = torch.arange(n)
        starts, before = [], 0
        for i in run if self.aligned else ():  # the space between two clips takes no time: it starts where the next clip does
            starts += [torch.tensor([float(before)])] * (before > 0) + [before + float(self.rate) * self.data.get("starts", i)]
            before += int(self.frames[i])
        features = None
        if "ssl" in self.data.arrays:  # at the latents' rate [N, ssl_dim]
            features = torch.cat([at_rate(self.data.get("ssl", i)[None], int(self.frames[i]))[0] for i in run])
        return dict(x=(z - self.mean) / self.std, noise=normal(), starts=torch.cat(starts) if starts else None, features=features, t=torch.tensor(rng.uniform(), dtype=torch.float32),
                    span=(frame >= start) & (frame < start + length), text=to_bytes(" ".join(self.data.clips[i]["text"] for i in run)),
                    length=torch.tensor(n), drop_prompt=torch.tensor(drop_both or rng.uniform() < 0.3), drop_text=torch.tensor(drop_both))  # fmt: skip


def collate(items: list[dict]) -> list[torch.Tensor]:
    """Pad to the longest, in the order of the objective's arguments; None for what the training does not need."""
    pad = lambda name, value: nn.utils.rnn.pad_sequence([i[name] for i in items], batch_first=True, padding_value=value)
    stack = lambda name: torch.stack([i[name] for i in items])
    starts = None if items[0]["starts"] is None else pad("starts", math.inf)
    features = None if items[0]["features"] is None else pad("features", 0)
    return [pad("x", 0), pad("noise", 0), stack("t"), pad("span", False), pad("text", -1), stack("length"), stack("drop_prompt"), stack("drop_text"), starts, features]


def moved(batch: list, device) -> list:
    return [v if v is None else v.to(device, non_blocking=True) for v in batch]


class MicroBatches:
    """This rank's micro-batches, step after step: a step's examples in world x accumulate parts of similar lengths."""

    def __init__(self, examples: Utterances, first: int, last: int, micro_seconds: float, rank: int, world: int):
        self.examples, self.steps, self.rank, self.world = examples, range(first, last), rank, world
        self.micro_frames = micro_seconds * examples.rate

    def parts(self, step: int) -> list[list]:
        runs = self.examples.step(step)
        if len(runs) < self.world:
            raise InputError(f"a step holds {len(runs)} utterance(s), which {self.world} ranks cannot share: raise --batch-seconds")
        lengths = np.array([sum(self.examples.frames[i] for i in run) for run in runs])  # ascending
        for accumulate in range(1, len(runs) // self.world + 1):
            bounds = self.cut(lengths, accumulate * self.world)
            if max((b - a) * lengths[b - 1] for a, b in zip(bounds, bounds[1:])) <= self.micro_frames:
                break
        parts = [runs[a:b] for a, b in zip(bounds, bounds[1:])]
        return parts[self.rank * accumulate : (self.rank + 1) * accumulate]

    @staticmethod
    def cut(lengths: np.ndarray, count: int) -> np.ndarray:
        """Bounds [count + 1] of parts in a row, at least one utterance each, the largest as small as can be: ranks wait for it.

        lengths [examples] in frames, ascending; count <= examples."""
        ends = lengths.cumsum()
        room = max(lengths[-1], ends[-1] / count)
        while True:
            bounds = [0]
            for left in range(count - 1, -1, -1):  # as many as fit, but for one for each part that is left
                full = np.searchsorted(ends, (ends[bounds[-1] - 1] if bounds[-1] else 0) + room, side="right")
                bounds.append(max(bounds[-1] + 1, min(int(full), len(lengths) - left)))
            if bounds[-1] == len(lengths):
                return np.array(bounds)
            room *= 1.002

    def padding(self, steps: int = 20) -> float:
        """Share of padding in what this rank computes, over the first steps of the training."""
        lengths = [[sum(self.examples.frames[i] for i in run) for run in part] for step in range(steps) for part in self.parts(step)]
        return 1 - sum(sum(n) for n in lengths) / sum(max(n) * len(n) for n in lengths)

    def __iter__(self):
        for step in self.steps:
            for part in self.parts(step):
                yield [(step, run) for run in part]


class HiddenAlignment(nn.Module):
    """A-DMA (arXiv 2505.19595): heads on the DiT's hidden states, in training alone. What comes out of the 8th of 18 blocks shall tell the text
    (CTC, weight 0.1), of the 12th the SSL features (1 − cosine, weight 1); other depths in proportion.
    The heads' norm sees a batch's padding: there alone micro-batches matter."""

    def __init__(self, dit: DiTConfig, ssl_dim: int, hidden: int = 2048):
        super().__init__()
        self.blocks = tuple(round(dit.depth * i / 18) - 1 for i in (8, 12))
        self.text_head = conv_head(dit.width, hidden, dit.text_symbols + 1)
        self.ssl_head = conv_head(dit.width, hidden, ssl_dim)

    def forward(self, low, high, text, lengths, features):
        """States [B, N, W] of the two blocks, text [B, L], lengths [B], features [B, N, ssl_dim] → the weighted sum of both losses [B]."""
        symbols = self.text_head(low.mT).float().log_softmax(1).permute(2, 0, 1)  # [N, B, symbols]
        count = (text >= 0).sum(1)
        ctc = F.ctc_loss(symbols, text.clamp(min=0) + 1, lengths, count, reduction="none", zero_infinity=True) / count
        cosine = F.cosine_similarity(self.ssl_head(high.mT).mT.float(), features, dim=-1)  # [B, N]
        inside = torch.arange(cosine.shape[1], device=cosine.device) < lengths[:, None]
        return 0.1 * ctc + 1 - (cosine * inside).sum(1) / lengths


class Objective(nn.Module):
    """The losses as a module, for DistributedDataParallel and torch.compile."""

    def __init__(self, dit: DiT, hidden: HiddenAlignment | None = None):
        super().__init__()
        self.dit = dit
        self.hidden = hidden

    def forward(self, x, noise, t, span, text, lengths, drop_prompt, drop_text, starts=None, features=None):
        """Sums over the span's frames of the losses [3] (flow matching, durations, hidden alignment), and the number of those frames. Utterances
        weigh by their frames in all of them, so that ranks and micro-batches change nothing."""
        read = self.hidden.blocks if self.hidden else ()
        error, frames, *states = flow_matching_loss(self.dit, x, noise, t, span, text, lengths, drop_prompt, drop_text, starts, read)
        durations = hidden = torch.zeros(len(x), device=x.device)
        if starts is not None:
            durations = duration_loss(self.dit.durations(text), text, starts, lengths)  # [B]
        if self.hidden:
            hidden = self.hidden(*states, text, lengths, features)  # [B]
        share = span.sum(1)  # [B]
        return torch.stack([error, (durations * share).sum(), (hidden * share).sum()]), frames


# --------------------------------------------------------------------------------------------------------------
# Evaluation: always on the same clips, noise, times and sentences, with the EMA weights.


@torch.no_grad()
def validate(dit: DiT, examples: Utterances, device, clips: int = 32) -> float:
    """Flow-matching loss of validation clips, nothing dropped, times spread evenly over [0, 1]."""
    keys = [(-1, run) for run in examples.examples(np.random.default_rng(0))[:clips]]
    total = count = 0.0
    for i, key in enumerate(keys):
        x, noise, t, span, text, length, _, _, starts, _ = moved(collate([examples[key]]), device)
        keep = torch.zeros(1, dtype=torch.bool, device=device)
        error, frames = flow_matching_loss(dit, x, noise, torch.full_like(t, (i + 0.5) / len(keys)), span, text, length, keep, keep, starts)
        total, count = total + error.item(), count + frames.item()
    return total / count


def fixed_requests(data: Data, count: int) -> list[Request]:
    """Validation clips spread over the split, each to be said after another validation clip of its speaker (of itself, if there is none)."""
    valid, requests = data.split("valid"), []
    for i in data.spread("valid", count):
        speaker = data.clips[i]["speaker"]
        others = [j for j in valid if data.clips[j]["speaker"] == speaker and j != i]
        prompt = others[0] if others else i
        requests.append(Request(data.get("audio", prompt).numpy(), data.clips[prompt]["text"], data.clips[i]["text"]))
    return requests


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="folder made by prepare.py --vae (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/tts"), help="run folder (default %(default)s)")
    parser.add_argument("--init", help="start from the weights of this DiT (folder or hub id), to fine-tune it, or to learn the latents of another VAE")
    parser.add_argument("--vae", help="where the latents' VAE is now, if not where it was when they were made")
    parser.add_argument("--text-place", choices=["left", "even", "aligned"], help="where the text stands among the frames: at the left (F5-TTS, the paper), spread evenly (ZipVoice), or where it is said, which needs prepare.py --aligner (default: the preset's)")
    parser.add_argument("--align-hidden", action=argparse.BooleanOptionalAction, default=False, help="align the DiT's hidden states with text and SSL features while it trains (A-DMA)")
    parser.add_argument("--join", type=at_least(1), default=1, help="clips of one speaker in a training example: more than 1 where clips are short (default %(default)s)")
    parser.add_argument("--batch-seconds", type=at_least(0.01, float), default=3240, help="audio in one update, over all ranks (default %(default)s: 0.9 h)")
    parser.add_argument("--micro-seconds", type=at_least(0.01, float), default=450, help="padded audio a rank handles at once: lower it if memory runs out (default %(default)s)")
    parser.add_argument("--lr", type=at_least(0, float), default=7.5e-5, help="peak learning rate, whatever the number of ranks (default %(default)s)")
    parser.add_argument("--warmup", type=at_least(0), default=20_000, help="steps to the peak; then linear decay to 0 at --steps (default %(default)s)")
    parser.add_argument("--clip", type=at_least(1e-9, float), default=1, help="largest gradient norm (default %(default)s)")
    parser.add_argument("--eval-sentences", type=at_least(0), default=4, help="fixed sentences to synthesise (default %(default)s)")
    parser.add_argument("--sample-steps", type=at_least(1), default=32, help="Euler steps for them, and sample.py's default for this model (default %(default)s)")
    parser.add_argument("--sample-cfg", type=at_least(0, float), default=2, help="guidance for them, and sample.py's default for this model (default %(default)s)")
    parser.add_argument("--asr", default=str(DEMO / "ssl"), help="recogniser for their error rate: hub id or folder; \"none\" for none (default: the demo's)")
    parser.add_argument("--language", default="en", help="what a multilingual Whisper listens for (default %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="torch.compile (default: on a GPU)")
    return read_args(parser, "train_tts", argv, has_bfloat16())


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_ranks(args.device, STALLED)
    held, stop = lock(args.out) if rank == 0 else None, Stop()
    source = args.out if args.resume else args.init  # a run that goes on needs no longer what it began with
    dit = DiT.from_pretrained(source).train() if source else None
    if dit and dit.config.vocabulary:
        raise InputError(f"--init {args.init} has a vocabulary, like F5-TTS's: only models of bytes are trained here")
    place = dit.config.text_place if dit else args.text_place or PRESETS[args.preset or "demo"]["dit"].get("text_place", "left")
    if args.text_place not in (None, place):
        raise InputError(f"{source} has its text placed {place}, not {args.text_place}: drop --text-place")
    vae_hash = ""  # the newest latents
    if args.resume:
        vae_hash = dit.config.vae_hash
    elif args.vae:
        vae_hash = SemanticVAE.from_pretrained(args.vae).latents_hash()
    need = ("audio", "latents") + ("starts",) * (place == "aligned") + ("ssl",) * args.align_hidden
    data = Data(args.data, need, vae_hash)
    latents = data.meta["latents"]
    statistics = zlib.crc32(json.dumps([latents["mean"], latents["std"]]).encode())
    aligner = data.meta["starts"]["revision"] if place == "aligned" else None
    teacher = data.meta["ssl"] if args.align_hidden else None
    learns_from = dict(latents=latents["vae_hash"], statistics=statistics, placement=place, aligner=aligner, teacher=teacher)
    check_run(args, data, device, **learns_from)
    torch.manual_seed(args.seed)

    # ---- data, and the VAE that will decode the samples: it must be the one that made the latents
    train, valid = (Utterances(data, split, args.batch_seconds, args.join, args.seed) for split in ("train", "valid"))
    if rank == 0 and (left_out := train.left_out + valid.left_out):
        names = ", ".join(data.clips[i]["id"] for i in left_out[:3])
        print(f"{len(left_out)} clips are left out, whose texts have more bytes than the clips have latent frames, among them {names}")
    if not train.clips or not valid.clips:
        raise InputError(f"{args.data} holds {len(train.clips)} training and {len(valid.clips)} validation clips: both are needed: change its manifest's column split, or leave it out, and prepare it anew")
    longest = float(sum(sorted(train.frames[i] for i in train.clips)[-args.join :]) / train.rate)
    if args.batch_seconds < longest:  # else some steps would have nothing to learn from
        raise InputError(f"--batch-seconds {args.batch_seconds} is less than the longest example, {longest:.1f} s")
    vae_folder = args.vae or latents["vae"]
    vae = SemanticVAE.from_pretrained(vae_folder).to(device)
    if vae.latents_hash() != latents["vae_hash"]:
        raise InputError(f"{vae_folder} is VAE {vae.latents_hash()}, the latents in {args.data} come from {latents['vae_hash']}: run python prepare.py --out {args.data} --vae {vae_folder}")

    # ---- network and optimiser
    facts = dict(latent_dim=latents["dim"], sample_rate=data.rate, hop=latents["hop"], text=data.meta["text"],
                 max_seconds=longest, vae_hash=latents["vae_hash"])  # fmt: skip
    if dit:
        found = {name: getattr(dit.config, name) for name in facts}
        for name in ("latent_dim", "sample_rate", "hop", "text"):
            if found[name] != facts[name]:
                raise InputError(f"{source} was trained with {name} {found[name]}, {args.data} has {facts[name]}")
        if rank == 0 and found["vae_hash"] != facts["vae_hash"]:
            print(f"{source} spoke in latents of VAE {found['vae_hash']}: it has to learn those of {facts['vae_hash']}")
        dit.config = dataclasses.replace(dit.config, **facts)
    else:
        settings = PRESETS[args.preset]["dit"] | facts | dict(text_place=place)
        dit = DiT(DiTConfig(**settings))
    dit.latent_mean.copy_(train.mean), dit.latent_std.copy_(train.std)
    dit.to(device)
    hidden = HiddenAlignment(dit.config, data.meta["ssl"]["dim"]).to(device) if args.align_hidden else None
    learning = [*dit.parameters(), *(hidden.parameters() if hidden else ())]
    optimizer = torch.optim.AdamW(learning, lr=args.lr, fused=True)
    ema = copy.deepcopy(dit).eval().requires_grad_(False)
    modules = dict(dit=dit, ema=ema, optimizer=optimizer) | (dict(hidden=hidden) if hidden else {})
    state = load_state(args.out / "state.pt", modules) if args.resume else dict(step=0, means={}, seconds=0, intelligible=0)
    first, means = first_step(args, state, rank), Means(state["means"], device)

    micro = MicroBatches(train, first, args.steps, args.micro_seconds, rank, world)
    loader = iter(torch.utils.data.DataLoader(train, batch_sampler=micro, collate_fn=collate, num_workers=args.workers,
                                              worker_init_fn=leave_signals_to_the_trainer, pin_memory=device.type == "cuda"))  # fmt: skip
    asr = Recognizer(args.asr, device, args.language) if rank == 0 and args.asr != "none" else None
    requests = fixed_requests(data, args.eval_sentences)
    notes = dict(vae=os.path.relpath(Path(vae_folder).resolve(), args.out.resolve()) if Path(vae_folder).is_dir() else vae_folder, data=data.meta["sources"],
                 sampling=dict(steps=args.sample_steps, cfg=args.sample_cfg))  # fmt: skip
    if rank == 0:
        save_args(args)
        log = Log(args.out / "log.csv", ["step", "loss", "durations", "hidden", "grad", "skipped", "lr", "seconds", "audio", "memory", "mfu", "valid_loss", "cer", "wer", "intelligible"], first)
        print(f"{device}, {world} rank(s); DiT {sum(p.numel() for p in dit.parameters()) / 1e6:.2f} M parameters; {len(train.clips)} clips, {data.meta['hours']} h; "
              f"about {args.batch_seconds} s a step, {train.groups} steps an epoch; padding {micro.padding():.1%} of what is computed")  # fmt: skip
        examples = [train[(0, run)]["x"] for run in train.step(0)[:64]]
        rms = torch.cat(examples).square().mean().sqrt().item()
        print(f"standardised latents: RMS {rms:.3f} (1 expected)")
        if not 0.5 < rms < 2:
            raise InputError(f"the latents in {args.data} do not fit their statistics: run python prepare.py --out {args.data} --vae {vae_folder} again")

    # ---- compiled and distributed views of the same weights; checkpoints and evaluation use the plain ones
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    with autocast():
        runs = [run for step in range(train.groups) for run in train.step(step)][:2]  # one alone would be compiled for one
        example = moved(collate([train[(0, run)] for run in runs]), device)
        objective = Objective(dit, hidden)
        flops = forward_flops(objective, *example) / float(sum(example[5]) / train.rate)  # a second of audio
        objective = compiled(objective, args.compile, *example, parts=dit.transformer_blocks)
    speed = Speed(device, flops)
    if world > 1:
        where = [device.index] if device.type == "cuda" else None
        objective = DistributedDataParallel(objective, device_ids=where, gradient_as_bucket_view=True, broadcast_buffers=False)

    # ---- the largest micro-batch of the next steps first: if memory runs out, then now
    padded = lambda runs: len(runs) * max(sum(train.frames[i] for i in run) for run in runs)
    with autocast():
        largest = max((part for step in range(first, min(first + 50, args.steps)) for part in micro.parts(step)), key=padded, default=[])
        if largest:
            objective(*moved(collate([train[(0, run)] for run in largest]), device))[0].sum().backward()
    optimizer.zero_grad()

    heard_at = lambda step, part: [data.clips[i]["id"] for run in micro.parts(step)[part] for i in run]
    start, intelligible = time.time() - state["seconds"], state["intelligible"]
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=rank > 0 or None, mininterval=1, desc="tts")
    for step in bar:
        warm, decay = (step + 1) / max(1, args.warmup), (args.steps - step) / max(1, args.steps - args.warmup)
        rate = args.lr * min(warm, decay)  # a pure function of the step
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = [moved(next(loader), device) for _ in micro.parts(step)]
        frames = sum(span.sum() for _, _, _, span, *_ in batches)
        terms = torch.zeros(3, device=device)
        if world > 1:  # the mean runs over the span frames of the whole global batch
            dist.all_reduce(frames)
        parts = []
        for i, batch in enumerate(batches):
            with objective.no_sync() if world > 1 and i < len(batches) - 1 else contextlib.nullcontext():
                with autocast():
                    errors, _ = objective(*batch)
                losses = errors * world / frames  # DDP averages over ranks: undo that
                losses.sum().backward()
            parts.append(losses.detach().sum())
            terms += losses.detach()
        total = terms[0]
        norm = nn.utils.clip_grad_norm_(learning, args.clip)
        means.add({"loss": total, "durations": terms[1], "hidden": terms[2], "grad": norm, "skipped": guarded_step(optimizer, norm), "part": torch.stack(parts).isfinite().float().argmin()})  # the first micro-batch that is not finite
        update_ema(ema, dit, args.ema, step)

        # ---- log, evaluate, save: in this order, so that a checkpoint never lacks the rows before it
        done, last, stopped = step + 1, step + 1 == args.steps, stop.agreed()
        logging, evaluating = done == 1 or done % args.log_every == 0 or last, done == 1 or done % args.eval_every == 0 or last
        speed.audio += args.batch_seconds
        if logging:
            means.report_skipped(done, heard_at)
            row = means.read(world) | speed.row(world)
        pause = time.time()
        if evaluating and rank == 0:
            scores = dict(valid_loss=validate(ema, valid, device))
            try:
                waves = synthesize(ema, vae, requests, args.sample_steps, args.sample_cfg, seed=args.seed, bf16=args.bf16) if step > 0 else []
            except InputError as e:  # what it says yet may be nothing
                tqdm.write(f"step {done}: no samples: {e}")
                waves = []
            for n, wave in enumerate(waves):
                write_wave(args.out / "samples" / f"{n}_step{done:07d}.wav", wave, data.rate)
            if asr and waves:
                scores |= error_rates([r.text for r in requests], asr(waves, data.rate))
                if scores["wer"] < 0.3 and not intelligible:
                    intelligible = (time.time() - start) / 60
                    tqdm.write(f"intelligible: the fixed sentences have fewer than 30 % word errors after {intelligible:.1f} minutes of training")
            if intelligible:
                scores["intelligible"] = round(intelligible, 1)
        if rank == 0 and (logging or evaluating):
            log.row(step=done, **(row if logging else {}), lr=rate, seconds=round(time.time() - start, 1), **(scores if evaluating else {}))
            bar.set_postfix(loss=f"{total.item():.3f}")
        if evaluating and (step > 0 or last) or stopped:
            gathered = means.state(world)
            if rank == 0:
                save_run(args.out, done, ema, notes, modules, gathered, args.keep, seconds=time.time() - start, intelligible=intelligible)
        speed.begun += time.time() - pause
        if stopped:
            bar.close()
            raise SystemExit(stopped_at(args.out, done, stopped, rank))


if __name__ == "__main__":
    cli(main)
