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
    for folder in ("work", "partial", "step-backup", "step0000001"):
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
