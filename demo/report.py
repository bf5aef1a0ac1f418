"""A page to look at and listen to, from evaluate.py's scores: players, spectrograms, curves, a picture of the latents.

    python evaluate.py --reconstruct runs/vae && python demo/report.py --reconstruct runs/vae --runs runs/vae runs/tts

It opens from the disk, with nothing beside it. Pictures need matplotlib. No script imports this file.
"""

import argparse
import base64
import csv
import html
import io
import sys
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import COLUMNS, Line, Recognizer, Reconstructor, find_audio, make_table, read_list, recording
from model import InputError, SemanticVAE, stft, write_text
from prepare import DEMO, at_least, cli, read_audio

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Semantic-VAE: report</title><style>
:root{color-scheme:light dark}body{font:1rem/1.5 system-ui,sans-serif;max-width:72rem;margin:auto;padding:1rem}
img,audio{max-width:100%}img{background:#fff}.wide{overflow-x:auto}table{border-collapse:collapse}
td,th{padding:.2rem .6rem;text-align:right}td{white-space:nowrap}td:first-child,th:first-child{text-align:left}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:1rem}figure{margin:0;min-width:0}
</style>"""
UNITS = 10  # phone-like classes


def player(wave: np.ndarray, rate: int) -> str:
    buffer = io.BytesIO()
    sf.write(buffer, wave, rate, format="WAV", subtype="PCM_16")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<audio controls preload="none" src="data:audio/wav;base64,{data}"></audio>'


def picture(draw, width: float, height: float) -> str:
    """draw(axes) as an image; nothing, if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return ""
    figure = Figure((width, height), layout="constrained")
    buffer = io.BytesIO()
    draw(figure.subplots())
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def spectrogram(wave: np.ndarray) -> str:
    level = 20 * stft(torch.from_numpy(wave)[None], 512)[0].abs().clamp(min=1e-4).log10()

    def draw(axes):
        axes.imshow(level, origin="lower", aspect="auto", vmin=-60, vmax=30)
        axes.set_axis_off()

    return picture(draw, 3.2, 1.6)


def curve(column: str, points: list[tuple[int, float]]) -> str:
    def draw(axes):
        axes.plot(*zip(*points))
        axes.set_title(column)

    return picture(draw, 3.2, 2.2)


def curves(run: Path) -> str:
    """The columns of a run's log.csv against its steps."""
    with open(run / "log.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    images = []
    for column in rows[0] if rows else ():
        points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        if points and column not in ("step", "seconds", "skipped"):
            images.append(curve(column, points))
    return f'<div class="row">{"".join(images)}</div>'


def samples(run: Path) -> str:
    """The training's first two fixed clips, evaluation after evaluation."""
    clips = {}
    for path in sorted((run / "samples").glob("*_*.wav")):
        clips.setdefault(path.stem.split("_")[0], []).append(path)
    parts = []
    for paths in list(clips.values())[:2]:
        some = [*paths[: -1 : max(1, len(paths) // 6)], paths[-1]]
        players = []
        for path in some:
            caption = f"<figcaption>{path.stem.split('_')[1]}</figcaption>"
            players.append(f"<figure>{player(*sf.read(path, dtype='float32'))}{caption}</figure>")
        parts.append(f'<div class="row">{"".join(players)}</div>')
    return "".join(parts)


@torch.no_grad()
def projection(vae: str, recordings: list[Path], asr: Recognizer, device) -> str:
    """Latent frames in the plane that best separates the means of phone-like classes, which colour them: clusters
    (k-means) of the CTC recogniser's features. Beneath: for how many frames a linear map predicts the class."""
    model = SemanticVAE.from_pretrained(vae).to(device)
    rate = asr.extractor.sampling_rate
    latents = []
    features = []
    for path in recordings:
        wave = torch.from_numpy(read_audio(path, model.config.sample_rate))[None].to(device)
        latents.append(model.encode(wave)[0][0])  # [N, D]
        inputs = asr.extractor(read_audio(path, rate), sampling_rate=rate, return_tensors="pt").to(device)
        states = asr.model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        frame = torch.arange(len(latents[-1]), device=device)
        features.append(states[frame * len(states) // len(latents[-1])])
    z, f = (torch.cat(x).cpu() for x in (latents, features))
    z = (z - z.mean(0)) / z.std(0).clamp(min=1e-6)
    f = (f - f.mean(0)) / f.std(0).clamp(min=1e-6)
    centres = f[torch.linspace(0, len(f) - 1, UNITS).long()]
    for _ in range(30):
        unit = torch.cdist(f, centres).argmin(1)
        one_hot = F.one_hot(unit, UNITS).float()  # [frames, units]
        centres = one_hot.T @ f / one_hot.sum(0).clamp(min=1)[:, None]
    half = len(z) // 2
    z1 = F.pad(z, (0, 1), value=1)
    guess = z1[half:] @ torch.linalg.lstsq(z1[:half], one_hot[:half]).solution
    named = (guess.argmax(-1) == unit[half:]).float().mean().item()
    means = one_hot.T @ z / one_hot.sum(0).clamp(min=1)[:, None]
    x = z @ torch.linalg.svd(means - means.mean(0))[2][:2].T

    def draw(axes):
        axes.scatter(*x.T, s=4, c=unit, cmap="tab10")
        axes.set_axis_off()

    note = f"{html.escape(str(vae))}: a linear map fitted to half of the frames finds the class of {named:.1%}"
    return f"<figure>{picture(draw, 5, 5)}<figcaption>{note}</figcaption></figure>"


def read_scores(path: Path) -> list[dict]:
    if not path.is_file():
        raise InputError(f"no scores in {path}: run python evaluate.py first, or name its --out with --scores")
    with open(path, encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    records = []
    for row in rows:
        scores = {name: float(value) for name, value in row.items() if name in COLUMNS and value}
        texts = {name: value for name, value in row.items() if name not in COLUMNS}
        records.append(texts | scores)  # without the columns that a system lacks
    return records


def utterance(line: Line, args, systems: list[str], heard: dict, reconstruct) -> str:
    """The prompt and each row's version of one sentence."""
    waves = dict(prompt=read_audio(find_audio(args.audio, line.ref), 16000))
    for system in systems:
        waves[system], found = recording(system, line, args, reconstruct)
        if found and abs(found["mel"] - float(heard[system, line.gen]["mel"])) > 0.01:
            raise InputError(f"--reconstruct {args.reconstruct} is not the VAE of {args.scores}")
    figures = []
    for name, wave in waves.items():
        said = f": “{html.escape(heard[name, line.gen]['hypothesis'])}”" if name in systems else ""
        seen_and_heard = spectrogram(wave) + player(wave, 16000)
        figures.append(f"<figure>{seen_and_heard}<figcaption>{name}{said}</figcaption></figure>")
    return f'<h2>{html.escape(line.text)}</h2><div class="row">{"".join(figures)}</div>'


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--scores", type=Path, default=Path("runs/scores.csv"), help="evaluate.py's --out (default %(default)s)")
    flag("--list", type=Path, default=DEMO / "corpus" / "test.lst", help="as for evaluate.py (default: the demo's)")
    flag("--audio", type=Path, help="as for evaluate.py")
    flag("--generated", type=Path, default=Path("runs/samples"), help="as for evaluate.py (default %(default)s)")
    flag("--reconstruct", metavar="VAE", default=str(DEMO / "vae"), help="as for evaluate.py (default: the demo's)")
    flag("--compare", metavar="VAE", help="another VAE, whose latents are shown too")
    flag("--asr", default=str(DEMO / "ssl"), help="CTC recogniser whose features colour the latents")
    flag("--clips", type=at_least(0), default=6, help="utterances on the page (default %(default)s)")
    flag("--runs", type=Path, nargs="*", default=[], help="run folders whose log.csv and samples/ are shown")
    flag("--out", type=Path, default=Path("runs/report"), help="folder of the page (default %(default)s)")
    args = parser.parse_args(argv)
    args.audio = args.audio or args.list.parent
    device = torch.device("cpu")
    records = read_scores(args.scores)
    systems = list(dict.fromkeys(record["system"] for record in records))
    heard = {(record["system"], record["utterance"]): record for record in records}
    lines = [line for line in read_list(args.list) if (systems[0], line.gen) in heard]
    if not lines:
        raise InputError(f"{args.list} has none of the utterances of {args.scores}: name the scores' list with --list")
    for run in args.runs:
        if not (run / "log.csv").is_file():
            raise InputError(f"{run} is no run folder (no log.csv): name what train_vae.py and train_tts.py wrote")
    asr = Recognizer(args.asr, device)
    if asr.whisper:
        raise InputError(f"--asr {args.asr} is a Whisper: the picture of latents needs a CTC recogniser's features")
    if not picture(lambda axes: None, 1, 1):
        print("matplotlib is not installed: the report has no pictures (pip install matplotlib)")
    rows = []
    for kind, row in zip(["h", *"d" * len(systems)], make_table(systems, records)):
        rows.append("".join(f"<t{kind}>{html.escape(cell)}</t{kind}>" for cell in row))
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    parts = [PAGE, f'<h1>Report</h1><div class="wide"><table>{table}</table></div>']
    reconstruct = Reconstructor(args.reconstruct, device) if "reconstruction" in systems else None
    parts += [utterance(line, args, systems, heard, reconstruct) for line in lines[: args.clips]]
    originals = [find_audio(args.audio, line.gen) for line in lines[:48]]
    latents = [projection(vae, originals, asr, device) for vae in (args.reconstruct, args.compare) if vae]
    parts.append(f'<h2>Latents, coloured by phone-like class</h2><div class="row">{"".join(latents)}</div>')
    for run in args.runs:
        parts.append(f"<h2>{html.escape(str(run))}</h2>{curves(run)}{samples(run)}")
    write_text(args.out / "index.html", "".join(parts))
    print(f"{args.out / 'index.html'}: open it in a browser")


if __name__ == "__main__":
    cli(main)
