"""A network's forward as a graph, and modules that run such a graph on the network's own parts.

Only the root's forward and that of modules explicitly opened are traced; every other module stays a leaf that
runs its own code. So what depends on ``training`` inside a leaf goes on working, and each graph is short.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["GraphError", "Traced", "Values", "examples", "live_values", "run", "share", "trace"]

Values = dict[fx.Node, Any]


class GraphError(ValueError):
    """A network whose forward is none that this library can take apart."""


class _Root(nn.Module):
    """Calls the network with one argument, so that its other parameters keep their default values."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class _Tracer(fx.Tracer):
    def __init__(self, opened: Iterable[str]) -> None:
        super().__init__()
        self.opened = {"net", *(f"net.{path}" for path in opened)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


def trace(net: nn.Module, opened: Collection[str] = (), *, training: bool = False) -> fx.Graph:
    """The forward of ``net`` as a graph whose leaves are all modules but the root and those ``opened``."""
    name = type(net).__name__
    remedy = "write a sub-network yourself: a module whose forward(x) returns (logits, feature_map or None)"
    with _mode([net, *(net.get_submodule(path) for path in opened)], training):
        try:
            graph = _Tracer(opened).trace(_Root(net))
        except Exception as error:  # whatever a forward raises when its input is not a tensor
            reason = (str(error).splitlines() or [""])[0]
            raise GraphError(
                f"torch.fx cannot follow the forward of {name} ({type(error).__name__}: {reason}); {remedy}"
            ) from error
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            if not node.target.startswith("net."):
                raise GraphError(f"the forward of {name} makes a constant tensor; register it as a buffer")
            node.target = node.target.removeprefix("net.")
    return graph


@contextmanager
def _mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    before = [module.training for module in modules]
    for module in modules:
        module.training = training
    try:
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


class _Recorder(fx.Interpreter):
    def __init__(self, net: nn.Module, graph: fx.Graph) -> None:
        super().__init__(net, graph=graph)
        self.values: Values = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # The graph holds immutable lists; a module may change the list that it is given.
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_mutable, args)), {key: _mutable(value) for key, value in kwargs.items()}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


def _mutable(value: Any) -> Any:
    if isinstance(value, list):
        return [_mutable(item) for item in value]
    if isinstance(value, dict):
        return {key: _mutable(item) for key, item in value.items()}
    return value


def run(net: nn.Module, graph: fx.Graph, x: Any) -> Values:
    """The value of every node for the input ``x``, with all modules in eval mode.

    Parameters, buffers, training flags and random generators are afterwards what they were.
    """
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    recorder = _Recorder(net, graph)
    with (
        _mode(list(net.modules()), False),
        torch.no_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        recorder.run(x)
    return recorder.values


def examples(net: nn.Module, example: Tensor | None, sizes: Iterable[int]) -> Iterator[Tensor]:
    """Inputs to try, in the network's dtype and on its device: one black image of each size, then ``example``."""
    if example is not None and (not isinstance(example, Tensor) or example.dim() != 4 or not len(example)):
        raise ValueError("example must be a batch of images (B, C, H, W) with B ≥ 1")
    first = next(net.parameters(), None)
    like = torch.empty(0) if first is None else first
    channels = 3 if example is None else example.shape[1]
    for size in sizes:
        yield torch.zeros(1, channels, size, size, dtype=like.dtype, device=like.device)
    if example is not None:
        yield example[:1].detach().to(like)


def live_values(graph: fx.Graph, counts: Callable[[fx.Node], bool]) -> list[list[fx.Node]]:
    """For each node of the graph the values, itself included, that later nodes still need.

    Parameters and buffers are not values; nor is what ``counts`` says no to.
    """
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    last = {node: max((order[user] for user in node.users), default=-1) for node in nodes}
    live: list[fx.Node] = []
    result = []
    for i, node in enumerate(nodes):
        if node.op not in ("get_attr", "output") and counts(node):
            live = [*live, node]
        live = [value for value in live if last[value] > i]
        result.append(live)
    return result


def share(source: nn.Module, target: nn.Module, wanted: Collection[str], prefix: str = "") -> None:
    """Register with ``target`` the parts of ``source`` that ``wanted`` names: the same objects, the same names."""
    for name, child in source._modules.items():
        path = prefix + name
        if path in wanted:
            target._modules[name] = child
        elif child is not None and any(other.startswith(path + ".") for other in wanted):
            container = nn.Module()
            container.training = child.training
            share(child, container, wanted, path + ".")
            target.add_module(name, container)
    for name, parameter in source._parameters.items():
        if prefix + name in wanted:
            target.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        if prefix + name in wanted:
            target.register_buffer(name, buffer, name not in source._non_persistent_buffers_set)


class Traced(nn.Module):
    """Runs one graph in training mode and one in eval mode, on modules that it shares with their owner."""

    def __init__(self, source: nn.Module, train_graph: fx.Graph, eval_graph: fx.Graph, wanted: Collection[str]) -> None:
        super().__init__()
        if clash := [name for name in wanted if hasattr(self, name)]:
            raise GraphError(f"{type(source).__name__} has a part called '{clash[0]}', a name that sub-networks need")
        share(source, self, wanted)
        self.training = source.training
        # The function that torch.fx generates takes the module as an argument and keeps no state, so that every
        # module with these parts can run it: a deep copy too, and from many threads at once.
        self._forwards = self._functions(source, eval_graph, train_graph)

    @staticmethod
    def _functions(source: nn.Module, *graphs: fx.Graph) -> tuple[Callable[..., Any], ...]:
        return tuple(type(fx.GraphModule(source, graph)).forward for graph in graphs)

    def forward(self, x: Tensor) -> Any:
        """What the network's own forward would give for these parts."""
        evaluated, trained = self._forwards  # not by index: Dynamo of torch 2.10 takes no bool for one
        return (trained if self.training else evaluated)(self, x)
