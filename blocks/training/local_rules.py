"""What a run's local rule does to one unit's gradients between two rounds: nothing, a pull, or a correction. Pure.

FedProx (Li et al., 1812.06127): the gradient of `proximal / 2 * |w - w_round|^2` is added. SCAFFOLD (Karimireddy et
al., 1910.06378) adds `c - c_i`: `c_i`, the peer's control variate, is its mean raw gradient between two rounds, which
for SGD is the paper's option II; `c` is their mean, formed in the round. The paper is about SGD; here the corrected
gradient goes into AdamW's moments, which is our definition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalRule:
    """`proximal` is FedProx's mu (0: off); `control` turns SCAFFOLD's control variates on."""

    proximal: float = 0.0
    control: bool = False


class UnitTerms:
    """One unit's anchors and variates. fp32 tensors by name, on the device of the parameters."""

    def __init__(self, rule: LocalRule) -> None:
        self._rule = rule
        self._anchor: dict[str, torch.Tensor] = {}
        self._frozen: frozenset[str] = frozenset()
        self._agreed: dict[str, torch.Tensor] = {}
        self._own: dict[str, torch.Tensor] = {}
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0

    def begin(
        self,
        anchor: Mapping[str, torch.Tensor],
        *,
        frozen: frozenset[str] = frozenset(),
        agreed: Mapping[str, torch.Tensor] | None = None,
        own: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """A round was applied: `anchor` are the unit's values now, `frozen` are not trained until the next.

        `agreed` is the holders' mean control variate, `own` what this peer brought to it (None: it was not there).
        """
        self._frozen = frozen
        if self._rule.proximal:
            self._anchor = {name: tensor.clone() for name, tensor in anchor.items()}
        if self._rule.control:
            self._agreed = dict(agreed or {})
            self._own = dict(self._agreed if own is None else own)
            self._sums, self._steps = {}, 0

    def adjust(
        self, parameters: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The gradients to step with; those of frozen tensors are left out."""
        wanted = {name: tensor for name, tensor in gradients.items() if name not in self._frozen}
        if self._rule.control and all(bool(torch.isfinite(tensor).all()) for tensor in wanted.values()):
            self._note(wanted)
        return {name: self._with_terms(name, parameters[name].detach(), tensor) for name, tensor in wanted.items()}

    def control(self) -> dict[str, torch.Tensor]:
        """This peer's control variate as of now, fp32 on the CPU; empty without SCAFFOLD, or before anything is known.

        A tensor that was not stepped since the last round keeps its old one.
        """
        fresh = {name: total / self._steps for name, total in self._sums.items()} if self._steps else {}
        return {name: tensor.to("cpu", torch.float32) for name, tensor in {**self._own, **fresh}.items()}

    def _note(self, gradients: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in gradients.items():
            self._sums[name] = self._sums[name] + tensor if name in self._sums else tensor.clone()
        self._steps += 1

    def _with_terms(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        if self._rule.proximal and name in self._anchor:
            anchor = self._anchor[name].to(parameter.device, torch.float32)
            gradient = gradient + self._rule.proximal * (parameter.float() - anchor).to(gradient.device)
        for variates, sign in ((self._agreed, 1.0), (self._own, -1.0)):
            if name in variates:
                gradient = gradient + sign * variates[name].to(gradient.device)
        return gradient
