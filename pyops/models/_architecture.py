"""What a decoder is made of, read from a transformers configuration; what is not supported is refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WHO = "Decoder"

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt")

# Rotary frequencies that do not depend on the length of the text.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Architecture:
    """The sizes and kinds of a decoder's parts.

    Args:
        family: one of FAMILIES.
        layers, hidden, heads, kv_heads, head_dim, vocab: sizes.
        max_positions: tokens that a sequence can have.
        eps: added to variances in norms.
        windows: the sliding window of each layer, or None where it sees all.
        gated: silu(gate) * up rather than relu(up).
        layer_norm: LayerNorm with biases rather than RMSNorm.
        position_offset: rows before the first of learned positions; -1 where positions are rotary.
        eos: tokens that end a sequence.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    eps: float
    windows: tuple[int | None, ...]
    gated: bool = True
    layer_norm: bool = False
    position_offset: int = -1
    eos: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """From a transformers configuration.

        Raises:
            ValueError: naming what is not supported.
        """
        family = getattr(config, "model_type", type(config).__name__)
        if family not in FAMILIES:
            raise ValueError(f"{WHO}: model must be one of {', '.join(FAMILIES)}, got {family}")
        (_refuse_opt if family == "opt" else _refuse_rotary)(config)
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        eos = getattr(config, "eos_token_id", None)
        common: dict[str, Any] = dict(
            family=family,
            layers=layers,
            hidden=config.hidden_size,
            heads=heads,
            vocab=config.vocab_size,
            max_positions=config.max_position_embeddings,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            eos=() if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,),
        )
        if family == "opt":
            return cls(
                **common, kv_heads=heads, eps=1e-5, windows=(None,) * layers,
                gated=False, layer_norm=True, position_offset=2,
            )  # fmt: skip
        return cls(
            **common,
            kv_heads=config.num_key_value_heads or heads,
            eps=config.rms_norm_eps,
            windows=_windows(config, layers),
        )


def _refuse(what: str, got: object) -> None:
    raise ValueError(f"{WHO}: model must have {what}, got {got!r}")


def _refuse_opt(config: Any) -> None:
    if not config.do_layer_norm_before:
        _refuse("its norms before the attention (do_layer_norm_before)", False)
    if config.word_embed_proj_dim != config.hidden_size:
        _refuse("embeddings as wide as its layers (word_embed_proj_dim)", config.word_embed_proj_dim)
    if config.activation_function != "relu":
        _refuse("the activation relu", config.activation_function)
    if not (config.enable_bias and config.layer_norm_elementwise_affine):
        _refuse("biases (enable_bias, layer_norm_elementwise_affine)", False)


def _refuse_rotary(config: Any) -> None:
    if config.hidden_act != "silu":
        _refuse("the activation silu", config.hidden_act)
    # transformers 4 has rope_scaling, 5 has rope_parameters
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in STATIC_ROPE:
        _refuse(f"a rope_type of {', '.join(STATIC_ROPE)}", kind)


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """Mistral slides in every layer, Qwen where its layer_types (or max_window_layers) say so."""
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return (None,) * layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        first = getattr(config, "max_window_layers", 0)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
