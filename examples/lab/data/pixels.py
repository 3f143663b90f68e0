"""Conversion of pixels between a tanh generator's range and the bytes of an image file."""

from torch import Tensor


def as_floats(images: Tensor) -> Tensor:
    """Return bytes as floats in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)


def as_bytes(images: Tensor) -> Tensor:
    """Return floats in [-1, 1] as bytes from 0 to 255."""
    return images.add(1).mul_(127.5).round_().clamp_(0, 255).byte()
