"""Where noise comes from: AES in counter mode, keyed by the operating system.

torch's CPU generator keeps 32 bits of any seed (`manual_seed(s)` and `manual_seed(s + 2**32)` give
the same numbers), so whoever knows a model could try all of them and take the noise off again;
NumPy's and Python's global generators can be seeded by any code in the process. Noise that is to
hide something comes from here: NumPy's samplers over a keystream that nobody can seed or predict.

Samples are floating-point numbers, whose last bits are not those of a real Gaussian (Mironov 2012,
"On Significance of the Least Significant Bits for Differential Privacy"); nothing here mends that.
"""

from __future__ import annotations

import secrets

import numpy as np
from randomgen import AESCounter

KEY_BYTES = 16
SECRET = "AES-128 counter mode, keyed by the operating system"
FLOATS = "as floating-point numbers, whose last bits are not hidden"
KNOWN = "AES-128 counter mode, keyed by the run's seed: whoever knows it can take the noise off"


def generator(key: bytes | None = None) -> np.random.Generator:
    """NumPy's samplers over AES-128 in counter mode (NIST SP 800-38A, little-endian counter).

    `key` has 16 bytes. None, the default, takes them from `secrets`; a given key makes noise that
    can be repeated, and so hides nothing from whoever knows it.
    """
    key = secrets.token_bytes(KEY_BYTES) if key is None else key
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    return np.random.Generator(AESCounter(key=int.from_bytes(key, "little"), counter=0))
