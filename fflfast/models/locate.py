"""Where in a network's graph the feature map, the logits and the last layer are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, fx, nn

from .trace import GraphError, Values, live_values, run, trace

__all__ = ["Tap", "locate"]

_POOL_MODULES = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.FractionalMaxPool2d,
    nn.LPPool2d,
    nn.MaxPool2d,
)
_REDUCTIONS = {"amax", "logsumexp", "mean", "sum"}
_POOLS = _REDUCTIONS | {"adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "lp_pool2d", "max_pool2d"}
_PASSING_MODULES = (nn.Dropout, nn.Dropout2d, nn.Identity)
_PASSING = {"contiguous", "dropout", "dropout2d"}


@dataclass(frozen=True)
class Tap:
    """A graph whose output is (logits, feature map or None), and what is known of it."""

    graph: fx.Graph
    source: str
    """The graph as code, as it was traced."""
    opened: frozenset[str]
    heads: tuple[str, ...]
    num_classes: int
    feature: str | None
    feature_shape: tuple[int, ...] | None
    notes: tuple[str, ...]
    certainty: int
    """3: a pooling was found; 2: the map is flattened; 1: it enters a module that stays closed; 0: no map."""
    to_open: frozenset[str]
    """Modules that stand where the pooling must be."""


def locate(
    net: nn.Module,
    image: Tensor,
    *,
    training: bool,
    opened: frozenset[str] = frozenset(),
    like: Tap | None = None,
) -> Tap:
    """Trace ``net`` in the given mode and open modules until its last pooling is in sight.

    The feature map is sought among the cuts, the nodes whose value is all that the rest of the network sees: the
    last spatial map, or the map before it where that is itself the output of a pooling. ``like``, the result in
    the other mode, is the answer where both modes have the same graph.
    """
    graph = trace(net, opened, training=training)
    if like is not None and _source(graph) == like.source:
        return like
    best = _read(net, graph, image, opened)
    current, closed = best, set[str]()
    while more := current.to_open - closed:
        closed |= more
        try:
            graph = trace(net, current.opened | more, training=training)
        except GraphError:
            break
        current = _read(net, graph, image, current.opened | more)
        if current.certainty >= best.certainty:
            best = current
    return best


def _read(net: nn.Module, graph: fx.Graph, image: Tensor, opened: frozenset[str]) -> Tap:
    source = _source(graph)
    logits, notes = _keep_logits(net, graph)
    values = run(net, graph, image)
    score = values[logits]
    if not isinstance(score, Tensor) or score.dim() != 2 or len(score) != len(image):
        came = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise GraphError(
            f"{type(net).__name__} must return logits (B, classes) or a tuple that begins with them; got {came}"
        )
    node, certainty, to_open, channels_last = _feature(net, graph, values)
    shape = None
    name = None
    if node is not None:
        name = str(node.target) if node.op == "call_module" else node.name
        shape = tuple(values[node].shape[1:])
        with graph.inserting_after(node):
            if channels_last:
                shape = (shape[2], shape[0], shape[1])
                node = graph.call_method("permute", (node, 0, 3, 1, 2))
            elif certainty == 2:  # flattened, so what follows may write into it through the view
                node = graph.call_method("clone", (node,))
    graph.output_node().args = ((logits, node),)
    return Tap(
        graph=graph,
        source=source,
        opened=opened,
        heads=tuple(dict.fromkeys(_heads(net, logits))),
        num_classes=score.shape[1],
        feature=name,
        feature_shape=shape,
        notes=notes,
        certainty=certainty,
        to_open=to_open,
    )


def _source(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def _keep_logits(net: nn.Module, graph: fx.Graph) -> tuple[fx.Node, tuple[str, ...]]:
    """Make the logits the graph's only output and drop what led to the other outputs alone."""
    result = graph.output_node().args[0]
    if isinstance(result, dict) and result:
        result = result.get("logits", next(iter(result.values())))
    elif isinstance(result, fx.Node) and hasattr(result.target, "_fields"):  # a NamedTuple being built
        result = result.args[0]
    elif isinstance(result, (tuple, list)) and result:
        result = result[0]
    if not isinstance(result, fx.Node):
        raise GraphError(f"{type(net).__name__} returns no logits")
    before = _parts(net, graph)
    # A result that nobody uses may still stand for a change in place.
    unused = {node for node in graph.nodes if not node.users}
    graph.output_node().args = (result,)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node in unused)
    lost = sorted(before - _parts(net, graph))
    note = f"auxiliary outputs are left out: {', '.join(lost)} get no gradient"
    return result, (note,) if lost else ()


def _parts(net: nn.Module, graph: fx.Graph) -> set[str]:
    return {n.target for n in graph.nodes if n.op == "call_module" and _has_parameters(net, n)}


def _has_parameters(net: nn.Module, node: fx.Node) -> bool:
    return any(True for _ in net.get_submodule(str(node.target)).parameters())


def _feature(net: nn.Module, graph: fx.Graph, values: Values) -> tuple[fx.Node | None, int, frozenset[str], bool]:
    """(the feature map or None, certainty, modules to open, whether its layout is (B, H, W, C))."""
    nodes = list(graph.nodes)
    live = live_values(graph, lambda node: _holds_tensor(values[node]))
    cuts = [node for node, needed in zip(nodes, live, strict=True) if needed == [node]]
    maps = [i for i, node in enumerate(cuts) if _is_map(values[node])]
    if not maps or not _is_vector(values[cuts[maps[-1] + 1]]):  # none, or tokens follow
        return None, 0, frozenset(), False
    last, vector = cuts[maps[-1]], cuts[maps[-1] + 1]
    segment = nodes[nodes.index(last) + 1 : nodes.index(vector) + 1]
    to_open = frozenset(str(node.target) for node in segment if _can_open(net, node))
    feature = None if last.op == "placeholder" else last
    if any(_is_pool(net, node) for node in segment):
        return feature, 3 if feature else 0, frozenset(), any(map(_pools_middle, segment))
    if feature is None or to_open:
        return feature, 1 if feature else 0, to_open, False
    origin = last
    while _passes(net, origin):
        origin = origin.all_input_nodes[0]
    if _can_open(net, origin):
        return feature, 2, frozenset({str(origin.target)}), False
    if _is_pool(net, origin):
        source = origin.all_input_nodes[0]
        if source in cuts and source.op != "placeholder" and values[source].dim() == 4:
            return source, 3, frozenset(), False
    return feature, 2, frozenset(), False


def _holds_tensor(value: object) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_holds_tensor, value)))


def _is_vector(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2 and value[0].numel() == max(value.shape[1:])


def _is_map(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 4 and not _is_vector(value)


def _can_open(net: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    module = net.get_submodule(str(node.target))
    return isinstance(module, nn.Sequential) or not type(module).__module__.startswith("torch.nn")


def _is(net: nn.Module, node: fx.Node, kinds: tuple[type, ...], names: set[str]) -> bool:
    if node.op == "call_module":
        return isinstance(net.get_submodule(str(node.target)), kinds)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in names


def _is_pool(net: nn.Module, node: fx.Node) -> bool:
    return _is(net, node, _POOL_MODULES, _POOLS)


def _passes(net: nn.Module, node: fx.Node) -> bool:
    return _is(net, node, _PASSING_MODULES, _PASSING)


def _pools_middle(node: fx.Node) -> bool:
    """Whether the node reduces dimensions 1 and 2 of four: the map before it is (B, H, W, C)."""
    if (node.target if node.op == "call_method" else getattr(node.target, "__name__", "")) not in _REDUCTIONS:
        return False
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return isinstance(dims, (tuple, list)) and {int(d) % 4 for d in dims if isinstance(d, int)} == {1, 2}


def _heads(net: nn.Module, node: fx.Node) -> Iterator[str]:
    """The modules with parameters that the logits come from without another such module between."""
    if node.op == "call_module" and _has_parameters(net, node):
        yield str(node.target)
    else:
        for source in node.all_input_nodes:
            yield from _heads(net, source)
