"""Which shapes the model is trained on, and which of them an image takes.

A batch holds images of one size, so the sizes are few. Every bucket has sides that are a multiple of what the VAE
and the denoiser halve away, and at most the area of the square `resolution` x `resolution`: memory and time are bounded
by the square. An image takes the bucket whose shape is nearest to its own on a logarithmic scale, is scaled until it
covers it, and loses what stands over. Edge cases:

- No image is left out. One narrower than every bucket takes the narrowest and is cropped more; one smaller than
  its bucket is enlarged. Lint says both.
- A `resolution` that is no multiple is rounded down: the square is always there, and never larger than asked.
- With a large multiple there are few buckets (three at resolution 64 and multiple 16: 48x80, 64x64, 80x48).
- Portrait and landscape are treated alike: turning an image turns its bucket.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from mmpeft import randomness
from mmpeft.errors import ConfigError


class Bucket(NamedTuple):
    """A size that images are trained at, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def make_buckets(resolution: int, multiple: int, max_aspect: float = 2.0) -> tuple[Bucket, ...]:
    """List the buckets for a resolution, narrowest first.

    For each side that is a multiple, the longest other side that keeps the area at or below resolution²; both ways
    round; and the square.

    Args:
        resolution: side of the square whose area is the bound, pixels.
        multiple: VAE factor times the denoiser's downsampling; 16 for the pocket base, 64 for SD 1.5.
        max_aspect: longest side over shortest, at most; >= 1.

    Raises:
        ConfigError: `resolution` is below `multiple`, or a number is out of range.
    """
    if multiple < 1:
        raise ConfigError(f"the sides of a bucket must be a multiple of at least 1; got {multiple}")
    if resolution < multiple:
        raise ConfigError(
            f"data.resolution: this base needs at least {multiple} (and a multiple of it); got {resolution}"
        )
    if max_aspect < 1:
        raise ConfigError(f"data.max_aspect: must be at least 1 (only the square); got {max_aspect}")
    side = resolution // multiple * multiple
    buckets = {Bucket(side, side)}
    for one in range(multiple, int(resolution * max_aspect) + 1, multiple):
        other = resolution**2 // one // multiple * multiple
        if other and max(one, other) <= max_aspect * min(one, other):
            buckets |= {Bucket(one, other), Bucket(other, one)}
    return tuple(sorted(buckets, key=lambda bucket: (Fraction(bucket.width, bucket.height), bucket.width)))


def choose_bucket(size: tuple[int, int], buckets: Sequence[Bucket]) -> Bucket:
    """Pick the bucket whose aspect ratio is nearest to an image's: least |log(w/h) - log(W/H)|, ties to the larger.

    Args:
        size: width and height of the upright image, pixels.
        buckets: at least one.
    """
    width, height = size

    def distance(bucket: Bucket) -> tuple[Fraction, int]:
        # The ratio of the two aspects, as exact as integers are, grows with the difference of their logarithms.
        one, other = width * bucket.height, height * bucket.width
        return Fraction(max(one, other), min(one, other)), -bucket.width * bucket.height

    return min(buckets, key=distance)


def crop_offset(seed: int, epoch: int, index: int) -> tuple[float, float]:
    """Draw where the crop of a sample lies at one visit: (left, top), each in [0, 1), as `fit` takes them."""
    left, top = randomness.uniform((2,), seed, "crop", epoch, index).tolist()
    return left, top


def is_flipped(seed: int, epoch: int, index: int) -> bool:
    """Draw whether a sample is mirrored left to right at one visit, half the time."""
    return bool(randomness.uniform((), seed, "flip", epoch, index) < 0.5)
