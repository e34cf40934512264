"""Recipes: which tensor is stored with how many bits.

A recipe is an ordered list of rules over module paths such as `model.layers.3.mlp.experts.gate_proj` (all experts of
a layer are one path); the first that matches decides. A matrix that no rule matches is kept in bfloat16, and what is
not a matrix is kept as it is.
"""

import fnmatch
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .quantization import Quantization, checked_quantization


@dataclass(frozen=True)
class Rule:
    pattern: str
    quantization: Quantization | None  # None: kept in bfloat16


@dataclass(frozen=True)
class Recipe:
    name: str
    rules: tuple[Rule, ...]

    def of(self, path: str) -> Quantization | None:
        """How the matrix at a module path is stored; None means in bfloat16."""
        for rule in self.rules:
            if fnmatch.fnmatchcase(path, rule.pattern):
                return rule.quantization
        return None

    def as_json(self) -> dict[str, Any]:
        rules = [[rule.pattern, rule.quantization.as_json() if rule.quantization else None] for rule in self.rules]
        return {"name": self.name, "rules": rules}


_REST = Rule("*", Quantization(8, 64))
# {recipe: (gate and up, down)} of the experts; every other matrix has 8 bits.
_EXPERTS = {
    "8bit": (Quantization(8, 64),) * 2,
    "6bit": (Quantization(6, 64),) * 2,
    "5bit": (Quantization(5, 64),) * 2,
    "4bit": (Quantization(4, 64),) * 2,
    "3bit": (Quantization(3, 64),) * 2,
    "2bit": (Quantization(2, 64),) * 2,
    "mixed-3-4": (Quantization(3, 64), Quantization(4, 64)),
    "mixed-2-3": (Quantization(2, 64), Quantization(3, 64)),
    "mxfp4": (Quantization(4, 32, "mxfp4"),) * 2,
}
NAMES = (*_EXPERTS, "bf16")


def _expert_rules(gate_up: Quantization, down: Quantization) -> tuple[Rule, ...]:
    if gate_up == down:
        return (Rule("*.mlp.experts.*", down),)
    return Rule("*.mlp.experts.down_proj", down), Rule("*.mlp.experts.*", gate_up)


def named(name: str, q_bits: int | None = None, q_group_size: int | None = None, q_mode: str | None = None) -> Recipe:
    """The recipe of a name or of a TOML file; the `q_` arguments override what a named recipe does with the experts.

    Raises UsageError where `name` is neither, or where the arguments do not go with it.
    """
    if name.endswith(".toml"):
        if q_bits or q_group_size or q_mode:
            raise UsageError("--q-bits, --q-group-size and --q-mode do not go with a recipe file: say it there")
        return from_toml(Path(name))
    if name not in NAMES:
        raise UsageError(f"recipe {name!r}: one of {', '.join(NAMES)} or a .toml file expected")
    if q_bits is None and q_group_size is None and q_mode is None:
        return Recipe(name, () if name == "bf16" else (*_expert_rules(*_EXPERTS[name]), _REST))
    if name == "bf16" or name.startswith("mixed"):
        raise UsageError(f"--q-bits, --q-group-size and --q-mode do not go with the recipe {name}")
    base = _EXPERTS[name][0]
    mode = q_mode or ("affine" if q_bits else base.mode)
    if mode == "mxfp4":
        chosen = checked_quantization(q_bits or 4, q_group_size, mode)
        return Recipe("mxfp4", (*_expert_rules(chosen, chosen), _REST))
    chosen = checked_quantization(q_bits or base.bits, q_group_size or 64, mode)
    rest = Rule("*", checked_quantization(8, q_group_size or 64))
    label = f"{chosen.bits}bit" if chosen.group_size == 64 else f"{chosen.bits}bit-g{chosen.group_size}"
    return Recipe(label, (*_expert_rules(chosen, chosen), rest))


def from_toml(path: Path) -> Recipe:
    """The recipe in a file of `[[rule]]` tables: `pattern`, and `bits`, `group_size`, `mode`, or `keep = true`.

    Raises UsageError naming the file and the rule.
    """
    try:
        fields = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path.name}: not TOML: {error}") from None
    tables = fields.pop("rule", None)
    if fields or not isinstance(tables, list) or not tables:
        raise UsageError(f"{path.name}: only [[rule]] tables expected, at least one")
    return Recipe(path.stem, tuple(_toml_rule(path, number, table) for number, table in enumerate(tables, 1)))


def _toml_rule(path: Path, number: int, table: dict[str, Any]) -> Rule:
    where = f"{path.name}: rule {number}: "
    unknown = set(table) - {"pattern", "bits", "group_size", "mode", "keep"}
    if unknown:
        raise UsageError(f"{where}unknown field {sorted(unknown)[0]!r}")
    pattern = table.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        raise UsageError(f'{where}pattern expected, such as "*.mlp.experts.down_proj"')
    if table.get("keep"):
        if set(table) - {"pattern", "keep"}:
            raise UsageError(f"{where}keep goes with no other field")
        return Rule(pattern, None)
    mode = table.get("mode", "affine")
    bits = table.get("bits", 4 if mode == "mxfp4" else None)
    return Rule(pattern, checked_quantization(bits, table.get("group_size"), mode, where))
