"""What a first day on GPUs would meet, tried on CPUs: shares of ranks, several VAEs, changed data, GPUs that cannot be
used, downloads on several nodes, log and states."""

import csv
import errno
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TTS, VAE, rows, torchrun
from safetensors.torch import load_file
from test_faults import ONE, RANKS, ended, start

import prepare
import train_tts
import train_vae
from model import DiT, SemanticVAE, load_torch
from prepare import Data
from train_tts import MicroBatches, Utterances


def test_a_reader_that_goes_away_costs_nothing(world, tmp_path):
    """`train_tts.py 2>&1 | head -1`: the run ends with all its steps, and exit code 0."""
    command = [sys.executable, ROOT / "train_tts.py", *TTS(world, tmp_path / "run", steps=4, eval_every=1)]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0 and [r["step"] for r in rows(tmp_path / "run")] == list("1234")
    assert load_torch(tmp_path / "run" / "state.pt")["step"] == 4


def test_ranks_share_steps_by_frames(world):
    """The paper's step of 0.9 h on 8 GPUs: mean work is at least 97 % of the slowest rank's. No part is empty, none too
    large."""
    rng = np.random.default_rng(0)
    for shortest in (3, 8, 13.6):
        lengths = np.sort(rng.uniform(shortest, 1.18 * shortest, int(3240 / 1.09 / shortest))) * 40
        work = [part.sum() for part in np.split(lengths, MicroBatches.cut(lengths, 8)[1:-1])]
        assert np.mean(work) / max(work) > 0.97
    for utterances in (8, 9, 24):
        bounds = MicroBatches.cut(np.sort(rng.exponential(400, utterances)), 8)
        assert bounds[0] == 0 and bounds[-1] == utterances and min(np.diff(bounds)) >= 1
    examples = Utterances(Data(world.data, ("latents",)), "train", 6, 1, seed=1)
    micro = MicroBatches(examples, 3, 0, 1)
    padded = [
        len(part) * max(examples.frames[i] for run in part for i in run)
        for step in range(9)
        for part in micro.parts(step)
    ]
    assert max(padded) <= 3 * examples.rate


def test_a_folder_keeps_the_latents_of_several_vaes(world, tmp_path, fails):
    """Beside each other: the newest is the default, --vae names another, and --resume keeps to its own."""
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    train_vae.main(VAE(world, tmp_path / "other", seed=5))
    first, other = (SemanticVAE.from_pretrained(run).latents_hash() for run in (world.vae, tmp_path / "other"))
    assert Data(data, ("latents",)).meta["latents"]["vae_hash"] == first
    prepare.main(["--out", str(data), "--vae", str(tmp_path / "other")])
    before = {path.name: path.read_bytes() for path in data.glob("latents-*")}
    assert len(before) == 2 and Data(data, ("latents",)).meta["latents"]["vae_hash"] == other
    for name, more, expected in (("newest", [], other), ("named", ["--vae", str(world.vae)], first)):
        out = tmp_path / name
        train_tts.main([*TTS(world, out, data=data), *more])
        assert DiT.from_pretrained(out).config.vae_hash == expected
    prepare.main(["--out", str(data), "--vae", str(world.vae)])  # the first is the newest again, and is not made again
    train_tts.main(["--resume", "--out", str(tmp_path / "newest"), "--steps", "3"])
    assert DiT.from_pretrained(tmp_path / "newest").config.vae_hash == other
    assert before == {path.name: path.read_bytes() for path in data.glob("latents-*")}
    train_vae.main(VAE(world, tmp_path / "third", seed=6))
    fails(
        train_tts.main,
        [*TTS(world, tmp_path / "none", data=data), "--vae", tmp_path / "third"],
        "holds no latents",
        "--vae",
    )


def changed_text(data):
    index = (data / "index.tsv").read_text(encoding="utf-8")
    (data / "index.tsv").write_text(index.replace("bird", "wird"), encoding="utf-8")


def changed_meta(array, **values):
    def change(data):
        meta = json.loads((data / "meta.json").read_text())
        name = next(name for name in meta if name.startswith(array))
        (data / "meta.json").write_text(json.dumps(meta | {name: meta[name] | values}))

    return change


@pytest.mark.parametrize(
    "train, args, change, word",
    [
        (train_vae, VAE, changed_text, "data"),
        (train_tts, TTS, changed_text, "data"),
        (train_vae, VAE, changed_meta("ssl", revision="another"), "teacher"),
        (train_tts, TTS, changed_meta("latents", std=[2.0] * 32), "statistics"),
        (train_tts, TTS, changed_meta("starts", revision="another"), "aligner"),
    ],
)
def test_a_run_is_not_resumed_on_other_data(train, args, change, word, world, tmp_path, fails):
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    train.main(args(world, tmp_path / "run", data=data))
    change(data)
    fails(
        train.main,
        ["--resume", "--out", tmp_path / "run", "--steps", 4],
        f"learned with {word} ",
        "give the --data of before",
    )


@pytest.mark.parametrize("train, args, made", [(train_vae, VAE, "vae"), (train_tts, TTS, "tts")])
def test_a_run_goes_on_without_what_it_began_with(train, args, made, world, tmp_path):
    shutil.copytree(getattr(world, made), tmp_path / "init")
    more = ["--vae", str(world.vae)] if made == "tts" else []
    train.main([*args(world, tmp_path / "run"), "--init", str(tmp_path / "init"), *more])
    shutil.rmtree(tmp_path / "init")
    train.main(["--resume", "--out", str(tmp_path / "run"), "--steps", "3"])
    assert [r["step"] for r in rows(tmp_path / "run")] == list("123")


def test_a_log_with_half_a_line_resumes(world, tmp_path):
    train_tts.main(TTS(world, tmp_path))
    with open(tmp_path / "log.csv", "a", encoding="utf-8") as log:
        log.write("3,0.7")
    train_tts.main(["--resume", "--out", str(tmp_path), "--steps", "3"])
    assert [r["step"] for r in rows(tmp_path)] == list("123")


def test_whole_states_are_kept_and_go_on(world, tmp_path):
    """--keep 2: a run that went wrong goes on from an earlier checkpoint, to the same weights as a straight one."""
    train_vae.main(VAE(world, tmp_path, steps=6, eval_every=2, keep=2, log_every=1))
    kept = sorted(path.name for path in tmp_path.glob("step*"))
    assert kept == ["step0000004", "step0000006"]
    train_vae.main(["--resume", "--out", str(tmp_path / "step0000004")])
    a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "step0000004"))
    assert all(torch.equal(a[k], b[k]) for k in a) and len(rows(tmp_path / "step0000004")) == 6


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(code, tmp_path, monkeypatch, capsys):
    def no_locks(*args):
        raise OSError(code, "planted")

    monkeypatch.setattr(prepare.fcntl, "lockf", no_locks)
    prepare.lock(tmp_path)
    assert "has no locks" in capsys.readouterr().out


def test_a_gpu_that_cannot_be_used_is_said(tmp_path, monkeypatch, fails, world):
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.1\n")
    monkeypatch.setattr(prepare, "NVIDIA_DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    fails(train_vae.main, VAE(world, tmp_path / "run"), "cannot use", "(13 needs driver 580)", "535.1", "--device cpu")
    train_vae.main([*VAE(world, tmp_path / "run"), "--device", "cpu"])
    for hidden in ("-1", ""):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert prepare.start_ranks()[2].type == "cpu" and not torch.backends.cudnn.allow_tf32
    fails(train_tts.main, [*TTS(world, tmp_path / "tts"), "--device", "cuda"], "finds no GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert not prepare.has_bfloat16()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    fails(train_tts.main, TTS(world, tmp_path / "tts"), "rank 1 has no GPU: found 1")


@pytest.mark.parametrize("train, args", [(train_vae, VAE), (train_tts, TTS)])
def test_presets_are_named_for_other_data_and_for_cpus(train, args, world, tmp_path, fails):
    plain = args(world, tmp_path / "run")
    fails(
        train.main,
        [a for a in plain if a not in ("--preset", "demo")],
        "is not the demo's: choose a --preset: demo, small, paper",
    )
    for preset in ("small", "paper"):
        fails(
            train.main,
            [preset if a == "demo" else a for a in plain],
            f"--preset {preset} is made for GPUs",
            "--device cpu",
        )


def test_a_warmup_that_never_ends_is_refused(world, tmp_path, fails):
    fails(train_tts.main, TTS(world, tmp_path / "run", warmup=2), "--steps 2 ends within the --warmup of 2 steps")


def test_micro_batches_are_the_largest_divisors_of_the_share():
    numbers = train_vae.CropNumbers(64, 0, 64, 7, 0, 8)
    assert [len(part) for part in numbers.parts(0)] == [4, 4]
    assert [len(p) for p in train_vae.CropNumbers(12, 0, 12, 7, 0, 1).parts(0)] == [6, 6]


def test_a_constant_latent_channel_is_named_and_kept(world, tmp_path, capsys):
    vae = SemanticVAE.from_pretrained(world.vae)
    with torch.no_grad():
        vae.fc_mu.weight[3] = 0
        vae.fc_var.weight[3] = 0
        vae.fc_var.bias[3] = -99
    vae.save_pretrained(tmp_path / "vae")
    shutil.copytree(world.data, tmp_path / "data")
    posterior = SemanticVAE.posterior

    def without_noise(self, x):
        mean, logvar = posterior(self, x)
        logvar[..., 3] = -99
        return mean, logvar

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SemanticVAE, "posterior", without_noise)
        prepare.main(["--out", str(tmp_path / "data"), "--vae", str(tmp_path / "vae")])
    assert "latent channels [3] of " in capsys.readouterr().out
    assert Data(tmp_path / "data", ("latents",)).meta["latents"]["std"][3] == 1


def test_validation_is_spread_over_speakers(world):
    data = Data(world.data)
    assert {data.clips[i]["speaker"] for i in data.spread(data.split("valid"), 2)} == {"s0", "s1"}
    assert sorted(data.spread(data.split("valid"), 99)) == data.split("valid")


def test_streams_of_random_numbers_differ_by_purpose():
    same = [np.random.default_rng(seed).random() for seed in ([5, 1], [5, 1, 0])]
    assert same[0] == same[1]  # why purposes stand first
    assert prepare.ORDER != prepare.DRAWS and min(prepare.ORDER, prepare.DRAWS) > 0


@pytest.mark.parametrize("shared", [True, False])
def test_downloads_happen_once_a_node(shared, world, tmp_path, monkeypatch):
    """Of two nodes with one rank each, run one after the other: the first downloads; the second if it has a disk of its
    own."""
    fetched = []
    calls = []
    for rank in (0, 1):
        folder = tmp_path / ("shared" if shared else str(rank))

        def fetch(subsets, folder=folder):
            calls.append("fetch")
            if not folder.exists():
                shutil.copytree(world.corpus, folder)
                fetched.append(folder)
            return [folder]

        monkeypatch.setattr(prepare, "download", fetch)
        monkeypatch.setattr(prepare, "barrier", lambda: calls.append("barrier"))
        monkeypatch.setattr(prepare, "start_ranks", lambda rank=rank: (rank, 2, torch.device("cpu")))
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setattr(prepare, "list_clips", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare.main(["--download", "x", "--out", str(tmp_path / "data"), "--ssl", "none"])
    first = ["fetch", "barrier", "barrier"]
    second = ["barrier", "fetch", "barrier"]
    assert calls == first + second and len(fetched) == (1 if shared else 2)


def test_ranks_download_one_after_the_other(world, tmp_path, monkeypatch):
    """What is there already is found by every rank."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.corpus, tmp_path / "downloads" / "LibriTTS" / "dev-clean")
    said = torchrun("prepare.py", "--download", "dev-clean", "--out", tmp_path / "data", "--ssl", "none")
    assert "9 clips" in said


def test_what_all_ranks_find_is_said_once(tmp_path):
    command = [*RANKS, ROOT / "train_tts.py", "--data", tmp_path / "nothing", "--out", tmp_path / "run"]
    code, _, error = ended(start(*command))
    assert code != 0 and error.count("error: ") == 1, error[-2000:]


def test_the_log_tells_pace(world, tmp_path, capsys):
    train_tts.main(TTS(world, tmp_path))
    assert "about 8 s a step, 1 steps an epoch" in capsys.readouterr().out  # of the speech there is, not of 6 s
    assert all(float(r["audio"]) > 0 and r["memory"] == r["mfu"] == "" for r in rows(tmp_path))
    assert list(csv.reader(open(tmp_path / "log.csv")))[0][-4:] == ["seconds", "audio", "memory", "mfu"]
