"""Factors of an adapter: its frozen start, its trained change, and the weights that follow from both.

For a target weight W (m x n), rank r and scale s = alpha / r:

    y = W x + s [dB, B0 + dB] [A0; dA] x            delta form: dA = dB = 0 at the start
    W_merged = W + s (dB A0 + (B0 + dB) dA)

which equals the function W x + s (B A - B0 A0) x of OLoRA (arXiv 2406.01775, section 3) with
A = A0 + dA and B = B0 + dB, but never subtracts two large numbers and leaves W alone. A method with
B0 = 0 (plain LoRA) is the rank-r case y = W x + s dB (A0 + dA) x.

The experts of a mixture whose weights are one parameter are E such maps with a factor each: a stack. All tensors
then have a leading dimension of E. There is no stack of one expert: what has two dimensions is a linear layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """The frozen start of one layer's adapter, or of a stack's, in float32."""

    a0: Tensor
    """(E x) r x n."""
    b0: Tensor | None
    """(E x) m x r; None stands for zeros."""
    full_rank: bool = True
    """False if the slice of the weight that the factors come from was rank-deficient, for any expert of a stack."""

    @property
    def rank(self) -> int:
        """r of this layer; of a stack, each expert's. Layers may differ."""
        return int(self.a0.shape[-2])


@dataclass(frozen=True)
class AdapterWeights:
    """One layer's adapter as trained, or a stack's, in float32."""

    factors: Factors
    da: Tensor
    """(E x) r x n."""
    db: Tensor
    """(E x) m x r."""

    def delta(self, scale: float) -> Tensor:
        """The change of the weight, (E x) m x n, in float32."""
        a0, b0 = self.factors.a0, self.factors.b0
        b = self.db if b0 is None else b0 + self.db
        return scale * (self.db @ a0 + b @ self.da)

    def plain_rank(self) -> int:
        """The rank of `plain_lora`: 2r with B0, r without."""
        return self.factors.rank * (1 if self.factors.b0 is None else 2)

    def plain_lora(self) -> tuple[Tensor, Tensor]:
        """(lora_A, lora_B) of an ordinary LoRA with the same product on the untouched base.

        Rank 2r with B0: lora_A = [A0; dA], lora_B = [dB, B0 + dB]; rank r without.
        """
        a0, b0 = self.factors.a0, self.factors.b0
        if b0 is None:
            return a0 + self.da, self.db
        return torch.cat([a0, self.da], dim=-2), torch.cat([self.db, b0 + self.db], dim=-1)
