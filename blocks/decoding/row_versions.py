"""One forward pass whose rows use different versions of the adapter. B: rows, T: tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from blocks.adapters import LIVE, use_version
from blocks.errors import UnsupportedModel
from blocks.load import SpanModel


@contextmanager
def use_row_versions(model: SpanModel, version_B: Sequence[str]) -> Iterator[None]:
    """Let each row of the passes inside compute with its own version, all of which must be there.

    The frozen weights see all rows at once; each LoRA adds to its own rows only, in peft's mixed batches.

    Raises:
        UnsupportedModel: inside, if a linear module is not given one input for each row, or for each token of each.
    """

    def name_rows(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[Tensor, ...], dict[str, object]]:
        entries = args[0].shape[0]
        each, rest = divmod(entries, len(version_B))
        # Experts flatten rows and tokens, in this order.
        if rest or not each or (each > 1 and args[0].dim() != 2):
            raise UnsupportedModel(f"a linear module was given {entries} entries for {len(version_B)} rows of a pass")
        names = [version for version in version_B for _ in range(each)]
        return args, kwargs | {"adapter_names": names}

    use_version(model, LIVE)  # whose passes are peft's own
    hooks = [
        module.register_forward_pre_hook(name_rows, with_kwargs=True)
        for layer in model.cut.held.values()
        for module in layer.modules()
        if isinstance(module, LoraLayer)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
