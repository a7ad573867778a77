"""Encoder propagation stated by forward hooks, one call after the other, without encache."""

from contextlib import ExitStack, contextmanager

import torch


def unet_children(unet, cut):
    """The children of a UNet that a cut caches; without one, the UNet itself."""
    if cut == "none":
        return [unet]
    first = [unet.conv_in, *([unet.transformer_in] if hasattr(unet, "transformer_in") else [])]
    ups = [] if cut == "mid" else unet.up_blocks[: int(cut[2:]) + 1]
    return [*first, *unet.down_blocks, unet.mid_block, *ups]


def mix(weights, outputs):
    """Weighted sum of tensors, or of tuples, lists and dicts of tensors."""
    one = outputs[0]
    if isinstance(one, torch.Tensor):
        return sum(weight * output for weight, output in zip(weights, outputs, strict=True))
    if isinstance(one, dict):
        return type(one)(**{key: mix(weights, [each[key] for each in outputs]) for key in one})
    return tuple(mix(weights, parts) for parts in zip(*outputs, strict=True))


def calls_from(first, stop, keys):
    """The calls that a pipeline makes, each with whether it is a key call."""
    return [(call, call in keys) for call in range(first, stop)]


@contextmanager
def propagation(denoiser, children, calls, *, order=0, controlnet=None):
    """Let the denoiser's children answer, between key calls, from what they gave at key calls.

    At order 0 they repeat the last one, at order 1 they go on along the line through the last two.
    A ControlNet repeats what it said at the last key call: it is not asked in between.
    """
    made, kept, passed = -1, {}, []

    def begin(*_):
        nonlocal made
        made += 1
        call, key = calls[made]
        if key:
            passed.append(call)

    def answer(child, _, output):
        mine = kept.setdefault(child, [])
        call, key = calls[made]
        if key:
            mine.append(mix([1.0], [output]))  # FreeU works in place
            return output
        if order == 0 or len(mine) == 1:
            return mix([1.0], mine[-1:])
        earlier, later = passed[-2:]
        weight = (call - earlier) / (later - earlier)
        return mix([1 - weight, weight], mine[-2:])

    def control(_, __, output):
        if calls[made + 1][1]:  # it runs before the denoiser
            kept["control"] = output
        return kept["control"]

    with ExitStack() as stack:
        hooks = [denoiser.register_forward_pre_hook(begin)]
        hooks += [child.register_forward_hook(answer) for child in children]
        if controlnet is not None:
            hooks.append(controlnet.register_forward_hook(control))
        for hook in hooks:
            stack.callback(hook.remove)
        yield
    assert made == len(calls) - 1


@contextmanager
def counting(*modules):
    """How often each module runs."""
    counts = dict.fromkeys(modules, 0)

    def count(module, *_):
        counts[module] += 1

    hooks = [module.register_forward_pre_hook(count) for module in modules]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
