"""Nothing silent: what a user gives is used or refused by name, what a user made is never written over, and no wrong
result ends with exit code 0."""

import argparse
import csv
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import RATE, TTS, TTS_FLAGS, VAE_FLAGS, scoring, tone, write_corpus

import evaluate
import prepare
import sample
import train_tts
import train_vae
from model import DiTConfig, InputError, SemanticVAE
from prepare import Data

# ------------------------------------------------------------------------------------------ the user's own files


def index(out: Path) -> list[dict]:
    return Data(out).clips


def test_scratch_space_holds_only_what_we_made(tmp_path):
    """A folder work/ or partial/ of the user's, and one whose name only resembles that of kept weights, are left
    alone."""
    for folder in ("work", "partial", "step-backup"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "thesis.txt").write_text("years")
    prepare.main([str(write_corpus(tmp_path / "in", 3)), "--out", str(tmp_path), "--ssl", "none"])
    assert not (tmp_path / prepare.WORK).exists()

    class Model(torch.nn.Module):
        def save_pretrained(self, folder, **notes):
            Path(folder).mkdir(exist_ok=True)

    run = prepare.Run(argparse.Namespace(out=tmp_path, resume=False, steps=4, keep=1), 0, 1, torch.device("cpu"))
    run.begin(Model(), {}, {}, ["loss"], 0)
    run.start = run.pace_start = 0
    for step, run.evaluating in ((1, True), (2, True), (3, False)):  # the last by a signal
        run.save(step)
    assert all((tmp_path / name / "thesis.txt").exists() for name in ("work", "partial", "step-backup"))
    assert sorted(p.name for p in tmp_path.glob("step0*")) == ["step0000002"]


def test_a_folder_that_we_did_not_begin_is_refused(tmp_path, fails):
    corpus = write_corpus(tmp_path / "in", 3)
    for name in ("index.tsv", "meta.json", "settings.json"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text("{}")
        fails(
            prepare.main, [corpus, "--out", tmp_path / "mine", "--ssl", "none"], f"holds a {name}, but no settings.json"
        )
        assert (tmp_path / "mine" / name).read_text() == "{}"
        (tmp_path / "mine" / name).unlink()


def test_what_stands_beside_a_table_is_kept(world, tmp_path):
    """A user's file in a folder that is named like the table's scratch space."""
    (tmp_path / "s.csv.work").mkdir()
    (tmp_path / "s.csv.work" / "thesis.txt").write_text("years")
    more = ["--limit", 1, "--reconstruct", world.vae, "--noise", 0.1, 0.10]
    evaluate.main(scoring(world, tmp_path / "s.csv", *more))
    assert (tmp_path / "s.csv.work" / "thesis.txt").exists()
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 1 + 3  # a level that is given twice is one


def test_weights_may_be_read_by_others(world, tmp_path):
    SemanticVAE.from_pretrained(world.vae).save_pretrained(tmp_path)
    modes = {(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


WORDS = ["--ref-text", "one small bird", "--text", "by the river"]


def speak(world, *more):
    return ["--tts", str(world.tts), "--asr", str(world.ssl), "--steps", "1", *map(str, more)]


def test_no_recording_is_written_over(world, tmp_path, fails, monkeypatch):
    """By its own name, the default, a spelling, a link; and none of a list's or of the table's."""
    monkeypatch.chdir(tmp_path)
    for name in ("sample.wav", "voice.wav"):
        sf.write(name, tone(1.3, 0), RATE)
    Path("link.wav").symlink_to("voice.wav")
    before = {name: Path(name).read_bytes() for name in ("sample.wav", "voice.wav")}
    fails(sample.main, speak(world, "--ref", "sample.wav", *WORDS), "--out sample.wav is the recording sample.wav")
    for out in ("voice.wav", tmp_path / "voice.wav", "link.wav"):
        fails(
            sample.main,
            speak(world, "--ref", "./voice.wav", *WORDS, "--out", out),
            "is the recording voice.wav: choose another --out",
        )
    assert {name: Path(name).read_bytes() for name in before} == before
    corpus = shutil.copytree(world.corpus, tmp_path / "corpus")
    listed = ["--tts", world.tts, "--list", corpus / "test.lst", "--out", corpus / "audio"]
    fails(sample.main, listed, "was made with other settings", "choose another --out")
    score = ["--asr", world.ssl, "--sim", world.sv, "--list", corpus / "test.lst", "--out"]
    for out in (corpus / "test.lst", corpus / "audio" / "0.wav"):
        fails(evaluate.main, [*score, out], "a file that is read")
    fails(evaluate.main, [*score, corpus], "is a folder")


@pytest.mark.parametrize("train, name", [(train_vae, "vae"), (train_tts, "tts")])
def test_weights_that_we_did_not_train_here_are_not_replaced(train, name, world, tmp_path, fails):
    """Downloaded, with or without the notes of the run that made them; and a folder with another program's
    config.json."""
    there = shutil.copytree(getattr(world, name), tmp_path / "m")
    (there / "state.pt").unlink()
    (there / ".lock").unlink()
    for lacking in ("log.csv", "args.json", "model.safetensors", "config.json"):
        before = {p.name: p.read_bytes() for p in there.iterdir() if p.is_file()}
        for init in (["--init", there], []):
            fails(
                train.main,
                ["--data", world.data, "--out", there, *init],
                "but no state.pt to go on from: choose another --out",
            )
        fails(train.main, ["--resume", "--out", there], "holds no run to resume")
        assert {p.name: p.read_bytes() for p in there.iterdir() if p.is_file()} == before
        (there / lacking).unlink()


@pytest.mark.parametrize("train, name", [(train_vae, "vae"), (train_tts, "tts")])
def test_a_copied_run_goes_on_where_it_is_and_a_finished_one_is_not_begun_anew(train, name, world, tmp_path, fails):
    there = shutil.copytree(getattr(world, name), tmp_path / "copy")
    before = (getattr(world, name) / "state.pt").read_bytes()
    train.main(["--resume", "--out", str(there), "--steps", "3"])
    assert (getattr(world, name) / "state.pt").read_bytes() == before != (there / "state.pt").read_bytes()
    fails(train.main, ["--resume", "--out", there, "--preset", "paper"], "--preset is for the beginning of a run")
    fails(train.main, ["--resume", "--out", there, "--init", world.vae], "--init is for the beginning of a run")
    with open(there / "log.csv", "a") as f:
        f.write("1;65.5;0\n" + 100 * "\0" + "\n")  # a spreadsheet's, and a power cut's
    train.main(["--resume", "--out", str(there), "--steps", "4"])
    assert [row.split(",")[0] for row in (there / "log.csv").read_text().splitlines()] == ["step", "1", "2", "3", "4"]
    (there / "state.pt").unlink()  # to save disk
    fails(train.main, ["--data", world.data, "--out", there], "holds a args.json, but no state.pt to go on from")


def test_a_file_is_what_its_suffix_says(world, tmp_path, fails):
    kinds = {".wav": "WAV", ".flac": "FLAC", ".mp3": "MP3", ".OGG": "OGG", ".opus": "OGG"}
    for suffix, kind in kinds.items():
        prepare.write_wave(tmp_path / f"a{suffix}", tone(0.5, 0), RATE)
        assert sf.info(tmp_path / f"a{suffix}").format == kind
    ref = ["--ref", world.corpus / "audio" / "3.wav"]
    sample.main(speak(world, *ref, *WORDS, "--out", tmp_path / "said.flac"))
    assert sf.info(tmp_path / "said.flac").format == "FLAC"
    for out in ("said.m4a", "said", "."):
        fails(
            sample.main, speak(world, *ref, *WORDS, "--out", tmp_path / out), "expected a file that ends in .wav, .flac"
        )


def test_a_run_folder_that_is_a_link_can_be_sampled_from(world, tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tts").symlink_to(tmp_path / "disk" / "deep")
    train_tts.main(TTS(world, tmp_path / "runs" / "tts", steps=1, eval_sentences=0))
    for name in (tmp_path / "runs" / "tts", tmp_path / "disk" / "deep"):
        sample.load(str(name), None, "cpu")


# --------------------------------------------------------------------------------------------- data change meaning


def prepared(tmp_path, source, *flags, out="out"):
    """Its clips by id, and the reasons of those that were dropped."""
    prepare.main([str(source), "--out", str(tmp_path / out), "--ssl", "none", *map(str, flags)])
    dropped = [
        line.split("\t") for line in (tmp_path / out / "dropped.tsv").read_text(encoding="utf-8").split("\n")[:-1]
    ]
    return {c["id"]: c for c in index(tmp_path / out)}, dict(dropped)


def corpus_of(folder: Path, table: str, header: str | None = None, name: str = "metadata.csv") -> Path:
    """Two recordings of 1 s, wavs/a.wav and wavs/b.wav, and a table of them."""
    (folder / "wavs").mkdir(parents=True)
    for i, clip in enumerate("ab"):
        sf.write(folder / "wavs" / f"{clip}.wav", tone(1, i), RATE)
    (folder / name).write_bytes((f"{header}\n" if header else "").encode() + table.encode())
    return folder


def edit_a_text(corpus):
    (corpus / "manifest.csv").write_text((corpus / "manifest.csv").read_text().replace("|s0|", "|s0|now "))


def replace_a_recording(corpus):
    sf.write(corpus / "audio" / "0.wav", tone(1, 9), RATE)
    os.utime(corpus / "audio" / "0.wav", ns=(1, 1))


def put_one_back(corpus):
    sf.write(corpus / "audio" / "gone.wav", tone(1, 9), RATE)


@pytest.mark.parametrize("change", [edit_a_text, replace_a_recording, put_one_back])
def test_sources_that_changed_are_refused_by_name(change, tmp_path, fails):
    corpus = write_corpus(tmp_path / "in", 3)
    with open(corpus / "manifest.csv", "a") as f:
        f.write("audio/gone.wav|s1|one bird|train\n")
    args = [corpus, "--out", tmp_path / "out", "--ssl", "none"]
    prepare.main([str(a) for a in args])
    prepare.main([str(a) for a in args])  # nothing has changed
    change(corpus)
    fails(
        prepare.main, args, "was made with other settings or recordings",
        "gone.wav" if change == put_one_back else "audio/0.wav", "choose another --out",
    )


def test_a_teacher_whose_weights_changed_is_refused(world, tmp_path, fails):
    teacher = shutil.copytree(world.ssl, tmp_path / "ssl")
    prepare.main([str(write_corpus(tmp_path / "in", 3)), "--out", str(tmp_path / "out"), "--ssl", str(teacher)])
    with open(teacher / "model.safetensors", "ab") as f:
        f.write(b"more")
    fails(prepare.main, ["--out", tmp_path / "out"], "holds other weights")


def test_models_that_lack_what_is_asked_of_them_are_refused(world, tmp_path, fails):
    """A head that is not in the file would be random; a pointer in place of weights; and a chosen aligner stays
    chosen."""
    from transformers import AutoModel, AutoModelForCTC, EncodecConfig, EncodecFeatureExtractor, EncodecModel

    score = ["--list", world.corpus / "test.lst", "--asr", world.ssl, "--out", tmp_path / "s.csv"]
    fails(
        evaluate.main,
        [*score, "--sim", world.ssl],
        "cannot load --sim",
        "it is no ModelForAudioXVector, its weights lack",
    )
    headless = shutil.copytree(world.ssl, tmp_path / "headless")
    AutoModel.from_pretrained(world.ssl).save_pretrained(headless)
    data = shutil.copytree(world.data, tmp_path / "data")
    fails(prepare.main, ["--out", data, "--aligner", headless], "its weights lack lm_head")
    (headless / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    fails(prepare.main, ["--out", data, "--aligner", headless], "cannot load --aligner")
    other = shutil.copytree(world.ssl, tmp_path / "other")
    model = AutoModelForCTC.from_pretrained(other)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(other)
    prepare.main(["--out", str(data), "--aligner", str(other)])
    shutil.rmtree(other)  # it has done its work
    prepare.main(["--out", str(data), "--vae", str(world.vae)])
    assert Data(data).meta["starts"]["aligner"] == str(other)
    shutil.copytree(world.ssl, other, ignore=shutil.ignore_patterns("*.safetensors"))
    (other / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1")
    ssl = [world.corpus, "--out", tmp_path / "new", "--ssl", other]
    fails(prepare.main, ssl, "cannot load --ssl")
    EncodecModel(EncodecConfig(num_filters=2, hidden_size=8, codebook_dim=8, target_bandwidths=[1.5])).save_pretrained(
        other
    )
    EncodecFeatureExtractor(sampling_rate=RATE).save_pretrained(other)
    fails(prepare.main, ssl, "is no encoder of speech like WavLM")


@pytest.mark.parametrize("third", ["1.5", "17", "p225"])
def test_a_third_column_that_is_no_reading_of_the_second_is_refused(third, tmp_path, fails):
    corpus = corpus_of(tmp_path / "in", f"a|One small bird.|{third}\nb|By the river.|{third}\n")
    fails(
        prepare.main, [corpus, "--out", tmp_path / "out", "--ssl", "none"], "has no columns audio and text",
        "One small bird.", "awk -F'|'",
    )


def test_an_empty_third_column_leaves_the_second(tmp_path):
    clips, _ = prepared(
        tmp_path, corpus_of(tmp_path / "in", "a|One small bird.|\nb|In 1984.|in nineteen eighty four\n")
    )
    assert [c["text"] for c in clips.values()] == ["One small bird.", "in nineteen eighty four"]


@pytest.mark.parametrize(
    "header, table, name",
    [
        # Hugging Face, F5-TTS, Coqui, ours with tabs, and Common Voice.
        ("file_name,transcription", 'wavs/a.wav,"One small, bird."\nwavs/b.wav,By the river.\n', "metadata.csv"),
        ("audio_file|text", "wavs/a.wav|One small, bird.\nwavs/b.wav|By the river.\n", "metadata.csv"),
        (
            "audio_file|text|speaker_name",
            "wavs/a.wav|One small, bird.|ann\nwavs/b.wav|By the river.|ann\n",
            "metadata.csv",
        ),
        ("speaker\taudio\ttext", "ann\twavs/a.wav\tOne small, bird.\nann\twavs/b.wav\tBy the river.\n", "manifest.csv"),
        (
            "client_id\tpath\tsentence",
            "ann\twavs/a.wav\tOne small, bird.\nann\twavs/b.wav\tBy the river.\n",
            "manifest.csv",
        ),
    ],
)
def test_tables_are_read_by_their_header(header, table, name, tmp_path, capsys):
    clips, dropped = prepared(tmp_path, corpus_of(tmp_path / "in", table, header, name))
    assert [c["text"] for c in clips.values()] == ["One small, bird.", "By the river."] and not dropped
    named = "speaker" in header or "client_id" in header
    assert [c["speaker"] for c in clips.values()] == (["ann", "ann"] if named else ["wavs/a.wav", "wavs/b.wav"])
    assert ("2 clips name no speaker" in capsys.readouterr().out) is not named


def test_a_table_without_a_header_is_refused_with_what_converts_it(tmp_path, fails):
    table = tmp_path / "meta.lst"
    table.write_text("a|one small bird|wavs/b.wav|by the river\n")
    fails(
        prepare.main, [table, "--out", tmp_path / "out", "--ssl", "none"], "has no columns audio and text", "awk -F'|'"
    )
    fails(sample.main, ["--list", table], "six tab-separated columns", "awk -F'|'")


def test_quotes_that_a_writer_of_tables_adds_are_no_text(tmp_path):
    """pandas and csv.writer double a text's quotes; quotes that are not doubled are the text's own."""
    rows = ['wavs/a.wav|s|"He said ""one bird"" again."', 'wavs/b.wav|s |"By the river," he said.']
    clips, _ = prepared(tmp_path, corpus_of(tmp_path / "in", "\n".join(rows), "audio|speaker|text", "manifest.csv"))
    assert [(c["text"], c["speaker"]) for c in clips.values()] == [
        ('He said "one bird" again.', "s"),
        ('"By the river," he said.', "s"),
    ]


def test_what_the_system_refuses_is_one_line(tmp_path, fails):
    fails(lambda argv: os.mkdir(argv[0]), [tmp_path], "File exists", str(tmp_path))


def test_trainings_refuse_flags_that_would_do_nothing(world, tmp_path, fails):
    vae = ["--data", world.data, "--out", tmp_path / "vae", *VAE_FLAGS]
    fails(train_vae.main, [*vae, "--init", world.vae, "--mel"], "was trained without --mel")
    fails(train_vae.main, [*vae, "--encoder-lr", 0], "name it with --init")
    fails(
        prepare.main,
        [world.corpus, "--out", tmp_path / "data", "--ssl", "none", "--layer", 3],
        "names no teacher: drop it",
    )
    prepare.main([str(world.corpus), "--out", str(tmp_path / "data"), "--ssl", "none"])
    fails(prepare.main, ["--out", tmp_path / "data", "--layer", 3], "was begun with --ssl none, which has no --layer")
    fails(train_vae.main, [*vae, "--crop", 0.03, "--align-weight", 0], "frames of 400 samples: 1025 are needed")


@pytest.mark.parametrize(
    "header, table, words",
    [
        ("file_name,text", 'wavs/a.wav,"one\nsmall bird"\nwavs/b.wav,by the river\n', "unexpected end of data"),
        ("audio|text|transcription", "wavs/a.wav|a|b\n", "two columns of one meaning"),
    ],
)
def test_a_table_that_can_be_read_in_two_ways_is_refused(header, table, words, tmp_path, fails):
    fails(
        prepare.main,
        [corpus_of(tmp_path / "in", table, header, "manifest.csv"), "--out", tmp_path / "out", "--ssl", "none"],
        words,
    )


def test_two_corpora_in_a_folder_are_refused(tmp_path, fails):
    for name in ("LibriTTS/84/121/84_121_0.normalized.txt", "LibriSpeech/84/121/84-121.trans.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("84-121-0 ONE BIRD\n")
    fails(
        prepare.main,
        [tmp_path, "--out", tmp_path / "out", "--ssl", "none"],
        "holds several corpora",
        "name the folder of each",
    )


def test_invisible_characters_and_other_compositions_change_nothing():
    assert prepare.normalize_text("syn\u00adthesis to\u200bday \ufeffcafe\u0301", "raw") == "synthesis today café"
    joined = "نمی\u200cدانم"  # a joiner is spelling
    assert prepare.normalize_text(joined, "raw") == prepare.normalize_text(joined, "plain") == joined
    assert evaluate.error_rates(["cafe\u0301 bi\u00adrd"], ["café bird"]) == dict(cer=0, wer=0)


def test_a_loud_float_recording_keeps_its_shape(tmp_path):
    corpus = corpus_of(tmp_path / "in", "loud.wav|s|one bird", "audio|speaker|text", "manifest.csv")
    sf.write(corpus / "loud.wav", 20 * tone(1, 2), RATE, subtype="FLOAT")
    prepared(tmp_path, corpus)
    audio = Data(tmp_path / "out").get("audio", 0).numpy()
    assert np.abs(audio).max() == 1 and np.corrcoef(audio, tone(1, 2))[0, 1] > 0.9999


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    odd = "\u2028", "\x85", "\x0c", "\r"
    text = "one" + "".join(f"{c}small" for c in odd)
    for layout in ("ljspeech", "manifest", "librispeech"):
        corpus = corpus_of(tmp_path / layout, f"a|{text}\r\nb|bird\r\n")
        if layout == "manifest":
            (corpus / "manifest.csv").write_bytes(
                f"audio|speaker|text|split\r\nwavs/a.wav|s|{text}|train\r\nwavs/b.wav|s|bird|train\r\n".encode()
            )
        if layout == "librispeech":
            sf.write(corpus / "wavs" / "a.flac", tone(1, 0), RATE)
            (corpus / "wavs" / "s.trans.txt").write_bytes(f"a {text}\n".encode())
            (corpus / "metadata.csv").unlink()
        clips, dropped = prepared(tmp_path, corpus, out=f"out-{layout}")
        assert next(iter(clips.values()))["text"] == "one small small small small" and not dropped
    (tmp_path / "a.lst").write_text(f"a\t1\t{text}\tb\t1\t{text}\n", encoding="utf-8", newline="")
    assert len(evaluate.read_list(tmp_path / "a.lst")) == 1


def test_folders_that_are_links_are_read(tmp_path):
    for i in (1, 2):
        folder = tmp_path / "disk" / f"subset{i}" / "19" / "198"
        folder.mkdir(parents=True)
        sf.write(folder / f"19_198_{i}.wav", tone(1, i), RATE)
        (folder / f"19_198_{i}.normalized.txt").write_text("one small bird")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "first").symlink_to(tmp_path / "disk" / "subset1")
    (tmp_path / "in" / "second").symlink_to(tmp_path / "disk" / "subset2")
    assert len(prepared(tmp_path, tmp_path / "in")[0]) == 2


def test_two_folders_of_one_voice_each_are_two_voices(tmp_path):
    both = [corpus_of(tmp_path / name, "a|One bird\nb|Two birds\n") for name in ("ann", "bob")]
    prepare.main([*map(str, both), "--out", str(tmp_path / "out"), "--ssl", "none"])
    assert [c["speaker"] for c in index(tmp_path / "out")] == [f"{folder}:LJ" for folder in both for _ in "ab"]


@pytest.mark.parametrize("again", ["wavs/a.wav", "wavs/../wavs/a.wav", "link.wav"])
def test_a_recording_listed_twice_is_refused(again, tmp_path, fails):
    corpus = corpus_of(
        tmp_path / "in", f"wavs/a.wav|s|one bird\n{again}|s|one bird\n", "audio|speaker|text", "manifest.csv"
    )
    (corpus / "link.wav").symlink_to(corpus / "wavs" / "a.wav")
    fails(prepare.main, [corpus, "--out", tmp_path / "out", "--ssl", "none"], "wavs/a.wav is listed 2 times")
    fails(
        prepare.main,
        [corpus / "manifest.csv", corpus, "--out", tmp_path / "out", "--ssl", "none"],
        "wavs/a.wav is listed ",
        " times",
    )


def test_recordings_are_dropped_for_what_is_wrong_with_them(tmp_path, capsys):
    """Missing, under another suffix, without a header, of an unknown kind, in the range of 16-bit integers, punctuation
    alone: each by its name."""
    rows = [
        "wavs/a.wav|s|one bird", "gone.wav|s|one bird", "other.wav|s|one bird", "a.raw|s|one bird", "a.m4a|s|one bird",
        "loud.wav|s|one bird", "wavs/b.wav|s|?!",
    ]
    corpus = corpus_of(tmp_path / "in", "\n".join(rows), "audio|speaker|text", "manifest.csv")
    sf.write(corpus / "other.flac", tone(1, 2), RATE)
    sf.write(corpus / "loud.wav", 32767 * tone(1, 2), RATE, subtype="FLOAT")
    (corpus / "a.raw").write_bytes(bytes(1000))
    (corpus / "a.m4a").write_bytes(b"\0\0\0 ftypM4A " + bytes(1000))
    clips, dropped = prepared(tmp_path, corpus)
    assert list(clips) == ["wavs/a.wav"] and dropped["wavs/b.wav"] == "empty text"
    assert dropped["gone.wav"] == "no such file" and dropped["other.wav"] == "no such file (but one that ends in .flac)"
    assert all("ffmpeg -i FILE FILE.wav" in dropped[name] for name in ("a.raw", "a.m4a"))
    assert "not within -1 and 1" in dropped["loud.wav"] and "recorded at" not in capsys.readouterr().out


def test_silence_is_told_by_what_lasts(tmp_path):
    """An offset is no sound, and neither is a click."""
    corpus = corpus_of(
        tmp_path / "in",
        "wavs/a.wav|s|one\nwavs/b.wav|s|two\noffset.wav|s|three\nclick.wav|s|four\n",
        "audio|speaker|text",
        "manifest.csv",
    )
    click = np.zeros(RATE)
    click[5000] = 0.9
    sf.write(corpus / "offset.wav", np.full(RATE, 0.1), RATE)
    sf.write(corpus / "click.wav", click, RATE)
    assert prepared(tmp_path, corpus)[1] == {"offset.wav": "silent", "click.wav": "silent"}


def test_recordings_of_a_lower_rate_are_said(tmp_path, capsys):
    corpus = corpus_of(tmp_path / "in", "a|one bird\nb|two birds\n")
    sf.write(corpus / "wavs" / "b.wav", tone(1, 0)[::2], 8000)
    prepared(tmp_path, corpus, "--sample-rate", 24000)
    out = capsys.readouterr().out
    assert (
        "1 clips were recorded at 8000 Hz: nothing above 4000 Hz is in them" in out
        and "1 clips were recorded at 16000 Hz" in out
    )


def test_after_all_clips_were_dropped_the_folder_is_taken_again(tmp_path, fails):
    corpus = write_corpus(tmp_path / "in", 3)
    args = ["--out", tmp_path / "out", "--ssl", "none"]
    fails(prepare.main, [corpus, *args, "--min-seconds", "9"], "all 3 clips were dropped")
    prepare.main([str(a) for a in (corpus, *args)])
    assert len(index(tmp_path / "out")) == 3


def test_the_demo_is_not_prepared_by_mistake(world, tmp_path, fails):
    """A mistyped --out, or a forgotten source; and flags that only reading sources needs."""
    for flags in (["--vae", world.vae], ["--ssl", world.ssl], ["--aligner", world.ssl]):
        fails(
            prepare.main, ["--out", tmp_path / "typo", *flags], "typo holds no data to add to, and no source is given"
        )
    assert not (tmp_path / "typo").exists()
    for flags in (["--sample-rate", 24000], ["--text", "raw"]):
        fails(
            prepare.main,
            ["--out", world.data, *flags],
            f"{flags[0]} says how sources are read: name a folder or a manifest",
        )


def test_models_are_looked_for_before_the_audio_is_read(world, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(prepare, "fill_audio", lambda *args: pytest.fail("the audio was read"))
    args = [world.corpus, "--out", tmp_path / "out"]
    fails(prepare.main, [*args, "--ssl", tmp_path / "typo"], "cannot load --ssl", "typo")
    fails(prepare.main, [*args, "--ssl", world.ssl, "--layer", 3], "has the hidden states 0 to 2, no --layer 3")
    fails(prepare.main, [*args, "--ssl", "none", "--aligner", tmp_path / "typo"], "cannot load", "typo")
    fails(prepare.main, [*args, "--ssl", "none", "--vae", tmp_path / "typo"], "no folder", "typo")


def test_texts_with_more_bytes_than_frames_are_left_out(world, tmp_path, capsys, fails):
    """In training, where they would be cut in mid-word; sample.py stretches them, and says so."""
    data = shutil.copytree(world.data, tmp_path / "data")
    lines = [line.split("\t") for line in (data / "index.tsv").read_text().splitlines()]
    many = "नमस्ते दुनिया " * 5  # 190 bytes, for 40 frames
    starts = np.fromfile(data / "starts.bin", "float32")
    meta = json.loads((data / "meta.json").read_text())
    added = len(many.encode()) - len(lines[1][4].encode())
    lines[1][4] = many
    (data / "index.tsv").write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
    np.concatenate([
        np.linspace(0, 0.9, len(many.encode()), dtype="float32"),
        starts[len(many.encode()) - added :],
    ]).tofile(data / "starts.bin")
    meta["starts"]["shape"][0] += added
    (data / "meta.json").write_text(json.dumps(meta))
    train_tts.main(TTS(world, tmp_path / "tts", data=data, steps=1, eval_sentences=0))
    out = capsys.readouterr().out
    assert f"1 clips are skipped: their texts have more bytes than latent frames, the first: {lines[1][0]}" in out
    assert "; 5 clips, " in out
    ref = [
        "--ref", world.corpus / "audio" / "3.wav", "--ref-text", "one small bird sang by the river this morning",
        "--out", tmp_path / "a.wav",
    ]
    sample.main(speak(world, *ref, "--text", "by the river", "--speed", 3))
    assert "1 of 1 pieces have more bytes than frames" in capsys.readouterr().out
    fails(sample.main, speak(world, *ref, "--text", "by the river", "--duration", "0.1"), "--duration 0.1 is too short")


# ---------------------------------------------------------------------------------- speech that is not what was asked


def test_what_is_given_is_used_or_refused(world, tmp_path, fails):
    ref = ["--ref", world.corpus / "audio" / "3.wav"]
    out = ["--out", tmp_path / "a.wav"]
    for text in ("", "!!!", " "):
        fails(sample.main, speak(world, *out, "--text", text), "nothing to say: the text is empty")
    fails(
        sample.main,
        speak(world, *out, *ref, "--ref-text", "", "--text", "bird"),
        "the transcript of the prompt is empty",
    )
    (tmp_path / "said.txt").write_text("by\nthe river")
    fails(
        sample.main,
        speak(world, *out, "--text", "a", "--text-file", tmp_path / "said.txt"),
        "not allowed with argument --text",
    )
    fails(sample.main, speak(world, *out, "--text-file", tmp_path / "absent"), "can't open", "absent")
    fails(
        sample.main, speak(world, *out, *ref, "--text", "bird", "--language", "klingon"), "knows no --language klingon"
    )
    fails(
        sample.main,
        speak(world, *out, *ref, *WORDS, "--duration", 1, "--speed", 2),
        "--duration says how long the result is: drop --speed",
    )
    listed = ["--tts", world.tts, "--list", world.corpus / "test.lst"]
    for flag, value in dict(takes=2, duration=1, text="a", ref="a.wav", asr="other", language="de").items():
        fails(sample.main, [*listed, f"--{flag}", value], f"--{flag} has no use with --list")
    for flag in (["--limit", 1], ["--ref-dir", "."]):
        fails(sample.main, speak(world, *flag), f"{flag[0]} has no use without --list")
    (tmp_path / "a.lst").write_text("audio/0.wav\t1\tone small bird\taudio/2.wav\t1\t!!!\n")
    fails(
        sample.main,
        ["--tts", world.tts, "--list", tmp_path / "a.lst", "--ref-dir", world.corpus, "--out", tmp_path / "said"],
        "nothing to say: the text of audio/2.wav",
    )
    assert not (tmp_path / "said").exists()


def test_speech_is_what_lasts_in_a_prompt():
    """An offset does not hide the silence before it, nor a click in it the speech."""
    quiet = np.concatenate([np.zeros(RATE), 0.05 * tone(2, 0), np.zeros(RATE)]).astype(np.float32)
    click = quiet.copy()
    click[int(2.5 * RATE)] = 1
    for wave in (quiet, quiet + 0.02, click):
        trimmed, _ = sample.check_prompt(wave, "one small bird sang by the river", RATE, 10)
        assert 2 <= len(trimmed) / RATE < 2.3
    silence = np.zeros(2 * RATE, np.float32)
    silence[RATE] = 1
    for wave in (silence, silence + 0.1):
        with pytest.raises(InputError, match="the prompt is silent"):
            sample.check_prompt(wave, "text", RATE, 10)


def test_a_prompts_length_is_checked_before_it_is_transcribed(world, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(sample, "Recognizer", lambda *args: pytest.fail("a recogniser was loaded"))
    sf.write(tmp_path / "long.wav", tone(60, 0), RATE)
    fails(
        sample.main,
        speak(world, "--ref", tmp_path / "long.wav", "--text", "bird", "--out", tmp_path / "a.wav"),
        "the prompt is 60.0 s, limit",
    )


def test_a_list_that_changed_is_neither_kept_nor_scored(world, tmp_path, fails):
    corpus = shutil.copytree(world.corpus, tmp_path / "corpus")
    listed = ["--tts", world.tts, "--list", corpus / "test.lst", "--out", tmp_path / "said", "--steps", "1"]
    sample.main([str(a) for a in (*listed, "--limit", 1)])
    sample.main([str(a) for a in (*listed, "--limit", 2)])  # the same list, further
    lines = (corpus / "test.lst").read_text()
    (corpus / "test.lst").write_text(lines.replace("by the river", "by the mill", 1))
    fails(sample.main, listed, "was made with other settings, texts or prompts", "2.wav")
    more = ["--list", corpus / "test.lst", "--generated", tmp_path / "said", "--limit", 2]
    fails(evaluate.main, scoring(world, tmp_path / "s.csv", *more), "was made from other texts", "the first 2.wav")
    (corpus / "test.lst").write_text(lines)
    os.utime(corpus / "audio" / "0.wav", ns=(1, 1))
    fails(sample.main, listed, "was made with other settings, texts or prompts", "2.wav")


def test_a_line_far_longer_than_the_model_was_trained_on_is_refused(world, tmp_path, fails):
    args = ["--tts", world.tts, "--list", tmp_path / "a.lst", "--ref-dir", world.corpus, "--out", tmp_path / "said"]
    line = "audio/0.wav\t1\tone small bird sang\taudio/2.wav\t1\t"
    (tmp_path / "a.lst").write_text(line + 80 * "by the river " + "\n")
    fails(sample.main, args, "audio/2.wav takes", "the model was trained on at most")
    (tmp_path / "a.lst").write_text(line + 4 * "by the river " + "\n")
    sample.main([str(a) for a in (*args, "--steps", 1)])
    assert (tmp_path / "said" / "2.wav").exists()


@pytest.mark.parametrize(
    "text",
    [
        "ฉันเห็นนกตัวเล็กบินอยู่ริมแม่น้ำเมื่อเช้านี้",
        "我今天早上在河邊看見一隻小鳥在唱歌",
        "けさかわのそばでちいさなとりがうたっているのをみました",
    ],
)
def test_long_texts_without_spaces_are_cut_between_characters(text):
    pieces = sample.split_text(text, 30)
    assert "".join(pieces) == text and len(pieces) > 1 and all(len(p.encode()) <= 30 for p in pieces)
    assert not any(p[0] in sample.MARKS for p in pieces)
    assert sample.split_text(text, 200) == [text]


def test_a_pace_is_of_characters():
    _, notes = sample.check_prompt(tone(3, 0), "我今天早上在河邊看見一隻小鳥在唱歌" * 2, RATE, 10)
    assert not notes  # 11 characters a second, 34 bytes


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, InputError])
def test_an_interrupted_long_text_keeps_what_was_said(trouble, world, tmp_path, monkeypatch, capsys):
    (tmp_path / "long.txt").write_text("By the river. One bird sang. By the small river.\nOne small bird sang.")
    ref = [
        "--ref", world.corpus / "audio" / "3.wav", "--ref-text", "one small bird", "--out", tmp_path / "a.wav",
        "--text-file", tmp_path / "long.txt",
    ]
    synthesize = sample.synthesize
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise trouble
        return synthesize(*args, **options)

    monkeypatch.setattr(sample, "synthesize", interrupted)
    with pytest.raises(trouble):
        sample.main(speak(world, *ref, "--batch-size", 1))
    assert "a.part.wav: the first 1 of " in capsys.readouterr().out
    assert sf.info(tmp_path / "a.part.wav").frames and not (tmp_path / "a.wav").exists()
    sample.main(speak(world, *ref))
    assert sf.info(tmp_path / "a.wav").frames > sf.info(tmp_path / "a.part.wav").frames
    calls.clear()
    with pytest.raises(trouble):
        sample.main(speak(world, *ref, "--takes", 3))
    assert "a.wav: the best of 1 takes" in capsys.readouterr().out


def test_half_a_recording_is_no_recording(tmp_path, capsys):
    """Copies that were cut off; one whose header was written before its length was known is whole."""
    corpus = write_corpus(tmp_path / "in", 4)
    whole = (corpus / "audio" / "1.wav").read_bytes()
    at = whole.index(b"data") + 4
    (corpus / "audio" / "1.wav").write_bytes(whole[: len(whole) // 2])
    whole = (corpus / "audio" / "2.wav").read_bytes()
    (corpus / "audio" / "2.wav").write_bytes(whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :])
    sf.write(tmp_path / "whole.mp3", tone(4, 0), RATE)
    whole = (tmp_path / "whole.mp3").read_bytes()
    (corpus / "audio" / "3.wav").write_bytes(whole[: len(whole) // 2])
    prepare.main([str(corpus), "--out", str(tmp_path / "out"), "--ssl", "none"])
    dropped = (tmp_path / "out" / "dropped.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in dropped] == ["audio/1.wav", "audio/3.wav"]
    assert all("copy it anew" in line for line in dropped)
    assert len(prepare.read_audio(tmp_path / "whole.mp3", RATE)) >= 4 * RATE


def test_signs_that_are_no_letters_are_said_to_be_lost(capsys):
    texts = ["a bird & a river @ 50% + more", "a bird & another"]
    sample.warn_of_unknown(texts, {}, DiTConfig(text="plain"))
    assert capsys.readouterr().out == "the model was taught no signs: % & + @ will not be said; write words for them\n"
    sample.warn_of_unknown(texts, {}, DiTConfig(text="raw"))
    assert not capsys.readouterr().out


def test_a_lists_bad_prompt_is_named(world, tmp_path, fails):
    line = (world.corpus / "test.lst").read_text().splitlines()[0].split("\t")
    sf.write(tmp_path / "long.wav", np.concatenate([tone(1.3, 0)] * 20), RATE)
    (tmp_path / "my.lst").write_text("\t".join(["long", *line[1:]]) + "\n")
    fails(
        sample.main,
        ["--tts", world.tts, "--list", tmp_path / "my.lst", "--out", tmp_path / "said"],
        "long: the prompt is 26.0 s",
    )


def test_the_demos_recogniser_is_not_trusted_with_other_speech(world, tmp_path, capsys):
    ref = ["--tts", world.tts, "--ref", world.corpus / "audio" / "3.wav", "--text", "by the river", "--steps", 1]
    ref += ["--out", tmp_path / "a.wav", "--asr", prepare.DEMO / "ssl", "--takes", 2]
    sample.main([str(a) for a in ref])
    out = capsys.readouterr().out
    assert "the demo's recogniser knows 150 words: if that is wrong" in out and "mean nothing" not in out
    sample.main([str(a) for a in (*ref, "--ref-text", "one small bird", "--text", "by the ox")])
    assert "error rates mean nothing" in capsys.readouterr().out
    data = shutil.copytree(world.data, tmp_path / "data")
    index = data / "index.tsv"
    index.write_text(index.read_text().replace("small", "zebra").replace("river", "zebra").replace("by", "ox"))
    train_tts.main([str(a) for a in ("--data", data, "--out", tmp_path / "tts", *TTS_FLAGS, "--steps", 1)])
    assert "error rates mean nothing" in capsys.readouterr().out


def test_characters_that_no_training_text_had_are_said(world, tmp_path, capsys):
    out = ["--ref", world.corpus / "audio" / "3.wav", "--ref-text", "one small bird", "--out", tmp_path / "a.wav"]
    sample.main(speak(world, *out, "--text", "by the Привет"))
    assert "the training texts had no в е и п р т:" in capsys.readouterr().out
    sample.main(speak(world, *out, "--text", "by the river"))
    assert "the training texts" not in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ scores that mislead


def test_languages_without_spaces_are_scored_by_characters():
    rates = evaluate.error_rates(["我今天看見一隻小鳥"], ["我今天看見一隻 大鳥"])
    assert rates == dict(cer=pytest.approx(1 / 9), wer=2.0)
    record = dict(system="original", utterance="a", sim=0.5, hypothesis="x")
    for reference, first in (("我今天看見一隻小鳥", "CER %"), ("one small bird", "WER %")):
        heading, row = evaluate.make_table(
            ["original"], [record | dict(reference=reference) | evaluate.error_rates([reference], ["x"])]
        )
        assert heading[1] == first and "[" in row[1] and {"CER %", "WER %"} <= set(heading)


def test_the_english_normaliser_is_for_english(world, tmp_path, capsys):
    for language in ("en", "de"):
        evaluate.main(scoring(world, tmp_path / "s.csv", "--limit", 1, "--language", language))
        table = capsys.readouterr().out
        assert ("Whisper-norm. WER %" in table) == (language == "en")
        assert "CER %" in table and "by the demo's own scorers" not in table


def test_an_interrupted_table_in_another_language_is_made_anew(world, tmp_path, monkeypatch):
    score = scoring(world, tmp_path / "s.csv", "--limit", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(evaluate, "write_scores", lambda *_: {}["killed"])
        evaluate.main(score)
    evaluate.main([*score, "--language", "de"])
    records = list(csv.DictReader(open(tmp_path / "s.csv", encoding="utf-8")))
    assert [record["wer_whisper"] for record in records] == ["", ""]  # which English alone has


def test_the_signature_names_the_decoder(world, tmp_path, capsys):
    said = tmp_path / "said"
    listed = ["--tts", world.tts, "--list", world.corpus / "test.lst", "--limit", 1, "--steps", 1, "--out", said]
    sample.main([str(a) for a in listed])
    evaluate.main(scoring(world, tmp_path / "s.csv", "--limit", 1, "--generated", said))
    notes = json.loads((said / "settings.json").read_text())
    assert f" decoder={notes['vae']} " in (out := capsys.readouterr().out) and f" bf16={notes['bf16']}" in out


def test_a_table_by_the_demos_scorers_says_so(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "DEMO", world.root)
    evaluate.main(scoring(world, tmp_path / "s.csv", "--limit", 1))
    assert "by the demo's own scorers: compare nothing but the demo with it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wave, words", [(np.zeros(40), "holds 0.003 s"), (np.zeros(RATE), "is silent"), (np.full(RATE, 0.1), "is silent")]
)
def test_a_recording_that_cannot_be_scored_is_named(wave, words, world, tmp_path, fails):
    corpus = shutil.copytree(world.corpus, tmp_path / "corpus")
    score = scoring(world, tmp_path / "s.csv", "--list", corpus / "test.lst", "--limit", 1)
    for name in ("2.wav", "0.wav"):  # to be scored, and its prompt
        before = (corpus / "audio" / name).read_bytes()
        sf.write(corpus / "audio" / name, wave, RATE)
        fails(evaluate.main, score, name, words)
        (corpus / "audio" / name).write_bytes(before)


# ------------------------------------------------------------------------------------------- numbers and terminals

NUMBERS = {  # flag: values that it cannot have
    prepare: {"batch-seconds": "0 nan inf", "sample-rate": "0 16k", "min-seconds": "0 nan"},
    train_vae: {
        "seed": "-1",
        "lr": "-1 nan",
        "log-every": "0",
        "eval-every": "0",
        "workers": "-1",
        "steps": "-5 0 1e5",
        "crop": "0",
        "ema": "2",
        "micro-batch": "0",
        "eval-clips": "0",
    },
    train_tts: {
        "seed": "-1",
        "lr": "inf",
        "batch-seconds": "0",
        "micro-seconds": "0",
        "join": "0",
        "steps": "-5",
        "sample-steps": "0",
        "keep": "-1",
    },
    sample: {
        "seed": "-1",
        "steps": "0",
        "cfg": "nan",
        "duration": "-2 0 nan",
        "limit": "-1 0",
        "takes": "0",
        "speed": "0 9",
        "batch-size": "0",
    },
    evaluate: {"limit": "-1 0", "batch-size": "0"},
}


@pytest.mark.parametrize("script", NUMBERS, ids=lambda script: script.__name__)
def test_a_number_that_a_flag_cannot_have_is_refused_by_name(script, fails):
    for flag, values in NUMBERS[script].items():
        for value in values.split():
            fails(script.main, [f"--{flag}={value}"], f"argument --{flag}: ", value)


def test_a_terminal_that_is_not_utf8_is_written_to(monkeypatch, tmp_path):
    with open(tmp_path / "terminal", "w", encoding="ascii") as terminal:
        monkeypatch.setattr(prepare.sys, "stdout", terminal)
        monkeypatch.setattr(prepare, "leave", sys.exit)
        with pytest.raises(SystemExit) as caught:
            prepare.cli(lambda: print("größer → 語"))
    assert caught.value.code == 0 and (tmp_path / "terminal").read_text() == "gr\\xf6\\xdfer \\u2192 \\u8a9e\n"


# ------------------------------------------------------------------------------------------------------ what has moved


@pytest.mark.parametrize("train, name", [(train_vae, "vae"), (train_tts, "tts")])
def test_a_finished_run_says_so(train, name, world, tmp_path, fails, capsys):
    run = shutil.copytree(getattr(world, name), tmp_path / name)
    before = (run / "state.pt").read_bytes()
    train.main(["--resume", "--out", str(run)] + (["--vae", str(world.vae)] if name == "tts" else []))
    assert "has made all of its 2 steps: to go on, give more with --steps" in capsys.readouterr().out
    fails(train.main, ["--resume", "--out", run, "--steps", 1], "has made 2 steps, more than --steps 1")
    assert (run / "state.pt").read_bytes() == before and json.loads((run / "args.json").read_text())["steps"] == 2


def test_what_moved_is_named_with_its_flag(world, tmp_path, fails, monkeypatch):
    """Also where no folder runs/ is: a relative path of ours is never asked of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **more: pytest.fail("the hub was asked"))
    tts = shutil.copytree(world.tts, tmp_path / "moved")
    fails(sample.main, ["--tts", tts], "no folder", "if it was moved", "--vae")
    fails(sample.main, ["--tts", "runs/absent"], "no folder runs/absent")
    fails(evaluate.main, ["--list", world.corpus / "test.lst", "--asr", "runs/absent"], "cannot load --asr runs/absent")
    fails(train_tts.main, ["--data", "data/absent", "--out", "a"], "name the folder with --data")
    data = shutil.copytree(world.data, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    name = next(name for name in meta if name.startswith("latents-"))
    (data / "meta.json").write_text(json.dumps(meta | {name: meta[name] | dict(vae="runs/absent")}))
    fails(train_tts.main, ["--data", data, "--out", "b", *TTS_FLAGS], "no folder runs/absent", "--vae")


def test_paths_to_the_demo_survive_a_moved_checkout(tmp_path, monkeypatch):
    (tmp_path / "demo" / "ssl").mkdir(parents=True)
    monkeypatch.setattr(prepare, "DEMO", tmp_path / "demo")
    assert prepare.in_demo("/gone/checkout/demo/ssl") == str(tmp_path / "demo" / "ssl")
    assert (
        prepare.in_demo("/gone/checkout/demo/other") == "/gone/checkout/demo/other"
        and prepare.in_demo(7) == 7
        and prepare.in_demo(None) is None
    )
