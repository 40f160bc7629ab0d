import dataclasses
import math
import sys

import pytest
import torch

from fastops.methods import cadc
from fastops.methods._cadc_data import CHUNK, check_pairs, sample_rows
from fastops.methods.cadc import Cadc, Compressed, Factors, Interactions, MfSettings, TowerSettings
from fastops.reference.mf_sgd import BLOCK

USERS, ITEMS = 60, 80


def planted(users=USERS, items=ITEMS, each=12, seed=0):
    """Two groups of users, each with items of its own half: `each` distinct ones a user, in the order of time."""
    generator = torch.Generator().manual_seed(seed)
    half, rows = items // 2, []
    for user in range(users):
        mine = torch.randperm(half, generator=generator)[:each] + half * (user % 2)
        rows.append(torch.stack([torch.full((each,), user), mine], 1))
    pairs = torch.cat(rows)
    time = torch.randperm(len(pairs), generator=generator)
    return Interactions(pairs, users, items, time)


SETTINGS = MfSettings(factors=8, epochs=60, lr=0.2, reg=0.001)
FAST = {"factors": 8, "epochs": 60, "lr": 0.2, "reg": 0.001}


class Oracle:
    """Scores as given."""

    def __init__(self, table):
        self.table = table

    def scores(self, users):
        return self.table[users]


def test_the_split_holds_out_each_user_s_last():
    data = planted()
    split = cadc.leave_one_out(data)
    assert len(split.test) == USERS
    assert split.train.n == data.n - USERS
    for user, item in split.test.tolist():
        mine = data.pairs[:, 0] == user
        assert data.pairs[mine][data.time[mine].argmax(), 1] == item
        assert not ((split.train.pairs == torch.tensor([user, item])).all(dim=1)).any()


def test_users_of_one_interaction_and_items_of_the_test_alone_are_not_tested():
    pairs = torch.tensor([[0, 0], [0, 1], [1, 1], [2, 0], [2, 2]])
    split = cadc.leave_one_out(Interactions(pairs, 3, 3))
    assert split.train.pairs.tolist() == [[0, 0], [1, 1], [2, 0]]
    assert split.test.tolist() == [[0, 1]]


def test_nothing_of_the_test_reaches_the_factorisation():
    """Two sets that differ in every held-out item give the same training part, the same bits, the same artefact."""
    data = planted()
    split = cadc.leave_one_out(data)
    other = data.pairs.clone()
    order = torch.argsort(data.time)
    last = {int(data.pairs[i, 0]): int(i) for i in order}
    for user, i in last.items():
        taken = set(data.pairs[data.pairs[:, 0] == user, 1].tolist())
        other[i, 1] = next(item for item in range(ITEMS) if item not in taken)
    changed = cadc.leave_one_out(dataclasses.replace(data, pairs=other))
    assert not torch.equal(split.test, changed.test)
    first, second = (Cadc(**FAST).fit_transform(s.train) for s in (split, changed))
    assert torch.equal(first.pairs, second.pairs)
    for a, b in zip(first.factors.tables, second.factors.tables, strict=True):
        assert torch.equal(a, b)
    models = [c.train(TowerSettings(epochs=2)) for c in (first, second)]
    assert torch.equal(models[0].scores(torch.arange(USERS)), models[1].scores(torch.arange(USERS)))


def test_evaluation_refuses_a_leak():
    data = planted()
    split = cadc.leave_one_out(data)
    with pytest.raises(ValueError, match=f"test must share no pair with training, got {USERS} that are in both"):
        cadc.evaluate(Oracle(torch.zeros(USERS, ITEMS)), split.test, data)


def test_metrics_of_known_rankings():
    split = cadc.leave_one_out(planted())
    users, wanted = split.test.T
    perfect = torch.zeros(USERS, ITEMS)
    perfect[users, wanted] = 1
    assert cadc.evaluate(Oracle(perfect), split.test, split.train, candidates=20) == {"hr10": 1, "ndcg10": 1, "auc": 1}
    assert cadc.evaluate(Oracle(perfect), split.test, split.train, candidates=None)["ndcg10"] == 1
    nothing = cadc.evaluate(Oracle(torch.zeros(USERS, ITEMS)), split.test, split.train, candidates=None)
    assert nothing == {"hr10": 0, "ndcg10": 0, "auc": 0}, "who says nothing gets nothing"
    third = perfect.clone()
    for row, user in enumerate(users.tolist()):
        mine = set(split.train.pairs[split.train.pairs[:, 0] == user, 1].tolist()) | {int(wanted[row])}
        better = [i for i in range(ITEMS) if i not in mine][:2]
        third[user, better] = 2
        third[user, list(mine - {int(wanted[row])})] = 9  # what he has already does not count
    found = cadc.evaluate(Oracle(third), split.test, split.train, candidates=None)
    assert found["hr10"] == 1
    assert found["ndcg10"] == pytest.approx(1 / math.log2(4))
    assert cadc.evaluate(Oracle(third), split.test, split.train, candidates=None, k=2)["hr2"] == 0
    noise = torch.rand(USERS, ITEMS, generator=torch.Generator().manual_seed(0))
    assert cadc.evaluate(Oracle(noise), split.test, split.train, candidates=39)["hr10"] == pytest.approx(0.25, abs=0.2)


def test_candidates_are_never_the_user_s_own():
    split = cadc.leave_one_out(planted())
    own = torch.full((USERS, ITEMS), -1.0)
    own[split.train.pairs[:, 0], split.train.pairs[:, 1]] = 1  # all that he has ranks above the wanted one
    own[split.test[:, 0], split.test[:, 1]] = 0
    assert cadc.evaluate(Oracle(own), split.test, split.train, candidates=60)["hr10"] == 1
    with pytest.raises(ValueError, match="candidates must be at most 68 here, got 69"):
        cadc.evaluate(Oracle(own), split.test, split.train, candidates=69)


def test_the_factorisation_finds_the_groups_and_the_sample_alone_does_not():
    split = cadc.leave_one_out(planted(each=16))
    small = Cadc(0.1, **FAST).fit_transform(split.train)
    towers = TowerSettings(epochs=30)
    with_cadc = cadc.evaluate(small.train(towers), split.test, split.train, candidates=60)
    plain = cadc.evaluate(small.train(towers, strategy="random"), split.test, split.train, candidates=60)
    alone = cadc.evaluate(small.factors, split.test, split.train, candidates=60)
    assert alone["auc"] > 0.6
    assert with_cadc["auc"] > alone["auc"] - 0.05
    assert with_cadc["auc"] > plain["auc"] + 0.1


@pytest.mark.parametrize("strategy", cadc.STRATEGIES)
def test_strategies(strategy):
    data = planted()
    small = Cadc(0.5, **{**FAST, "epochs": 3}).fit_transform(data)
    model = small.train(TowerSettings(epochs=2), strategy=strategy)
    same = torch.equal(model.user.embedding.weight, small.factors.user)
    assert same == (strategy == "init-freeze")
    assert model.user.embedding.weight.requires_grad == (strategy != "init-freeze")
    near = (model.user.embedding.weight - small.factors.user).abs().max() < 0.2
    assert near == (strategy != "random")
    again = small.train(TowerSettings(epochs=2), strategy=strategy)
    assert torch.equal(model.scores(torch.arange(USERS)), again.scores(torch.arange(USERS)))


def test_content_reaches_the_towers():
    data = planted()
    small = Cadc(0.5, **{**FAST, "epochs": 3}).fit_transform(data)
    known = torch.nn.functional.one_hot(torch.arange(USERS) % 2).float()
    model = small.train(TowerSettings(epochs=3), user_content=known)
    assert model.user.project.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match=r"content must have shape \[60, features\]"):
        small.train(user_content=known[1:])


def test_sampling_is_uniform_and_without_replacement():
    hits = torch.zeros(200)
    for seed in range(400):
        rows = sample_rows(200, 0.1, seed)
        assert len(rows.unique()) == len(rows) == 20
        hits[rows] += 1
    assert ((hits - 40).abs() < 5 * math.sqrt(40 * 0.9)).all()
    assert torch.equal(sample_rows(500, 0.3, 7), sample_rows(500, 0.3, 7))
    assert torch.equal(sample_rows(10, 1, 0), torch.arange(10))
    assert len(sample_rows(3, 0.01, 0)) == 1


def test_sampling_a_stream():
    pytest.importorskip("numpy")
    n = 3 * CHUNK + 17
    rows = sample_rows(n, 0.01, 1)
    assert len(rows) == round(0.01 * n)
    assert (rows[1:] > rows[:-1]).all()
    assert int(rows[-1]) < n
    per_chunk = torch.bincount(rows // CHUNK, minlength=4)
    assert ((per_chunk[:3] - 0.01 * CHUNK).abs() < 6 * math.sqrt(0.01 * CHUNK)).all()


def test_a_mapped_file_trains_as_the_tensor_does(tmp_path):
    numpy = pytest.importorskip("numpy")
    data = planted()
    path = tmp_path / "pairs.npy"
    numpy.save(path, data.pairs.numpy())
    mapped = cadc.map_pairs(path)
    settings = dataclasses.replace(SETTINGS, epochs=2, chunk=BLOCK // 8)
    seen = []
    first = cadc.factorize(mapped, USERS, ITEMS, settings, progress=lambda done, total: seen.append((done, total)))
    second = cadc.factorize(data.pairs, USERS, ITEMS, settings)
    assert all(torch.equal(a, b) for a, b in zip(first.tables, second.tables, strict=True))
    assert seen[-1] == (2 * data.n, 2 * data.n)
    assert len(seen) == 2 * -(-data.n // settings.chunk)
    assert torch.equal(cadc.map_pairs(path), data.pairs), "the file is as it was"
    numpy.save(path, data.pairs.numpy().astype("int32"))
    with pytest.raises(ValueError, match=r"must hold int64 \[n, 2\], got int32"):
        cadc.map_pairs(path)


def test_the_artefact_survives_the_disk(tmp_path):
    pytest.importorskip("safetensors")
    data = dataclasses.replace(planted(), user_ids=[f"u{i}" for i in range(USERS)])
    small = cadc.compress(data, 0.1, seed=3, **{**FAST, "epochs": 2})
    assert len(small.pairs) == round(0.1 * data.n)
    again = Compressed.load(small.save(tmp_path / "a.safetensors"))
    assert torch.equal(again.pairs, small.pairs)
    assert all(torch.equal(a, b) for a, b in zip(again.factors.tables, small.factors.tables, strict=True))
    assert (again.rate, again.seed, again.total, again.settings) == (0.1, 3, data.n, small.settings)
    assert again.user_ids == data.user_ids
    assert again.item_ids is None
    import safetensors.torch

    plain = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert {n: tuple(t.shape) for n, t in plain.items()} == {
        "pairs": (72, 2), "user": (USERS, 8), "item": (ITEMS, 8), "user_bias": (USERS,), "item_bias": (ITEMS,),
        "global_bias": (1,),
    }  # fmt: skip
    safetensors.torch.save_file({"pairs": small.pairs}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"must be written by Compressed\.save"):
        Compressed.load(tmp_path / "b.safetensors")


def put(pairs, place, value):
    pairs[place] = value
    return pairs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: put(p, (3, 0), USERS), "users must be from 0 to 59, got 60"),
        (lambda p: put(p, (3, 1), -1), "items must be from 0 to 79, got -1"),
        (lambda p: p[p[:, 0] != 5], "every user must have an interaction, got 1 without, the first is 5"),
        (lambda p: torch.tensor([[u, 7] for u in range(USERS)]), "at least two items, got only item 7"),
        (lambda p: torch.cat([p, p[:3]]), "pairs must be distinct, got 3 duplicates"),
        (lambda p: p[:0], "pairs must not be empty"),
        (lambda p: p.int(), r"pairs must be int64 \[n, 2\]"),
    ],
    ids=["user", "item", "empty user", "constant item", "duplicates", "nothing", "dtype"],
)  # fmt: skip
def test_bad_interactions(change, message):
    data = planted()
    pairs = change(data.pairs.clone())
    with pytest.raises(ValueError, match=message):
        check_pairs(pairs, USERS, ITEMS)
    with pytest.raises(ValueError, match=message):
        Cadc(**FAST).fit(dataclasses.replace(data, pairs=pairs, time=None))


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, float("nan")])
def test_bad_rates(rate):
    for call in (lambda: Cadc(rate), lambda: cadc.compress(planted(), rate), lambda: sample_rows(10, rate, 0)):
        with pytest.raises(ValueError, match="rate must be above 0 and at most 1, got"):
            call()


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="factors must be at least 1, got 0"):
        Cadc(factors=0)
    with pytest.raises(ValueError, match=r"needs the factors of fit\(\), which was not called"):
        Cadc().transform(planted())
    fitted = Cadc(**{**FAST, "epochs": 1}).fit(planted())
    with pytest.raises(ValueError, match=r"must be of the \(60, 80\) users and items"):
        fitted.transform(planted(users=50))
    pairs = planted().pairs
    with pytest.raises(ValueError, match="strategy must be one of init-freeze"):
        cadc.train_two_tower(pairs, USERS, ITEMS, strategy="warm")
    with pytest.raises(ValueError, match="'init-freeze' needs the factors"):
        cadc.train_two_tower(pairs, USERS, ITEMS)
    model = Oracle(torch.zeros(USERS, ITEMS))
    with pytest.raises(ValueError, match="one pair a user"):
        cadc.evaluate(model, torch.tensor([[0, 1], [0, 2]]), planted())
    with pytest.raises(ValueError, match="k must be at least 1"):
        cadc.evaluate(model, torch.tensor([[0, 1]]), planted(), k=0)
    with pytest.raises(ValueError, match=r"test must be int64 \[m, 2\]"):
        cadc.evaluate(model, torch.zeros(0, 2, dtype=torch.int64), planted())


@pytest.fixture
def frame():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(
        {
            "userId": ["b", "a", "b", "c", "a"],
            "movieId": [30, 10, 10, 20, 30],
            "rating": [5, 3, 4, 1, 2],
            "timestamp": [9, 5, 2, 7, 1],
        }
    )


def test_tables_become_interactions(frame, tmp_path):
    found = cadc.load_interactions(frame)
    assert (found.users, found.items, found.user_ids, found.item_ids) == (3, 3, ["a", "b", "c"], [10, 20, 30])
    assert found.pairs.tolist() == [[0, 2], [1, 0], [0, 0], [2, 1], [1, 2]], "in the order of time"
    frame.to_csv(tmp_path / "r.csv", index=False)
    assert torch.equal(cadc.load_interactions(tmp_path / "r.csv").pairs, found.pairs)
    assert cadc.load_interactions(frame, min_rating=3).pairs.tolist() == [[1, 0], [0, 0], [1, 1]]
    assert cadc.load_interactions(frame, user="movieId", item="userId").users == 3


def test_parquet(frame, tmp_path):
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "r.parquet")
    assert torch.equal(cadc.load_interactions(tmp_path / "r.parquet").pairs, cadc.load_interactions(frame).pairs)


def test_bad_tables(frame, tmp_path):
    def check(message, error=ValueError, source=frame, **more):
        with pytest.raises(error, match=message):
            cadc.load_interactions(source, **more)

    nan = frame.astype({"rating": float})
    nan.loc[2, "rating"] = float("nan")
    check(r"column 'rating' \(rating\) must have no missing value, got 1", source=nan)
    nobody = frame.copy()
    nobody.loc[1, "userId"] = None
    check(r"column 'userId' \(user\) must have no missing value, got 1", source=nobody)
    twice = frame.copy()
    twice.loc[0] = twice.loc[1]
    check("pairs must be distinct, got 1 duplicates", source=twice)
    assert cadc.load_interactions(twice, duplicates="drop").n == 4
    check("duplicates must be 'error' or 'drop'", duplicates="keep")
    check("user must be a column, one of userId", user="person")
    check("no column of items among userId, rating, timestamp", source=frame.drop(columns="movieId"))
    check("pairs must not be empty", min_rating=6)
    check("min_rating needs a column of ratings", source=frame.drop(columns="rating"), min_rating=1)
    check("at least two items, got only item 0", source=frame[frame.movieId == 10])
    check("no such file", FileNotFoundError, tmp_path / "none.csv")
    (tmp_path / "r.xlsx").touch()
    check("must be a .csv, .tsv or .parquet file, got r.xlsx", source=tmp_path / "r.xlsx")


def test_content_tables():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(
        {
            "id": [7, 8, 9, 6],
            "age": [20, 30, 40, 50],
            "sex": ["f", "m", "f", "m"],
            "drama": [1, 0, 1, 0],
            "name": ["p", "q", "r", "s"],
            "gone": [1.0, None, 2.0, 3.0],
        }
    )
    found = cadc.load_content(table, [9, 7, 8], bins=2, most=3)
    # age in two halves (one-hot), sex (one-hot), drama; three names are a feature each, the missing column is left out
    assert found.shape == (3, 2 + 2 + 1 + 3)
    assert found[:, 4].tolist() == [1, 1, 0]
    assert cadc.load_content(table, [9, 7, 8], bins=2, most=2).shape == (3, 5)
    with pytest.raises(ValueError, match="none for 1, the first is 5"):
        cadc.load_content(table, [7, 5])


def test_without_pandas_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="reading interactions needs pandas: pip install pandas"):
        cadc.load_interactions("ratings.csv")


@pytest.fixture
def command():
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from fastops.cli.app import app

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, ["cadc", "fit", *map(str, arguments)])
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    return run


def test_the_command(command, tmp_path):
    pandas = pytest.importorskip("pandas")
    data = planted()
    path = tmp_path / "ratings.csv"
    pandas.DataFrame({"user": data.pairs[:, 0], "item": data.pairs[:, 1], "time": data.time}).to_csv(path, index=False)
    users = tmp_path / "users.csv"
    pandas.DataFrame({"user": range(USERS), "group": [i % 2 for i in range(USERS)]}).to_csv(users, index=False)
    text = command(path, "--rate", 0.2, "--epochs", 3, "--tower-epochs", 2, "--factors", 8, "--compare",
                   "--user-content", users)  # fmt: skip
    assert "720 interactions of 60 users with 80 items" in text
    assert all(name in text for name in ("factorisation alone", "CADC 20 %, init-freeze", "plain 20 %", "HR@10 of all"))
    small = Compressed.load(tmp_path / "ratings.cadc.safetensors")
    assert (len(small.pairs), small.total, small.rate) == (132, 660, 0.2)
    assert "rate must be above 0 and at most 1, got 0" in command(path, "--rate", 0, code=2)
    assert "no such file" in command(tmp_path / "none.csv", code=2)
    assert "strategy must be one of" in command(path, "--strategy", "warm", code=2)


def test_the_command_draws(command, tmp_path):
    pytest.importorskip("matplotlib")
    pandas = pytest.importorskip("pandas")
    data = planted()
    path = tmp_path / "ratings.csv"
    pandas.DataFrame({"user": data.pairs[:, 0], "item": data.pairs[:, 1]}).to_csv(path, index=False)
    command(path, "--epochs", 1, "--tower-epochs", 1, "--factors", 4, "--plot", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_movielens():
    """Real interactions: the factorisation ranks held-out films well, and the towers on a tenth keep that."""
    pytest.importorskip("typer")
    from fastops.cli import movielens

    try:
        data, users, items = movielens.load()
    except movielens.Missing as missing:
        pytest.skip(str(missing))
    assert (data.n, data.users, data.items, len(users), len(items)) == (100_000, 943, 1682, 943, 1682)
    split = cadc.leave_one_out(data)
    small = Cadc(0.1, epochs=10).fit_transform(split.train)
    found = cadc.evaluate(small.factors, split.test, split.train)
    assert found["auc"] > 0.88
    assert found["hr10"] > 0.6
    model = small.train(TowerSettings(epochs=2), user_content=users, item_content=items)
    assert cadc.evaluate(model, split.test, split.train)["hr10"] > found["hr10"] - 0.03


def test_factors_score_as_the_model_says():
    f = Factors(*(torch.randn(s) for s in ((3, 2), (4, 2), (3,), (4,), (1,))))
    want = f.user[1] @ f.item[2] + f.user_bias[1] + f.item_bias[2] + f.global_bias[0]
    torch.testing.assert_close(f.scores(torch.tensor([0, 1]))[1, 2], want)
