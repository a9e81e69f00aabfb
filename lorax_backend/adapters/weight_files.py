"""Which files of a folder or repository are an adapter's weights. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_backend.errors import AdapterIncompatibleError, AdapterNotFoundError

CONFIG_NAME = "adapter_config.json"
# In which an adapter may bring its own chat template along.
TEMPLATE_NAMES = ("chat_template.jinja", "tokenizer_config.json")
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"

_NOT_WEIGHTS = ("arguments", "args", "training")
_PICKLES = (".bin", ".pt", ".pth")


def choose_weight_names(names: Iterable[str], allow_pickle: bool = False) -> list[str]:
    """adapter_model.safetensors, else every safetensors file that may hold weights, sorted; with `allow_pickle`, and
    none of these, adapter_model.bin.

    Raises:
        AdapterNotFoundError: there are none.
        AdapterIncompatibleError: there are pickled weights only.
    """
    names = sorted(names)
    if WEIGHTS_NAME in names:
        return [WEIGHTS_NAME]
    found = [
        name for name in names if name.endswith(".safetensors") and not any(w in name for w in _NOT_WEIGHTS)
    ]
    pickled = [name for name in names if name.endswith(_PICKLES) and "adapter" in name]
    if not found and allow_pickle and PICKLE_NAME in names:
        return [PICKLE_NAME]
    if not found and pickled:
        raise AdapterIncompatibleError(
            f"{pickled[0]} is a pickle, which can run code when it is read and is refused; save the adapter as "
            f"{WEIGHTS_NAME} (PEFT: save_pretrained(..., safe_serialization=True)); the server's option "
            f"allow_pickle_adapters lets {PICKLE_NAME} be read as tensors only"
        )
    if not found:
        raise AdapterNotFoundError(f"there is no {WEIGHTS_NAME} beside {CONFIG_NAME}")
    return found
