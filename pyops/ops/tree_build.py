"""The page of tree_build: which nodes of a draft tree see which, from their parents."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_dtype, check_same_device, fail
from .._registry import Op
from ..reference import tree_build as reference

SCHEMA = "tree_build(Tensor parent, *, Tensor? q_lens=None) -> (Tensor tree_mask, Tensor depth)"


def _check(parent: Tensor, *, q_lens: Tensor | None = None) -> None:
    check_dtype("tree_build", "parent", parent, torch.int32)
    if parent.dim() != 2 or parent.shape[1] > reference.MAX_NODES:
        fail("tree_build", f"parent must be [B, T] with T at most {reference.MAX_NODES}, got {list(parent.shape)}")
    if q_lens is None:
        return
    check_same_device("tree_build", "q_lens", q_lens, "parent", parent)
    check_dtype("tree_build", "q_lens", q_lens, torch.int32)
    if q_lens.dim() != 1 or q_lens.shape[0] != parent.shape[0]:
        fail("tree_build", f"q_lens must be [B] = [{parent.shape[0]}], got {list(q_lens.shape)}")


def _check_values(parent: Tensor, *, q_lens: Tensor | None = None) -> None:
    rows = parent.shape[1]
    if q_lens is not None and q_lens.numel() and not 0 <= int(q_lens.min()) <= int(q_lens.max()) <= rows:
        wrong = int(q_lens.min()) if int(q_lens.min()) < 0 else int(q_lens.max())
        fail("tree_build", f"q_lens must be from 0 to T = {rows}, got {wrong}")
    row = torch.arange(rows, device=parent.device)
    there = row < (rows if q_lens is None else q_lens[:, None])
    wrong_nodes = (there & ((parent < -1) | (parent >= row))).nonzero()
    if wrong_nodes.numel():
        b, i = wrong_nodes[0].tolist()
        fail("tree_build", f"parent[{b}, {i}] must be from -1 to {i - 1}, got {int(parent[b, i])}")


def _fake(parent: Tensor, *, q_lens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return parent.new_empty(parent.shape, dtype=torch.int64), parent.new_empty(parent.shape)


OP = Op(
    SCHEMA,
    check=_check,
    check_values=_check_values,
    fake=_fake,
    reference=reference.tree_build,
    triton="tree_build",
)


def tree_build(parent: Tensor, *, q_lens: Tensor | None = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The mask and the depth of every node of a draft tree, from its parents.

    Args:
        parent: int32 [B, T], T at most 64: the parent of each node, which stands before it, or -1 for a root.
        q_lens: int32 [B], how many of the T nodes a sequence has; all when None. The others get 0.
        backend: None to choose, or "triton" | "reference".

    Returns:
        (tree_mask, depth): int64 [B, T], bit j of node i set where j is i or an ancestor of i (bit 63 is the sign bit),
        as decode_attn takes it; int32 [B, T], the number of a node's ancestors, which is its place after the prefix.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is; on the CPU (and under debug_checks) also for
        a parent that does not stand before its child. On a GPU such a node is a root.

    Source: arXiv:2305.09781, section 4. Cost: 16 bytes a node. Deterministic.
    """
    return OP(backend, parent, q_lens=q_lens)  # type: ignore[no-any-return]
