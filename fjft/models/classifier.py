"""A decoder with a head for whole texts: their labels, or a reward."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from fjft.errors import UserError
from fjft.models.block import Architecture
from fjft.models.decoder import Decoder
from fjft.models.encoder import restarting_positions
from fjft.models.layers import Linear, Maker, Terms
from fjft.models.pooling import pool


class Classifier(Decoder):
    """A decoder that labels texts by what it makes of their last tokens.

    Calling it gives logits of each row's segment 1, [B, num_labels]; with
    `num_segments=S` those of its segments 1 .. S, [B, S, num_labels].
    """

    def __init__(
        self,
        arch: Architecture,
        make: Maker,
        compute_dtype: jax.typing.DTypeLike,
        cuts: tuple[int, ...] = (),
    ):
        assert arch.num_labels is not None
        super().__init__(arch, make, compute_dtype, cuts)
        self.lm_head = nnx.data(None)
        self.score = Linear(
            make,
            "score",
            (arch.num_labels, arch.hidden_size),
            ("labels", "embed"),
            bias=False,
            std=arch.initializer_range,
        )

    def __call__(
        self,
        input_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        num_segments: int | None = None,
    ) -> Float[Array, "B *C"]:
        """The head's logits; see the class, and for the arguments `Encoder`."""
        segments = jnp.ones_like(input_ids) if segment_ids is None else segment_ids
        hidden = self.encode(input_ids, positions, segments, None)
        return self.predict(hidden, segments, num_segments=num_segments)

    def encode(
        self,
        input_ids_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"] | None,
        segment_ids_BT: Int[Array, "B T"],
        token_type_ids_BT: Int[Array, "B T"] | None,
        *,
        rng: Key[Array, ""] | None = None,
        remat: str = "none",
    ) -> Float[Array, "B T D"]:
        """Last hidden states for `predict`; arguments as in `Encoder.encode`."""
        del token_type_ids_BT  # A decoder knows none.
        if positions_BT is None:
            positions_BT = restarting_positions(segment_ids_BT)
        x_BTD = self.embed(input_ids_BT)
        return self.backbone(x_BTD, positions_BT, segment_ids_BT, rng=rng, remat=remat)[
            0
        ]

    def predict(
        self,
        x_BTD: Float[Array, "B T D"],
        segment_ids_BT: Int[Array, "B T"],
        *,
        num_segments: int | None = None,
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "B *C"]:
        """The head's logits from last hidden states."""
        x_BSD = pool(x_BTD, segment_ids_BT, "last", num_segments or 1)
        logits_BSC = self.score(x_BSD, rng)
        return logits_BSC if num_segments is not None else logits_BSC[:, 0]

    def logit_terms(self, x_BTD: Any, rng: Any = None) -> Terms:
        """There are no logits of tokens.

        Raises:
          UserError: Always.
        """
        del x_BTD, rng
        raise UserError(
            "the model has a head for whole texts and writes none; load it with its "
            "own head, head='causal_lm'"
        )
