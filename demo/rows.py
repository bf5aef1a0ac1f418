"""The paper's question in small: rows that differ in one flag, stage 1 and 2 of each, a table and a figure.

    python demo/rows.py train semantic-64.0.aligned …   # each trained, spoken and scored; continues
    python demo/rows.py collect --judge "COMMAND"       # runs/rows → demo/rows/*.csv, which it replaces
    python demo/rows.py table                           # demo/rows/*.csv → the table, and wer.svg (matplotlib)

COMMAND is given the path of a list (wav, text, prompt, tab-separated) as its last argument, and prints a line an
utterance: WER in %, SIM, the wav's name, |text| -> |what it heard|.

A name is VAE.SEED.PLACE, or VAE.SEED.PLACE+adma. The data folder runs/rows/data is made first, as demo/README.md says;
for small-64 runs/rows/data-small: prepare.py demo/corpus MORE MORE2 --out runs/rows/data-small --ssl demo/ssl --aligner
demo/ssl --text plain. A row's flags are those of all rows, then its own: what comes last holds.
"""

import argparse
import csv
import fcntl
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from evaluate import Reconstructor, find_audio, read_list
from model import read_json
from prepare import Data, write_wave
from train_tts import Utterances

HERE = ROOT / "demo" / "rows"
LIST = ROOT / "demo" / "corpus" / "test.lst"
VAE = ("--preset demo --latent-dim 64 --encoder-steps 2000 --steps 3000 --teacher-weight 0 --adv-weight 0 "
       "--eval-every 1000")
TTS = "--preset demo --steps 600 --eval-every 120 --eval-sentences 16 --log-every 20"
ROWS = {  # what each VAE differs in
    "semantic-64": "",  # teacher: Whisper base
    "small-64": "",  # teacher: demo/ssl
    "vanilla-64": "--align-weight 0",
    "vanilla-16": "--align-weight 0 --latent-dim 16",
    "mel-64": "--mel --encoder-steps 0 --steps 1000",  # its decoder learns for as many steps as the others'
}
NOISE = (0.3, 0.6, 1.0)  # in standard deviations of each channel
INTELLIGIBLE = 30  # % WER of the 16 fixed sentences, by demo/ssl


def run(script: str, *flags) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], check=True, cwd=ROOT)


def learn(script: str, out: Path, flags: list) -> None:
    """Train the run `out` to its end, or go on with it."""
    if not (out / "done").exists():
        run(script, "--out", out, *(["--resume"] if (out / "state.pt").exists() else flags))
        (out / "done").touch()


def train(args) -> None:
    for name in args.rows:
        kind, seed, place = name.split(".")
        place, _, extra = place.partition("+")
        vae = args.work / f"{kind}.{seed}"
        tts = args.work / name
        data = args.work / ("data-small" if kind == "small-64" else "data")
        learn("train_vae.py", vae, ["--data", data, "--seed", seed, *VAE.split(), *ROWS[kind].split()])
        with open(args.work / "lock", "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)  # rows trained side by side share the data folder
            run("prepare.py", "--out", data, "--vae", vae)
        flags = ["--data", data, "--vae", vae, "--seed", seed, "--text-place", place, *TTS.split()]
        learn("train_tts.py", tts, flags + ["--align-hidden"] * (extra == "adma"))
        run("sample.py", "--tts", tts, "--list", LIST, "--out", tts / "said")
        if not (vae / "scores.csv").exists():
            run("evaluate.py", "--list", LIST, "--reconstruct", vae, "--noise", *NOISE, "--out", vae / "scores.csv")
        run("evaluate.py", "--list", LIST, "--no-original", "--generated", tts / "said", "--out", tts / "scores.csv")


# ----------------------------------------------------------------------------------------------------------------------
# What was measured, as tables that ship.


def judge(command: str, wavs: dict, out: Path) -> dict:
    """{utterance: (WER, SIM, what was heard)} of the wavs; kept in the file `out`, which goes with its run's folder."""
    lines = {line.gen: line for line in read_list(LIST)}
    if not out.exists():
        rows = [f"{wav}\t{lines[name].text}\t{find_audio(LIST.parent, lines[name].ref)}" for name, wav in wavs.items()]
        listing = out.with_suffix(".tsv")
        listing.write_text("\n".join(rows) + "\n")
        done = subprocess.run([*shlex.split(command), listing], check=True, stdout=subprocess.PIPE, text=True)
        out.write_text(done.stdout)
    found = re.findall(r"^ *([\d.]+) +([\d.-]+) +(\S+) .*-> +\|(.*)\|$", out.read_text(), re.M)
    names = {Path(wav).name: name for name, wav in wavs.items()}
    if {wav for _, _, wav, _ in found} != set(names):
        expected = f"{len(found)} utterances, expected the {len(names)} of {LIST}"
        sys.exit(f"error: {out} has {expected}: remove it, and see --judge")
    return {names[wav]: (float(wer) / 100, float(sim), heard) for wer, sim, wav, heard in found}


def reconstructed(vae: Path) -> dict:
    """{utterance: wav} of the listed sentences through the VAE."""
    lines = read_list(LIST)
    wavs = {line.gen: vae / "said" / line.wav for line in lines}
    if not all(wav.exists() for wav in wavs.values()):
        reconstruct = Reconstructor(str(vae), torch.device("cpu"))
        for line in lines:
            write_wave(wavs[line.gen], reconstruct(find_audio(LIST.parent, line.gen))[0], 16000)
    return wavs


def loss_floor(run: Path) -> float:
    """Of train_tts.validate()'s loss, what no model can predict: latents are sampled, z = mean + std · noise. The mean
    over its clips, times and spans of s² / (t² s² + (1 − t)²), with s = std over the channel's deviation."""
    args = read_json(run / "args.json")
    need = ["latents"] + ["starts"] * (args["text_place"] == "aligned")
    data = Data(args["data"], need, read_json(run / "config.json")["config"]["vae_hash"])
    valid = Utterances(data, "valid", args["batch_seconds"], args["join"], args["seed"])
    runs = valid.examples(np.random.default_rng(0))[:32]
    total = 0.0
    frames = 0
    for i, clips in enumerate(runs):
        t = (i + 0.5) / len(runs)
        variance = torch.cat([data.get("latents", k)[:, 1] for k in clips]).exp() / valid.std**2  # [N, D]
        span = valid[(-1, clips)]["span"]  # [N]
        total += ((variance / (t**2 * variance + (1 - t) ** 2)).mean(-1) * span).sum().item()
        frames += span.sum().item()
    return total / frames


def collect(args) -> None:
    HERE.mkdir(exist_ok=True)
    utterances = []
    recordings = {line.gen: find_audio(LIST.parent, line.gen) for line in read_list(LIST)}
    for name, (wer, sim, heard) in judge(args.judge, recordings, args.work / "original.txt").items():
        judged = dict(judge_wer=f"{wer:.4f}", judge_sim=sim, judge_heard=heard)
        utterances.append(dict(run="original.0", system="original", utterance=name) | judged)
    logs = {"stage1": [], "stage2": []}
    for run_folder in sorted(path.parent for path in args.work.glob("*/scores.csv")):
        name = run_folder.name
        stage = f"stage{1 if name.count('.') == 1 else 2}"
        more = dict(floor=f"{loss_floor(run_folder):.4f}") if stage == "stage2" else {}
        logs[stage] += [dict(run=name, **row, **more) for row in read_csv(run_folder / "log.csv")]
        if stage == "stage1":
            wavs = reconstructed(run_folder)
            judged_system = "reconstruction"
        else:
            wavs = {line.gen: run_folder / "said" / line.wav for line in read_list(LIST)}
            judged_system = "synthesis"
        judged = judge(args.judge, wavs, run_folder / "judged.txt")
        for row in read_csv(run_folder / "scores.csv"):
            entry = dict(run=name, system=row["system"], utterance=row["utterance"])
            entry |= dict(asr_wer=row["wer"], asr_heard=row["hypothesis"])
            if row["system"] == judged_system:
                wer, sim, heard = judged[row["utterance"]]
                entry |= dict(judge_wer=f"{wer:.4f}", judge_sim=sim, judge_heard=heard)
            utterances.append(entry)
    write_csv(HERE / "utterances.csv", utterances)
    for stage, rows in logs.items():
        write_csv(HERE / f"{stage}.csv", rows)


def read_csv(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def write_csv(path: Path, rows: list[dict]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ----------------------------------------------------------------------------------------------------------------------
# The table and the figure, from those files alone.


def matrix(rows: list[dict], system: str, column: str) -> np.ndarray:
    """[seeds, utterances] of one row's scores."""
    seeds = sorted({row["run"] for row in rows})
    names = sorted({row["utterance"] for row in rows})
    values = {(r["run"], r["utterance"]): float(r[column]) for r in rows if r["system"] == system and r[column]}
    return np.array([[values[seed, name] for name in names] for seed in seeds])


def resampled(values: np.ndarray, stream: int = 0) -> np.ndarray:
    """2000 bootstrap means over seeds and utterances: the same utterances whatever the stream, which draws seeds."""
    means = []
    for k in range(2000):
        utterances = np.random.default_rng(k).integers(0, values.shape[1], values.shape[1])
        seeds = np.random.default_rng([stream, k]).integers(0, len(values), len(values))
        means.append(values[seeds][:, utterances].mean())
    return np.array(means)


def shown(values: np.ndarray) -> str:
    low, high = np.percentile(resampled(values), [2.5, 97.5])
    return f"{100 * values.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def minutes_per_step(log: list[dict]) -> float:
    """By the median over the log's windows: what slows fewer than half of them (evaluations, say) hardly counts."""
    at = [(int(row["step"]), float(row["seconds"])) for row in log]
    return float(np.median([(t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in zip(at, at[1:]) if s1 > s0])) / 60


def table(args) -> None:
    """Words by the judge; words under noise, and minutes, by demo/ssl."""
    by_row = {}
    for entry in read_csv(HERE / "utterances.csv"):
        kind, seed, *place = entry["run"].split(".")
        by_row.setdefault((kind, *place), []).append(entry)
    logs = {}
    for entry in read_csv(HERE / "stage2.csv"):
        logs.setdefault(entry["run"], []).append(entry)
    print("| VAE | seeds | reconstruction: WER %, SIM | with noise of " + ", ".join(map(str, NOISE)) + ": WER % |")
    print("|---|---|---|---|")
    for (kind, *place), rows in by_row.items():
        if kind == "original":
            words, similar = (matrix(rows, "original", column) for column in ("judge_wer", "judge_sim"))
            print(f"| none: the recordings | | {shown(words)}, {similar.mean():.3f} | |")
        elif not place:
            words = matrix(rows, "reconstruction", "judge_wer")
            noisy = [f"{100 * matrix(rows, f'reconstruction+{level}', 'asr_wer').mean():.1f}" for level in NOISE]
            similar = matrix(rows, "reconstruction", "judge_sim").mean()
            print(f"| {kind} | {len(words)} | {shown(words)}, {similar:.3f} | {', '.join(noisy)} |")
    columns = f"synthesis: WER % | SIM | minutes to {INTELLIGIBLE} % WER | loss of validation clips | less its floor"
    print(f"\n| VAE, text | seeds | {columns} |")
    print("|---|---|---|---|---|---|---|")
    curves = {}
    for (kind, *place), rows in by_row.items():
        if place:
            words = matrix(rows, "synthesis", "judge_wer")
            similar = matrix(rows, "synthesis", "judge_sim").mean()
            runs = [logs[name] for name in sorted({row["run"] for row in rows})]
            losses = np.array([float([row["valid_loss"] for row in log if row["valid_loss"]][-1]) for log in runs])
            excess = losses - [float(log[0]["floor"]) for log in runs]
            name = f"{kind}, {place[0]}"
            curves[name] = [[(int(r["step"]) * minutes_per_step(log), 100 * float(r["wer"])) for r in log if r["wer"]]
                            for log in runs]
            first = [next((f"{at:.1f}" for at, wer in points if wer < INTELLIGIBLE), "-") for points in curves[name]]
            cells = [name, len(words), shown(words), f"{similar:.3f}", ", ".join(first)]
            cells += [f"{losses.mean():.3f}", f"{excess.mean():.3f}"]
            print(f"| {' | '.join(map(str, cells))} |")
    print("\n| synthesis, WER % | difference | in SIM |")
    print("|---|---|---|")
    spoken = sorted(key for key in by_row if len(key) == 2)
    pairs = [(key, ("vanilla-64", key[1])) for key in spoken if key[0] == "semantic-64"]
    pairs += [(key, (key[0], key[1].removesuffix("+adma"))) for key in spoken if key[1].endswith("+adma")]
    for ours, other in pairs:
        if other in by_row:
            cells = []
            for column, factor, digits in (("judge_wer", 100, 1), ("judge_sim", 1, 3)):
                first, second = (matrix(by_row[key], "synthesis", column) for key in (ours, other))
                mean = first.mean() - second.mean()
                low, high = factor * np.percentile(resampled(first, 1) - resampled(second, 2), [2.5, 97.5])
                cells.append(f"{factor * mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]")
            print(f"| {', '.join(ours)} - {', '.join(other)} | {' | '.join(cells)} |")
    draw(curves)


def draw(curves: dict) -> None:
    """{row: a list of (minutes, WER %) a seed} → wer.svg."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is needed for the figure: run pip install matplotlib")
        return
    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, seeds) in enumerate(curves.items()):
        for j, points in enumerate(seeds):
            axes.plot(*zip(*points), f"C{i}o-", markersize=3, label=None if j else name)
    axes.set_xlabel("minutes of one core, training of the DiT alone")
    axes.set_ylabel("WER % of 16 fixed sentences, by demo/ssl")
    axes.legend()
    figure.savefig(HERE / "wer.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "collect", "table"])
    parser.add_argument("rows", nargs="*", help="train: their names")
    parser.add_argument("--judge", help="collect: the command")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "rows", help="the runs (default %(default)s)")
    args = parser.parse_intermixed_args()
    if args.what == "collect" and not args.judge:
        parser.error("collect needs --judge")
    if args.what == "train" and not args.rows:
        parser.error("train needs names of rows")
    for name in args.rows:
        if not re.fullmatch(rf"({'|'.join(ROWS)})\.\d+\.(aligned|even)(\+adma)?", name):
            parser.error(f"no row {name}: expected VAE.SEED.PLACE, of {', '.join(ROWS)}, aligned and even")
    args.work = args.work.resolve()
    {"train": train, "collect": collect, "table": table}[args.what](args)
