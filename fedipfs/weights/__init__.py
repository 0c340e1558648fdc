"""Arrays <-> bytes: canonical safetensors in tensor-aligned UnixFS leaves."""

from fedipfs.weights.codec import Weights, chunks, file_chunks, put, put_lazily
from fedipfs.weights.layout import TensorSpec, canonical, code_of, encode_header, spec_of
from fedipfs.weights.leaves import Leaves, StoredLeaves

__all__ = [
    "Leaves",
    "StoredLeaves",
    "TensorSpec",
    "Weights",
    "canonical",
    "chunks",
    "code_of",
    "encode_header",
    "file_chunks",
    "put",
    "put_lazily",
    "spec_of",
]
