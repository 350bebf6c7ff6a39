"""LoRA adapters in one batch with the model itself: each token is changed by its own request's adapter only.

PEFT puts the adapters into the model's layers and adds what all active ones contribute, to every token. The batching
loop packs the tokens of all requests into one row, so here each contribution is multiplied by a mask over the tokens.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: The name under which the loop carries a request's adapter.
KEY: Final = "adapter"
#: Settings of an adapter that change more than a sum of each layer's output, or other layers.
_UNSUPPORTED: Final = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices", "megatron_config")


class Adapters:
    """The adapters of one model. All methods but :meth:`prepare` are for a model that is at rest."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._loaded: set[str] = set()
        self._active: tuple[str, ...] = ()
        #: For each adapter of the batch, 1 for its tokens and 0 for the others, [tokens, 1].
        self._masks: dict[str, torch.Tensor] = {}

    def load(self, number: int, directory: str) -> None:
        """Load an adapter, and try it.

        :raises ValueError: it is of a kind that does not work here, or not for this model.
        """
        name = _name(number)
        _check(Path(directory))
        self._loaded.add(name)
        try:
            self._model.load_adapter(directory, adapter_name=name, adapter_kwargs={"local_files_only": True})
            if not self._mask(name):
                raise ValueError("it changes no layer of this model")
            self._try(name)
        except Exception as error:
            self.unload(number)
            raise ValueError(f"the adapter cannot be used: {error}") from error
        finally:
            self._activate(())

    def unload(self, number: int) -> None:
        """Remove an adapter, as far as it is loaded."""
        name = _name(number)
        self._loaded.discard(name)
        self._activate(())
        with suppress(ValueError, KeyError):  # it was never there, or in no layer
            self._model.delete_adapter(name)
        getattr(self._model, "peft_config", {}).pop(name, None)

    def prepare(self, requests: Iterable[Any]) -> None:
        """Say whose tokens the next batch has, in the order of the requests; called by the loop."""
        if not self._loaded:
            return
        runs = [(request.state.logit_processor_kwargs.get(KEY), request.query_length) for request in requests]
        used = sorted({_name(number) for number, _ in runs if number is not None} & self._loaded)
        self._set_masks(used, [(None if number is None else _name(number), length) for number, length in runs])
        self._activate(tuple(used))

    def _set_masks(self, used: Sequence[str], runs: Sequence[tuple[str | None, int]]) -> None:
        self._masks = {}
        if used:
            lengths = torch.tensor([length for _, length in runs])
            for name in used:
                own = torch.tensor([float(other == name) for other, _ in runs])
                mask = own.repeat_interleave(lengths).unsqueeze(-1)
                self._masks[name] = mask.to(self._model.device, self._model.dtype)

    def _activate(self, names: tuple[str, ...]) -> None:
        if names == self._active:
            return
        layers = list(_layers(self._model))
        for layer in layers:
            layer.enable_adapters(enabled=bool(names))
            if names:
                layer.set_adapter([name for name in names if name in layer.lora_A], inference_mode=True)
        self._active = names

    def _mask(self, name: str) -> int:
        """Let the mask apply to what an adapter adds to each layer; return the number of layers."""
        count = 0
        for layer in _layers(self._model):
            if name in getattr(layer, "lora_embedding_A", ()):
                raise ValueError("it changes embeddings, which is not supported")
            if name in layer.lora_B:
                layer.lora_B[name].register_forward_hook(lambda _, __, output: output * self._masks[name])
                count += 1
        return count

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _try(self, name: str) -> None:
        """Run the model with an adapter for two of three tokens: in some layers others see only some of them."""
        self._set_masks([name], [(name, 2), (None, 1)])
        self._activate((name,))
        tokens = torch.zeros((1, 3), dtype=torch.int64, device=self._model.device)
        # The loop takes the last layer's output for some of the tokens only.
        self._model(input_ids=tokens, use_cache=False, logits_to_keep=1)


def _name(number: int) -> str:
    return f"adapter{number}"  # PEFT makes it a part of modules' names, which have no dots


def _check(directory: Path) -> None:
    """Check an adapter's settings.

    :raises ValueError: it is of an unsupported kind.
    """
    settings = json.loads((directory / "adapter_config.json").read_text())
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type {settings.get('peft_type')!r} is not supported; expected LORA")
    if settings.get("bias", "none") != "none":
        raise ValueError("an adapter that changes biases is not supported")
    for name in _UNSUPPORTED:
        if settings.get(name):
            raise ValueError(f"an adapter with {name} is not supported")


def _layers(model: Any) -> Iterable[Any]:
    from peft.tuners.lora import LoraLayer

    return (module for module in model.modules() if isinstance(module, LoraLayer))
