"""hub_configs/recipes: files that train.py --config reads.

train.py sets every key of such a file as an attribute, known or not, so that a misspelt one trains without a word.
train_options.txt holds the names and kinds of its parser's options, from timm's repository at commit aa4b5850.
"""

from pathlib import Path

import pytest
import timm
import yaml
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.optim import get_optimizer_info

from timm_halonet.hub import hub_configs_dir
from timm_halonet.models.halonet import HaloNet, cfgs

OPTIONS = dict(
    line.split() for line in (Path(__file__).parents[1] / "support" / "train_options.txt").read_text().splitlines()
)
RECIPES = {path.stem: path for path in sorted((hub_configs_dir() / "recipes").glob("*.yaml"))}


def is_kind(value: object, kind: str) -> bool:
    """Whether a YAML value is what the parser's option would hold; 1e-3 without a point is a string in YAML."""
    if kind.endswith("s") and kind != "mapping":
        return isinstance(value, list) and bool(value) and all(is_kind(x, kind[:-1]) for x in value)
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "mapping":
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    types = {"int": (int,), "float": (int, float), "str": (str,)}[kind]
    return isinstance(value, types) and not isinstance(value, bool)


def unaccepted(recipe: dict) -> list[str]:
    """The keys that train.py's parser does not have, or holds another kind of value for."""
    return [key for key, value in recipe.items() if key not in OPTIONS or not is_kind(value, OPTIONS[key])]


def test_recipes_are_there():
    for_1k = {name for name in RECIPES if "." not in name}
    assert for_1k == {f"halonet_h{n}" for n in range(8)}
    pretraining = {name for name in RECIPES if name.endswith(".in21k")}
    assert pretraining and for_1k | pretraining | {f"{name}_ft_in1k" for name in pretraining} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    text = RECIPES[name].read_text()
    recipe = yaml.safe_load(text)
    assert unaccepted(recipe) == []
    keys = [line.partition(":")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(keys) == len(set(keys)) == len(recipe)  # YAML takes the last of two

    model = name.partition(".")[0]
    assert recipe["model"] == model and timm.is_model(model)
    kwargs = recipe.get("model_kwargs", {})
    built = timm.create_model(
        model, num_classes=recipe["num_classes"], drop_path_rate=recipe["drop_path"], device="meta", **kwargs
    )
    assert isinstance(built, HaloNet) and built.num_classes == recipe["num_classes"]
    # train.py takes --pretrained-path only together with pretrained
    assert recipe.get("pretrained", False) == name.endswith("_ft_in1k")
    if name.endswith(".in21k"):
        assert recipe["img_size"] <= cfgs[model].image_size  # pretraining may be smaller: weights fit every size
        # what the fine-tuning builds is the model whose weights it gets
        assert yaml.safe_load(RECIPES[f"{name}_ft_in1k"].read_text()).get("model_kwargs", {}) == kwargs
    else:
        assert (recipe["num_classes"], recipe["img_size"]) == (1000, cfgs[model].image_size)

    get_optimizer_info(recipe["opt"])  # raises for an unknown one
    # train.py turns lr_base into lr for the global batch, which the file's first comment names
    batch = 8 * recipe["batch_size"] * recipe.get("grad_accum_steps", 1)
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert text.startswith("# ") and "Untested at scale" in comment
    assert f"global batch of {batch} = 8 processes x batch_size {recipe['batch_size']}" in comment
    assert batch == recipe["lr_base_size"] and "lr" not in recipe


@pytest.mark.parametrize("aa", sorted({yaml.safe_load(path.read_text())["aa"] for path in RECIPES.values()}))
@pytest.mark.parametrize("drawn", [-100.0, 100.0])
def test_every_augmentation_runs_at_its_ends(monkeypatch, aa, drawn):
    """At m9, one photo in 600 is to be posterized at magnitude 10, for which timm asks Pillow for 0 bits."""
    monkeypatch.setattr("random.gauss", lambda mean, std: drawn)
    photo = Image.new("RGB", (16, 16), "#406080")
    transform = rand_augment_transform(aa, {})
    assert len(transform.ops) > 10
    for op in transform.ops:
        op.prob = 1.0
        assert op(photo).size == photo.size


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.1},
        {"lr": "1e-3"},
        {"amp": 1},
        {"amp": "yes"},
        {"epochs": 3.5},
        {"epochs": True},
        {"scale": 0.5},
        {"scale": [0.5, "1"]},
        {"model_kwargs": ["base_width=128"]},
        {"model": None},
    ],
)
def test_a_wrong_recipe_is_found(wrong):
    assert unaccepted({**yaml.safe_load(RECIPES["halonet_h0"].read_text()), **wrong}) == list(wrong)
