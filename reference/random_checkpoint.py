"""Writes a checkpoint of a real shape with random weights, without torch and in little memory.

    python reference/random_checkpoint.py --shape 9b --dtype bf16 --tokenizer DIR --out DIR

Loading, memory and speed do not depend on what the weights are, so they can be measured with this. Every tensor is a
stretch of one block of normal numbers, scaled so that activations stay of order one; gates are random and not zero,
norms near one. Tokenizer files are copied from the given directory. Shapes and key names are those of the published
checkpoints; `small` is a shape for trying things out.
"""

import argparse
import json
import math
import shutil
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK = 1 << 24
DTYPES = {"bf16": ("BF16", "bfloat16", 2), "f16": ("F16", "float16", 2), "f32": ("F32", "float32", 4)}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json",
)
VISION_H = dict(embed_dim=1280, image_size=224, patch_size=14, num_hidden_layers=32, num_attention_heads=16, intermediate_size=5120)
PERCEIVER_H = dict(resampler_n_latents=64, resampler_depth=6, resampler_n_heads=16, resampler_head_dim=96)
SHAPES = {
    "9b": dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-6,
        cross_layer_interval=4, vision_config=VISION_H, perceiver_config=PERCEIVER_H,
    ),
    "80b": dict(
        hidden_size=8192, intermediate_size=22016, num_hidden_layers=80, num_attention_heads=64, rms_norm_eps=1e-5,
        cross_layer_interval=4, vision_config=VISION_H, perceiver_config=PERCEIVER_H,
    ),
    "small": dict(
        hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8, rms_norm_eps=1e-6,
        cross_layer_interval=4,
        vision_config={**VISION_H, "embed_dim": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512},
        perceiver_config=dict(resampler_n_latents=64, resampler_depth=2, resampler_n_heads=4, resampler_head_dim=32),
    ),
}


@dataclass
class Tensor:
    """A tensor of the checkpoint: values are mean + std · normal."""

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def tensors(config: dict) -> list[Tensor]:
    """Every key of the published checkpoints, in the order of the forward pass."""
    found = []

    def add(name: str, *shape: int, mean: float = 0.0, std: float = 0.05) -> None:
        found.append(Tensor(name, shape, mean, std))

    def linear(name: str, outputs: int, inputs: int, bias: bool = False, gain: float = 1.0) -> None:
        add(f"{name}.weight", outputs, inputs, std=gain / math.sqrt(inputs))
        if bias:
            add(f"{name}.bias", outputs)

    def norm(name: str, width: int, bias: bool = False) -> None:
        add(f"{name}.weight", width, mean=1.0)
        if bias:
            add(f"{name}.bias", width)

    def gated_mlp_and_norms(name: str) -> None:
        linear(f"{name}.mlp.gate_proj", inner, hidden)
        linear(f"{name}.mlp.up_proj", inner, hidden)
        linear(f"{name}.mlp.down_proj", hidden, inner)
        norm(f"{name}.input_layernorm", hidden)
        norm(f"{name}.post_attention_layernorm", hidden)

    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    vision, perceiver = config["vision_config"], config["perceiver_config"]
    width, mlp = vision["embed_dim"], vision["intermediate_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    head_dim = perceiver["resampler_head_dim"]
    resampler_inner = perceiver["resampler_n_heads"] * head_dim
    additional = config["additional_vocab_size"]

    add("model.embed_tokens.weight", config["vocab_size"], hidden, std=0.5)
    add("model.embed_tokens.additional_embedding.weight", additional, hidden, std=0.5)
    tower = "model.vision_model"
    add(f"{tower}.embeddings.class_embedding", width, std=0.5)
    patch = vision["patch_size"]
    add(f"{tower}.embeddings.patch_embedding.weight", width, 3, patch, patch, std=1 / math.sqrt(3 * patch * patch))
    add(f"{tower}.embeddings.position_embedding.weight", patches + 1, width, std=0.5)
    norm(f"{tower}.pre_layrnorm", width, bias=True)
    for index in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{index}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{projection}", width, width, bias=True)
        norm(f"{layer}.layer_norm1", width, bias=True)
        norm(f"{layer}.layer_norm2", width, bias=True)
        linear(f"{layer}.mlp.fc1", mlp, width, bias=True)
        linear(f"{layer}.mlp.fc2", width, mlp, bias=True)
    norm(f"{tower}.post_layernorm", width, bias=True)

    resampler = "model.perceiver_resampler"
    add(f"{resampler}.latents", perceiver["resampler_n_latents"], width, std=0.5)
    for index in range(perceiver["resampler_depth"]):
        attention = f"{resampler}.blocks.{index}.0"
        norm(f"{attention}.context_layer_norm", width, bias=True)
        norm(f"{attention}.latents_layer_norm", width, bias=True)
        norm(f"{attention}.q_layer_norm", head_dim, bias=True)
        norm(f"{attention}.k_layer_norm", head_dim, bias=True)
        for projection in ("q_proj", "k_proj", "v_proj"):
            linear(f"{attention}.{projection}", resampler_inner, width)
        linear(f"{attention}.output_proj", width, resampler_inner)
        norm(f"{resampler}.blocks.{index}.1.ln", width, bias=True)
        linear(f"{resampler}.blocks.{index}.1.fc", 4 * width, width)
        linear(f"{resampler}.blocks.{index}.1.c_proj", width, 4 * width)
    norm(f"{resampler}.layer_norm", width, bias=True)

    interval = config["cross_layer_interval"]
    for index in range(layers):
        if index % interval == 0:
            block = f"model.gated_cross_attn_layers.{index // interval}"
            add(f"{block}.alpha_cross_attn", 1, mean=0.6)
            add(f"{block}.alpha_dense", 1, mean=-0.4)
            linear(f"{block}.cross_attn.q_proj", hidden, hidden)
            linear(f"{block}.cross_attn.k_proj", hidden, width)
            linear(f"{block}.cross_attn.v_proj", hidden, width)
            linear(f"{block}.cross_attn.o_proj", hidden, hidden)
            norm(f"{block}.cross_attn.q_layer_norm", hidden // config["num_attention_heads"])
            norm(f"{block}.cross_attn.k_layer_norm", hidden // config["num_attention_heads"])
            gated_mlp_and_norms(block)
        layer = f"model.layers.{index}"
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear(f"{layer}.self_attn.{projection}", hidden, hidden)
        gated_mlp_and_norms(layer)

    norm("model.norm", hidden)
    linear("lm_head", config["vocab_size"], hidden, gain=1.5)
    linear("lm_head.additional_fc", additional, hidden, gain=1.5)
    return found


def shards(found: list[Tensor], item: int, limit: int) -> list[list[Tensor]]:
    parts, size = [[]], 0
    for tensor in found:
        bytes = tensor.elements * item
        if parts[-1] and size + bytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += bytes
    return parts


class Filler:
    """Bytes of tensors out of one block of normal numbers, scaled and converted once for each mean and std."""

    def __init__(self, dtype: str, seed: int):
        self.dtype = dtype
        self.normal = np.random.default_rng(seed).standard_normal(BLOCK, dtype=np.float32)
        self.scaled: dict[tuple[float, float], np.ndarray] = {}

    def write(self, file, tensor: Tensor) -> None:
        if tensor.elements < 1 << 20:
            # Small ones are converted by themselves: caching a block for each of their scales would cost memory.
            start = zlib.crc32(tensor.name.encode()) % (BLOCK - tensor.elements)
            values = tensor.mean + tensor.std * self.normal[start : start + tensor.elements]
            file.write(self._convert(values).data)
            return
        key = (tensor.mean, tensor.std)
        if key not in self.scaled:
            # A 32 MB block each; real shapes have about ten scales.
            self.scaled[key] = self._convert(tensor.mean + tensor.std * self.normal)
        block = self.scaled[key]
        left, start = tensor.elements, zlib.crc32(tensor.name.encode()) % BLOCK
        while left:
            part = block[start : start + left]
            file.write(part.data)
            left -= part.size
            # A step that shares no factor with usual row lengths keeps rows of one tensor apart.
            start = 0 if start else 7919

    def _convert(self, values: np.ndarray) -> np.ndarray:
        values = values.astype("<f4")
        if self.dtype == "f32":
            return values
        if self.dtype == "f16":
            return values.astype("<f2")
        bits = values.view("<u4")
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even; no value is near overflow
        return (rounded >> 16).astype("<u2")


def write_shard(path: Path, part: list[Tensor], dtype: str, filler: Filler) -> None:
    name, _, item = DTYPES[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for tensor in part:
        end = offset + tensor.elements * item
        header[tensor.name] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=1 << 20) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in part:
            filler.write(file, tensor)


def configuration(shape: str, dtype: str, additional: int) -> dict:
    sizes = SHAPES[shape]
    return {
        "architectures": ["IdeficsForVisionText2Text"],
        "model_type": "idefics",
        "vocab_size": 32000,
        "additional_vocab_size": additional,
        **sizes,
        "hidden_act": "silu",
        "dropout": 0.0,
        "initializer_range": 0.02,
        "alpha_initializer": "zeros",
        "alpha_type": "float",
        "alphas_initializer_range": 0.0,
        "qk_layer_norms": True,
        "use_resampler": True,
        "freeze_text_layers": False,
        "freeze_vision_layers": False,
        "freeze_lm_head": False,
        "freeze_text_module_exceptions": [],
        "freeze_vision_module_exceptions": [],
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "max_sequence_length": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_cache": True,
        "torch_dtype": DTYPES[dtype][1],
        "vision_config": {"model_type": "idefics", "hidden_act": "gelu", **sizes["vision_config"]},
        "perceiver_config": {
            "model_type": "idefics", "use_resampler": True, "qk_layer_norms_perceiver": True, **sizes["perceiver_config"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="9b")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory whose tokenizer files are copied")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-shard-gb", type=float, default=9.8, help="in units of 10^9 bytes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    added = json.loads((arguments.tokenizer / "added_tokens.json").read_text())
    config = configuration(arguments.shape, arguments.dtype, len(added))
    found = tensors(config)
    item = DTYPES[arguments.dtype][2]
    parts = shards(found, item, int(arguments.max_shard_gb * 1e9))
    total = sum(tensor.elements for tensor in found)

    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    filler = Filler(arguments.dtype, arguments.seed)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        write_shard(arguments.out / name, part, arguments.dtype, filler)
        weight_map |= {tensor.name: name for tensor in part}
        print(f"{name}: {len(part)} tensors, {(arguments.out / name).stat().st_size / 1e9:.2f} GB")

    def write_json(name: str, value: dict) -> None:
        (arguments.out / name).write_text(json.dumps(value, indent=2) + "\n")

    if len(parts) > 1:
        metadata = {"total_parameters": total, "total_size": total * item}
        write_json("model.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    write_json("config.json", config)
    write_json("generation_config.json", {
        "_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    })
    write_json("preprocessor_config.json", {
        "image_num_channels": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_size": config["vision_config"]["image_size"],
        "image_processor_type": "IdeficsImageProcessor",
        "processor_class": "IdeficsProcessor",
    })
    for name in TOKENIZER_FILES:
        if (arguments.tokenizer / name).exists():
            shutil.copy(arguments.tokenizer / name, arguments.out / name)
    print(f"{len(found)} tensors, {total:,} parameters, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
