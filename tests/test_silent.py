"""Nothing silent: what a user gives is used or refused by name, what a user made is never written over, and no wrong result ends with exit code 0."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from conftest import RATE, tone, write_corpus

import evaluate
import prepare
import sample
import train_tts
import train_vae
from prepare import Data

# ------------------------------------------------------------------------------------------ the user's own files


def index(out: Path) -> list[dict]:
    return Data(out).clips


def test_scratch_space_holds_only_what_we_made(tmp_path):
    """A folder work/ or partial/ of the user's, and one whose name only resembles that of kept weights, are left alone."""
    for folder in ("work", "partial", "step-backup"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "thesis.txt").write_text("years")
    prepare.main([str(write_corpus(tmp_path / "in", 3)), "--out", str(tmp_path), "--ssl", "none"])
    assert (tmp_path / "work" / "thesis.txt").exists() and not (tmp_path / prepare.WORK).exists()

    class Model:
        def save_pretrained(self, folder, **notes):
            Path(folder).mkdir(exist_ok=True)

    train_vae.save_run(tmp_path, 2, Model(), {}, {}, {}, keep=1)
    assert (tmp_path / "step-backup" / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.glob("step0*")) == ["step0000002"]


def test_a_folder_that_we_did_not_begin_is_refused(tmp_path, fails):
    corpus = write_corpus(tmp_path / "in", 3)
    for name in ("index.tsv", "meta.json"):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text("{}")
        fails(prepare.main, [corpus, "--out", tmp_path / "mine", "--ssl", "none"], f"holds a {name}, but no settings.json")
        assert (tmp_path / "mine" / name).read_text() == "{}"
        (tmp_path / "mine" / name).unlink()


# --------------------------------------------------------------------------------------------- data change meaning


def prepared(tmp_path, source, *flags, out="out"):
    """Its clips by id, and the reasons of those that were dropped."""
    prepare.main([str(source), "--out", str(tmp_path / out), "--ssl", "none", *map(str, flags)])
    dropped = [line.split("\t") for line in (tmp_path / out / "dropped.tsv").read_text(encoding="utf-8").split("\n")[:-1]]
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
    fails(prepare.main, args, "was made with other settings or recordings", "gone.wav" if change == put_one_back else "audio/0.wav", "choose another --out")


def test_a_teacher_whose_weights_changed_is_refused(world, tmp_path, fails):
    teacher = shutil.copytree(world.ssl, tmp_path / "ssl")
    prepare.main([str(write_corpus(tmp_path / "in", 3)), "--out", str(tmp_path / "out"), "--ssl", str(teacher)])
    with open(teacher / "model.safetensors", "ab") as f:
        f.write(b"more")
    fails(prepare.main, ["--out", tmp_path / "out"], "holds other weights")


@pytest.mark.parametrize("third", ["1.5", "17", "p225"])
def test_a_third_column_that_is_no_reading_of_the_second_is_refused(third, tmp_path, fails):
    corpus = corpus_of(tmp_path / "in", f"a|One small bird.|{third}\nb|By the river.|{third}\n")
    fails(prepare.main, [corpus, "--out", tmp_path / "out", "--ssl", "none"], "is not name|text", "One small bird.", "awk -F'|'")


def test_an_empty_third_column_leaves_the_second(tmp_path):
    clips, _ = prepared(tmp_path, corpus_of(tmp_path / "in", "a|One small bird.|\nb|In 1984.|in nineteen eighty four\n"))
    assert [c["text"] for c in clips.values()] == ["One small bird.", "in nineteen eighty four"]


@pytest.mark.parametrize("header, table, name", [
    ("file_name,transcription", 'wavs/a.wav,"One small, bird."\nwavs/b.wav,By the river.\n', "metadata.csv"),  # Hugging Face
    ("audio_file|text", "wavs/a.wav|One small, bird.\nwavs/b.wav|By the river.\n", "metadata.csv"),  # F5-TTS
    ("audio_file|text|speaker_name", "wavs/a.wav|One small, bird.|ann\nwavs/b.wav|By the river.|ann\n", "metadata.csv"),  # Coqui
    ("speaker\taudio\ttext", "ann\twavs/a.wav\tOne small, bird.\nann\twavs/b.wav\tBy the river.\n", "manifest.csv"),
])  # fmt: skip
def test_tables_are_read_by_their_header(header, table, name, tmp_path, capsys):
    clips, dropped = prepared(tmp_path, corpus_of(tmp_path / "in", table, header, name))
    assert [c["text"] for c in clips.values()] == ["One small, bird.", "By the river."] and not dropped
    named = "speaker" in header
    assert [c["speaker"] for c in clips.values()] == (["ann", "ann"] if named else ["wavs/a.wav", "wavs/b.wav"])
    assert ("2 clips name no speaker" in capsys.readouterr().out) is not named


def test_a_table_without_a_header_is_refused_with_what_converts_it(tmp_path, fails):
    table = tmp_path / "meta.lst"
    table.write_text("a|one small bird|wavs/b.wav|by the river\n")
    fails(prepare.main, [table, "--out", tmp_path / "out", "--ssl", "none"], "has no columns audio and text", "awk -F'|'")
    fails(sample.main, ["--list", table], "six tab-separated columns", "awk -F'|'")


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    odd = "\u2028", "\x85", "\x0c", "\r"
    text = "one" + "".join(f"{c}small" for c in odd)
    for layout in ("ljspeech", "manifest", "librispeech"):
        corpus = corpus_of(tmp_path / layout, f"a|{text}\r\nb|bird\r\n")
        if layout == "manifest":
            (corpus / "manifest.csv").write_bytes(f"audio|speaker|text|split\r\nwavs/a.wav|s|{text}|train\r\nwavs/b.wav|s|bird|train\r\n".encode())
        if layout == "librispeech":
            sf.write(corpus / "wavs" / "a.flac", tone(1, 0), RATE)
            (corpus / "wavs" / "s.trans.txt").write_bytes(f"a {text}\n".encode())
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
    corpus = corpus_of(tmp_path / "in", f"wavs/a.wav|s|one bird\n{again}|s|one bird\n", "audio|speaker|text", "manifest.csv")
    (corpus / "link.wav").symlink_to(corpus / "wavs" / "a.wav")
    fails(prepare.main, [corpus, "--out", tmp_path / "out", "--ssl", "none"], "are one recording", "wavs/a.wav", again)
    fails(prepare.main, [corpus / "manifest.csv", corpus, "--out", tmp_path / "out", "--ssl", "none"], "are one recording")


def test_recordings_are_dropped_for_what_is_wrong_with_them(tmp_path, capsys):
    """Missing, under another suffix, without a header, of an unknown kind, in the range of 16-bit integers, punctuation alone: each by its name."""
    rows = ["wavs/a.wav|s|one bird", "gone.wav|s|one bird", "other.wav|s|one bird", "a.raw|s|one bird", "a.m4a|s|one bird", "loud.wav|s|one bird", "wavs/b.wav|s|?!"]
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
    corpus = corpus_of(tmp_path / "in", "wavs/a.wav|s|one\nwavs/b.wav|s|two\noffset.wav|s|three\nclick.wav|s|four\n", "audio|speaker|text", "manifest.csv")
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
    assert "1 clips were recorded at 8000 Hz: nothing above 4000 Hz is in them" in out and "1 clips were recorded at 16000 Hz" in out


def test_after_all_clips_were_dropped_the_folder_is_taken_again(tmp_path, fails):
    corpus, args = write_corpus(tmp_path / "in", 3), ["--out", tmp_path / "out", "--ssl", "none"]
    fails(prepare.main, [corpus, *args, "--min-seconds", "9"], "all 3 clips were dropped")
    prepare.main([str(a) for a in (corpus, *args)])
    assert len(index(tmp_path / "out")) == 3


def test_the_demo_is_not_prepared_by_mistake(world, tmp_path, fails):
    """A mistyped --out, or a forgotten source; and flags that only reading sources needs."""
    for flags in (["--vae", world.vae], ["--ssl", world.ssl], ["--aligner", world.ssl]):
        fails(prepare.main, ["--out", tmp_path / "typo", *flags], "typo holds no data to add to, and no source is given")
    assert not (tmp_path / "typo").exists()
    for flags in (["--sample-rate", 24000], ["--text", "raw"], ["--valid", 0.2]):
        fails(prepare.main, ["--out", world.data, *flags], f"{flags[0]} says how sources are read, and none is given")


def test_models_are_looked_for_before_the_audio_is_read(world, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(prepare, "fill_audio", lambda *args: pytest.fail("the audio was read"))
    args = [world.corpus, "--out", tmp_path / "out"]
    fails(prepare.main, [*args, "--ssl", tmp_path / "typo"], "cannot load the SSL model", "typo")
    fails(prepare.main, [*args, "--ssl", "none", "--aligner", tmp_path / "typo"], "cannot load", "typo")
    fails(prepare.main, [*args, "--ssl", "none", "--vae", tmp_path / "typo"], "no folder", "typo")


def test_splits_of_a_manifest_are_not_overruled(tmp_path, fails):
    fails(prepare.main, [write_corpus(tmp_path / "in", 3), "--out", tmp_path / "out", "--ssl", "none", "--valid", "0.3"], "--valid is for sources that name no splits")


# ------------------------------------------------------------------------------------------- numbers and terminals

NUMBERS = {  # flag: values that it cannot have
    prepare: {"workers": "0 -1", "chunk": "0", "batch-seconds": "0 nan inf", "sample-rate": "0 16k", "valid": "5 -0.1", "min-seconds": "0 nan"},
    train_vae: {"seed": "-1", "lr": "-1 nan", "log-every": "0", "eval-every": "0", "workers": "-1", "steps": "-5 0 1e5", "crop": "0", "ema": "2", "micro-batch": "0", "eval-clips": "0"},
    train_tts: {"seed": "-1", "lr": "inf", "batch-seconds": "0", "micro-seconds": "0", "join": "0", "steps": "-5", "sample-steps": "0", "keep": "-1", "clip": "0"},
    sample: {"seed": "-1", "steps": "0", "cfg": "nan", "duration": "-2 0 nan", "limit": "-1 0", "takes": "0", "speed": "0 9", "cfg-until": "2", "batch-size": "0"},
    evaluate: {"limit": "-1 0", "report-clips": "-1"},
}


@pytest.mark.parametrize("script", NUMBERS, ids=lambda script: script.__name__)
def test_a_number_that_a_flag_cannot_have_is_refused_by_name(script, fails):
    for flag, values in NUMBERS[script].items():
        for value in values.split():
            fails(script.main, [f"--{flag}={value}"], f"argument --{flag}: ", value)


def test_a_terminal_that_is_not_utf8_is_written_to(monkeypatch, tmp_path):
    with open(tmp_path / "terminal", "w", encoding="ascii") as terminal:
        monkeypatch.setattr(prepare.sys, "stdout", terminal)
        with pytest.raises(SystemExit) as caught:
            prepare.cli(lambda: print("größer → 語"))
    assert caught.value.code == 0 and (tmp_path / "terminal").read_text() == "gr\\xf6\\xdfer \\u2192 \\u8a9e\n"
