"""Layouts of parameters, registered by the name of a class: what no measurement tells, or where there is none.

A key is `Class.path`: the name of a class of a module, or of one that it derives from (so that subclasses, and classes
that `fully_shard` renames, are found), and the path of a parameter or a layer within it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from lightning_optim.build.output_layers import is_linear
from lightning_optim.build.param_role import ParamRole, Role, by_head, head_size, sides
from lightning_optim.core.matrix_views import Blocks, are_valid, frozen

Order = Literal["apart", "grouped"]
"""Rows of a fused attention layer: all queries, keys, values; or, for each key head, its queries, key, value."""


@dataclass(frozen=True)
class Layout:
    """What is known of the parameters of a class; None where nothing is."""

    role: Role | None = None
    blocks: Blocks | Order = None
    transposed: bool | None = None
    by_user: bool = False


def _shipped(blocks: Blocks | Order, role: Role, *keys: str) -> dict[str, Layout]:
    return {key: Layout(role, blocks) for key in keys}


_VISION = """
BlipAttention Blip2Attention CohereCompassVisionAttention DeepseekOcr2SamVisionAttention
Dots3NoteVisionAttention Ernie4_5_VLMoeVisionAttention Florence2VisionChannelAttention
Florence2VisionWindowAttention Glm4vVisionAttention Glm4vMoeVisionAttention Glm5NextVisionAttention
GlmImageVisionAttention GlmOcrVisionAttention GotOcr2VisionAttention InstructBlipAttention
InstructBlipVideoAttention MgpstrAttention PPFormulaNetVisionAttention PPOCRV5MobileRecAttention
PPOCRV5ServerRecAttention PPOCRV6SmallRecAttention Qwen2_5_VLVisionAttention Qwen3_5VisionAttention
Qwen3_5MoeVisionAttention Qwen3OmniMoeVisionAttention Qwen3VLVisionAttention Qwen3VLMoeVisionAttention
Qwen4ExpVisionAttention SamVisionAttention SamHQVisionAttention SegGptAttention SLANeXtVisionAttention
TimesformerSelfAttention UnlimitedOcrSamVisionAttention VitDetAttention
""".split()
"""Attention of vision towers whose `qkv` is read as [3, heads, width of a head] in the source of Transformers 5.24."""

LAYOUTS: dict[str, Layout] = {
    **_shipped("apart", "qkv", *(f"{kind}.qkv" for kind in _VISION)),
    **_shipped(
        "apart",
        "qkv",
        "Attention.c_attn",  # GPT-1
        "Attention.qkv",  # timm, DINO
        "CausalSelfAttention.c_attn",  # nanoGPT
        "GPT2Attention.c_attn",
        "ImageGPTAttention.c_attn",
        "ModernBertAttention.Wqkv",
        "MptAttention.Wqkv",
        "Phi3Attention.qkv_proj",
        "Phi4MultimodalAttention.qkv_proj",
        "VisionAttention.qkv",  # Qwen2-VL
    ),
    **_shipped(
        "grouped",
        "qkv",
        "BloomAttention.query_key_value",
        "FalconAttention.query_key_value",
        "GPTBigCodeAttention.c_attn",
        "GPTNeoXAttention.query_key_value",
        "GPTNeoXJapaneseAttention.query_key_value",
        "PersimmonAttention.query_key_value",
    ),
    **_shipped(2, "experts", "Llama4TextExperts.gate_up_proj"),
}
"""By `Class.path`. The orders of language models are tested with values: without values nothing comes out."""


def register_layout(
    key: str, *, role: Role | None = None, blocks: Blocks | Order = None, transposed: bool | None = None
) -> None:
    """Say what the parameters of a class of modules are; it goes before what is measured.

    register_layout("MyAttention.in_proj", role="qkv", blocks=3)

    Args:
        key: `Class.path`, the name of a class and the path of a parameter or layer in its modules.
        role: of the parameter; as it is found otherwise, if not given.
        blocks: how its rows are divided into matrices, as the option `blocks` of a group; or `"apart"` or `"grouped"`
            for the queries, keys and values of a fused layer.
        transposed: whether it is stored as inputs x outputs.

    Raises:
        ValueError: a key without a class, an unknown role or bad blocks.
    """
    if not all(key.partition(".")):
        raise ValueError(f"a layout's key is Class.path, such as 'MyAttention.in_proj', got {key!r}")
    if role is not None and role not in get_args(Role):
        raise ValueError(f"{key}: unknown role {role!r}; one of {', '.join(get_args(Role))}")
    blocks = frozen(blocks)
    if blocks not in get_args(Order) and (isinstance(blocks, str) or not are_valid(blocks)):
        raise ValueError(f"{key}: blocks must be a number or several, 'apart' or 'grouped', got {blocks!r}")
    LAYOUTS[key] = Layout(role, blocks, transposed, by_user=True)


def layouts_of(model: nn.Module) -> Iterator[tuple[Tensor, nn.Module, str, Layout]]:
    """The parameters of a model that have a layout.

    Args:
        model: any module.

    Yields:
        (parameter, module of the class, path of the layer in it, layout).
    """
    paths: dict[str, list[str]] = {}
    for key in LAYOUTS:
        kind, _, path = key.partition(".")
        paths.setdefault(kind, []).append(path)
    for module in model.modules():
        for kind in (c.__name__ for c in type(module).__mro__):
            for path in paths.get(kind, ()):
                p = _parameter(module, path)
                if p is not None:
                    yield p, module, path, LAYOUTS[f"{kind}.{path}"]


def _parameter(module: nn.Module, path: str) -> Tensor | None:
    """The parameter at a path, or the weight of the layer there; adapters wrap a layer."""
    target: Any = module
    for name in path.split("."):
        target = getattr(target, name, None)
    target = getattr(target, "base_layer", target)
    if isinstance(target, nn.Module):
        target = getattr(target, "weight", None)
    return target if isinstance(target, nn.Parameter) and target.ndim > 1 else None


def apply_layout(trait: ParamRole, p: Tensor, module: nn.Module, path: str, layout: Layout) -> ParamRole:
    """What a parameter with a layout is.

    Args:
        trait: what it is otherwise.
        p: the parameter.
        module: of the layout's class.
        path: of the layer in it.
        layout: the layout.

    Returns:
        The trait, with what the layout says in its place.
    """
    is_transposed = trait.transposed if layout.transposed is None else layout.transposed
    role = layout.role or trait.role
    blocks, heads, heads_cut = layout.blocks, trait.heads, trait.by_head
    outputs, inputs = p.shape[-2:][::-1] if is_transposed else p.shape[-2:]
    inner = _width_of_queries(module, path, inputs, outputs)
    size = head_size(module, inner)
    if isinstance(blocks, str):
        blocks = order_of_rows(blocks, inner, (outputs - inner) // 2, size)
        if blocks is None:
            return trait
    if role == "qkv":
        heads, heads_cut = by_head(blocks, outputs, size)
    label = f"{path} of {type(module).__name__}, a registered layout"
    return ParamRole(role, label, is_transposed, blocks, heads, heads_cut, source="registry")


def _width_of_queries(module: nn.Module, path: str, inputs: int, outputs: int) -> int:
    """What the layer behind an attention takes, where it has one beside the fused one; else the width of its inputs."""
    layers = [m for k, m in module.named_children() if k != path and is_linear(m)]
    widths = {sides(m)[1] for m in layers} if len(layers) == 1 else set()
    width = widths.pop() if widths else inputs
    return width if width < outputs else inputs


def order_of_rows(order: str | Blocks, inner: int, keys: int, size: int | None) -> Blocks:
    """The rows of a fused attention layer as the option `blocks`.

    Args:
        order: `"apart"` or `"grouped"`.
        inner: rows of all queries.
        keys: rows of all keys, and of all values.
        size: rows of a head.

    Returns:
        None if these do not fit.
    """
    if keys <= 0 or inner % keys:
        return None
    if order == "apart":
        return 3 if keys == inner else (inner, keys, keys)
    return (inner // keys * size, size, size) if size else None
