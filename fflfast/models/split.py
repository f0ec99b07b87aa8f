"""A network in two: a trunk that sub-networks share, and what is left of it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from torch import Tensor, fx, nn

from .base import SubNetwork
from .trace import GraphError, Traced, examples, live_values, run, trace

__all__ = ["SplitNetwork", "Trunk", "split"]

_SIZES = (32, 224, 64, 299, 28)  # pixels


class Trunk(Traced):
    """The low layers of a network: (B, 3, H, W) images in, the sub-network's input out."""


class SplitNetwork(Traced, SubNetwork):
    """What stays of a network after its trunk was taken off."""

    def __init__(self, net: SubNetwork, trained: _Halves, evaluated: _Halves, wanted: Collection[str]) -> None:
        super().__init__(net, trained.above, evaluated.above, wanted)
        self._stage_forwards = self._functions(net, _with_stages(evaluated), _with_stages(trained))
        self.stage_names = tuple(evaluated.stages)
        self.return_stages = net.return_stages
        self.feature_channels, self.num_classes = net.feature_channels, net.num_classes
        self.arch, self.head_names = net.arch, net.head_names

    def forward(self, x: Tensor) -> Any:
        """What the network's own forward would give, but for the stages below the split."""
        evaluated, trained = self._stage_forwards if self.return_stages else self._forwards
        return (trained if self.training else evaluated)(self, x)


class _Halves(NamedTuple):
    below: fx.Graph
    above: fx.Graph
    stages: dict[str, fx.Node]
    """The nodes of the upper half whose values are the stages, by the stages' names."""


def split(net: SubNetwork, at: str, *, example: Tensor | None = None) -> tuple[nn.Module, SubNetwork]:
    """Split a sub-network before its module ``at``: ``sub_network(trunk(x))`` is ``net(x)``.

    Both parts share their modules with ``net`` under the same names, so that the two state dicts merge into its
    own; heads that the forward does not use stay with the sub-network. Where the upper part begins with an
    operation in place it works on a copy of its input, which other sub-networks read too. Of the stages the
    sub-network keeps those whose outputs it computes. A network with a method `split_at` splits itself.

    Args:
        net: one of our own networks or an adapted one.
        at: dotted name of a module that the forward calls.
        example: images (B, C, H, W), for a network that takes none of 32, 224, 64, 299 and 28 pixels.

    Returns:
        The trunk, images → tensor, and the sub-network, that tensor → (logits, feature map). A network's own
        `split_at` may give a trunk that returns stages as well, see `fflfast.cohort.Cohort`.

    Raises:
        ValueError: no such module, or more than one value crosses there; it lists where a split is possible.
    """
    if not isinstance(net, SubNetwork):
        raise TypeError(f"split() expects a sub-network, got {type(net).__name__}; adapt() it first")
    own = getattr(net, "split_at", None)
    if own is not None:
        return own(at)
    parents = _parents(net, at)
    trained, evaluated = (_halves(net, at, parents, training=mode) for mode in (True, False))
    if _writes_input(net, evaluated, example):
        for half in (trained, evaluated):  # else one sub-network would change what the others read
            _copy_input(half.above)
    lower = _used(trained.below) | _used(evaluated.below)
    upper = _used(trained.above) | _used(evaluated.above)
    trunk = Trunk(net, trained.below, evaluated.below, lower)
    rest = SplitNetwork(net, trained, evaluated, upper | set(_others(net, lower)))
    if shared := _states(trunk) & _states(rest):
        raise ValueError(f"split at '{at}' would leave {len(shared)} tensors in both parts; {_points(net)}")
    return trunk, rest


def _parents(net: SubNetwork, at: str) -> list[str]:
    """The modules to open so that ``at`` is seen."""
    known = dict(net.named_modules(remove_duplicate=False))
    if not at or at not in known:
        close = difflib.get_close_matches(at, known, n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"the network has no module '{at}'; {hint}{_points(net)}")
    names = at.split(".")
    return [".".join(names[:i]) for i in range(1, len(names))]


@contextmanager
def _returning_stages(net: SubNetwork, wanted: bool) -> Iterator[None]:
    before, net.return_stages = net.return_stages, wanted
    try:
        yield
    finally:
        net.return_stages = before


def _halves(net: SubNetwork, at: str, parents: list[str], *, training: bool) -> _Halves:
    with _returning_stages(net, bool(net.stage_names)):
        graph = trace(net, parents, training=training)
    output = graph.output_node()
    stages = {}
    if net.stage_names:
        # A stage that is an output as well would cross every split above it.
        logits, feature_map, values = cast(tuple[Any, Any, Any], output.args[0])
        stages = dict(zip(net.stage_names, values, strict=True))
        output.args = ((logits, feature_map),)
    return _cut(net, graph, at, stages)


def _with_stages(half: _Halves) -> fx.Graph:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    outputs = graph.graph_copy(half.above, copies)
    graph.output((*outputs, tuple(copies[node] for node in half.stages.values())))  # type: ignore[misc]
    return graph


def _cut(net: SubNetwork, graph: fx.Graph, at: str, stages: dict[str, fx.Node]) -> _Halves:
    nodes = list(graph.nodes)
    first = next((i for i, node in enumerate(nodes) if _inside(node, at)), None)
    if first is None:
        raise ValueError(f"'{at}' is no step of the network's forward; {_points(net)}")
    crossing = live_values(graph, lambda node: True)[first - 1]
    if len(crossing) != 1 or crossing[0].op == "placeholder":
        why = "nothing would be left for the trunk" if len(crossing) == 1 else f"{len(crossing)} values cross"
        raise ValueError(f"cannot split at '{at}': {why}; {_points(net)}")
    below, above = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes[:first]:
        copies[node] = below.node_copy(node, copies.__getitem__)
    below.output(copies[crossing[0]])
    copies = {crossing[0]: above.placeholder("x")}
    for node in nodes[:first]:
        if node.op == "get_attr" and any(user in nodes[first:] for user in node.users):
            copies[node] = above.node_copy(node)
    for node in nodes[first:]:
        copies[node] = above.node_copy(node, copies.__getitem__)
    # Parameters that only the upper half reads.
    for node in reversed(below.nodes):
        if node.op == "get_attr" and not node.users:
            below.erase_node(node)
    return _Halves(below, above, {name: copies[node] for name, node in stages.items() if node in nodes[first:]})


def _inside(node: fx.Node, at: str) -> bool:
    return node.op in ("call_module", "get_attr") and f"{node.target}.".startswith(f"{at}.")


def _writes_input(net: SubNetwork, half: _Halves, example: Tensor | None) -> bool:
    """Whether the upper half changes its input in place."""
    reason: Exception | None = None
    for image in examples(net, example, _SIZES):
        try:
            x = run(net, half.below, image)[half.below.output_node()]
        except Exception as error:  # a network refuses a size in whatever way it likes
            reason = error
            continue
        if not isinstance(x, Tensor):
            raise ValueError(f"what crosses must be one tensor, not {type(x).__name__}; {_points(net)}")
        version = x._version
        run(net, half.above, x)
        return x._version != version
    raise ValueError(f"{type(net).__name__} takes no image that was tried ({reason}); give split() an example")


def _copy_input(graph: fx.Graph) -> None:
    x = next(iter(graph.nodes))
    with graph.inserting_after(x):
        copy = graph.call_method("clone", (x,))
    x.replace_all_uses_with(copy, lambda user: user is not copy)


def _used(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}


def _others(module: nn.Module, taken: Collection[str], prefix: str = "") -> Iterator[str]:
    """The largest parts that hold nothing of ``taken``: unused heads too stay in the state dict."""
    for name, child in module._modules.items():
        path = prefix + name
        if child is None or path in taken:
            continue
        if any(other.startswith(path + ".") for other in taken):
            yield from _others(child, taken, path + ".")
        else:
            yield path
    yield from (prefix + n for n in (*module._parameters, *module._buffers) if prefix + n not in taken)


def _states(module: nn.Module) -> set[int]:
    return {id(tensor) for tensor in (*module.parameters(), *module.buffers())}


def _points(net: SubNetwork, most: int = 12) -> str:
    """A sentence that lists the modules, outermost first, before which a single value crosses."""
    containers = {name for name, module in net.named_modules() if name and isinstance(module, nn.Sequential)}
    try:
        with _returning_stages(net, False):
            graph = trace(net, containers)
    except GraphError as error:
        return str(error)
    nodes = list(graph.nodes)
    live = live_values(graph, lambda node: True)
    names: dict[str, None] = {}
    for before, node in zip(live, nodes[1:], strict=False):
        if node.op == "call_module" and len(before) == 1 and before[0].op != "placeholder":
            name = str(node.target)
            parent, _, child = name.rpartition(".")
            while parent in containers and child == next(iter(net.get_submodule(parent)._modules)):
                name = parent
                parent, _, child = name.rpartition(".")
            names[name] = None
    ordered = sorted(names, key=lambda name: name.count("."))
    more = ", …" if len(ordered) > most else ""
    return f"a split is possible at: {', '.join(ordered[:most])}{more}"
