"""Writes a checkpoint of a real shape with random weights, without torch and in little memory.

    python reference/random_checkpoint.py --shape 9b --dtype bf16 --tokenizer DIR --out DIR

Loading, memory and speed do not depend on what the weights are, so they can be measured with this. Every tensor is a
stretch of one block of normal numbers, scaled so that activations stay of order one; gates are random and not zero,
norms near one. Tokenizer files are copied from the given directory. Shapes and key names are those of the published
checkpoints; `small` is a shape for trying things out. With `--dtype nf4` the linear layers of the text model and the
gated blocks are codes and scales as bitsandbytes stores them, the rest is bf16; `--layers` makes it as large as wanted.
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
DTYPES = {
    "bf16": ("BF16", "bfloat16", 2), "f16": ("F16", "float16", 2), "f32": ("F32", "float32", 4),
    "nf4": ("BF16", "bfloat16", 2),
}
# The 16 values of NF4 (QLoRA, Dettmers et al., 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
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

    def is_packed(self, dtype: str) -> bool:
        """Whether NF4 is for this one: linear layers of the text model and the gated blocks."""
        blocks = ("model.layers.", "model.gated_cross_attn_layers.")
        return dtype == "nf4" and self.name.startswith(blocks) and len(self.shape) == 2

    def pieces(self, dtype: str) -> list[tuple[str, str, list[int], int]]:
        """The stored tensors that it becomes: name, type, shape, bytes."""
        if not self.is_packed(dtype):
            name, _, item = DTYPES[dtype]
            return [(self.name, name, list(self.shape), self.elements * item)]
        state = len(quant_state(self))
        return [
            (f"{self.name}.quant_map", "F32", [16], 64),
            (f"{self.name}.absmax", "F32", [self.elements // 64], self.elements // 16),
            (self.name, "U8", [self.elements // 2, 1], self.elements // 2),
            (f"{self.name}.quant_state.bitsandbytes__nf4", "U8", [state], state),
        ]

    def bytes(self, dtype: str) -> int:
        return sum(size for *_, size in self.pieces(dtype))


def quant_state(tensor: Tensor) -> bytes:
    """What bitsandbytes keeps beside a weight, padded so that what follows is aligned."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(tensor.shape)}
    text = json.dumps(state).encode()
    return text + b" " * (-len(text) % 64)


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


def shards(found: list[Tensor], dtype: str, limit: int) -> list[list[Tensor]]:
    parts, size = [[]], 0
    for tensor in found:
        bytes = tensor.bytes(dtype)
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
        if tensor.is_packed(self.dtype):
            self._write_packed(file, tensor)
        elif tensor.elements < 1 << 20:
            # Small ones are converted by themselves: caching a block for each of their scales would cost memory.
            start = zlib.crc32(tensor.name.encode()) % (BLOCK - tensor.elements)
            values = tensor.mean + tensor.std * self.normal[start : start + tensor.elements]
            file.write(self._convert(values).data)
        else:
            self._write_large(file, tensor)

    def _write_large(self, file, tensor: Tensor) -> None:
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

    def _write_packed(self, file, tensor: Tensor) -> None:
        """Random codes under one scale: the standard deviation of the 16 values, taken evenly, is 0.55."""
        file.write(np.array(NF4, "<f4").data)
        file.write(np.full(tensor.elements // 64, tensor.std / 0.55, "<f4").data)
        codes, left = self.normal.view(np.uint8), tensor.elements // 2
        start = zlib.crc32(tensor.name.encode()) % (1 << 20)
        while left:
            # The lower bytes of the numbers are as good as random; the upper ones are not, but nor does it matter.
            part = codes[start : start + left]
            file.write(part.data)
            left -= part.size
            start = 0
        file.write(quant_state(tensor))

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
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, type_name, shape, size in (piece for tensor in part for piece in tensor.pieces(dtype)):
        header[name] = {"dtype": type_name, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with path.open("wb", buffering=1 << 20) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in part:
            filler.write(file, tensor)


def configuration(shape: str, dtype: str, additional: int, layers: int | None) -> dict:
    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    packed = {"quantization_config": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": ["lm_head", "model.vision_model", "model.perceiver_resampler"],
    }}
    return {
        **(packed if dtype == "nf4" else {}),
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
    parser.add_argument("--layers", type=int, help="of the text model, instead of the shape's")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    added = json.loads((arguments.tokenizer / "added_tokens.json").read_text())
    config = configuration(arguments.shape, arguments.dtype, len(added), arguments.layers)
    found = tensors(config)
    parts = shards(found, arguments.dtype, int(arguments.max_shard_gb * 1e9))
    total = sum(tensor.elements for tensor in found)

    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    filler = Filler(arguments.dtype, arguments.seed)
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors" if len(parts) > 1 else "model.safetensors"
        write_shard(arguments.out / name, part, arguments.dtype, filler)
        weight_map |= {piece[0]: name for tensor in part for piece in tensor.pieces(arguments.dtype)}
        print(f"{name}: {len(part)} tensors, {(arguments.out / name).stat().st_size / 1e9:.2f} GB")

    def write_json(name: str, value: dict) -> None:
        (arguments.out / name).write_text(json.dumps(value, indent=2) + "\n")

    if len(parts) > 1:
        size = sum(tensor.bytes(arguments.dtype) for tensor in found)
        metadata = {"total_parameters": total, "total_size": size}
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
