"""A small world to test in: synthetic clips, random tiny models, and one run of every stage, made once."""

import csv
import importlib
import json
import math
import multiprocessing
import os
import random
import socket
import string
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# CUDA_VISIBLE_DEVICES: CPUs everywhere, where results are the same to the bit.
os.environ.update(
    HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", TOKENIZERS_PARALLELISM="false"
)

import numpy as np
import pytest
import soundfile as sf
import torch

import prepare
import train_tts
import train_vae
from model import PRESETS

# The tests are small: a second thread costs more than it gives.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
prepare.Aligner.WORST = -math.inf  # the small world's recogniser knows nothing
# Smaller. Scripts run as commands (test_faults.py's start) have the preset as it is.
PRESETS["demo"]["vae"] |= dict(encoder_dim=4, decoder_dim=64)
PRESETS["demo"]["dit"] |= dict(width=64, depth=3, heads=1, text_dim=32)
RATE = 16000
# Pairs, and a last one alone: so that results are the same on every CPU.
VAE_FLAGS = [
    "--preset", "demo", "--steps", "2", "--batch-seconds", "1.6", "--crop", "0.4", "--eval-every", "2",
    "--log-every", "1", "--adv-start", "1", "--eval-clips", "2", "--disc-width", "0.0625", "--encoder-steps", "0",
    "--no-compile",
]
TTS_FLAGS = [
    "--preset", "demo", "--warmup", "0", "--lr", "4e-5", "--steps", "2", "--batch-seconds", "6",
    "--micro-seconds", "100", "--eval-every", "2", "--log-every", "1", "--eval-sentences", "2", "--sample-steps", "2",
    "--no-bf16",
]
TIMES = {"seconds", "audio", "memory", "mfu"}  # columns of log.csv that no two runs share


def flags(base, **changes) -> list[str]:
    """A list of flags (pairs, and a last one alone) with some values replaced or added."""
    merged = dict(zip(base[::2], base[1::2])) | {"--" + k.replace("_", "-"): str(v) for k, v in changes.items()}
    return [*(x for pair in merged.items() for x in pair), base[-1]]


def VAE(world, out, **changes) -> list[str]:
    return ["--data", str(world.data), "--out", str(out), *flags(VAE_FLAGS, **changes)]


def TTS(world, out, **changes) -> list[str]:
    return ["--data", str(world.data), "--out", str(out), "--asr", "none", *flags(TTS_FLAGS, **changes)]


def scoring(world, out: Path, *more) -> list[str]:
    """evaluate.py's flags for the small world's list and scorers; of a flag that comes twice, the last one counts."""
    given = ["--list", world.corpus / "test.lst", "--asr", world.ssl, "--sim", world.sv, "--out", out, *more]
    return [str(flag) for flag in given]


def rows(folder) -> list[dict[str, str]]:
    """log.csv of a run."""
    return list(csv.DictReader(open(folder / "log.csv", encoding="utf-8")))


def tone(seconds: float, seed: int) -> np.ndarray:
    """Something like a voice: harmonics of a wandering pitch under a slow envelope, and a little noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(120 + 60 * rng.random() + 15 * np.sin(5 * t)) / RATE
    wave = sum(np.sin(k * phase) / k for k in range(1, 12)) * (0.6 + 0.4 * np.sin(8 * t + rng.random()))
    return (0.1 * wave + 0.005 * rng.standard_normal(len(t))).astype(np.float32)


def write_corpus(folder: Path, clips: int = 9) -> Path:
    """A manifest of `clips` clips by two speakers."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    words = "one small bird sang by the river this morning".split()
    rows = ["audio|speaker|text|split"]
    for i in range(clips):
        sf.write(folder / "audio" / f"{i}.wav", tone(1.0 + 0.1 * i, i), RATE)
        text = " ".join(random.Random(i).choices(words, k=4))
        rows.append(f"audio/{i}.wav|s{i % 2}|{text}|{'valid' if i >= clips - 3 else 'train'}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    lines = [
        f"audio/{a}.wav\t{1 + 0.1 * a:.1f}\tone small bird sang\taudio/{b}.wav\t{1 + 0.1 * b:.1f}\tby the river"
        for a, b in ((0, 2), (1, 3), (2, 4))
    ]
    (folder / "test.lst").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def tiny_ssl(folder: Path, seed: int = 0, letters: str = string.ascii_lowercase) -> Path:
    """A random WavLM with a CTC head over these 26 letters, 50 frames a second."""
    from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor, WavLMConfig, WavLMForCTC

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    config = WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=15, num_conv_pos_embedding_groups=4, feat_extract_norm="layer",
        do_stable_layer_norm=True, vocab_size=30,
    )
    WavLMForCTC(config).save_pretrained(folder)
    vocab = {c: i for i, c in enumerate(["<pad>", "<unk>", "|", "'", *letters])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer = Wav2Vec2CTCTokenizer(
        folder / "vocab.json", bos_token=None, eos_token=None, unk_token="<unk>", pad_token="<pad>",
        word_delimiter_token="|",
    )
    Wav2Vec2Processor(
        Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=RATE, do_normalize=True, return_attention_mask=True),
        tokenizer,
    ).save_pretrained(folder)
    return folder


def tiny_sv(folder: Path) -> Path:
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    torch.manual_seed(1)
    config = WavLMConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=15, num_conv_pos_embedding_groups=4, feat_extract_norm="layer", tdnn_dim=(32,) * 5,
        xvector_output_dim=16, num_labels=2,
    )
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=RATE, do_normalize=True, return_attention_mask=True
    ).save_pretrained(folder)
    return folder


class World:
    """Folders of the small world."""

    def __init__(self, root: Path):
        self.root = root
        self.corpus = write_corpus(root / "corpus")
        self.ssl = tiny_ssl(root / "ssl")
        self.sv = tiny_sv(root / "sv")
        self.data = root / "data"
        self.vae = root / "vae"
        self.tts = root / "tts"
        prepare.main([
            str(self.corpus), "--out", str(self.data), "--ssl", str(self.ssl), "--aligner", str(self.ssl),
            "--text", "plain",
        ])
        train_vae.main(["--data", str(self.data), "--out", str(self.vae), *VAE_FLAGS])
        prepare.main(["--out", str(self.data), "--ssl", "none", "--vae", str(self.vae)])
        train_tts.main(["--data", str(self.data), "--out", str(self.tts), "--asr", str(self.ssl), *TTS_FLAGS])


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def fails(capsys, monkeypatch):
    """fails(main, args, *words): the command ends with exit code 2 and one line on stderr that holds the words."""

    monkeypatch.setattr(prepare, "leave", sys.exit)

    def check(main, args, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            prepare.cli(lambda: main([str(a) for a in args]))
        message = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 2, message
        errors = [line for line in message if "error: " in line]
        assert len(errors) == 1 and "Traceback" not in "".join(message), message
        for word in words:
            assert word in errors[0], f"{word!r} is not in {errors[0]!r}"

    return check


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "sample", "evaluate", "torch._dynamo"])  # imported once, not by each rank


def one_rank(script: str, args: list[str], environment: dict[str, str], first: str, output: Path) -> None:
    """What torchrun starts: a process that runs a script as one of its ranks."""
    os.environ.update(environment)
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{output}{suffix}", os.O_CREAT | os.O_WRONLY), stream)
    torch.set_num_threads(1)
    module = importlib.import_module(script.removesuffix(".py"))
    exec(first)
    prepare.cli(lambda: module.main(args))


def torchrun(script: str, *args, ranks: int = 2, first: str = "") -> str:
    """A script on CPU ranks, after the statement `first`: its output, or an AssertionError. As under torchrun (which
    test_faults.py uses), but for the imports, which take longer than most of these runs."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        outputs = [Path(folder) / str(rank) for rank in range(ranks)]
        for rank, output in enumerate(outputs):
            environment = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            environment |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port))
            options = script, list(map(str, args)), environment, first, output
            processes.append(FORKS.Process(target=one_rank, args=options))
            processes[-1].start()
        for process in processes:
            process.join(600)
            process.kill()
        said, errors = ("".join(Path(f"{o}{suffix}").read_text() for o in outputs) for suffix in (".out", ".err"))
    assert all(process.exitcode == 0 for process in processes), errors[-3000:]
    return said
