"""stub"""

import numpy as np, PIL.Image
from typing import Any


class UnreadableImageError(Exception): ...


def to_array(image: Any, *, size: Any, channels: int, resize: str = "crop") -> np.ndarray:
    image = image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]).resize((size[1], size[0]))
    return np.asarray(image).reshape(*size, channels)


def read_images(
    sources: Any, *, size: Any, channels: int, resize: str = "crop", progress: Any = None
):
    for s in sources:
        try:
            with PIL.Image.open(s) as im:
                yield to_array(im, size=size, channels=channels)
        except OSError as e:
            yield UnreadableImageError(str(e))


def is_image(content: bytes) -> bool:
    import io

    try:
        PIL.Image.open(io.BytesIO(content)).close()
    except OSError:
        return False
    return True


def find_images(folder: Any) -> list[Any]:
    return sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in PIL.Image.registered_extensions()
    )
