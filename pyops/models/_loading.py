"""A decoder's parts from Hugging Face models and files."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._architecture import WHO, Architecture
from ._linear import KINDS, Dense, stack

# (attention output, first norm, second norm) by kind of family; the rest is the same in all that are gated.
GATED = ("self_attn.o_proj", "input_layernorm", "post_attention_layernorm")
OPT = ("self_attn.out_proj", "self_attn_layer_norm", "final_layer_norm")


def take(
    model: Any,
    weights: str,
    blocksize: int,
    nf4_head: bool,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    progress: bool,
) -> dict[str, Any]:
    """The arguments of Decoder, from a Hugging Face model."""
    from .decoder import Block

    if weights not in KINDS:
        raise ValueError(f"{WHO}: weights must be one of {', '.join(KINDS)}, got {weights!r}")
    a = Architecture.of(model.config)
    base = model.model.decoder if a.family == "opt" else model.model
    dtype = dtype or base.embed_tokens.weight.dtype
    device = torch.device(device) if device is not None else base.embed_tokens.weight.device
    if device.type == "meta":
        raise ValueError(f"{WHO}: model must hold values, got one on the meta device")

    def put(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(device, dtype)

    def linear(*layers: nn.Module, kind: str = weights) -> Any:
        return stack(layers, kind, blocksize, device, dtype)

    out_name, first_name, second_name = OPT if a.family == "opt" else GATED
    blocks = []
    for layer in shown(base.layers, progress, "layers"):
        at, first, second = layer.self_attn, layer.get_submodule(first_name), layer.get_submodule(second_name)
        ups = (layer.mlp.gate_proj, layer.mlp.up_proj) if a.gated else (layer.fc1,)
        norms = {
            "input_norm": put(first.weight),
            "input_bias": put(getattr(first, "bias", None)),
            "mlp_norm": put(second.weight),
            "mlp_bias": put(getattr(second, "bias", None)),
            "qk_norm": put(_qk_norm(at, a)),
        }
        blocks.append(
            Block(
                linear(at.q_proj, at.k_proj, at.v_proj),
                linear(layer.get_submodule(out_name)),
                linear(*ups),
                linear(layer.mlp.down_proj if a.gated else layer.fc2),
                norms,
            )
        )
    last = base.final_layer_norm if a.family == "opt" else base.norm
    embedding = put(base.embed_tokens.weight)
    assert embedding is not None
    if model.lm_head.weight is base.embed_tokens.weight and not nf4_head:
        head = Dense(embedding, put(model.lm_head.bias))  # one tensor, where a GPU holds it
    else:
        head = linear(model.lm_head, kind=weights if nf4_head else "dense")
    rotary = getattr(base, "rotary_emb", None)
    return dict(
        architecture=a,
        blocks=blocks,
        embedding=embedding,
        head=head,
        norm=put(last.weight),
        norm_bias=put(getattr(last, "bias", None)),
        positions=put(base.embed_positions.weight) if a.family == "opt" else None,
        frequencies=None if rotary is None else rotary.inv_freq.detach().float().to(device),
        rotary_scale=1.0 if rotary is None else float(rotary.attention_scaling),
    )


def _qk_norm(attention: Any, a: Architecture) -> Tensor | None:
    """[Hq + Hkv, D]: the norm of each head of q, then of k."""
    if not hasattr(attention, "q_norm"):
        return None
    q, k = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
    return torch.cat([q.expand(a.heads, -1), k.expand(a.kv_heads, -1)])


def load(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or a GGUF file; nothing is fetched, and every tensor must be there."""
    if not path.exists():
        raise FileNotFoundError(f"{WHO}: path must be a model folder or a GGUF file, got {path}, which does not exist")
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{WHO}: transformers is missing: pip install transformers", name=error.name
        ) from None
    folder, extra = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    options = {"local_files_only": True, **extra}
    config = transformers.AutoConfig.from_pretrained(str(folder), **options)
    Architecture.of(config)  # refused before anything large is read
    model, about = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, output_loading_info=True, **options
    )
    wrong = sorted({*about["missing_keys"], *(key for key, *_ in about["mismatched_keys"])})
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{WHO}: path must hold every tensor of the model, got none for {', '.join(wrong[:5])}{more}")
    tokenizer = None  # weights alone serve token ids; transformers would make up an empty one
    if extra or any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **options)
    return model.eval(), tokenizer


def shown(things: Any, progress: bool, what: str) -> Iterator[Any]:
    """The things, with a bar."""
    if not progress:
        yield from things
        return
    from rich.progress import track

    yield from track(list(things), description=what, transient=True)
