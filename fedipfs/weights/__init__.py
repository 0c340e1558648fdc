"""Arrays <-> bytes: canonical safetensors in tensor-aligned UnixFS leaves."""

from fedipfs.weights.base import Tensors, chunks
from fedipfs.weights.codec import Weights, file_chunks, put
from fedipfs.weights.layout import (
    TensorSpec,
    canonical,
    code_of,
    encode_header,
    is_float,
    spec_of,
)
from fedipfs.weights.leaves import Leaves, StoredLeaves

__all__ = [
    "Leaves",
    "StoredLeaves",
    "TensorSpec",
    "Tensors",
    "Weights",
    "canonical",
    "chunks",
    "code_of",
    "encode_header",
    "file_chunks",
    "is_float",
    "put",
    "spec_of",
]
