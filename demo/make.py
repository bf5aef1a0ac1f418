"""How everything in demo/ was made. Needed only to make it again; the repository's scripts never import this file.

    python demo/make.py corpus                        # demo/corpus: 16 synthetic voices, about half an hour (needs flite)
    python demo/make.py corpus --voices 96 --out BIG  # more voices and sentences, for training only
    python demo/make.py ssl --data BIG [--data REAL]  # demo/ssl: tiny WavLM with a CTC head: teacher and recogniser
    python demo/make.py sv  --data BIG [--data REAL]  # demo/sv: tiny WavLM x-vector: speaker similarity
    python demo/make.py export --run RUN --out DIR    # demo/vae and demo/tts: a run's weights in float16, and its log
    python demo/make.py dilemma --work W --run ROW --run ROW …   # demo/dilemma: the small reproduction of the paper's comparison

flite (a Debian package) speaks the sentences with four voices; their pitch, formants and rate are changed so that every
voice number is a speaker of its own. Voices 12-15 and one sentence in eight are held out from all training.
"""

import argparse
import csv
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torchaudio

HERE = Path(__file__).resolve().parent
RATE = 16000
TEST_VOICES = range(12, 16)  # never trained on, by anything in demo/

# ----------------------------------------------------------------------------- sentences: a grammar of 71 words
WHO = "dog cat bird horse boy girl farmer teacher king queen doctor sailor".split()
HOW = "old young little happy quiet clever".split()
WHOSE = "the my our your".split()
SAW = "saw found followed heard called loved".split()
SLEPT = "slept sang waited danced walked laughed".split()
TOOK = "took wanted brought carried".split()
WHAT = "apple letter book song lamp boat".split()
WHERE = ["in the garden", "by the river", "near the forest", "in the kitchen", "at the market", "behind the mountain",
         "near the village", "by the window"]
WHEN = ["today", "again", "at night", "this morning"]
HOWDONE = ["slowly", "alone"]  # only after verbs that bear it


def sentence(rng: random.Random) -> str:
    """One English sentence of three to seven words."""
    who = lambda: f"{rng.choice(WHOSE)} {rng.choice(HOW)} {rng.choice(WHO)}" if rng.random() < 0.5 else f"{rng.choice(WHOSE)} {rng.choice(WHO)}"
    after = lambda *more: rng.choice([" " + rng.choice(WHERE), " " + rng.choice(WHEN + list(more)), ""])
    while True:
        text = rng.choice([
            lambda: f"{who()} {rng.choice(SLEPT)}{after(*HOWDONE)}",
            lambda: f"{who()} {rng.choice(SAW)} {who()}{after()}",
            lambda: f"{who()} {rng.choice(TOOK)} the {rng.choice(WHAT)}{after()}",
            lambda: f"where is {who()}",
            lambda: f"please find the {rng.choice(WHAT)}{after()}",
            lambda: f"did you see {who()}{after()}",
        ])()
        if 3 <= len(text.split()) <= 7:
            return text


def held_out(text: str) -> bool:
    return zlib.crc32(text.encode()) % 8 == 0


# ----------------------------------------------------------------------------- voices
def voice(i: int) -> dict:
    """Voice number i: one of flite's four, with pitch, formants and rate from a low-discrepancy sequence."""
    u = [(0.5 + (i + 1) * a) % 1 for a in (0.8191725134, 0.6710436067, 0.5497004779)]
    return dict(base=("kal16", "awb", "rms", "slt")[i % 4], formant=0.84 * (1.22 / 0.84) ** u[0],
                pitch=85 * (240 / 85) ** u[1], stretch=0.95 + 0.25 * u[2])


def speak(text: str, base: str, formant: float, pitch: float, stretch: float) -> np.ndarray:
    """Float32 samples [T] at 16 kHz. Playing a voice faster by `formant` moves its formants; pitch and rate are pre-compensated."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as f:
        subprocess.run(["flite", "-voice", base, "--setf", f"int_f0_target_mean={pitch / formant:.1f}",
                        "--setf", f"duration_stretch={stretch * formant:.3f}", "-t", text, "-o", f.name], check=True)
        wave = torch.from_numpy(sf.read(f.name, dtype="float32")[0])
    wave = torchaudio.functional.resample(wave, round(40 * formant), 40)
    loud = (wave.abs() > 0.02 * wave.abs().max()).nonzero()
    wave = wave[max(0, loud[0].item() - RATE // 10) : loud[-1].item() + RATE // 10]  # a tenth of a second of silence at both ends
    return (wave * 0.08 / wave.square().mean().sqrt()).clamp(-0.99, 0.99).numpy()


def make_corpus(args):
    """audio/*.opus, manifest.csv (audio|speaker|text|split) and test.lst (LibriSpeech-PC's six columns)."""
    rng, seen, rows, test = random.Random(args.seed), set(), [], {}
    (args.out / "audio").mkdir(parents=True, exist_ok=True)
    count = {"train": args.sentences, "valid": 3, "test": 12}
    for v in range(args.voices):
        for split in ("test",) if v in TEST_VOICES else ("train", "valid"):
            if split == "test" and args.voices > 16:
                continue  # larger corpora are for training only
            for n in range(count[split]):
                while (text := sentence(rng)) in seen or held_out(text) != (split != "train"):
                    pass
                if args.voices <= 16:
                    seen.add(text)
                wave = speak(text, **voice(v))
                name = f"audio/v{v:02d}_{split}_{n:03d}.opus"
                sf.write(args.out / name, wave, RATE, format="OGG", subtype="OPUS", compression_level=0.94)
                rows.append([name, f"v{v:02d}", text, split])
                if split == "test":
                    test.setdefault(v, []).append((name, len(wave) / RATE, text))
    with open(args.out / "manifest.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter="|", lineterminator="\n").writerows([["audio", "speaker", "text", "split"], *rows])
    with open(args.out / "test.lst", "w", encoding="utf-8") as f:
        for clips in test.values():  # every held-out clip's sentence, spoken after the voice's next clip as prompt
            for (gen, gen_s, gen_text), (ref, ref_s, ref_text) in zip(clips, clips[1:] + clips[:1]):
                f.write(f"{ref}\t{ref_s:.3f}\t{ref_text}\t{gen}\t{gen_s:.3f}\t{gen_text}\n")
    seconds = sum(sf.info(args.out / r[0]).duration for r in rows)
    size = sum(p.stat().st_size for p in (args.out / "audio").iterdir())
    print(f"{len(rows)} clips, {seconds / 60:.1f} minutes, {len({w for r in rows for w in r[2].split()})} words, {size / 1e6:.2f} MB")


# ----------------------------------------------------------------------------- training clips for the two small models
def read_clips(folders, split):
    """[(wave, speaker, text)] of a split; a folder holds manifest.csv or metadata.csv, separated by |. Test clips never train."""
    clips = []
    for folder in folders:
        table = next(p for p in (folder / "manifest.csv", folder / "metadata.csv") if p.exists())
        for row in csv.DictReader(open(table, encoding="utf-8"), delimiter="|", quoting=csv.QUOTE_NONE):
            if row["split"] == split:
                wave = sf.read(folder / row.get("audio", row.get("file")), dtype="float32")[0]
                if len(wave) < 8 * RATE:
                    clips.append((wave.astype(np.float16), f"{folder.name}/{row['speaker']}", row["text"].lower()))
    return clips


def augment(wave, rng, speed=True):
    """Random rate (with pitch and formants), and white noise at 15-50 dB below the speech."""
    wave = torch.from_numpy(wave.astype(np.float32))
    if speed:
        wave = torch.nn.functional.interpolate(wave[None, None], scale_factor=rng.uniform(0.88, 1.12), mode="linear")[0, 0]
    noise = wave.std() * 10 ** (-rng.uniform(15, 50) / 20)
    return ((wave - wave.mean()) / (wave.std() + 1e-5) + torch.randn(len(wave)) * noise / (wave.std() + 1e-5))


def batches(clips, seconds, rng):
    """Index lists of similar lengths, in random order, each of at most `seconds` of padded audio."""
    order = sorted(range(len(clips)), key=lambda i: len(clips[i][0]) + rng.uniform(0, RATE / 2))
    out, batch = [], []
    for i in order:
        if batch and len(clips[i][0]) * (len(batch) + 1) > seconds * RATE:
            out.append(batch)
            batch = []
        batch.append(i)
    out.append(batch)
    rng.shuffle(out)
    return out


def pad(waves):
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(w), dtype=torch.long) for w in waves], batch_first=True)
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), mask


def gabor_filters(bands: int = 48, taps: int = 400) -> torch.Tensor:
    """[4 · bands, 1, taps]: windowed sinusoids on the mel scale, each in four phases, louder with frequency as speech is softer.

    The rectified phases add up to about a mel spectrogram, from which CTC learns in a tenth of the steps that raw waves need."""
    mel = lambda f: 2595 * math.log10(1 + f / 700)
    centre = 700 * (10 ** (torch.linspace(mel(80), mel(7400), bands) / 2595) - 1)  # Hz
    width = (0.12 * centre).clamp(min=60)  # Hz: a Gaussian in frequency, and so in time
    t = (torch.arange(taps) - (taps - 1) / 2) / RATE
    envelope = torch.exp(-2 * (math.pi * width[:, None] * t / 1.5) ** 2)
    phases = torch.stack([torch.cos(2 * math.pi * centre[:, None] * t + k * math.pi / 2) for k in range(4)], 1)  # [bands, 4, taps]
    filters = phases * envelope[:, None] / envelope.sum(1)[:, None, None] * (centre / 500).clamp(min=0.5)[:, None, None]
    return filters.flatten(0, 1)[:, None]


def tiny_wavlm(width, layers, conv, **extra):
    from transformers import WavLMConfig

    return WavLMConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 32, intermediate_size=width * 3, conv_dim=(192, conv),
        conv_stride=(160, 2), conv_kernel=(400, 3), conv_bias=True,  # 50 frames a second, as the big ones, in two layers for seven
        num_conv_pos_embeddings=31, num_conv_pos_embedding_groups=8, feat_extract_norm="layer", do_stable_layer_norm=True,
        num_buckets=64, max_bucket_distance=200, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        feat_proj_dropout=0.0, final_dropout=0.0, layerdrop=0.0, mask_time_prob=0.05, mask_time_length=5, **extra)


def extractor():
    from transformers import Wav2Vec2FeatureExtractor

    return Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=RATE, padding_value=0.0, do_normalize=True, return_attention_mask=True)


def set_front_end(model):
    with torch.no_grad():
        first = model.wavlm.feature_extractor.conv_layers[0].conv
        first.weight.copy_(3 * gabor_filters())
        first.bias.zero_()


def fit(model, optimizer, total, loss_of, clips, args, log):
    """`total` updates with warm-up and cosine decay; EMA weights (0.998) are left in the model at the end."""
    rng, step, start, mean = random.Random(args.seed), 0, time.time(), 0.0
    ema = [p.detach().clone() for p in model.parameters()]
    resume = args.work / f"{args.what}.pt"
    if resume.exists():
        saved = torch.load(resume, weights_only=True)
        model.load_state_dict(saved["model"]), optimizer.load_state_dict(saved["optimizer"])
        ema, step = [e.detach() for e in saved["ema"]], saved["step"]
        rng.seed(args.seed + step), torch.manual_seed(args.seed + step)
    queue = []
    while step < total:
        if not queue:
            queue = batches(clips, args.batch_seconds, rng)
        rate = args.lr * min(1, step / args.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        loss = loss_of([clips[i] for i in queue.pop()], rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        torch._foreach_lerp_(ema, [p.detach() for p in model.parameters()], 0.002 if step > 500 else 0.05)
        step += 1
        mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
        if step % 50 == 0:
            line = f"{step},{mean:.4f},{norm:.2f},{rate:.2e},{time.time() - start:.0f}"
            print(line, flush=True)
            open(log, "a").write(line + "\n")
        if step % 500 == 0 or step == total:
            torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema, step=step), resume)
    with torch.no_grad():
        for p, e in zip(model.parameters(), ema):
            p.copy_(e)
    return model.eval()


def make_ssl(args):
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2Processor, WavLMForCTC

    args.out.mkdir(parents=True, exist_ok=True)
    vocab = {c: i for i, c in enumerate(["<pad>", "<unk>", "|", "'"] + [chr(97 + i) for i in range(26)])}
    (args.work / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = Wav2Vec2CTCTokenizer(args.work / "vocab.json", bos_token=None, eos_token=None, unk_token="<unk>", pad_token="<pad>", word_delimiter_token="|")
    config = tiny_wavlm(192, 5, 192, vocab_size=len(vocab), pad_token_id=0, ctc_loss_reduction="mean", ctc_zero_infinity=True)
    torch.manual_seed(args.seed)
    model = WavLMForCTC(config)
    set_front_end(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    train, valid = read_clips(args.data, "train"), read_clips(args.data, "valid")
    ids = lambda text: torch.tensor([vocab[c] for c in text.replace(" ", "|") if c in vocab])

    def loss_of(clips, rng):
        wave, mask = pad([augment(w, rng) for w, _, _ in clips])
        labels = torch.nn.utils.rnn.pad_sequence([ids(t) for _, _, t in clips], batch_first=True, padding_value=-100)
        return model(wave, attention_mask=mask, labels=labels).loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    fit(model, optimizer, args.steps, loss_of, train, args, args.out / "log.csv")
    model.half().save_pretrained(args.out)
    Wav2Vec2Processor(extractor(), tokenizer).save_pretrained(args.out)
    import jiwer

    model.float()
    with torch.no_grad():
        hyps = [tokenizer.decode(model(torch.tensor((w - w.mean()) / (w.std() + 1e-5))[None]).logits[0].argmax(-1)) for w in (c[0].astype(np.float32) for c in valid)]
    print("valid WER", jiwer.wer([c[2] for c in valid], hyps), "CER", jiwer.cer([c[2] for c in valid], hyps))


def make_sv(args):
    from transformers import WavLMForXVector

    args.out.mkdir(parents=True, exist_ok=True)
    train = read_clips(args.data, "train")
    names = sorted({s for _, s, _ in train})
    config = tiny_wavlm(128, 2, 96, use_weighted_layer_sum=True, tdnn_dim=(128, 128, 128, 128, 256), xvector_output_dim=128, num_labels=len(names))
    torch.manual_seed(args.seed)
    model = WavLMForXVector(config)
    set_front_end(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(names)} speakers")

    def loss_of(clips, rng):
        waves = [augment(w, rng, speed=False) for w, _, _ in clips]
        length = min(min(map(len, waves)), 2 * RATE)  # equal crops: no padding in the statistics
        starts = [rng.randrange(len(w) - length + 1) for w in waves]
        return model(torch.stack([w[s : s + length] for w, s in zip(waves, starts)]), labels=torch.tensor([names.index(s) for _, s, _ in clips])).loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    fit(model, optimizer, args.steps, loss_of, train, args, args.out / "log.csv")
    model.half().save_pretrained(args.out)
    extractor().save_pretrained(args.out)


def export(args):
    """The averaged weights of a run in float16, its settings and its log; a DiT's path to its VAE is made to fit its new place."""
    sys.path.insert(0, str(HERE.parent))
    from model import DiT, SemanticVAE

    run = Path(args.run[0])
    notes = json.loads((run / "config.json").read_text())
    kind = {"DiT": DiT, "SemanticVAE": SemanticVAE}[notes.pop("model")]
    del notes["config"]  # save_pretrained writes it again
    if "vae" in notes:
        notes["vae"] = os.path.relpath((run / notes["vae"]).resolve(), args.out.resolve())
    kind.from_pretrained(run).save_pretrained(args.out, torch.float16, **notes)
    for name in ("args.json", "log.csv"):
        shutil.copy(run / name, args.out / name)


def make_dilemma(args):
    """The rows of the small reproduction side by side. For each ROW, --work holds the runs v-ROW and t-ROW, evaluate.py's scores/ROW.csv, and of another judge
    scores/ROW/{reconstruction,synthesis}.judge, a line an utterance: WER %, similarity, file, |text| -> |heard|. Written are all settings and logs, every
    utterance's scores, the figure, and the table, with 95 % bootstrap intervals over utterances."""
    import jiwer
    from matplotlib.figure import Figure

    sys.path.insert(0, str(HERE.parent))
    from evaluate import interval, normalize

    spread = lambda values, digits: "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(np.mean(values), *interval(values), d=digits)
    read = lambda path: list(csv.DictReader(open(path, encoding="utf-8")))
    figure, utterances = Figure((10, 4), layout="constrained"), []
    across, along = figure.subplots(1, 2)
    table = ["| row | mel | judge: WER % | SIM | demo's: CER % | judge: WER % | SIM | demo's: CER % | `valid_loss` |", "|---" * 9 + "|"]
    for row in args.run:
        for name in ("args.json", "log.csv"):
            for stage in ("vae", "tts"):
                (args.out / row / stage).mkdir(parents=True, exist_ok=True)
                shutil.copy(args.work / f"{stage[0]}-{row}" / name, args.out / row / stage / name)
        scores, cells = {}, []
        for line in read(args.work / "scores" / f"{row}.csv"):
            cer = 100 * jiwer.cer(normalize(line["reference"]), normalize(line["hypothesis"]))
            scores[line["system"], Path(line["utterance"]).stem] = dict(row=row, system=line["system"], utterance=line["utterance"], mel=float(line["mel"] or "nan"), cer=cer, heard=line["hypothesis"])
        for system in ("reconstruction", "synthesis"):
            for line in (args.work / "scores" / row / f"{system}.judge").read_text(encoding="utf-8").splitlines():
                if found := re.fullmatch(r" *([\d.]+) +([\d.]+) +(?:rec_)?(\S+)\.wav +\|.*\| +-> +\|(.*)\|", line):
                    scores[system, found[3]] |= dict(judge_wer=float(found[1]), judge_sim=float(found[2]), judge_heard=found[4])
            mine = [v for (kind, _), v in scores.items() if kind == system]
            cells += [spread([v["judge_wer"] for v in mine], 0), spread([v["judge_sim"] for v in mine], 2), spread([v["cer"] for v in mine], 0)]
            utterances += mine
        mel = np.mean([v["mel"] for (kind, _), v in scores.items() if kind == "reconstruction"])
        errors = [v["cer"] for (kind, _), v in scores.items() if kind == "synthesis"]
        log = [r for r in read(args.out / row / "tts" / "log.csv") if r["cer"]]
        low, high = interval(errors)
        colour = next(iter(across.errorbar(mel, np.mean(errors), [[np.mean(errors) - low], [high - np.mean(errors)]], fmt="o", capsize=3))).get_color()
        along.plot([int(r["step"]) for r in log], [100 * float(r["cer"]) for r in log], label=row, color=colour)
        table.append(f"| {row} | {mel:.2f} | {' | '.join(cells)} | {log[-1]['valid_loss']} |")
    across.set(xlabel="mel distance of reconstructions", ylabel="character errors of syntheses, %")
    along.set(xlabel="step of the DiT", ylabel="character errors of 12 fixed sentences, %"), figure.legend(loc="outside right upper")
    figure.savefig(args.out / "dilemma.svg", metadata=dict(Date=None))
    with open(args.out / "utterances.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, utterances[0], lineterminator="\n")
        writer.writeheader(), writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in u.items()} for u in utterances)
    print("\n".join(table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["corpus", "ssl", "sv", "export", "dilemma"])
    parser.add_argument("--out", type=Path, help="default: demo/WHAT; export needs it")
    parser.add_argument("--data", type=Path, action="append", default=[], help="ssl, sv: folder with manifest.csv or metadata.csv; may be repeated")
    parser.add_argument("--run", action="append", default=[], help="export: a run folder; dilemma: the names of the rows")
    parser.add_argument("--work", type=Path, default=Path("/tmp/demo-make"), help="ssl, sv: where the state to resume from is kept; dilemma: where everything is")
    parser.add_argument("--voices", type=int, default=16)
    parser.add_argument("--sentences", type=int, default=66, help="training sentences a voice")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch-seconds", type=float, default=40)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not {"export": len(args.run) == 1, "dilemma": args.run}.get(args.what, not args.run):
        parser.error("export takes one --run, dilemma some, the others none")
    if args.what == "export" and not args.out:
        parser.error("export needs --out: demo/vae or demo/tts")
    args.out = args.out or HERE / args.what
    args.work.mkdir(parents=True, exist_ok=True)
    {"corpus": make_corpus, "ssl": make_ssl, "sv": make_sv, "export": export, "dilemma": make_dilemma}[args.what](args)
