"""Functions of tensors as compiled graphs: one pass over memory where single operations take several.

A graph is made once. Sizes are open, and so are numbers, which are 0-d float64 tensors within the function. What is
computed from numbers, or from one number per row, is computed once and not per element, where Inductor would put it:
`lamb` takes 1.0 ns per element instead of 3.1, `adam_mini` 0.5 instead of 1.6, `came` 2.3 instead of 4.3.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

Compiled = Callable[[Sequence[Tensor], Sequence[float]], None]

_tracing = False


def is_traced() -> bool:
    """Whether a graph is being made just now, so that operations are to be those which Inductor does fast."""
    return _tracing


def compiled(
    function: Callable[..., None], examples: Sequence[Tensor], numbers: int, fixed: Collection[int] = ()
) -> Compiled:
    """Compile a function that writes tensors, by Inductor.

    The plain function is its twin; results differ by rounding.

    Args:
        function: of tensors, which it writes, and then numbers; it must not branch on values or on sizes.
        examples: tensors of the dtypes, devices and strides, in size, to come. Sizes of one stay one and sizes that
            are equal stay equal; all others are open, from two on.
        numbers: how many.
        fixed: sizes that stay what they are.

    Returns:
        Takes tensors and numbers.

    Raises:
        RuntimeError: the function branches on what is open, or there is no compiler.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of parts of its own
        traced = _traced(function, examples, numbers, fixed)
        env = cast("Any", traced.shape_env)
        if env.guards:
            raise RuntimeError(f"it branches on sizes: {', '.join(str(g.expr) for g in env.guards)}")
        prelude = _hoisted(traced, numbers)
        _settle(traced.graph, max(_elements(x) for x in examples))
        inputs = [node.meta["val"] for node in traced.graph.find_nodes(op="placeholder")]
        env.freeze()  # what Inductor asks of sizes is how exactly to sum up (above 4096 terms), and is not to be kept
        made = GraphModule(traced, traced.graph)  # without what cannot be cached
        run = cast("Any", torch._inductor.compile(made, inputs))

    @functools.lru_cache(64)
    def derived(*numbers: float) -> list[Tensor]:
        made = [torch.tensor(x, dtype=torch.float64, device="cpu") for x in numbers]
        return [*made, *prelude(*made)]

    def call(tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
        run(*tensors, *derived(*numbers))

    return call


def _traced(
    function: Callable[..., None], examples: Sequence[Tensor], numbers: int, fixed: Collection[int]
) -> GraphModule:
    """The operations of a function, with symbols for sizes."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    global _tracing
    # NaN: a value that could be read would become a symbol of the graph
    opened = [torch.full((), torch.nan, dtype=torch.float64, device="cpu") for _ in range(numbers)]
    env = ShapeEnv()
    mode, inputs = FakeTensorMode(shape_env=env, allow_fallback_kernels=False), []
    for i, x in enumerate([*examples, *opened]):
        dynamic_sizes = [DimDynamic.STATIC if size in fixed else DimDynamic.DUCK for size in x.shape]
        context = StatelessSymbolicContext(dynamic_sizes=dynamic_sizes)
        inputs.append(mode.from_tensor(x, source=ConstantSource(f"input{i}"), symbolic_context=context))
    _tracing = True
    try:
        with mode, enable_python_dispatcher():  # without, some operations ask for sizes that are open
            traced = make_fx(function)(*inputs)
    finally:
        _tracing = False
    traced.shape_env = env
    return traced


def _hoisted(traced: GraphModule, numbers: int) -> GraphModule:
    """Take what depends on the last inputs alone out of a graph; its results become inputs.

    Returns:
        A graph from the numbers to these inputs.
    """
    graph, prelude = traced.graph, Graph()
    inputs = list(graph.find_nodes(op="placeholder"))
    copies: dict[Node, Node] = {x: prelude.placeholder(x.name) for x in inputs[len(inputs) - numbers :]}
    for node in graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and all(x in copies for x in node.all_input_nodes):
            copies[node] = prelude.node_copy(node, copies.__getitem__)
    outputs = []
    with graph.inserting_after(inputs[-1]):
        for node, copy in reversed(copies.items()):
            if node.op != "placeholder" and any(user not in copies for user in node.users):
                taken = graph.placeholder(f"{node.name}_given")
                taken.meta.update(node.meta)
                node.replace_all_uses_with(taken, lambda user: user not in copies)
                outputs.insert(0, copy)
    for node in reversed(list(copies)):
        if node.op != "placeholder":
            graph.erase_node(node)
    prelude.output(tuple(outputs))
    traced.recompile()
    return GraphModule({}, prelude)


def _settle(graph: Graph, large: int) -> None:
    """Make results of the small tensors that large ones are computed from.

    Inductor computes a result once and anything else wherever it is read: a root per row would be one per element.
    """
    bases: dict[Node, None] = {}
    for node in graph.nodes:
        if node.op == "call_function" and _elements(node.meta["val"]) < large:
            if any(_elements(user.meta.get("val")) == large for user in node.users):
                bases[_base(node)] = None
    graph.output_node().args = (tuple(node for node in bases if node.op == "call_function"),)


def _base(node: Node) -> Node:
    """What a view is of."""
    lends = getattr(node.target, "_schema", None) and cast("Any", node.target)._schema.arguments[0].alias_info
    return _base(node.all_input_nodes[0]) if lends and not lends.is_write else node


def _elements(x: object) -> int:
    """How many elements a tensor has, or had when a graph was made; 0 if it is none."""
    count = x.numel() if isinstance(x, Tensor) else 0
    return cast("int", count.node.hint) if isinstance(count, torch.SymInt) else count
