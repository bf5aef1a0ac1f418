"""How fast it is, on whatever machine this runs: python tests/bench.py [decoder vae dit data ssl start recipe sampling
demo schedule curves]

`python tests/bench.py gpu` is the first ten minutes on a new card: the paper's recipe for 20 steps, then speed,
start-up and sampling.

Not a test: pytest does not collect it. Every measurement runs in a process of its own, on noise, with the paper's
networks (`demo`, `schedule` and `curves`: with the demo's). Forms that are compared take turns, call by call or step by
step, since the speed of a shared machine wanders. Seconds depend on the machine, whose name is printed; ratios are what
to compare."""

import csv
import ctypes
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import plain
import prepare
import sample
import train_tts
import train_vae
from evaluate import read_list
from model import DiT, DiTConfig, SemanticVAE, VAEConfig, fold_weight_norm
from model import sample as integrate
from prepare import DEMO, Data, normalize_text, read_audio

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
torch.backends.cuda.matmul.allow_tf32 = True  # as in convolutions: a share of the matrix rate compares like with like


def my_turn() -> None:
    """Wait until the other forms rest: see take_turns()."""
    print("ready", flush=True)
    sys.stdin.readline()


def seconds_of(call, repeats: int = 9) -> float:
    """Median time of `call` after two calls to warm up, the device's queue included."""
    times = []
    for i in range(repeats + 2):
        if i >= 2:
            my_turn()
        start = time.perf_counter()
        call()
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def step_flops(dit: DiT, frames: int, length: float) -> float:
    """Additions and multiplications of a training step over `frames` latent frames in utterances of `length` frames on
    average: two a weight and frame forward, twice that backward, and attention's two products. What does not grow with
    frames is left out."""
    once = ("attn_norm", "norm_out", "time_embed", "text_embed.text_embed")  # once an utterance, or a look-up
    weights = sum(p.numel() for name, p in dit.named_parameters() if p.ndim > 1 and not any(k in name for k in once))
    return 6 * frames * (weights + 2 * dit.config.depth * dit.config.width * length)


def matrix_rate(device, dtype, repeats: int = 4) -> float:
    """The device's FLOP/s in large square matrix products, the yardstick of MFU."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ b).sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


class Enough(Exception):
    """Ends a training, before it evaluates at its end."""


def seconds_of_a_step(script, train, steps: int) -> float:
    """Median time of a training step after three to warm up: from the turn it was given to the end of its last
    operation."""
    end_of_step = script.update_ema
    starts = []
    ends = []

    def update_ema(*args):
        end_of_step(*args)
        if GPU:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        if len(ends) == steps:
            raise Enough
        my_turn()
        starts.append(time.perf_counter())

    script.update_ema = update_ema
    try:
        train()
    except Enough:
        return statistics.median(end - start for start, end in zip(starts[2:], ends[3:]))


def peak_memory() -> float:
    """Largest GB so far: of the device, or of this whole process."""
    return torch.cuda.max_memory_allocated() / 1e9 if GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def memory_of(call) -> float:
    """Peak GB of `call` above what is held before it."""
    if GPU:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e9
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far

    def held(what):
        return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) / 1e6

    before = held("VmRSS:")
    call()
    return held("VmHWM:") - before


def relative_rms(a, b) -> float:
    """RMS of a - b over that of b."""
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


def noise_data(
    folder: Path,
    hours: float,
    silent: bool = False,
    seconds=(2.0, 16.0),
    ssl_dim: int = 1024,
    hop: int = 400,
    dim: int = 64,
) -> Path:
    """A prepared folder of noise (or of zeros, which take no room), with clips of random length, so that no measurement
    waits for prepare.py."""
    rng = np.random.default_rng(0)
    rate = 16000
    total = 0
    lengths = []
    while total < hours * 3600 * rate:
        lengths.append(int(rng.uniform(*seconds) * rate))
        total += lengths[-1]
    counts = {
        name: sum(prepare.frame_count(n, rate, r) for n in lengths)
        for name, r in (("audio", rate), ("ssl", 50), ("latents", rate // hop))
    }
    text = "the quick brown fox jumps over the lazy dog and runs away " * 5
    rows = [
        f"{i}\t{'valid' if i < 8 else 'train'}\ts{i % 4}\t{n}\t{text[: int(n / rate * 15)]}"
        for i, n in enumerate(lengths)
    ]
    folder.mkdir(parents=True)
    (folder / "index.tsv").write_text("id\tsplit\tspeaker\tsamples\ttext\n" + "\n".join(rows) + "\n")
    vae = SemanticVAE(VAEConfig(encoder_dim=4, latent_dim=dim, decoder_dim=64, resblock_kernels=(3,)))
    vae.save_pretrained(folder / "vae")
    vae_hash = SemanticVAE.from_pretrained(folder / "vae").latents_hash()
    rows_of = {
        "audio": (counts["audio"],),
        "ssl": (counts["ssl"], ssl_dim),
        f"latents-{vae_hash}": (counts["latents"], 2, dim),
    }
    for name, shape in rows_of.items():
        with open(folder / f"{name}.bin", "wb") as f:
            if silent:
                f.truncate(2 * math.prod(shape))
            elif name == "audio":
                rng.integers(-3000, 3000, shape, dtype=np.int16).tofile(f)
            else:
                rng.standard_normal(shape, dtype=np.float32).astype(np.float16).tofile(f)

    def entry(shape, dtype, rate, **more):
        return dict(shape=shape, dtype=dtype, rate=str(rate), **more)

    latents = entry(
        [counts["latents"], 2, dim], "float16", rate // hop, vae=str(folder / "vae"), vae_hash=vae_hash, dim=dim,
        hop=hop, mean=[0.0] * dim, std=[1.6] * dim,
    )
    meta = {
        "sample_rate": rate,
        "text": "plain",
        "sources": ["noise"],
        "clips": len(lengths),
        "hours": total / rate / 3600,
        "audio": entry([counts["audio"]], "int16", rate),
        "ssl": entry([counts["ssl"], ssl_dim], "float16", 50, model="noise", dim=ssl_dim, layers=1),
        f"latents-{vae_hash}": latents,
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


# --------------------------------------------------------------------------------------------------------------
# The measurements. Each returns a dict of figures and runs in a new process: see take_turns().


@torch.no_grad()
def decoder(form: str, work: Path) -> dict:
    """The paper's decoder, 5 s of speech, float32."""
    torch.manual_seed(0)
    vae = SemanticVAE(VAEConfig()).eval().to(DEVICE)
    z = torch.randn(1, 200, 64, device=DEVICE)
    if form == "plain":
        plain.convolve(vae)
    else:
        vae = fold_weight_norm(vae)
    decode = torch.compile(vae.decode) if form == "compiled" else vae.decode
    seconds = seconds_of(lambda: decode(z)) / 5
    return dict(
        seconds=seconds,
        memory=memory_of(lambda: decode(z)),
        share=46.6e9 / seconds / matrix_rate(DEVICE, torch.float32, 20),
    )


def vae(form: str, work: Path) -> dict:
    """The full VAE-GAN step of the paper's networks: on a CPU 2 crops of 1 s in float32, on a GPU of 3 s (24; plain,
    which needs more memory, 8)."""
    crops, crop, steps = (8 if form == "plain" else 24, 3, 30) if GPU else (2, 1, 14)
    flags = [
        "--preset", "paper", "--data", work / "data", "--out", work / f"vae-{form}", "--steps", 1000,
        "--batch-seconds", crops * crop, "--crop", crop, "--micro-batch", crops, "--device", DEVICE.type,
        "--eval-every", 10**6, "--eval-clips", 1,
    ]
    flags = [str(f) for f in flags]

    def train():
        if form == "plain":
            plain.train(flags, DEVICE)
        else:
            train_vae.main([*flags, "--compile" if form == "compiled" else "--no-compile"])

    seconds = seconds_of_a_step(plain if form == "plain" else train_vae, train, steps) / crops
    return dict(
        seconds=seconds,
        memory=peak_memory(),
        share=75.5e12 / 192 * crop / seconds / matrix_rate(DEVICE, torch.bfloat16 if GPU else torch.float32, 20),
    )


def dit(form: str, work: Path) -> dict:
    """One step of the paper's DiT: on a GPU the paper's batch of 0.9 h, on a CPU 30 s in float32."""
    batch, micro, steps = (3240, 450, 12) if GPU else (30, 30, 8)
    flags = [
        "--preset", "paper", "--data", work / "data", "--out", work / f"dit-{form}", "--steps", 1000,
        "--batch-seconds", batch, "--micro-seconds", micro, "--warmup", 10, "--device", DEVICE.type,
        "--eval-every", 10**6, "--eval-sentences", 1, "--asr", "none",
        "--compile" if form == "compiled" else "--no-compile", "--bf16" if GPU else "--no-bf16",
    ]
    seconds = seconds_of_a_step(train_tts, lambda: train_tts.main([str(f) for f in flags]), steps)
    examples = train_tts.Utterances(Data(work / "data", ("latents",)), "train", batch, 1, 0)
    lengths = [sum(examples.frames[i] for i in run) for run in examples.step(0)]
    work_done = step_flops(DiT(DiTConfig()), sum(lengths), float(np.mean(lengths))) / seconds
    return dict(
        seconds=seconds,
        memory=peak_memory(),
        tflops=work_done / 1e12,
        mfu=work_done / matrix_rate(DEVICE, torch.bfloat16 if GPU else torch.float32, 20),
    )


def data(form: str, work: Path) -> dict:
    """What the two loaders deliver alone, in seconds of audio a second and process, and the padding in the paper's
    batches of 0.9 h (clips of 2 to 16 s)."""
    torch.set_num_threads(1)  # as in a loader's worker
    stored = Data(work / "data", ("audio", "ssl"))
    crops = train_vae.Crops(stored, VAEConfig(), 3, 0, stored.meta["ssl"])
    numbers = train_vae.CropNumbers(16, 0, 16, 16, 0, 1)
    loader = torch.utils.data.DataLoader(
        crops, batch_sampler=[part for step in range(40) for part in numbers.parts(step)]
    )
    start = time.perf_counter()
    vae_rate = sum(len(b["wave"]) * 3 for b in loader) / (time.perf_counter() - start)
    examples = train_tts.Utterances(Data(work / "data", ("latents",)), "train", 120, 1, 0)
    start = time.perf_counter()
    frames = 0
    micro = train_tts.MicroBatches(examples, 120, 0, 1)
    for step in range(20):
        for part in micro.parts(step):
            frames += train_tts.collate([examples[step, run] for run in part])["lengths"].sum().item()
    dit_rate = frames / 40 / (time.perf_counter() - start)
    corpus = train_tts.Utterances(Data(noise_data(work / "corpus", 20, silent=True), ("latents",)), "train", 3240, 1, 0)
    micro = train_tts.MicroBatches(corpus, 450, 0, 1)
    lengths = [[corpus.length(run) for run in part] for step in range(40) for part in micro.parts(step)]
    padded = sum(len(part) * max(part) for part in lengths)
    return dict(vae_rate=vae_rate, dit_rate=dit_rate, padding=1 - sum(map(sum, lengths)) / padded)


def ssl(form: str, work: Path) -> dict:
    """Hours of speech a minute through a random model of WavLM-Large's size."""
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMModel

    config = WavLMConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        feat_extract_norm="layer", do_stable_layer_norm=True,
    )
    WavLMModel(config).save_pretrained(work / "wavlm")
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(work / "wavlm")
    model = prepare.SSLModel(str(work / "wavlm"), device=DEVICE)
    stored = Data(work / "data")
    clips = range(400 if GPU else 4)
    batches = model.batches([int(stored.samples[i]) for i in clips], 120 if GPU else 20)

    def listen():
        return [model([stored.get("audio", clips[i]).numpy() for i in batch]) for batch in batches]

    return dict(hours_a_minute=sum(stored.samples[i] for i in clips) / stored.rate / 60 / seconds_of(listen, 1))


@torch.no_grad()
def sampling(form: str, work: Path) -> dict:
    """Real-time factor of the paper's networks: 10 s after a prompt of 5 s, `form` being BATCHxSTEPS."""
    batch, steps = map(int, form.split("x"))
    model = DiT(DiTConfig()).eval().to(DEVICE)
    codec = fold_weight_norm(SemanticVAE(VAEConfig()).eval().to(DEVICE))
    text = torch.randint(97, 122, (batch, 200), device=DEVICE)
    torch.nn.init.normal_(model.proj_out.weight, std=0.01)
    noise = torch.randn(batch, 600, 64, device=DEVICE)
    lengths = torch.full((batch,), 600, device=DEVICE)

    def speak():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            x = integrate(model, noise, noise, lengths // 3, text, lengths, steps)
        return codec.decode(x[:, 200:])

    seconds = seconds_of(speak, 3 if GPU else 1)
    return dict(rtf=seconds / (10 * batch), memory=peak_memory())


def demo_requests():
    """The demo's DiT and VAE, and four sentences of its test list, each with the prompt's wave, the arguments of
    model.sample(), those of the text's starts apart, and the frames it says."""
    model, codec, _ = sample.load(str(DEMO / "tts"), None, DEVICE)
    rate = model.config.sample_rate
    requests = []
    for line in read_list(DEMO / "corpus" / "test.lst")[::12]:
        prompt_text, text = (normalize_text(t, model.config.text) for t in (line.ref_text, line.text))
        wave = torch.from_numpy(read_audio(DEMO / "corpus" / line.ref, rate))[None].to(DEVICE)
        prompt = model.standardize(codec.encode(wave)[0])  # [1, P, D]
        frames, starts = sample.plan(model, prompt.shape[1], sample.Request(wave, prompt_text, text))
        padded = torch.nn.functional.pad(prompt, (0, 0, 0, frames - prompt.shape[1]))
        lengths = torch.tensor([frames], device=DEVICE)
        prompt_lengths = torch.tensor([prompt.shape[1]], device=DEVICE)
        noise = torch.randn(1, frames, model.config.latent_dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        symbols = sample.to_bytes(f"{prompt_text} {text}")[None].to(DEVICE)
        starts = starts[None].to(DEVICE)
        given = (noise, padded, prompt_lengths, symbols, lengths)
        requests.append(dict(wave=wave, integrate=given, starts=starts, frames=frames - prompt.shape[1]))
    return model, codec, requests


@torch.no_grad()
def demo(form: str, work: Path) -> dict:
    """Seconds of work a second of speech of sample.py with the demo's networks, by stage: one utterance at a time.
    `dit` includes `text`; `decoder` has the whole prompt, too."""
    model, codec, requests = demo_requests()
    total = {}
    said = sum(r["frames"] for r in requests) * model.config.hop / model.config.sample_rate
    for r in requests:
        noise, _, _, symbols, lengths = r["integrate"]
        stages = dict(
            prompt=lambda: codec.encode(r["wave"]),
            text=lambda: [model.text_embed(symbols, lengths, noise.shape[1], starts=r["starts"]) for _ in range(2)],
            dit=lambda: integrate(model, *r["integrate"], 16, starts=r["starts"]),
            decoder=lambda: codec.decode(noise),
        )
        for name, call in stages.items():
            total[name] = total.get(name, 0) + seconds_of(call, 3) / said
    return total


@torch.no_grad()
def schedule(form: str, work: Path) -> dict:
    """How far 7, 16 and 32 steps end from 128 steps: RMS over what the demo's DiT says, relative to the RMS of the
    latents."""
    model, _, requests = demo_requests()
    errors = {}
    for r in requests:
        def said(steps):
            return integrate(model, *r["integrate"], steps, starts=r["starts"])[:, -r["frames"] :]

        exact = said(128)
        for steps in (7, 16, 32):
            errors.setdefault(f"steps_{steps}", []).append(relative_rms(said(steps), exact))
    return {name: statistics.mean(values) for name, values in errors.items()}


def curves(form: str, work: Path) -> dict:
    """200 steps of the demo's VAE with discriminators from one seed, plain and fast: mean losses of 50 steps each."""
    prepare.main(["--out", str(work / "demo")])
    flags = [
        "--preset", "demo", "--data", work / "demo", "--steps", 200, "--encoder-steps", 0, "--adv-start", 0,
        "--log-every", 1, "--eval-every", 200,
    ]
    rows = plain.train([str(f) for f in [*flags, "--out", work / "plain"]], DEVICE)
    train_vae.main([str(f) for f in [*flags, "--out", work / "fast"]])
    fast = [
        dict(zip(("step", "loss", "mel"), line.split(",")))
        for line in (work / "fast" / "log.csv").read_text().splitlines()[1:]
    ]

    def block(rows, k, n):
        return float(np.mean([float(r[k]) for r in rows[n : n + 50]]))

    return {
        f"{k}_{name}_{n + 1}": block(r, k, n)
        for k in ("loss", "mel")
        for n in range(0, 200, 50)
        for name, r in (("plain", rows), ("fast", fast))
    }


def start(form: str, work: Path) -> dict:
    """Seconds from a training's start until the end of its first step, with the compiler's caches empty."""
    my_turn()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / f"cache-{form}")
    if form == "vae":
        script = train_vae
        size = ["--batch-seconds", 2, "--crop", 1, "--micro-batch", 2, "--compile"]
    else:
        script = train_tts
        size = ["--batch-seconds", 30, "--warmup", 0, "--asr", "none"]
        size += ["--no-compile" if form == "dit eager" else "--compile"]
    flags = [
        "--preset", "paper", "--data", work / "data", "--out", work / form, "--steps", 9, "--device", DEVICE.type,
        *size,
    ]
    begun = time.perf_counter()
    ended = []

    def update_ema(*args):
        ended.append(time.perf_counter())
        raise Enough

    script.update_ema = update_ema
    try:
        script.main([str(f) for f in flags])
    except Enough:
        return dict(start_seconds=ended[0] - begun)


def recipe(form: str, work: Path) -> dict:
    """The paper's two trainings as README gives them, on noise, for 20 steps (on a CPU two small ones): what their own
    logs say last."""
    my_turn()
    script = dict(vae=train_vae, tts=train_tts)[form]
    small = ["--batch-seconds", 4, "--micro-batch", 2] if form == "vae" else ["--batch-seconds", 30]
    more = ["--eval-clips", 1] if form == "vae" else ["--eval-sentences", 1, "--asr", "none", "--warmup", 1]
    flags = [
        "--preset", "paper", "--data", work / "data", "--out", work / form, *more,
        *(["--steps", 20] if GPU else ["--steps", 2, *small]),
    ]
    script.main([str(f) for f in [*flags, "--log-every", 1, "--device", DEVICE.type]])
    # the last one evaluates, too
    last = list(csv.DictReader(open(work / form / "log.csv", encoding="utf-8")))[-2 if GPU else -1]
    return {name: float(last[name]) for name in ("seconds", "audio", "memory", "mfu") if last[name]}


FORMS = dict(
    decoder=["plain", "eager", "compiled"], vae=["plain", "compiled"], dit=["eager", "compiled"], data=[""], ssl=[""],
    start=["vae", "dit", "dit eager"], recipe=["vae", "tts"],
    sampling=["1x32", "1x7", "32x32", "32x7"] if GPU else ["1x7"], demo=[""], schedule=[""], curves=[""],
)


def take_turns(what: str, folder: str) -> dict[str, dict]:
    """Run all forms of a measurement at once, of which one at a time works while the others wait in my_turn()."""
    children = {
        form: subprocess.Popen(
            [sys.executable, __file__, "--child", what, form, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=open(f"{folder}/{what}-{form}.err", "w"), text=True,
        )
        for form in FORMS[what]
    }

    def listen(form):
        for line in children[form].stdout:
            if "torch.compile cannot run" in line:
                sys.exit(f"{what} {form}: {line}")
            if line == "ready\n" or line.startswith("{"):
                return line
        sys.exit(f"{what} {form} failed:\n{Path(f'{folder}/{what}-{form}.err').read_text()[-2000:]}")

    try:
        said = {form: listen(form) for form in children}
        while "ready\n" in said.values():
            for form, child in children.items():
                if said[form] == "ready\n":
                    child.stdin.write("\n")
                    child.stdin.flush()
                    said[form] = listen(form)
    finally:  # when one has failed, the others would work on
        for child in children.values():
            child.kill()
    return {form: json.loads(line) for form, line in said.items()}


def main():
    if sys.argv[1:] != ["gpu"] and set(sys.argv[1:]) - set(FORMS):
        sys.exit(__doc__)
    name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    if GPU:
        name = torch.cuda.get_device_name()
    full, half = (matrix_rate(DEVICE, dtype) / 1e12 for dtype in (torch.float32, torch.bfloat16))
    print(f"torch {torch.__version__} on {name}; TFLOP/s of matrix products: float32 {full:.2f}, bfloat16 {half:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        noise_data(Path(folder) / "data", 2.0 if GPU else 0.1)
        wanted = (
            ["recipe", "decoder", "vae", "dit", "start", "sampling", "ssl"]
            if sys.argv[1:] == ["gpu"]
            else sys.argv[1:] or FORMS
        )
        for what in wanted:
            print(f"\n{what}: {globals()[what].__doc__}")
            results = take_turns(what, folder)
            for form, figures in results.items():
                ratio = (
                    f"  {results[FORMS[what][0]]['seconds'] / figures['seconds']:.2f} x"
                    if "seconds" in figures and what != "recipe"
                    else ""
                )
                print(f"  {form:<10}" + "  ".join(f"{k} {v:.4g}" for k, v in figures.items()) + ratio, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _, _, what, form, folder = sys.argv
        print("\n" + json.dumps(globals()[what](form, Path(folder))))
    else:
        main()
