"""What others publish: F5-TTS's checkpoints and Vocos, read, heard and refused; the authors' discriminators."""

import dataclasses
import json
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import yaml
from conftest import RATE, ROOT, VAE_FLAGS, tone
from safetensors.torch import load_file, save_file
from test_golden import close, reference
from test_model import authors_release

import sample
import train_tts
import train_vae
from model import F5_MEL, DiT, InputError, SemanticVAE, load_torch
from sample import Request, synthesize, to_bytes, to_symbols

# Here whatever GOLDEN says: a checkpoint in F5-TTS's published form, and Vocos, whose weights fill.py makes.
FOLDER = Path(__file__).parent / "golden"
CASE = json.loads((FOLDER / "f5_public.json").read_text(encoding="utf-8"))
EXPECTED = load_file(FOLDER / "f5_public.safetensors")
WORDS = ["--ref-text", "Some call me nature", "--text", "It's the old king.", "--steps", "2", "--no-bf16"]


def write_f5(folder, prefix="ema_model.transformer.", vocabulary=CASE["vocabulary"], **changes):
    """The case's checkpoint as F5-TTS publishes it. changes: other tensors by name, None for none."""
    folder.mkdir(parents=True)
    weights = {k: reference.fill(CASE["weights"] + k, shape) for k, shape in CASE["state_dict"].items()}
    weights = {prefix + k: v for k, v in (weights | changes).items() if v is not None}
    weights |= {"initted": torch.tensor(True), "step": torch.tensor(1250000)}
    weights[prefix + "rotary_embed.inv_freq"] = torch.ones(32)
    save_file(weights, folder / "model_1250000.safetensors")
    (folder / "vocab.txt").write_text("".join(f"{symbol}\n" for symbol in vocabulary), encoding="utf-8")
    return folder


def write_vocos(folder):
    folder.mkdir(parents=True)
    vocos = CASE["vocos"]
    weights = {k: reference.fill(vocos["weights"] + k, shape) for k, shape in vocos["state_dict"].items()}
    for name in ("head.istft.window", "feature_extractor.mel_spec.spectrogram.window"):
        weights[name] = torch.hann_window(1024)
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.yaml").write_text(yaml.safe_dump(vocos["config"]), encoding="utf-8")
    return folder


def write_hub(folder, monkeypatch):
    """The three repositories that the README names, tiny, in place of the hub."""
    import huggingface_hub

    write_f5(folder / "SWivid" / "F5-TTS" / "F5TTS_v1_Base")
    write_vocos(folder / "charactr" / "vocos-mel-24khz")
    release = folder / "zkniu" / "Semantic-VAE" / "semantic_vae"
    authors_release(release)
    (release / "discriminator").mkdir()
    torch.manual_seed(7)
    weights = train_vae.Discriminators(0.0625).state_dict()
    torch.save(dict(state_dict=weights, metadata={}), release / "discriminator" / "weights.pth")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: folder / name)
    return weights


@pytest.fixture(scope="module")
def f5(tmp_path_factory):
    return write_f5(tmp_path_factory.mktemp("hub") / "F5TTS_v1_Base")


@pytest.fixture(scope="module")
def vocos(tmp_path_factory):
    pytest.importorskip("vocos", reason="pip install vocos: the vocoder of F5-TTS's frames")
    return write_vocos(tmp_path_factory.mktemp("hub") / "vocos-mel-24khz")


@pytest.fixture
def voice(tmp_path):
    sf.write(tmp_path / "voice.wav", tone(2, 0), RATE)
    return tmp_path / "voice.wav"


def signal(of):
    return reference.signal(of["signal"], *of["shape"], scale=of["scale"])


# -------------------------------------------------------------------------------------------------- F5-TTS


@pytest.mark.parametrize("i", [0, 1])
@torch.no_grad()
def test_f5_samples_what_f5_tts_samples(f5, tmp_path, i):
    """From the folder's name alone, and from what is written of it."""
    if i == 1:  # Chinese
        pytest.importorskip("rjieba", reason="pip install rjieba: finds Chinese words")
        pytest.importorskip("pypinyin", reason="pip install pypinyin: reads Chinese")
    dit = DiT.from_pretrained(f5)
    text = to_symbols(CASE["texts"][i]["prompt"] + CASE["texts"][i]["target"], dit.config.vocabulary)[None]
    assert torch.equal(text, EXPECTED[f"ids_{i}"].long())
    given = CASE["prompt_frames"]
    noise = signal(CASE["noise"][i])
    frames = noise.shape[1]
    prompt = torch.nn.functional.pad(EXPECTED["mel"].mT[:, :given], (0, 0, 0, frames - given))
    lengths = torch.tensor([given]), text, torch.tensor([frames])
    dit.save_pretrained(tmp_path / "again")
    for model in (dit, DiT.from_pretrained(tmp_path / "again")):
        out = sample.sample(model, noise, prompt, *lengths, CASE["steps"], CASE["cfg"], CASE["sway"])
        close(out, EXPECTED[f"sample_{i}"], f"sample_{i}")


@torch.no_grad()
def test_vocos_decodes_what_logmel_makes(f5, vocos):
    """The library's audio; and one frame fewer than Vocos's makes as many samples as the frames have."""
    vae = SemanticVAE.from_pretrained(vocos)
    mel, _ = vae.encode(signal(CASE["wave"]))
    close(mel[:, :-2], EXPECTED["mel"].mT[:, :-2], "mel")  # in the last two, the padding differs
    frames = EXPECTED["sample_0"][:, CASE["prompt_frames"] :]
    close(vae.decoder.head(vae.decoder.backbone(frames.mT)), EXPECTED["audio_0"], "audio_0")
    wave = vae.decode(frames)
    reach = 12 * 256
    assert wave.shape == (1, 256 * frames.shape[1]) and wave.shape[1] == EXPECTED["audio_0"].shape[1] + 256
    close(wave[:, : -256 - reach], EXPECTED["audio_0"][:, :-reach], "audio_0 away from its end")
    # from a part, as synthesize() decodes: less the frames that CONTEXT says no sample depends on
    given = CASE["prompt_frames"]
    close(
        vae.decode(EXPECTED["sample_0"][:, max(0, given - vae.CONTEXT) :])[:, 256 * min(given, vae.CONTEXT) :],
        vae.decode(EXPECTED["sample_0"])[:, 256 * given :],
        "from a part",
    )
    assert vae.latents_hash() == DiT.from_pretrained(f5).config.vae_hash


def test_checkpoints_of_trainings_are_read(f5, tmp_path):
    """Compiled, with another vocabulary, or as a whole training state, its mel-spectrogram's window included."""
    whole = DiT.from_pretrained(f5).state_dict()
    found = DiT.from_pretrained(write_f5(tmp_path / "compiled", "ema_model._orig_mod.transformer.")).state_dict()
    assert found.keys() == whole.keys() and all(torch.equal(v, whole[k]) for k, v in found.items())
    vocabulary = [" ", *"abcß"]
    weights = {"text_embed.text_embed.weight": torch.ones(6, 32)}
    other = DiT.from_pretrained(write_f5(tmp_path / "other", vocabulary=vocabulary, **weights)).config
    assert other.text_symbols == 5 and to_symbols("aßz", other.vocabulary).tolist() == [1, 4, 0]
    state = load_file(write_f5(tmp_path / "state") / "model_1250000.safetensors")
    state["ema_model.mel_spec.mel_stft.spectrogram.window"] = torch.ones(1)
    torch.save(dict(ema_model_state_dict=state, update=7), tmp_path / "state" / "model_last.pt")
    (tmp_path / "state" / "model_1250000.safetensors").unlink()
    assert torch.equal(DiT.from_pretrained(tmp_path / "state").proj_out.bias, whole["proj_out.bias"])
    assert sample.revision(tmp_path / "state") != sample.revision(tmp_path / "other")


def test_what_is_not_f5s_is_refused(tmp_path, fails):
    def read(argv):
        DiT.from_pretrained(argv[0])

    lines = CASE["vocabulary"]
    fails(read, [write_f5(tmp_path / "F5TTS_Base")], "one head rotary", "text padding not masked", "use F5TTS_v1_Base")
    fails(read, [write_f5(tmp_path / "short", vocabulary=lines[:-1])], "has 45 lines", "expected 46", "vocab.txt")
    shifted = [lines[-1], *lines[:-1]]
    fails(read, [write_f5(tmp_path / "shifted", vocabulary=shifted)], "the first 'ma'", "the first ' '")
    fails(
        read,
        [write_f5(tmp_path / "lacks", **{"proj_out.bias": None})],
        "does not fit DiT",
        'Missing key(s) in state_dict: "proj_out.bias"',
    )
    fails(
        read,
        [write_f5(tmp_path / "more", **{"long_skip.weight": torch.ones(2)})],
        "does not fit DiT",
        'Unexpected key(s) in state_dict: "long_skip.weight"',
    )
    fails(
        read,
        [write_f5(tmp_path / "shape", **{"proj_out.bias": torch.ones(80)})],
        "does not fit DiT",
        "size mismatch for proj_out.bias",
        "torch.Size([80]) from checkpoint",
        "torch.Size([100])",
    )
    fails(read, [write_f5(tmp_path / "none", **{"text_embed.text_embed.weight": None})], "what F5-TTS publishes")
    two = write_f5(tmp_path / "two")
    (two / "model_2.safetensors").write_bytes((two / "model_1250000.safetensors").read_bytes())
    fails(read, [two], "holds 2 model_*.safetensors", "expected one")
    for value in ([1], {"ema_model_state_dict": 3}, {"text_embed.text_embed.weight": 3}):
        for path in two.glob("model_*"):
            path.unlink()
        torch.save(value, two / "model_last.pt")
        fails(read, [two], "two")


def test_english_needs_characters_alone_and_chinese_two_packages(f5, monkeypatch):
    vocabulary = DiT.from_pretrained(f5).config.vocabulary

    def told(text):
        return "".join(vocabulary.split("\n")[i] for i in to_symbols(text, vocabulary))

    for package in ("rjieba", "pypinyin"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "rjieba", types.SimpleNamespace(cut=list))
            without.setitem(sys.modules, package, None)
            assert told("Is it “so”? the bird") == 'Is it "so"? the bird'
            assert told("said:no...he is") == "said:no ... he is"
            with pytest.raises(InputError, match=f"{package} is needed .*: run pip install {package}"):
                to_symbols("你好", vocabulary)
    assert torch.equal(to_symbols("né", ""), to_bytes("né"))


def test_characters_outside_the_vocabulary_are_said(f5, capsys):
    config = DiT.from_pretrained(f5).config
    sample.warn_of_unknown(["Is it “so”; he", "the bird"], {}, config)  # quotes and ; have their symbols
    assert not capsys.readouterr().out
    sample.warn_of_unknown(["Æsop", "the bird", "né"], {}, config)
    assert capsys.readouterr().out == "the vocabulary has no Æ é: the model reads a space there\n"


@torch.no_grad()
def test_prompts_are_prepared_as_f5_tts_does(f5):
    """Raised to an RMS of 0.1 and lowered again; the length follows the bytes, never fewer frames than symbols."""
    dit = DiT.from_pretrained(f5)
    vae = SemanticVAE(dataclasses.replace(F5_MEL, decoder_dim=64, resblock_kernels=(3,))).eval()
    torch.nn.init.constant_(vae.decoder.conv_post.parametrizations.weight.original0, 0.1)
    wave = np.random.default_rng(0).standard_normal(6000, np.float32)
    wave /= np.sqrt(np.mean(wave**2))

    def said(rms):
        return synthesize(dit, vae, [Request(rms * wave, "did he see.", "the bird is old")], steps=2)[0]

    soft = said(0.02)
    usual = said(0.1)
    loud = said(0.3)
    size = np.abs(usual).max()
    assert np.abs(soft - usual / 5).max() < 1e-3 * size and len(usual) == 256 * int(24 / 12 * 15)
    assert np.abs(loud - usual).max() > 1e-2 * size  # louder ones are left as they are
    # a space parts each word from its bracket: 43 symbols, 3 frames of prompt
    crowded = Request(wave[:768], "it", 10 * "(is")
    assert len(synthesize(dit, vae, [crowded], steps=2)[0]) == 256 * (43 + 1 - 3)


def test_f5_speaks_through_vocos(f5, vocos, voice, tmp_path, capsys, monkeypatch, fails):
    def run(*more):
        return ["--tts", f5, "--vae", vocos, "--ref", voice, "--out", tmp_path / "said.wav", *WORDS, *more]

    asked = []

    def listening(dit, vae, requests, **options):
        asked.extend(requests)
        return synthesize(dit, vae, requests, **options)

    monkeypatch.setattr(sample, "synthesize", listening)
    sample.main([str(a) for a in run()])
    wave, rate = sf.read(tmp_path / "said.wav")
    assert rate == 24000 and len(wave) % 256 == 0 and "guidance 2" in capsys.readouterr().out
    assert asked[0].prompt_text == "Some call me nature."  # and ends in ". " before the text
    sf.write(tmp_path / "long.wav", tone(12.5, 0), RATE)
    fails(sample.main, run("--ref", tmp_path / "long.wav"), "the prompt is 12.5 s, limit 12.0 s")
    fails(sample.main, run("--ref-text", " "), "transcript of the prompt is empty")
    fails(sample.main, run("--vae", sample.DEMO / "vae"), "was trained on the latents of VAE", "name the right one")


def test_what_is_not_vocos_is_refused(vocos, tmp_path, fails):
    def read(argv):
        SemanticVAE.from_pretrained(argv[0])

    settings = CASE["vocos"]["config"]
    frames = settings["feature_extractor"]["init_args"] | dict(n_mels=80)
    head = settings["head"] | dict(init_args=settings["head"]["init_args"] | dict(dim=16))
    feature = dict(init_args=frames)
    for change, word in (
        (dict(feature_extractor=feature), "'n_mels': 80"),
        (dict(head=head), "head.out.weight"),
        (dict(head={}), "init_args"),
    ):
        folder = write_vocos(tmp_path / word.strip("'").split("'")[0])
        (folder / "config.yaml").write_text(yaml.safe_dump(settings | change))
        fails(read, [folder], word)
    (folder / "config.yaml").write_text("{")
    fails(read, [folder], "does not hold Vocos")


def test_without_vocos_one_line_says_so(tmp_path, monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "vocos", None)
    folder = write_vocos(tmp_path / "vocos")
    fails(lambda argv: SemanticVAE.from_pretrained(argv[0]), [folder], "vocos is needed", "run pip install vocos")


def test_without_a_network_one_line_says_what_was_not_reached(f5, voice, fails):
    def run(*more):
        return ["--ref", voice, *WORDS, *more]

    name = "SWivid/F5-TTS/F5TTS_v1_Base"
    fails(sample.main, run("--tts", name), f"no folder {name} here, none on the hub")
    fails(sample.main, run("--tts", f5), "no folder charactr/vocos-mel-24khz")  # its vocoder, found by default


# -------------------------------------------------------------------------------------------------- trainings


def test_a_releases_discriminators_are_trained_on(world, tmp_path, monkeypatch, fails):
    weights = write_hub(tmp_path, monkeypatch)
    args = ["--data", world.data, "--init", "zkniu/Semantic-VAE/semantic_vae", *VAE_FLAGS]
    args += ["--adv-start", "9"]  # they are not stepped
    train_vae.main([str(a) for a in [*args, "--out", tmp_path / "run"]])
    found = load_torch(tmp_path / "run" / "state.pt")["discriminators"]
    assert weights.keys() == found.keys() and all(torch.equal(v, found[k]) for k, v in weights.items())
    wide = [*args, "--out", tmp_path / "wide", "--disc-width", "1"]
    fails(train_vae.main, wide, "weights.pth (--disc-width 1.0) does not fit Discriminators")


def test_the_readmes_program_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_hub(tmp_path, monkeypatch)
    sf.write("voice.wav", tone(1.2, 0), RATE)
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    exec(program, {})
    assert sf.info("again.wav").frames == sf.info("voice.wav").frames


def test_what_others_published_is_not_trained_on_bytes(world, f5, tmp_path, fails):
    fails(train_tts.main, ["--data", world.data, "--init", f5, "--out", tmp_path / "tts"], "has a vocabulary", "bytes")


def test_vocos_is_not_trained(world, vocos, tmp_path, fails):
    args = ["--data", world.data, "--init", vocos, "--out", tmp_path / "vae", *VAE_FLAGS]
    fails(train_vae.main, args, "is Vocos", "f5-mel")
