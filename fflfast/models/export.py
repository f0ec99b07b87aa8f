"""Trained networks as files that need nothing of this library: plain weights, and the fused model as a program."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.backends import use_backend
from .registry import create
from .weights import read_safetensors, safetensors

__all__ = ["export_fused", "export_sub_network", "load_exported"]

_KEY = "fflfast"
_EXTRA = "metadata.json"


def export_sub_network(
    sub_network: nn.Module, trunk: nn.Module | None, path: str | Path, *, metadata: Mapping[str, Any]
) -> Path:
    """Write a sub-network, merged with its trunk, as the plain state dict of the network by itself.

    Names, shapes and dtypes are the network's own, so that the file loads with strict=True in torchvision's, timm's
    or our own class. A class that keeps a version with its weights (torchvision's MNASNet) refuses a plain dict of
    tensors: there, put them into the class's own ``state_dict()``, which has the version, and load that. The file
    appears whole or not at all.

    Args:
        sub_network: with ``trunk``, what `split` left of a network.
        trunk: its trunk, or None.
        path: a .safetensors file in a folder that exists.
        metadata: JSON values; goes into the file's header as one JSON string under "fflfast". "arch" and
            "num_classes" are added from the sub-network where absent.

    Returns:
        The path.

    Raises:
        ValueError: another suffix, no such folder, parts that do not belong together, metadata that is not JSON.
        OSError: the disk refuses; the old file stands.
    """
    target = _checked(path, ".safetensors")
    parts = [{} if trunk is None else _state(trunk), _state(sub_network)]
    if twice := parts[0].keys() & parts[1].keys():
        raise ValueError(f"trunk and sub-network both have {sorted(twice)[0]}; give the parts that split() made")
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in (parts[0] | parts[1]).items():
        tensor = tensor.detach().cpu().contiguous()
        # Tied weights share memory, which the format does not know.
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    own = {"arch": getattr(sub_network, "arch", None), "num_classes": getattr(sub_network, "num_classes", None)}
    content = safetensors().torch.save(tensors, {"format": "pt", _KEY: _json({**own, **metadata})})
    _write(target, content)
    return target


def export_fused(learner: nn.Module, path: str | Path, *, example_images: Tensor, metadata: Mapping[str, Any]) -> Path:
    """Write the fused model as a torch.export program: normalised images (B, C, H, W) → fused logits (B, K).

    The program is that of a copy of the learner on the CPU in eval mode, in reference arithmetic and the weights'
    dtype; it needs torch alone. The learner stays as it is. The file appears whole or not at all.

    Args:
        learner: its ``predict`` gives logits called "fused".
        path: a .pt2 file in a folder that exists.
        example_images: floats (B, C, H, W), one image or more; fixes C, H and W, while B stays free.
        metadata: JSON values; becomes the program's extra file "metadata.json".

    Returns:
        The path.

    Raises:
        ValueError: a method without a fused classifier, another suffix, no such folder, images that are none,
            metadata that is not JSON.
        OSError: the disk refuses; the old file stands.
    """
    target = _checked(path, ".pt2")
    if not isinstance(example_images, Tensor) or example_images.dim() != 4 or not example_images.is_floating_point():
        raise ValueError("example_images must be a float tensor (B, C, H, W), normalised as in training")
    if not len(example_images):
        raise ValueError("example_images must hold at least one image")
    text = _json(metadata)
    model = _Fused(copy.deepcopy(learner).cpu()).eval()
    images = example_images.detach().cpu()
    # With one image torch.export would take the batch size for a constant.
    images = torch.cat([images, images])[: max(2, len(images))]
    with use_backend("reference"), torch.no_grad():
        model(images)  # the model's own errors before those of the exporter
        program = torch.export.export(
            model, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}}
        )
    content = io.BytesIO()  # on a full disk torch's own writer of files ends the process
    torch.export.save(program, content, extra_files={_EXTRA: text})
    _write(target, content.getvalue())
    return target


def load_exported(path: str | Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """Load a file that `export_sub_network` or `export_fused` wrote.

    A .pt2 file is a program: load only what you trust.

    Returns:
        A module in eval mode on the CPU, normalised images (B, C, H, W) → logits (B, K), and the metadata.

    Raises:
        ValueError: no such file, another format, a damaged file, or one that does not name its network.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no exported file {file}")
    if file.suffix == ".pt2":
        return _load_program(file)
    if file.suffix == ".safetensors":
        return _load_weights(file)
    raise ValueError(f"an exported file ends in .safetensors or .pt2, not {file.name}")


class _Fused(nn.Module):
    def __init__(self, learner: nn.Module) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, images: Tensor) -> Tensor:
        outputs: dict[str, Tensor] = self.learner.predict(images)  # type: ignore[operator]
        if "fused" not in outputs:
            raise ValueError(f"the method has no fused classifier, only {', '.join(outputs)}; export those instead")
        return outputs["fused"]


class _Logits(nn.Module):
    def __init__(self, sub_network: nn.Module) -> None:
        super().__init__()
        self.sub_network = sub_network

    def forward(self, images: Tensor) -> Tensor:
        return self.sub_network(images)[0]


def _load_program(file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    extra = {_EXTRA: ""}
    try:
        with _silence("torch.export"):  # it logs a traceback before it raises
            program = torch.export.load(file, extra_files=extra)
        return program.module(), json.loads(extra[_EXTRA] or "{}")
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(f"{file} is not a readable torch.export program: {error}") from error


@contextlib.contextmanager
def _silence(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _load_weights(file: Path) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    state, header = read_safetensors(file)
    try:
        metadata = json.loads(header[_KEY])
        arch, num_classes = metadata["arch"], metadata["num_classes"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no export of fflfast: its header names no arch and num_classes") from error
    net = create(arch, num_classes, image_size=metadata.get("image_size"))
    # Some networks (MNASNet) refuse a state dict without the versions that PyTorch attaches to it.
    versioned = net.state_dict()
    versioned.clear()
    versioned.update(state)
    try:
        net.load_state_dict(versioned, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{file} does not hold the weights of {arch}: {error}") from error
    return _Logits(net).eval(), metadata


def _state(module: nn.Module) -> dict[str, Tensor]:
    return getattr(module, "_orig_mod", module).state_dict()  # without the wrapper of torch.compile(module)


def _json(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(metadata), ensure_ascii=False)
    except TypeError as error:
        raise ValueError(f"metadata must be JSON values: {error}") from error


def _checked(path: str | Path, suffix: str) -> Path:
    target = Path(path)
    if target.suffix != suffix:
        raise ValueError(f"the file must end in {suffix}, got {target.name}")
    if not target.parent.is_dir():
        raise ValueError(f"no folder {target.parent} to write {target.name} into")
    return target


def _write(target: Path, content: bytes) -> None:
    """Write beside the target and move into place, so that the target is never half a file."""
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    temporary = Path(name)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes a private file; give it the rights that any new file here has.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
