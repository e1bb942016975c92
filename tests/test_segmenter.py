"""The ResNet U-Net. Its encoder must be torchvision's, number for number."""
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import brainsyn as bs

# depth, name, shape of torchvision 0.28
FROZEN = Path(__file__).with_name("torchvision_resnets.txt")


def fixed_batch_norms(net):
    """Give batch norms statistics as if trained, so that eval mode is not the identity."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize("depth", [18, 34])
def test_encoder_has_torchvisions_names_and_shapes(depth):
    """Every parameter and buffer has its name and shape (fc aside)."""
    expected = {}
    for line in FROZEN.read_text().splitlines():
        number, name, *shape = line.split(" ", 2)
        if int(number) == depth and not name.startswith("fc."):
            sizes = shape[0].split(",") if shape else []
            expected[name] = tuple(int(size) for size in sizes if size.strip())
    found = {name: tuple(value.shape) for name, value in bs.ResNet(depth, 3).state_dict().items()}
    assert len(expected) > 100 and found == expected


@pytest.mark.parametrize("depth", [18, 34])
def test_encoder_computes_what_torchvision_computes(depth):
    """A state dict of torchvision loads strictly and all five feature maps agree to 1e-5."""
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    model = fixed_batch_norms(getattr(models, f"resnet{depth}")(weights=None))
    encoder = bs.ResNet(depth, 3).eval()
    encoder.load_state_dict({name: value for name, value in model.state_dict().items()
                             if not name.startswith("fc.")})
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = [model.relu(model.bn1(model.conv1(x)))]
        h = model.maxpool(expected[0])
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            h = stage(h)
            expected.append(h)
        for a, b in zip(encoder(x), expected):
            assert torch.allclose(a, b, atol=1e-5 * b.abs().max().item())


def test_every_block_adds_its_input():
    """Residual means: with all convolutions at zero a block passes its input on."""
    block = bs.ResNetBlock(32, 32).eval()
    for name, p in block.named_parameters():
        if "conv" in name:
            nn.init.zeros_(p)
    x = torch.rand(2, 32, 8, 12)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("depth, size", [(18, (64, 64)), (34, (37, 50)), (18, (240, 240))])
@pytest.mark.parametrize("predict, outputs", [("regions", 3), ("labels", 4)])
def test_any_size_goes_in_and_comes_out(depth, size, predict, outputs):
    """Height and width need not be multiples of 32; one output a region, or one a class."""
    net = bs.ResUNet(depth, predict=predict).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 4, *size)).shape == (1, outputs, *size)


def test_padding_is_air():
    """A picture whose right and lower part is air gives the same logits whether that part is given
    or padded inside."""
    net = fixed_batch_norms(bs.ResUNet())
    x = torch.randn(1, 4, 40, 50)
    whole = torch.full((1, 4, 64, 64), -1.0)
    whole[..., :40, :50] = x
    with torch.no_grad():
        # group norms look at the whole picture, so both must be padded to the same size
        assert torch.allclose(net(x), net(whole)[..., :40, :50], atol=1e-5)


def test_before_training_tumour_is_unlikely():
    """The head starts with low logits for all that is tumour: most pixels are healthy, and a
    network that has to learn that first spends its first hundreds of steps on it."""
    for predict in ("regions", "labels"):
        net = bs.ResUNet(predict=predict).eval()
        nn.init.zeros_(net.head.weight)
        with torch.no_grad():
            logits = net(torch.randn(1, 4, 32, 32))
        assert torch.allclose(logits[:, -3:], torch.tensor(-3.0)) and (logits[:, :-3] > -1).all()
