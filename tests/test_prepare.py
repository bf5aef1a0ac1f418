"""prepare.py: every layout, every reason to drop a clip, exact resumption, ranks, SSL batches equal to one by one, and
where each byte is said."""

import json
import shutil
import string
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import RATE, TTS_FLAGS, VAE_FLAGS, tiny_ssl, tone, torchrun, write_corpus

import prepare
import train_tts
import train_vae
from model import SemanticVAE
from prepare import Data, frame_count, normalize_text, read_audio

UNKNOWN = "Format not recognised. (ffmpeg -i FILE FILE.wav converts what is not wav, flac, ogg, opus or mp3)"
ARRAYS = ("index.tsv", "audio.bin", "ssl.bin", "starts.bin", "unaligned.tsv")


def content(folder: Path) -> dict:
    return {name: (folder / name).read_bytes() for name in ARRAYS}


def test_normalize_text():
    assert normalize_text("  Don’t  stop,\tplease! ", "plain") == "don't stop please"
    assert normalize_text("'Tis “fine” — 10%", "plain") == "tis fine 10"
    assert normalize_text("Cafe\u0301,  ja?", "raw") == "Café, ja?"


def test_frame_count_is_one_rule():
    assert (
        frame_count(16000, 16000, 40) == 40
        and frame_count(16001, 16000, 40) == 41
        and frame_count(1, 16000, Fraction(16000, 400)) == 1
    )
    assert frame_count(8123, 16000, 50) == 26


@pytest.mark.parametrize(
    "suffix, rate, channels",
    [("wav", 16000, 1), ("flac", 44100, 2), ("ogg", 22050, 1), ("opus", 48000, 1), ("mp3", 24000, 2)],
)
def test_audio_formats(tmp_path, suffix, rate, channels):
    wave = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32) * 0.3
    options = dict(format="OGG", subtype="OPUS") if suffix == "opus" else {}
    sf.write(tmp_path / f"a.{suffix}", np.stack([wave] * channels, 1), rate, **options)
    read = read_audio(tmp_path / f"a.{suffix}", RATE)
    assert read.dtype == np.float32 and read.ndim == 1 and abs(len(read) - RATE) < 3000  # mp3 pads
    spectrum = np.abs(np.fft.rfft(read[2000:14000]))
    assert abs(spectrum.argmax() * RATE / 12000 - 440) < 5


def make_layout(root: Path, layout: str) -> Path:
    def write(path, i):
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, tone(0.8, i), RATE)

    def text(path, words):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(words, encoding="utf-8")

    for i in range(3):
        if layout == "libritts":
            write(root / "19" / "198" / f"19_198_{i}.wav", i)
            text(root / "19" / "198" / f"19_198_{i}.normalized.txt", f"words {i}")
        elif layout == "librispeech":
            write(root / "19" / "198" / f"19-198-{i}.flac", i)
            text(root / "19" / "198" / "19-198.trans.txt", "\n".join(f"19-198-{j} words {j}" for j in range(3)))
        elif layout == "vctk":
            write(root / "wav48_silence_trimmed" / "p1" / f"p1_{i}_mic1.flac", i)
            text(root / "txt" / "p1" / f"p1_{i}.txt", f"words {i}")
        else:
            write(root / "wavs" / f"LJ{i}.wav", i)
            text(root / "metadata.csv", "\n".join(f"LJ{j}|Words|words {j}" for j in range(3)))
    return root


@pytest.mark.parametrize("layout", ["libritts", "librispeech", "vctk", "ljspeech"])
def test_layouts_are_detected(tmp_path, layout):
    prepare.main([str(make_layout(tmp_path / "in", layout)), "--out", str(tmp_path / "out"), "--ssl", "none"])
    data = Data(tmp_path / "out")
    assert [c["text"] for c in data.clips] == ["words 0", "words 1", "words 2"]
    assert {c["speaker"] for c in data.clips} == {
        dict(libritts="19", librispeech="19", vctk="p1", ljspeech="LJ")[layout]
    }
    assert len(data.split("valid")) == 1 and len(data.split("train")) == 2
    assert np.abs(data.get("audio", 1).numpy() - tone(0.8, 1)).max() < 1e-4


def test_every_dropped_clip_is_listed_with_its_reason(tmp_path, capsys):
    corpus = write_corpus(tmp_path / "in", 3)
    wave = {
        "short": tone(0.2, 0),
        "long": tone(4, 0),
        "silent": np.zeros(RATE, np.float32),
        "empty": np.zeros(0, np.float32),
        "nan": np.full(RATE, np.nan, np.float32),
        "mute": tone(1, 0),
    }
    for name, samples in wave.items():
        sf.write(corpus / f"{name}.wav", samples, RATE, subtype="FLOAT")
    (corpus / "broken.wav").write_bytes(b"RIFFnonsense")
    rows = [f"{n}.wav|s|{'...' if n == 'mute' else 'words'}|train" for n in [*wave, "broken", "absent"]]
    with open(corpus / "manifest.csv", "a", encoding="utf-8") as f:
        f.write("\n".join(rows) + "\n")
    prepare.main([
        str(corpus), "--out", str(tmp_path / "out"), "--ssl", "none", "--text", "plain", "--max-seconds", "3",
    ])
    dropped = dict(line.split("\t") for line in (tmp_path / "out" / "dropped.tsv").read_text().splitlines())
    assert dropped == {
        "short.wav": "shorter than 0.5 s",
        "long.wav": "longer than 3.0 s",
        "silent.wav": "silent",
        "empty.wav": "it holds no samples",
        "nan.wav": "non-finite samples",
        "mute.wav": "empty text",
        "broken.wav": UNKNOWN,
        "absent.wav": "no such file",
    }
    out = capsys.readouterr().out
    assert f"dropped broken.wav: {UNKNOWN}" in out and "dropped 1: no such file" in out and "3 clips" in out


def test_bad_input(tmp_path, fails, world):
    out = ["--out", tmp_path / "out", "--ssl", "none"]
    (tmp_path / "empty").mkdir()
    fails(prepare.main, [tmp_path / "empty", *out], "no speech found")
    fails(prepare.main, [tmp_path / "absent", *out], "no such file or folder")
    table = tmp_path / "m.csv"
    table.write_text("audio|speaker\na.wav|hello\n")
    fails(prepare.main, [table, *out], "has no columns audio and text", "'audio|speaker'", "awk -F'|'")
    table.write_text("audio|speaker|text\n\na.wav|s\n")
    fails(prepare.main, [table, *out], "line 3", "expected 3")
    table.write_text('audio|speaker|text\na.wav|s|"By the river," he said, ""so""\n')
    fails(prepare.main, [table, *out], "line 2: '|' expected after '\"'")
    table.write_bytes("audio|speaker|text\na.wav|s|grün\n".encode("latin-1"))
    fails(prepare.main, [table, *out], "cannot read the transcripts of", "utf-8")
    table.write_text("audio|speaker|text\na.wav|s|hello\n")
    fails(prepare.main, [table, *out], "all 1 clips were dropped", "no such file")
    sf.write(tmp_path / "a.wav", tone(1, 0), RATE)
    prepare.main([str(a) for a in (table, *out)])  # mended, it is looked at again
    (tmp_path / "out" / "index.tsv").write_text((tmp_path / "out" / "index.tsv").read_text().replace("train", "valid"))
    fails(prepare.main, [*out, "--vae", world.vae], "holds no training clips")
    fails(prepare.main, ["--out", world.data, "--layer", 1], "layer -1, not", "layer 1: choose another --out")
    fails(prepare.main, [world.corpus, "--out", tmp_path / "out2", "--ssl", tmp_path / "empty"], "cannot load --ssl")
    fails(prepare.main, ["--out", world.data, "--ssl", world.sv], "already holds SSL features of")
    fails(
        prepare.main,
        [world.corpus, "--out", world.data, "--ssl", "none", "--text", "raw"],
        "was made with other settings",
    )
    fails(
        prepare.main, ["--out", world.data, "--ssl", "none", "--vae", world.tts], "holds a DiT, expected a SemanticVAE"
    )


def test_several_manifests_one_with_a_byte_order_mark_and_crlf(tmp_path):
    a = write_corpus(tmp_path / "a", 3)
    b = write_corpus(tmp_path / "b", 4)
    (a / "manifest.csv").write_bytes(b"\xef\xbb\xbf" + (a / "manifest.csv").read_bytes().replace(b"\n", b"\r\n"))
    prepare.main([str(a), str(b / "manifest.csv"), "--out", str(tmp_path / "out"), "--ssl", "none"])
    assert len(Data(tmp_path / "out").clips) == 7


def test_killed_at_any_chunk_it_ends_with_the_same_bytes(tmp_path, world, monkeypatch):
    """Stop after every chunk of every pass in turn, and go on: nothing is done twice, nothing is lost."""
    ssl = str(world.ssl)
    args = [str(world.corpus), "--ssl", ssl, "--aligner", ssl, "--text", "plain", "--out"]
    monkeypatch.setattr(prepare, "CHUNK", 2)
    prepare.main([*args, str(tmp_path / "straight")])
    real = prepare.write_text
    runs = 0

    def dies_after_a_chunk(path, text):
        real(path, text)
        if path.parent.name == prepare.WORK and path.suffix == "":
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_text", dies_after_a_chunk)
    while True:
        try:
            prepare.main([*args, str(tmp_path / "out")])
            break
        except KeyboardInterrupt:
            runs += 1
    assert runs == 3 * 5  # 9 clips in chunks of 2, three passes
    assert content(tmp_path / "out") == content(tmp_path / "straight")
    assert not (tmp_path / "out" / prepare.WORK).exists()


def test_two_ranks_make_the_same_bytes(tmp_path, world):
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        models = ["--ssl", world.ssl, "--aligner", world.ssl, "--vae", world.vae]
        args = [world.corpus, "--out", out, *models, "--text", "plain"]
        torchrun("prepare.py", *args, ranks=ranks, first="prepare.CHUNK = 2")
    assert np.isfinite(np.fromfile(tmp_path / "2" / "starts.bin", "float32")).all()
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert (
        next((tmp_path / "1").glob("latents-*")).read_bytes() == next((tmp_path / "2").glob("latents-*")).read_bytes()
    )


def test_latents_are_the_posterior_and_their_statistics_standardise_it(world):
    data = Data(world.data, ("audio", "latents"))
    vae = SemanticVAE.from_pretrained(world.vae)
    with torch.no_grad():
        mean, logvar = vae.encode(data.get("audio", 3)[None])
    stored = data.get("latents", 3)
    assert torch.allclose(stored[:, 0], mean[0], atol=2e-3) and torch.allclose(stored[:, 1], logvar[0], atol=1e-2)
    rows = torch.cat([data.get("latents", i) for i in data.split("train")])
    torch.manual_seed(0)
    z = rows[:, 0] + torch.randn(200, *rows[:, 0].shape) * (0.5 * rows[:, 1]).exp()
    z = (z - torch.tensor(data.meta["latents"]["mean"])) / torch.tensor(data.meta["latents"]["std"])
    assert z.mean((0, 1)).abs().max() < 0.02 and (z.std((0, 1)) - 1).abs().max() < 0.02


def random_encoder(kind: str, folder: Path) -> Path:
    """Tiny random models of the families that prepare.py is to read."""
    from transformers import (
        HubertConfig, HubertModel, SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertModel, Wav2Vec2Config,
        Wav2Vec2FeatureExtractor, Wav2Vec2Model, WhisperConfig, WhisperFeatureExtractor, WhisperModel,
    )

    torch.manual_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    conv = dict(conv_dim=(8,) * 7, num_conv_pos_embeddings=15, num_conv_pos_embedding_groups=4)
    waves = Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=RATE, do_normalize=True, return_attention_mask=kind != "wav2vec2"
    )
    if kind == "wavlm":
        return tiny_ssl(folder)
    if kind == "wav2vec2":  # group norm over time, as the base models have it
        model = Wav2Vec2Model(Wav2Vec2Config(**size, **conv))
        extractor = waves
    elif kind == "hubert":
        model = HubertModel(HubertConfig(**size, **conv, feat_extract_norm="layer", do_stable_layer_norm=True))
        extractor = waves
    elif kind == "w2v-bert":
        model = Wav2Vec2BertModel(Wav2Vec2BertConfig(**size, feature_projection_input_dim=160))
        extractor = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, sampling_rate=RATE, stride=2)
    else:
        config = WhisperConfig(
            d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        )
        model = WhisperModel(config)
        extractor = WhisperFeatureExtractor()
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["wavlm", "wav2vec2", "hubert", "w2v-bert", "whisper"])
def test_ssl_batches_equal_one_by_one(kind, tmp_path):
    ssl = prepare.SSLModel(str(random_encoder(kind, tmp_path)), layer=-1 if kind != "hubert" else 1)
    assert ssl.rate == 50 and ssl.width == 32
    waves = [tone(s, i) for i, s in enumerate((1.0, 1.43, 0.7, 1.0))]
    lengths = [len(w) for w in waves]
    batches = ssl.batches(lengths, seconds=10)
    assert sorted(i for b in batches for i in b) == [0, 1, 2, 3]
    assert ssl.equal_lengths == (kind == "wav2vec2") and len(batches) == (3 if ssl.equal_lengths else 1)
    assert ssl.batches(lengths, seconds=1.5) == [[2], [0], [3], [1]]
    for batch in batches:
        for i, together in zip(batch, ssl([waves[i] for i in batch])):
            (alone,) = ssl([waves[i]])
            assert together.shape == alone.shape and abs(len(alone) - 50 * len(waves[i]) / RATE) <= 1.5
            assert (together - alone).abs().max() < 1e-4, f"{kind}: {(together - alone).abs().max()}"
    if kind == "whisper":
        with pytest.raises(prepare.InputError, match="30 s at most"):
            ssl([np.zeros(31 * RATE, np.float32)])


def test_another_layer_and_another_direction(world, tmp_path, fails):
    """A hidden state of the teacher: what it gives, that stage 1 learns from it either way, and that what fits neither
    data nor teacher is refused."""
    prepare.main([
        str(world.corpus), "--out", str(tmp_path / "data"), "--text", "plain", "--ssl", str(world.ssl), "--layer", "1",
    ])
    data = Data(tmp_path / "data", ("audio", "ssl"))
    assert data.meta["ssl"] | dict(revision="", shape=0) == dict(
        model=str(world.ssl), revision="", layer=1, dim=32, rate="50", shape=0, dtype="float16"
    )
    (features,) = prepare.SSLModel(str(world.ssl), 1)([data.get("audio", 2).numpy()])
    stored = data.get("ssl", 2)
    assert len(stored) == frame_count(data.samples[2], RATE, 50) and torch.allclose(
        stored[: len(features)], features, atol=5e-3
    )
    assert torch.equal(stored[len(features) :], stored[len(features) - 1 : -1])  # the last one again
    train_vae.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "vae"), *VAE_FLAGS, "--align", "up"])
    prepare.main(["--out", str(tmp_path / "data"), "--vae", str(tmp_path / "vae")])  # knows its teacher and layer
    assert Data(tmp_path / "data", ("ssl", "latents"))
    config = SemanticVAE.from_pretrained(tmp_path / "vae").config
    assert (config.ssl_dim, config.align) == (32, "up")
    fails(
        prepare.main, [world.corpus, "--out", tmp_path / "y", "--ssl", world.ssl, "--sample-rate", "8000"],
        "hears 16000 Hz", "holds 8000 Hz", "--sample-rate 16000",
    )
    init = [
        "--preset", "demo", "--data", tmp_path / "data", "--out", tmp_path / "z", "--init", world.vae, "--align", "up",
    ]
    fails(train_vae.main, init, "was aligned down with features of width 32", "gives width 32 and --align is up")


def test_download_reports_what_cannot_be_fetched(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(
        prepare.main,
        ["--download", "train-clean-7", "--out", tmp_path / "out", "--ssl", "none"],
        "cannot download train-clean-7",
    )
    fails(prepare.main, [tmp_path, "--out", tmp_path / "out"], "name the teacher with --ssl")

    asked = []

    def unpack(inside):
        def dataset(root, url, download):
            asked.append(url)
            if not (root / inside / url).exists():  # as torchaudio does: what is there is taken for the whole
                (root / inside / url).mkdir(parents=True)
                if asked == ["dev-clean"]:
                    raise KeyboardInterrupt  # killed while it unpacks
                (root / inside / url / "all").touch()

        return dataset

    monkeypatch.setattr(prepare.torchaudio.datasets, "LIBRITTS", unpack("LibriTTS"))
    monkeypatch.setattr(prepare.torchaudio.datasets, "LIBRISPEECH", unpack("LibriSpeech"))
    with pytest.raises(KeyboardInterrupt):
        prepare.download("dev-clean,librispeech:test-clean", tmp_path)
    for _ in range(2):  # the second time nothing is fetched
        folders = prepare.download("dev-clean,librispeech:test-clean", tmp_path)
        assert asked == ["dev-clean", "dev-clean", "test-clean"] and folders == [
            tmp_path / "LibriTTS" / "dev-clean",
            tmp_path / "LibriSpeech" / "test-clean",
        ]
        assert all((folder / "all").exists() for folder in folders)


# ---------------------------------------------------------------------------------------- where each byte is said


@pytest.fixture
def aligner(tmp_path, monkeypatch):
    """One with a public English alphabet: upper case, | between words, no punctuation; with the threshold of use."""
    monkeypatch.setattr(prepare.Aligner, "WORST", -2.5)
    folder = tiny_ssl(tmp_path / "upper", letters=string.ascii_uppercase)
    aligner = prepare.Aligner(str(folder), RATE, torch.device("cpu"))
    assert [aligner.symbol(c) for c in "nN '|é,1<"] == [17, 17, 2, 3, 2, None, None, None, None] and aligner.blank == 0
    return aligner


def spoken(aligner, text: str, places: list, frames: int) -> torch.Tensor:
    """Logits [S, 30] of a recogniser that hears what it knows of the text, each character in the frames (first, last)
    of its place, and nothing else."""
    logits = torch.zeros(frames, 30)
    logits[:, aligner.blank] = 12
    known = [symbol for symbol in map(aligner.symbol, text) if symbol is not None]
    for (first, last), symbol in zip(places, known, strict=True):
        logits[first : last + 1] = torch.nn.functional.one_hot(torch.tensor(symbol), 30) * 12.0
    return logits


def halfway(peaks) -> torch.Tensor:
    return torch.tensor([0, *(np.add(peaks[1:], peaks[:-1]) / 2)], dtype=torch.float32)


def test_a_byte_begins_halfway_between_the_moments_of_two_characters(aligner):
    """Doubled letters and one that is held for three frames among them: its moment is the middle one."""
    places = [(2, 2), (4, 4), (9, 11), (14, 14)]
    starts = aligner(spoken(aligner, "aa b", places, 20), "aa b", 2.0)
    assert torch.allclose(starts, halfway([0.25, 0.45, 1.05, 1.45]))


def test_unknown_characters_stand_evenly_between_their_neighbours(aligner):
    """Mixed case, punctuation and bytes: one start a byte, ascending; what the alphabet lacks stands between its
    neighbours."""
    text = "Né, «zo»!"
    places = [(3, 3), (12, 12), (20, 20), (24, 24)]
    starts = aligner(spoken(aligner, text, places, 40), text, 2.0)
    n = 0.175
    space = 0.625
    z = 1.025
    o = 1.225
    peaks = [np.linspace(n, space, 5)[:-1], np.linspace(space, z, 4)[:-1], [z], np.linspace(o, 2, 5)[:-1]]
    assert len(starts) == len(text.encode()) == 12 and (starts.diff() > 0).all() and starts[0] == 0
    assert torch.allclose(starts, halfway(np.concatenate(peaks)))
    assert torch.equal(starts, aligner(spoken(aligner, text.upper(), places, 40), text.upper(), 2.0))


@pytest.mark.parametrize(
    "text, heard, frames", [("abc é", "xyz ", 40), ("abcdefghij", "", 9), ("aaaaa", "", 8), ("42é", "", 40)]
)
def test_what_is_not_said_has_no_place(aligner, text, heard, frames):
    """Another text, one too long (doubled letters need a frame between), one of unknown characters only: all nan."""
    starts = aligner(spoken(aligner, heard, [(4 * i + 2,) * 2 for i in range(len(heard))], frames), text, 1.0)
    assert len(starts) == len(text.encode()) and starts.isnan().all()


def test_clips_that_cannot_be_aligned_are_listed_and_left_out(world, tmp_path, capsys):
    corpus = write_corpus(tmp_path / "in")
    out = tmp_path / "out"
    rows = [line.split("|") for line in (corpus / "manifest.csv").read_text().splitlines()]
    rows[1][2] = "42"
    rows[8][2] = "one small bird sang " * 6
    (corpus / "manifest.csv").write_text("".join("|".join(row) + "\n" for row in rows))
    flags = ["--ssl", "none", "--aligner", str(world.ssl), "--text", "plain", "--vae", str(world.vae)]
    prepare.main([str(corpus), "--out", str(out), *flags])
    said = capsys.readouterr().out
    lost = ["audio/0.wav", "audio/7.wav"]
    assert (out / "unaligned.tsv").read_text().split() == lost
    assert "2 of 9 clips cannot be aligned" in said and "'4' 1 times, '2' 1 times" in said
    data = Data(out, ("starts",))
    for i, clip in enumerate(data.clips):
        starts = data.get("starts", i)
        assert len(starts) == len(clip["text"]) and starts.isnan().all() == (clip["id"] in lost)
        ascend = starts[0] == 0 and (starts.diff() > 0).all() and starts[-1] < data.samples[i] / RATE
        assert ascend or clip["id"] in lost
    train_tts.main(["--data", str(out), "--out", str(tmp_path / "tts"), "--asr", "none", *TTS_FLAGS])
    assert "; 5 clips, " in capsys.readouterr().out  # of 6


def test_another_aligner_replaces_the_starts(world, tmp_path, fails):
    data = tmp_path / "data"
    other = tiny_ssl(tmp_path / "other", seed=5)
    shutil.copytree(world.data, data)
    prepare.main(["--out", str(data), "--aligner", str(world.ssl)])  # the same: nothing is done
    assert (data / "starts.bin").read_bytes() == (world.data / "starts.bin").read_bytes()
    prepare.main(["--out", str(data), "--aligner", str(other)])
    meta = json.loads((data / "meta.json").read_text())
    assert meta["starts"]["aligner"] == str(other) and Data(data, ("audio", "ssl", "starts", "latents"))
    assert (data / "starts.bin").read_bytes() != (world.data / "starts.bin").read_bytes()
    fails(prepare.main, ["--out", data, "--aligner", world.sv], "cannot load --aligner")
    fails(prepare.main, ["--out", data, "--aligner", tmp_path / "absent"], "cannot load", "absent")
    assert json.loads((data / "meta.json").read_text()) == meta


def test_the_demo_interrupted_is_aligned_all_the_same(world, tmp_path, monkeypatch):
    """`prepare.py` without flags, killed in the pass over the features and run again, ends with the same bytes."""
    for name in ("corpus", "ssl"):
        shutil.copytree(getattr(world, name), tmp_path / "demo" / name)
    monkeypatch.setattr(prepare, "DEMO", tmp_path / "demo")
    prepare.main(["--out", str(tmp_path / "straight")])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "fill_ssl", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare.main(["--out", str(tmp_path / "out")])
    prepare.main(["--out", str(tmp_path / "out")])
    assert content(tmp_path / "out") == content(tmp_path / "straight")
