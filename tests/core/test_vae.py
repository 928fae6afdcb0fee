"""The autoencoder against the recordings, and its own rules about precision, names and cancelling."""

import json

import pytest
import torch
from safetensors.torch import load_file

from hunyuan3.config import ModelConfig, VAEConfig, vae_config
from hunyuan3.errors import RequestError
from hunyuan3.image.preprocess import to_uint8
from hunyuan3.vae.autoencoder import AutoencoderKLConv3D, Posterior
from tests.core.golden_paths import checkpoint, component, golden_root, scenarios

TINY = VAEConfig(
    in_channels=3,
    out_channels=3,
    latent_channels=4,
    block_out_channels=(32, 32, 64, 64, 64),
    layers_per_block=1,
    ffactor_spatial=16,
    ffactor_temporal=4,
    sample_size=384,
    scaling_factor=0.5,
    shift_factor=0.25,
)


def build(config, weights):
    """An autoencoder made of these weights, in their dtype; strict."""
    with torch.device("meta"):
        vae = AutoencoderKLConv3D(config)
    vae.load_state_dict(weights, strict=True, assign=True)
    return vae


def of_checkpoint(name):
    folder = checkpoint(name)
    weights = {}
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        weights |= {key.removeprefix("vae."): t.float() for key, t in tensors.items() if key.startswith("vae.")}
    return build(ModelConfig.from_folder(folder).vae, weights)


def recorded_components():
    names = [name for name in ("vae", "vae_wide") if (golden_root() / "components" / f"{name}.json").is_file()]
    assert names, f"no recording of the VAE under {golden_root()}"
    return names


def load_component(name):
    """(autoencoder, tensors) of a component recording."""
    meta = component(name)
    tensors = load_file(golden_root() / "components" / f"{name}.safetensors")
    if "checkpoint" in meta:
        return of_checkpoint(meta["checkpoint"]), tensors
    weights = {key.removeprefix("weight."): t.float() for key, t in tensors.items() if key.startswith("weight.")}
    return build(vae_config(meta["config"], name), weights), tensors


def pairs(tensors, kind):
    found = sorted({key.partition(".")[0] for key in tensors if key.startswith(kind)})
    assert found, f"no {kind} was recorded"
    return found


def assert_close(actual, recorded, what):
    """Within 2e-5, or 1e-5 of the largest value: what an independent implementation met with room."""
    limit = max(2e-5, 1e-5 * recorded.abs().max().item())
    assert actual.shape == recorded.shape, what
    error = (actual - recorded).abs().max().item()
    assert error <= limit, f"{what}: {error:.2e} off, {limit:.2e} allowed"


def scenario_tensors(*keys):
    """(recording, tensors) of the scenarios that hold all of these."""
    for recording in scenarios():
        path = golden_root() / "scenarios" / f"{recording['name']}.safetensors"
        tensors = load_file(path) if path.is_file() else {}
        if all(key in tensors for key in keys):
            yield recording, tensors


@pytest.mark.parametrize("name", recorded_components())
def test_encoding_gives_the_recorded_posterior(name):
    vae, tensors = load_component(name)
    for at in pairs(tensors, "encode"):
        posterior = vae.encode(tensors[f"{at}.pixels"])
        assert_close(posterior.mean, tensors[f"{at}.mean"][:, :, 0], f"{at}.mean")
        assert_close(posterior.logvar, tensors[f"{at}.logvar"][:, :, 0], f"{at}.logvar")


@pytest.mark.parametrize("name", recorded_components())
def test_decoding_gives_the_recorded_pixels(name):
    vae, tensors = load_component(name)
    for at in pairs(tensors, "decode"):
        pixels = vae.decode(tensors[f"{at}.latents"][:, :, 0])
        assert_close(pixels, tensors[f"{at}.pixels"][:, :, 0], at)


def test_every_traced_module_gives_the_recorded_output():
    compared = set()
    for name in recorded_components():
        vae, tensors = load_component(name)
        traced = {key.removeprefix("trace."): t for key, t in tensors.items() if key.startswith("trace.")}
        outputs = {}
        for path in traced:
            if path not in ("latents", "pixels"):
                hook = lambda _module, _args, output, path=path: outputs.__setitem__(path, output.clone())  # noqa: E731
                vae.get_submodule(path).register_forward_hook(hook)
        if traced:
            vae.encode(traced["pixels"])
            vae.decode(traced["latents"][:, :, 0])
        for path, output in outputs.items():
            assert_close(output, traced[path], path)
            compared.add(path.partition(".")[0])
    assert compared == {"encoder", "decoder"}


def test_final_pictures_are_the_recorded_ones():
    compared = 0
    vaes = {}
    for recording, tensors in scenario_tensors("decode_input_latents", "image_uint8"):
        if tensors["image_uint8"].shape[1] > 256 or recording["checkpoint"] in vaes and "image_float" not in tensors:
            continue  # some of every checkpoint are enough: the others use the same weights
        vae = vaes.setdefault(recording["checkpoint"], of_checkpoint(recording["checkpoint"]))
        pixels = vae.decode(tensors["decode_input_latents"][:, :, 0])
        difference = to_uint8(pixels).int() - tensors["image_uint8"].int()
        assert difference.abs().max() <= 1, recording["name"]
        if "image_float" in tensors:
            assert_close(pixels, tensors["image_float"], recording["name"])
        compared += 1
    if not compared:
        pytest.skip("the committed subset holds no finished picture")


def test_the_decoder_is_fed_unscaled_latents():
    compared = 0
    for recording, tensors in scenario_tensors("decode_input_latents", "step_latents"):
        with torch.device("meta"):
            vae = AutoencoderKLConv3D(ModelConfig.from_folder(checkpoint(recording["checkpoint"])).vae)
        latents = vae.unscale(tensors["step_latents"][-1])
        assert torch.equal(latents, tensors["decode_input_latents"][:, :, 0]), recording["name"]
        compared += 1
    if not compared:
        pytest.skip("the committed subset holds no scenario")


def test_one_generator_draws_the_recorded_conditioning_latents_in_order():
    compared = 0
    for recording, tensors in scenario_tensors("noise"):
        with torch.device("meta"):
            vae = AutoencoderKLConv3D(ModelConfig.from_folder(checkpoint(recording["checkpoint"])).vae)
        for k, stage in enumerate(recording["stages"]):
            images = sum(key.startswith(f"stage{k}.cond_vae_mean_") for key in tensors)
            if not images or not stage["generator_seed"]:
                continue
            generator = torch.Generator().manual_seed(stage["generator_seed"][0])
            for i in range(images):
                mean, logvar = (tensors[f"stage{k}.cond_vae_{part}_{i}"][:, :, 0] for part in ("mean", "logvar"))
                latent = vae.scale(Posterior(mean, logvar).sample(generator))[0]
                assert_close(latent, tensors[f"stage{k}.cond_latent_{i}"], f"{recording['name']} {k} {i}")
                compared += 1
    if not compared:
        pytest.skip("the committed subset holds no scenario with input pictures")


def test_parameters_have_the_published_names_and_shapes():
    path = golden_root() / "full_size_tensor_names.json"
    if not path.is_file():
        pytest.skip("the committed subset holds no list of published names")
    published = json.loads(path.read_text(encoding="utf-8"))
    names = published["base_and_instruct"]
    expected = {key.removeprefix("vae."): shape for key, (shape, _) in names.items() if key.startswith("vae.")}
    with torch.device("meta"):
        vae = AutoencoderKLConv3D(vae_config(published["config"]["vae"], "config.json"))
    assert {key: list(parameter.shape) for key, parameter in vae.named_parameters()} == expected
    assert len(expected) == 280
    assert not list(vae.buffers())


@pytest.mark.parametrize("name", recorded_components())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_compute_what_autocast_computes(name, dtype):
    """The reference runs under autocast; torch's own, around the float32 modules, is the judge here."""
    vae, tensors = load_component(name)
    pixels, latents = tensors["encode0.pixels"], tensors["decode0.latents"][:, :, 0]
    with torch.autocast("cpu", dtype):
        posterior, picture = vae.encode(pixels), vae.decode(latents)
    assert posterior.mean.dtype == picture.dtype == dtype
    vae.to(dtype)
    found = vae.encode(pixels)
    assert torch.equal(found.mean, posterior.mean)
    assert torch.equal(found.logvar, posterior.logvar)
    assert torch.equal(vae.decode(latents), picture)


@pytest.mark.parametrize("name", recorded_components())
@pytest.mark.parametrize("dtype, limit", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision_stays_close_to_float32(name, dtype, limit):
    vae, tensors = load_component(name)
    vae.to(dtype)
    mean, recorded = vae.encode(tensors["encode0.pixels"]).mean, tensors["encode0.mean"][:, :, 0]
    assert (mean.float() - recorded).abs().max() < limit * recorded.abs().max()
    pixels, recorded = vae.decode(tensors["decode0.latents"][:, :, 0]), tensors["decode0.pixels"][:, :, 0]
    assert (pixels.float() - recorded).abs().max() < limit * recorded.abs().max()


def random_vae(dtype=torch.float32):
    torch.manual_seed(0)
    return AutoencoderKLConv3D(TINY).to(dtype)


def test_the_decoder_adds_up_in_float32_and_the_encoder_in_float16():
    vae = random_vae(torch.float16)
    streams = {}
    for path in ("encoder.down.0.block.0", "encoder.mid.attn_1", "decoder.mid.attn_1", "decoder.up.4.block.1"):
        hook = lambda _module, _args, output, path=path: streams.__setitem__(path, output.dtype)  # noqa: E731
        vae.get_submodule(path).register_forward_hook(hook)
    vae.encode(torch.zeros(1, 3, 16, 16))
    vae.decode(torch.zeros(1, 4, 1, 1))
    assert {dtype for path, dtype in streams.items() if path.startswith("encoder")} == {torch.float16}
    assert {dtype for path, dtype in streams.items() if path.startswith("decoder")} == {torch.float32}


def test_posterior_noise_is_drawn_in_the_dtype_of_the_mean_picture_by_picture():
    mean, logvar = torch.zeros(2, 4, 1, 3, dtype=torch.float16), torch.zeros(2, 4, 1, 3, dtype=torch.float16)
    sample = Posterior(mean, logvar).sample(torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    expected = [torch.randn(1, 4, 1, 1, 3, generator=generator, dtype=torch.float16)[:, :, 0] for _ in range(2)]
    assert sample.dtype == torch.float32
    assert torch.equal(sample, torch.cat(expected).float())


def test_posterior_log_variance_is_clamped():
    vae = random_vae()
    with torch.no_grad():
        vae.encoder.conv_out.bias[TINY.latent_channels :] = torch.tensor([500.0, -500.0, 500.0, -500.0])
    logvar = vae.encode(torch.rand(1, 3, 32, 16) * 2 - 1).logvar
    assert logvar.amax() == 20.0
    assert logvar.amin() == -30.0


def test_pictures_of_a_batch_do_not_see_each_other():
    vae = random_vae()
    pixels, latents = torch.rand(2, 3, 32, 16) * 2 - 1, torch.randn(2, 4, 2, 1)
    assert torch.equal(vae.encode(pixels).mean[1:], vae.encode(pixels[1:]).mean)
    assert torch.equal(vae.decode(latents)[1:], vae.decode(latents[1:]))
    assert not torch.equal(vae.decode(latents)[1:], vae.decode(latents[:1]))


def test_scaling_takes_the_shift_away_first_and_unscaling_undoes_it():
    vae = random_vae()
    latents = torch.tensor([0.25, 1.25])
    assert vae.scale(latents).tolist() == [0.0, 0.5]
    assert vae.unscale(vae.scale(latents)).tolist() == [0.25, 1.25]


def test_sizes_between_latents_are_refused_with_both_numbers():
    with pytest.raises(RequestError, match="multiples of 16; this picture is 24x16"):
        random_vae().encode(torch.zeros(1, 3, 24, 16))


class StopAsked(Exception):
    pass


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_a_cancelled_job_stops_between_blocks(direction):
    vae = random_vae()
    ran, asked = [], []
    for path, module in vae.named_modules():
        if path.endswith(("block.0", "block.1")):
            module.register_forward_hook(lambda *_, path=path: ran.append(path))

    def check_cancelled():
        asked.append(len(ran))
        if len(ran) == 2:
            raise StopAsked

    with pytest.raises(StopAsked):
        getattr(vae, direction)(
            torch.zeros(1, 3 if direction == "encode" else 4, 16, 16), check_cancelled=check_cancelled
        )
    assert len(ran) == 2
    assert asked[0] == 0
