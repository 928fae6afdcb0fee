"""The two-dimensional VAE is the package's own: exported, it computes the same."""

from dataclasses import replace

import pytest
import torch

from hunyuan3.vae.autoencoder import AutoencoderKLConv3D
from training.flat_vae import FlatVAE, volumetric
from training.vae import TINY_VAE


@pytest.fixture(scope="module")
def flat() -> FlatVAE:
    """Stirred, so that no convolution is zero and no norm is plain."""
    vae = FlatVAE(TINY_VAE)
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator) * (parameter.std().nan_to_num() + 0.1)
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def package(flat: FlatVAE) -> AutoencoderKLConv3D:
    vae = AutoencoderKLConv3D(TINY_VAE)
    vae.load_state_dict(volumetric(flat.state_dict()))
    return vae


def test_encodes_the_same(flat: FlatVAE, package: AutoencoderKLConv3D) -> None:
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, logvar = flat.encode(pixels)
    posterior = package.encode(pixels)
    torch.testing.assert_close(posterior.mean, mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(posterior.logvar, logvar, atol=1e-4, rtol=1e-4)
    assert mean.std() > 0.1


def test_decodes_the_same(flat: FlatVAE, package: AutoencoderKLConv3D) -> None:
    latents = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(2))
    expected = flat.decode(latents)
    torch.testing.assert_close(package.decode(latents), expected, atol=1e-4, rtol=1e-4)
    assert expected.shape == (2, 3, 64, 96)


def test_a_temporal_vae_is_refused() -> None:
    with pytest.raises(ValueError, match="ffactor_temporal is 4"):
        FlatVAE(replace(TINY_VAE, ffactor_temporal=4))
