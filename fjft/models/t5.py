"""T5, T5 v1.1 and Flan-T5 (gated, with a head of their own), and mT5.

Source: `transformers/models/t5` and `transformers/models/mt5`.
"""

from fjft.errors import UserError
from fjft.models.cross_block import Architecture, Dropout, Side, Stds
from fjft.models.encoder_decoder import EncoderDecoder
from fjft.models.fields import Fields
from fjft.models.layers import ACTIVATIONS
from fjft.models.weights import Row

__all__ = ["HEADS", "MODEL", "architecture", "rows"]

MODEL = EncoderDecoder
HEADS = ("seq2seq_lm",)

_EMBEDDING = "shared.weight"
_HEAD = "lm_head.weight"
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_CLASSES = ("ForConditionalGeneration", "T5Model", "MT5Model")


def architecture(fields: Fields) -> Architecture:
    """Reads the config of a `t5` or `mt5` checkpoint.

    Whether a checkpoint has an output head of its own is nothing that the config says:
    transformers' class calls every T5 tied. It does if its head is another matrix than
    its embeddings.

    Raises:
      UserError: The checkpoint has another kind of head, or two token tables.
    """
    check_class(fields, _CLASSES)
    # These say what `dense_act_fn` and `is_gated_act` say; the others are not T5's.
    fields.ignore("feed_forward_proj", "classifier_dropout", "tie_word_embeddings")
    fields.expect("is_decoder", False)
    is_scaled = fields.model_type == "t5" and fields.take("scale_decoder_outputs")
    for name in _COPIES:
        check_copy(fields, name, _EMBEDDING)
    size, head_dim = fields.take("d_model"), fields.take("d_kv")
    num_heads, width = fields.take("num_heads"), fields.take("d_ff")
    factor, rate = fields.take("initializer_factor"), fields.take("dropout_rate")

    def side(num_layers: int) -> Side:
        return Side(
            num_layers=num_layers,
            num_heads=num_heads,
            head_dim=head_dim,
            intermediate_size=width,
            attention_scale=1.0,
        )

    start_id = "decoder_start_token_id"
    is_declared = fields.model_type == "mt5"
    vocab_size = fields.take("vocab_size")
    return Architecture(
        vocab_size=vocab_size,
        decoder_vocab_size=vocab_size,
        hidden_size=size,
        encoder=side(fields.take("num_layers")),
        decoder=side(fields.take("num_decoder_layers")),
        activation=fields.choose("dense_act_fn", ACTIVATIONS),
        gated=fields.take("is_gated_act"),
        bias=False,
        norm="rms",
        norm_eps=fields.take("layer_norm_epsilon"),
        norm_start=factor,
        pre_norm=True,
        final_norm=True,
        embedding_norm=False,
        embedding_scale=1.0,
        positions="relative",
        num_positions=0,
        position_offset=0,
        num_buckets=fields.take("relative_attention_num_buckets"),
        max_distance=fields.take("relative_attention_max_distance"),
        shares_embeddings=True,
        ties_head=not fields.differ(_HEAD, _EMBEDDING),
        logit_scale=size**-0.5 if is_scaled else 1.0,
        has_logits_bias=False,
        pad_token_id=fields.take("pad_token_id"),
        pads_embedding=False,
        start_id=(
            fields.take(start_id) if is_declared else fields.undeclared(start_id, None)
        ),
        dropout=Dropout(residual=rate, attention=rate, activation=rate, output=rate),
        stds=Stds(
            embedding=factor,
            relative_bias=factor * size**-0.5,
            q=factor * (size * head_dim) ** -0.5,
            kv=factor * size**-0.5,
            o=factor * (num_heads * head_dim) ** -0.5,
            up=factor * size**-0.5,
            down=factor * width**-0.5,
        ),
        prefix="",
    )


def check_class(fields: Fields, known: tuple[str, ...]) -> None:
    """Checks that the checkpoint is one that writes text.

    A bare model is one too: its head is its token table.

    Raises:
      UserError: It has another head.
    """
    name = fields.architecture
    if name is not None and not name.endswith(known):
        raise UserError(
            f"the checkpoint's class {name!r} has no head that fjft knows for "
            f"{fields.model_type}; class names that it does end in {list(known)}"
        )


def check_copy(fields: Fields, name: str, original: str) -> None:
    """Checks that a tensor that fjft passes over is the copy that it ought to be.

    Raises:
      UserError: It holds other values.
    """
    if fields.differ(name, original):
        raise UserError(
            f"the checkpoint's {name} differs from its {original}; fjft has "
            f"{fields.model_type} models in which the two are one"
        )


def rows(arch: Architecture) -> tuple[Row, ...]:
    """Hugging Face's names."""
    tied = (_HEAD,) if arch.ties_head else ()
    table = [Row(_EMBEDDING, "embedding.weight", aliases=(*_COPIES, *tied))]
    if not arch.ties_head:
        table.append(Row(_HEAD, "lm_head.weight"))
    for half in ("encoder", "decoder"):
        layer, ours = f"{half}.block.{{}}.layer", f"{half}.layers.{{}}"
        bias = f"{half}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        table += [
            Row(bias, f"{half}.relative_bias.weight"),
            Row(f"{half}.final_layer_norm.weight", f"{half}.norm.weight"),
        ]
        parts = {"0.SelfAttention": "attention"}
        norms = {"0": "attention_norm", "1": "mlp_norm"}
        if half == "decoder":
            parts["1.EncDecAttention"] = "cross"
            norms = {"0": "attention_norm", "1": "cross_norm", "2": "mlp_norm"}
        mlp = f"{len(norms) - 1}.DenseReluDense"
        linear = {f"{hf}.{m}": f"{us}.{m}" for hf, us in parts.items() for m in "qkvo"}
        ups = {"wi_0": "gate", "wi_1": "up"} if arch.gated else {"wi": "up"}
        linear |= {
            f"{mlp}.{hf}": f"mlp.{us}" for hf, us in (ups | {"wo": "down"}).items()
        }
        linear |= {f"{number}.layer_norm": us for number, us in norms.items()}
        for hf, us in linear.items():
            table.append(Row(f"{layer}.{hf}.weight", f"{ours}.{us}.weight"))
    return tuple(table)
