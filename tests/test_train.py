"""Both trainings: exact resumption, any number of ranks, accumulation, data that is a pure function of the step, bad
input."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TIMES, TTS, VAE, rows, torchrun
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

import plain
import prepare
import train_tts
import train_vae
from model import (
    PRESETS, DiT, DiTConfig, MelDistance, SemanticVAE, VAEConfig, flow_matching_loss, kl_loss, sample, stft_distance,
    text_index,
)
from prepare import Data
from train_tts import MicroBatches, Utterances
from train_vae import Crops, Discriminators


EARLY = dict(encoder_steps=2, encoder_batch_seconds=2.4)  # 6 crops, where the decoder's steps have 4


@pytest.mark.parametrize(
    "train, args, changes, more, dies_at, bf16",
    [
        (train_vae, VAE, dict(micro_batch=2, adv_start=0, crop=0.2, batch_seconds=0.8), [], 2, "--bf16"),
        # It dies before the turn, at it, behind it.
        (train_vae, VAE, EARLY | dict(micro_batch=2, adv_start=0, encoder_steps=3), [], 2, "--no-bf16"),
        (train_vae, VAE, EARLY | dict(micro_batch=2, adv_start=0), [], 2, "--no-bf16"),
        (train_vae, VAE, EARLY | dict(micro_batch=2, adv_start=0, encoder_steps=1), [], 3, "--no-bf16"),
        (train_tts, TTS, dict(micro_seconds=3), [], 2, "--no-bf16"),
        (train_tts, TTS, dict(micro_seconds=3, join=2), ["--align-hidden"], 2, "--bf16"),
    ],
)
def test_resumed_training_equals_straight_training(train, args, changes, more, dies_at, bf16, world, tmp_path):
    """4 steps equal 2 + resume + 2, bit for bit, with accumulation, EMA and (VAE) discriminators; log.csv has each row
    once, though the checkpoint lies between two of its lines."""
    changes = changes | dict(steps=4, eval_every=2, log_every=1 if bf16 == "--bf16" else 3)
    train.main(args(world, tmp_path / "straight", **changes) + [bf16, *more])
    # A run that dies while it saves step 4 (or 3, where the encoder's steps end), its last state that of step 2.
    real = prepare.write_atomic
    with pytest.MonkeyPatch.context() as patch:
        seen = []

        def dies_while_it_saves(path, write):
            if path.name == "state.pt" and seen.append(path) is None and len(seen) == dies_at:
                raise KeyboardInterrupt
            real(path, write)

        patch.setattr(prepare, "write_atomic", dies_while_it_saves)
        with pytest.raises(KeyboardInterrupt):
            train.main(args(world, tmp_path / "broken", **changes) + [bf16, *more])
    assert torch.load(tmp_path / "broken" / "state.pt", weights_only=True)["step"] == 2
    train.main(["--resume", "--out", str(tmp_path / "broken")])
    a, b = (load_file(tmp_path / run / "model.safetensors") for run in ("straight", "broken"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (torch.load(tmp_path / run / "state.pt", weights_only=True) for run in ("straight", "broken"))
    a, b = ([x for x in tree_leaves(state) if torch.is_tensor(x)] for state in (a, b))
    assert len(a) > 100 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    def clean(run):
        return [{k: v for k, v in row.items() if k not in TIMES} for row in rows(tmp_path / run)]

    # 2 and 4 by their checkpoints, 3 by its log line.
    assert clean("straight") == clean("broken") and [r["step"] for r in rows(tmp_path / "broken")] == list("1234")


def test_on_a_gpu_everything_is_on_the_gpu_and_losses_are_float32(monkeypatch):
    """The networks, losses and updates of both stages and the sampler in bfloat16 on a GPU that need not exist: tensors
    there have sizes and types, no values, and meeting one of the CPU is an error. (Their backward passes do need
    one.)"""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    device = torch.device("cuda", 0)

    def autocast():
        return torch.autocast("cuda", torch.bfloat16)

    def move(module):
        for m in module.modules():
            m._parameters.update({
                k: torch.nn.Parameter(torch.empty(p.shape, device=device))
                for k, p in m._parameters.items()
                if p is not None
            })
            m._buffers.update({k: torch.empty(b.shape, dtype=b.dtype, device=device) for k, b in m._buffers.items()})
        return module

    def update(module):
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        norm, skipped = prepare.clipped_step(optimizer, module.parameters(), 1)
        run = object.__new__(prepare.Run)
        run.means = {}
        run.scores = {}
        run.streak = torch.zeros((), device=device)
        run.longest = torch.zeros((), device=device)
        run.note(grad=norm, skipped=skipped, lr=0.1)
        assert run.means.keys() == {"grad", "skipped"} and run.scores == dict(lr=0.1) and run.longest.device == device

    def networks(align):
        return (
            SemanticVAE(VAEConfig(**PRESETS["demo"]["vae"] | dict(ssl_dim=96, align=align))),
            Discriminators(0.125),
            MelDistance(16000),
        )

    dit = DiT(DiTConfig(**PRESETS["paper"]["dit"]))
    both = [networks("down"), networks("up")]
    losses = {}
    reader = train_vae.LatentReader(both[0][0].config, 96)
    small = DiT(DiTConfig(**PRESETS["demo"]["dit"]))
    objective = train_tts.Objective(small)
    averages = [copy.deepcopy(vae) for vae, *_ in both]
    with FakeTensorMode():
        with pytest.raises(RuntimeError, match="device"):
            torch.zeros(1, device=device) + torch.zeros(1)
        with autocast():
            assert torch.nn.functional.linear(*torch.zeros(2, 1, 1, device=device)).dtype == torch.bfloat16
        for (vae, discriminators, mel), ema in zip(both, averages):
            vae, discriminators, mel, ema = map(move, (vae, discriminators, mel, ema))
            wave = torch.zeros(2, 9600, device=device)
            valid = torch.ones(2, 24, dtype=torch.bool, device=device)
            with autocast():
                again, z, mean, logvar, aligned = vae(
                    wave,
                    torch.zeros(2, 24, vae.config.latent_dim, device=device),
                    torch.zeros(2, 30, 96, device=device),
                )
                maps = discriminators(torch.cat([again, wave]))
                losses["adv"], losses["feature"] = train_vae.generator_losses(
                    discriminators(again), discriminators(wave)
                )
            losses["disc"] = train_vae.discriminator_loss(
                *([[m.chunk(2)[side] for m in layers] for layers in maps] for side in (0, 1))
            )
            losses["align"] = vae.projectors.loss(z, aligned, valid)
            losses |= dict(
                mel=mel(again, wave),
                stft=stft_distance(again, wave),
                kl=kl_loss(mean, logvar),
                decoded=vae.decode(vae.encode(wave)[0], 9600),
            )
            update(vae)
            update(discriminators)
            prepare.update_ema(ema, vae, 0.9, 3)
        first = train_vae.EncoderFirst(both[0][0], move(reader))
        with autocast():
            told, *_ = first(wave, torch.zeros(2, 24, 32, device=device), torch.zeros(2, 30, 96, device=device))
        losses |= {f"told {name}": value for name, value in told.items()}
        dit = move(dit)
        x = torch.zeros(2, 40, dit.config.latent_dim, device=device)
        text = torch.zeros(2, 20, dtype=torch.long, device=device)
        lengths = torch.full((2,), 40, device=device)
        no = torch.zeros(2, dtype=torch.bool, device=device)
        with autocast():
            losses["flow"], _ = flow_matching_loss(
                dit, x, x, torch.zeros(2, device=device), torch.ones(2, 40, dtype=torch.bool, device=device), text,
                lengths, no, no,
            )
            losses["sample"] = dit.destandardize(sample(dit, x, x, lengths // 2, text, lengths, steps=2))
            starts = torch.zeros(2, 20, device=device)
            span = torch.ones(2, 40, dtype=torch.bool, device=device)
            losses["objective"] = move(objective)(
                x, x, torch.zeros(2, device=device), span, text, lengths, no, no, starts
            )
            losses["aligned"] = sample(small, x, x, lengths // 2, text, lengths, steps=2, starts=starts)
        update(dit)
        update(objective)
        assert {name: (v.dtype, v.device) for name, v in losses.items()} == dict.fromkeys(
            losses, (torch.float32, device)
        )


@pytest.mark.parametrize("train, args", [(train_vae, VAE), (train_tts, TTS)])
def test_bfloat16_follows_float32(train, args, world, tmp_path):
    train.main(args(world, tmp_path / "float32"))
    train.main([*args(world, tmp_path / "bfloat16"), "--bf16"])
    a, b = ([float(r["loss"]) for r in rows(tmp_path / run)] for run in ("float32", "bfloat16"))
    assert a == pytest.approx(b, rel=0.05)
    exact, rounded = (load_file(tmp_path / run / "model.safetensors") for run in ("float32", "bfloat16"))
    assert all(w.dtype == torch.float32 for w in rounded.values()) and any(
        not torch.equal(exact[k], rounded[k]) for k in exact
    )


@pytest.mark.parametrize(
    "script, args, changes, more",
    [
        ("train_vae.py", VAE, dict(adv_start=0, lr=5e-4), []),
        ("train_vae.py", VAE, EARLY | dict(adv_start=0, lr=5e-4, steps=4), []),
        ("train_tts.py", TTS, {}, []),
        ("train_tts.py", TTS, dict(join=2), ["--align-hidden"]),
    ],
)
def test_two_ranks_and_accumulation_equal_one(script, args, changes, more, world, tmp_path):
    """One rank, one rank with two micro-batches, and two ranks: the same losses and weights, to float tolerance."""
    train = train_vae if script == "train_vae.py" else train_tts
    near = 5e-2 if more else 2e-2  # HiddenAlignment's own loss depends on the micro-batch
    small = dict(micro_batch=2) if script == "train_vae.py" else dict(micro_seconds=3)
    train.main(args(world, tmp_path / "one", **changes) + more)
    train.main(args(world, tmp_path / "accumulated", **changes, **small) + more)
    torchrun(script, *args(world, tmp_path / "two", **changes), *more)
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for other in ("accumulated", "two"):
        for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / other), strict=True):
            for key in set(a) - TIMES:
                assert a[key] == b[key] or float(a[key]) == pytest.approx(float(b[key]), rel=near), (
                    other,
                    a["step"],
                    key,
                )
            assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=2e-3)
        found = load_file(tmp_path / other / "model.safetensors")
        # Adam's first steps have size lr: signs of tiny gradients may differ
        assert max((found[k] - expected[k]).abs().max().item() for k in expected) < 2.5e-3
        mean = sum((found[k] - expected[k]).abs().sum().item() for k in expected) / sum(
            v.numel() for v in expected.values()
        )
        assert mean < 1e-5, mean


def test_crops_are_a_pure_function_of_their_number_and_stay_inside_the_clip(world):
    data = Data(world.data, ("audio", "ssl"))
    config = VAEConfig(latent_dim=8)
    a, b = (Crops(data, config, 0.5, seed, data.meta["ssl"]) for seed in (3, 3))
    assert a.stride == 320 and a.frames == 20
    for k in (0, 5, 17, 40):
        x = a[k]
        y = b[k]
        assert all(torch.equal(x[name], y[name]) for name in x) and x["valid"].all()
        assert x["wave"].shape == (8000,) and x["noise"].shape == (20, 8) and x["features"].shape == (25, 32)
    assert sorted(a.clips[i] for i in a.order(0)) == a.clips and list(a.order(0)) != list(a.order(1))
    # The crop's features are those of the same moments: its place in the clip, found by its audio.
    clip = a.clips[a.order(0)[5]]
    whole = data.get("audio", clip)
    crop = a[5]
    start = next(k for k in range(0, len(whole) - 7999, 320) if torch.equal(whole[k : k + 8000], crop["wave"]))
    features = data.get("ssl", clip)[start // 320 : start // 320 + 25]
    assert torch.equal(crop["features"][: len(features)], features)
    long = Crops(data, config, 5.0, 3, data.meta["ssl"])[0]  # longer than the clip: silence behind it, marked as such
    assert not long["wave"][long["valid"].sum() * 400 :].any() and 30 < long["valid"].sum() < 100


def test_steps_share_out_every_clip_once_an_epoch(world):
    data = Data(world.data, ("latents",))
    for join in (1, 2):
        examples = Utterances(data, "train", 3, join, seed=1)
        epoch = [run for step in range(examples.groups) for run in examples.step(step)]
        assert sorted(i for run in epoch for i in run) == examples.clips
        assert all(len({data.clips[i]["speaker"] for i in run}) == 1 and len(run) <= join for run in epoch)
        assert examples.step(0) == Utterances(data, "train", 3, join, seed=1).step(0)
        examples = Utterances(data, "train", 6, join, seed=1)
        for world_size in (1, 2):  # the ranks' parts make up the step
            parts = [p for rank in range(world_size) for p in MicroBatches(examples, 1.5, rank, world_size).parts(0)]
            assert [run for part in parts for run in part] == examples.step(0)


def test_draws_follow_the_paper(world):
    data = Data(world.data, ("latents",))
    examples = Utterances(data, "train", 3, 1, seed=1)
    items = [examples[(step, [i])] for step in range(150) for i in examples.clips]
    share = np.mean([float(i["drop_text"]) for i in items])
    assert 0.15 < share < 0.25 and all(i["drop_prompt"] or not i["drop_text"] for i in items)
    assert abs(np.mean([float(i["drop_prompt"]) for i in items]) - (0.2 + 0.8 * 0.3)) < 0.05
    spans = np.array([i["span"].float().mean().item() for i in items])
    assert 0.65 < spans.min() < 0.75 and 0.95 < spans.max() <= 1 and 0.82 < spans.mean() < 0.87
    assert all(i["span"].int().diff().abs().sum() <= 2 for i in items)  # one contiguous span
    assert abs(np.mean([i["t"].item() for i in items]) - 0.5) < 0.05


@pytest.mark.parametrize("silent", [True, False])
def test_losses_are_finite_with_finite_gradients_even_on_digital_silence(silent):
    torch.manual_seed(0)
    real = torch.zeros(2, 8000) if silent else torch.randn(2, 8000)
    fake = torch.zeros(2, 8000, requires_grad=True)
    discriminators = Discriminators(0.0625)
    adversarial, matching = train_vae.generator_losses(discriminators(fake), discriminators(real))
    loss = MelDistance(16000)(fake, real) + adversarial + matching
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(fake.grad).all()


def test_training_lowers_its_losses(world, tmp_path):
    """A few dozen steps on six clips: the mel distance, what the head reads from the latents, and the losses of flow
    matching, durations and hidden states all fall."""
    train_vae.main(VAE(world, tmp_path / "vae", steps=20, eval_every=20, log_every=5, adv_weight=0, lr=1e-3))
    mel = [float(r["mel"]) for r in rows(tmp_path / "vae")]
    assert mel[-1] < 0.8 * mel[0], mel
    early = dict(steps=21, encoder_steps=20, lr=1e-2, eval_every=20, log_every=5)
    train_vae.main(VAE(world, tmp_path / "early", **early))
    for term, factor in (("mel", 0.8), ("teacher", 0.98)):
        told = [float(r[term]) for r in rows(tmp_path / "early")[:-1]]  # the last is the decoder's
        assert told[-1] < factor * told[0], (term, told)
    train_tts.main(
        TTS(world, tmp_path / "tts", steps=50, eval_every=10, eval_sentences=0, log_every=5, warmup=3, lr=2e-3)
        + ["--align-hidden"]
    )
    valid = [float(r["valid_loss"]) for r in rows(tmp_path / "tts") if r["valid_loss"]]
    assert len(valid) == 5 and valid[-1] < 0.995 * valid[0], valid
    for term in ("durations", "hidden"):
        told = [float(r[term]) for r in rows(tmp_path / "tts")]
        assert told[-1] < 0.95 * told[0], (term, told)


# ----------------------------------------------------------------------------- the encoder first, then the decoder


def test_the_encoder_learns_alone_then_stays_while_the_decoder_learns(world, tmp_path):
    """By what each evaluation keeps: before the turn the decoder's weights stay the same, behind it the latents' hash,
    and the decoder's average begins anew. The log has each phase's own terms."""
    changes = EARLY | dict(steps=4, eval_every=1, keep=4, adv_start=0, lr=1e-2, encoder_lr=0.5)
    train_vae.main(VAE(world, tmp_path, **changes))
    kept = sorted(tmp_path.glob("step*"))
    hashes = [SemanticVAE.from_pretrained(folder).latents_hash() for folder in kept]
    assert len(kept) == 4 and hashes[0] != hashes[1] and set(hashes[1:]) == {hashes[1]}
    weights = [load_file(folder / "model.safetensors") for folder in kept]
    decoders = [torch.cat([v.flatten() for k, v in w.items() if k.startswith("decoder.")]) for w in weights]
    assert [torch.equal(a, b) for a, b in zip(decoders, decoders[1:])] == [True, False, False]
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in kept]
    same = [all(torch.equal(s["ema"][k], s["vae"][k]) for k in s["vae"] if k.startswith("decoder.")) for s in states]
    assert same == [True, True, True, False]  # a step's average is that step's weights
    rates = [group["lr"] for group in states[0]["optimizer"]["param_groups"]]
    assert rates[1] == 0.5 * rates[0]
    for row in rows(tmp_path):
        filled = {k for k, v in row.items() if v}
        early = int(row["step"]) <= 2
        both = {"step", "loss", "mel", "kl", "grad", "skipped", "lr", "seconds", "audio", "valid_mel"}
        late = {"wave", "adv", "feature", "disc", "grad_d", "valid_stft"}
        assert filled == both | ({"teacher", "align"} if early else late)


@pytest.mark.parametrize("more", [["--teacher-weight", "0"], ["--align-weight", "0"], ["--align", "up"]])
def test_the_encoder_first_with_other_targets(more, world, tmp_path):
    train_vae.main(VAE(world, tmp_path, **EARLY | dict(encoder_steps=1), eval_every=1) + more)
    first, second = rows(tmp_path)
    assert (first["teacher"] == "") == ("0" in more) and (first["align"] == "") == (more[0] == "--align-weight")
    assert float(first["mel"]) > 0 and float(second["wave"]) > 0 and second["teacher"] == second["align"] == ""


def test_the_mel_baseline_has_no_encoder_to_learn_first(world, tmp_path):
    train_vae.main(VAE(world, tmp_path, **EARLY, latent_dim=20) + ["--mel"])
    assert all(float(r["wave"]) > 0 and r["teacher"] == "" for r in rows(tmp_path))


def test_what_ranks_cannot_share_is_named(world, tmp_path, monkeypatch, fails):
    """The flag that is at fault, not the other."""
    monkeypatch.setattr(train_vae, "start_ranks", lambda *args: (0, 2, torch.device("cpu")))
    monkeypatch.setattr(prepare.dist, "new_group", lambda **options: None)
    fails(train_vae.main, VAE(world, tmp_path / "a", batch_seconds=1.2), "--batch-seconds 1.2 is 3 crops")
    odd = EARLY | dict(encoder_batch_seconds=2, steps=3)
    fails(train_vae.main, VAE(world, tmp_path / "b", **odd), "--encoder-batch-seconds 2", "5 crops")


def test_a_decoder_that_would_learn_nothing_is_refused(world, tmp_path, fails):
    fails(train_vae.main, VAE(world, tmp_path / "a", **EARLY), "--steps 2 ends within --encoder-steps 2")


# ------------------------------------------------------------------------------------------ text where it is said


def test_joined_clips_have_each_its_own_text(world):
    """Bytes start in order, the joining space takes no time, and each clip's frames get bytes of its own text alone."""
    data = Data(world.data, ("latents", "starts"))
    examples = Utterances(data, "train", 6, 2, seed=1)
    runs = examples.step(0)
    items = [examples[(0, run)] for run in runs]
    assert max(map(len, runs)) == 2
    batch = train_tts.collate(items)
    text = batch["text"]
    lengths = batch["lengths"]
    starts = batch["starts"]
    index = text_index("aligned", starts, (text >= 0).sum(1), lengths, int(lengths.max()))
    assert "features" not in batch and starts.shape == text.shape
    for run, item, row in zip(runs, items, index):
        assert len(item["starts"]) == len(item["text"]) and (item["starts"].diff() >= 0).all()
        byte = frame = 0
        for clip in run:
            size = len(data.clips[clip]["text"].encode())
            frames = int(examples.frames[clip])
            own = row[frame : frame + frames]
            assert own[0] == byte and byte <= own.min() and own.max() == byte + size - 1
            seconds = data.get("starts", clip)
            assert torch.allclose(item["starts"][byte : byte + size], frame + 40 * seconds)
            byte = byte + size + 1
            frame = frame + frames
            assert byte > len(item["text"]) or item["starts"][byte - 1] == item["starts"][byte] == frame


def test_more_bytes_than_frames_are_cut_not_fatal():
    """Scripts of three bytes a letter, spoken fast, make more bytes than frames: such a clip has a loss in a batch."""
    torch.manual_seed(0)
    config = DiTConfig(latent_dim=4, width=16, depth=1, heads=2, text_dim=8, text_layers=1, text_place="aligned")
    objective = train_tts.Objective(DiT(config))
    for frames in (8, 30):
        x = torch.randn(2, frames, 4)
        keep = torch.zeros(2, dtype=torch.bool)
        span = torch.ones(2, frames, dtype=torch.bool)
        lengths = torch.tensor([frames, 8])
        starts = torch.linspace(0, 7.5, 12).expand(2, -1).contiguous()
        losses = objective(x, x, torch.rand(2), span, torch.randint(0, 256, (2, 12)), lengths, keep, keep, starts)
        assert losses.isfinite().all()


def test_hidden_alignment_leaves_no_trace_in_the_model(world, tmp_path):
    """Its losses are in the log, its heads in the state, and the model that is saved is like any other."""
    train_tts.main(TTS(world, tmp_path / "hidden", text_place="left") + ["--align-hidden"])
    train_tts.main(TTS(world, tmp_path / "none", text_place="left"))
    assert all(float(r["hidden"]) > 0 and float(r["durations"]) == 0 for r in rows(tmp_path / "hidden"))
    assert all(float(r["hidden"]) == 0 for r in rows(tmp_path / "none"))
    hidden, none = (load_file(tmp_path / run / "model.safetensors") for run in ("hidden", "none"))
    assert hidden.keys() == none.keys() and any(not torch.equal(hidden[k], none[k]) for k in hidden)
    heads = torch.load(tmp_path / "hidden" / "state.pt", weights_only=True)["hidden"]
    assert {k.split(".")[0] for k in heads} == {"text_head", "ssl_head"}


def test_when_it_became_intelligible_is_logged_once_and_survives_a_resume(world, tmp_path, monkeypatch, capsys):
    """By a clock that goes on a minute whenever it is read, and word error rates of 0.6, 0.5, 0.2, 0.1 and, resumed,
    0.9."""

    class Clock:
        now = 0

        def time(self):
            self.now += 60
            return self.now

    rates = iter([0.6, 0.5, 0.2, 0.1, 0.9])
    monkeypatch.setattr(train_tts, "error_rates", lambda texts, heard: dict(cer=0.4, wer=next(rates)))
    clock = Clock()
    monkeypatch.setattr(train_tts, "time", clock)
    monkeypatch.setattr(prepare, "time", clock)
    train_tts.main(TTS(world, tmp_path, steps=4, eval_every=1, asr=world.ssl))
    before = rows(tmp_path)
    said = capsys.readouterr().out
    (when,) = re.findall(r"word errors after (\S+) minutes of training", said)
    assert [float(r["intelligible"] or 0) for r in before] == [0, 0, float(when), float(when)]
    # a row is written behind its evaluation
    assert float(before[1]["seconds"]) / 60 < float(when) < float(before[2]["seconds"]) / 60
    clock.now = 0
    train_tts.main(["--resume", "--out", str(tmp_path), "--steps", "5"])
    last = rows(tmp_path)[-1]
    seconds = [float(r["seconds"]) for r in rows(tmp_path)]
    assert last["wer"] == "0.9" and last["intelligible"] == before[3]["intelligible"]
    assert "intelligible:" not in capsys.readouterr().out
    assert all(a < b for a, b in zip(seconds, seconds[1:]))  # counted on, not anew
    assert torch.load(tmp_path / "state.pt", weights_only=True)["kept"] == dict(intelligible=float(when))


def test_vanilla_and_other_widths_are_one_flag_each(world, tmp_path):
    train_vae.main(VAE(world, tmp_path / "vanilla", align_weight=0, latent_dim=8, steps=1, eval_every=1))
    vae = SemanticVAE.from_pretrained(tmp_path / "vanilla")
    assert vae.projectors is None and vae.config.latent_dim == 8 and rows(tmp_path / "vanilla")[0]["align"] == ""


def test_losses_and_gradients_equal_the_plain_form(world, tmp_path):
    """Stencils, shared passes and missing gradients change nothing: four steps against plain.py, weights moving all the
    while.

    Adam's first steps have the size of the learning rate whatever the gradient's: it must be small for rounding to stay
    small."""
    args = VAE(world, tmp_path, steps=4, eval_every=9, adv_start=0, micro_batch=4, lr=1e-4)
    expected = plain.train(args)
    train_vae.main(args)
    for row, wanted in zip(rows(tmp_path), expected, strict=True):
        for key in ("loss", "mel", "adv", "feature", "kl", "align", "disc", "grad"):
            # the log has four digits
            assert float(row[key]) == pytest.approx(wanted[key], rel=1e-3, abs=1e-4), (row["step"], key)


@pytest.mark.parametrize("train, args, array", [(train_vae, VAE, "ssl"), (train_tts, TTS, "latents")])
def test_a_poisoned_clip_is_left_out_and_counted(train, args, array, world, tmp_path, fails):
    """The updates that meet it are left out, weights and moments alike, and their share is logged. Nothing but poison
    ends the run, and it saves nothing."""
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    stored = Data(data, (array,))
    poisoned = stored.split("train")[0]
    values = np.memmap(next(data.glob(f"{array}*.bin")), "float16", "r+")
    width = int(np.prod(stored.meta[array]["shape"][1:]))
    a, b = stored.offsets[array][poisoned : poisoned + 2]
    values[a * width : b * width] = np.nan
    settings = dict(data=data, adv_weight=0, micro_batch=1) if train is train_vae else dict(data=data, batch_seconds=3)
    train.main(args(world, tmp_path / "run", steps=8, eval_every=8, log_every=4, **settings))
    first, *others = rows(tmp_path / "run")
    shares = [float(r["skipped"]) for r in (first, *others)]  # of 1, 3 and 4 steps
    if train is train_vae:
        config = SemanticVAE.from_pretrained(tmp_path / "run").config
        crops = Crops(Data(data, ("audio", "ssl")), config, 0.4, 0, stored.meta["ssl"])
        order = [crops.clips[i] for epoch in range(6) for i in crops.order(epoch)]
        met = [poisoned in order[4 * step : 4 * step + 4] for step in range(8)]
    else:
        examples = Utterances(Data(data, ("latents", "starts")), "train", 3, 1, 0)
        met = [any(poisoned in run for run in examples.step(step)) for step in range(8)]
    assert 0 < sum(met) < 8
    assert shares == pytest.approx([float(met[0]), np.mean(met[1:4]), np.mean(met[4:])], abs=1e-3)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    moments = [v for entry in state["optimizer"]["state"].values() for v in entry.values()]
    assert all(torch.isfinite(v).all() for v in [*load_file(tmp_path / "run" / "model.safetensors").values(), *moments])
    values[:] = np.nan
    words = ("step 6", "five updates in a row", "--lr") if train is train_vae else ("do not fit their statistics",)
    fails(train.main, args(world, tmp_path / "lost", steps=8, eval_every=9, log_every=3, **settings), *words)
    assert not (tmp_path / "lost" / "state.pt").exists()


def test_fine_tuning_starts_from_the_given_weights(world, tmp_path, capsys, fails):
    train_vae.main(VAE(world, tmp_path / "vae", steps=1, eval_every=1, lr=1e-9) + ["--init", str(world.vae)])
    a = load_file(world.vae / "model.safetensors")
    b = load_file(tmp_path / "vae" / "model.safetensors")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-6
    # needs no features
    train_vae.main(VAE(world, tmp_path / "audio", steps=1, eval_every=1, align_weight=0) + ["--init", str(world.vae)])
    c = load_file(tmp_path / "audio" / "model.safetensors")
    assert all(torch.equal(a[k], c[k]) == k.startswith("projectors.") for k in a if k.endswith("weight"))
    fails(
        train_vae.main,
        VAE(world, tmp_path / "wide", latent_dim=7) + ["--init", str(world.vae)],
        "has latents of 32 dimensions: drop --latent-dim 7",
    )
    train_tts.main(TTS(world, tmp_path / "tts", steps=1, lr=1e-9) + ["--init", str(world.tts)])
    a = load_file(world.tts / "model.safetensors")
    b = load_file(tmp_path / "tts" / "model.safetensors")
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-6
    config = json.loads((world.tts / "config.json").read_text())
    for name, value in (("vae_hash", "0123"), ("hop", 320)):
        other = tmp_path / name
        shutil.copytree(world.tts, other)
        (other / "config.json").write_text(json.dumps(config | {"config": config["config"] | {name: value}}))
    scaled = shutil.copytree(world.data, tmp_path / "data")  # the latents of another choice of clips: their statistics
    meta = json.loads((scaled / "meta.json").read_text())
    (latents,) = (entry for name, entry in meta.items() if name.startswith("latents-"))
    latents["std"] = [1.1 * value for value in latents["std"]]
    (scaled / "meta.json").write_text(json.dumps(meta))
    train_tts.main(TTS(world, tmp_path / "scaled", data=scaled, steps=1) + ["--init", str(world.tts)])
    assert torch.equal(load_file(tmp_path / "scaled" / "model.safetensors")["latent_std"], a["latent_std"])
    train_tts.main(TTS(world, tmp_path / "moved", steps=2) + ["--init", str(tmp_path / "vae_hash")])
    assert (
        "must learn those of" in capsys.readouterr().out
        and DiT.from_pretrained(tmp_path / "moved").config == DiT.from_pretrained(world.tts).config
    )
    fails(
        train_tts.main,
        TTS(world, tmp_path / "refused") + ["--init", str(tmp_path / "hop")],
        "was trained with hop 320",
        "has 400",
    )


def test_a_decoder_trained_alone_keeps_the_latents(world, tmp_path):
    """Also where the preset has the encoder learn first, and with the negative zeros of weights stored in float16."""
    before = SemanticVAE.from_pretrained(world.vae)
    before.fc_mu.bias.data[0] = -0.0
    before.save_pretrained(tmp_path / "init")
    train_vae.main(
        VAE(world, tmp_path, **EARLY | dict(steps=3), eval_every=3, lr=1e-3)
        + ["--init", str(tmp_path / "init"), "--encoder-lr", "0"]
    )
    after = SemanticVAE.from_pretrained(tmp_path)
    assert after.latents_hash() == before.latents_hash() and after.content_hash() != before.content_hash()
    assert all(
        (p != q).any()
        for (name, p), q in zip(before.named_parameters(), after.parameters())
        if name.startswith("decoder.ups")
    )
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    made = []
    for vae in (tmp_path / "init", tmp_path):
        prepare.main(["--out", str(data), "--vae", str(vae)])
        assert Data(data, ("latents",)).meta["latents"]["vae"] == str(vae)
        made.append({path: path.stat().st_mtime_ns for path in data.glob("latents-*.bin")})
    assert made[0] == made[1]


def test_stages_that_do_not_fit_are_refused_and_both_named(world, tmp_path, fails):
    """Sample rate and text; widths, hops, teachers and hashes are refused in the tests around this one."""
    other = VAEConfig(sample_rate=24000, encoder_dim=4, latent_dim=8, decoder_dim=64, resblock_kernels=(3,), ssl_dim=32)
    SemanticVAE(other).save_pretrained(tmp_path / "vae24")
    shutil.copytree(world.data, tmp_path / "data")
    fails(
        prepare.main,
        ["--out", tmp_path / "data", "--vae", tmp_path / "vae24"],
        "vae24 works at 24000 Hz",
        "data holds 16000 Hz",
    )
    fails(
        train_vae.main,
        VAE(world, tmp_path / "run") + ["--init", str(tmp_path / "vae24")],
        "works at 24000 Hz",
        "holds 16000 Hz",
    )
    for name, value, own in (("text", "raw", "plain"), ("sample_rate", 8000, 16000)):
        shutil.copytree(world.tts, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config["config"][name] = value
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        fails(
            train_tts.main,
            TTS(world, tmp_path / "run") + ["--init", str(tmp_path / name)],
            f"was trained with {name} {value}",
            f"has {own}",
        )


def test_compile_that_cannot_run_says_so_and_goes_on(world, tmp_path, monkeypatch, capsys):
    def broken(module, **options):
        raise RuntimeError("Cannot find a working triton installation")

    monkeypatch.setattr(torch, "compile", broken)
    train_vae.main(VAE(world, tmp_path / "vae", steps=1, eval_every=1) + ["--compile"])
    out = capsys.readouterr().out
    assert (
        "torch.compile cannot run here (RuntimeError: Cannot find a working triton" in out
        and (tmp_path / "vae" / "model.safetensors").exists()
    )


@pytest.mark.parametrize("place, bf16", [("left", False), ("aligned", True)])
def test_compiled_dit_learns_from_every_length(place, bf16):
    """Its blocks really compiled, for all shapes at once: losses and gradients of two batches, of which the second is
    of another shape, are the eager ones; with aligned text the durations' too, and those of heads that read the states
    between blocks."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    aligned = place == "aligned"
    near = 3e-2 if bf16 else 1e-4
    dit = DiT(DiTConfig(latent_dim=4, width=16, depth=3, heads=2, text_dim=8, text_layers=1, text_place=place))
    for linear in (dit.proj_out, *(block.attn_norm.linear for block in dit.transformer_blocks)):
        torch.nn.init.normal_(linear.weight, std=0.3)  # 0 at first, and with it most gradients
    eager = train_tts.Objective(dit, train_tts.HiddenAlignment(dit.config, 6) if aligned else None)
    fast = copy.deepcopy(eager)
    for block in fast.dit.transformer_blocks:
        block.compile(dynamic=True)
    for b, n in ((2, 50), (3, 41)):
        x = torch.randn(b, n, 4)
        noise = torch.randn(b, n, 4)
        keep = torch.zeros(b, dtype=torch.bool)
        lengths = torch.tensor([n, *[n - 7] * (b - 1)])
        span = torch.ones(b, n, dtype=torch.bool)
        starts = (torch.rand(b, 20) * (n - 7)).sort().values if aligned else None
        batch = (
            x, noise, torch.rand(b), span, torch.randint(0, 256, (b, 20)), lengths, keep, keep, starts,
            torch.randn(b, n, 6),
        )
        results = []
        for objective in (eager, fast):
            objective.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                losses = objective(*batch)
            losses.sum().backward()
            results.append([losses.detach(), *(p.grad.clone() for p in objective.parameters() if p.grad is not None)])
        assert len(results[0]) == len(results[1]) and (results[0][0] > 0).tolist() == [True, aligned, aligned]
        assert all(torch.allclose(a, b, rtol=near, atol=near * b.abs().max().item()) for a, b in zip(*results))


@pytest.mark.parametrize("part", ["vae", "encoder first", "discriminators", "dit"])
def test_compiles_whole_and_once(part, world, tmp_path, monkeypatch, capsys):
    """No graph breaks, one graph a way of calling, however many steps. Counted where torch.compile traces: the rest of
    the compiler is left out, and of networks that repeat a form all but one or two of it."""
    trace = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: trace(module, backend="eager", **options))
    counters = torch._dynamo.utils.counters

    torch._dynamo.reset()
    counters.clear()
    if part in ("vae", "encoder first"):
        short = dict(encoder_rates=(20, 20), decoder_rates=(20, 20), decoder_kernels=(40, 40))
        monkeypatch.setitem(PRESETS["demo"], "vae", PRESETS["demo"]["vae"] | short)
        early = EARLY if part == "encoder first" else {}
        train_vae.main(VAE(world, tmp_path, steps=4, adv_weight=0, eval_every=2, **early) + ["--compile"])
    elif part == "dit":
        train_tts.main(TTS(world, tmp_path, steps=6, eval_every=3) + ["--compile"])
    else:  # which train_vae.py compiles on a GPU only: as its two steps call them
        discriminators = Discriminators(0.0625)
        discriminators.discriminators = discriminators.discriminators[4:6]  # one of either kind
        wave = torch.randn(2, 4000)
        fast = prepare.compiled(discriminators, True, torch.cat([wave, wave]))
        for _ in range(3):
            fast(torch.cat([wave, wave]))
            discriminators.requires_grad_(False)
            with torch.no_grad():
                fast(wave)
            fast(wave.clone().requires_grad_())
            discriminators.requires_grad_(True)
    assert not counters["graph_break"], counters["graph_break"]
    assert "torch.compile cannot run" not in capsys.readouterr().out
    assert counters["stats"]["unique_graphs"] == {"discriminators": 3, "encoder first": 2}.get(part, 1)  # one a phase


def test_paper_presets_take_a_step(world, tmp_path):
    """The full-size networks, one update on a tiny batch; the full-size discriminators, by their number of weights."""
    train_vae.main(
        VAE(
            world, tmp_path / "vae", preset="paper", device="cpu", batch_seconds=0.2, crop=0.2, steps=1, eval_every=1,
            adv_start=0, eval_clips=1,
        )
    )
    vae = SemanticVAE.from_pretrained(tmp_path / "vae")
    assert vae.config == VAEConfig(ssl_dim=32)  # the test's teacher is narrower than WavLM-Large
    assert sum(p.numel() for p in Discriminators().parameters()) == sum(
        np.prod(s)
        for s in json.loads((Path(__file__).parent / "golden" / "losses.json").read_text())["state_dict"].values()
    )
    train_tts.main(
        TTS(
            world, tmp_path / "tts", preset="paper", device="cpu", batch_seconds=3, steps=1, eval_every=1,
            eval_sentences=1,
        )
    )
    dit = DiT.from_pretrained(tmp_path / "tts")
    assert (dit.config.width, dit.config.depth, dit.config.heads, dit.config.text_dim, dit.config.text_place) == (
        768, 18, 12, 512, "left",
    )


def test_bad_input(world, tmp_path, fails):
    out = ["--out", tmp_path / "out", "--preset", "demo"]
    with pytest.raises(SystemExit) as caught:
        train_vae.main(["--preset", "gigantic"])
    assert caught.value.code == 2
    fails(train_vae.main, ["--data", tmp_path, *out], "is not a prepared data folder", "prepare.py")
    fails(train_vae.main, ["--data", world.data, "--out", world.vae], "already holds a run", "--resume")
    fails(train_vae.main, [*out, "--resume"], "holds no run to resume")
    fails(train_tts.main, ["--data", world.data, "--out", world.tts], "already holds a run", "--resume")
    fails(
        train_tts.main,
        ["--data", world.data, *out, "--batch-seconds", "1"],
        "--batch-seconds 1.0 is below the longest, ",
    )

    copy = tmp_path / "copy"
    shutil.copytree(world.data, copy)
    index = (copy / "index.tsv").read_text()
    (copy / "index.tsv").write_text(index.replace("\tvalid\t", "\ttrain\t"))
    fails(train_vae.main, ["--data", copy, *out], "holds 9 training and 0 validation clips")
    (copy / "index.tsv").write_text(index)
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "ssl.bin").write_bytes((copy / "ssl.bin").read_bytes()[:-2])
    fails(train_vae.main, ["--data", copy, *out], "ssl.bin has", "bytes, expected", "prepare it again")
    (copy / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "ssl"}))
    fails(train_vae.main, ["--data", copy, *out], "holds no ssl", "--ssl MODEL")
    (copy / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if not k.startswith("latents")}))
    fails(train_tts.main, ["--data", copy, *out], "holds no latents", "--vae RUN")
    (copy / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "starts"}))
    fails(train_tts.main, ["--data", copy, *out], "holds no starts", "--aligner MODEL")
    even = ["--init", world.tts, "--text-place", "even"]
    fails(train_tts.main, ["--data", copy, *out, *even], "placed aligned, not even")
    name = next(name for name in meta if name.startswith("latents"))
    (copy / "meta.json").write_text(json.dumps(meta | {name: meta[name] | {"vae_hash": "0123"}}))
    fails(train_tts.main, ["--data", copy, *out], "come from 0123", "prepare.py")
    (copy / "meta.json").write_text(json.dumps(meta | {name: meta[name] | {"std": [1e-3] * 32}}))
    fails(train_tts.main, ["--data", copy, *out], "do not fit their statistics")

    shutil.copytree(world.vae, tmp_path / "vae")
    whole = (tmp_path / "vae" / "state.pt").read_bytes()
    (tmp_path / "vae" / "state.pt").write_bytes(whole[: len(whole) // 2])
    fails(train_vae.main, ["--resume", "--out", tmp_path / "vae"], "cannot resume from")
    assert (tmp_path / "vae" / "state.pt").read_bytes() == whole[: len(whole) // 2]
