"""BART, mBART (norms before, and after each stack) and Marian (sinusoids).

Source: `transformers/models/bart`, `transformers/models/mbart` and
`transformers/models/marian`.
"""

import math

from fjft.errors import UserError
from fjft.models.cross_block import Architecture, Dropout, Side, Stds
from fjft.models.encoder_decoder import EncoderDecoder
from fjft.models.fields import Fields
from fjft.models.layers import ACTIVATIONS
from fjft.models.t5 import check_class, check_copy
from fjft.models.weights import Row, linear_rows

__all__ = ["HEADS", "MODEL", "architecture", "rows"]

MODEL = EncoderDecoder
HEADS = ("seq2seq_lm",)

_CLASSES = (
    "ForConditionalGeneration",
    "MTModel",
    "BartModel",
    "MBartModel",
    "MarianModel",
)
# The configs have no fields for these; transformers' models have these numbers.
_NORM_EPS = 1e-5
_POSITION_OFFSET = 2


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `bart`, `mbart` or `marian` checkpoint.

    Raises:
      UserError: The checkpoint has another kind of head, or more token tables than its
        kind has.
    """
    check_class(fields, _CLASSES)
    marian, mbart = (fields.model_type == name for name in ("marian", "mbart"))
    fields.expect("is_decoder", False)
    fields.expect("tie_word_embeddings", True)
    # What whole layers are dropped in is training only.
    fields.expect("encoder_layerdrop", 0.0)
    fields.expect("decoder_layerdrop", 0.0)
    # This one is for generation.
    fields.ignore("forced_eos_token_id")
    pad_token_id = fields.take("pad_token_id")
    if not marian:
        fields.ignore("classifier_dropout")
    shares = fields.take("share_encoder_decoder_embeddings") if marian else True
    vocab_size = fields.take("vocab_size")
    decoder_vocab_size = fields.take("decoder_vocab_size") if marian else vocab_size
    if shares and decoder_vocab_size != vocab_size:
        raise UserError(
            f"marian config: decoder_vocab_size={decoder_vocab_size} is not vocab_size="
            f"{vocab_size}, but encoder and decoder share their embeddings"
        )
    size, std = fields.take("d_model"), fields.take("init_std")
    has_prefix = fields.stores("model.shared.weight") or not (
        fields.stores("shared.weight") or fields.stores("encoder.embed_tokens.weight")
    )
    arch = Architecture(
        vocab_size=vocab_size,
        decoder_vocab_size=decoder_vocab_size,
        hidden_size=size,
        encoder=_side(fields, "encoder", size),
        decoder=_side(fields, "decoder", size),
        activation=fields.choose("activation_function", ACTIVATIONS),
        gated=False,
        bias=True,
        norm="layer",
        norm_eps=_NORM_EPS,
        norm_start=1.0,
        pre_norm=mbart,
        final_norm=mbart,
        embedding_norm=not marian,
        embedding_scale=math.sqrt(size) if fields.take("scale_embedding") else 1.0,
        positions="sinusoidal" if marian else "learned",
        num_positions=fields.take("max_position_embeddings"),
        position_offset=0 if marian else _POSITION_OFFSET,
        num_buckets=0,
        max_distance=0,
        shares_embeddings=shares,
        ties_head=True,
        logit_scale=1.0,
        has_logits_bias=not fields.knows_tensors or fields.stores("final_logits_bias"),
        pad_token_id=pad_token_id,
        pads_embedding=pad_token_id is not None,
        start_id=_start_id(fields),
        dropout=Dropout(
            residual=fields.take("dropout"),
            attention=fields.take("attention_dropout"),
            activation=fields.take("activation_dropout"),
            output=0.0,
        ),
        stds=Stds(
            embedding=std, relative_bias=std, q=std, kv=std, o=std, up=std, down=std
        ),
        prefix="model." if has_prefix else "",
    )
    _check_copies(fields, arch)
    return arch


def _side(fields: Fields, half: str, size: int) -> Side:
    num_heads = fields.take(f"{half}_attention_heads")
    return Side(
        num_layers=fields.take(f"{half}_layers"),
        num_heads=num_heads,
        head_dim=size // num_heads,
        intermediate_size=fields.take(f"{half}_ffn_dim"),
        attention_scale=(size // num_heads) ** -0.5,
    )


def _start_id(fields: Fields) -> int | None:
    """MBART starts a label with its own last token, which names the language."""
    start_id = fields.take("decoder_start_token_id")
    return None if fields.model_type == "mbart" else start_id


def _tables(arch: Architecture) -> dict[str, tuple[str, ...]]:
    """The names of the token tables: first the one transformers saves, then copies."""
    encoder, decoder = (
        f"{arch.prefix}{h}.embed_tokens.weight" for h in ("encoder", "decoder")
    )
    head = "lm_head.weight"
    if arch.shares_embeddings:
        return {"embedding": (f"{arch.prefix}shared.weight", encoder, decoder, head)}
    return {"embedding": (encoder,), "decoder_embedding": (decoder, head)}


def _check_copies(fields: Fields, arch: Architecture) -> None:
    for name, *copies in _tables(arch).values():
        for copy in copies:
            check_copy(fields, copy, name)


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    table = [
        Row(name, f"{ours}.weight", aliases=tuple(copies))
        for ours, (name, *copies) in _tables(arch).items()
    ]
    if arch.has_logits_bias:
        table.append(Row("final_logits_bias", "bias"))
    for half in ("encoder", "decoder"):
        hf_half = f"{arch.prefix}{half}"
        layer, ours = f"{hf_half}.layers.{{}}", f"{half}.layers.{{}}"
        if arch.positions == "learned":
            positions = f"{hf_half}.embed_positions.weight"
            table.append(Row(positions, f"{half}.positions.weight"))
        if arch.embedding_norm:
            norm = f"{hf_half}.layernorm_embedding"
            table += linear_rows(norm, f"{half}.embedding_norm")
        if arch.final_norm:
            table += linear_rows(f"{hf_half}.layer_norm", f"{half}.norm")
        parts = {"self_attn": "attention"}
        if half == "decoder":
            parts["encoder_attn"] = "cross"
        names = {"fc1": "mlp.up", "fc2": "mlp.down", "final_layer_norm": "mlp_norm"}
        for hf, us in parts.items():
            names[f"{hf}_layer_norm"] = f"{us}_norm"
            names |= {f"{hf}.{m}_proj": f"{us}.{m}" for m in "qkv"}
            names[f"{hf}.out_proj"] = f"{us}.o"
        for hf, us in names.items():
            table += linear_rows(f"{layer}.{hf}", f"{ours}.{us}")
    return tuple(table)
