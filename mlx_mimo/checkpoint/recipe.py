"""Recipes: which tensor is stored with how many bits.

A recipe is an ordered list of rules over module paths such as `model.layers.3.mlp.experts.gate_proj` (all experts of
a layer are one path); the first that matches decides. What no rule names, or is no matrix, is kept as it is.
"""

import fnmatch
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Quantisation:
    """How a matrix is stored, as `mx.quantize` takes it."""

    bits: int
    group_size: int
    mode: str = "affine"

    def as_json(self) -> dict:
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    @property
    def bits_per_weight(self) -> float:
        return self.bits + (32 if self.mode == "affine" else 8) / self.group_size

    def __str__(self) -> str:
        return self.mode if self.mode != "affine" else f"{self.bits}-bit group {self.group_size}"


@dataclass(frozen=True)
class Rule:
    pattern: str
    quantisation: Quantisation | None  # None: kept in bfloat16


@dataclass(frozen=True)
class Recipe:
    name: str
    rules: tuple[Rule, ...]

    def of(self, path: str) -> Quantisation | None:
        for rule in self.rules:
            if fnmatch.fnmatchcase(path, rule.pattern):
                return rule.quantisation
        return None

    def as_json(self) -> dict:
        rules = [[rule.pattern, rule.quantisation.as_json() if rule.quantisation else None] for rule in self.rules]
        return {"name": self.name, "rules": rules}


def quantisation(bits: int, group_size: int | None = None, mode: str = "affine", where: str = "") -> Quantisation:
    """Checked. Raises UsageError, beginning with `where`."""
    if mode == "mxfp4":
        if bits not in (4, None) or group_size not in (32, None):
            raise UsageError(f"{where}mxfp4 has 4 bits and groups of 32")
        return Quantisation(4, 32, mode)
    if mode != "affine":
        raise UsageError(f"{where}mode {mode!r}: affine or mxfp4 expected")
    group_size = 64 if group_size is None else group_size
    if bits not in AFFINE_BITS:
        raise UsageError(f"{where}{bits!r} bits: one of {', '.join(map(str, AFFINE_BITS))} expected")
    if group_size not in AFFINE_GROUPS:
        raise UsageError(f"{where}group size {group_size!r}: one of {', '.join(map(str, AFFINE_GROUPS))} expected")
    return Quantisation(bits, group_size, mode)


_REST = Rule("*", Quantisation(8, 64))
# {name: (gate and up, down)} of the experts; everything else that is a matrix has 8 bits.
_EXPERTS = {
    "8bit": (Quantisation(8, 64),) * 2,
    "6bit": (Quantisation(6, 64),) * 2,
    "5bit": (Quantisation(5, 64),) * 2,
    "4bit": (Quantisation(4, 64),) * 2,
    "3bit": (Quantisation(3, 64),) * 2,
    "2bit": (Quantisation(2, 64),) * 2,
    "mixed-3-4": (Quantisation(3, 64), Quantisation(4, 64)),
    "mixed-2-3": (Quantisation(2, 64), Quantisation(3, 64)),
    "mxfp4": (Quantisation(4, 32, "mxfp4"),) * 2,
}
NAMES = (*_EXPERTS, "bf16")


def _expert_rules(gate_up: Quantisation, down: Quantisation) -> tuple[Rule, ...]:
    if gate_up == down:
        return (Rule("*.mlp.experts.*", down),)
    return Rule("*.mlp.experts.down_proj", down), Rule("*.mlp.experts.*", gate_up)


def named(name: str, q_bits: int | None = None, q_group_size: int | None = None, q_mode: str | None = None) -> Recipe:
    """A recipe by name or TOML file; the `q_` arguments override what it says of the experts.

    Raises UsageError for a name that is none.
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
        chosen = quantisation(q_bits or 4, q_group_size, mode)
        return Recipe("mxfp4", (*_expert_rules(chosen, chosen), _REST))
    chosen = quantisation(q_bits or base.bits, q_group_size or 64, mode)
    rest = Rule("*", quantisation(8, q_group_size or 64))
    label = f"{chosen.bits}bit" if chosen.group_size == 64 else f"{chosen.bits}bit-g{chosen.group_size}"
    return Recipe(label, (*_expert_rules(chosen, chosen), rest))


def from_toml(path: Path) -> Recipe:
    """A file of `[[rule]]` tables: `pattern`, and `bits`, `group_size`, `mode`, or `keep = true`."""
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


def _toml_rule(path: Path, number: int, table: dict) -> Rule:
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
    return Rule(pattern, quantisation(bits, table.get("group_size"), mode, where))
