"""Keeps PyTorch from crashing in a backward that does not compute every gradient.

The CPU kernel of group norm's backward writes to a null pointer in channels_last if the gradient of the weight or the
bias is computed and that of the input is not (docs/upstream.md). Pass 1 asks for just that where it has drawn no weight
before a group norm, and an ordinary backward where none is trained.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


def guard_group_norms(loss: Tensor, params: Sequence[Tensor]) -> None:
    """Make a backward of ``loss`` safe for every group norm whose input requires no gradient.

    It computes with a contiguous copy of that input. Those whose saved tensors have hooks already, such as a
    checkpoint's, stay as they are.

    Args:
        loss: has a graph.
        params: what is trained; nothing is done if none of it is on the CPU.
    """
    if _any_on_cpu(params):
        _guard(_group_norms(nodes(loss)))


def needed_edges(loss: Tensor, params: Sequence[Tensor]) -> list[GradientEdge]:
    """What to compute along with the gradients of ``params`` alone, as further inputs of ``torch.autograd.grad``.

    They are the inputs of those group norms whose weight or bias is asked for and whose input is not: mostly none.
    Group norms whose input requires no gradient are guarded.

    Args:
        loss: has a graph.
        params: leaves of it, or unused; nothing is done if none of them is on the CPU.
    """
    if not _any_on_cpu(params):
        return []
    graph = nodes(loss)
    norms = _group_norms(graph)
    if not norms:
        return []
    _guard(norms)

    users: dict[Node, list[Node]] = {}
    for node in graph:
        for following, _ in node.next_functions:
            if following is not None:
                users.setdefault(following, []).append(node)
    ids = {id(param) for param in params}
    asked = [node for node in graph if _is_leaf(node, ids)]
    computed: set[Node] = set()
    edges: list[GradientEdge] = []
    while asked:
        _add_with_users(asked, users, computed)
        asked = []
        for norm in norms:
            (source, output), *weights = norm.next_functions
            if source is not None and source not in computed and any(node in computed for node, _ in weights):
                edges.append(GradientEdge(source, output))
                asked.append(source)  # what is computed on the way to it may be the weight of another group norm
    return edges


def _any_on_cpu(params: Iterable[Tensor]) -> bool:
    return any(param.is_cpu for param in params)


def nodes(loss: Tensor) -> list[Node]:
    """Every node of the graph, once."""
    found = [loss.grad_fn] if loss.grad_fn is not None else []
    seen = set(found)
    for node in found:  # which grow
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                found.append(following)
    return found


def _group_norms(nodes: Iterable[Node]) -> list[Any]:
    return [node for node in nodes if type(node).__name__.startswith("NativeGroupNormBackward")]


def _is_leaf(node: Any, ids: set[int]) -> bool:
    return type(node).__name__ == "AccumulateGrad" and id(node.variable) in ids


def _guard(norms: Iterable[Any]) -> None:
    for norm in norms:
        (source, _), *weights = norm.next_functions
        if source is not None or all(node is None for node, _ in weights):
            continue
        try:
            norm._raw_saved_input.register_hooks(lambda saved: saved, Tensor.contiguous)
        except RuntimeError:  # it has hooks, or its backward will fail with an error of its own
            continue


def _add_with_users(nodes: Iterable[Node], users: dict[Node, list[Node]], computed: set[Node]) -> None:
    """Add to ``computed`` these nodes and all whose backward leads to them."""
    nodes = list(nodes)
    while nodes:
        node = nodes.pop()
        if node not in computed:
            computed.add(node)
            nodes += users.get(node, [])
