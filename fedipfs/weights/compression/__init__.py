"""Updates in few bytes: a change against a base, rounded or thinned out; see docs/formats.md."""

from fedipfs.weights.compression.decoded import Decoded, decode
from fedipfs.weights.compression.encode import Encoded, encode
from fedipfs.weights.compression.parts import FORMAT, most_bytes
from fedipfs.weights.compression.payload import is_payload
from fedipfs.weights.compression.spec import CODECS, DENSE, SPARSE, Spec

__all__ = [
    "CODECS",
    "DENSE",
    "FORMAT",
    "SPARSE",
    "Decoded",
    "Encoded",
    "Spec",
    "decode",
    "encode",
    "is_payload",
    "most_bytes",
]
