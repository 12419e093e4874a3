"""How several trained adapters become one: pure rules over one unit. No network, no clock, and no weights of peers.

An all-reduce only sums, so a rule is written as sums: a peer *brings* named tensors, gets the weighted mean of what
all holders brought, and computes the result from its anchor and the means. Both are equal on all holders, hence so is
the result, to the bit. The anchor is the unit as of its last applied round.

A unit's tensors are fp32 on the CPU: `{module}.lora_A` of shape [r, in] and `{module}.lora_B` of shape [out, r]; the
module's update is `scaling * B @ A`. Outer steps on top of a rule are in outer.py, robust means in robust.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from averaging.errors import BadTensors
from averaging.merge import UnitTensors
from averaging.recipe import MERGINGS
from blocks.spans import UnitId

_A, _B = ".lora_A", ".lora_B"
_NEGLIGIBLE = 1e-6  # of the largest: below it, what fp32 sums leave is noise and not a direction
_NEW_DIRECTION = 1e-3  # what must be left of an old unit direction for it to fill a gap in a basis


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitView:
    """What one peer knows of one unit when a round begins.

    `round` is the unit's last applied round, 0 before any. `live` is what was trained since, `anchor` the unit as of
    that round, and `outer` the state agreed with the other holders. `scaling` is this peer's alpha / r.

    Raises:
        ValueError: the scaling is not a positive number.
    """

    unit: UnitId
    round: int
    live: UnitTensors
    anchor: UnitTensors
    outer: UnitTensors
    scaling: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scaling) and self.scaling > 0):
            raise ValueError(f"{self.unit} has an adapter scaling of {self.scaling}; it must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """The complete unit after the round, the rule's own new agreed state, and whether optimizer moments are void."""

    tensors: UnitTensors
    outer: UnitTensors
    resets_moments: bool


class Merging(Protocol):
    """A rule by which the holders of a unit make one adapter of theirs."""

    @property
    def name(self) -> str:
        """One of `MERGINGS`."""

    @property
    def passes(self) -> int:
        """How many means it needs, one after another."""

    def frozen(self, names: Iterable[str], number: int) -> frozenset[str]:
        """Which of a unit's tensors are not trained after the unit's round `number`."""

    def bring(self, view: UnitView, means: Sequence[UnitTensors]) -> dict[str, Tensor]:
        """What goes into pass `len(means)`, given the means of the passes before it: fp32, the same shapes for all.

        Raises:
            BadTensors: the unit's tensors or its agreed state are not what the rule works on.
        """

    def merge(self, view: UnitView, means: Sequence[UnitTensors]) -> Merged:
        """The unit after the round, from the means of all passes.

        Raises:
            BadTensors: the unit's tensors or its agreed state are not what the rule works on.
        """


def make_merging(name: str, *, seed: int, rank: int) -> Merging:
    """The rule of that name. `seed` is the run's; `rank` is the run's largest, which only `power` uses.

    Raises:
        ValueError: there is no such rule, or the rank is not positive.
    """
    if rank < 1:
        raise ValueError(f"the adapter's rank is {rank}; use 1 or more")
    match name:
        case "mean":
            return _Mean()
        case "ffa":
            return _FrozenA()
        case "rolora":
            return _Alternating()
        case "power":
            return _Power(seed=seed, rank=rank)
    raise ValueError(f"'{name}' is not a way to merge adapters; use one of {', '.join(MERGINGS)}")


def probes(tensors: UnitTensors, scaling: float, *, seed: int, number: int, count: int = 4) -> Tensor:
    """Numbers by which products can be compared without being formed: fp32, flat, `count` for each module by name.

    Each is u^T (scaling * B A) v with u and v of random signs, drawn from seed, round `number`, module and index, so
    that all peers use the same ones. They are linear in the product M, and E[(u^T M v)^2] is its squared Frobenius
    norm (Hutchinson's argument): the norm of the flat vector estimates that of the unit's products.

    Raises:
        BadTensors: a factor has no counterpart.
    """
    values = []
    for module in _modules(tensors):
        a_RI, b_OR = tensors[module + _A].detach(), tensors[module + _B].detach()
        u_CO = _signs(f"probe:{seed}:{number}:{module}:u", count, b_OR.shape[0])
        v_CI = _signs(f"probe:{seed}:{number}:{module}:v", count, a_RI.shape[1])
        values.append(scaling * ((u_CO @ b_OR).double() * (v_CI @ a_RI.T).double()).sum(dim=1))
    return torch.cat(values).float() if values else torch.zeros(0)


def merging_error(brought: Sequence[Tensor], shares: Sequence[float], merged: Tensor) -> float:
    """How far the merged product is from the mean of the products, relative to that mean, estimated from probes.

    `brought` are the holders' `probes` (fp32, flat) with their `shares`, `merged` those of the result. 0.0 where both
    are zero, infinite where only the mean is.
    """
    mean = torch.zeros_like(merged, dtype=torch.float64)
    for one, share in zip(brought, shares, strict=True):
        if share != 0.0:
            mean += share * one.double()
    gap, norm = float((mean - merged.double()).norm()), float(mean.norm())
    if norm == 0.0:
        return 0.0 if gap == 0.0 else math.inf
    return gap / norm


class _Mean:
    """Every tensor becomes the anchor plus the mean change; subclasses say which are frozen and keep the anchor's.

    With both factors trained the mean of A and the mean of B are not factors of the mean product: see `merging_error`.
    """

    name: ClassVar[str] = "mean"
    passes: ClassVar[int] = 1

    def frozen(self, names: Iterable[str], number: int) -> frozenset[str]:
        return frozenset()

    def bring(self, view: UnitView, means: Sequence[UnitTensors]) -> dict[str, Tensor]:
        frozen = self.frozen(view.anchor, view.round)
        return {name: view.live[name].detach() - view.anchor[name] for name in view.anchor if name not in frozen}

    def merge(self, view: UnitView, means: Sequence[UnitTensors]) -> Merged:
        frozen = self.frozen(view.anchor, view.round)
        tensors = {
            name: anchor.clone() if name in frozen else anchor + means[0][name] for name, anchor in view.anchor.items()
        }
        return Merged(tensors=tensors, outer={}, resets_moments=False)


class _FrozenA(_Mean):
    """FFA-LoRA (2403.12313): A stays what the run's seed made it, so that the mean of B is the mean of the products."""

    name: ClassVar[str] = "ffa"

    def frozen(self, names: Iterable[str], number: int) -> frozenset[str]:
        return frozenset(name for name in names if name.endswith(_A))


class _Alternating(_Mean):
    """RoLoRA (2502.01755): B trains after even rounds and A after odd ones, exact given the half that is frozen.

    The parity is that of the unit's own applied round: a holder that missed one would else train the other half.
    """

    name: ClassVar[str] = "rolora"

    def frozen(self, names: Iterable[str], number: int) -> frozenset[str]:
        half = _A if number % 2 == 0 else _B
        return frozenset(name for name in names if name.endswith(half))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Power:
    """The best rank-r factors of the mean product M, by one warm-started power iteration a round (as PowerSGD does).

    Pass 0 means M Q for an agreed basis Q of shape [in, width], pass 1 means M^T P with P = orthonormal(M Q); then
    P (M^T P)^T is M projected on P. The next Q is orthonormal(M^T P), so that over the rounds P finds M's leading
    directions. Nothing dense is formed. Peers may have ranks of their own: each keeps the leading directions that it
    has room for, and divides by its own scaling.

    The arithmetic is float64, rounded to fp32 at the end. Machines of one kind agree to the bit; on mixed kinds, or
    with other thread counts, a matrix product or the SVD may round otherwise, and a result differ in its last bit (or
    by a rotation where singular values coincide).
    """

    seed: int
    rank: int
    name: ClassVar[str] = "power"
    passes: ClassVar[int] = 2

    def frozen(self, names: Iterable[str], number: int) -> frozenset[str]:
        return frozenset()

    def bring(self, view: UnitView, means: Sequence[UnitTensors]) -> dict[str, Tensor]:
        brought = {}
        for module in _modules(view.live):
            a_RI, b_OR = view.live[module + _A].detach().double(), view.live[module + _B].detach().double()
            if not means:
                q_IW = self._basis(view, module)
                brought[f"{module}.left"] = (view.scaling * (b_OR @ (a_RI @ q_IW))).float()
            else:
                p_OW = _orthonormal(means[0][f"{module}.left"].double())
                brought[f"{module}.right"] = (view.scaling * (a_RI.T @ (b_OR.T @ p_OW))).float()
        return brought

    def merge(self, view: UnitView, means: Sequence[UnitTensors]) -> Merged:
        tensors: dict[str, Tensor] = {}
        outer: dict[str, Tensor] = {}
        for module in _modules(view.anchor):
            anchor_a_RI, anchor_b_OR = view.anchor[module + _A], view.anchor[module + _B]
            q_IW, right_IW = self._basis(view, module), means[1][f"{module}.right"].double()
            if right_IW.any():
                p_OW, x_IW = _orthonormal(means[0][f"{module}.left"].double()), _orthonormal(right_IW, q_IW)
                # M is about P right^T, and right is X (X^T right), so that only a width x width matrix is decomposed.
                a_WI, b_OW = _factors(p_OW, (x_IW.T @ right_IW).T, x_IW, view.scaling)
                tensors |= _fit(module, a_WI, b_OW, anchor_a_RI)
                outer[f"basis/{module}"] = x_IW.float()
            else:
                # A product of rank 0 has no directions, and two factors of zero would never train again.
                tensors |= {module + _A: anchor_a_RI.clone(), module + _B: anchor_b_OR.clone()}
                outer[f"basis/{module}"] = q_IW.float()
        return Merged(tensors=tensors, outer=outer, resets_moments=True)

    def _basis(self, view: UnitView, module: str) -> Tensor:
        """Q: [in, width] in float64: the agreed one, or else the rows of the anchor's A, on which the first changes of
        B act. Where the anchor is of a smaller rank, and so not the same on all, it is drawn from seed and name.
        """
        num_in, num_out = view.anchor[module + _A].shape[1], view.anchor[module + _B].shape[0]
        width = min(self.rank, num_in, num_out)
        agreed = view.outer.get(f"basis/{module}")
        if agreed is None:
            drawn = _normals(f"basis:{self.seed}:{module}", num_in * width).reshape(num_in, width)
            is_common = view.anchor[module + _A].shape[0] == width and bool(view.anchor[module + _A].any())
            first = _orthonormal(view.anchor[module + _A].T.double(), drawn) if is_common else _orthonormal(drawn)
            # Rounded as the agreed ones are, so that the first basis is the same whether it was handed on or made.
            return first.float().double()
        if agreed.shape != (num_in, width) or not bool(torch.isfinite(agreed).all()):
            raise BadTensors(
                f"{view.unit} {module} has an agreed basis of shape {tuple(agreed.shape)}, or values in it that are "
                f"not finite; it must be {(num_in, width)}: fetch the unit again from another holder"
            )
        return agreed.double()


def _modules(tensors: UnitTensors) -> list[str]:
    modules = {name.removesuffix(_A).removesuffix(_B) for name in tensors}
    odd = {module + end for module in modules for end in (_A, _B)} ^ set(tensors)
    if odd:
        raise BadTensors(f"{', '.join(sorted(odd)[:3])}: not a pair of lora_A and lora_B; merge such tensors by 'mean'")
    return sorted(modules)


def _normals(key: str, count: int) -> Tensor:
    """Standard normal, float64, flat: numpy's PCG64 keyed by the text, as torch's own generator differs by device."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    return torch.from_numpy(generator.standard_normal(count))


@lru_cache(maxsize=128)  # a module's signs are the same in all blocks of a round, and for what is brought and merged
def _signs(key: str, count: int, size: int) -> Tensor:
    """Random signs, fp32, [count, size]: the bits of numpy's PCG64 keyed by the text."""
    digest = hashlib.sha256(key.encode()).digest()
    raw = np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(-(-count * size // 64))
    bits = np.unpackbits(np.asarray(raw, dtype="<u8").view(np.uint8))[: count * size]
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).reshape(count, size)


def _orthonormal(matrix: Tensor, padding: Tensor | None = None) -> Tensor:
    """Orthonormal columns that span the given ones, float64, same shape; gaps are filled from `padding`, else zero.

    Gram-Schmidt, each column projected twice, which is enough in float64. Unlike an SVD's, its result is unique, signs
    and all, so that peers of different make agree on it up to rounding; unlike plain QR's, no column of it is noise.
    """
    basis = torch.zeros_like(matrix)
    floor = _NEGLIGIBLE * float(matrix.norm(dim=0).max())
    columns = [(column, floor) for column in matrix.T]
    if padding is not None:
        columns += [(column, _NEW_DIRECTION) for column in padding.T]
    filled = 0
    for column, least in columns:
        if filled == basis.shape[1]:
            break
        done = basis[:, :filled]
        rest = column - done @ (done.T @ column)
        rest = rest - done @ (done.T @ rest)
        if (length := float(rest.norm())) > least:
            basis[:, filled] = rest / length
            filled += 1
    return basis


def _factors(p_OW: Tensor, core_WW: Tensor, x_IW: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A [width, in] and B [out, width] with scaling B A = P core X^T, its scale split evenly; zero where it has none.

    Each direction's sign makes the entry of A that is largest in size positive.
    """
    u_WW, values_W, vt_WW = torch.linalg.svd(core_WW)
    values_W = torch.where(values_W > _NEGLIGIBLE * values_W[0], values_W, 0.0)
    rows_WI = vt_WW @ x_IW.T
    largest_W1 = rows_WI.gather(1, rows_WI.abs().argmax(dim=1, keepdim=True))
    signs_W = torch.where(largest_W1[:, 0] < 0, -1.0, 1.0).double()
    size_W = (values_W / scaling).sqrt()
    return rows_WI * (signs_W * size_W)[:, None], (p_OW @ u_WW) * (signs_W * size_W)


def _fit(module: str, a_WI: Tensor, b_OW: Tensor, anchor_a_RI: Tensor) -> dict[str, Tensor]:
    """The leading directions that this peer's rank has room for, fp32.

    A row that is left over takes the anchor's A with a B of zero: the product is the same, and the row can train.
    """
    a_RI = anchor_a_RI.clone()
    b_OR = torch.zeros(b_OW.shape[0], anchor_a_RI.shape[0])
    room = min(a_WI.shape[0], anchor_a_RI.shape[0])
    used = [index for index in range(room) if a_WI[index].any()]
    a_RI[used], b_OR[:, used] = a_WI[used].float(), b_OW[:, used].float()
    return {module + _A: a_RI, module + _B: b_OR}
