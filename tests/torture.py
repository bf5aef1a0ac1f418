"""What long trainings and strangers' files do to the scripts: python tests/torture.py [kill fuzz] [--seed 0]

kill: prepare, both trainings, sample --list and evaluate are killed (SIGKILL) at random moments, again and again, and
      started anew each time; after every kill all that lies in the folder must load, and in the end it must equal what
      a run without kills made.
fuzz: thousands of damaged recordings, manifests, lists, checkpoints, data folders and texts: each gives a result or
      the one clean error, never another exception, a crash, a hang, or a file name outside the output folder.

Not a test: pytest does not collect it (some seven minutes). Prints what was tried; exits with 1 if anything was
lost."""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import soundfile as sf
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
from conftest import RATE, TIMES, TTS_FLAGS, VAE_FLAGS, World, flags, rows, tone

import evaluate
import prepare
import sample
import train_tts
import train_vae
from model import DiT, DiTConfig, InputError, SemanticVAE, VAEConfig, load_torch

torch.set_num_threads(1)


def fork(work, log: Path) -> int:
    """Run work() in a process of its own; its pid. Its exit code: 0, 2 for an InputError, 1 for any other exception."""
    pid = os.fork()
    if pid:
        return pid
    with open(log, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    try:
        work()
        code = 0
    except InputError as e:
        print(f"error: {e}", flush=True)
        code = 2
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pid: int, log: Path) -> None:
    _, status = os.waitpid(pid, 0)
    if status:
        sys.exit(f"a command that nobody killed failed ({status}):\n{log.read_text()[-3000:]}")


# --------------------------------------------------------------------------------------------------------------
# Kills.


def without_seconds(folder: Path) -> list:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(folder)]


def trained(kind):
    """(what must load after a kill, what must be equal at the end) of a run folder."""

    def loads(out: Path, final: Path) -> None:
        if (out / "state.pt").exists():
            step = load_torch(out / "state.pt")["step"]
            assert [int(r["step"]) for r in without_seconds(out)][:step] == list(range(1, step + 1)), "rows are missing"
            kind.from_pretrained(out)

    def result(out: Path):
        return (out / "model.safetensors").read_bytes(), without_seconds(out)

    return loads, result


def prepared_loads(out: Path, final: Path) -> None:
    if (out / "meta.json").exists():
        there = {name.partition("-")[0] for name in json.loads((out / "meta.json").read_text())}
        prepare.Data(out, tuple({"audio", "ssl", "latents"} & there))


def prepared(out: Path):
    return [
        (out / name).read_bytes()
        for name in ("index.tsv", "audio.bin", "ssl.bin", next(out.glob("latents-*.bin")).name, "dropped.tsv")
    ]


def waves_are_whole(out: Path, final: Path) -> None:
    assert all(p.read_bytes() == (final / p.name).read_bytes() for p in out.glob("*.wav")), "a wav differs"


def scores_are_whole(out: Path, final: Path) -> None:
    table = out / "s.csv"
    assert not table.exists() or table.read_bytes() == (final / "s.csv").read_bytes(), "scores differ"


def kill(root: Path, rng: random.Random, kills: int = 14) -> int:
    """`kills` kills of each command; how many things were lost."""
    log = root / "log"
    prepare.CHUNK = 1  # the corpus is small
    wait(fork(lambda: World(root), log), log)
    world = World.__new__(World)  # its folders, made by the child: this process must start no threads before it forks
    for name in ("corpus", "ssl", "sv", "data", "vae", "tts"):
        setattr(world, name, root / name)

    long = dict(steps=10, eval_every=2, log_every=1)
    lines = [
        f"audio/{a}.wav\t1\tone small bird sang\taudio/{b}.wav\t1\tby the river"
        for a, b in ((i % 5, i) for i in range(9))
    ]
    (root / "corpus" / "all.lst").write_text("\n".join(lines) + "\n")
    everything = ["--list", str(root / "corpus" / "all.lst")]
    commands = {  # name: script, flags, how --out is given, what must load after a kill, what must be equal at the end
        "prepare": (
            prepare, [str(world.corpus), "--ssl", str(world.ssl), "--text", "plain", "--vae", str(world.vae)], "",
            prepared_loads, prepared,
        ),
        "train_vae": (train_vae, ["--data", str(world.data), *flags(VAE_FLAGS, **long)], "", *trained(SemanticVAE)),
        "train_tts": (
            train_tts,
            ["--data", str(world.data), "--asr", "none", *flags(TTS_FLAGS, **long)],
            "",
            *trained(DiT),
        ),
        "sample": (
            sample,
            ["--tts", str(world.tts), *everything, "--steps", "2", "--batch-size", "2"],
            "",
            waves_are_whole,
            lambda out: sorted((p.name, p.read_bytes()) for p in out.glob("*.wav")),
        ),
        "evaluate": (
            evaluate, ["--asr", str(world.ssl), "--sim", str(world.sv), *everything], "s.csv", scores_are_whole,
            lambda out: (out / "s.csv").read_bytes(),
        ),
    }
    lost = 0
    for name, (script, given, file, loads, result) in commands.items():

        def run(out):
            command = [*given, "--out", str(out / file)]
            if script in (train_vae, train_tts) and (out / "state.pt").exists():
                command = ["--resume", "--out", str(out)]
            elif (out / "model.safetensors").exists():  # killed between the first weights and their state: refused
                shutil.rmtree(out)
            return fork(lambda: script.main(command), log)

        straight = root / f"straight-{name}"
        broken = root / f"broken-{name}"
        start = time.time()
        wait(run(straight), log)
        duration = time.time() - start
        killed = 0
        starts = 0
        while killed < kills:
            pid = run(broken)
            time.sleep(rng.uniform(0, 0.6 * duration))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            starts += 1
            killed += os.WIFSIGNALED(status)
            if not os.WIFSIGNALED(status):
                if os.WEXITSTATUS(status):
                    sys.exit(f"{name} failed after {killed} kills:\n{log.read_text()[-3000:]}")
                shutil.rmtree(broken)  # it was done before it was killed: from the start
                continue
            try:
                loads(broken, straight)
            except (AssertionError, InputError) as e:
                lost += 1
                print(f"{name}, kill {killed}: {e}")
        wait(run(broken), log)
        same = result(straight) == result(broken)
        lost += not same
        end = "the same bytes" if same else "ANOTHER RESULT"
        print(f"  {name:<10} {killed} kills in {starts} starts; in the end {end}", flush=True)
    return lost


# --------------------------------------------------------------------------------------------------------------
# Damaged input.


def damage(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled, or replaced by numbers that headers dislike; or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        i = rng.randrange(len(data) + 1)
        n = rng.choice((1, 1, 2, 4, 8, 64))
        i = min(i, rng.choice((64, 256, len(data))))  # headers more often
        kind = rng.randrange(6)
        if kind == 0:
            data[i : i + n] = rng.randbytes(n)
        elif kind == 1:
            del data[i : i + n]
        elif kind == 2:
            data[i:i] = data[i : i + n]
        elif kind == 3:
            data[i : i + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"))
        elif kind == 4:
            data[i : i + 1] = rng.choice((
                b"|", b"\t", b"\n", b"\0", b"/", b"..", b'"', b"{", b"[", b"-", b"9" * 30,
                "é\u2028\U0001f600".encode(),
            ))
        else:
            del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


def audio_files(root: Path):
    clips = {}
    for suffix in prepare.FORMATS:
        prepare.write_wave(root / f"a{suffix}", tone(0.6, 0), RATE)
        clips[suffix] = (root / f"a{suffix}").read_bytes()
    for name, scale in (("float", 1), ("large", 32767)):
        sf.write(root / "a.wav", scale * tone(0.6, 0) + 0.02, RATE, subtype="FLOAT")
        clips[f".{name}.wav"] = (root / "a.wav").read_bytes()

    def read(rng):
        kind = rng.choice(list(clips))
        path = root / f"damaged{rng.choice((kind, kind, '.raw', '.m4a'))}"
        path.write_bytes(damage(clips[kind], rng))
        wave = prepare.read_audio(path, RATE)
        assert wave.dtype == np.float32 and wave.ndim == 1 and len(wave)
        if np.isfinite(wave).all():
            sample.check_prompt(wave, "one small bird", RATE, 1)

    return read


def manifests(root: Path):
    nine = range(9)
    tables = {
        "manifest.csv": ["audio|speaker|text|split", *(f"audio/{i}.wav|s{i}|one small bird {i}|train" for i in nine)],
        "hub/metadata.csv": ["file_name,transcription", *(f'{i}.wav,"one small bird, {i}"' for i in nine)],
        "coqui/metadata.csv": ["audio_file|text|speaker_name", *(f"{i}.wav|one small bird {i}|ann" for i in nine)],
        "lj/metadata.csv": [f"LJ{i}|One small bird {i}.|one small bird {i}" for i in nine],
        "voices/metadata.csv": [f"LJ{i}|One small bird {i}.|p{i}" for i in nine],
    }

    def read(rng):
        path = root / rng.choice(list(tables))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damage("".join(f"{row}\n" for row in tables[str(path.relative_to(root))]).encode(), rng))
        for name, _, speaker, text, split in prepare.list_clips(path if path.parent == root else path.parent):
            line = f"{name}\t{split}\t{speaker}\t1\t{prepare.normalize_text(text, rng.choice(('raw', 'plain')))}"
            assert len(line.splitlines()) <= 1 and len(line.split("\t")) == 5, line

    return read


def lists(root: Path):
    whole = "".join(f"1-2-{i}\t1.5\tOne bird.\t1-3-{i}\t2\tA bird.\n" for i in range(5)).encode()

    def read(rng):
        (root / "a.lst").write_bytes(damage(whole, rng))
        for line in evaluate.read_list(root / "a.lst"):
            assert (root / "out" / line.wav).resolve().parent == (root / "out").resolve() and "\0" not in line.wav

    return read


def checkpoints(root: Path):
    vae = SemanticVAE(
        VAEConfig(
            encoder_dim=1, encoder_rates=(2,), latent_dim=2, decoder_dim=2, decoder_rates=(2,), decoder_kernels=(2,),
            resblock_kernels=(1,), ssl_dim=0,
        )
    )
    vae.save_pretrained(root / "vae")
    DiT(
        DiTConfig(latent_dim=2, width=16, depth=1, heads=1, text_dim=4, text_layers=1, vae_hash=vae.latents_hash())
    ).save_pretrained(root / "dit")
    weights = torch.nn.Linear(2, 2).state_dict()
    torch.save(dict(step=3, kept={}, seconds=1.0, model=weights, ema=weights), root / "state.pt")
    going_on = argparse.Namespace(out=root, resume=True, steps=9)
    files = {path: path.read_bytes() for path in (*root.glob("*/*"), root / "state.pt")}

    def read(rng):
        path = rng.choice(list(files))
        path.write_bytes(damage(files[path], rng))
        try:
            if path.name == "state.pt":
                run = prepare.Run(going_on, 0, 1, torch.device("cpu"))
                run.begin(torch.nn.Linear(2, 2), {}, dict(model=torch.nn.Linear(2, 2)), ["loss"], 0.0)
            elif path.parent.name == "dit":
                sample.load(str(path.parent), str(root / "vae"), torch.device("cpu"))
            else:
                SemanticVAE.from_pretrained(path.parent)
        finally:
            path.write_bytes(files[path])

    return read


def data_folders(root: Path):
    from bench import noise_data

    noise_data(root / "data", 0.005, ssl_dim=4, dim=2)
    files = {path: path.read_bytes() for path in (root / "data" / "meta.json", root / "data" / "index.tsv")}

    def read(rng):
        path = rng.choice(list(files))
        path.write_bytes(damage(files[path], rng))
        try:
            data = prepare.Data(root / "data", ("audio", "ssl", "latents"))
            for i in range(len(data.clips)):
                assert all(
                    len(data.get(name, i)) == np.diff(data.offsets[name])[i] for name in ("audio", "ssl", "latents")
                )
        finally:
            path.write_bytes(files[path])

    return read


def texts(root: Path):
    kinds = [
        (0x20, 0x7F), (0, 0x20), (0xA0, 0x250), (0x300, 0x370), (0xE00, 0xE80), (0x3040, 0x3100), (0x4E00, 0x9FFF),
        (0x2000, 0x2070), (0xD800, 0xE000), (0x1F300, 0x1FAFF), (0, 0x110000),
    ]

    def read(rng):
        low, high = rng.choice(kinds)
        text = "".join(
            chr(rng.randrange(low, high)) if rng.random() < 0.7 else rng.choice(" .,!?'\n")
            for _ in range(rng.choice((0, 1, 3, 20, 300)))
        )
        text = prepare.normalize_text(text, rng.choice(("raw", "plain")))
        symbols = sample.to_bytes(text)
        assert bytes(symbols.tolist()).decode() == text
        if evaluate.normalize(text):
            evaluate.error_rates([text], [text[::-1]])
        limit = rng.randrange(1, 100)
        assert all(len(piece.encode()) <= limit for piece in sample.split_text(text, limit))

    return read


def fuzz(root: Path, rng: random.Random, count: int = 10_000) -> int:
    """`count` inputs for each reader; how many ended otherwise than they should."""
    lost = 0
    for make in (audio_files, manifests, lists, checkpoints, data_folders, texts):
        folder = root / make.__name__
        folder.mkdir()
        progress = folder / "progress"
        seed = rng.randrange(1 << 30)

        def work():
            read = make(folder)
            refused = 0
            signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("ten seconds")))
            for i in range(count):
                progress.write_text(f"{i} {refused}")
                signal.alarm(10)
                try:
                    read(random.Random(f"{seed} {i}"))
                except InputError:
                    refused += 1
            signal.alarm(0)
            progress.write_text(f"{count} {refused}")

        start = time.time()
        _, status = os.waitpid(fork(work, folder / "log"), 0)
        done, refused = map(int, progress.read_text().split())
        lost += status != 0
        trouble = f"; then status {status}:\n{(folder / 'log').read_text()[-2000:]}" if status else ""
        spent = f"{done} inputs in {time.time() - start:.0f} s"
        print(f"  {make.__name__:<12} {spent}: {refused} refused, {done - refused} read{trouble}", flush=True)
    return lost


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="kill, fuzz (default: both)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lost = 0
    for part in args.parts or ("kill", "fuzz"):
        with tempfile.TemporaryDirectory() as folder:
            print(f"{part}:", flush=True)
            lost += globals()[part](Path(folder), random.Random(args.seed))
    print(f"lost: {lost}")
    sys.exit(lost > 0)
