"""Networks written to a folder come back the same, and what is no such folder is refused."""

import json

import pytest
import torch

import banded_gmrf as bg
import supn_models

pytest.importorskip("safetensors")

STENCIL = bg.Stencil.square(3)
CASES = {
    "ConvAutoencoder": lambda: supn_models.ConvAutoencoder((8, 8), latent_size=3, channels=(2, 4)),
    "ConvVAE": lambda: supn_models.ConvVAE((8, 8), latent_size=3, channels=(2, 4)),
    "CovarianceMLP": lambda: supn_models.CovarianceMLP(5, (3, 4), STENCIL, hidden=(6,)),
    "CovarianceNetwork": lambda: supn_models.CovarianceNetwork(2, STENCIL, channels=4, num_levels=2),
    "LatentCovarianceNetwork": lambda: supn_models.LatentCovarianceNetwork((8, 8), 3, STENCIL, decoder_channels=(2, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_a_network_comes_back_the_same(name, dtype, tmp_path):
    network = CASES[name]().double()
    for parameter in network.parameters():  # heads start at zero
        torch.nn.init.normal_(parameter)
    network.to(dtype)
    supn_models.save_pretrained(network, tmp_path / "a" / "b")
    again = supn_models.from_pretrained(tmp_path / "a" / "b")
    assert type(again) is type(network)
    assert not again.training
    assert json.dumps(again.config) == json.dumps(network.config)
    assert again.state_dict().keys() == network.state_dict().keys()
    for key, value in network.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_other_modules_are_refused(tmp_path):
    class Mine(supn_models.CovarianceMLP):
        pass

    for network in (torch.nn.Linear(2, 2), Mine(5, (3, 4), STENCIL)):
        with pytest.raises(TypeError, match=f"network is a {type(network).__name__}, expected one of ConvAutoencoder"):
            supn_models.save_pretrained(network, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "broken",
    [
        b"not json",
        b"\xff\xfe not UTF-8",
        b"[]",
        b'{"class": "Linear", "config": {}}',
        b'{"class": "ConvVAE", "config": {}}',
        b'{"class": "ConvVAE", "config": {"grid": [8, 0]}}',
    ],
)
def test_what_is_no_such_folder_is_refused(broken, tmp_path):
    with pytest.raises(FileNotFoundError):
        supn_models.from_pretrained(tmp_path)
    supn_models.save_pretrained(CASES["CovarianceMLP"](), tmp_path)
    (tmp_path / "config.json").write_bytes(broken)
    with pytest.raises(ValueError, match="is not a folder of save_pretrained"):
        supn_models.from_pretrained(tmp_path)


def test_a_network_of_several_precisions_comes_back_the_same(tmp_path):
    network = CASES["CovarianceNetwork"]().bfloat16()
    network.head.double()
    supn_models.save_pretrained(network, tmp_path)
    again = supn_models.from_pretrained(tmp_path)
    assert (again.stem.weight.dtype, again.head.conv.weight.dtype) == (torch.bfloat16, torch.float64)
    supn_models.save_pretrained(CASES["CovarianceNetwork"](), tmp_path)  # into the file that it was read from
    torch.testing.assert_close(again.stem.weight, network.stem.weight, rtol=0, atol=0)


def test_other_weights_are_refused(tmp_path):
    supn_models.save_pretrained(CASES["CovarianceMLP"](), tmp_path)
    config = (tmp_path / "config.json").read_text()
    supn_models.save_pretrained(CASES["CovarianceNetwork"](), tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="is not a folder of save_pretrained"):
        supn_models.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="is not a folder of save_pretrained"):
        supn_models.from_pretrained(tmp_path)
