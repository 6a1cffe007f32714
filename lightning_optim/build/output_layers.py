"""Which linear layers are the output layers of a model, told by how its modules are put together, without running it.

The modules of a model are read as steps, in the order in which they were registered, with the width that goes into the
first layer and the width that comes out of the last layer of each. The output layer is the last layer of the last step,
unless an earlier step takes what it gives. What lies in a repeated block, an attention or a pretrained model without a
head is no output layer: where the structure does not tell, there is none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

_Convolution = nn.modules.conv._ConvNd
_Norm = (nn.LayerNorm, nn.RMSNorm)
_ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_NO_OUTPUT = (
    *_ATTENTION,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.RNNBase,
    nn.Embedding,
    nn.EmbeddingBag,
    _Convolution,
)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
Ends = tuple[int | None, int | None]


def is_conv1d(module: nn.Module) -> bool:
    """Transformers' Conv1D is a linear layer, stored inputs x outputs; it is recognized by its `nf`.

    Returns:
        True for it.
    """
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, stored either way.

    Returns:
        True for `nn.Linear` and Transformers' Conv1D.
    """
    return isinstance(module, nn.Linear) or is_conv1d(module)


def output_layers(model: nn.Module) -> list[nn.Module]:
    """The output layers of a model, several if it has several heads.

    Args:
        model: any module; wrappers (DDP, `torch.compile`, PEFT, Lightning) do not matter.

    Returns:
        Linear layers; none where the structure does not tell, or nothing with weights comes before them.
    """
    takes_data = any(isinstance(m, nn.Embedding | _Convolution) for m in model.modules())
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)) or (not takes_data and _is_block(model, None, ())):
        return []
    layers = _outputs(model)
    inside = {id(p) for m in layers for p in m.parameters()}
    return layers if any(p.ndim > 1 and id(p) not in inside for p in model.parameters()) else []


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of Transformers, with or without a head.

    Returns:
        True if its class has a `base_model_prefix`; wrappers that pass attributes on do not.
    """
    return hasattr(type(module), "base_model_prefix")


def output_embeddings(module: nn.Module) -> list[nn.Module]:
    """What a module says is its output layer by `get_output_embeddings`, as models of Transformers do.

    Args:
        module: any module.

    Returns:
        Layers with a weight, those of adapters not among them.
    """
    getter = getattr(module, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    if not isinstance(output, nn.Module):
        return []
    listed = isinstance(output, _CONTAINERS) or hasattr(output, "modules_to_save")
    return _linear_layers(output) if listed else [_layer(output)]


def _linear_layers(classifier: Any) -> list[nn.Module]:
    """The linear layers in one or several modules that are outputs."""
    if isinstance(classifier, (tuple, list)):
        return [layer for part in classifier for layer in _linear_layers(part)]
    return _outputs(classifier) if isinstance(classifier, nn.Module) else []


def _has_classifier(module: nn.Module) -> bool:
    """Whether a module is a model of timm."""
    return hasattr(type(module), "get_classifier") and hasattr(type(module), "reset_classifier")


def _is_model(module: nn.Module) -> bool:
    return is_pretrained(module) or _has_classifier(module)


def _steps(module: nn.Module) -> list[nn.Module]:
    """Children that hold matrices."""
    return [m for m in module.children() if any(p.ndim > 1 for p in m.parameters())]


def _layer(module: nn.Module) -> nn.Module:
    """The layer that an adapter of PEFT wraps."""
    while hasattr(module, "adapter_layer_names") and isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # pyright: ignore[reportAssignmentType]
    return module


def _own_ends(module: nn.Module) -> Ends | None:
    """Widths into and out of one layer; None of other modules."""
    if is_conv1d(module):
        return module.nx, module.nf  # pyright: ignore[reportReturnType]
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _Convolution):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None, module.embedding_dim
    if isinstance(module, nn.MultiheadAttention):
        return module.embed_dim, module.embed_dim
    if isinstance(module, nn.RNNBase):
        return module.input_size, (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    return None


def _ends(module: nn.Module) -> Ends:
    """Widths into the first and out of the last layer with weights."""
    module = _layer(module)
    module_ends = _own_ends(module)
    if module_ends is None and (steps := _steps(module)):
        return _ends(steps[0])[0], _ends(steps[-1])[1]
    return module_ends or (None, None)


def _widths(module: nn.Module, side: int) -> Iterator[int | None]:
    """Widths that some layer within takes (side 0) or gives (side 1); a convolution takes no linear layer's outputs."""
    for m in module.modules():
        if side == 0 and isinstance(m, _Convolution):
            continue
        ends = _own_ends(m)
        if ends is not None and (width := ends[1] if ends[0] is None else ends[side]) is not None:
            yield width
        elif (width := _norm_width(m)) is not None:
            yield width


def _norm_width(module: nn.Module) -> int | None:
    """The width of a norm, None of other modules."""
    if isinstance(module, _Norm):
        return module.normalized_shape[-1]
    params = dict(module.named_parameters(recurse=False))
    plain = (
        params and set(params) <= {"weight", "bias"} and "weight" in params and not any(True for _ in module.children())
    )
    return params["weight"].numel() if plain and params["weight"].ndim == 1 else None


def _attends(module: nn.Module) -> bool:
    """Whether a module is an attention, or has one of its own."""
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    return isinstance(module, _ATTENTION) or any(isinstance(getattr(module, k, None), int) for k in names)


def _is_block(module: nn.Module, parent: nn.Module | None, siblings: Sequence[nn.Module]) -> bool:
    """Whether a step is one of several in a row, or adds to what it takes, so that its last layer is in the middle."""
    if is_linear(_layer(module)) or any(_is_model(m) for m in module.modules()):
        return False
    plain, ends = isinstance(module, _CONTAINERS), _ends(module)
    if plain and (parent is None or isinstance(parent, nn.Sequential)):
        return False
    if parent is not None and is_pretrained(parent):
        return False
    alike = not plain and any(m is not module and type(m) is type(module) and _ends(m) == ends for m in siblings)
    if isinstance(parent, nn.Sequential) and alike:
        return True
    if isinstance(parent, nn.ModuleList) and not plain:
        lists = (x for m in module.modules() if isinstance(m, nn.ModuleList) for x in m)
        nested = any(not is_linear(_layer(x)) for x in lists) or any(map(_attends, module.modules()))
        if nested or ends[0] == ends[1] or any(p.ndim > 2 for p in module.parameters()):
            return True
    if ends[0] is None or ends[0] != ends[1]:
        return False
    norms = (m for m in module.modules() if not isinstance(m, nn.modules.batchnorm._BatchNorm))
    return alike or any(map(_attends, module.modules())) or any(_norm_width(m) == ends[0] for m in norms)


def _outputs(module: nn.Module) -> list[nn.Module]:
    """The output layers of a step."""
    module = _layer(module)
    if is_linear(module):
        return [module]
    if isinstance(module, _NO_OUTPUT):
        return []
    if is_pretrained(module):
        return of_pretrained(module)
    classifiers = _linear_layers(module.get_classifier()) if _has_classifier(module) else []  # pyright: ignore[reportCallIssue]
    if _has_classifier(module) and not classifiers:
        return []
    return [*classifiers, *(m for m in _of_steps(module, _steps(module)) if all(m is not x for x in classifiers))]


def of_pretrained(module: nn.Module) -> list[nn.Module]:
    """The output layers of a model of Transformers, which lie outside the pretrained models within it.

    Args:
        module: a model of Transformers.

    Returns:
        Linear layers, what `get_output_embeddings` gives among them; none of a model without a head.
    """
    output = output_embeddings(module)
    base = getattr(module, "base_model", module)
    outer = _of_steps(module, _steps(module), None if base is module else base)
    return [*output, *(m for m in outer if all(m is not x for x in output))]


def _of_steps(parent: nn.Module, steps: Sequence[nn.Module], base: nn.Module | None = None) -> list[nn.Module]:
    """The output layers of a module with steps, of which `base` has none."""
    steps = [m for m in steps if not _modulates(m, parent)]
    outputs_of_step: dict[int, list[nn.Module]] = {}
    for i, step in enumerate(steps):
        chained = isinstance(parent, nn.Sequential) and i < len(steps) - 1
        inner = step is base or chained or _is_block(step, parent, steps)
        if not inner and (layers := _outputs(step)):
            outputs_of_step[i] = layers
    if not outputs_of_step:
        return []
    ends = [(_ends(m)[0], _ends(outputs_of_step[i][0] if i in outputs_of_step else m)[1]) for i, m in enumerate(steps)]
    first = _output_step(steps, ends, outputs_of_step, strict=is_pretrained(parent) and base is None)
    if first is None:
        return []
    beside = [
        i
        for i in outputs_of_step
        if i != first and not _attends(parent) and _is_beside(steps, ends, outputs_of_step, i, first)
    ]
    return [layer for i in (first, *beside) for layer in outputs_of_step[i]]


def _modulates(step: nn.Module, parent: nn.Module) -> bool:
    """Whether a step gives scales and shifts to a norm beside it that has no weights (adaptive layer norm)."""
    into, out = _ends(step)
    bare = [m.normalized_shape[-1] for m in parent.children() if isinstance(m, _Norm) and m.weight is None]
    return into is not None and out is not None and any(out > width and out % width == 0 for width in bare)


def _output_step(
    steps: Sequence[nn.Module], ends: Sequence[Ends], candidates: Collection[int], *, strict: bool
) -> int | None:
    """Which step is the output: the last one, unless it has none or feeds one that was registered before it.

    Returns:
        Its index. None where the structure does not tell: a layer that could feed one of several pretrained models
        beside it, or anything if `strict`, need not be an output.
    """
    takes, gives = ([set(_widths(m, side)) for m in steps] for side in (0, 1))

    def users(i: int) -> list[int]:
        return [j for j in range(len(steps)) if j != i and (ends[i][1] in takes[j] or _prompts(steps[j], ends[i][1]))]

    def is_fed(i: int) -> bool:
        return _is_model(steps[i]) or any(ends[i][0] in gives[j] for j in range(len(steps)) if j != i)

    last = len(steps) - 1
    models = [i for i, m in enumerate(steps) if _is_model(m)]
    early = [i for i in candidates if i != last and not users(i) and is_fed(i)] if models or not strict else []
    if last not in candidates:
        return early[-1] if early else None
    after = users(last)
    if not after:
        return last
    if early and (not is_fed(last) or early[-1] in after):
        return early[-1]
    unclear = strict or (len(models) > 1 and set(models) & set(after))
    return (early[-1] if early else None) if unclear else last


def _prompts(model: nn.Module, width: int | None) -> bool:
    """Whether a width is that of several token embeddings of a model with an output layer of its own."""
    if width is None or not (is_pretrained(model) and of_pretrained(model)):
        return False
    return any(width % m.embedding_dim == 0 for m in model.modules() if isinstance(m, nn.Embedding))


def _is_beside(
    steps: Sequence[nn.Module], ends: Sequence[Ends], candidates: Collection[int], i: int, output: int
) -> bool:
    """Whether a step is an output next to another one: it takes or gives the same, and feeds nothing after it."""
    into, out = ends[i]
    alike = (into is not None and into == ends[output][0]) or (out is not None and out == ends[output][1])
    later = {output, *range(i + 1, len(steps))}
    if not alike or any(j not in candidates for j in range(min(i, output), max(i, output))):
        return False
    if any(out == ends[j][0] if j in candidates else out in _widths(steps[j], 0) for j in later):
        return False
    layers = [m for m in steps[i].modules() if is_linear(m) or _norm_width(m) is not None]
    return bool(layers) and is_linear(layers[-1])
