"""The FCR loss against a reference that is written out with hooks on the undivided UNet."""

import copy

import pytest
import torch

from encache.errors import EncacheError
from encache.model.spec import FEATURE_CUTS
from encache.model.split import Halves
from encache.train.fcr import FCR, FCRObjective, NoisedBatch, consistency
from tests.conftest import TEXT_WIDTH, stable_diffusion_scheduler, tiny_unet

ALPHAS = stable_diffusion_scheduler().alphas_cumprod


def make_batch(size=3):
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, size, 4, 16, 16, generator=generator)
    return NoisedBatch(
        clean=clean,
        noise=noise,
        timesteps=torch.tensor([900, 300, 40])[:size],
        deltas=torch.tensor([7, 200, 100])[:size],
        places=torch.tensor([0.0, 0.5, 0.9])[:size],
        text=torch.randn(size, 5, TEXT_WIDTH, generator=generator),
    )


def objective(**settings):
    return FCRObjective(tiny_unet(), ALPHAS, "epsilon", FCR(**settings))


def features_by_hooks(unet, cut, noisy, timesteps, text):
    """What crosses the cut, caught while the whole UNet runs: every skip, and the hidden state."""
    skips, hidden = [], []
    handles = [unet.conv_in.register_forward_hook(lambda m, a, out: skips.append(out))]
    handles += [
        block.register_forward_hook(lambda m, a, out: skips.extend(out[1]))
        for block in unet.down_blocks
    ]
    cached = FEATURE_CUTS.index(cut)
    last = (unet.mid_block, *unet.up_blocks[:3], unet.conv_out)[cached]
    handles.append(last.register_forward_hook(lambda m, a, out: hidden.append(out)))
    predicted = unet(noisy, timesteps, text).sample
    for handle in handles:
        handle.remove()
    used = sum(len(block.resnets) for block in unet.up_blocks[:cached])
    return predicted, [*skips[: len(skips) - used], hidden[0]]


def noised(batch, timesteps):
    alpha_bar = ALPHAS[timesteps].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * batch.clean + (1 - alpha_bar).sqrt() * batch.noise


@pytest.mark.parametrize("cut", FEATURE_CUTS)
@pytest.mark.parametrize("form", ["raw", "relative", "spread"])
def test_the_loss_equals_its_reference(cut, form):
    batch = make_batch()
    losses = objective(weight=0.3, form=form, cut=cut)(batch)
    earlier = torch.tensor([893, 100, 0])  # the last pair would begin below zero
    unet = tiny_unet()
    predicted, older = features_by_hooks(
        unet, cut, noised(batch, batch.timesteps), batch.timesteps, batch.text
    )
    _, newer = features_by_hooks(unet, cut, noised(batch, earlier), earlier, batch.text)
    expected = 0.0
    for old, new in zip(older, newer, strict=True):
        for row in range(3):
            change = ((old[row] - new[row]) ** 2).mean()
            divisor = {
                "raw": 1,
                "relative": ((old[row] ** 2).mean() + (new[row] ** 2).mean()) / 2,
                "spread": sum(
                    side[row].var(dim=(1, 2), correction=0).mean() / 2 for side in (old, new)
                ),
            }[form]
            expected += 0.3 * change / divisor / (3 * len(older))
    torch.testing.assert_close(losses.terms["fcr"], expected)
    torch.testing.assert_close(
        losses.terms["denoise"], torch.nn.functional.mse_loss(predicted, batch.noise)
    )
    sizes = [tensor.square().mean() for tensor in older]
    torch.testing.assert_close(list(losses.watched.values()), sizes)


@pytest.mark.parametrize("cut", FEATURE_CUTS)
def test_the_consistency_reaches_only_encoder_parameters(cut):
    whole = objective(cut=cut)
    whole(make_batch()).terms["fcr"].backward()
    unet = whole.unet
    cached = FEATURE_CUTS.index(cut)
    encoder = [unet.conv_in, unet.down_blocks, unet.mid_block, *unet.up_blocks[:cached]]
    decoder = [*unet.up_blocks[cached:], unet.conv_norm_out, unet.conv_out]
    for module in encoder:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    for module in decoder:
        assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("stop_grad", ["none", "older", "newer"])
def test_stop_grad_holds_one_side_still(stop_grad):
    old, new = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    consistency([old], [new], "raw", stop_grad).backward()
    assert (old.grad is None) == (stop_grad == "older")
    assert (new.grad is None) == (stop_grad == "newer")


def test_shrinking_the_features_lowers_the_raw_form_only():
    features = torch.randn(2, 2, 3, 4, 4, requires_grad=True)
    for form, ratio in (("raw", 0.01), ("relative", 1.0), ("spread", 1.0)):
        whole = consistency([features[0]], [features[1]], form, "none")
        shrunk = consistency([0.1 * features[0]], [0.1 * features[1]], form, "none")
        torch.testing.assert_close(shrunk, ratio * whole)
        # Along the features themselves, the gradient is 2 L (Euler) for raw and nothing otherwise.
        (gradient,) = torch.autograd.grad(whole, features)
        along = (features * gradient).sum()
        torch.testing.assert_close(
            along, 2 * whole if form == "raw" else torch.zeros(()), rtol=1e-4, atol=1e-6
        )


def test_a_constant_lowers_all_forms_but_spread():
    features = torch.randn(2, 2, 3, 4, 4)
    whole = consistency([features[0]], [features[1]], "spread", "none")
    lifted = consistency([features[0] + 9], [features[1] + 9], "spread", "none")
    torch.testing.assert_close(lifted, whole)
    relative = [consistency([f[0]], [f[1]], "relative", "none") for f in (features, features + 9)]
    assert relative[1] < relative[0] / 10


def test_lambda_zero_equals_plain_training_step_for_step():
    ours = objective(weight=0.0)
    plain = tiny_unet()
    batch = make_batch()
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (ours, plain)]
    for _ in range(3):
        losses = ours(batch)
        assert losses.terms.keys() == {"denoise"}
        noisy = noised(batch, batch.timesteps)
        predicted = plain(noisy, batch.timesteps, batch.text).sample
        expected = torch.nn.functional.mse_loss(predicted, batch.noise)
        torch.testing.assert_close(losses.terms["denoise"], expected)
        for loss, optimizer in zip((losses.terms["denoise"], expected), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for left, right in zip(ours.unet.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_gradient_checkpointing_changes_no_gradient():
    plain = objective()
    frugal = copy.deepcopy(plain)
    frugal.enable_gradient_checkpointing()
    for model in (plain, frugal):
        model.train()
        sum(model(make_batch()).terms.values()).backward()
    for left, right in zip(plain.parameters(), frugal.parameters(), strict=True):
        torch.testing.assert_close(left.grad, right.grad)


def test_one_picture_alone():
    losses = objective()(make_batch(1))
    assert all(torch.isfinite(value) for value in losses.terms.values())


def test_cached_error_equals_its_reference():
    batch = make_batch()
    model = objective(weight=0.0, cut="mid", cached_weight=0.7, cached_stride=100)
    model.unet.conv_out.weight.data.mul_(1.1)  # the student has moved away from its teacher
    halves, teacher = Halves(model.unet, "mid"), tiny_unet()
    expected = []
    # (older key call, key call, call): the last one is cut off at timestep 0
    for row, (t, key, s) in enumerate([(900, 800, 800), (300, 200, 150), (40, 0, 0)]):
        x, text = noised(batch, batch.timesteps)[row : row + 1], batch.text[row : row + 1]
        x_key = ddim(x, teacher, t, key, text)
        x_s = ddim(x_key, teacher, key, s, text)
        older, newer = (
            halves.encoder(latents, torch.tensor([at]), {"text": text})
            for latents, at in ((x, t), (x_key, key))
        )
        far = (key - s) / (t - key)
        mixed = [
            (-far * old + (1 + far) * new)[None] for old, new in zip(older, newer, strict=True)
        ]
        got = halves.decoder(mixed, torch.ones(1, 1), torch.tensor([s]), {"text": text})
        wanted = teacher(x_s, s, text).sample
        expected.append((got - wanted).square().mean())
    actual = model(batch).terms["cached"]
    torch.testing.assert_close(actual, 0.7 * torch.stack(expected).mean(), rtol=1e-4, atol=1e-7)
    actual.backward()
    assert all(p.grad is not None for p in model.unet.conv_out.parameters())


def ddim(x, unet, before, after, text):
    a, b = ALPHAS[before], ALPHAS[after]
    noise = unet(x, before, text).sample
    return b.sqrt() * (x - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise


def test_the_teacher_is_no_part_of_the_model():
    plain, distilled = objective(), objective(cached_weight=1.0)
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in distilled.named_parameters()] == names
    assert distilled.state_dict().keys() == plain.state_dict().keys()


def test_features_of_one_pixel_have_no_spread():
    one_pixel = [torch.randn(2, 4, 1, 1)]
    with pytest.raises(EncacheError, match="--resolution"):
        consistency(one_pixel, one_pixel, "spread", "none")
