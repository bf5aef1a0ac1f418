"""Word error rate and speaker similarity of recordings, reconstructions and synthesised speech.

    python evaluate.py                                                     # the demo's table, after sample.py --list
    python evaluate.py --list LST --audio LibriSpeech/test-clean --generated runs/samples \\
        --asr openai/whisper-large-v3 --sim wavlm_large_finetune.pth        # the papers' scorers
    python evaluate.py --list LST --audio ... --reconstruct runs/vae       # the VAE's encode-decode, and its distances
    torchrun --standalone --nproc_per_node 8 evaluate.py ...               # shared between 8 GPUs

A row of the table has the mean of per-utterance WERs (the papers' score), CER, the corpus WER, the mean WER after
Whisper's own normaliser, and SIM to the prompt; brackets are 95 % bootstrap intervals over utterances. The signature
below it names all that the numbers depend on. Interrupted and run again, it continues.
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import re
import string
import sys
import unicodedata
import zlib
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from model import InputError, MelDistance, SemanticVAE, load_torch, read_json, stft_distance, write_text
from prepare import (DEMO, at_least, barrier, cli, file_stamp, from_hub, lock, loudness, read_audio, read_lines,
                     resample, revision, start_ranks, switch)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Words: error rates, and the recogniser.

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # Thai to Khmer, kana, Han


def normalize(text: str) -> str:
    """F5-TTS's rule: every punctuation character removed (apostrophes too), single spaces, lower case; after
    NFC and without invisible marks, which are no errors."""
    text = "".join(c for c in unicodedata.normalize("NFC", text) if unicodedata.category(c) != "Cf")
    kept = (c for c in text if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return " ".join("".join(kept).split()).lower()


def unspaced(text: str) -> bool:
    """Whether it is in a script without spaces: characters are counted, not words."""
    return len(re.findall(f"[{UNSPACED}]", text)) > len(text) / 2


def error_rates(references: list[str], hypotheses: list[str]) -> dict[str, float]:
    """{cer, wer} over all pairs together, after normalisation. Spaces are no characters where the script has none."""
    pair = [[normalize(text) for text in texts] for texts in (references, hypotheses)]
    together = [[t.replace(" ", "") if unspaced(t) else t for t in texts] for texts in pair]
    return dict(cer=jiwer.cer(*together), wer=jiwer.wer(*pair))


def interval(values: list[float], resamples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: its spread over redrawn sets of utterances."""
    means = np.random.default_rng(0).choice(values, (resamples, len(values))).mean(1)
    return tuple(np.percentile(means, (2.5, 97.5)))


def identity(name: str, config=None) -> str:
    """NAME@REVISION of a hub model, NAME@sha256:… of a local folder or file."""
    return f"{Path(name).name if Path(name).exists() else name}@{revision(name, config)}"


class Recognizer:
    """A Hugging Face speech recogniser, Whisper or CTC, by id or folder. A multilingual Whisper is told the language.

    half: matrix products in float16, in which Whisper was published. Everything else here is float32."""

    def __init__(self, name: str, device, language: str = "en", half: bool = False):
        from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
        from transformers.models.whisper.tokenization_whisper import LANGUAGES

        (config,) = from_hub("--asr", name, "Config")
        self.whisper = config.model_type == "whisper"
        kind = "ModelForSpeechSeq2Seq" if self.whisper else "ModelForCTC"
        model, self.extractor, self.tokenizer = from_hub("--asr", name, kind, "FeatureExtractor", "Tokenizer")
        self.model = model.float().to(device).eval()
        self.half = half
        self.identity = identity(name, config)
        self.demo = DEMO in Path(name).resolve().parents
        self.options = {}
        spoken = ["en"] if self.whisper else LANGUAGES  # a CTC model does not say which language it knows
        if self.whisper and getattr(model.generation_config, "is_multilingual", True):
            spoken = [token.strip("<|>") for token in getattr(model.generation_config, "lang_to_id", {})]
            self.options = dict(language=language, task="transcribe")
            self.identity += f"/{language}" if language != "en" else ""
        if language not in spoken:
            others = ", ".join(sorted(spoken)) or "none: take the generation_config.json of OpenAI's"
            raise InputError(f"{name} knows no --language {language}, but {others}")
        spellings = getattr(self.tokenizer, "english_spelling_normalizer", None) or {}  # the map is Whisper's
        self.whisper_normalize = EnglishTextNormalizer(spellings) if language == "en" else None

    def warn(self, texts: list[str]) -> None:
        """Say so if it is the demo's recogniser and cannot know these texts."""
        words = {word for text in texts for word in normalize(text).split()}
        if self.demo and words - set(re.split(r"[|\s]", (DEMO / "corpus" / "manifest.csv").read_text("utf-8"))):
            print("error rates mean nothing: the demo's recogniser knows 150 words; name another with --asr")

    @torch.no_grad()
    def __call__(self, waves: list[np.ndarray], rate: int = 16000) -> list[str]:
        """float32 audio, each [T] → texts. Whisper searches with five beams, longer audio in pieces of 30 s."""
        wanted = self.extractor.sampling_rate
        longest = 30 * wanted if self.whisper else sys.maxsize
        waves = [resample(wave, rate, wanted) for wave in waves]
        pieces = []
        for i, wave in enumerate(waves):
            pieces += [(i, wave[start : start + longest]) for start in range(0, len(wave), longest)]
        options = dict(sampling_rate=wanted, return_tensors="pt")
        with torch.autocast(self.model.device.type, torch.float16, enabled=self.half):
            if self.whisper:
                features = self.extractor([piece for _, piece in pieces], **options).input_features
                ids = self.model.generate(features.to(self.model.device), num_beams=5, **self.options)
            else:  # one by one: these models see padding
                inputs = [self.extractor(piece, **options).to(self.model.device) for _, piece in pieces]
                ids = [self.model(**one).logits[0].argmax(-1) for one in inputs]
        texts = [""] * len(waves)
        for (i, _), row in zip(pieces, ids):  # CTC: decode() merges repeats before it drops blanks
            text = self.tokenizer.decode(row, skip_special_tokens=self.whisper)
            texts[i] = f"{texts[i]} {text.strip()}".strip()
        return texts


# ----------------------------------------------------------------------------------------------------------------------
# Voices: an x-vector model, or SIM-o, the papers' scorer: WavLM-Large and an ECAPA-TDNN (arXiv 2005.07143) fine-tuned
# for speaker verification. Names are those of its published file, wavlm_large_finetune.pth.


class SpeakerModel:
    """A Hugging Face x-vector model, by id or folder. Similarity is the cosine of two recordings' embeddings."""

    def __init__(self, name: str, device):
        self.extractor, model = from_hub("--sim", name, "FeatureExtractor", "ModelForAudioXVector")
        self.model = model.float().to(device).eval()
        self.identity = identity(name, model.config)

    @torch.no_grad()
    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """float32 audio [T] at 16 kHz → unit vector."""
        inputs = self.extractor(wave, sampling_rate=16000, return_tensors="pt").to(self.model.device)
        return F.normalize(self.model(inputs.input_values).embeddings, dim=-1)[0].cpu().numpy()


def conv_relu_norm(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv1d(inputs, outputs, kernel, padding="same")
    return nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU(), bn=nn.BatchNorm1d(outputs)))


class Res2(nn.Module):
    """Eight splits of the channels: each but the last is convolved after adding the result of the one before."""

    def __init__(self, channels: int, dilation: int, splits: int = 8):
        super().__init__()
        width = channels // splits
        convs = [nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for _ in range(splits - 1)]
        self.convs = nn.ModuleList(convs)
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in convs)

    def forward(self, x):
        *splits, last = x.chunk(len(self.convs) + 1, dim=1)
        outputs = []
        y = 0
        for split, conv, bn in zip(splits, self.convs, self.bns):
            y = bn(F.relu(conv(split + y)))
            outputs.append(y)
        return torch.cat([*outputs, last], dim=1)


class SERes2Block(nn.Module):
    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.Conv1dReluBn1 = conv_relu_norm(channels, channels, 1)
        self.Res2Conv1dReluBn = Res2(channels, dilation)
        self.Conv1dReluBn2 = conv_relu_norm(channels, channels, 1)
        self.SE_Connect = nn.ModuleDict(dict(linear1=nn.Linear(channels, 128), linear2=nn.Linear(128, channels)))

    def forward(self, x):  # [B, C, T]
        y = self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(x)))
        gate = self.SE_Connect["linear2"](F.relu(self.SE_Connect["linear1"](y.mean(-1)))).sigmoid()
        return x + y * gate[..., None]


class ECAPA(nn.Module):
    def __init__(self, features: int, states: int = 25, channels: int = 512):
        super().__init__()
        wide = 3 * channels
        self.feature_weight = nn.Parameter(torch.zeros(states))
        self.layer1 = conv_relu_norm(features, channels, 5)
        self.layer2 = SERes2Block(channels, 2)
        self.layer3 = SERes2Block(channels, 3)
        self.layer4 = SERes2Block(channels, 4)
        self.conv = nn.Conv1d(wide, wide, 1)
        self.pooling = nn.ModuleDict(dict(linear1=nn.Conv1d(wide, 128, 1), linear2=nn.Conv1d(128, wide, 1)))
        self.bn = nn.BatchNorm1d(2 * wide)
        self.linear = nn.Linear(2 * wide, 256)

    def forward(self, states):
        """25 states of WavLM, each [B, T, features] → [B, 256]."""
        weights = self.feature_weight.softmax(0)
        x = sum(w * s for w, s in zip(weights, states, strict=True)).mT + 1e-6  # [B, features, T]
        a = self.layer1(F.instance_norm(x))
        b = self.layer2(a)
        c = self.layer3(b)
        d = self.layer4(c)
        x = F.relu(self.conv(torch.cat([b, c, d], dim=1)))
        attention = self.pooling["linear2"](self.pooling["linear1"](x).tanh()).softmax(-1)
        mean = (attention * x).sum(-1)
        std = ((attention * x.square()).sum(-1) - mean.square()).clamp(min=1e-9).sqrt()
        return self.linear(self.bn(torch.cat([mean, std], dim=1)))


class SIMo:
    """The scorer from its file alone. Every weight must find its place, but for the classifier of its training."""

    NAMES = {  # of WavLM's parts: in the file, in transformers
        "feature_extract.model.layer_norm": "feature_projection.layer_norm", "feature_extract.model.": "",
        "mask_emb": "masked_spec_embed", "post_extract_proj": "feature_projection.projection",
        "encoder.pos_conv.0": "encoder.pos_conv_embed.conv", ".0.weight": ".conv.weight", ".2.1.": ".layer_norm.",
        "self_attn_layer_norm": "layer_norm", "self_attn": "attention", "grep_linear": "gru_rel_pos_linear",
        "grep_a": "gru_rel_pos_const", "relative_attention_bias": "rel_attn_embed",
        "fc1": "feed_forward.intermediate_dense", "fc2": "feed_forward.output_dense"}  # fmt: skip

    def __init__(self, path: str, device):
        from transformers import WavLMConfig, WavLMModel

        front = {}
        head = {}
        try:
            for name, value in load_torch(Path(path))["model"].items():
                if name.startswith("feature_extract."):
                    for theirs, ours in self.NAMES.items():
                        name = name.replace(theirs, ours)
                    front[name] = value
                elif not name.startswith("loss_calculator."):  # the classifier of its training
                    head[name] = value
            width, narrow = front["feature_projection.projection.weight"].shape
            layers = len(head["feature_weight"]) - 1
            heads = front["encoder.layers.0.attention.gru_rel_pos_const"].shape[1]
            inner = len(front["encoder.layers.0.feed_forward.intermediate_dense.bias"])
            sizes = dict(num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner)
            form = dict(conv_dim=[narrow] * 7, feat_extract_norm="layer", do_stable_layer_norm=True)
            config = WavLMConfig(hidden_size=width, **sizes, **form)
            self.wavlm = WavLMModel(config).eval().to(device)
            self.wavlm.load_state_dict(front)
            self.ecapa = ECAPA(width, len(head["feature_weight"])).eval().to(device)
            self.ecapa.load_state_dict(head)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            why = " ".join(str(e).split())[:300]
            raise InputError(f"{path} does not hold the weights of WavLM and ECAPA-TDNN: {why}") from e
        self.identity = identity(path)

    @torch.no_grad()
    def states(self, waves):
        """[B, T] at 16 kHz → WavLM's 25 states, each [B, frames, features]; the last after the final layer norm."""
        out = self.wavlm(F.layer_norm(waves, waves.shape[1:]), output_hidden_states=True)
        return [*out.hidden_states[:-1], out.last_hidden_state]

    @torch.no_grad()
    def __call__(self, wave: np.ndarray) -> np.ndarray:
        """float32 audio [T] at 16 kHz → unit vector."""
        states = self.states(torch.from_numpy(wave)[None].to(self.wavlm.device))
        return F.normalize(self.ecapa(states), dim=-1)[0].cpu().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# What is scored.


@dataclass(frozen=True)
class Line:
    """A line of a LibriSpeech-PC list: say `text` in the voice of recording `ref`."""

    ref: str
    ref_seconds: float
    ref_text: str
    gen: str  # the recording in which the same voice really says it
    gen_seconds: float
    text: str

    @property
    def says(self) -> int:
        """Changes with what is said, and with the prompt."""
        return zlib.crc32(repr((self.ref, self.ref_text, self.text)).encode())

    @property
    def wav(self) -> str:
        """File name of the synthesised speech."""
        return Path(self.gen).stem + ".wav"


def read_list(path: Path) -> list[Line]:
    """ref_utt, ref_seconds, ref_text, gen_utt, gen_seconds, gen_text, tab-separated, as F5-TTS publishes it."""
    lines = []
    try:
        for _, row in read_lines(path):
            ref, ref_seconds, ref_text, gen, gen_seconds, text = row.split("\t")
            lines.append(Line(ref, float(ref_seconds), ref_text.strip(), gen, float(gen_seconds), text.strip()))
    except (OSError, ValueError) as e:
        convert = "awk -F'|' -v OFS='\\t' '{print $3, 1, $2, $1, 1, $4}'"
        raise InputError(f"{path} is not a list of six tab-separated columns ref_utt, ref_seconds, ref_text, gen_utt, "
                         f"gen_seconds, gen_text: {e}. seed-tts-eval's meta.lst becomes one by {convert}") from e
    if any("\0" in line.gen + line.ref for line in lines):
        raise InputError(f"{path} has a file name with a null byte")
    names = Counter(line.wav for line in lines)
    if len(names) < len(lines) or not lines:
        raise InputError(f"{path} has {f'several lines for {names.most_common(1)[0][0]}' if lines else 'no lines'}")
    return lines


def find_audio(root: Path, name: str) -> Path:
    """The recording `name`: a path below `root`, or a LibriSpeech id (SPEAKER-CHAPTER-NUMBER) in its layout."""
    speaker, chapter = (name.split("-") + [""])[:2]
    chapter_file = root / speaker / chapter / name
    places = [root / name, Path(f"{chapter_file}.flac"), Path(f"{chapter_file}.wav"), root / f"{name}.wav"]
    for place in places:
        if place.is_file():
            return place
    raise InputError(f"no recording {name} in {root} (looked for {places[0]} and {places[1]})")


def hear(path: Path, rate: int = 16000) -> np.ndarray:
    """A recording [T] that holds something to score."""
    wave = read_audio(path, rate)
    if not np.isfinite(wave).all():
        what = "holds non-finite samples"
    elif len(wave) < 0.32 * rate:
        what = f"holds {len(wave) / rate:.3f} s"
    elif not loudness(wave, rate)[1]:
        what = "is silent"
    else:
        return wave
    raise InputError(f"{path} {what}, expected 0.32 s of speech or more: make it again, or drop it from --list")


class Reconstructor:
    """Recordings, encoded and decoded by a VAE."""

    def __init__(self, folder: str, device):
        self.vae = SemanticVAE.from_pretrained(folder).to(device)
        self.mel = MelDistance(self.vae.config.sample_rate).to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, path: Path, noise: float = 0.0) -> tuple[np.ndarray, dict]:
        """The decoded posterior mean [T] at 16 kHz, and its distances to the recording. noise: Gaussian, added to each
        channel in units of its standard deviation, as a DiT's errors would be."""
        rate = self.vae.config.sample_rate
        x = torch.from_numpy(read_audio(path, rate))[None].to(self.device)
        mean, _ = self.vae.encode(x)  # [1, N, D]
        errors = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        y = self.vae.decode(mean + noise * mean.std(1, keepdim=True) * errors, x.shape[-1])
        if not torch.isfinite(y).all():
            raise InputError(f"the reconstruction of {path} holds non-finite samples")
        distances = dict(mel=self.mel(y, x).item(), stft=stft_distance(y, x).item())
        return resample(y[0].cpu().numpy(), rate, 16000), distances


def recording(system: str, line: Line, args, reconstruct) -> tuple[np.ndarray, dict]:
    """The wave [T] at 16 kHz of one row's utterance and, of a reconstruction, its distances to the original."""
    if system == "synthesis":
        return hear(args.generated / line.wav), {}
    path = find_audio(args.audio, line.gen)
    wave = hear(path)  # what is reconstructed must hold speech, too
    return (wave, {}) if system == "original" else reconstruct(path, float(system.partition("+")[2] or 0))


def score(system: str, lines: list[Line], args, asr, sim, voice, reconstruct):
    """The records of some utterances; voice(path) is a prompt's embedding."""
    waves, distances = zip(*(recording(system, line, args, reconstruct) for line in lines))
    for line, wave, more, hypothesis in zip(lines, waves, distances, asr(list(waves))):
        scores = error_rates([line.text], [hypothesis])
        scores["sim"] = float(sim(wave) @ voice(find_audio(args.audio, line.ref)))
        if asr.whisper_normalize:
            reference = asr.whisper_normalize(line.text) or normalize(line.text)
            scores["wer_whisper"] = jiwer.wer(reference, asr.whisper_normalize(hypothesis))
        yield dict(system=system, utterance=line.gen, **scores, **more, reference=line.text, hypothesis=hypothesis)


# ======================================================================================================================
# You can stop here. Below: the table, records that survive a kill, checks and flags.

COLUMNS = {  # heading, factor and digits of each score
    "wer": ("WER %", 100, 2),
    "cer": ("CER %", 100, 2),
    "corpus": ("corpus WER %", 100, 2),
    "wer_whisper": ("Whisper-norm. WER %", 100, 2),
    "sim": ("SIM", 1, 3),
    "mel": ("mel", 1, 3),
    "stft": ("STFT", 1, 3),
}


def make_table(systems: list[str], records: list[dict]) -> list[list[str]]:
    """A heading, then a row a system, with a column a score: words first, or characters where no spaces are written."""
    main = "cer" if unspaced("".join(record["reference"] for record in records)) else "wer"
    cells = {}
    for system in systems:
        rows = [record for record in records if record["system"] == system]
        for column, (_, factor, digits) in COLUMNS.items():
            if column == "corpus":
                rates = error_rates([row["reference"] for row in rows], [row["hypothesis"] for row in rows])
                cells[system, column] = f"{factor * rates['wer']:.{digits}f}"
            elif column in rows[0]:
                values = [factor * row[column] for row in rows]
                cells[system, column] = f"{np.mean(values):.{digits}f}"
                if column in (main, "sim"):
                    low, high = interval(values)
                    cells[system, column] += f" [{low:.{digits}f}, {high:.{digits}f}]"
    shown = [c for c in sorted(COLUMNS, key=lambda c: c != main) if any((system, c) in cells for system in systems)]
    body = [[system, *(cells.get((system, c), "") for c in shown)] for system in systems]
    return [["system", *(COLUMNS[c][0] for c in shown)], *body]


def read_records(work: Path, mine: str) -> dict[tuple[str, str], dict]:
    """By system and utterance: what ranks have scored so far with the same settings, `mine`."""
    records = {}
    for path in work.glob(f"{mine}*.jsonl"):
        for text in path.read_text(encoding="utf-8").split("\n"):
            with contextlib.suppress(ValueError):  # blank, or cut off by a crash
                record = json.loads(text)
                records[record["system"], record["utterance"]] = record
    return records


def write_scores(path: Path, records: list[dict]) -> None:
    """One line an utterance."""
    text = io.StringIO(newline="")
    columns = ["system", "utterance", *(c for c in COLUMNS if c != "corpus"), "reference", "hypothesis"]
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(path, text.getvalue())


def check_files(args, lines: list[Line], systems: list[str]) -> tuple[list[Path], dict]:
    """Look for every file, before an hour is spent: all recordings, and what sample.py noted of the synthesis."""
    recordings = []
    made = {}
    if args.generated:
        recordings = [args.generated / line.wav for line in lines]
        missing = [path.name for path in recordings if not path.is_file()]
        if missing:
            raise InputError(f"{args.generated} lacks {len(missing)} of {len(lines)} wavs, the first {missing[0]}: run "
                             f"python sample.py --list {args.list} --out {args.generated}, with your model's --tts")
        notes = args.generated / "settings.json"
        made = read_json(notes) if notes.exists() else {}
        other = [line.wav for line in lines if made.get("said", {}).get(line.wav, [line.says])[0] != line.says]
        if other:
            raise InputError(f"{args.generated} was made from other texts than {args.list} has ({len(other)}, the "
                             f"first {other[0]}): run sample.py --list again, to another --out")
    for line in lines:
        if not normalize(line.text):
            raise InputError(f"the text of {line.gen} is empty once punctuation is removed")
        recordings.append(find_audio(args.audio, line.ref))
        if systems != ["synthesis"]:
            recordings.append(find_audio(args.audio, line.gen))
    if args.out.is_dir() or args.out.resolve() in [path.resolve() for path in (args.list, *recordings)]:
        raise InputError(f"--out {args.out} is a folder, or a file that is read: name another")
    return recordings, made


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    gpu = torch.cuda.is_available()
    flag("--list", type=Path, help="what was said, in LibriSpeech-PC's six tab-separated columns (default: the demo's)")
    flag("--audio", type=Path, help="where the list's recordings are (default: beside the list)")
    flag("--generated", type=Path, help='folder of sample.py --list: adds the row "synthesis"')
    flag("--reconstruct", metavar="VAE", help='run folder or hub id of a VAE: adds the row "reconstruction"')
    flag("--noise", type=at_least(0, float), nargs="+", default=[], help="more such rows: noise in the latents")
    flag("--no-original", action="store_true", help='drop the row "original"')
    flag("--asr", default=str(DEMO / "ssl"), help="recogniser (paper: openai/whisper-large-v3; default: the demo's)")
    flag("--language", default="en", help="of a multilingual Whisper (default %(default)s)")
    flag("--sim", default=str(DEMO / "sv"), help="x-vector model, or wavlm_large_finetune.pth for the papers' SIM-o")
    flag("--half", **switch(gpu), help="the recogniser's matrix products in float16 (default: on a GPU)")
    flag("--batch-size", type=at_least(1), default=8 if gpu else 1, help="utterances recognised at once")
    flag("--limit", type=at_least(1), help="only the first so many lines of the list")
    flag("--out", type=Path, default=Path("runs/scores.csv"), help="one line an utterance (default %(default)s)")
    args = parser.parse_args(argv)
    if not args.list:  # the demo's table
        args.list = DEMO / "corpus" / "test.lst"
        args.generated = args.generated or Path("runs/samples")
        args.reconstruct = args.reconstruct or str(DEMO / "vae")
    args.audio = args.audio or args.list.parent
    return args


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = start_ranks()
    lines = read_list(args.list)[: args.limit]
    wanted = dict(original=not args.no_original, reconstruction=args.reconstruct, synthesis=args.generated)
    systems = [system for system, asked in wanted.items() if asked]
    systems += [f"reconstruction+{level}" for level in dict.fromkeys(args.noise)]
    if args.noise and not args.reconstruct:
        raise InputError("--noise is added to the latents of a VAE: name it with --reconstruct")
    if not systems:
        raise InputError("nothing to score: drop --no-original, or give --generated or --reconstruct")
    recordings, made = check_files(args, lines, systems)
    reconstruct = Reconstructor(args.reconstruct, device) if args.reconstruct else None
    asr = Recognizer(args.asr, device, args.language, args.half)
    sim = SIMo(args.sim, device) if args.sim.endswith(".pth") else SpeakerModel(args.sim, device)
    voice = functools.cache(lambda path: sim(hear(path)))
    precision = "float16" if args.half else "float32"
    signature = (f"list={args.list.name}@{zlib.crc32(repr(lines).encode()):08x} asr={asr.identity} "
                 f"sim={sim.identity} precision={precision} "
                 f"batch={args.batch_size} normalizer=f5-tts wer=utterance-mean")
    if reconstruct:
        signature += f" vae={reconstruct.vae.content_hash()}"
    if args.generated:
        signature += f" decoder={made.get('vae', '?')}"
        names = ("tts", "seed", "steps", "cfg", "speed", "bf16")
        signature += "".join(f" {name}={made.get(name, '?')}" for name in names)

    # ---- this rank's utterances; a record is kept as soon as it is made
    files = zlib.crc32(repr([file_stamp(path) for path in recordings]).encode())
    settings = f"{signature} {files} {args.audio} {args.generated} {args.language}"
    work = args.out.with_name(args.out.name + ".work")
    mine = f"{zlib.crc32(settings.encode()):08x}-"  # the records of other settings stay
    done = read_records(work, mine)
    held = lock(work) if rank == 0 else None
    barrier()  # all ranks have seen the same records before the next is written
    work.mkdir(parents=True, exist_ok=True)
    with open(work / f"{mine}{rank}.jsonl", "a", encoding="utf-8") as f:
        for system in systems:
            todo = [line for line in lines[rank::world] if (system, line.gen) not in done]
            batches = [todo[k : k + args.batch_size] for k in range(0, len(todo), args.batch_size)]
            for batch in tqdm(batches, desc=system, disable=rank > 0):
                for record in score(system, batch, args, asr, sim, voice, reconstruct):
                    f.write("\n" + json.dumps(record))
                    f.flush()
    barrier()
    if rank > 0:
        return
    found = read_records(work, mine)
    records = [found[system, line.gen] for system in systems for line in sorted(lines, key=lambda line: line.gen)]
    write_scores(args.out, records)
    table = make_table(systems, records)
    widths = [max(map(len, column)) for column in zip(*table)]
    for first, *cells in table:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:]))]).rstrip())
    if asr.demo or DEMO in Path(args.sim).resolve().parents:
        signature += "; by the demo's own scorers: compare nothing but the demo with it (--asr, --sim)"
    print(f"signature: n={len(lines)} {signature}; each utterance in {args.out}")
    with contextlib.suppress(OSError):  # NFS and Windows keep a lock's file while it is open; other records stay
        for path in (*work.glob(f"{mine}*.jsonl"), work / ".lock"):
            path.unlink()
        work.rmdir()


if __name__ == "__main__":
    cli(main)
