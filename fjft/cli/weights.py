"""Which weights a command works on: a run's own, an adapter's, or the bare model's."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from fjft.cli import flags
from fjft.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """What to load.

    Attributes:
      source: The pretrained model, or the directory of a fully fine-tuned one.
      revision: Branch, tag or commit of a hub id.
      dtype: Type of weights and activations.
      quantization: A key of `FORMATS` for linear maps that are not trained, or "".
      adapter: A PEFT directory to put on top, or None.
      step: The training checkpoint to take the trained weights from, or None.
      experiment: The config, where there is one.
    """

    source: str
    revision: str = "main"
    dtype: str = "auto"
    quantization: str = ""
    adapter: Path | None = None
    step: int | None = None
    experiment: Any = None

    def describe(self) -> str:
        """What it is, for a line on the screen."""
        if self.step is not None:
            directory = self.experiment.checkpoint.directory
            return f"{self.source} with checkpoint {self.step} of {directory}"
        return f"{self.source} with {self.adapter}" if self.adapter else self.source


def add_flags(parser: argparse.ArgumentParser, *, with_source: bool) -> None:
    """Adds the flags that `choose` reads."""
    flags.add_config(parser)
    parser.add_argument(
        "--run", metavar="DIR", help="a run's directory, instead of --config"
    )
    if with_source:
        parser.add_argument(
            "--source",
            metavar="MODEL",
            help="a model instead of a run: a directory, a file, package:NAME/path or "
            "a hub id",
        )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="the PEFT adapter to use, instead of the run's own",
    )
    parser.add_argument(
        "--step", type=int, help="use the run's training checkpoint of this step"
    )
    parser.add_argument(
        "--base",
        action="store_true",
        help="use the bare model that the run starts from",
    )


def choose(parser: argparse.ArgumentParser, chosen: argparse.Namespace) -> Weights:
    """Finds the weights that the flags mean.

    Raises:
      UserError: A run that is not there, not finished, or whose config is broken.
    """
    source = getattr(chosen, "source", None)
    given = [f for f in ("config", "run", "source") if getattr(chosen, f, None)]
    if len(given) != 1:
        allowed = (
            "--config, --run or --source"
            if "source" in chosen
            else ("--config or --run")
        )
        parser.error(f"give one of {allowed}")
    if [chosen.adapter is not None, chosen.step is not None, chosen.base].count(
        True
    ) > 1:
        parser.error("--adapter, --step and --base exclude each other")
    adapter = Path(chosen.adapter) if chosen.adapter else None
    if source:
        if chosen.step is not None or chosen.base or chosen.overrides:
            parser.error(
                "--step, --base and --config.KEY belong to a run, not --source"
            )
        return Weights(source=source, adapter=adapter)

    from fjft.build import build_experiment

    experiment = build_experiment(load_config(chosen))
    weights = Weights(
        source=experiment.model.source,
        revision=experiment.model.revision,
        dtype=experiment.model.dtype,
        quantization=experiment.model.quantization,
        adapter=adapter,
        step=chosen.step,
        experiment=experiment,
    )
    if chosen.base and experiment.model.from_scratch:
        parser.error("--base is of no use: the run started from random weights")
    if adapter or chosen.base or chosen.step is not None:
        return weights
    return _find_result(weights)


def load_config(chosen: argparse.Namespace) -> Any:
    """The config of `--config`, or the one that the run in `--run` was made with.

    Raises:
      UserError: There is none, or it is broken.
    """
    if not chosen.run:
        return flags.load_config(chosen)
    import ml_collections

    from fjft import build

    path = Path(chosen.run) / "config.json"
    if not path.is_file():
        raise UserError(f"{chosen.run} is no run: it has no config.json")
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); mend it") from error
    config = ml_collections.ConfigDict(values, allow_dotted_keys=True)
    # The run may have been moved since.
    build.override(config, {"checkpoint.directory": str(chosen.run)})
    flags.apply_overrides(config, chosen)
    return config


def _find_result(weights: Weights) -> Weights:
    """The adapter or the model that the run left at its end."""
    from fjft.checkpoint.orbax import saved_steps

    directory = Path(weights.experiment.checkpoint.directory)
    if weights.experiment.method.PEFT_TYPE is None:
        if (directory / "model").is_dir():
            return dataclasses.replace(weights, source=str(directory / "model"))
    elif (directory / "adapter").is_dir():
        return dataclasses.replace(weights, adapter=directory / "adapter")
    steps = saved_steps(directory)
    if steps:
        raise UserError(
            f"the run in {directory} has not come to its end; use --step={steps[-1]}, "
            "its last checkpoint, or finish it with fjft train --resume"
        )
    raise UserError(
        f"{directory} holds no trained weights; run fjft train first, or use --base "
        "for the bare model"
    )


def make_mesh(weights: Weights) -> Any:
    """The config's mesh; one device where there is no config."""
    from fjft import sharding

    if weights.experiment is None:
        return sharding.single_device_mesh()
    return sharding.make_mesh(weights.experiment.mesh)


def load_tokenizer(weights: Weights) -> Any:
    """Loads the model's tokenizer, before the model itself.

    Raises:
      UserError: There is none.
    """
    from fjft.checkpoint.source import open_model

    if weights.step is not None:
        return weights.experiment.open_model().load_tokenizer()
    return open_model(weights.source, weights.revision).load_tokenizer()


def load(weights: Weights, mesh: Any) -> Any:
    """Loads the model, adapters attached where it has any.

    Raises:
      UserError: The model, the adapter or the checkpoint will not do.
    """
    from fjft import blueprint, pretrained
    from fjft.models.attention import set_way

    labels = weights.experiment and weights.experiment.find_labels()
    head: dict[str, Any] = {}
    if weights.experiment is not None:
        head["head"] = weights.experiment.objective_module.HEAD
        head["num_labels"] = weights.experiment.count_labels(labels)
    if weights.step is not None:
        model = _load_checkpoint(weights, mesh, head)
    else:
        model = pretrained.load_model(
            weights.source,
            dtype=weights.dtype,
            mesh=mesh,
            adapter=weights.adapter,
            revision=weights.revision,
            quantization=weights.quantization,
            **head,
        )
    if weights.experiment is not None:
        set_way(model, weights.experiment.model.way)
    if labels is not None:
        files = blueprint.name_labels(model.provenance.files, labels)
        model.provenance = dataclasses.replace(model.provenance, files=files)
    return model


def _load_checkpoint(weights: Weights, mesh: Any, head: dict[str, Any]) -> Any:
    from fjft import pretrained, tree
    from fjft.checkpoint.orbax import digest, restore_params
    from fjft.peft.lora_adapter import is_start

    e = weights.experiment
    assert weights.step is not None
    model = pretrained.build_model(
        e.open_model(),
        method=e.method,
        peft_config=e.peft,
        dtype=weights.dtype,
        mesh=mesh,
        seed=e.train.seed,
        quantization=weights.quantization,
        **head,
    )
    trainable = e.method.is_trainable(e.peft, model.provenance.sites)
    trained, frozen = tree.partition(tree.split(model)[1], trainable)
    starts, base = tree.partition(frozen, is_start)
    directory = e.checkpoint.directory
    restored = restore_params(
        directory,
        weights.step,
        trained,
        starts,
        digest(base),
        averaged=e.train.ema_decay > 0,
    )
    tree.update(model, restored)
    return model
