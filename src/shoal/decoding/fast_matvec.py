"""What the compiler is told about one row times a matrix on a CPU.

Decoding one sequence multiplies a single row by every weight, and that reads each weight once: the time is that of the
memory. The library kernels that `linear` calls for one row reach about half of what the memory gives (they are made for
many rows), while a product followed by a sum, which the compiler fuses into one loop, reaches nearly all of it. The
sums are taken in another order, so results agree to rounding, not bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

_aten = torch.ops.aten


class OneRow(CustomGraphPass):
    """Rewrites x W^T (+ b) with x [1, in] and W [out, in] in rows, float32 on the CPU, to sum(x * W, -1) (+ b)."""

    def __call__(self, graph: Graph) -> None:
        """Called by the compiler with every graph, before it fuses."""
        for node in list(graph.nodes):
            if node.target is _aten.mm.default and _fits(*node.args):
                _rewrite(graph, node, *node.args)
            elif node.target is _aten.addmm.default and not node.kwargs and _fits(*node.args[1:]):
                bias, row, weight = node.args
                _rewrite(graph, node, row, weight, bias)

    def uuid(self) -> bytes:
        """What the compiler's cache on disk tells this pass by."""
        return get_hash_for_files((__file__,))


def _fits(row: Any, weight: Any) -> bool:
    """Whether `row` [1, in] is one row and `weight` [in, out] the transposed view of a matrix stored by rows."""
    x, w = row.meta.get("val"), weight.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(w, torch.Tensor):
        return False
    one = isinstance(x.shape[0], int) and x.shape[0] == 1
    return one and x.device.type == "cpu" and x.dtype == torch.float32 and w.stride(0) == 1 and w.shape[1] > 1


def _rewrite(graph: Graph, node: Node, row: Any, weight: Any, bias: Any = None) -> None:
    with graph.inserting_before(node):
        rows = _call(graph, _aten.permute.default, weight, [1, 0])
        product = _call(graph, _aten.mul.Tensor, row, rows)
        total = _call(graph, _aten.sum.dim_IntList, product, [-1])
        out = _call(graph, _aten.unsqueeze.default, total, 0)
        if bias is not None:
            out = _call(graph, _aten.add.Tensor, out, bias)
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*(arg.meta["val"] if isinstance(arg, Node) else arg for arg in args))
    return node
