"""Binary layers: signs with pluggable gradients, scales, bits that are stored packed, and products of bits.

``bits`` holds the arithmetic of signs, ``layers`` the layers that are trained, ``packed`` the layers that are executed,
``elastic`` the learned steps of binary transformers, ``procedure`` which layers of a trained model become binary.
"""

from torchgraft.engines.binary.bits import (
    BACKENDS,
    Estimator,
    Identity,
    Polynomial,
    Straight,
    pack_signs,
    scaled_rows,
    sign,
    sign_product,
    unpack_signs,
)
from torchgraft.engines.binary.layers import (
    BinaryConv2d,
    BinaryLayer,
    BinaryLinear,
    binary_layers,
    hidden_layers,
    rebuild,
    to_binary,
)
from torchgraft.engines.binary.packed import PackedConv2d, PackedLinear, freeze

__all__ = [
    "BACKENDS",
    "BinaryConv2d",
    "BinaryLayer",
    "BinaryLinear",
    "Estimator",
    "Identity",
    "PackedConv2d",
    "PackedLinear",
    "Polynomial",
    "Straight",
    "binary_layers",
    "freeze",
    "hidden_layers",
    "pack_signs",
    "rebuild",
    "scaled_rows",
    "sign",
    "sign_product",
    "to_binary",
    "unpack_signs",
]
