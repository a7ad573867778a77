"""Pictures at the size a model works with."""

from PIL import Image


def crop_to(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale the picture until it just covers width x height pixels, and cut out the middle."""
    scale = max(width / image.width, height / image.height)
    wide, high = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    scaled = image.resize((wide, high), Image.Resampling.LANCZOS)
    left, top = (wide - width) // 2, (high - height) // 2
    return scaled.crop((left, top, left + width, top + height))
