"""What a plan is made for: a config.json with a recipe, or a converted directory as it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.directory import Directory
from ..config import released
from ..config.model_args import ModelArgs
from ..errors import UsageError
from .budget import CHUNK, Budget, estimate, measure
from .machine import Machine

# From the largest to the smallest.
RECIPES = ("bf16", "8bit", "6bit", "5bit", "4bit", "mxfp4", "mixed-3-4", "3bit", "mixed-2-3", "2bit")


@dataclass(frozen=True)
class Subject:
    """A model to plan for. Where `directory` is set its files are measured; else their sizes are estimated."""

    name: str
    config: dict[str, Any]
    recipe: str
    directory: Directory | None = None

    @property
    def streamed(self) -> bool:
        """Whether experts can be read one by one, as in every directory that convert writes."""
        return self.directory is None or self.directory.is_streamable

    @property
    def files(self) -> list[Path]:
        """The files whose disk can be measured."""
        return [] if self.directory is None else self.directory.weight_files

    def budget(self, args: ModelArgs, context: int, machine: Machine) -> Budget:
        """What the model takes on a machine. Raises FormatError where the directory's files cannot be read."""
        sizes = (args, context, CHUNK, *machine.item_bytes)
        if self.directory is not None:
            return measure(self.directory, *sizes)
        from ..checkpoint.recipe import named

        return estimate(self.config, named(self.recipe), *sizes)


def released_subject(recipe: str | None = None) -> Subject:
    """MiMo-V2-Flash as released, by default with 4-bit experts."""
    return Subject(released.NAME, released.CONFIG, recipe or "4bit")


def subject_of_directory(name: str, directory: Directory, recipe: str | None = None) -> Subject:
    """A directory as it is; with `recipe`, or where it is not converted yet, what converting it would give.

    Raises FormatError for a wrong config.json, UsageError as `subject_of_config`.
    """
    config = directory.config
    if recipe is None and "quantization_config" in config and "quantization" not in config:
        recipe = "4bit"  # an FP8 checkpoint, to be converted
    if recipe is None and directory.weight_files:
        ours = config.get("mlx_mimo")
        stored = ours.get("recipe") if isinstance(ours, dict) else None
        return Subject(name, config, stored or "as it is", directory)
    return subject_of_config(name, config, recipe)


def subject_of_config(name: str, config: dict[str, Any], recipe: str | None = None) -> Subject:
    """What converting a checkpoint with this config.json would give, by default with the recipe that it was made with.

    Raises UsageError where its quantization is that of no recipe and none is given.
    """
    return Subject(name, config, recipe or _recipe_in(config) or "4bit")


def _recipe_in(config: dict[str, Any]) -> str | None:
    """The recipe of a converted config.json, or the one that quantises experts as mlx-lm did; None where nothing is
    quantised. Raises UsageError where no recipe does.
    """
    ours = config.get("mlx_mimo")
    stored = ours.get("recipe") if isinstance(ours, dict) else None
    if isinstance(stored, str) and stored in RECIPES:
        return stored
    quantization = config.get("quantization")
    if not isinstance(quantization, dict):
        return None
    kinds = {_kind_of(quantization)} | {
        _kind_of(quantization | found)
        for path, found in quantization.items()
        if isinstance(found, dict) and (".switch_mlp." in path or ".experts." in path)
    }
    name = _RECIPE_OF_KIND.get(kinds.pop()) if len(kinds) == 1 else None
    if name is None:
        raise UsageError("config.json: it is quantised as no recipe does it; give --recipe to say which comes nearest")
    return name


_Kind = tuple[Any, Any, Any]  # mode, bits and group size, as config.json has them


def _kind_of(fields: dict[str, Any]) -> _Kind:
    return fields.get("mode", "affine"), fields.get("bits"), fields.get("group_size")


_RECIPE_OF_KIND: dict[_Kind, str] = {("affine", bits, 64): f"{bits}bit" for bits in (2, 3, 4, 5, 6, 8)}
_RECIPE_OF_KIND[("mxfp4", 4, 32)] = "mxfp4"
