"""What the mappings share: types, and how the references' scripts split parameters."""

from __future__ import annotations

from typing import Any

from torch.nn import Parameter

Params = dict[str, Parameter]
Case = dict[str, Any]


def split(params: Params) -> tuple[list[tuple[str, Parameter]], list[tuple[str, Parameter]]]:
    """Hidden matrices and the rest, as the references' scripts split them: by dimensions, embedding and head apart."""
    edge = ("embed", "lm_head")
    hidden = [(n, p) for n, p in params.items() if p.ndim >= 2 and not any(e in n for e in edge)]
    taken = {n for n, _ in hidden}
    return hidden, [(n, p) for n, p in params.items() if n not in taken]
