"""How everything in demo/ was made. Needed only to make it again; the repository's scripts never import this file.

    python demo/make.py corpus --kokoro KOKORO     # demo/corpus: 52 voices, 50 minutes (onnxruntime, espeak-ng)
    python demo/make.py corpus --kokoro KOKORO --seed 1 --out BIG   # other voices and sentences, for training only
    python demo/make.py ssl --data demo/corpus --others REAL --whisper WHISPER
                                                   # demo/ssl: teacher, aligner, recogniser (ctranslate2)
    python demo/make.py sv --data demo/corpus --others REAL         # demo/sv: speaker similarity
    python demo/make.py features --data DATA --whisper WHISPER
                                                   # Whisper's features into a prepared folder, as its teacher's
    python demo/make.py export --run RUN --out DIR [--vae VAE]   # demo/vae, demo/tts: a run in float16, and its log

demo/README.md says where KOKORO, WHISPER and REAL come from, and with which flags the files here were made. Four voices
and one sentence in eight are held out from all training (demo/sv also learns from the valid clips).
"""

import argparse
import csv
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile as sf
import torch
import torch.nn.functional as F
import torchaudio
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
RATE = 16000

# ----------------------------------------------------------------------------- sentences: a grammar of 150 words
DET = "the my our your this".split()
ADJ = "old young little happy quiet clever tired brave".split()
WHO = "dog cat bird horse boy girl farmer teacher king queen doctor sailor child mother father friend".split()
SLEPT = "slept sang waited danced walked laughed smiled worked".split()
SAW = "saw found followed heard called loved helped met".split()
TOOK = ["took", "wanted", "brought", "carried", "lost", "kept", "bought"]
GAVE = "gave showed sold".split()
COLOUR = "red blue green yellow black white new small heavy".split()
WHAT = "apple letter book song lamp boat chair watch shoe fish ring key cup".split()
WHERE = ["in the garden", "by the river", "near the forest", "in the kitchen", "at the market", "behind the mountain",
         "near the village", "by the window", "under the bridge", "on the table", "at school", "outside"]
WHEN = ["today", "again", "at night", "this morning", "yesterday", "before dinner", "after the storm"]
HOW = ["slowly", "alone", "very well", "for an hour"]
BASE = "sleep sing wait dance walk laugh smile work".split()
FEEL = "cold warm dark late early beautiful".split()
ASK = ["when did", "why did", "how did", "where did"]


def sentence(rng: random.Random) -> str:
    """One English sentence of three to eleven words."""
    pick = rng.choice

    def who():
        return f"{pick(DET)} {pick(ADJ)} {pick(WHO)}" if rng.random() < 0.4 else f"{pick(DET)} {pick(WHO)}"

    def what():
        if rng.random() < 0.6:
            return f"{pick(['the', 'a', 'my', 'your'])} {pick(COLOUR)} {pick(WHAT)}"
        return f"the {pick(WHAT)}"

    def after(*more):
        return pick(["", f" {pick(WHERE)}", f" {pick(WHEN + list(more))}"])

    def clause():
        return pick([
            f"{who()} {pick(SLEPT)}{after(*HOW)}",
            f"{who()} {pick(SAW)} {who()}{after()}",
            f"{who()} {pick(TOOK)} {what()}{after()}",
            f"{who()} {pick(GAVE)} {who()} {what()}",
            f"it was {pick(FEEL)}{after()}",
            f"there is {what()} {pick(WHERE)}",
        ])

    while True:
        text = pick([
            clause, clause, clause,
            lambda: f"{clause()} and {clause()}",
            lambda: f"{who()} and {who()} {pick(SLEPT)}{after(*HOW)}",
            lambda: f"where is {pick([who, what])()}",
            lambda: f"{pick(ASK)} {who()} {pick(BASE)}{after(*HOW)}",
            lambda: f"please {pick(['find', 'open', 'bring', 'hold'])} {what()}{after()}",
            lambda: f"did you see {pick([who, what])()}{after()}",
            lambda: f"can you hear {who()} {pick(BASE)}{after()}",
            lambda: f"{pick(['i think', 'we know'])} {clause()}",
        ])()
        if 3 <= len(text.split()) <= 11:
            return text


def held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % 8 == 0


QUESTION = ("where", "when", "why", "how", "did", "can")

# ----------------------------------------------------------------------------- voices
TEST_VOICES = ["af_sarah", "am_michael", "bf_emma", "bm_george"]  # held out from everything


def voices(folder: Path, count: int, seed: int) -> dict[str, np.ndarray]:
    """The English voices but for those held out (seed 0), then mixtures of two of one sex; each float32 [510, 256]."""
    single = {p.stem: np.fromfile(p, np.float32).reshape(510, 256) for p in sorted(folder.glob("[ab][fm]_*.bin"))}
    known = [name for name in single if name not in TEST_VOICES]
    chosen = {name: single[name] for name in known[:count]} if seed == 0 else {}
    rng = random.Random(seed)
    while len(chosen) < count:
        a = rng.choice(known)
        b = rng.choice([name for name in known if name[1] == a[1] and name != a])
        share = round(rng.uniform(0.3, 0.7), 2)
        chosen[f"{a}+{b}+{share}"] = share * single[a] + (1 - share) * single[b]
    return chosen


def phonemes(text: str, british: bool) -> str:
    command = ["espeak-ng", "--ipa", "-q", "-v", "en-gb" if british else "en-us", text]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    return " ".join(line.strip() for line in lines if line.strip()) + ("?" if text.startswith(QUESTION) else ".")


def start(kokoro: str):
    global session, symbols
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(f"{kokoro}/kokoro.onnx", options, providers=["CPUExecutionProvider"])
    symbols = json.loads(Path(kokoro, "vocab.json").read_text(encoding="utf-8"))["vocab"]


def speak(job) -> float:
    text, style, speed, british, path = job
    ids = [symbols[c] for c in phonemes(text, british)]
    speed = np.array([speed], np.float32)
    (wave, *_) = session.run(None, dict(tokens=np.array([[0, *ids, 0]]), style=style[None, len(ids)], speed=speed))
    wave = torchaudio.functional.resample(torch.from_numpy(wave.reshape(-1)), 24000, RATE)
    loud = (wave.abs() > 0.02 * wave.abs().max()).nonzero()
    wave = wave[max(0, loud[0].item() - RATE // 20) : loud[-1].item() + RATE // 20]
    wave = (wave * 0.08 / wave.square().mean().sqrt()).clamp(-0.99, 0.99).numpy()
    sf.write(path, wave, RATE, format="OGG", subtype="OPUS", compression_level=0.96)
    return len(wave) / RATE


def make_corpus(args):
    """audio/*.opus, manifest.csv (audio|speaker|text|split) and test.lst (LibriSpeech-PC's six columns)."""
    rng = random.Random(args.seed)
    seen = set()
    jobs = []
    rows = []
    (args.out / "audio").mkdir(parents=True, exist_ok=True)
    chosen = voices(args.kokoro / "voices", args.voices, args.seed)
    counts = dict(train=args.sentences, valid=0 if args.seed else 2)
    plan = [(name, style, split, n) for name, style in chosen.items() for split, n in counts.items()]
    if not args.seed:
        for name in TEST_VOICES:
            style = np.fromfile(args.kokoro / "voices" / f"{name}.bin", np.float32).reshape(510, 256)
            plan.append((name, style, "test", 12))
    order = {}
    for name, style, split, count in plan:
        number = order.setdefault(name, len(order))
        speed = 0.82 + 0.25 * ((0.5 + number * 0.618034) % 1)
        for n in range(count):
            while (text := sentence(rng)) in seen or held_out(text) != (split != "train"):
                pass
            seen.add(text)
            file = f"audio/v{number:02d}_{split}_{n:03d}.opus"
            rows.append([file, f"s{args.seed}v{number:02d}", text, split])
            jobs.append((text, style, speed * rng.uniform(0.95, 1.05), name[0] == "b", args.out / file))
    with multiprocessing.Pool(args.jobs, start, (str(args.kokoro),)) as pool:
        seconds = []
        for s in pool.imap(speak, jobs, chunksize=4):
            seconds.append(s)
            if len(seconds) % 50 == 0:
                print(len(seconds), len(jobs), f"{sum(seconds) / 60:.1f} min", flush=True)
    with open(args.out / "manifest.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter="|", lineterminator="\n").writerows([["audio", "speaker", "text", "split"], *rows])
    test = {}
    for (file, speaker, text, split), s in zip(rows, seconds):
        if split == "test":
            test.setdefault(speaker, []).append((file, s, text))
    with open(args.out / "test.lst", "w", encoding="utf-8") as f:
        for clips in test.values():
            for (gen, gen_s, gen_text), (ref, ref_s, ref_text) in zip(clips, clips[1:] + clips[:1]):
                f.write(f"{ref}\t{ref_s:.3f}\t{ref_text}\t{gen}\t{gen_s:.3f}\t{gen_text}\n")
    size = sum(p.stat().st_size for p in (args.out / "audio").iterdir())
    words = {word for row in rows for word in row[2].split()}
    print(f"{len(rows)} clips, {sum(seconds) / 60:.1f} minutes, {len(words)} words, {size / 1e6:.2f} MB")


# ----------------------------------------------------------------------------- training clips for the two small models
class Clip(NamedTuple):
    wave: np.ndarray  # float16 [T] at 16 kHz
    speaker: str
    text: str
    told: torch.Tensor | None = None  # [frames, 512] Whisper's features


def read_clips(folders, splits):
    """Clips of the splits; a folder holds manifest.csv or metadata.csv, separated by |.

    Children are left out: they are hard to understand."""
    clips = []
    for folder in folders:
        table = next(p for p in (folder / "manifest.csv", folder / "metadata.csv") if p.exists())
        with open(table, encoding="utf-8", newline="") as f:
            for row in csv.DictReader(f, delimiter="|", quoting=csv.QUOTE_NONE):
                if row["split"] in splits and int(row.get("age", 18)) >= 13:
                    wave = sf.read(folder / row.get("audio", row.get("file")), dtype="float32")[0]
                    speaker = f"{folder.name}/{row['speaker']}"
                    if len(wave) < 8 * RATE:
                        clips.append(Clip(wave.astype(np.float16), speaker, row["text"].lower()))
    return clips


def standard(wave):
    """Zero mean and unit variance, as the models' feature extractor makes it."""
    return (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()


def augment(wave, rng):
    """float32 [T]: a random equaliser, noise at 15-50 dB, a level; for some a band limit, a room, smeared phases.

    Frames stay where they are, so that the targets fit. The equaliser and the phases are for what vocoders do wrong."""
    wave = standard(torch.from_numpy(wave.astype(np.float32)))
    size = -(-(len(wave) + RATE // 4) // 8000) * 8000  # quick to transform
    spectrum = torch.fft.rfft(wave, size)
    decibels = F.interpolate(4 * torch.randn(1, 1, 9), size // 2 + 1, mode="linear", align_corners=True)[0, 0]
    if rng.random() < 0.2:
        decibels[round(rng.uniform(0.4, 0.9) * len(decibels)) :] -= 40
    spectrum = spectrum * 10 ** (decibels / 20)
    if rng.random() < 0.3:
        room = torch.randn(RATE // 4) * torch.exp(-torch.arange(RATE // 4) / (RATE * rng.uniform(0.01, 0.05)))
        room *= rng.uniform(0.2, 0.8) / room.norm()
        room[0] = 1  # the direct sound
        spectrum = spectrum * torch.fft.rfft(room, size)
    wave = torch.fft.irfft(spectrum, size)[: len(wave)]
    if rng.random() < 0.3:
        window = torch.hann_window(400)
        bins = torch.stft(wave, 400, 200, window=window, return_complex=True)
        louder = torch.exp(rng.uniform(0, 0.3) * torch.randn(bins.shape))
        bins = bins * torch.polar(louder, rng.uniform(0, 1) * torch.randn(bins.shape))
        wave = torch.istft(bins, 400, 200, window=window, length=len(wave))
    noise = torch.randn(len(wave))
    if rng.random() < 0.5:
        noise = (noise + 0.9 * noise.roll(1) + 0.7 * noise.roll(2)) / 1.52  # darker
    wave = wave + noise * wave.std() * 10 ** (-rng.uniform(15, 50) / 20)
    return standard(wave) * 10 ** (rng.uniform(-3, 3) / 20)


def faster(clip, rng):
    """Most clips at another rate, with other pitch and formants: a new voice. Whisper's features are stretched
    likewise."""
    if rng.random() < 0.3:
        return clip
    length = round(len(clip.wave) / rng.uniform(0.85, 1.18))
    wave = F.interpolate(torch.from_numpy(clip.wave.astype(np.float32))[None, None], length, mode="linear")[0, 0]
    told = F.interpolate(clip.told.float().T[None], frames(length), mode="linear")[0].T
    return clip._replace(wave=wave.numpy(), told=told)


def batches(clips, seconds, rng):
    """Lists of clips of similar lengths, in random order, each of at most `seconds` of padded audio."""
    out = []
    batch = []
    for clip in sorted(clips, key=lambda clip: len(clip.wave) + rng.uniform(0, RATE / 2)):
        if batch and len(clip.wave) * (len(batch) + 1) > seconds * RATE:
            out.append(batch)
            batch = []
        batch.append(clip)
    out.append(batch)
    rng.shuffle(out)
    return out


def gabor_filters(bands: int = 48, taps: int = 400) -> torch.Tensor:
    """[4 · bands, 1, taps]: windowed sinusoids on the mel scale, in four phases, louder where speech is softer.

    The rectified phases add up to about a mel spectrogram, from which CTC learns in a tenth of the steps."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (80, 7400))
    centre = 700 * (10 ** (torch.linspace(low, high, bands) / 2595) - 1)  # Hz
    width = (0.12 * centre).clamp(min=60)  # Hz: a Gaussian in frequency, and so in time
    t = (torch.arange(taps) - (taps - 1) / 2) / RATE
    envelope = torch.exp(-2 * (math.pi * width[:, None] * t / 1.5) ** 2)
    angle = 2 * math.pi * centre[:, None] * t
    phases = torch.stack([torch.cos(angle + k * math.pi / 2) for k in range(4)], 1)  # [bands, 4, taps]
    louder = (centre / 500).clamp(min=0.5) / envelope.sum(1)
    return (phases * envelope[:, None] * louder[:, None, None]).flatten(0, 1)[:, None]


def tiny_wavlm(width, layers, conv, **extra):
    from transformers import WavLMConfig

    return WavLMConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=width * 3,
        conv_dim=(192, conv), conv_stride=(160, 2), conv_kernel=(400, 3), conv_bias=True,  # 50 frames a second
        feat_extract_norm="layer", num_conv_pos_embeddings=31, num_conv_pos_embedding_groups=8,
        do_stable_layer_norm=True, num_buckets=64, max_bucket_distance=200, hidden_dropout=0.1, attention_dropout=0.1,
        activation_dropout=0.1, feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0,
        mask_time_prob=0.2, mask_time_length=6, **extra)


def frames(samples):
    """How many frames tiny_wavlm makes of so many samples."""
    return ((samples - 400) // 160 - 2) // 2 + 1


def extractor():
    from transformers import Wav2Vec2FeatureExtractor

    return Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=RATE, padding_value=0.0, do_normalize=True, return_attention_mask=True)


def set_front_end(model):
    with torch.no_grad():
        first = model.wavlm.feature_extractor.conv_layers[0].conv
        first.weight.copy_(3 * gabor_filters())
        first.bias.normal_(0, 0.1)  # at zero, the layer norm after it would blow silence up
    model.wavlm.feature_extractor._requires_grad = False  # of the waves themselves: a sixth of the time


def hear(waves, folder):
    """[T] at 16 kHz → float32 [frames, 512] of each, 50 a second, up to two more than fit, from Whisper's encoder in
    CTranslate2's form; clips share windows of 30 s."""
    import ctranslate2
    from transformers import WhisperFeatureExtractor

    whisper = ctranslate2.models.Whisper(str(folder), compute_type="int8", intra_threads=1)
    mel = WhisperFeatureExtractor()
    windows = [[]]
    at = 0
    for i, wave in enumerate(waves):
        if at + len(wave) > 30 * RATE:
            windows.append([])
            at = 0
        windows[-1].append((i, at))
        at += -(-(len(wave) + RATE // 4) // 320) * 320
    told = {}
    for window in windows:
        audio = np.zeros(30 * RATE, np.float32)
        for i, at in window:
            wave = waves[i].astype(np.float32)
            audio[at : at + len(wave)] = 0.1 * wave / wave.std()
        bands = mel(audio, sampling_rate=RATE, return_tensors="np").input_features
        heard = whisper.encode(ctranslate2.StorageView.from_array(bands), to_cpu=True)
        heard = torch.from_numpy(np.array(heard))[0]
        for i, at in window:
            told[i] = heard[at // 320 :][: len(waves[i]) // 320 + 2]
    return [told[i] for i in range(len(waves))]


def whisper_features(clips, folder, path):
    """float16 [frames, 512] for every clip; kept in the file `path`.

    A frame of tiny_wavlm is centred 22.5 ms, one frame, after Whisper's frame of the same number."""
    if not path.exists():
        heard = hear([clip.wave for clip in clips], folder)
        torch.save([x[1:][: frames(len(clip.wave))].half() for clip, x in zip(clips, heard)], path)
    return torch.load(path, weights_only=True)


def store_features(args):
    """Whisper's features in prepared folders, where prepare.py --ssl stores a teacher's."""
    sys.path.insert(0, str(HERE.parent))
    from prepare import Data, fill, finish, frame_count, repeat_last, revision

    facts = dict(model="whisper-base", revision=revision(args.whisper / "model.bin"), layer=-1, dim=512, rate="50")
    for folder in args.data:
        data = Data(folder)

        def make(clips):
            features = hear([data.get("audio", i).numpy() for i in clips], args.whisper)
            counts = frame_count(data.samples[clips.start : clips.stop], data.rate, 50)
            return torch.cat([repeat_last(x[:count].half(), int(count)) for x, count in zip(features, counts)])

        array, _ = fill(data, folder, "ssl", facts, (512,), make, rank=0, world=1)
        finish(folder, "ssl", array, facts)


def fit(model, epoch, loss_of, args):
    """`args.steps` updates with warm-up and cosine decay; EMA weights (0.998) are left in the model at the end.

    The matrices inside learn with Muon, which needs less than half of AdamW's steps here; all else with AdamW.

    epoch: rng → batches in random order; loss_of: batch, rng → the loss' parts."""
    rng = random.Random(args.seed)
    step = 0
    start = time.time()
    mean = None
    inner = [p for name, p in model.named_parameters() if re.search(r"\.layers\.|^tdnn", name)]
    square = [p for p in inner if p.ndim == 2 and min(p.shape) > 100]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in square)]
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01),
                  torch.optim.Muon(square, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")]
    ema = [p.detach().clone() for p in model.parameters()]
    resume = args.work / f"{args.what}.pt"
    log = args.out / "log.csv"
    if resume.exists():
        saved = torch.load(resume, weights_only=True)
        print(f"goes on from step {saved['step']} of {resume}: name another --work to begin anew")
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        ema = saved["ema"]
        step = saved["step"]
        rng.seed(args.seed + step)
        torch.manual_seed(args.seed + step)
    else:
        log.write_text("step,loss,norm,rate,seconds\n" if args.what == "sv" else "step,ctc,told,norm,rate,seconds\n")
    queue = []
    while step < args.steps:
        if not queue:
            queue = epoch(rng)
        rate = args.lr * min(1, step / args.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for optimizer, times in zip(optimizers, (1, 3)):
            optimizer.param_groups[0]["lr"] = times * rate
        model.train()
        parts = loss_of(queue.pop(), rng)
        model.zero_grad()
        sum(parts).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):
            for optimizer in optimizers:
                optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 0.002 if step > 500 else 0.05)
        step += 1
        now = torch.stack(parts).detach()
        mean = now if mean is None else mean.lerp(now, 0.02)
        if step % 50 == 0:
            line = f"{step},{','.join(f'{m:.4f}' for m in mean)},{norm:.2f},{rate:.2e},{time.time() - start:.0f}"
            print(line, flush=True)
            with open(log, "a") as f:
                f.write(line + "\n")
        if step % 500 == 0 or step == args.steps:
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(dict(model=model.state_dict(), optimizers=states, ema=ema, step=step), resume)
    with torch.no_grad():
        for p, e in zip(model.parameters(), ema):
            p.copy_(e)
    return model.eval()


def make_ssl(args):
    """CTC on the letters, and Whisper's features told from the last hidden state: it knows more than letters."""
    import jiwer
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2Processor, WavLMForCTC

    vocab = {c: i for i, c in enumerate(["<pad>", "<unk>", "|", "'"] + [chr(97 + i) for i in range(26)])}
    (args.work / "vocab.json").write_text(json.dumps(vocab))
    specials = dict(unk_token="<unk>", pad_token="<pad>", word_delimiter_token="|", bos_token=None, eos_token=None)
    tokenizer = Wav2Vec2CTCTokenizer(args.work / "vocab.json", **specials)
    ctc = dict(vocab_size=len(vocab), pad_token_id=0, ctc_loss_reduction="mean", ctc_zero_infinity=True)
    torch.manual_seed(args.seed)
    model = WavLMForCTC(tiny_wavlm(192, 5, 192, **ctc))
    both = torch.nn.ModuleDict(dict(model=model, tell=torch.nn.Linear(192, 512)))  # tell: for training only
    set_front_end(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    clips = []
    most = 0
    for folder in args.data + args.others:
        mine = read_clips([folder], ["train"])
        told = whisper_features(mine, args.whisper, args.work / f"whisper-{folder.name}.pt")
        clips += [clip._replace(told=t) for clip, t in zip(mine, told, strict=True)]
        most = len(clips) if folder in args.data else most
    print(f"{most} clips of the corpus, {len(clips) - most} others")
    some = torch.cat([clip.told for clip in clips[::5]]).float()
    centre = some.mean(0)
    spread = some.std(0)

    def epoch(rng):
        """The corpus and, clip for clip, a quarter as many of the others, in batches of similar lengths."""
        some = rng.sample(clips[most:], min(len(clips) - most, most // 4))
        return batches(clips[:most] + some, args.batch_seconds, rng)

    def loss_of(clips, rng):
        clips = [faster(clip, rng) for clip in clips]
        waves = [augment(clip.wave, rng) for clip in clips]
        mask = pad_sequence([torch.ones(len(w), dtype=torch.long) for w in waves], batch_first=True)
        labels = [torch.tensor([vocab[c] for c in clip.text.replace(" ", "|") if c in vocab]) for clip in clips]
        told = (pad_sequence([clip.told.float() for clip in clips], batch_first=True) - centre) / spread
        lengths = torch.tensor([len(clip.told) for clip in clips])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            hidden = model.wavlm(pad_sequence(waves, batch_first=True), attention_mask=mask).last_hidden_state
            wrong = both["tell"](hidden).float() - told
            logits = model.lm_head(hidden)
        valid = torch.arange(told.shape[1]) < lengths[:, None]
        scores = logits.float().log_softmax(-1).transpose(0, 1)
        ctc = F.ctc_loss(scores, torch.cat(labels), lengths, torch.tensor([len(t) for t in labels]), zero_infinity=True)
        return ctc, 4 * wrong.square().mean(-1)[valid].mean()

    fit(both, epoch, loss_of, args)
    model.half().save_pretrained(args.out)
    Wav2Vec2Processor(extractor(), tokenizer).save_pretrained(args.out)
    extractor().save_pretrained(args.out)
    model.float()
    for folder in args.data:
        valid = read_clips([folder], ["valid"])
        waves = [standard(torch.from_numpy(clip.wave.astype(np.float32))) for clip in valid]
        with torch.no_grad():
            heard = [tokenizer.decode(model(wave[None]).logits[0].argmax(-1)) for wave in waves]
        texts = [clip.text for clip in valid]
        if texts:
            print(f"{folder}, held-out sentences: WER {jiwer.wer(texts, heard):.4f}, CER {jiwer.cer(texts, heard):.4f}")


STRANGE = ["silence", "noise", "tone", "hum"]  # what is no voice: a class each


def strange(kind, length, rng):
    """float32 [T] of unit variance but for silence: what any voice must be unlike."""
    t = torch.arange(length) / RATE
    if kind == "silence":
        return torch.zeros(length)
    if kind == "noise":  # of any colour
        spectrum = torch.fft.rfft(torch.randn(length))
        slope = rng.choice([0, rng.uniform(-0.5, 1)])
        return standard(torch.fft.irfft(spectrum / torch.arange(1, len(spectrum) + 1) ** slope, length))
    if kind == "tone":  # one or some, steady or gliding
        pitches = [10 ** rng.uniform(1.8, 3.8) for _ in range(rng.choice([1, 1, 2, 4]))]
        glide = rng.choice([0, 0, rng.uniform(-0.2, 0.4)])
        parts = [torch.sin(2 * math.pi * hertz * t * (1 + glide * t)) * rng.uniform(0.2, 1) for hertz in pitches]
    else:  # steady harmonics, as of the mains or a buzzer
        hertz = rng.choice([50, 60, rng.uniform(50, 400)])
        slope = rng.uniform(0, 2)
        parts = [torch.sin(2 * math.pi * k * hertz * t + rng.uniform(0, 6)) / k**slope for k in range(1, 12)]
    return standard(standard(sum(parts)) + torch.randn(length) * 10 ** -rng.uniform(0.7, 4))


def make_sv(args):
    """A margin between the cosines of the embeddings themselves, without the classifier that usually is between."""
    from transformers import WavLMForXVector

    clips = read_clips(args.data + args.others, ["train", "valid"])
    names = sorted({clip.speaker for clip in clips}) + STRANGE
    head = dict(tdnn_dim=(128, 128, 128, 128, 256), xvector_output_dim=128, num_labels=len(names))
    torch.manual_seed(args.seed)
    model = WavLMForXVector(tiny_wavlm(128, 2, 96, use_weighted_layer_sum=True, **head))
    set_front_end(model)
    for layer in (model.projector, *(t.kernel for t in model.tdnn), model.feature_extractor):
        torch.nn.init.kaiming_normal_(layer.weight)  # as they come, embeddings are short and their gradients explode
    torch.nn.init.eye_(model.classifier.weight)  # stays so
    model.objective.margin = 0.2
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(names)} classes")

    def epoch(rng):
        size = round(args.batch_seconds / 2)
        mixed = rng.sample(clips, len(clips))
        return [mixed[i : i + size] for i in range(0, len(mixed), size)]

    def loss_of(clips, rng):
        length = round(rng.uniform(1.4, 2.4) * RATE)  # equal crops: no padding in the statistics
        crops = []
        for clip in clips:
            wave = np.tile(clip.wave, -(-length // len(clip.wave)))
            start = rng.randrange(len(wave) - length + 1)
            crops.append(augment(wave[start : start + length], rng))
        crops += [strange(kind, length, rng) for kind in STRANGE]
        labels = torch.tensor([names.index(name) for name in [*(clip.speaker for clip in clips), *STRANGE]])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            embeddings = model(torch.stack(crops)).embeddings
        return (model.objective(embeddings.float(), labels),)

    fit(model, epoch, loss_of, args)
    model.half().save_pretrained(args.out)
    extractor().save_pretrained(args.out)


# ----------------------------------------------------------------------------- weights
def export(args):
    """The averaged weights of a run in float16, its settings and its log; a DiT's path to its VAE is made to fit its
    new place."""
    sys.path.insert(0, str(HERE.parent))
    from model import DiT, SemanticVAE

    notes = json.loads((args.run / "config.json").read_text())
    kind = {"DiT": DiT, "SemanticVAE": SemanticVAE}[notes.pop("model")]
    del notes["config"]  # save_pretrained writes it again
    model = kind.from_pretrained(args.run)
    if kind is DiT:  # its VAE's latents differ by the rounding of the weights, and so does their name
        if not args.vae:
            sys.exit("error: a DiT needs --vae, where its exported VAE is")
        whole = SemanticVAE.from_pretrained(args.run / notes["vae"])
        names = (whole.latents_hash(), whole.half().float().latents_hash())
        if SemanticVAE.from_pretrained(args.vae).latents_hash() not in names:
            sys.exit(f"error: {args.vae} is not the VAE of {args.run}")
        notes["vae"] = os.path.relpath(args.vae, args.out.resolve())
        model.config = dataclasses.replace(model.config, vae_hash=SemanticVAE.from_pretrained(args.vae).latents_hash())
    model.save_pretrained(args.out, torch.float16, **notes)
    for name in ("args.json", "log.csv"):
        shutil.copy(args.run / name, args.out / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["corpus", "ssl", "sv", "export", "features"])
    parser.add_argument("--out", type=Path, help="default: demo/WHAT; export needs it")
    parser.add_argument("--kokoro", type=Path, help="corpus: folder of the voices")
    parser.add_argument("--voices", type=int, default=48, help="corpus: voices to train on")
    parser.add_argument("--sentences", type=int, default=26, help="corpus: training sentences a voice")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="corpus: processes that speak")
    folders = "ssl, sv: a corpus; features: a prepared folder; may be repeated"
    parser.add_argument("--data", type=Path, action="append", default=[], help=folders)
    parser.add_argument("--others", type=Path, action="append", default=[], help="ssl, sv: folder of other clips")
    parser.add_argument("--whisper", type=Path, help="ssl, features: folder of Whisper base in CTranslate2's form")
    parser.add_argument("--run", type=Path, help="export: the run's folder")
    parser.add_argument("--vae", type=Path, help="export: where a DiT's exported VAE is")
    parser.add_argument("--work", type=Path, default=Path("/tmp/demo-make"), help="ssl, sv: the state to resume from")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch-seconds", type=float, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "export" and not args.out:
        parser.error("export needs --out: demo/vae or demo/tts")
    torch.set_num_threads(1)
    args.out = args.out or HERE / args.what
    if args.what != "features":
        args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    makers = dict(corpus=make_corpus, ssl=make_ssl, sv=make_sv, export=export, features=store_features)
    makers[args.what](args)
