"""Modules that are trained whole beside a method's parameters: `modules_to_save`."""

from collections.abc import Sequence

from fjft.errors import UserError
from fjft.models.weights import Site
from fjft.peft import targets
from fjft.peft.targets import PeftTensor


def paths(pattern: str, sites: Sequence[Site]) -> frozenset[str]:
    """The parameters that are trained whole."""
    if not pattern:
        return frozenset()
    chosen = modules(pattern, sites).keys()
    tied = not any(site.path.startswith(("lm_head.", "score.")) for site in sites)
    if tied and any(name.endswith("embed_tokens") for name in chosen):
        raise UserError(
            f"peft.modules_to_save={pattern!r}: this model ties its "
            "embeddings to its output head, and PEFT would load them into one of the "
            "two; train such a model with peft.method=full"
        )
    found = targets.whole_stacks(chosen, sites, f"peft.modules_to_save={pattern!r}")
    return frozenset(site.path for site in found)


def modules(pattern: str, sites: Sequence[Site]) -> dict[str, str]:
    """The modules that are trained whole, each with the module that a pattern means.

    That may be one that holds it: `classifier` means RoBERTa's `classifier.dense` too.
    And it may only end so, since PEFT would ask a file that names DistilBERT's
    `classifier` for its `pre_classifier` too.
    """
    if not pattern:
        return {}
    names = [m for site in sites for m in site.hf_modules]
    whole = {m: targets.holders(m) for m in names}
    every = [*dict.fromkeys(h for holders in whole.values() for h in holders)]
    chosen = targets.select(pattern, every, "peft.modules_to_save")
    ends = tuple(chosen)
    found = {m: [h for h in hs if h.endswith(ends)] for m, hs in whole.items()}
    return {m: holders[0] for m, holders in found.items() if holders}


def tensors(
    pattern: str, sites: Sequence[Site], prefix: str = targets.PEFT_PREFIX
) -> list[PeftTensor]:
    """PEFT's tensors of these modules.

    Args:
      pattern: `modules_to_save`.
      sites: Where each tensor of a checkpoint lies in the model.
      prefix: What PEFT puts before their Hugging Face names.
    """
    trained = paths(pattern, sites)
    return [
        PeftTensor(prefix + name, site.path, (i,) if site.lead else ())
        for site in sites
        if site.path in trained
        for i, name in enumerate(site.hf_names)
    ]
