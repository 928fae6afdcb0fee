"""The autoencoder against the recordings, and its own rules about precision, names and cancelling."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from hunyuan3.config import ModelConfig, VAEConfig, vae_config
from hunyuan3.errors import RequestError
from hunyuan3.image.preprocess import to_uint8
from hunyuan3.vae.autoencoder import AutoencoderKLConv3D, Posterior
from hunyuan3.vae.layers import GroupNorm
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


def scenarios_with(*keys):
    """(recording, its tensors file) of the scenarios that hold all of these; may be none in the committed subset."""
    found = []
    for recording in scenarios():
        path = golden_root() / "scenarios" / f"{recording['name']}.safetensors"
        if path.is_file():
            with safe_open(path, "pt") as tensors:
                if set(keys) <= set(tensors.keys()):
                    found.append(pytest.param(recording, path, id=recording["name"]))
    return found


def meta_vae(recording):
    """The autoencoder of a scenario's checkpoint without weights, for what only the config decides."""
    with torch.device("meta"):
        return AutoencoderKLConv3D(ModelConfig.from_folder(checkpoint(recording["checkpoint"])).vae)


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


def watch(vae, paths, look):
    """Runs `look` on what each of these modules returns, collects the results by path."""
    seen = {}
    for path in paths:
        vae.get_submodule(path).register_forward_hook(
            lambda _module, _args, output, path=path: seen.__setitem__(path, look(output))
        )
    return seen


def test_every_traced_module_gives_the_recorded_output():
    compared = set()
    for name in recorded_components():
        vae, tensors = load_component(name)
        traced = {key.removeprefix("trace."): t for key, t in tensors.items() if key.startswith("trace.")}
        if traced:
            outputs = watch(vae, traced.keys() - {"latents", "pixels"}, torch.clone)
            vae.encode(traced["pixels"])
            vae.decode(traced["latents"][:, :, 0])
            for path in traced.keys() - {"latents", "pixels"}:
                assert_close(outputs[path], traced[path], path)
                compared.add(path.partition(".")[0])
    assert compared == {"encoder", "decoder"}


@pytest.mark.parametrize("recording, path", scenarios_with("decode_input_latents", "image_uint8", "image_float"))
def test_final_pictures_are_the_recorded_ones(recording, path):
    tensors = load_file(path)
    pixels = of_checkpoint(recording["checkpoint"]).decode(tensors["decode_input_latents"][:, :, 0])
    assert_close(pixels, tensors["image_float"], recording["name"])
    assert (to_uint8(pixels).int() - tensors["image_uint8"].int()).abs().max() <= 1


@pytest.mark.parametrize("recording, path", scenarios_with("decode_input_latents", "step_latents"))
def test_the_decoder_is_fed_unscaled_latents(recording, path):
    tensors = load_file(path)
    latents = meta_vae(recording).config.unscale(tensors["step_latents"][-1])
    assert torch.equal(latents, tensors["decode_input_latents"][:, :, 0])


@pytest.mark.parametrize("recording, path", scenarios_with("stage0.cond_vae_mean_0"))
def test_one_generator_draws_the_recorded_conditioning_latents_in_order(recording, path):
    tensors = load_file(path)
    vae = meta_vae(recording)
    compared = 0
    for k, stage in enumerate(recording["stages"]):
        images = sum(key.startswith(f"stage{k}.cond_vae_mean_") for key in tensors)
        generator = torch.Generator().manual_seed(stage["generator_seed"][0])
        for i in range(images):
            mean, logvar = (tensors[f"stage{k}.cond_vae_{part}_{i}"][:, :, 0] for part in ("mean", "logvar"))
            latent = vae.config.scale(Posterior(mean, logvar).sample(generator))[0]
            assert_close(latent, tensors[f"stage{k}.cond_latent_{i}"], f"stage {k} picture {i}")
            compared += 1
    assert compared


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


@pytest.fixture(scope="module")
def small():
    """An autoencoder with random weights and the smallest picture and latents that make all its parts work."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(1, 3, 32, 16, generator=generator) * 2 - 1
    return random_vae(), pixels, torch.randn(1, TINY.latent_channels, 1, 2, generator=generator)


def random_vae(dtype=torch.float32):
    torch.manual_seed(0)
    return AutoencoderKLConv3D(TINY).to(dtype)


@pytest.mark.parametrize("dtype, limit", [(torch.float16, 4e-3), (torch.bfloat16, 4e-2)])
def test_half_precision_parameters_compute_what_autocast_computes(small, dtype, limit):
    """The reference runs under autocast; torch's own, around the float32 modules, is the judge here.

    Weights rounded to bfloat16, as published, are exact in float16 too, so the two must agree to the bit.
    """
    vae, pixels, latents = small
    vae = build(TINY, {name: tensor.bfloat16().float() for name, tensor in vae.state_dict().items()})
    exact, exact_picture = vae.encode(pixels), vae.decode(latents)
    with torch.autocast("cpu", dtype):
        expected, expected_picture = vae.encode(pixels), vae.decode(latents)
    vae.to(dtype)
    found, picture = vae.encode(pixels), vae.decode(latents)
    assert found.mean.dtype == picture.dtype == dtype
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.logvar, expected.logvar)
    assert torch.equal(picture, expected_picture)
    for half, full in ((found.mean, exact.mean), (picture, exact_picture)):
        assert 0 < (half.float() - full).abs().max() < limit * full.abs().max()


def test_the_decoder_adds_up_in_float32_and_the_encoder_in_float16(small):
    _, pixels, latents = small
    vae = random_vae(torch.float16)
    paths = ("encoder.down.0.block.0", "encoder.mid.attn_1", "decoder.mid.attn_1", "decoder.up.4.block.1")
    dtypes = watch(vae, paths, lambda output: output.dtype)
    vae.encode(pixels)
    vae.decode(latents)
    assert {dtype for path, dtype in dtypes.items() if path.startswith("encoder")} == {torch.float16}
    assert {dtype for path, dtype in dtypes.items() if path.startswith("decoder")} == {torch.float32}


@torch.no_grad()
def test_norms_done_in_parts_are_those_done_at_once():
    norm = GroupNorm(64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 64, 2, 3, 5).half()
    whole = torch.nn.functional.group_norm(x.float(), 32, norm.weight, norm.bias, 1e-6)
    assert torch.equal(norm(x, torch.float32), whole)
    assert torch.equal(norm(x, torch.float16, swish=True), torch.nn.functional.silu(whole).half())


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
    assert vae.config.scale(latents).tolist() == [0.0, 0.5]
    assert vae.config.unscale(vae.config.scale(latents)).tolist() == [0.25, 1.25]


def test_sizes_between_latents_are_refused_with_both_numbers():
    with pytest.raises(RequestError, match="multiples of 16; this picture is 24x16"):
        random_vae().encode(torch.zeros(1, 3, 24, 16))


class StopAskedError(Exception):
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
            raise StopAskedError

    with pytest.raises(StopAskedError):
        getattr(vae, direction)(
            torch.zeros(1, 3 if direction == "encode" else 4, 16, 16), check_cancelled=check_cancelled
        )
    assert len(ran) == 2
    assert asked[0] == 0
