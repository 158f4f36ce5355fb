"""OFT: the outputs, or the inputs, of a layer are rotated within blocks.

With Q skew-symmetric, R = (I + Q)(I - Q)⁻¹ (Cayley) rotates a block. Qiu et al. 2023, "Controlling Text-to-Image
Diffusion by Orthogonal Finetuning", arXiv:2306.07280. What tools do with it:

- LyCORIS and kohya rotate outputs, W' = Rᵀ W, with Q = blocks - blocksᵀ, the norm of all blocks together at most
  alpha * out. LyCORIS's `rescale` multiplies each output besides. LyCORIS before 2.1 saved R itself ("oft_diag").
- PEFT rotates inputs, W' = W Rᵀ, with Q from the entries above its diagonal. Its default is the Neumann series
  I + 2Q + 2Q² + 2Q³ + Q⁴ in place of the inverse; its exact transform has (I - Q)(I + Q)⁻¹, the opposite turn.
- BOFT turns several times, between outputs ever farther apart, as butterflies. Liu et al. 2023, "Parameter-Efficient
  Orthogonal Finetuning via Butterfly Factorization", arXiv:2311.06243. Read from LyCORIS's files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isqrt, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from mmpeft.delta import Delta, Dense
from mmpeft.errors import MethodError
from mmpeft.layer_adapter import WeightDependent


@dataclass(frozen=True, eq=False)
class OftLayer(WeightDependent):
    """The rotation of one layer's outputs, as LyCORIS and kohya save it.

    Args:
        oft_blocks: (blocks, size, size), of out = blocks*size; of a butterfly (stages, blocks, size, size).
        alpha: the constraint as it was saved.
        rescale: (out, 1) or (out, 1, 1, 1), a multiplier of each output.
        is_rotation: whether `oft_blocks` is R itself, as old LyCORIS saved it.
        freezes_at_zero: whether alpha 0 means no change, as kohya has it, instead of no constraint.
        weight_shape: the weight's shape where it is known; the tensors tell its outputs only.
    """

    oft_blocks: Tensor
    alpha: float = 0.0
    rescale: Tensor | None = None
    is_rotation: bool = False
    freezes_at_zero: bool = False
    weight_shape: tuple[int, ...] | None = field(default=None, compare=False)
    method: ClassVar[str] = "oft"

    @property
    def out(self) -> int:
        """The number of outputs."""
        return self.oft_blocks.shape[-3] * self.oft_blocks.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, with -1 where it is not known."""
        if self.base_weight is not None:
            return tuple(self.base_weight.shape)
        return self.weight_shape or (self.out, -1)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """oft_blocks, and rescale if there is one."""
        return {"oft_blocks": self.oft_blocks, **({} if self.rescale is None else {"rescale": self.rescale})}

    def delta(self, weight: Tensor | None = None) -> Delta:
        """Give the turned base's weight minus itself, dense.

        Raises:
            AdapterError: no weight is known, or it has another shape.
        """
        weight = self.weight_for(weight)
        base = weight.detach().float().flatten(1)
        rotation = self.rotation().to(base.device)
        if rotation.ndim == 3:
            blocks, size, _ = rotation.shape
            new = torch.einsum("knm,kni->kmi", rotation, base.reshape(blocks, size, -1)).flatten(0, 1)
        else:
            new = _butterfly(rotation, base)
        if self.rescale is not None:
            new = new * self.rescale.detach().float().to(base.device).flatten()[:, None]
        return Dense((new - base).reshape(weight.shape))

    def rotation(self) -> Tensor:
        """Give R of each block, in the shape of oft_blocks, float32."""
        blocks = self.oft_blocks.detach().float()
        if self.is_rotation:
            return blocks
        skew = blocks - blocks.mT
        norm, most = torch.linalg.vector_norm(skew), self.alpha * self.out
        if (self.alpha > 0 or self.freezes_at_zero) and norm > most:
            skew = skew * (most / norm)
        return _cayley(skew)


@dataclass(frozen=True, eq=False)
class InputOftLayer(WeightDependent):
    """The rotation of one layer's inputs, as PEFT saves it.

    Args:
        oft_R: (blocks, size*(size-1)/2), the entries above the diagonal of Q row by row, of in = blocks*size, for a
            convolution in*kh*kw; (1, ...) where all blocks share one.
        neumann_terms: of the series in place of the inverse; 0 for the exact transform.
        block_share: whether all blocks share one rotation.
        coft_eps: how far all blocks together may turn (COFT); none is unconstrained.
        weight_shape: the weight's shape where it is known; the tensor tells its inputs only.
    """

    oft_R: Tensor
    neumann_terms: int = 5
    block_share: bool = False
    coft_eps: float | None = None
    weight_shape: tuple[int, ...] | None = field(default=None, compare=False)
    method: ClassVar[str] = "oft"

    @property
    def block_size(self) -> int:
        """How many inputs a block has."""
        return (1 + isqrt(1 + 8 * self.oft_R.shape[1])) // 2

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, with -1 where it is not known."""
        if self.base_weight is not None:
            return tuple(self.base_weight.shape)
        return self.weight_shape or (-1, -1 if self.block_share else self.oft_R.shape[0] * self.block_size)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The entries above the diagonal: oft_R."""
        return {"oft_R": self.oft_R}

    def delta(self, weight: Tensor | None = None) -> Delta:
        """Give the base's weight with turned inputs minus itself, dense.

        Raises:
            AdapterError: no weight is known, or it has another shape.
            MethodError: the weight is a convolution's of more than one pixel.
        """
        weight = self.weight_for(weight)
        if any(side != 1 for side in weight.shape[2:]):
            raise MethodError(
                f"PEFT's OFT of a {'x'.join(map(str, weight.shape[2:]))} convolution is no change of its weight: it "
                f"sums overlapping turned patches of the input; run it in PEFT, or train OFT on linear layers"
            )
        base = weight.detach().float().flatten(1)
        rotation = self.rotation().to(base.device)
        size = rotation.shape[-1]
        if base.shape[1] % size or (not self.block_share and base.shape[1] != rotation.shape[0] * size):
            raise MethodError(f"blocks of {size} inputs do not make the {base.shape[1]} inputs of this layer")
        # y = W (Rᵀ x) for the row x R that PEFT computes
        blocks = base.reshape(base.shape[0], -1, size)
        new = torch.einsum("okc,kbc->okb", blocks, rotation.expand(blocks.shape[1], size, size))
        return Dense((new.flatten(1) - base).reshape(weight.shape))

    def rotation(self) -> Tensor:
        """Give R of each block, (blocks, size, size), float32."""
        size = self.block_size
        rows, columns = torch.triu_indices(size, size, 1)
        skew = torch.zeros(self.oft_R.shape[0], size, size, device=self.oft_R.device)
        skew[:, rows, columns] = self.oft_R.detach().float()
        skew = skew - skew.mT
        if self.coft_eps is not None:
            norm = torch.linalg.matrix_norm(skew, keepdim=True)
            most = self.coft_eps / sqrt(len(skew))
            skew = torch.where(norm <= most, skew, skew * (most / norm))
        return _neumann(skew, self.neumann_terms) if self.neumann_terms else _cayley(-skew)


def _cayley(skew: Tensor) -> Tensor:
    """Give (I + Q)(I - Q)⁻¹, which is (I - Q)⁻¹(I + Q)."""
    one = torch.eye(skew.shape[-1], device=skew.device)
    rotation: Tensor = torch.linalg.solve(one - skew, one + skew)
    return rotation


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """Give the series as PEFT sums it: the first term and the last count once, those between twice."""
    total = torch.eye(skew.shape[-1], device=skew.device).expand_as(skew)
    if terms > 1:
        total = total + 2 * skew
    if terms > 2:
        power = skew @ skew
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total


def _butterfly(rotation: Tensor, base: Tensor) -> Tensor:
    """Turn the outputs stage by stage; at stage i a block is made of outputs 2^i * size/2 apart.

    Args:
        rotation: (stages, blocks, size, size).
        base: (out, columns).
    """
    stages, _, size, _ = rotation.shape
    for stage in range(stages):
        stride = 2**stage * (size // 2)
        apart = base.unflatten(0, (-1, 2, stride)).transpose(1, 2)
        turned = torch.einsum("bij,bjc->bic", rotation[stage], apart.reshape(-1, size, base.shape[1]))
        base = turned.reshape(apart.shape).transpose(1, 2).reshape(base.shape)
    return base
