"""What goes wrong from outside: signals, a second run in the folder, a rank that fails, a full disk, a bomb.
tests/torture.py has more."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TTS, VAE, rows, scoring, torchrun
from safetensors.torch import load_file

import evaluate
import prepare
import sample
import train_tts
import train_vae
from model import DiT, InputError, SemanticVAE, load_torch
from prepare import Data

RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*command, **options):
    return subprocess.Popen(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE, **options
    )


def ended(process, seconds: float = 120):
    try:
        out, error = process.communicate(timeout=seconds)
    finally:
        process.kill()  # one that did not end would slow down all other tests
    return process.returncode, out, error


@pytest.mark.parametrize(
    "python, script, args, number",
    [
        ([sys.executable], "train_vae.py", VAE, signal.SIGTERM),
        ([sys.executable], "train_tts.py", TTS, signal.SIGINT),
        ([sys.executable], "train_tts.py", TTS, signal.SIGHUP),
        (RANKS, "train_tts.py", TTS, signal.SIGTERM),
    ],
)
def test_a_signal_saves_the_step_and_says_how_to_go_on(python, script, args, number, world, tmp_path):
    """Sent to the whole process group, as schedulers and terminals do, loader processes among it; and SIGTERM twice,
    since torchrun passes on to its ranks what they have heard already."""
    out = tmp_path / "run"
    process = start(
        *python, ROOT / script, *args(world, out, steps=10_000, eval_every=10_000, log_every=1, workers=2),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # under nohup it would be ignored
    )
    deadline = time.time() + 90
    while (
        process.poll() is None and time.time() < deadline and not ((out / "log.csv").exists() and len(rows(out)) >= 2)
    ):
        time.sleep(0.1)
    for _ in range(2 if number == signal.SIGTERM else 1):
        os.killpg(process.pid, number)
    code, text, error = ended(process)
    step = load_torch(out / "state.pt")["step"]
    assert step >= 2, error[-2000:]
    assert f"stopped at step {step}, which is saved: go on with --resume --out {out}" in text, error[-2000:]
    assert "DataLoader worker" not in error and (code == 128 + number if python != RANKS else code != 0)
    assert [int(r["step"]) for r in rows(out)] == list(range(1, step + 1))
    train = train_vae if script == "train_vae.py" else train_tts
    train.main(["--resume", "--out", str(out), "--steps", str(step + 1), "--workers", "0"])
    assert [int(r["step"]) for r in rows(out)] == list(range(1, step + 2))


def test_other_scripts_end_with_one_line(world, tmp_path):
    process = start(
        sys.executable, ROOT / "sample.py", "--tts", world.tts, "--list", world.corpus / "test.lst",
        "--out", tmp_path / "out", "--steps", "100000",
    )
    while process.poll() is None and not (tmp_path / "out" / "settings.json").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, _, error = ended(process)
    assert code == 143 and "interrupted: run the command again" in error and "Traceback" not in error


def test_a_second_run_in_a_folder_is_refused_until_the_first_has_ended(world, tmp_path, fails):
    commands = [
        (train_vae.main, VAE(world, tmp_path / "vae")),
        (train_tts.main, TTS(world, tmp_path / "tts")),
        (evaluate.main, scoring(world, tmp_path / "score.csv")),
        (prepare.main, [world.corpus, "--out", tmp_path / "data", "--ssl", world.ssl, "--text", "plain"]),
        (
            sample.main,
            ["--tts", world.tts, "--list", world.corpus / "test.lst", "--out", tmp_path / "said", "--steps", "1"],
        ),
    ]
    folders = [str(tmp_path / name) for name in ("vae", "tts", "data", "said", "score.csv.work")]
    code = (
        "import sys, pathlib, prepare; held = [prepare.lock(pathlib.Path(f)) for f in sys.argv[1:]]; "
        "print('held', flush=True); sys.stdin.read()"
    )
    owner = start(sys.executable, "-c", code, *folders, stdin=subprocess.PIPE)
    assert owner.stdout.readline() == "held\n"
    for main, args in commands:
        fails(main, args, f"is in use by process {owner.pid} on ", "since 20", "choose another --out")
    owner.kill()  # leaves the files, whose locks are stale
    owner.wait()
    for main, args in commands:
        main([str(a) for a in args])


def test_a_rank_that_fails_ends_the_job_with_its_own_traceback(world, tmp_path):
    (tmp_path / "fails.py").write_text("""
import os, time, prepare, train_vae
prepare.dist.destroy_process_group = lambda: time.sleep(1000)  # as NCCL does, while other ranks wait for this one
step = train_vae.update_ema
def update_ema(*args):
    if os.environ["RANK"] == "1":
        raise RuntimeError("planted in rank 1")
    step(*args)
train_vae.update_ema = update_ema
prepare.cli(train_vae.main)
""")
    process = start(*RANKS, tmp_path / "fails.py", *VAE(world, tmp_path / "out", steps=10_000))
    begun = time.time()
    code, _, error = ended(process)
    assert code != 0 and "RuntimeError: planted in rank 1" in error and time.time() - begun < 60


@pytest.mark.parametrize(
    "train, args, changes, bf16, near",
    [
        (train_vae, VAE, dict(micro_batch=2, adv_start=0, workers=2), "--no-bf16", 2e-4),
        (train_tts, TTS, dict(micro_seconds=1.6, workers=2, warmup=1), "--bf16", 1e-5),
    ],
)
def test_any_number_of_ranks_resumes(train, args, changes, bf16, near, world, tmp_path):
    """Two ranks stopped half-way and resumed: by two bit for bit what they make without a stop, by one, of the
    same micro-batches, to a quarter of an update."""
    script = Path(train.__file__).name

    def run(name, steps):
        return torchrun(script, *args(world, tmp_path / name, steps=steps, eval_every=2, **changes), bf16)

    run("straight", 4)
    run("two", 2)
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    torchrun(script, "--resume", "--out", tmp_path / "two", "--steps", 4)
    train.main(["--resume", "--out", str(tmp_path / "one"), "--steps", "4"])
    straight, two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "two", "one"))
    assert all(torch.equal(straight[k], two[k]) for k in straight)
    assert all(torch.allclose(straight[k], one[k], rtol=0, atol=near) for k in straight)
    assert [r["loss"] for r in rows(tmp_path / "two")] == [r["loss"] for r in rows(tmp_path / "straight")]


def test_a_full_disk_costs_nothing_that_was_there(world, tmp_path, fails):
    out = tmp_path / "vae"
    shutil.copytree(world.vae, out)
    before = {name: (out / name).read_bytes() for name in ("state.pt", "log.csv")}
    # bytes a file: enough for the weights, not for the optimisers' state
    limit = (out / "model.safetensors").stat().st_size + 50_000
    assert limit < len(before["state.pt"])
    process = start(
        sys.executable, ROOT / "train_vae.py", "--resume", "--out", out, "--steps", 4,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    code, _, error = ended(process)
    assert code == 2 and "error: cannot write" in error and "state.pt" in error, error[-2000:]
    assert "Traceback" not in error, error[-2000:]
    assert (out / "state.pt").read_bytes() == before["state.pt"] and not list(out.glob("*.tmp"))
    SemanticVAE.from_pretrained(out)
    train_vae.main(["--resume", "--out", str(out), "--steps", "4"])
    assert [r["step"] for r in rows(out)] == list("1234")
    fails(train_vae.main, VAE(world, Path("/proc/nowhere")), "cannot write in /proc/nowhere")
    # Arrays are written in place, not by write_atomic(): that must stop as cleanly.
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "ssl"}))
    limit = (data / "ssl.bin").stat().st_size - 1
    code, _, error = ended(
        start(
            sys.executable, ROOT / "prepare.py", "--out", data,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
    )
    assert code == 2 and "error: cannot write" in error and "Traceback" not in error, error[-2000:]
    prepare.main(["--out", str(data)])
    assert json.loads((data / "meta.json").read_text())["ssl"] == meta["ssl"] and Data(data, ("ssl", "latents"))


def test_a_file_that_would_unfold_to_any_size_is_not_unfolded(tmp_path):
    torch.save(dict(step=1, x=torch.zeros(1_000_000)), tmp_path / "plain.pt")
    assert load_torch(tmp_path / "plain.pt")["step"] == 1
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert (tmp_path / "bomb.pt").stat().st_size < 20_000
    with pytest.raises(InputError, match="compressed"):
        load_torch(tmp_path / "bomb.pt")


def test_out_of_memory_names_the_flag(world, tmp_path, monkeypatch, fails):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(train_vae, "update_ema", full)
    fails(train_vae.main, VAE(world, tmp_path / "vae"), "out of memory", "--micro-batch", "20.00 GiB")


def test_kept_averages_are_whole_runs(world, tmp_path):
    train_vae.main([*VAE(world, tmp_path / "vae", steps=3, eval_every=1, adv_weight=0, eval_clips=1), "--keep", "2"])
    train_tts.main([*TTS(world, tmp_path / "tts", steps=3, eval_every=1, eval_sentences=0), "--keep", "2"])
    for run, kept in (("vae", [2, 3]), ("tts", [2, 3])):
        assert sorted(p.name for p in (tmp_path / run).glob("step*")) == [f"step{k:07d}" for k in kept]
    assert json.loads((tmp_path / "vae" / "step0000002" / "config.json").read_text())["step"] == 2
    a, b = (load_file(tmp_path / "vae" / name / "model.safetensors") for name in ("step0000003", "."))
    assert all(torch.equal(a[k], b[k]) for k in a)
    # finds its VAE from there
    dit, vae, _ = sample.load(str(tmp_path / "tts" / "step0000003"), None, torch.device("cpu"))
    assert isinstance(dit, DiT) and vae.config.latent_dim == dit.config.latent_dim
