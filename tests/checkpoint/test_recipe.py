"""Recipes by name, by flags, by file."""

import pytest

from mlx_mimo.checkpoint.quantization import Quantization
from mlx_mimo.checkpoint.recipe import NAMES, from_toml, named
from mlx_mimo.errors import UsageError

UP, DOWN = "model.layers.1.mlp.experts.up_proj", "model.layers.1.mlp.experts.down_proj"
HEAD = "lm_head"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bf16"])
def test_matrices_outside_experts_have_8_bits_in_every_recipe(name):
    assert named(name).of(HEAD) == Quantization(8, 64)
    assert named(name).of("model.layers.0.mlp.gate_proj") == Quantization(8, 64)


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [("4bit", 4, 4), ("6bit", 6, 6), ("5bit", 5, 5), ("mixed-3-4", 3, 4), ("mixed-2-3", 2, 3), ("2bit", 2, 2)],
)
def test_each_recipe_gives_experts_its_bits(name, up, down):
    assert named(name).of(UP) == Quantization(up, 64)
    assert named(name).of(DOWN) == Quantization(down, 64)


def test_bf16_quantizes_nothing_and_mxfp4_quantizes_experts():
    assert named("bf16").of(UP) is None
    assert named("mxfp4").of(UP) == Quantization(4, 32, "mxfp4")


def test_flags_override_the_experts_quantization():
    recipe = named("4bit", q_bits=3, q_group_size=32)
    assert recipe.of(UP) == Quantization(3, 32)
    assert recipe.of(HEAD) == Quantization(8, 32)
    assert named("4bit", q_mode="mxfp4").of(DOWN) == Quantization(4, 32, "mxfp4")


def test_the_first_matching_rule_of_a_recipe_file_decides(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[[rule]]\npattern = "*.layers.1.mlp.experts.*"\nkeep = true\n'
        '[[rule]]\npattern = "*.experts.down_proj"\nbits = 5\ngroup_size = 32\n'
        '[[rule]]\npattern = "*.experts.*"\nmode = "mxfp4"\n'
    )
    recipe = from_toml(path)
    assert recipe.name == "mine"
    assert recipe.of(UP) is None
    assert recipe.of(DOWN.replace("1", "2")) == Quantization(5, 32)
    assert recipe.of(UP.replace("1", "2")) == Quantization(4, 32, "mxfp4")
    assert recipe.of(HEAD) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rule = 3", r"only \[\[rule\]\] tables"),
        ("[[rule]]\nbits = 4", "rule 1: pattern expected"),
        ('[[rule]]\npattern = "*"\nbits = 7', "rule 1: 7 bits"),
        ('[[rule]]\npattern = "*"', "rule 1: None bits"),
        ('[[rule]]\npattern = "*"\nbit = 4', "unknown field 'bit'"),
        ('[[rule]]\npattern = "*"\nkeep = true\nbits = 4', "keep goes with no other"),
        ('[[rule]]\npattern = "*"\nbits = 4\ngroup_size = 48', "group size 48"),
        ('[[rule]]\npattern = "*"\nbits = 4\nmode = "nf4"', "mode 'nf4'"),
        ("[[rule", "not TOML"),
    ],
)
def test_a_wrong_recipe_file_is_refused(tmp_path, text, said):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        named(str(path))


def test_a_recipe_file_is_applied_by_convert(tmp_path):
    from mlx_lm import load
    from support.converted import fp8_directory

    from mlx_mimo.convert.__main__ import main

    path = tmp_path / "mine.toml"
    path.write_text(
        '[[rule]]\npattern = "*.layers.1.mlp.experts.*"\nbits = 6\n'
        '[[rule]]\npattern = "*.experts.*"\nbits = 3\n'
        '[[rule]]\npattern = "lm_head"\nkeep = true\n'
        '[[rule]]\npattern = "*"\nbits = 8\n'
    )
    target = str(tmp_path / "mlx")
    assert main(["--hf-path", str(fp8_directory()), "--mlx-path", target, "--recipe", str(path), "--quiet"]) == 0
    model, _ = load(target)
    assert [model.layers[layer].mlp.switch_mlp.up_proj.bits for layer in (1, 2, 3)] == [6, 3, 3]
    assert not hasattr(model.lm_head, "scales")
