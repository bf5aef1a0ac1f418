"""Every module, loss and sampler step against activations of the authors' code.

tests/golden holds, for each case, a json (configuration, noise inputs, the reference's parameter names and shapes) and
the outputs. Weights are made by fill.py from the names, so nothing here knows a name or a size that the json does not.
The environment variable GOLDEN names another folder of cases. Largest error allowed: 1e-4, relative on losses."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import evaluate
import train_vae
from model import DiT, DiTConfig, MelDistance, SemanticVAE, flow_matching_loss, kl_loss, lowpass, sample, stft_distance

GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).parent / "golden"))
spec = importlib.util.spec_from_file_location("fill", GOLDEN / "fill.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


def case(name):
    """(json, noise inputs, expected outputs, reference weights) of a case; names in `inputs` lose the case's prefix."""
    info = json.loads((GOLDEN / f"{name}.json").read_text())
    inputs = {
        k.split(".", 1)[1]: reference.signal(v["signal"], *v["shape"], scale=v["scale"])
        for k, v in info["inputs"].items()
    }
    weights = {k: reference.fill(info["weights"] + k, shape) for k, shape in info["state_dict"].items()}
    return info, inputs, load_file(GOLDEN / f"{name}.safetensors"), weights


def load(module, weights, computed=()):
    """Load the reference's weights; only the names in `computed` may stand on one side alone."""
    own = module.state_dict()
    alone = {k.rsplit(".", 1)[-1] for k in own.keys() ^ weights.keys()}
    assert alone <= set(computed), f"names differ: {alone}"
    module.load_state_dict({**own, **{k: v for k, v in weights.items() if k in own}})
    return module.eval()


def close(found, expected, name, relative=False):
    assert found.shape == expected.shape, f"{name}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    error = (found - expected).abs()
    error = (error / expected.abs() if relative else error).max().item()
    print(f"{name}: largest error {error:.1e}")
    assert error <= 1e-4, f"{name}: largest error {error:.1e}"


@pytest.mark.parametrize("name", ["vae_tiny", "vae_full"])
@torch.no_grad()
def test_vae(name, tmp_path):
    info, inputs, expected, weights = case(name)
    # Through the loader of the authors' release, so that it is proven too. Buffers keep their computed values.
    computed = {"filter": lowpass(), "zero_k_bias": torch.zeros(info["latent_dim"])}
    weights = {k: computed.get(k.rsplit(".", 1)[-1], v) for k, v in weights.items()}
    (tmp_path / "dac").mkdir()
    (tmp_path / "metainfo.json").write_text("{}")
    ema = {f"ema_model.{k}": v for k, v in weights.items()} | {"initted": torch.tensor(True), "step": torch.tensor(1)}
    torch.save(ema, tmp_path / "dac" / "ema_state_dict.pth")
    vae = SemanticVAE.from_pretrained(tmp_path)
    wave = inputs["wav"][:, 0]
    samples = inputs["wav"].shape[-1]

    mean, logvar = vae.encode(wave)
    close(mean, expected["mean"], "mean")
    close(logvar, expected["logvar"], "logvar")
    z = mean + inputs["eps"] * (0.5 * logvar).exp()
    close(z, expected["z"], "z")
    close(vae.decode(mean, samples)[:, None], expected["audio_from_mean"], "audio_from_mean")
    close(vae.decode(z, samples)[:, None], expected["audio_from_z"], "audio_from_z")
    _, target = vae.projectors(z, inputs["guidance"])
    close(target, expected["projected_guidance"], "projected_guidance")
    close(kl_loss(mean, logvar)[None], expected["kl"], "kl", relative=True)
    align = vae.projectors.loss(z, (z, target), torch.ones(z.shape[:2]))
    close(align[None], expected["align"], "align", relative=True)
    if "encoder_out" in expected:
        padded = torch.nn.functional.pad(wave, (0, -samples % vae.config.hop))
        close(vae.encoder(padded[:, None]), expected["encoder_out"], "encoder_out")
    if "loud" in inputs:
        close(vae.posterior(expected["loud_logvar_input"])[1], expected["loud_logvar_clamped"], "loud_logvar_clamped")
        close(vae.decode(200 * mean, samples)[:, None], expected["loud_audio_clamped"], "loud_audio_clamped")


@pytest.mark.parametrize("name", ["dit_tiny", "dit_upsampled", "dit_full"])
@torch.no_grad()
def test_dit(name):
    info, inputs, expected, weights = case(name)
    config = DiTConfig(
        latent_dim=info["latent_dim"], width=info["dim"], depth=info["depth"], heads=info["heads"],
        ff_mult=info["ff_mult"], text_symbols=info["text_num_embeds"], text_dim=info["text_dim"],
        text_layers=info["conv_layers"], text_place="even" if info["text_average_upsampling"] else "left",
    )
    assert config.width // config.heads == info["dim_head"]
    dit = load(DiT(config), weights, computed=["inv_freq", "freqs_cis", "latent_mean", "latent_std"])
    lengths = torch.tensor(info["lens"])
    text = expected["text"].long()
    time = expected["time"]
    nobody = torch.zeros(len(lengths), dtype=torch.bool)
    everybody = torch.ones(len(lengths), dtype=torch.bool)
    x = inputs["x"]
    cond = inputs["cond"]

    def compare(batch, name):  # one padded batch must give each utterance what it gets alone
        for i, n in enumerate(info["lens"]):
            close(batch[i : i + 1, :n], expected[f"{name}_{i}"], f"{name}_{i}")

    embedded = dit.text_embed(text, lengths, x.shape[1], nobody)
    compare(embedded, "text_embed")
    compare(dit(x, cond, embedded, time, lengths), "velocity")
    compare(dit(x, torch.zeros_like(cond), embedded, time, lengths), "velocity_no_prompt")
    dropped = dit.text_embed(text, lengths, x.shape[1], everybody)
    compare(dit(x, torch.zeros_like(cond), dropped, time, lengths), "velocity_uncond")

    span = expected["fm_span"] > 0
    t = expected["fm_t"]
    for i, n in enumerate(info["lens"]):
        one = slice(i, i + 1)
        total, count = flow_matching_loss(
            dit, inputs["x1"][one], inputs["x0"][one], t[one], span[one], text[one], lengths[one], nobody[one],
            nobody[one],
        )
        close((total / count)[None], expected[f"fm_loss_{i}"], f"fm_loss_{i}", relative=True)
    x_t = (1 - t)[:, None, None] * inputs["x0"] + t[:, None, None] * inputs["x1"]
    compare(dit(x_t, inputs["x1"].masked_fill(span[..., None], 0), embedded, t, lengths), "fm_pred")
    total, count = flow_matching_loss(dit, inputs["x1"], inputs["x0"], t, span, text, lengths, nobody, nobody)
    each = torch.stack([expected[f"fm_loss_{i}"][0] for i in range(len(lengths))])
    frames = torch.stack([span[i, :n].sum() for i, n in enumerate(info["lens"])])
    close((total / count)[None], ((each * frames).sum() / frames.sum())[None], "fm_loss of the batch", relative=True)

    duration = info["duration"]
    prompt_len = torch.tensor([info["prompt_len"]])
    prompt = torch.nn.functional.pad(inputs["prompt"], (0, 0, 0, duration - info["prompt_len"]))
    for cfg in (0, 2):
        out = sample(
            dit, inputs["y0"], prompt, prompt_len, text[:1], torch.tensor([duration]), info["steps"], cfg, info["sway"]
        )
        close(out, expected[f"sample_cfg{cfg}"], f"sample_cfg{cfg}")


@torch.no_grad()
def test_losses():
    info, inputs, expected, weights = case("losses")
    inputs = {f"loss.{k}": v for k, v in inputs.items()}
    fake = inputs[info["fake"]][:, 0]
    real = inputs[info["real"]][:, 0]
    # The json states scale 1 for this signal, which the case calls near-silent; stored is the output of scale 1e-5.
    quiet = reference.signal("loss.quiet", *info["inputs"]["loss.quiet"]["shape"], scale=1e-5)[:, 0]
    mel = MelDistance(16000)
    close(torch.stack(mel.scales(fake, real)), expected["mel_per_scale"], "mel_per_scale", relative=True)
    close(mel(fake, real)[None], expected["mel"], "mel", relative=True)
    close(mel(quiet, real)[None], expected["mel_quiet"], "mel_quiet", relative=True)
    close(stft_distance(fake, real)[None], expected["stft"], "stft", relative=True)

    discriminators = load(train_vae.Discriminators(), weights)
    fake_maps = discriminators(fake)
    real_maps = discriminators(real)
    for i, maps in enumerate(fake_maps):
        close(maps[-1], expected[f"fake_logits_{i}"], f"fake_logits_{i}")
        close(
            torch.stack([m.abs().mean() for m in maps]),
            expected[f"fake_fmap_abs_mean_{i}"],
            f"fake_fmap_abs_mean_{i}",
            relative=True,
        )
    close(train_vae.discriminator_loss(fake_maps, real_maps)[None], expected["disc_loss"], "disc_loss", relative=True)
    adversarial, matching = train_vae.generator_losses(fake_maps, real_maps)
    close(adversarial[None], expected["gen_loss"], "gen_loss", relative=True)
    close(matching[None], expected["feat_loss"], "feat_loss", relative=True)


@torch.no_grad()
def test_ecapa():
    info, inputs, expected, weights = case("ecapa")
    ecapa = evaluate.ECAPA(info["feat_dim"])
    counters = {k: v for k, v in ecapa.state_dict().items() if k.endswith("num_batches_tracked")}
    ecapa.load_state_dict(weights | counters)
    found = ecapa.eval()([inputs[f"h{i}"] for i in range(info["hidden_states"])])
    close(found, expected["embedding"], "embedding")
    close(torch.cosine_similarity(found[:1], found[1:]), expected["cosine"], "cosine")


def test_sim(tmp_path, fails):
    """From the wave, through a file as it is published: with the classifier of its training, and each batch norm's
    counter."""
    info, inputs, expected, weights = case("sim")
    norms = [name for name in weights if "running_mean" in name]
    extra = {name.replace("running_mean", "num_batches_tracked"): torch.tensor(5) for name in norms}
    extra["loss_calculator.projection.weight"] = torch.zeros(3, 256)
    path = tmp_path / "wavlm_large_finetune.pth"
    torch.save({"model": weights | extra, "best_valid_eer": 0.0}, path)
    scorer = evaluate.SIMo(str(path), torch.device("cpu"))
    states = scorer.states(inputs["wav"])
    for name, state in (("first", 0), ("middle", 12), ("last", 24)):
        close(states[state], expected[f"hidden_{name}"], f"hidden_{name}")
    with torch.no_grad():
        found = scorer.ecapa(states)
    close(found, expected["embedding"], "embedding")
    a, b = (torch.from_numpy(scorer(wave.numpy())) for wave in inputs["wav"])
    close((a @ b)[None], expected["cosine"], "cosine")
    assert "wavlm_large_finetune.pth@sha256:" in scorer.identity

    def read(argv):
        evaluate.SIMo(argv[0], torch.device("cpu"))

    for name in ("strange", "feature_extract.model.strange"):
        torch.save({"model": weights | {name: torch.zeros(1)}}, path)
        fails(read, [path], "does not hold the weights", "strange")
    for missing in (
        "linear.bias",
        "feature_extract.model.encoder.layers.3.fc1.bias",
        "feature_extract.model.post_extract_proj.weight",
    ):
        torch.save({"model": {k: v for k, v in weights.items() if k != missing}}, path)
        fails(read, [path], "does not hold the weights")
    path.write_bytes(path.read_bytes()[:1000])
    fails(read, [path], "cannot read", "wavlm_large_finetune.pth")
