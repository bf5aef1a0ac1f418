"""Stage 2: train the DiT on the latents of a prepared data folder.

    python train_tts.py                                                    # the demo, on the CPU or a GPU
    python train_tts.py --preset paper --data data/libritts --out runs/tts-libritts --asr openai/whisper-base.en
    torchrun --standalone --nproc_per_node 8 train_tts.py --preset paper --data ...   # the same training on 8 GPUs
    python train_tts.py --resume --out runs/tts                            # go on exactly where it stopped

The run folder, another than the VAE's, holds the same files. The loss does not tell when a model begins to speak; the
character error rate (cer) of a few fixed sentences does. Every evaluation synthesises them with sample.py's own
function and weights, and writes them to samples/.
"""

import argparse
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
from tqdm import tqdm

from evaluate import Recognizer, error_rates
from model import (PRESETS, DiT, DiTConfig, InputError, SemanticVAE, at_rate, conv_head, duration_loss,
                   flow_matching_loss, masked_mean)  # fmt: skip
from prepare import (DEMO, DRAWS, ORDER, TRAINING, Data, Run, at_least, check_run, cli, clipped_step, compiled,
                     distributed, forward_flops, has_bfloat16, load_batches, moved, one_sum, read_args, start_ranks,
                     switch, update_ema, write_wave)  # fmt: skip
from sample import Request, synthesize, to_bytes

# ----------------------------------------------------------------------------------------------------------------------
# Data: what a step sees is a pure function of (seed, step), whatever the ranks, workers and resumptions.


class Utterances(torch.utils.data.Dataset):
    """Training examples: `join` clips of one speaker in a row (1: single clips), grouped by length into steps."""

    def __init__(self, data: Data, split: str, batch_seconds: float, join: int, seed: int):
        self.data = data
        self.join = join
        self.seed = seed
        self.aligned = "starts" in data.arrays
        latents = data.meta["latents"]
        self.mean = torch.tensor(latents["mean"])
        self.std = torch.tensor(latents["std"])
        self.frames = np.diff(data.offsets["latents"])  # of each clip
        self.rate = data.rate / latents["hop"]
        self.clips = []
        self.too_long = []  # texts of more bytes than frames, which would be cut; joined clips have a space between
        for i in data.split(split):
            if len(to_bytes(data.clips[i]["text"])) + (join > 1) > self.frames[i]:
                self.too_long.append(i)
            elif not self.aligned or data.get("starts", i).isfinite().all():  # nan: the aligner could not place it
                self.clips.append(i)
        self.longest = sum(sorted(self.frames[i] for i in self.clips)[-join:]) / self.rate  # seconds of an example
        self.groups = max(1, int(self.length(self.clips) / self.rate / batch_seconds))  # steps in an epoch

    def length(self, run: list[int]) -> int:
        """Latent frames of some clips in a row."""
        return int(sum(self.frames[i] for i in run))

    def examples(self, rng) -> list[list[int]]:
        """All clips once, in random runs of `join` of the same speaker."""
        runs = []
        last = {}
        for clip in rng.permutation(self.clips).tolist():
            speaker = self.data.clips[clip]["speaker"]
            if speaker not in last or len(last[speaker]) == self.join:
                last[speaker] = []
                runs.append(last[speaker])
            last[speaker].append(clip)
        return runs

    @functools.lru_cache(2)  # every step asks, and the loader runs ahead
    def epoch(self, epoch: int) -> list[list[list[int]]]:
        """The examples of an epoch's steps, each step's shortest first: sorted by length with some jitter, cut into
        equal sums, shuffled."""
        rng = np.random.default_rng([ORDER, self.seed, epoch])
        runs = self.examples(rng)
        length = np.array([self.length(run) for run in runs])
        order = np.argsort(length * rng.uniform(0.9, 1.1, len(runs)), kind="stable")
        middle = length[order].cumsum() - length[order] / 2
        group = (middle * self.groups / length.sum()).astype(int)
        steps = [order[group == g] for g in rng.permutation(self.groups)]
        return [[runs[i] for i in step[np.argsort(length[step], kind="stable")]] for step in steps]

    def step(self, step: int) -> list[list[int]]:
        epoch, position = divmod(step, self.groups)
        return self.epoch(epoch)[position]

    def __getitem__(self, key):
        """key (step, run of clips) → one example with all of its random draws: a span of 70 to 100 % of the
        frames, at a random place, is to be generated, and the rest is the prompt. Prompt and text are hidden in
        20 % of the examples, the prompt alone in 24 %."""
        step, run = key
        rng = np.random.default_rng([DRAWS, self.seed, step + 1, run[0]])
        posterior = torch.cat([self.data.get("latents", i) for i in run])  # [N, 2, D]
        mean, logvar = posterior.unbind(1)  # each [N, D]
        z = mean + draw(rng, mean.shape) * (0.5 * logvar).exp()
        n = len(z)
        length = int(rng.uniform(0.7, 1.0) * n)
        start = int(rng.uniform() * (n - length))
        drop_text = rng.uniform() < 0.2
        frame = torch.arange(n)
        return dict(
            x=(z - self.mean) / self.std,  # [N, D]
            noise=draw(rng, z.shape),  # [N, D]
            t=torch.tensor(rng.uniform(), dtype=torch.float32),
            span=(frame >= start) & (frame < start + length),  # [N]
            text=to_bytes(" ".join(self.data.clips[i]["text"] for i in run)),  # [L]
            lengths=torch.tensor(n),
            drop_prompt=torch.tensor(drop_text or rng.uniform() < 0.3),
            drop_text=torch.tensor(drop_text),
            starts=self.starts(run) if self.aligned else None,  # [L]
            features=self.features(run) if "ssl" in self.data.arrays else None,  # [N, ssl_dim]
        )

    def starts(self, run: list[int]) -> torch.Tensor:
        """The frame at which each byte begins; the space between two clips begins where the next clip does."""
        starts = []
        for i, before in zip(run, np.cumsum([0, *self.frames[run]]).tolist()):
            starts += [torch.tensor([float(before)]), before + self.rate * self.data.get("starts", i)]
        return torch.cat(starts[1:])  # no space before the first clip

    def features(self, run: list[int]) -> torch.Tensor:
        """SSL features at the latents' rate."""
        return torch.cat([at_rate(self.data.get("ssl", i)[None], int(self.frames[i]))[0] for i in run])


def draw(rng, shape) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


PADDING = dict(x=0, noise=0, span=False, text=-1, starts=math.inf, features=0)


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    """Stack, padded to the longest. What a training does not need (None) is left out."""
    batch = {}
    for name, value in items[0].items():
        values = [item[name] for item in items]
        if name in PADDING and value is not None:
            batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=PADDING[name])
        elif value is not None:
            batch[name] = torch.stack(values)
    return batch


@dataclasses.dataclass
class MicroBatches:
    """This rank's micro-batches, step after step: a step's examples in world x accumulate parts of similar lengths."""

    examples: Utterances
    micro_seconds: float
    rank: int
    world: int

    def parts(self, step: int) -> list[list]:
        runs = self.examples.step(step)
        if len(runs) < self.world:
            raise InputError(f"a step holds {len(runs)} utterance(s), which {self.world} ranks cannot share: raise "
                             "--batch-seconds")
        lengths = np.array([self.examples.length(run) for run in runs])  # ascending
        most = self.micro_seconds * self.examples.rate
        for accumulate in range(1, len(runs) // self.world + 1):
            bounds = self.cut(lengths, accumulate * self.world)
            if max((b - a) * lengths[b - 1] for a, b in zip(bounds, bounds[1:])) <= most:
                break
        parts = [runs[a:b] for a, b in zip(bounds, bounds[1:])]
        return parts[self.rank * accumulate : (self.rank + 1) * accumulate]

    @staticmethod
    def cut(lengths: np.ndarray, count: int) -> list[int]:
        """Bounds [count + 1] of consecutive parts, none empty, the one of most frames kept small: all ranks wait
        for it. lengths [examples] in frames, ascending; count <= examples."""
        ends = lengths.cumsum()
        room = max(lengths[-1], ends[-1] / count)
        while True:
            bounds = [0]
            for left in range(count - 1, -1, -1):  # as many as fit, leaving one for each later part
                before = ends[bounds[-1] - 1] if bounds[-1] else 0
                full = int(np.searchsorted(ends, before + room, side="right"))
                bounds.append(max(bounds[-1] + 1, min(full, len(lengths) - left)))
            if bounds[-1] == len(lengths):
                return bounds
            room *= 1.002


# ----------------------------------------------------------------------------------------------------------------------
# The losses.


class HiddenAlignment(nn.Module):
    """A-DMA (arXiv 2505.19595): heads on the DiT's hidden states, in training alone. The 8th of 18 blocks should tell
    the text (CTC, weight 0.1), the 12th the SSL features (1 − cosine, weight 1); other depths and widths in
    proportion. Their norm sees a batch's padding: this loss alone depends on micro-batches."""

    def __init__(self, dit: DiTConfig, ssl_dim: int):
        super().__init__()
        self.blocks = tuple(max(1, round(dit.depth * block / 18)) - 1 for block in (8, 12))
        hidden = 2048 * dit.width // 768
        self.text_head = conv_head(dit.width, hidden, dit.text_symbols + 1)
        self.ssl_head = conv_head(dit.width, hidden, ssl_dim)

    def forward(self, low, high, text, lengths, features):
        """Outputs [B, N, W] of the two blocks, text [B, L], lengths [B], features [B, N, ssl_dim] → weighted sum of
        both losses [B]."""
        symbols = self.text_head(low.mT).float().log_softmax(1).permute(2, 0, 1)  # [N, B, symbols]
        count = (text >= 0).sum(1)
        options = dict(reduction="none", zero_infinity=True)
        ctc = F.ctc_loss(symbols, text.clamp(min=0) + 1, lengths, count, **options) / count
        cosine = F.cosine_similarity(self.ssl_head(high.mT).mT.float(), features, dim=-1)  # [B, N]
        inside = torch.arange(cosine.shape[1], device=cosine.device) < lengths[:, None]
        return 0.1 * ctc + 1 - masked_mean(cosine, inside)


class Objective(nn.Module):
    """The losses as a module, for DistributedDataParallel."""

    def __init__(self, dit: DiT, hidden: HiddenAlignment | None = None):
        super().__init__()
        self.dit = dit
        self.hidden = hidden

    def forward(self, x, noise, t, span, text, lengths, drop_prompt, drop_text, starts=None, features=None):
        """A batch → the losses [3] (flow matching, durations, hidden alignment) as sums over the span's frames. An
        utterance weighs by its span's frames: ranks and micro-batches change HiddenAlignment alone."""
        read = self.hidden.blocks if self.hidden else ()
        batch = (x, noise, t, span, text, lengths, drop_prompt, drop_text, starts)
        error, _, *states = flow_matching_loss(self.dit, *batch, read)
        zeros = torch.zeros(len(x), device=x.device)  # [B]
        durations = duration_loss(self.dit.durations(text), text, starts, lengths) if starts is not None else zeros
        hidden = self.hidden(*states, text, lengths, features) if self.hidden else zeros
        share = span.sum(1)  # [B]
        return torch.stack([error, (durations * share).sum(), (hidden * share).sum()])


# ----------------------------------------------------------------------------------------------------------------------
# The training.

MAX_NORM = 1  # largest gradient norm


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_ranks(args.device, TRAINING)
    run = Run(args, rank, world, device)
    dit, data, facts = open_data(args)
    check_run(args, data, device, **facts)
    torch.manual_seed(args.seed)
    train, valid = (Utterances(data, split, args.batch_seconds, args.join, args.seed) for split in ("train", "valid"))
    check_utterances(args, train, valid, rank)
    vae, vae_folder = open_vae(args, data, device)
    dit = make_dit(args, dit, data, train, rank).to(device)

    # ---- the objective and its update
    hidden = HiddenAlignment(dit.config, data.meta["ssl"]["dim"]).to(device) if args.align_hidden else None
    objective = Objective(dit, hidden)
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, fused=True)
    ema = copy.deepcopy(dit).eval().requires_grad_(False)
    modules = dict(dit=dit, optimizer=optimizer) | (dict(hidden=hidden) if hidden else {})

    # ---- the run, its batches and its evaluation
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=args.bf16)
    some = [clips for step in range(train.groups) for clips in train.step(step)][:2]  # a size of 1 compiles as fixed
    example = moved(collate([train[(0, clips)] for clips in some]), device)
    with autocast():
        flops = forward_flops(objective, **example) / (example["lengths"].sum().item() / train.rate)
    notes = dict(
        vae=os.path.relpath(vae_folder.resolve(), args.out.resolve()) if vae_folder.is_dir() else str(vae_folder),
        data=data.meta["sources"],
        characters="".join(sorted(set("".join(data.clips[i]["text"] for i in train.clips)))),
        sampling=dict(steps=args.sample_steps, cfg=args.sample_cfg),
    )
    columns = ["loss", "durations", "hidden", "grad", "valid_loss", "cer", "wer", "intelligible"]
    run.begin(ema, notes, modules, columns, flops)
    micro = MicroBatches(train, args.micro_seconds, rank, world)
    keys = ([(step, clips) for clips in part] for step in range(run.first, args.steps) for part in micro.parts(step))
    loader = load_batches(train, keys, args, device, collate)
    asr = Recognizer(args.asr, device, args.language) if rank == 0 and args.asr != "none" else None
    requests = fixed_requests(valid, args.eval_sentences)
    seconds = train.length(train.clips) / train.rate / train.groups  # of speech in a step, on average
    if asr:
        asr.warn([request.text for request in requests])
    if rank == 0:
        count = sum(p.numel() for p in dit.parameters()) / 1e6
        print(f"{device}, {world} rank(s); DiT {count:.2f} M parameters; {len(train.clips)} clips, "
              f"{data.meta['hours']} h; about {seconds:.0f} s a step, {train.groups} steps an epoch")

    # ---- compiled and distributed views of the same weights; checkpoints and evaluation use the plain ones
    with autocast():
        objective = compiled(objective, args.compile, parts=dit.transformer_blocks, **example)
    objective = distributed(objective, world)

    for step in run.steps():
        # ---- linear warm-up, then linear decay to 0: pure functions of the step
        warm = (step + 1) / max(1, args.warmup)
        decay = (args.steps - step) / max(1, args.steps - args.warmup)
        rate = args.lr * min(warm, decay)
        for group in optimizer.param_groups:
            group["lr"] = rate

        # ---- the mean runs over the span frames of the whole global batch
        batches = [moved(next(loader), device) for _ in micro.parts(step)]
        frames = sum(batch["span"].sum() for batch in batches)
        if world > 1:
            dist.all_reduce(frames)
        losses = torch.zeros(3, device=device)
        for i, batch in enumerate(batches):
            with one_sum(objective, i == len(batches) - 1):
                with autocast():
                    sums = objective(**batch)
                part = sums * world / frames  # DDP averages over ranks: undo that
                part.sum().backward()
            losses += part.detach()
        norm, skipped = clipped_step(optimizer, parameters, MAX_NORM)
        update_ema(ema, dit, args.ema, step)
        loss, durations, hidden_loss = losses
        run.note(loss=loss, durations=durations, hidden=hidden_loss, grad=norm, skipped=skipped, lr=rate)
        run.audio += seconds
        if run.evaluating:
            run.score(evaluate, run, ema, vae, valid, asr, requests, step + 1)


# ======================================================================================================================
# You can stop here. Below: evaluation, how a run begins, and the flags.


def evaluate(run: Run, dit: DiT, vae: SemanticVAE, valid: Utterances, asr, requests, step: int) -> dict:
    """Always on the same clips, noise, times and sentences, with the averaged weights."""
    args = run.args
    scores = dict(valid_loss=validate(dit, valid, run.device))
    try:
        waves = synthesize(dit, vae, requests, args.sample_steps, args.sample_cfg, seed=args.seed, bf16=args.bf16)
    except InputError as e:  # what it says yet may be nothing
        tqdm.write(f"step {step}: no samples: {e}")
        waves = []
    rate = valid.data.rate
    for n, wave in enumerate(waves):
        write_wave(args.out / "samples" / f"{n}_step{step:07d}.wav", wave, rate)
    if asr and waves:
        scores |= error_rates([request.text for request in requests], asr(waves, rate))
        if scores["wer"] < 0.3 and "intelligible" not in run.kept:
            minutes = (time.time() - run.start) / 60
            run.kept["intelligible"] = round(minutes, 1)
            tqdm.write(f"intelligible: fewer than 30 % word errors after {minutes:.1f} minutes of training")
    return scores | run.kept


@torch.no_grad()
def validate(dit: DiT, examples: Utterances, device, clips: int = 32) -> float:
    """Flow-matching loss of validation clips, nothing dropped, times spread evenly over [0, 1]."""
    runs = examples.examples(np.random.default_rng(0))[:clips]
    total = 0.0
    count = 0
    for i, run in enumerate(runs):
        batch = moved(collate([examples[(-1, run)]]), device)
        batch.pop("features", None)
        keep = torch.zeros(1, dtype=torch.bool, device=device)
        batch |= dict(t=torch.full_like(batch["t"], (i + 0.5) / len(runs)), drop_prompt=keep, drop_text=keep)
        error, frames = flow_matching_loss(dit, **batch)
        total += error.item()
        count += frames.item()
    return total / count


def fixed_requests(valid: Utterances, count: int) -> list[Request]:
    """Validation clips spread over the speakers, each said after another of its speaker's (after itself, if alone): the
    one that is nearest to 4 s, neither a single word nor half a minute."""
    data = valid.data
    requests = []
    for i in data.spread(valid.clips, count):
        same = [j for j in valid.clips if data.clips[j]["speaker"] == data.clips[i]["speaker"] and j != i]
        prompt = min(same or [i], key=lambda j: abs(data.samples[j] / data.rate - 4))
        requests.append(Request(data.get("audio", prompt).numpy(), data.clips[prompt]["text"], data.clips[i]["text"]))
    return requests


def open_data(args) -> tuple[DiT | None, Data, dict]:
    """The DiT to go on from, if any; the data with the arrays needed; what a resumed run must find unchanged."""
    source = args.out if args.resume else args.init  # a run that goes on no longer needs what it began with
    dit = DiT.from_pretrained(source).train() if source else None
    if dit and dit.config.vocabulary:
        raise InputError(f"--init {source} has a vocabulary, like F5-TTS's: only models of bytes are trained here")
    usual = dit.config.text_place if dit else PRESETS[args.preset or "demo"]["dit"].get("text_place", "left")
    place = args.text_place or usual
    if dit and place != usual:
        raise InputError(f"{source} has its text placed {usual}, not {place}: drop --text-place")
    args.text_place = place
    vae_hash = ""  # the newest latents
    if args.resume:
        vae_hash = dit.config.vae_hash
    elif args.vae:
        vae_hash = SemanticVAE.from_pretrained(args.vae).latents_hash()
    need = dict(audio=True, latents=True, starts=place == "aligned", ssl=args.align_hidden)
    data = Data(args.data, [name for name, needed in need.items() if needed], vae_hash)
    latents = data.meta["latents"]
    statistics = zlib.crc32(json.dumps([latents["mean"], latents["std"]]).encode())
    if dit and dit.config.vae_hash == latents["vae_hash"]:  # fine-tuned in the scale that it knows
        latents |= dict(mean=dit.latent_mean.tolist(), std=dit.latent_std.tolist())
    aligner = data.meta["starts"]["revision"] if place == "aligned" else None
    teacher = data.meta["ssl"] if args.align_hidden else None
    facts = dict(latents=latents["vae_hash"], statistics=statistics, placement=place, aligner=aligner, teacher=teacher)
    return dit, data, facts


def open_vae(args, data: Data, device) -> tuple[SemanticVAE, Path]:
    """The VAE that decodes the samples, which must be the one that made the latents, and where it is."""
    latents = data.meta["latents"]
    folder = args.vae or latents["vae"]
    vae = SemanticVAE.from_pretrained(folder).to(device)
    if vae.latents_hash() != latents["vae_hash"]:
        raise InputError(f"{folder} is VAE {vae.latents_hash()}, the latents in {args.data} come from "
                         f"{latents['vae_hash']}: run python prepare.py --out {args.data} --vae {folder}")
    return vae, Path(folder)


def check_utterances(args, train: Utterances, valid: Utterances, rank: int) -> None:
    """Refuse data from which steps would learn nothing or the wrong thing."""
    too_long = train.too_long + valid.too_long
    if rank == 0 and too_long:
        names = ", ".join(train.data.clips[i]["id"] for i in too_long[:3])
        print(f"{len(too_long)} clips are skipped: their texts have more bytes than latent frames, the first: {names}")
    if not train.clips or not valid.clips:
        raise InputError(f"{args.data} holds {len(train.clips)} training and {len(valid.clips)} validation clips that "
                         "can be used, and both are needed: prepare more")
    if args.batch_seconds < train.longest:
        raise InputError(f"--batch-seconds {args.batch_seconds} is below the longest, an example "
                         f"of {train.longest:.1f} s: raise it")
    rms = torch.cat([train[(0, run)]["x"] for run in train.step(0)[:64]]).square().mean().sqrt().item()
    if not 0.5 < rms < 2:
        vae = args.vae or train.data.meta["latents"]["vae"]
        raise InputError(f"the latents in {args.data} do not fit their statistics (RMS {rms:.3f}, 1 expected): "
                         f"remove their .bin file and run python prepare.py --out {args.data} --vae {vae}")


def make_dit(args, dit: DiT | None, data: Data, train: Utterances, rank: int) -> DiT:
    """A new network as the preset says, or the given one if it fits the data."""
    latents = data.meta["latents"]
    facts = dict(latent_dim=latents["dim"], sample_rate=data.rate, hop=latents["hop"], text=data.meta["text"])
    facts |= dict(max_seconds=float(train.longest), vae_hash=latents["vae_hash"])
    if dit:
        found = dataclasses.asdict(dit.config)
        for name in ("latent_dim", "sample_rate", "hop", "text"):
            if found[name] != facts[name]:
                source = args.out if args.resume else args.init
                raise InputError(f"{source} was trained with {name} {found[name]}, {args.data} has {facts[name]}")
        if rank == 0 and found["vae_hash"] != facts["vae_hash"]:
            print(f"{args.init} spoke in latents of {found['vae_hash']}: it must learn those of {facts['vae_hash']}")
        dit.config = dataclasses.replace(dit.config, **facts)
    else:
        dit = DiT(DiTConfig(**PRESETS[args.preset]["dit"] | facts | dict(text_place=args.text_place)))
    dit.latent_mean.copy_(train.mean)
    dit.latent_std.copy_(train.std)
    return dit


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    positive = at_least(0.01, float)
    flag("--vae", help="the VAE of the latents to learn (default: that of the newest latents)")
    flag("--text-place", choices=["left", "even", "aligned"], help="see model.text_index")
    flag("--align-hidden", **switch(False), help="align hidden states with text and SSL features too (A-DMA)")
    flag("--join", type=at_least(1), default=1, help="clips of a speaker in an example: more where clips are short")
    flag("--batch-seconds", type=positive, default=3240, help="audio in an update, of all ranks (default %(default)s)")
    flag("--micro-seconds", type=positive, default=450, help="audio a rank handles at once: lower if memory runs out")
    flag("--lr", type=at_least(0, float), default=7.5e-5, help="peak rate, whatever the ranks (default %(default)s)")
    flag("--warmup", type=at_least(0), default=20_000, help="steps to the peak, then decay (default %(default)s)")
    flag("--eval-sentences", type=at_least(0), default=4, help="fixed sentences to synthesise (default %(default)s)")
    flag("--sample-steps", type=at_least(1), default=32, help="Euler steps for them, and later in sample.py")
    flag("--sample-cfg", type=at_least(0, float), default=2, help="guidance for them, and later in sample.py")
    flag("--asr", default=str(DEMO / "ssl"), help="recogniser for their error rates: hub id, folder or none")
    flag("--language", default="en", help="of a multilingual Whisper (default %(default)s)")
    return read_args(parser, "train_tts", argv, has_bfloat16())


if __name__ == "__main__":
    cli(main)
