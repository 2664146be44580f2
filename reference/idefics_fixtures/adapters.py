"""LoRA adapters that PEFT wrote for `fixtures/tiny`, and what PEFT computes with them.

`adapters/NAME/` are directories as PEFT saves them:

    regex   target modules by a regular expression, ranks and alphas by pattern, rank-stabilised scaling
    list    target modules by name, in all parts of the model
    saved   a list, and a module that is trained whole (`modules_to_save`)

`adapters/expected.safetensors`, for the picture `golden_fill("pixel_values", [1, 3, 32, 32])`:

    input_ids [T]   image_index [T], -1 for none
    CASE.logits [T, V + A], CASE being `base`, an adapter's name, `both` (`regex` and `list`) or `weighted` (`regex`
    times 0.5 and `list` times -1.25)
    merged.NAME, the weights that `merge_and_unload` of `regex` changes
"""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from .common import FIXTURES, rng, write_tensors
from .golden import pixel_values
from .tiny import Tiny

DIRECTORY = FIXTURES / "adapters"

ADAPTERS = {
    "regex": dict(
        r=4, lora_alpha=6, use_rslora=True,
        target_modules=r".*(\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)|cross_attn\.(k|o)_proj)",
        rank_pattern={"v_proj": 2, r"gated_cross_attn_layers\.0\.cross_attn\.k_proj": 3},
        alpha_pattern={"down_proj": 12},
    ),
    "list": dict(r=2, lora_alpha=3, target_modules=["q_proj", "fc1", "c_proj", "output_proj", "gate_proj"]),
    "saved": dict(r=2, lora_alpha=2, target_modules=["up_proj"], modules_to_save=["model.norm"]),
}
WEIGHTED = {"regex": 0.5, "list": -1.25}
# Two before the picture, which stands at token 3.
INPUT_IDS = [1, 30, 448, 449, 448, 280, 300, 17, 450, 99]
IMAGE_INDEX = [-1, -1, -1, 0, 0, 0, 0, 0, 0, 0]


def with_adapter(model, name: str, **options):
    """A PEFT model whose factors A are random; B is zero, as in every new adapter."""
    model = get_peft_model(model, LoraConfig(**{"bias": "none", **options}))
    for key, parameter in model.named_parameters():
        if "lora_A" in key:
            noise = rng(f"{name}/{key}").uniform(-1, 1, tuple(parameter.shape))
            # The bound of kaiming_uniform_ with a = √5, PEFT's choice.
            parameter.data = torch.from_numpy(noise).float() / parameter.shape[1] ** 0.5
    return model


def save_adapter(model: PeftModel, directory: Path) -> None:
    """As PEFT saves it, less its model card and this machine's path."""
    shutil.rmtree(directory, ignore_errors=True)
    for config in model.peft_config.values():
        config.base_model_name_or_path = "tiny"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the base model's vocabulary
        model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    # A set in PEFT, in no order of its own.
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def write_adapters(tiny: Tiny) -> None:
    expected = {
        "input_ids": torch.tensor(INPUT_IDS),
        "image_index": torch.tensor(IMAGE_INDEX),
        "base.logits": logits(tiny.model, tiny),
    }
    for name, options in ADAPTERS.items():
        model = with_adapter(copy.deepcopy(tiny.model), f"adapters/{name}", **options).eval()
        for key, parameter in model.named_parameters():
            noise = torch.from_numpy(rng(f"adapters/{name}/{key}/trained").standard_normal(tuple(parameter.shape)))
            if "lora_B" in key:
                parameter.data = 0.3 * noise.float()
            if "modules_to_save" in key:
                parameter.data = parameter.data + 0.3 * noise.float()
        save_adapter(model, DIRECTORY / name)

    for name in ADAPTERS:
        expected[f"{name}.logits"] = logits(load(tiny, [name]), tiny)
    expected["both.logits"] = logits(load(tiny, ["regex", "list"]), tiny)
    weighted = load(tiny, list(WEIGHTED))
    for module in weighted.modules():
        if isinstance(module, LoraLayer):
            for name in module.scaling:
                module.scaling[name] *= WEIGHTED[name]
    expected["weighted.logits"] = logits(weighted, tiny)

    before = tiny.model.state_dict()
    for key, value in load(tiny, ["regex"]).merge_and_unload().state_dict().items():
        if not torch.equal(value, before[key]):
            expected[f"merged.{key}"] = value
    matched = [name for name, _ in tiny.model.named_modules() if re.fullmatch(ADAPTERS["regex"]["target_modules"], name)]
    assert {f"merged.{name}.weight" for name in matched} == {key for key in expected if key.startswith("merged.")}
    write_tensors(DIRECTORY / "expected.safetensors", expected)


def load(tiny: Tiny, names: list[str]) -> PeftModel:
    """The directories, read back."""
    model = PeftModel.from_pretrained(copy.deepcopy(tiny.model), DIRECTORY / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(DIRECTORY / name, adapter_name=name)
    model.base_model.set_adapter(names if len(names) > 1 else names[0])
    return model.eval()


def logits(model, tiny: Tiny) -> torch.Tensor:
    """[T, V + A]"""
    side = tiny.model.config.vision_config.image_size
    mask = torch.tensor(IMAGE_INDEX)[None, :, None].ge(0).long()
    return model(
        input_ids=torch.tensor([INPUT_IDS]),
        attention_mask=torch.ones(1, len(INPUT_IDS), dtype=torch.long),
        pixel_values=pixel_values("pixel_values", (1, 1, 3, side, side)),
        image_attention_mask=mask,
        use_cache=False,
    ).logits[0]
