"""Word error rate and speaker similarity of recordings, reconstructions and synthesised speech.

    python evaluate.py                                                     # the demo's table, after sample.py --list demo/corpus/test.lst
    python evaluate.py --list LST --audio LibriSpeech/test-clean --generated runs/samples \\
        --asr openai/whisper-large-v3 --sim wavlm_large_finetune.pth        # the papers' scorers; or any Hugging Face models
    python evaluate.py --list LST --audio ... --reconstruct runs/vae       # the VAE's encode-decode, with mel and STFT distance
    torchrun --nproc_per_node 8 evaluate.py ...                            # shared between 8 GPUs

Every row of the table has the mean of per-utterance WERs (the papers' score), the corpus WER, the mean WER after Whisper's own
normaliser, and SIM to the prompt; the brackets are 95 % bootstrap intervals over utterances. The signature line below it names
all that the numbers depend on: without it they mean nothing. Interrupted and run again, it goes on.
"""

import argparse
import base64
import contextlib
import csv
import functools
import html
import io
import json
import re
import shutil
import string
import sys
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import soundfile as sf
import torch
import torch.nn.functional as F
import torchaudio
from torch import nn
from tqdm import tqdm

from model import InputError, SemanticVAE, load_torch, read_json, write_atomic
from prepare import (DEMO, at_least, barrier, cli, file_stamp, from_hub, lock, loudness, read_audio, read_lines, resample, revision,
                     start_ranks)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A line of a LibriSpeech-PC list: say `text`, in the voice of recording `ref`."""

    ref: str
    ref_seconds: float
    ref_text: str
    gen: str  # the recording in which the same voice really says it
    gen_seconds: float
    text: str

    @property
    def says(self) -> int:  # changes with what is to be said, and after what
        return zlib.crc32(repr((self.ref, self.ref_text, self.text)).encode())

    @property
    def wav(self) -> str:
        """File name of the synthesised speech."""
        return Path(self.gen).stem + ".wav"


UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # scripts without spaces: Thai to Khmer, kana, Han


def read_list(path: Path) -> list[Line]:
    """ref_utt, ref_seconds, ref_text, gen_utt, gen_seconds, gen_text, tab-separated, as F5-TTS publishes it."""
    try:
        rows = [row.split("\t") for _, row in read_lines(path)]
        lines = [Line(ref, float(a), ref_text.strip(), gen, float(b), text.strip()) for ref, a, ref_text, gen, b, text in rows]
    except (OSError, ValueError) as e:
        raise InputError(f"{path} is not a list of six tab-separated columns ref_utt, ref_seconds, ref_text, gen_utt, gen_seconds, gen_text: {e}. "
                         f"seed-tts-eval's meta.lst becomes one by awk -F'|' -v OFS='\\t' '{{print $3, 1, $2, $1, 1, $4}}'") from e  # fmt: skip
    if any("\0" in line.gen + line.ref for line in lines):
        raise InputError(f"{path} has a file name with a null byte")
    names = Counter(line.wav for line in lines)
    if len(names) < len(lines) or not lines:
        raise InputError(f"{path} has {f'several lines for {names.most_common(1)[0][0]}' if lines else 'no lines'}")
    return lines


def find_audio(root: Path, name: str) -> Path:
    """The recording `name`: a path below `root`, or a LibriSpeech id (SPEAKER-CHAPTER-NUMBER) in its layout."""
    speaker, chapter = (name.split("-") + [""])[:2]
    places = [root / name, *(root / speaker / chapter / f"{name}.{suffix}" for suffix in ("flac", "wav")), root / f"{name}.wav"]
    for place in places:
        if place.is_file():
            return place
    raise InputError(f"no recording {name} in {root} (looked for {places[0]} and {places[1]})")


# --------------------------------------------------------------------------------------------------------------
# The scores.


def normalize(text: str) -> str:
    """The seed-tts-eval rule: every punctuation character removed (apostrophes too), single spaces, lower case."""
    kept = (c for c in text if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return " ".join("".join(kept).split()).lower()


def unspaced(text: str) -> bool:
    return len(re.findall(f"[{UNSPACED}]", text)) > len(text) / 2


def error_rates(references: list[str], hypotheses: list[str]) -> dict[str, float]:
    """{cer, wer} over all pairs together, after normalisation. Spaces are no characters where the script writes none."""
    references, hypotheses = [normalize(t) for t in references], [normalize(t) for t in hypotheses]
    characters = [[t.replace(" ", "") if unspaced(t) else t for t in texts] for texts in (references, hypotheses)]
    return dict(cer=jiwer.cer(*characters), wer=jiwer.wer(references, hypotheses))


def interval(values: list[float], resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: its spread over redrawn sets of utterances."""
    means = np.random.default_rng(0).choice(values, (resamples, len(values))).mean(1)
    return tuple(np.percentile(means, (2.5, 97.5)))


def si_sdr(estimate: torch.Tensor, target: torch.Tensor) -> float:
    """Scale-invariant signal-to-distortion ratio in dB of waves [T] (arXiv 1811.02508). Vocoders invent phases: near or below 0."""
    estimate, target = estimate - estimate.mean(), target - target.mean()
    projection = (estimate @ target) / (target @ target) * target
    return 10 * ((projection @ projection) / (estimate - projection).square().sum()).log10().item()


def identity(name: str, config=None) -> str:
    """NAME@REVISION of a hub model, NAME@sha256:… of a local folder or file."""
    return f"{Path(name).name if Path(name).exists() else name}@{revision(name, config)}"


class Recognizer:
    """A Hugging Face speech recogniser, Whisper or CTC, by id or folder. A multilingual Whisper is told the language; the others know but their own.

    half: matrix products in float16, in which Whisper was published. float32 everywhere else, here and in the speaker models."""

    def __init__(self, name: str, device, language: str = "en", half: bool = False):
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
        from transformers.models.whisper.tokenization_whisper import LANGUAGES

        (config,) = from_hub("recogniser", name, "Config")
        self.whisper = config.model_type == "whisper"
        model, self.extractor, self.tokenizer = from_hub("recogniser", name, "ModelForSpeechSeq2Seq" if self.whisper else "ModelForCTC", "FeatureExtractor", "Tokenizer")
        self.model, self.device, self.identity = model.float().to(device).eval(), device, identity(name, config)
        self.half = half
        self.told, multilingual = {}, self.whisper and getattr(model.generation_config, "is_multilingual", True)
        spoken = ["en"] if self.whisper else LANGUAGES  # of a CTC model nobody knows: it is not told
        if multilingual:
            spoken = [token.strip("<|>") for token in getattr(model.generation_config, "lang_to_id", {})]
        if language not in spoken:
            raise InputError(f"{name} knows no --language {language}, but {', '.join(sorted(spoken))}")
        if multilingual:
            self.told, self.identity = dict(language=language, task="transcribe"), self.identity + f"/{language}" * (language != "en")
        spellings = getattr(self.tokenizer, "english_spelling_normalizer", None) or {}  # the map is Whisper's
        self.whisper_normalize = EnglishTextNormalizer(spellings) if language == "en" else None

    @torch.no_grad()
    def __call__(self, waves: list[np.ndarray], rate: int = 16000) -> list[str]:
        """float32 audio, each [T] → texts. Whisper by beam search of width 5; it hears 30 s, so what is longer in pieces of 30 s."""
        wanted = self.extractor.sampling_rate
        longest = 30 * wanted if self.whisper else sys.maxsize
        waves = [resample(wave, rate, wanted) for wave in waves]
        pieces = [(i, wave[start : start + longest]) for i, wave in enumerate(waves) for start in range(0, len(wave), longest)]
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            if self.whisper:
                features = self.extractor([piece for _, piece in pieces], sampling_rate=wanted, return_tensors="pt").input_features
                ids = self.model.generate(features.to(self.device), num_beams=5, **self.told)
            else:  # one by one: these models hear padding
                inputs = [self.extractor(piece, sampling_rate=wanted, return_tensors="pt").to(self.device) for _, piece in pieces]
                ids = [self.model(**one).logits[0].argmax(-1) for one in inputs]
        texts = [""] * len(waves)
        for (i, _), row in zip(pieces, ids):  # CTC: the blank keeps doubled letters apart
            texts[i] = f"{texts[i]} {self.tokenizer.decode(row, skip_special_tokens=self.whisper).strip()}".strip()
        return texts


class SpeakerModel:
    """A Hugging Face x-vector model, by id or folder. Its similarity is the cosine of two recordings' embeddings."""

    def __init__(self, name: str, device):
        self.extractor, model = from_hub("speaker model", name, "FeatureExtractor", "ModelForAudioXVector")
        self.model, self.device, self.identity = model.float().to(device).eval(), device, identity(name, model.config)

    @torch.no_grad()
    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """float32 audio [T] at 16 kHz → unit vector."""
        inputs = self.extractor(wave, sampling_rate=16000, return_tensors="pt").to(self.device)
        return F.normalize(self.model(inputs.input_values).embeddings, dim=-1)[0].cpu().numpy()


# --------------------------------------------------------------------------------------------------------------
# SIM-o, the papers' scorer: WavLM-Large and an ECAPA-TDNN (arXiv 2005.07143) fine-tuned together for speaker verification. Names are those of
# its published file, wavlm_large_finetune.pth.


class ConvReluNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(inputs, outputs, kernel, padding="same"), nn.BatchNorm1d(outputs)

    def forward(self, x):
        return self.bn(F.relu(self.conv(x)))


class Res2(nn.Module):
    """Eight splits of the channels: each but the last is convolved after adding what came out of the one before."""

    def __init__(self, channels: int, dilation: int, splits: int = 8):
        super().__init__()
        width = channels // splits
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for _ in range(splits - 1))
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(splits - 1))

    def forward(self, x):
        *splits, last = x.chunk(len(self.convs) + 1, dim=1)
        out, y = [], 0
        for split, conv, bn in zip(splits, self.convs, self.bns):
            out.append(y := bn(F.relu(conv(split + y))))
        return torch.cat([*out, last], dim=1)


class SERes2Block(nn.Module):
    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.Conv1dReluBn1, self.Conv1dReluBn2 = (ConvReluNorm(channels, channels, 1) for _ in range(2))
        self.Res2Conv1dReluBn = Res2(channels, dilation)
        self.SE_Connect = nn.ModuleDict(dict(linear1=nn.Linear(channels, 128), linear2=nn.Linear(128, channels)))

    def forward(self, x):  # [B, C, T]
        y = self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(x)))
        gate = self.SE_Connect["linear2"](F.relu(self.SE_Connect["linear1"](y.mean(-1)))).sigmoid()
        return x + y * gate[..., None]


class ECAPA(nn.Module):
    def __init__(self, features: int, states: int = 25, channels: int = 512):
        super().__init__()
        self.feature_weight = nn.Parameter(torch.zeros(states))
        self.layer1 = ConvReluNorm(features, channels, 5)
        self.layer2, self.layer3, self.layer4 = (SERes2Block(channels, dilation) for dilation in (2, 3, 4))
        self.conv = nn.Conv1d(3 * channels, 3 * channels, 1)
        self.pooling = nn.ModuleDict(dict(linear1=nn.Conv1d(3 * channels, 128, 1), linear2=nn.Conv1d(128, 3 * channels, 1)))
        self.bn, self.linear = nn.BatchNorm1d(6 * channels), nn.Linear(6 * channels, 256)

    def forward(self, states):
        """25 states of WavLM, each [B, T, features] → [B, 256]."""
        x = sum(w * s for w, s in zip(self.feature_weight.softmax(0), states, strict=True)).mT + 1e-6  # [B, features, T]
        a = self.layer1(F.instance_norm(x))
        b = self.layer2(a)
        c = self.layer3(b)
        d = self.layer4(c)
        x = F.relu(self.conv(torch.cat([b, c, d], dim=1)))
        attention = self.pooling["linear2"](self.pooling["linear1"](x).tanh()).softmax(-1)
        mean = (attention * x).sum(-1)
        deviation = ((attention * x.square()).sum(-1) - mean.square()).clamp(min=1e-9).sqrt()
        return self.linear(self.bn(torch.cat([mean, deviation], dim=1)))


class SIMo:
    """The scorer from its file, {"model": weights}, alone. Every weight must find its place, but for the classifier of its training."""

    NAMES = {  # of WavLM's parts: in the file, in transformers
        "feature_extract.model.layer_norm": "feature_projection.layer_norm", "feature_extract.model.": "", "mask_emb": "masked_spec_embed",
        "post_extract_proj": "feature_projection.projection", "encoder.pos_conv.0": "encoder.pos_conv_embed.conv", ".0.weight": ".conv.weight", ".2.1.": ".layer_norm.",
        "self_attn_layer_norm": "layer_norm", "self_attn": "attention", "grep_linear": "gru_rel_pos_linear", "grep_a": "gru_rel_pos_const",
        "relative_attention_bias": "rel_attn_embed", "fc1": "feed_forward.intermediate_dense", "fc2": "feed_forward.output_dense"}  # fmt: skip

    def __init__(self, path: str, device):
        from transformers import WavLMConfig, WavLMModel

        try:
            front, head = {}, {}
            for name, value in load_torch(Path(path))["model"].items():
                if name.startswith("feature_extract."):
                    for theirs, ours in self.NAMES.items():
                        name = name.replace(theirs, ours)
                    front[name] = value
                elif not name.startswith("loss_calculator."):  # the classifier of its training
                    head[name] = value
            width, narrow = front["feature_projection.projection.weight"].shape
            heads, inner = front["encoder.layers.0.attention.gru_rel_pos_const"].shape[1], len(front["encoder.layers.0.feed_forward.intermediate_dense.bias"])
            config = WavLMConfig(hidden_size=width, conv_dim=[narrow] * 7, num_hidden_layers=len(head["feature_weight"]) - 1, num_attention_heads=heads, intermediate_size=inner,
                                 feat_extract_norm="layer", do_stable_layer_norm=True)  # fmt: skip
            self.wavlm, self.ecapa, self.device = WavLMModel(config).eval().to(device), ECAPA(width, len(head["feature_weight"])).eval().to(device), device
            self.wavlm.load_state_dict(front)
            self.ecapa.load_state_dict(head)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise InputError(f"{path} does not hold the weights of WavLM and ECAPA-TDNN: {' '.join(str(e).split())[:300]}") from e
        self.identity = identity(path)

    @torch.no_grad()
    def states(self, waves):
        """[B, T] at 16 kHz → WavLM's 25 states, each [B, frames, features]; the last is taken after the final layer norm."""
        out = self.wavlm(F.layer_norm(waves, waves.shape[1:]), output_hidden_states=True)
        return [*out.hidden_states[:-1], out.last_hidden_state]

    @torch.no_grad()
    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """float32 audio [T] at 16 kHz → unit vector."""
        return F.normalize(self.ecapa(self.states(torch.from_numpy(wave)[None].to(self.device))), dim=-1)[0].cpu().numpy()


# --------------------------------------------------------------------------------------------------------------


def reconstructor(folder: str, device):
    """(function path → (decoded posterior mean at 16 kHz, its distances to the recording), the VAE's name)."""
    from train_vae import MelDistance, stft_distance

    vae = SemanticVAE.from_pretrained(folder).to(device)
    rate, mel = vae.config.sample_rate, MelDistance(vae.config.sample_rate).to(device)

    @torch.no_grad()
    def reconstruct(path):
        x = torch.from_numpy(read_audio(path, rate))[None].to(device)
        y = vae.decode(vae.encode(x)[0], x.shape[-1])
        return resample(y[0].cpu().numpy(), rate, 16000), dict(mel=mel(y, x).item(), stft=stft_distance(y, x).item(), si_sdr=si_sdr(y[0], x[0]))

    return reconstruct, vae.content_hash()


def squim(device):
    """Function wave [T] at 16 kHz → STOI and PESQ as SQUIM estimates them without a reference (arXiv 2304.01448)."""
    try:
        model = torchaudio.pipelines.SQUIM_OBJECTIVE.get_model().to(device)
    except Exception as e:  # whatever the download raises
        raise InputError(f"--squim: torchaudio cannot fetch the model: {e}") from e

    @torch.no_grad()
    def estimate(wave):
        stoi, pesq, _ = model(torch.from_numpy(wave)[None].to(device))
        return dict(stoi=stoi.item(), pesq=pesq.item())

    return estimate


def hear(path: Path, rate: int = 16000) -> np.ndarray:
    """A recording [T] that holds something to score."""
    wave = read_audio(path, rate)
    if not np.isfinite(wave).all() or len(wave) < 0.32 * rate or not loudness(wave, rate)[1]:
        what = "is silent"
        if not np.isfinite(wave).all():
            what = "holds non-finite samples"
        elif len(wave) < 0.32 * rate:
            what = f"holds {len(wave) / rate:.3f} s"
        raise InputError(f"{path} {what}, expected speech of at least 0.32 s: make it again, or take it out of --list")
    return wave


def recording(system: str, line: Line, args, rebuild) -> tuple[np.ndarray, dict]:
    """The wave of one row's utterance at 16 kHz and, of a reconstruction, its distances to the original."""
    if system == "synthesis":
        return hear(args.generated / line.wav), {}
    path = find_audio(args.audio, line.gen)
    wave = hear(path)
    return rebuild[0](path) if system == "reconstruction" else (wave, {})


def score(system: str, lines: list[Line], args, asr, sim, voice, rebuild, quality):
    """The records of some utterances, one after another; voice(path) is a prompt's embedding."""
    waves, distances = zip(*(recording(system, line, args, rebuild) for line in lines))
    for line, wave in zip(lines, waves):
        if not np.isfinite(wave).all():
            raise InputError(f"{line.wav} holds non-finite samples")
    for line, wave, more, hypothesis in zip(lines, waves, distances, asr(list(waves))):
        scores = error_rates([line.text], [hypothesis]) | dict(sim=float(sim(wave) @ voice(find_audio(args.audio, line.ref))))
        if asr.whisper_normalize:
            reference = asr.whisper_normalize(line.text) or normalize(line.text)
            scores["wer_whisper"] = jiwer.wer(reference, asr.whisper_normalize(hypothesis))
        quality_of = quality(wave) if quality else {}
        yield dict(system=system, utterance=line.gen, **scores, **more, **quality_of, reference=line.text, hypothesis=hypothesis)


def read_records(work: Path, key: str) -> dict[tuple[str, str], dict]:
    """By system and utterance: what ranks have scored so far with the same settings, `key`."""
    records = {}
    for text in (text for path in work.glob("*.jsonl") for text in path.read_text(encoding="utf-8").split("\n")):
        with contextlib.suppress(ValueError):  # blank, or cut off by a crash
            made_with, record = json.loads(text)
            if made_with == key:
                records[record["system"], record["utterance"]] = record
    return records


# --------------------------------------------------------------------------------------------------------------
# The report: one page that opens from disk, with nothing beside it.

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Semantic-VAE: report</title><style>
:root{color-scheme:light dark}body{font:1rem/1.5 system-ui,sans-serif;max-width:72rem;margin:auto;padding:1rem}img,audio{max-width:100%}img{background:#fff}
.wide{overflow-x:auto}table{border-collapse:collapse}td,th{padding:.2rem .6rem;text-align:right}td{white-space:nowrap}td:first-child,th:first-child{text-align:left}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:1rem}figure{margin:0;min-width:0}small{overflow-wrap:anywhere}</style>"""


def player(wave: np.ndarray, rate: int) -> str:
    buffer = io.BytesIO()
    sf.write(buffer, wave, rate, format="WAV", subtype="PCM_16")
    return f'<audio controls preload="none" src="data:audio/wav;base64,{base64.b64encode(buffer.getvalue()).decode()}"></audio>'


def picture(draw, width: float, height: float) -> str:
    """draw(axes) as an image; nothing, if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    figure, buffer = Figure((width, height), layout="constrained"), io.BytesIO()
    draw(figure.subplots())
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def spectrogram(wave: np.ndarray):
    from train_vae import stft

    level = 20 * stft(torch.from_numpy(wave)[None], 512)[0].abs().clamp(min=1e-4).log10()
    return lambda axes: (axes.imshow(level, origin="lower", aspect="auto", vmin=-60, vmax=30), axes.set_axis_off())


def curves(run: Path) -> str:
    """The columns of a run's log.csv against its steps."""
    rows, images = csv.DictReader(open(run / "log.csv", encoding="utf-8")), []
    columns, rows = rows.fieldnames or [], list(rows)
    for column in [c for c in columns if c not in ("step", "seconds", "skipped")]:
        points = [(int(r["step"]), float(r[column])) for r in rows if r[column]]
        if points:
            images.append(picture(lambda axes: (axes.plot(*zip(*points)), axes.set_title(column)), 3.2, 2.2))
    return f'<div class="row">{"".join(images)}</div>'


def heard_learning(run: Path) -> str:
    """The training's fixed clips, evaluation after evaluation."""
    clips = {}
    for path in sorted((run / "samples").glob("*_*.wav")):
        clips.setdefault(path.stem.split("_")[0], []).append(path)
    players = lambda paths: "".join(f"<figure>{player(*sf.read(p, dtype='float32'))}<figcaption>{p.stem.split('_')[1]}</figcaption></figure>" for p in paths)
    return "".join(f'<div class="row">{players([*paths[: -1 : max(1, len(paths) // 6)], paths[-1]])}</div>' for paths in list(clips.values())[:2])


@torch.no_grad()
def projection(vae: str, recordings: list[Path], asr, device) -> str:
    """Latent frames in the plane that separates best the means of phone-like classes, which colour them: clusters (k-means) of the CTC
    recogniser's features of the same moments. Beneath, for how many frames a linear map predicts the class from the latent."""
    units = 10
    model, latents, features = SemanticVAE.from_pretrained(vae).to(device), [], []
    for path in recordings:
        latents.append(model.encode(torch.from_numpy(read_audio(path, model.config.sample_rate))[None].to(device))[0][0])  # [N, D]
        heard = asr.extractor(read_audio(path, asr.extractor.sampling_rate), sampling_rate=asr.extractor.sampling_rate, return_tensors="pt").to(device)
        states = asr.model(**heard, output_hidden_states=True).hidden_states[-1][0]
        features.append(states[torch.arange(len(latents[-1]), device=device) * len(states) // len(latents[-1])])
    z, f = ((x - x.mean(0)) / x.std(0).clamp(min=1e-6) for x in (torch.cat(latents).cpu(), torch.cat(features).cpu()))
    centres = f[torch.linspace(0, len(f) - 1, units).long()]
    for _ in range(30):
        unit = torch.cdist(f, centres).argmin(1)
        one_hot = F.one_hot(unit, units).float()  # [frames, units]
        centres = one_hot.T @ f / one_hot.sum(0).clamp(min=1)[:, None]
    half, z1 = len(z) // 2, F.pad(z, (0, 1), value=1)
    guess = z1[half:] @ torch.linalg.lstsq(z1[:half], one_hot[:half]).solution
    named = (guess.argmax(-1) == unit[half:]).float().mean().item()
    means = one_hot.T @ z / one_hot.sum(0).clamp(min=1)[:, None]
    x = z @ torch.linalg.svd(means - means.mean(0))[2][:2].T

    def dots(axes):
        axes.scatter(*x.T, s=4, c=unit, cmap="tab10"), axes.set_axis_off()

    return f"<figure>{picture(dots, 5, 5)}<figcaption>{html.escape(str(vae))}: a linear map fitted to half of the frames finds the class of {named:.1%} of the others</figcaption></figure>"


def write_report(args, table: str, systems: list[str], lines: list[Line], records: dict, rebuild, asr, device) -> None:
    escape, parts = html.escape, [PAGE, f'<h1>Report</h1><div class="wide">{table}</div>']
    if not picture(lambda axes: None, 1, 1):
        print("matplotlib is not installed: the report has no pictures (pip install matplotlib)")
    for line in lines[: args.report_clips]:
        waves = dict(prompt=read_audio(find_audio(args.audio, line.ref), 16000)) | {system: recording(system, line, args, rebuild)[0] for system in systems}
        heard = lambda system: f": “{escape(records[system, line.gen]['hypothesis'])}”" if system != "prompt" else ""
        figures = "".join(f"<figure>{picture(spectrogram(w), 3.2, 1.6)}{player(w, 16000)}<figcaption>{name}{heard(name)}</figcaption></figure>" for name, w in waves.items())
        parts.append(f'<h2>{escape(line.text)}</h2><div class="row">{figures}</div>')
    vaes = [v for v in (args.reconstruct, args.compare) if v]
    if vaes and asr.whisper:
        print("the picture of latents needs a CTC recogniser's features (--asr): it is left out")
    elif vaes:
        originals = [find_audio(args.audio, line.gen) for line in lines[:48]]
        parts.append(f'<h2>Latents, coloured by phone-like class</h2><div class="row">{"".join(projection(v, originals, asr, device) for v in vaes)}</div>')
    for run in args.runs:
        parts.append(f"<h2>{escape(str(run))}</h2>{curves(run)}{heard_learning(run)}")
    write_atomic(args.report / "index.html", lambda p: p.write_text("".join(parts), encoding="utf-8"))
    print(f"{args.report / 'index.html'}: open it in a browser")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, help="what was said: ref_utt, ref_seconds, ref_text, gen_utt, gen_seconds, gen_text, tab-separated (default: the demo's)")
    parser.add_argument("--audio", type=Path, help="where the list's recordings are (default: beside the list)")
    parser.add_argument("--generated", type=Path, help="folder of sample.py --list: adds the row \"synthesis\"")
    parser.add_argument("--reconstruct", metavar="VAE", help="run folder or hub id of a VAE: adds the row \"reconstruction\"")
    parser.add_argument("--no-original", action="store_true", help="leave out the row \"original\"")
    parser.add_argument("--asr", default=str(DEMO / "ssl"), help="recogniser: hub id or folder, Whisper or CTC (default: the demo's; the paper's is openai/whisper-large-v3)")
    parser.add_argument("--language", default="en", help="what a multilingual Whisper listens for (default %(default)s)")
    parser.add_argument("--sim", default=str(DEMO / "sv"), help="speaker model: hub id or folder of x-vectors, or wavlm_large_finetune.pth for the papers' SIM-o (default: the demo's)")
    parser.add_argument("--half", action=argparse.BooleanOptionalAction, help="the recogniser's matrix products in float16 (default: on a GPU)")
    parser.add_argument("--batch-size", type=at_least(1), default=8 if torch.cuda.is_available() else 1, help="utterances that the recogniser hears at once (default %(default)s)")
    parser.add_argument("--squim", action="store_true", help="also estimate STOI and PESQ by torchaudio's SQUIM, whose weights it downloads")
    parser.add_argument("--report", type=Path, help="also write a page to this folder: players, spectrograms, scores, curves, latents")
    parser.add_argument("--report-clips", type=at_least(0), default=6, help="utterances on that page (default %(default)s)")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="run folders whose log.csv and samples/ it shows (default without --list: the demo's)")
    parser.add_argument("--compare", metavar="VAE", help="another VAE, whose latents it shows beside those of --reconstruct")
    parser.add_argument("--limit", type=at_least(1), help="at most so many lines of the list")
    parser.add_argument("--dry-run", action="store_true", help="only look whether every file is there")
    parser.add_argument("--out", type=Path, default=Path("runs/scores.csv"), help="one line an utterance (default %(default)s)")
    args = parser.parse_args(argv)
    if not args.list:  # the demo's table
        args.list = DEMO / "corpus" / "test.lst"
        args.generated, args.reconstruct = args.generated or Path("runs/samples"), args.reconstruct or str(DEMO / "vae")
        args.runs = args.runs or [DEMO / "vae", DEMO / "tts"] if args.report else args.runs
    args.audio = args.audio or args.list.parent
    for name in ("runs", "compare") if not args.report else ():
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"--{name} is for the page: give --report, or drop it")
    return args


COLUMNS = {  # of the table: heading, factor
    "wer": ("WER %", 100), "cer": ("CER %", 100), "corpus": ("corpus WER %", 100), "wer_whisper": ("Whisper-norm. WER %", 100), "sim": ("SIM", 1), "mel": ("mel", 1), "stft": ("STFT", 1),
    "si_sdr": ("SI-SDR dB", 1), "stoi": ("STOI est.", 1), "pesq": ("PESQ est.", 1)}  # fmt: skip


def make_table(systems: list[str], records: list[dict]) -> list[list[str]]:
    """A heading, then one row a system, with one column a score that any of them has: words first, or characters where no spaces are written."""
    cells, main = {}, "cer" if unspaced("".join(r["reference"] for r in records)) else "wer"
    for system in systems:
        rows = [r for r in records if r["system"] == system]
        for column, (_, factor) in COLUMNS.items():
            if column == "corpus":
                cells[system, column] = f"{factor * error_rates([r['reference'] for r in rows], [r['hypothesis'] for r in rows])['wer']:.2f}"
            elif column in rows[0]:
                values = [factor * r[column] for r in rows]
                digits = 2 if factor > 1 else 3
                low_high = " [{:.{d}f}, {:.{d}f}]".format(*interval(values), d=digits) if column in (main, "sim") else ""
                cells[system, column] = f"{np.mean(values):.{digits}f}{low_high}"
    shown = [c for c in sorted(COLUMNS, key=lambda c: c != main) if any((system, c) in cells for system in systems)]
    return [["system", *(COLUMNS[c][0] for c in shown)], *([system, *(cells.get((system, c), "") for c in shown)] for system in systems)]


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_ranks()
    lines = read_list(args.list)[: args.limit]
    if args.compare:
        SemanticVAE.from_pretrained(args.compare)  # refused now, not after the scoring
    for run in args.runs if args.report else ():
        if not (run / "log.csv").is_file():
            raise InputError(f"{run} is no run folder (no log.csv): name with --runs what train_vae.py and train_tts.py wrote")
    rebuild = reconstructor(args.reconstruct, device) if args.reconstruct else None
    systems = [name for name, wanted in (("original", not args.no_original), ("reconstruction", rebuild), ("synthesis", args.generated)) if wanted]

    # ---- every file and text, before an hour is spent
    if not systems:
        raise InputError("nothing to score: drop --no-original, or give --generated or --reconstruct")
    missing = [line.wav for line in lines if args.generated and not (args.generated / line.wav).is_file()]
    if missing:
        raise InputError(f"{args.generated} lacks {len(missing)} of {len(lines)} wavs, the first {missing[0]}: run python sample.py --list {args.list} --out {args.generated}")
    recordings = [args.generated / line.wav for line in lines if args.generated]
    for line in lines:
        recordings.append(find_audio(args.audio, line.ref))
        if not normalize(line.text):
            raise InputError(f"the text of {line.gen} is empty once punctuation is removed")
        if systems != ["synthesis"]:
            recordings.append(find_audio(args.audio, line.gen))
    made = read_json(args.generated / "settings.json") if args.generated and (args.generated / "settings.json").exists() else {}
    other = [line.wav for line in lines if made.get("said", {}).get(line.wav, [line.says])[0] != line.says]
    if other:
        raise InputError(f"{args.generated} was made from other texts than {args.list} has ({len(other)}, the first {other[0]}): run sample.py --list again, to another --out")
    if args.out.is_dir() or args.out.resolve() in [path.resolve() for path in (args.list, *recordings)]:
        raise InputError(f"--out {args.out} is a folder, or a file that is read: name another")
    if args.dry_run:
        print(f"{args.list}: {len(lines)} utterances for {', '.join(systems)}; every file is there")
        return
    args.half = device.type == "cuda" if args.half is None else args.half
    asr, sim = Recognizer(args.asr, device, args.language, args.half), (SIMo if args.sim.endswith(".pth") else SpeakerModel)(args.sim, device)
    quality, voice = squim(device) if args.squim else None, functools.cache(lambda path: sim(hear(path)))

    # ---- this rank's utterances; a record is kept as soon as it is made, should this be interrupted
    how = "".join(f" {k}={made.get(k, '?')}" for k in ("tts", "seed", "steps", "cfg", "cfg_until", "sway", "speed")) if args.generated else ""
    signature = (f"list={args.list.name} asr={asr.identity} sim={sim.identity} precision={'float16' if args.half else 'float32'} batch={args.batch_size} normalizer=seed-tts-eval wer=utterance-mean"
                 f"{f' vae={rebuild[1]}' if rebuild else ''}{how}")  # fmt: skip
    work, key = args.out.with_name(args.out.name + ".work"), f"{signature} {zlib.crc32(repr([lines, *map(file_stamp, recordings)]).encode())} {args.audio} {args.generated} {args.squim}"
    done, held = read_records(work, key), lock(work) if rank == 0 else None
    barrier()  # all ranks have seen the same records before the next is written
    work.mkdir(parents=True, exist_ok=True)
    with open(work / f"{rank}.jsonl", "a", encoding="utf-8") as f:
        for system in systems:
            todo = [line for line in lines[rank::world] if (system, line.gen) not in done]
            batches = [todo[k : k + args.batch_size] for k in range(0, len(todo), args.batch_size)]
            for batch in tqdm(batches, desc=system, disable=rank > 0):
                for record in score(system, batch, args, asr, sim, voice, rebuild, quality):
                    f.write("\n" + json.dumps([key, record]))
                    f.flush()
    barrier()
    if rank > 0:
        return

    # ---- one line an utterance, and the table
    found = read_records(work, key)
    records = [found[system, line.gen] for system in systems for line in sorted(lines, key=lambda line: line.gen)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["system", "utterance", *(c for c in COLUMNS if c != "corpus"), "reference", "hypothesis"], restval="", lineterminator="\n")
    writer.writeheader(), writer.writerows(records)
    write_atomic(args.out, lambda p: p.write_text(text.getvalue(), encoding="utf-8"))
    table, signature = make_table(systems, records), f"signature: n={len(lines)} {signature}"
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip())
    if DEMO in Path(args.asr).resolve().parents or DEMO in Path(args.sim).resolve().parents:
        signature += "; by the demo's own scorers: compare nothing but the demo with it (--asr, --sim)"
    print(f"{signature}; each utterance in {args.out}")
    if args.report:
        rows = "".join(f"<tr>{''.join(f'<t{kind}>{html.escape(cell)}</t{kind}>' for cell in row)}</tr>" for kind, row in zip(["h", *"d" * len(systems)], table))
        write_report(args, f"<table>{rows}</table><p><small>{html.escape(signature)}</small></p>", systems, lines, found, rebuild, asr, device)
    shutil.rmtree(work, ignore_errors=True)  # NFS keeps a lock's file while it is open


if __name__ == "__main__":
    cli(main)
