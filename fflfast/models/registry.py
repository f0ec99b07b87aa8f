"""Networks by name: our own for small images first, then torchvision's, then timm's."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .adapt import adapt
from .base import SubNetwork
from .densenet import SmallDenseNet
from .hourglass import stacked_hourglass
from .pose_mobile import mobile_pose
from .resnet import SmallResNet
from .vgg import SmallVGG
from .weights import copy_weights
from .wide_resnet import WideResNet

__all__ = ["available", "check_name", "create"]

# Each takes the number of classes and the keyword `width`, a Fraction by which the stages' channels are scaled.
_OWN: dict[str, Callable[..., SubNetwork]] = {
    "tiny": partial(SmallResNet, blocks=1, channels=(4, 8, 16)),
    **{f"resnet{6 * n + 2}": partial(SmallResNet, blocks=n) for n in (1, 2, 3, 5, 7, 9, 18)},
    "wrn_16_2": partial(WideResNet, depth=16, widening=2),
    "wrn_40_2": partial(WideResNet, depth=40, widening=2),
    # The WRN-20-8 of the online-distillation papers (OKDDip, PCL and the FFL figures in their tables) is
    # no 6n + 4 network but a post-activation ResNet of 3·2 bottlenecks whose inner width is 8 times wider.
    "wrn_20_8": partial(SmallResNet, blocks=2, channels=(64, 128, 256), stem=16, inner=(128, 256, 512)),
    "cifar_vgg16_bn": SmallVGG,
    # The DenseNet-40-12 of the same tables is the BC variant: bottlenecks and compression 0.5.
    "densenet40_12": partial(SmallDenseNet, depth=40, growth=12),
    # For pose: the number of classes is that of the joints, and a width scales the stem as well.
    **{f"hourglass{n}": partial(stacked_hourglass, stacks=n) for n in (1, 2, 4, 6, 8)},
    "mobilepose": mobile_pose,
}


def available() -> tuple[str, ...]:
    """The names of our own networks; `create` takes those of torchvision and timm as well."""
    return tuple(_OWN)


def create(name: str, num_classes: int, *, pretrained: bool = False, image_size: int | None = None) -> SubNetwork:
    """Build a network by name as a sub-network for images (B, 3, H, W).

    Args:
        name: one of `available`, else of torchvision's classifiers, else of timm's; "torchvision/NAME" and
            "timm/NAME" say which library is meant. Our own take a width behind it, "resnet32@3/4" or "wrn_16_2@0.5":
            the channels of each stage times this number, rounded down, at least 1; the stem of a classifier stays as
            it is.
        num_classes: K ≥ 1.
        pretrained: download the library's weights; a last layer for another K stays at its initial values.
        image_size: in pixels, for networks that are built for one size, such as vision transformers.

    Raises:
        ValueError: a name that nobody knows (close ones are listed), a width that is none, a library that is not
            installed, weights that do not exist, a size that the network does not take.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected a network's name, got {type(name).__name__}; give adapt() a network itself")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes must be a whole number of at least 1, got {num_classes!r}")
    library, short = _locate(name)
    if library is None:
        if pretrained:
            raise ValueError(f"there are no published weights of '{name}'; start from a file with load_weights()")
        base, at, width = name.partition("@")
        own = _OWN[base](num_classes, width=_width(name, width) if at else Fraction(1))
        own.arch = name
        return own
    net = _LIBRARIES[library].build(short, num_classes, pretrained, image_size)
    example = None if image_size is None else torch.zeros(1, 3, image_size, image_size)
    sub_network = adapt(net, example=example, verbose=False)
    sub_network.arch = f"{library}/{short}"
    return sub_network


def check_name(name: str) -> None:
    """Raise the ValueError that `create` would raise for a name that nobody knows, without building anything."""
    _locate(name)


def _locate(name: str) -> tuple[str | None, str]:
    """Return the library that ``name`` is of, None for our own, and what it is called there."""
    base, at, width = name.partition("@")
    if base in _OWN:
        if at:
            _width(name, width)
        return None, name
    if at and ":" not in name:  # timm knows addresses with a colon, which may name a revision behind an @
        raise ValueError(f"only our own networks take a width, not '{name}'; {_hint(base, [*_OWN])}")
    library, slash, short = name.partition("/")
    if not slash or library not in _LIBRARIES:
        return _find(name), name
    if short.split(".")[0] not in (known := _LIBRARIES[library].names()) and ":" not in short:
        raise ValueError(_unknown(name, [f"{library}/{other}" for other in known]))
    return library, short


def _find(name: str) -> str:
    """The first library that knows the plain ``name``."""
    names: list[str] = [*_OWN]
    missing = []
    for library, (names_of, _) in _LIBRARIES.items():
        try:
            known = names_of()
        except ValueError:
            missing.append(library)
            continue
        if name.split(".")[0] in known:  # timm writes NAME.WEIGHTS
            return library
        names += known
    note = f" ({' and '.join(missing)} not installed, so not searched)" if missing else ""
    raise ValueError(_unknown(name, names) + note)


def _unknown(name: str, known: list[str]) -> str:
    return f"no network is called '{name}'; {_hint(name, known)}"


def _hint(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, dict.fromkeys(known), n=4, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"our own are {', '.join(_OWN)}"


def _width(name: str, text: str) -> Fraction:
    if re.fullmatch(r"[0-9]+/0*[1-9][0-9]*|[0-9]+(\.[0-9]+)?", text) and (width := Fraction(text)) > 0:
        return width
    raise ValueError(f"'{name}': the width behind @ must be a fraction or decimal above 0, such as 3/4 or 0.5")


def _torchvision_names() -> list[str]:
    models = _import("torchvision.models")
    return models.list_models(module=models)


def _timm_names() -> list[str]:
    return _import("timm").list_models()


def _from_torchvision(name: str, num_classes: int, pretrained: bool, image_size: int | None) -> nn.Module:
    get_model = partial(_import("torchvision.models").get_model, name)
    # Auxiliary classifiers would get no gradient from a method; init_weights only has to be said.
    extra = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    net = _build(partial(get_model, weights=None, num_classes=num_classes, **extra), "image_size", image_size)
    if pretrained:
        weights = _build(partial(get_model, weights="DEFAULT", **(extra and {"aux_logits": True}))).state_dict()
        if extra:
            weights = {key: value for key, value in weights.items() if not key.lower().startswith("aux")}
        heads = adapt(net, verbose=False).head_names
        copy_weights(net, weights, f"torchvision's weights of {name}", heads)
    return net


def _from_timm(name: str, num_classes: int, pretrained: bool, image_size: int | None) -> nn.Module:
    create_model = partial(_import("timm").create_model, name)
    return _build(partial(create_model, pretrained=pretrained, num_classes=num_classes), "img_size", image_size)


def _build(build: partial[nn.Module], size_keyword: str = "", image_size: int | None = None) -> nn.Module:
    """Call ``build``, with the image size only where the network takes one."""
    try:
        if image_size is not None:
            try:
                return build(**{size_keyword: image_size})
            except TypeError as error:
                if size_keyword not in str(error):
                    raise
        return build()
    except Exception as error:  # the libraries raise what they like: OSError, RuntimeError, AssertionError …
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot build {build.args[0]}: {reason}") from error


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ValueError(f"{library} is not installed; its networks need: pip install {library}") from error


class _Library(NamedTuple):
    names: Callable[[], list[str]]
    build: Callable[[str, int, bool, int | None], nn.Module]


_LIBRARIES = {
    "torchvision": _Library(_torchvision_names, _from_torchvision),
    "timm": _Library(_timm_names, _from_timm),
}
