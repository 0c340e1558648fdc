"""Folders of images, one for each class, decoded by Pillow.

The layout is that of `datasets`' ImageFolder: an image's class is the name of the folder that it
lies in. That library looks into every file before it names its class, so it is not used here.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fedipfs.data.blocks import Block
from fedipfs.data.columns import BadValue
from fedipfs.data.filters import Filter
from fedipfs.data.section import IMAGE, LABEL, MODES
from fedipfs.errors import DataError, one_line

_DECODERS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # none that runs a program


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images that are decoded when they are asked for; `size` is (height, width) in pixels.

    Where `size` or `mode` is None, all must have the same.
    """

    paths: Sequence[Path]
    size: tuple[int, int] | None
    mode: str | None

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(n, height, width) in grey, (n, height, width, 3) in colour. Raises BadValue."""
        from PIL import Image

        found: NDArray[np.uint8] | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for i, row in enumerate(rows):
                try:
                    image = self._decode(self.paths[row])
                except BadValue as error:
                    raise BadValue(i, str(error)) from None
                except Exception as error:  # whatever Pillow makes of a file
                    reason = one_line(error, 200) or type(error).__name__
                    raise BadValue(i, f"cannot be read as an image ({reason})") from error
                if found is None:
                    found = np.empty((len(rows), *image.shape), np.uint8)
                if image.shape != found.shape[1:]:
                    raise BadValue(i, self._differs(image.shape, found.shape[1:], rows[0]))
                found[i] = image
        return np.empty((0, 0, 0), np.uint8) if found is None else found

    def _decode(self, path: Path) -> NDArray[np.uint8]:
        from PIL import Image, ImageOps

        with Image.open(path, formats=_DECODERS) as opened:
            several = getattr(opened, "n_frames", 1) > 1
            if several and opened.format != "MPO":  # a phone's photograph, and what it adds
                raise BadValue(0, "holds several images; save each by itself")
            image: Any = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                raise BadValue(0, "has more than 8 bits a pixel; use the format numpy or hdf5")
            if self.mode is None and image.mode not in MODES:
                raise BadValue(0, f"has the mode {image.mode}; give data.mode: L or RGB")
            if self.mode not in (None, image.mode):
                image = image.convert(self.mode)
            if self.size is not None and self.size != (image.height, image.width):
                image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
            return np.asarray(image, np.uint8)

    def _differs(self, shape: tuple[int, ...], usual: tuple[int, ...], first: int) -> str:
        what, before = (
            f"{'colour' if len(each) == 3 else 'grey'}, {each[0]} x {each[1]}"
            for each in (shape, usual)
        )
        fix = "data.mode: L or RGB" if len(shape) != len(usual) else "data.size: [height, width]"
        return f"is {what}, and {self.paths[first]} is {before}; give {fix}"


def classes(paths: Sequence[Path], condition: Filter | None) -> tuple[str, ...]:
    """The names of the folders that the images lie in, but for those left out, sorted."""
    names = sorted({path.parent.name for path in paths})
    if condition is not None:
        kept = condition.keep({LABEL: pa.array(names, pa.string())}.__getitem__)
        names = [name for name, keep in zip(names, kept, strict=True) if keep]
    return tuple(names)


def block(
    paths: Sequence[Path],
    roots: Collection[Path],
    size: tuple[int, int] | None,
    mode: str | None,
) -> Block:
    """All images. Raises DataError for one that lies in one of `roots`, so in no class's folder."""
    for path in paths:
        if path.parent in roots:
            raise DataError(
                f"{path} lies in no folder of a class; images belong into folders named as their "
                f"classes, as {path.parent / 'benign' / path.name}"
            )
    columns = {
        IMAGE: Pictures(paths, size, mode),
        LABEL: pa.array([path.parent.name for path in paths], pa.string()),
    }
    return Block(paths[0].parent, 1, len(paths), columns, paths)
