"""What compression was chosen: a codec and its parameters, as configuration and as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedipfs.errors import CompressionError, ConfigError

DENSE = ("fp16", "bf16", "int8", "int4")  # a number for every coordinate
SPARSE = ("topk", "randk")  # numbers for a share of them
CODECS = (*DENSE, *SPARSE)

_FRACTION = {"topk": 0.01, "randk": 0.1}
_FEEDBACK = ("int4", *SPARSE)  # where it is on unless it is said otherwise


@dataclass(frozen=True)
class Spec:
    """A codec and its parameters; `str()` gives the text that travels: "topk fraction=0.01 zstd".

    `fraction` is the share of coordinates that `topk` and `randk` send, in (0, 1]; None for the
    others. `zstd`: compressed further without loss, where that helps. `feedback`: what an update
    lost is added to the same client's next one.
    """

    codec: str
    fraction: float | None = None
    zstd: bool = True
    feedback: bool = False

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise CompressionError(
                f"compression {self.codec!r:.80} is not one of {', '.join(CODECS)}"
            )
        value = self.fraction
        if self.codec not in SPARSE:
            if value is not None:
                raise CompressionError(f"{self.codec} sends every coordinate; it has no fraction")
        elif type(value) not in (int, float) or not 0 < value <= 1:  # type: ignore[operator]
            raise CompressionError(
                f"{self.codec} with fraction={value!r:.80}, which is not above 0 and at most 1; "
                "0.01 sends one coordinate in a hundred"
            )

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Spec | None:
        """That of a configuration's `compression` section; None for `name: none`.

        Raises ConfigError for what cannot be right, with the reason.
        """
        options = {key: value for key, value in section.items() if key != "name"}
        name, down = section["name"], options.pop("down", False)
        allowed = {"zstd", "feedback"} if name in CODECS else set()
        if name in SPARSE:
            allowed |= {"fraction"}
            options.setdefault("fraction", _FRACTION[name])
        for key in sorted(options.keys() - allowed):
            raise ConfigError(f"compression.{key}: compression={name} has no such option")
        for key, value in {**options, "down": down}.items():
            if key != "fraction" and type(value) is not bool:
                raise ConfigError(f"compression.{key}={value} is neither true nor false")
        if name == "none":
            if down:
                raise ConfigError(
                    "compression.down needs a compression: choose compression=int8, or leave it out"
                )
            return None
        options.setdefault("feedback", name in _FEEDBACK)
        try:
            spec = cls(name, **options)
        except CompressionError as error:
            raise ConfigError(f"compression: {error}") from None
        if down:
            spec.for_models()
        return spec

    def for_models(self) -> Spec:
        """The same for whole models, which have nothing to make up for; ConfigError if sparse."""
        if self.codec in SPARSE:
            raise ConfigError(
                f"{self.codec} cannot carry a whole model, only {', '.join(DENSE)} can: leave "
                "compression.down (compress_models) off"
            )
        return replace(self, feedback=False)

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Inverse of `str()`; CompressionError for anything that `str()` does not give."""
        codec, *words = text[:200].split(" ")
        options: dict[str, Any] = {"zstd": "zstd" in words, "feedback": "feedback" in words}
        for word in words:
            if word.startswith("fraction="):
                options["fraction"] = _number(word.removeprefix("fraction="))
        spec = cls(codec, **options)
        if str(spec) != text:
            raise CompressionError(f"{text!r:.80} is no compression; {str(spec)!r} would be")
        return spec

    def __str__(self) -> str:
        words = [self.codec]
        if self.fraction is not None:
            words.append(f"fraction={self.fraction!r}")
        words += [word for word in ("zstd", "feedback") if getattr(self, word)]
        return " ".join(words)

    def count(self, elements: int) -> int:
        """Coordinates that are sent of a model with `elements`: ceil(fraction * elements).

        The product is that of 64-bit floats: of 100 coordinates the fraction 0.07 sends eight.
        """
        return min(elements, math.ceil((self.fraction or 1.0) * elements))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
