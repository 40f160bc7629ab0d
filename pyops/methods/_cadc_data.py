"""CADC's data: interactions in, checked; the leave-one-out split; the uniform sample."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 20  # pairs of a stream in memory at once; a multiple of mf_sgd's block
ROLES = {
    "user": ("user", "user_id", "userid", "uid"),
    "item": ("item", "item_id", "itemid", "movie_id", "movieid", "movie", "product_id", "product", "iid"),
    "rating": ("rating", "score", "stars"),
    "time": ("timestamp", "time", "date"),
}  # fmt: skip


def optional(name: str, what: str) -> ModuleType:
    """An optional dependency, or an error that says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{what} needs {error.name}: pip install {error.name}", name=error.name) from error


@dataclass(frozen=True)
class Interactions:
    """Who interacted with what: pairs int64 [n, 2] of ids counted from 0; `time` [n] orders a user's interactions.

    `user_ids` and `item_ids` are the names that the ids stand for, where they came from a table.
    """

    pairs: Tensor
    users: int
    items: int
    time: Tensor | None = None
    user_ids: list[Any] | None = None
    item_ids: list[Any] | None = None

    @property
    def n(self) -> int:
        """How many."""
        return self.pairs.shape[0]

    def take(self, index: Tensor) -> Interactions:
        """Some of them."""
        time = None if self.time is None else self.time[index]
        return Interactions(self.pairs[index], self.users, self.items, time, self.user_ids, self.item_ids)


@dataclass(frozen=True)
class Split:
    """`train` knows nothing of `test`, int64 [m, 2]."""

    train: Interactions
    test: Tensor


def chunks(pairs: Tensor, size: int = CHUNK) -> Iterator[tuple[int, Tensor]]:
    """(where it begins, a piece) of pairs that may lie in a file."""
    for start in range(0, pairs.shape[0], size):
        yield start, pairs[start : start + size]


def map_pairs(path: str | Path) -> Tensor:
    """int64 [n, 2] of a .npy file, not read but mapped: what is used is read when it is used."""
    numpy = optional("numpy", "mapping a .npy file")
    array = numpy.load(path, mmap_mode="c")  # copy on write: the file stays as it is
    if array.dtype != numpy.int64 or array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"map_pairs: {path} must hold int64 [n, 2], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array)


def check_pairs(pairs: Tensor, users: int, items: int, duplicates: bool = True) -> None:
    """Raise ValueError for what no recommender can be trained on.

    Of pairs larger than a chunk duplicates are not looked for, since that would sort all of them in memory.
    """
    if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be int64 [n, 2], got {pairs.dtype} {list(pairs.shape)}")
    if pairs.shape[0] == 0:
        raise ValueError("pairs must not be empty, got none")
    seen = torch.zeros(users, dtype=torch.bool)
    low_item, high_item = items, -1
    for _, piece in chunks(pairs):
        for column, (name, rows) in enumerate((("users", users), ("items", items))):
            low, high = (int(v) for v in piece[:, column].aminmax())
            if low < 0 or high >= rows:
                raise ValueError(f"{name} must be from 0 to {rows - 1}, got {low if low < 0 else high}")
            if column == 1:
                low_item, high_item = min(low_item, low), max(high_item, high)
        seen[piece[:, 0]] = True
    empty = (~seen).nonzero().flatten()
    if len(empty):
        raise ValueError(
            f"every user must have an interaction, got {len(empty)} without, the first is {int(empty[0])}; "
            "number the users again, or leave them out"
        )
    if low_item == high_item:
        raise ValueError(f"interactions must be with at least two items, got only item {low_item}")
    if duplicates and pairs.shape[0] <= CHUNK * 16:
        keys = pairs[:, 0] * items + pairs[:, 1]
        distinct = keys.unique().numel()
        if distinct < keys.numel():
            raise ValueError(
                f"pairs must be distinct, got {keys.numel() - distinct} duplicates; "
                "drop them, or load with duplicates='drop'"
            )


def _column(frame: Any, role: str, given: str | None, needed: bool) -> str | None:
    """The column of a role: the one named, or one with a usual name."""
    if given is not None:
        if given not in frame.columns:
            raise ValueError(f"{role} must be a column, one of {', '.join(map(str, frame.columns))}, got {given!r}")
        return given
    found = [c for c in frame.columns if str(c).lower() in ROLES[role]]
    if not found and needed:
        raise ValueError(f"no column of {role}s among {', '.join(map(str, frame.columns))}: name it with {role}=...")
    return found[0] if found else None


def _read(source: Any) -> Any:
    """A DataFrame of a .csv, .tsv or .parquet file, or the one given."""
    pandas = optional("pandas", "reading interactions")
    if isinstance(source, pandas.DataFrame):
        return source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no interactions in {path}: no such file")
    if ".parquet" in path.suffixes:
        optional("pyarrow", "reading parquet")
        return pandas.read_parquet(path)
    if path.suffix in (".csv", ".tsv", ".txt"):
        return pandas.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
    raise ValueError(f"interactions must be a .csv, .tsv or .parquet file, got {path.name}")


def load_interactions(
    source: Any,
    *,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    rating: str | None = None,
    min_rating: float | None = None,
    duplicates: str = "error",
) -> Interactions:
    """Interactions of a pandas DataFrame, or of a CSV, TSV or parquet file.

    Args:
        source: the frame, or the file's path.
        user, item, time, rating: the columns' names; usual names are found by themselves. The last two may be absent.
        min_rating: count as an interaction only what is rated at least this; everything when None.
        duplicates: what to do with a pair that comes more than once: "error", or "drop" all but the last.

    Returns:
        Ids counted from 0 in the order of the sorted names, which are kept.

    Raises:
        ValueError: a missing column, a missing value, no interaction left, one item only, or a duplicate.
        ModuleNotFoundError: pandas (or pyarrow, for parquet) is not installed.
    """
    if duplicates not in ("error", "drop"):
        raise ValueError(f"duplicates must be 'error' or 'drop', got {duplicates!r}")
    frame = _read(source)
    columns = {role: _column(frame, role, given, role in ("user", "item")) for role, given in (
        ("user", user), ("item", item), ("time", time), ("rating", rating))}  # fmt: skip
    if min_rating is not None and columns["rating"] is None:
        raise ValueError("min_rating needs a column of ratings: name it with rating=...")
    for role, name in columns.items():
        missing = 0 if name is None else int(frame[name].isna().sum())
        if missing:
            raise ValueError(f"column {name!r} ({role}) must have no missing value, got {missing} (NaN or empty)")
    if min_rating is not None:
        frame = frame[frame[columns["rating"]] >= min_rating]
    if columns["time"] is not None:
        frame = frame.sort_values(columns["time"], kind="stable")
    if duplicates == "drop":
        frame = frame.drop_duplicates([columns["user"], columns["item"]], keep="last")
    if len(frame) == 0:
        raise ValueError("pairs must not be empty, got none")
    pandas = optional("pandas", "reading interactions")
    coded = [pandas.factorize(frame[columns[role]], sort=True) for role in ("user", "item")]
    pairs = torch.stack([torch.from_numpy(codes.astype("int64")) for codes, _ in coded], dim=1)
    times = None if columns["time"] is None else torch.arange(len(pairs))
    names = [list(ids) for _, ids in coded]
    found = Interactions(pairs, len(names[0]), len(names[1]), times, names[0], names[1])
    check_pairs(found.pairs, found.users, found.items)
    return found


def load_content(source: Any, ids: list[Any], *, key: str | None = None, bins: int = 8, most: int = 64) -> Tensor:
    """What is known of users or items, as fp32 [len(ids), features].

    Columns of two numbers stay as they are, other numbers become `bins` quantiles, words one feature each; a column
    of more than `most` words (names, addresses) says nothing of others and is left out, as is one with missing values.

    Args:
        source: a pandas DataFrame, or a CSV, TSV or parquet file.
        ids: the rows wanted, as in Interactions.user_ids or item_ids.
        key: the column of ids; the first column when None.
        bins: quantiles a number is told apart by.
        most: words a column may have.
    """
    frame = _read(source)
    key = str(frame.columns[0]) if key is None else _column(frame, "user", key, True)
    frame = frame.set_index(key)
    absent = [i for i in ids if i not in frame.index]
    if absent:
        raise ValueError(f"every id must have a row of content, got none for {len(absent)}, the first is {absent[0]!r}")
    pandas = optional("pandas", "reading content")
    frame, features = frame.loc[ids], []
    for name in frame.columns:
        column = frame[name]
        if column.isna().any():
            continue
        if pandas.api.types.is_numeric_dtype(column):
            if column.nunique() > 2:
                column = pandas.qcut(column, bins, labels=False, duplicates="drop")
            else:
                features.append(torch.tensor(column.to_numpy().astype("float32"))[:, None])
                continue
        codes, words = pandas.factorize(column, sort=True)
        if 1 < len(words) <= most:
            features.append(torch.nn.functional.one_hot(torch.from_numpy(codes.astype("int64"))).float())
    if not features:
        raise ValueError("content must have a usable column, got none")
    return torch.cat(features, dim=1)


def leave_one_out(interactions: Interactions) -> Split:
    """Each user's last interaction is for the test, by `time`, or by order where there is none.

    Users with a single interaction stay in training whole. Items that only the test has are left out of it: no model
    can have seen them.
    """
    pairs = interactions.pairs
    order = torch.arange(len(pairs)) if interactions.time is None else torch.argsort(interactions.time, stable=True)
    order = order[torch.argsort(pairs[order, 0], stable=True)]
    users = pairs[order, 0]
    last = torch.ones(len(users), dtype=torch.bool)
    last[:-1] = users[1:] != users[:-1]
    last[0] = False  # alone, or not the last
    last[1:] &= users[1:] == users[:-1]
    test = order[last]
    keep = torch.ones(len(pairs), dtype=torch.bool)
    keep[test] = False
    train = interactions.take(keep.nonzero().flatten())
    known = torch.zeros(interactions.items, dtype=torch.bool)
    known[train.pairs[:, 1]] = True
    wanted = pairs[test]
    return Split(train, wanted[known[wanted[:, 1]]])


def check_rate(rate: float) -> None:
    """A share of the interactions."""
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be above 0 and at most 1, got {rate:g}")


def sample_rows(n: int, rate: float, seed: int) -> Tensor:
    """round(rate n) distinct places of n, at least one, ascending, uniform; memory goes with the sample, not with n."""
    check_rate(rate)
    wanted, generator = max(1, round(rate * n)), torch.Generator().manual_seed(seed)
    if n <= CHUNK:
        return torch.randperm(n, generator=generator)[:wanted].sort().values
    # How many of each chunk: what a uniform sample of the whole would have there.
    random = optional("numpy", "sampling a stream").random.default_rng(seed)
    sizes = [min(CHUNK, n - start) for start in range(0, n, CHUNK)]
    taken = random.multivariate_hypergeometric(sizes, wanted, method="marginals")
    parts = [
        torch.randperm(size, generator=generator)[: int(count)].sort().values + i * CHUNK
        for i, (size, count) in enumerate(zip(sizes, taken, strict=True))
    ]
    return torch.cat(parts)
