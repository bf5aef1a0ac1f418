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
