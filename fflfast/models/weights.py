"""A network's first weights from a file."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LoadReport", "copy_weights", "load_weights", "read_safetensors", "safetensors"]


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did; prints as one line."""

    source: str
    loaded: tuple[str, ...]
    skipped: tuple[str, ...]
    """Tensors of a last layer for another number of classes, left at the network's own values."""

    def __str__(self) -> str:
        skipped = f"; another class count, not loaded: {', '.join(self.skipped)}" if self.skipped else ""
        return f"{len(self.loaded)} tensors loaded from {self.source}{skipped}"


def load_weights(net: nn.Module, file: str | Path) -> LoadReport:
    """Start a network from the weights of a pretrained one.

    The last layer (``net.head_names``) is skipped where it differs in the number of classes only.

    Args:
        net: a sub-network, or any module.
        file: .safetensors, .pt or .pth; a dict of tensors, or one under "state_dict", "model" or "model_state".
            The prefixes that DataParallel and torch.compile put before every name are taken off. Code in
            the file is never run.

    Raises:
        ValueError: no such file, not a state dict, values that are not finite, or any other difference between
            the names and shapes of the file and the network; it names the tensors, and nothing was loaded.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no weights file {path}")
    return copy_weights(net, _plain(_read(path), path), str(path), getattr(net, "head_names", ()))


def copy_weights(net: nn.Module, weights: Mapping[str, Tensor], source: str, heads: Collection[str]) -> LoadReport:
    """Copy ``weights`` into ``net`` under the rules of `load_weights`; ``source`` is for messages."""
    own = net.state_dict()
    missing = [n for n in own if n not in weights and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in weights if n not in own]
    differing = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    skipped = [n for n in differing if _is_head(n, heads) and _only_classes(own[n], weights[n])]
    problems = [
        f"{what} {_few(names)}"
        for what, names in (
            ("lacks", missing),
            ("has the unknown", unexpected),
            ("has other shapes for", [n for n in differing if n not in skipped]),
            ("has values that are not finite in", _broken(net, weights)),
        )
        if names
    ]
    if problems:
        name = getattr(net, "arch", None) or type(net).__name__
        raise ValueError(f"{source} does not fit {name}: it {', '.join(problems)}")
    loaded = [n for n in own if n in weights and n not in skipped]
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(weights[name])
    return LoadReport(source, tuple(loaded), tuple(skipped))


def _broken(net: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Name what no training survives; a buffer may well be infinite, such as an attention mask."""
    parameters = dict(net.named_parameters())
    return [n for n, t in weights.items() if t.isnan().any() or (n in parameters and t.isinf().any())]


def _is_head(name: str, heads: Collection[str]) -> bool:
    return any(name.startswith(head + ".") for head in heads)


def _only_classes(own: Tensor, other: Tensor) -> bool:
    return own.dim() == other.dim() >= 1 and own.shape[1:] == other.shape[1:]


def _few(names: list[str]) -> str:
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + rest


def _read(path: Path) -> object:
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"a weights file ends in .safetensors, .pt or .pth, not {path.name}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is damaged or holds more than tensors; save a state_dict()") from error
    except Exception as error:  # a damaged file may raise anything: struct.error, KeyError, EOFError …
        raise ValueError(f"{path} is not a readable weights file: {error}") from error


def safetensors() -> Any:
    """The safetensors package, which only reading and writing such files needs."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError("safetensors is not installed; this needs: pip install safetensors") from error
    return safetensors


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's metadata."""
    package = safetensors()
    try:
        with package.safe_open(path, framework="pt") as content:
            names = content.keys()
            # The file's own memory is aligned to 8 bytes only, and where it is not to 64 kernels may round otherwise.
            return {name: content.get_tensor(name).clone() for name in names}, content.metadata() or {}
    except (package.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _plain(content: object, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in ("state_dict", "model", "model_state"):
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{path} is no state dict: expected a dict of tensors")
    weights = {str(name): tensor for name, tensor in content.items()}
    for prefix in ("module.", "_orig_mod."):
        if weights and all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights
