"""Properties of the networks, and their checkpoints."""

import json
import math

import pytest
import torch
import torchaudio

import plain
from model import (
    PRESETS, AlignmentHead, AntiAliasedSnake, DiT, DiTConfig, DurationPredictor, InputError, SemanticVAE,
    UpwardAlignmentHead, VAEConfig, duration_loss, fold_weight_norm, lowpass, sample, text_index, time_steps,
)

TINY_VAE = VAEConfig(encoder_dim=4, latent_dim=8, decoder_dim=64, resblock_kernels=(3,), ssl_dim=12)
TINY_DIT = DiTConfig(latent_dim=8, width=64, depth=2, heads=2, text_dim=16, text_layers=1)


def build(kind, config, seed=0):
    torch.manual_seed(seed)
    model = kind(config).eval()
    for p in model.parameters():  # the DiT starts with zero output: fill it
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def test_presets_have_the_papers_sizes():
    def count(m):
        return sum(p.numel() for p in m.parameters())

    with torch.device("meta"):
        vae = SemanticVAE(VAEConfig(**PRESETS["paper"]["vae"]))
        assert (count(vae), count(vae.projectors)) == (72_753_377, 451_392)
        assert count(DiT(DiTConfig(**PRESETS["paper"]["dit"]))) == 157_973_824
        assert 5e6 < count(DiT(DiTConfig(**PRESETS["small"]["dit"]))) < 157e6


@torch.no_grad()
def test_output_is_as_long_as_input_for_every_remainder_of_the_hop():
    vae = build(SemanticVAE, TINY_VAE)
    hop = TINY_VAE.hop
    assert hop == 400

    def shapes(samples):
        mean, _ = vae.encode(torch.zeros(1, samples))
        return [mean.shape, vae.decode(mean, samples).shape]

    for samples in (801, 1199, 1200):
        assert shapes(samples) == [(1, 3, 8), (1, samples)]
    assert vae.decode(torch.zeros(1, 3, 8)).shape == (1, 1200)
    shallow = VAEConfig(
        encoder_dim=4, latent_dim=8, decoder_dim=16, decoder_rates=(20, 20), decoder_kernels=(20, 20),
        resblock_kernels=(3,), ssl_dim=0,
    )
    vae = build(SemanticVAE, shallow)  # a shallow decoder: quick enough for every length
    for samples in range(hop, 2 * hop):
        assert shapes(samples) == [(1, math.ceil(samples / hop), 8), (1, samples)]


@torch.no_grad()
def test_documented_shapes():
    vae = build(SemanticVAE, TINY_VAE)
    wave = torch.randn(2, 1600)
    noise = torch.randn(2, 4, 8)
    features = torch.randn(2, 5, 12)
    again, z, mean, logvar, (aligned, target) = vae(wave, noise, features)
    assert (
        again.shape == wave.shape
        and aligned is z
        and z.shape == mean.shape == logvar.shape == target.shape == (2, 4, 8)
    )
    assert again.dtype == mean.dtype == torch.float32 and again.abs().max() <= 1
    assert all(map(torch.equal, vae.encode(wave), (mean, logvar)))
    assert torch.equal(z, mean + noise * (0.5 * logvar).exp()) and torch.equal(again, vae.decode(z, 1600))
    valid = torch.tensor([[True] * 4, [True] * 3 + [False]])
    cosine = torch.nn.functional.cosine_similarity(z, target, dim=-1)
    assert torch.allclose(vae.projectors.loss(z, (z, target), valid), -(cosine[0].mean() + cosine[1, :3].mean()) / 2)
    assert vae(wave, noise)[-1] is None  # without features


@torch.no_grad()
def test_folded_and_from_a_part_the_decoder_sounds_the_same():
    """Over the paper's kernels, whose reach is the longest: samples depend on no latent that is CONTEXT frames away."""
    vae = build(SemanticVAE, VAEConfig(encoder_dim=4, latent_dim=8, decoder_dim=64))
    z = torch.randn(2, 150, 8)
    whole = vae.decode(z)

    def part(context):
        """Frames 60 to 90, decoded with so many more on either side."""
        return vae.decode(z[:, 60 - context : 90 + context])[:, 400 * context : 400 * (context + 30)]

    expected = whole[:, 400 * 60 : 400 * 90]
    assert whole.abs().max() < 1 and part(vae.CONTEXT).shape == expected.shape
    assert (part(vae.CONTEXT) - expected).abs().max() < 1e-5 < (part(8) - expected).abs().max()  # the context matters
    names = len(vae.state_dict())
    folded = fold_weight_norm(vae)
    assert len(folded.state_dict()) < names and (folded.decode(z) - whole).abs().max() < 1e-5


def test_stencil_activation_equals_the_convolution_form():
    """Forward and backward against upsampling and downsampling as depthwise convolutions (BigVGAN's way)."""
    torch.manual_seed(0)
    layer = AntiAliasedSnake(6).double()  # so that the largest error is not rounding
    x = torch.randn(2, 6, 37, dtype=torch.float64, requires_grad=True)
    torch.nn.init.normal_(layer.act.alpha)
    torch.nn.init.normal_(layer.act.beta)
    weight = torch.randn(2, 6, 37).double()
    grads = []
    for f in (layer, lambda x: plain.convolved(layer, x)):
        y = f(x)
        grads.append([y.detach(), *torch.autograd.grad((y * weight).sum(), [x, layer.act.alpha, layer.act.beta])])
    for a, b in zip(*grads):
        assert (a - b).abs().max() < 1e-12 * max(1, b.abs().max())


def test_alignment_reaches_encoder_and_head_but_not_padding():
    z = torch.randn(2, 6, 8, requires_grad=True)
    head = AlignmentHead(12, 8)
    features = torch.randn(2, 8, 12)
    valid = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    head.loss(z, head(z, features), valid).backward()
    assert z.grad[0].abs().min() > 0 and not z.grad[1, 2:].any() and z.grad[1, :2].any()
    assert all(p.grad is not None and p.grad.any() for p in head.parameters())


def test_alignment_upward_is_its_equation():
    """Frame by frame and pair by pair, as VA-VAE writes it; padding counts in neither mean."""
    torch.manual_seed(0)
    z = torch.randn(2, 5, 4, requires_grad=True)
    head = UpwardAlignmentHead(6, 4)
    features = torch.randn(2, 5, 6)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    projected, target = head(z, features)
    assert torch.equal(target, features) and torch.equal(projected, z @ head.model.weight.T)

    def cosine(a, b):
        return ((a @ b) / (a.norm() * b.norm())).item()

    utterances = []
    for b, n in ((0, 5), (1, 3)):
        frames = [max(0, 1 - 0.5 - cosine(projected[b, i], features[b, i])) for i in range(n)]
        pairs = [
            max(0, abs(cosine(z[b, i], z[b, j]) - cosine(features[b, i], features[b, j])) - 0.25)
            for i in range(n)
            for j in range(n)
        ]
        utterances.append(sum(frames) / len(frames) + sum(pairs) / len(pairs))
    loss = head.loss(z, (projected, target), valid)
    # an utterance's share does not depend on its batch
    assert loss.item() == pytest.approx(sum(utterances) / 2, abs=1e-6)
    loss.backward()
    assert z.grad[0].any() and not z.grad[1, 3:].any() and head.model.weight.grad.any()
    up = SemanticVAE(VAEConfig(**{**vars(TINY_VAE), "align": "up"})).projectors
    assert type(up) is UpwardAlignmentHead and type(SemanticVAE(TINY_VAE).projectors) is AlignmentHead


def test_spread_evenly_gives_each_character_its_frames():
    """Each of n characters gets frames // n frames, the last frames % n one more."""
    for frames, n in [(10, 3), (12, 4), (7, 7), (5, 1), (9, 0), (13, 5)]:
        expected = [i for i in range(n) for _ in range(frames // n + (i >= n - frames % n))]
        # 14 frames in the batch
        found = text_index("even", None, torch.tensor([n]), torch.tensor([frames]), 14)[0].tolist()
        assert found[: len(expected)] == expected and len(expected) == (frames if n else 0)


def test_aligned_text_stands_from_its_start_to_the_next_one():
    # in frames, whose middles are at 0.5, 1.5, …
    starts = torch.tensor([[0.0, 2.0, 2.6, 5.0], [0.0, 1.0, 4.0, torch.inf]])
    found = text_index("aligned", starts, torch.tensor([4, 3]), torch.tensor([8, 6]), 8)
    assert found.tolist() == [[0, 0, 1, 2, 2, 3, 3, 3], [0, 1, 1, 1, 2, 2, 2, 2]]
    # A byte of no duration, as the space between two joined clips, gets no frame.
    found = text_index("aligned", torch.tensor([[0.0, 2.0, 2.0]]), torch.tensor([3]), torch.tensor([4]), 4)
    assert found.tolist() == [[0, 0, 2, 2]]
    # Even spreading is the case of equal steps.
    even = text_index("even", None, torch.tensor([4]), torch.tensor([12]), 12)
    assert torch.equal(
        even, text_index("aligned", torch.arange(0, 12, 3.0)[None], torch.tensor([4]), torch.tensor([12]), 12)
    )


def test_duration_loss_is_that_of_ratios():
    """A prediction that is off by a factor is right; bytes that take no time and padding do not count; padding changes
    no prediction."""
    text = torch.tensor([[5, 6, 7, 8], [9, 9, -1, -1]])
    starts = torch.tensor([[0.0, 2.0, 6.0, 6.0], [0.0, 1.0, torch.inf, torch.inf]])
    lengths = torch.tensor([7, 4])  # durations 2, 4, 0, 1 and 1, 3
    right = torch.tensor([[2.0, 4.0, 99.0, 1.0], [1.0, 3.0, 50.0, 50.0]]).log() + 5
    assert duration_loss(right, text, starts, lengths).abs().max() < 1e-5
    wrong = right + torch.tensor([[0.3, -0.3, 9, 0.0], [0.1, -0.1, 9, 9]])
    assert torch.allclose(duration_loss(wrong, text, starts, lengths), torch.tensor([0.2, 0.1]), atol=1e-5)
    predictor = build(DurationPredictor, 256)
    assert torch.allclose(predictor(text)[1, :2], predictor(text[1:, :2])[0], atol=1e-6)


def test_time_steps():
    """Few steps lie on the grid of 32, others evenly; sway moves them towards the noise; ends stay where they are."""
    full = torch.tensor(time_steps(32, -1.0))
    for steps in (7, 10, 16):
        found = torch.tensor(time_steps(steps, -1.0))
        assert len(found) == steps + 1 and (found.diff() > 0).all()
        assert all((full - t).abs().min() < 1e-6 for t in found)
        assert found[0] == 0 and abs(found[-1] - 1) < 1e-6
    assert time_steps(4, 0.0) == [0, 0.25, 0.5, 0.75, 1]
    assert all(a < b for a, b in zip(time_steps(4, -1.0)[1:-1], time_steps(4, 0.0)[1:-1]))


@torch.no_grad()
def test_guidance_goes_beyond_the_velocity_with_prompt_and_text():
    """v + cfg (v - w), where w knows neither prompt nor text but for its length; the prompt is written over the
    result."""
    dit = build(DiT, TINY_DIT)
    torch.manual_seed(2)
    noise = torch.randn(1, 20, 8)
    lengths = torch.tensor([20])
    given = torch.tensor([6])

    def run(cfg, seed=2):
        torch.manual_seed(seed)
        prompt = torch.randn(1, 20, 8)
        text = torch.randint(0, 256, (1, 9))
        out = sample(dit, noise, prompt, given, text, lengths, steps=1, cfg=cfg, sway=0.0)
        assert torch.equal(out[:, :6], prompt[:, :6])
        return out[:, 6:]

    assert torch.allclose(run(2.0), 3 * run(0.0) - 2 * run(-1.0), atol=1e-4)
    assert not torch.allclose(run(0.0), run(-1.0), atol=1e-2)
    assert not torch.allclose(run(0.0), run(0.0, seed=3), atol=1e-2)
    assert torch.allclose(run(-1.0), run(-1.0, seed=3), atol=1e-5)


@pytest.mark.parametrize("place", ["left", "even", "aligned"])
@torch.no_grad()
def test_a_batch_gives_each_utterance_what_it_gets_alone(place):
    dit = build(DiT, DiTConfig(**{**vars(TINY_DIT), "text_place": place}))
    torch.manual_seed(1)
    lengths = torch.tensor([30, 17, 24])
    prompts = torch.tensor([10, 5, 8])
    noise = torch.randn(3, 30, 8)
    prompt = torch.randn(3, 30, 8)
    text = torch.randint(0, 256, (3, 12))
    text[1, 7:] = -1
    starts = torch.linspace(0, 20, 12).expand(3, -1).clone()
    starts[1] = starts[1] / 2
    starts[1, 7:] = torch.inf
    both = sample(dit, noise, prompt, prompts, text, lengths, steps=4, starts=starts)
    for i, n in enumerate(lengths.tolist()):
        one = slice(i, i + 1)
        alone = sample(
            dit, noise[one, :n], prompt[one, :n], prompts[one], text[one], lengths[one], steps=4, starts=starts[one]
        )
        assert (both[i, :n] - alone[0]).abs().max() < 1e-5
        assert torch.equal(alone[0, : prompts[i]], prompt[i, : prompts[i]])


def test_new_dit_predicts_zero():
    dit = DiT(TINY_DIT)
    text = dit.text_embed(torch.zeros(1, 3, dtype=torch.long), torch.tensor([9]), 9)
    assert not dit(torch.randn(1, 9, 8), torch.zeros(1, 9, 8), text, torch.tensor([0.3]), torch.tensor([9])).any()


# -------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("kind, config", [(SemanticVAE, TINY_VAE), (DiT, TINY_DIT)])
def test_checkpoint_rebuilds_its_model(kind, config, tmp_path):
    model = build(kind, config)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = kind.from_pretrained(tmp_path)
    assert again.config == config and all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_hash_follows_the_weights_but_not_the_alignment_head(tmp_path):
    vae = build(SemanticVAE, TINY_VAE)
    name = vae.content_hash()
    torch.nn.init.zeros_(vae.projectors.model[0].weight)
    assert vae.content_hash() == name
    vae.save_pretrained(tmp_path, dtype=torch.float16)
    half = SemanticVAE.from_pretrained(tmp_path)
    # other weights, other name
    assert half.content_hash() == SemanticVAE.from_pretrained(tmp_path).content_hash() != name
    name = vae.content_hash()
    latents = vae.latents_hash()
    with torch.no_grad():
        vae.decoder.conv_pre.bias[0] += 1e-3
    assert vae.content_hash() != name and vae.latents_hash() == latents  # the same latents, another sound
    with torch.no_grad():
        vae.fc_mu.bias[0] += 1e-3
    assert vae.latents_hash() != latents


def refused(kind, folder, *words):
    with pytest.raises(InputError) as caught:
        kind.from_pretrained(folder)
    assert all(w in str(caught.value) for w in words), caught.value


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    vae = build(SemanticVAE, TINY_VAE)
    vae.save_pretrained(tmp_path)
    refused(DiT, tmp_path, "holds a SemanticVAE, expected a DiT")
    refused(SemanticVAE, tmp_path / "nowhere", "no folder")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"decoder_dim": 128}, ["does not fit SemanticVAE", "size mismatch for decoder."]),
        ({"ssl_dim": 0}, ["does not fit SemanticVAE", 'Unexpected key(s) in state_dict: "projectors.']),
        ({"resblock_kernels": [3, 7]}, ["does not fit SemanticVAE", 'Missing key(s) in state_dict: "decoder.']),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"config": config["config"] | change}))
        refused(SemanticVAE, tmp_path, *words)
    (tmp_path / "config.json").write_text("{")
    refused(SemanticVAE, tmp_path, "cannot read", "config.json")
    for change, words in (
        ({"decoder_dim": "128"}, ["config.json does not describe a VAEConfig", "decoder_dim is '128'"]),
        ({"latent_dim": -8}, ["cannot have"]),
        ({"decoder_rates": [9] * 10**4}, ["cannot have"]),
        ({"strange": 1}, ["strange"]),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"config": config["config"] | change}))
        refused(SemanticVAE, tmp_path, *words)
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"config": config["config"] | {"encoder_rates": [4, 4, 5, 4]}})
    )
    refused(SemanticVAE, tmp_path, "does not fit", "encoder_rates (4, 4, 5, 4)", "of other than 400 samples")
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(SemanticVAE, tmp_path, "cannot read", "model.safetensors")


def authors_release(folder, **changes):
    """A folder in the layout of the authors' release, with a tiny network."""
    config = VAEConfig(encoder_dim=8, latent_dim=8, decoder_dim=64, ssl_dim=32)
    vae = build(SemanticVAE, config)
    tensors = (
        vae.state_dict()
        | {"pre_block.attn.zero_k_bias": torch.zeros(128), "decoder.activation_post.upsample.filter": lowpass()}
        | changes
    )
    (folder / "dac").mkdir(parents=True)
    (folder / "metainfo.json").write_text("{}")
    torch.save(
        {f"ema_model.{k}": v for k, v in tensors.items() if v is not None}
        | {"step": torch.tensor(3), "initted": torch.tensor(True)},
        folder / "dac" / "ema_state_dict.pth",
    )
    return vae


def test_authors_release_is_read_key_by_key(tmp_path):
    vae = authors_release(tmp_path / "good")
    assert SemanticVAE.from_pretrained(tmp_path / "good").content_hash() == vae.content_hash()
    for name, change, words in (
        (
            "extra",
            {"decoder.mystery": torch.ones(1)},
            "does not fit SemanticVAE: Error(s) in loading state_dict for SemanticVAE: "
            'Unexpected key(s) in state_dict: "decoder.mystery"',
        ),
        ("missing", {"fc_var.bias": None}, 'Missing key(s) in state_dict: "fc_var.bias"'),
        (
            "shape",
            {"fc_var.bias": torch.zeros(9)},
            "size mismatch for fc_var.bias: copying a param with shape torch.Size([9]) from checkpoint, "
            "the shape in current model is torch.Size([8])",
        ),
        ("filter", {"decoder.activation_post.upsample.filter": torch.ones(1, 1, 12)}, "differs from the filter"),
    ):
        authors_release(tmp_path / name, **change)
        refused(SemanticVAE, tmp_path / name, words)
    for value in (
        [1],
        {"encoder.block.0.bias": 3},
        {"encoder.block.0.bias": torch.zeros(0), "fc_mu.bias": torch.zeros(0), "decoder.conv_pre.bias": torch.zeros(0)},
    ):
        torch.save(value, tmp_path / "good" / "dac" / "ema_state_dict.pth")
        refused(SemanticVAE, tmp_path / "good", "ema_state_dict.pth")


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    (tmp_path / "dac").mkdir()
    (tmp_path / "metainfo.json").write_text("{}")
    torch.save({"ema_model.x": Evil()}, tmp_path / "dac" / "ema_state_dict.pth")
    refused(SemanticVAE, tmp_path, "cannot read")
    assert not (tmp_path / "owned").exists()


def test_a_hub_id_with_a_subfolder_is_downloaded_only_when_named(tmp_path, monkeypatch):
    import huggingface_hub

    vae = authors_release(tmp_path / "semantic_vae")
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or tmp_path,
    )
    assert SemanticVAE.from_pretrained("zkniu/Semantic-VAE/semantic_vae").content_hash() == vae.content_hash()
    assert asked == [("zkniu/Semantic-VAE", ["semantic_vae/**"])]
    refused(SemanticVAE, tmp_path / "absent", "no folder")
    assert len(asked) == 1


def test_mel_frames_in_place_of_latents():
    """Equal to torchaudio's transform with F5-TTS's settings; decoded from exactly themselves: no posterior, no
    noise."""
    torch.manual_seed(0)
    for rate, bands, rates, kernels in (
        (24000, 100, (4, 4, 2, 2, 2, 2), (8, 8, 4, 4, 4, 4)),
        (16000, 80, (5, 5, 4, 4), (9, 9, 8, 8)),
    ):
        vae = SemanticVAE(
            VAEConfig(
                sample_rate=rate, latent_dim=bands, decoder_dim=64, decoder_rates=rates, decoder_kernels=kernels,
                resblock_kernels=(3,), ssl_dim=0, mel=True,
            )
        )
        hop = vae.config.hop
        wave = torch.randn(2, 5000)
        mean, logvar = vae.encode(wave)
        transform = torchaudio.transforms.MelSpectrogram(rate, 1024, hop_length=hop, n_mels=bands, power=1)
        frames = -(-5000 // hop)
        expected = (
            transform(torch.nn.functional.pad(wave, (0, frames * hop - 5000))).clamp(min=1e-5).log()[..., :frames].mT
        )
        assert mean.shape == (2, frames, bands) and (mean - expected).abs().max() < 1e-4
        again, z, *_ = vae(wave, torch.randn_like(mean))
        assert (
            torch.equal(z, mean)
            and again.shape == wave.shape
            and {n.split(".")[0] for n, _ in vae.named_parameters()} == {"decoder"}
        )
