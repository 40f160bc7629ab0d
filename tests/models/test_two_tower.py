import pytest
import torch

from fastops.methods.cadc import Factors
from fastops.models import Tower, TwoTower


def factors(users=6, items=9, width=4, seed=0):
    torch.manual_seed(seed)
    shapes = ((users, width), (items, width), (users,), (items,), (1,))
    return Factors(*(torch.randn(shape) for shape in shapes))


def content(rows, features, seed=1):
    return torch.rand(rows, features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("with_content", [False, True])
def test_it_begins_as_the_factorisation(with_content):
    f = factors()
    known = (content(6, 3), content(9, 5)) if with_content else (None, None)
    model = TwoTower(6, 9, 4, *known)
    model.load_factors(*f.tables, freeze=True)
    users = torch.tensor([5, 0, 5])
    torch.testing.assert_close(model.scores(users), f.scores(users))
    items = torch.tensor([[1, 2], [3, 8], [0, 0]])
    torch.testing.assert_close(model(users, items), f.scores(users).gather(1, items))
    torch.testing.assert_close(model(users, items[:, 0]), f.scores(users).gather(1, items)[:, 0])


def test_freezing_leaves_the_towers_to_train():
    model = TwoTower(6, 9, 4)
    model.load_factors(*factors().tables, freeze=True)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"{side}.{part}.weight" for side in ("user", "item") for part in ("embedding", "bias")}
    model(torch.tensor([1]), torch.tensor([[2, 3]])).sum().backward()
    assert model.user.embedding.weight.grad is None
    assert model.user.mlp[2].weight.grad.abs().sum() > 0
    model.load_factors(*factors().tables, freeze=False)
    assert all(p.requires_grad for p in model.parameters())


def test_content_matters_once_the_last_layer_is_not_zero():
    torch.manual_seed(0)
    tower = Tower(4, 8, content(4, 3))
    same = Tower(4, 8, content(4, 3, seed=2))
    same.load_state_dict({n: v for n, v in tower.state_dict().items() if n != "content"}, strict=False)
    for each in (tower, same):
        torch.nn.init.ones_(each.mlp[2].weight)
    ids = torch.arange(4)
    assert not torch.allclose(tower(ids)[0], same(ids)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tower(4, 8, torch.zeros(5, 2)), r"content must have shape \[4, features\], got \[5, 2\]"),
        (lambda: Tower(4, 8, torch.full((4, 2), float("nan"))), "content must be finite"),
        (
            lambda: TwoTower(5, 9, 4).load_factors(*factors().tables, freeze=True),
            r"a table must have shape \[5, 4\], got \[6, 4\]",
        ),
    ],
)
def test_rejects(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_state_dict_keeps_everything():
    model, again = (TwoTower(6, 9, 4, content(6, 3), content(9, 5)) for _ in range(2))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.scores(torch.arange(6)), again.scores(torch.arange(6)))
