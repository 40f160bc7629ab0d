"""CADC's network: a tower for users and one for items, whose outputs are multiplied.

Source: CADC, arXiv:2407.08108, names the inputs: a (frozen) embedding and content features. What a tower does with them
is ours: out = e + MLP([e, content features projected]), with the MLP's last layer zero at the start. So a network on
embeddings of a matrix factorisation begins as that factorisation, and training can only refine it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HIDDEN = 64
INIT = 0.1  # standard deviation of random embeddings


class Tower(nn.Module):
    """[n] ids -> ([n, factors], [n] bias).

    Args:
        rows: users or items.
        factors: width of embeddings and outputs.
        content: fp32 [rows, features] of what is known of each row (one-hot, multi-hot or numbers), or None.
        hidden: width of the MLP.
    """

    content: Tensor | None

    def __init__(self, rows: int, factors: int, content: Tensor | None = None, hidden: int = HIDDEN) -> None:
        super().__init__()
        if content is not None and (content.dim() != 2 or content.shape[0] != rows):
            raise ValueError(f"Tower: content must have shape [{rows}, features], got {list(content.shape)}")
        if content is not None and not content.isfinite().all():
            raise ValueError("Tower: content must be finite, got NaN or infinity")
        self.embedding = nn.Embedding(rows, factors)
        self.bias = nn.Embedding(rows, 1)
        nn.init.normal_(self.embedding.weight, std=INIT)
        nn.init.zeros_(self.bias.weight)
        self.register_buffer("content", None if content is None else content.float())
        self.project = None if content is None else nn.Linear(content.shape[1], factors)
        self.mlp = nn.Sequential(
            nn.Linear(factors * (1 if content is None else 2), hidden), nn.ReLU(), nn.Linear(hidden, factors + 1)
        )
        last = self.mlp[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Of ids of any shape [...]: ([..., factors], [...])."""
        e = self.embedding(ids)
        given = e
        if self.content is not None and self.project is not None:
            given = torch.cat([e, self.project(self.content[ids])], dim=-1)
        out = self.mlp(given)
        return e + out[..., :-1], self.bias(ids).squeeze(-1) + out[..., -1]


class TwoTower(nn.Module):
    """Logits of users and items that belong together.

    Args:
        users, items: how many there are.
        factors: width of embeddings and outputs.
        user_content, item_content: as Tower's.
        hidden: width of the MLPs.
    """

    def __init__(
        self,
        users: int,
        items: int,
        factors: int,
        user_content: Tensor | None = None,
        item_content: Tensor | None = None,
        hidden: int = HIDDEN,
    ) -> None:
        super().__init__()
        self.user = Tower(users, factors, user_content, hidden)
        self.item = Tower(items, factors, item_content, hidden)
        self.global_bias = nn.Parameter(torch.zeros(()))

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Logits [n] of pairs, or [n, m] of users [n] with m items each, items [n, m]."""
        u, user_bias = self.user(users)
        v, item_bias = self.item(items)
        if items.dim() > users.dim():
            u, user_bias = u.unsqueeze(-2), user_bias.unsqueeze(-1)
        logits: Tensor = (u * v).sum(-1) + user_bias + item_bias + self.global_bias
        return logits

    @torch.no_grad()
    def scores(self, users: Tensor) -> Tensor:
        """Logits [n, items] of users with every item."""
        u, user_bias = self.user(users)
        v, item_bias = self.item(torch.arange(self.item.embedding.num_embeddings, device=users.device))
        logits: Tensor = u @ v.T + user_bias[:, None] + item_bias + self.global_bias
        return logits

    def load_factors(
        self,
        user: Tensor,
        item: Tensor,
        user_bias: Tensor,
        item_bias: Tensor,
        global_bias: Tensor,
        *,
        freeze: bool,
    ) -> None:
        """Start from a matrix factorisation's tables; with `freeze` they take no gradient."""
        with torch.no_grad():
            for tower, table, bias in ((self.user, user, user_bias), (self.item, item, item_bias)):
                if table.shape != tower.embedding.weight.shape:
                    wanted, got = list(tower.embedding.weight.shape), list(table.shape)
                    raise ValueError(f"load_factors: a table must have shape {wanted}, got {got}")
                tower.embedding.weight.copy_(table)
                tower.bias.weight.copy_(bias[:, None])
            self.global_bias.copy_(global_bias.reshape(()))
        for tower in (self.user, self.item):
            tower.embedding.weight.requires_grad_(not freeze)
            tower.bias.weight.requires_grad_(not freeze)
