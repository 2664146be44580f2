"""Text models and vision towers to build from, in the directories that transformers writes, and what they compute.

`init/llama-gqa/`: `LlamaForCausalLM` in f32, one file: two heads share each key and value head, rope_theta 50000,
rms_norm_eps 1e-5, embeddings tied to the head, the tiny tokenizer without IDEFICS's added tokens.
`init/llama-mha/`: bf16, several shards, plain attention, more rows than the tokenizer has tokens; no `tokenizer.json`.
`init/clip-vision/`: `CLIPVisionModel` in f32, GELU. `init/clip/`: `CLIPModel`, both halves, in f16, quick GELU.

`init/expected.safetensors`: `input_ids [T]`; for each LLaMA L `L.logits [T, V]`; for each tower C
`C.features [1, P, E]`, of `golden_fill("pixel_values", [1, 3, 16, 16])`, computed in f32 from the stored weights.
"""

import json
import shutil

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from .common import FIXTURES, rng, write_tensors
from .golden import pixel_values
from .tiny import IMAGE_MEAN, IMAGE_STD, VOCAB_SIZE
from .tokenizer import train_sentencepiece, write_tokenizer

DIRECTORY = FIXTURES / "init"
INPUT_IDS = [1, 5, 280, 301, 447, 17, 2, 99, 60]


def random_weights(model, name: str):
    state = {}
    for key, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.from_numpy(rng(f"{name}/{key}").standard_normal(tuple(value.shape))).float()
        if value.dim() == 1 and key.endswith(".weight"):
            value = 1 + 0.2 * noise
        elif value.dim() <= 1:
            value = 0.1 * noise
        elif "embed" in key:
            value = 0.7 * noise
        else:
            value = noise / value[0].numel() ** 0.5
        state[key] = value
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.float().eval()


def write_llama(name: str, with_json: bool, dtype: torch.dtype, shards: str, **config) -> None:
    common = dict(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, max_position_embeddings=256, hidden_act="silu",
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    model = random_weights(LlamaForCausalLM(LlamaConfig(**{**common, **config})), f"init/{name}")
    directory = DIRECTORY / name
    directory.mkdir(parents=True)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.to(dtype).save_pretrained(directory, max_shard_size=shards)
    write_tokenizer(directory, train_sentencepiece(VOCAB_SIZE), [], with_json)
    (directory / "added_tokens.json").unlink()
    path = directory / "special_tokens_map.json"
    tokens = json.loads(path.read_text())
    del tokens["additional_special_tokens"]
    path.write_text(json.dumps(tokens, indent=2) + "\n")


def write_tower(name: str, model, dtype: torch.dtype) -> None:
    directory = DIRECTORY / name
    random_weights(model, f"init/{name}").to(dtype).save_pretrained(directory)
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


@torch.no_grad()
def write_unimodal() -> None:
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    write_llama(
        "llama-gqa", True, torch.float32, "1GB", vocab_size=VOCAB_SIZE, num_hidden_layers=3, num_key_value_heads=2,
        rms_norm_eps=1e-5, rope_theta=50000.0, tie_word_embeddings=True,
    )
    write_llama(
        "llama-mha", False, torch.bfloat16, "30KB", vocab_size=VOCAB_SIZE + 16, num_hidden_layers=2,
        num_key_value_heads=4, rms_norm_eps=1e-6,
    )
    vision = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=16, patch_size=8,
    )
    write_tower("clip-vision", CLIPVisionModel(CLIPVisionConfig(**vision, hidden_act="gelu")), torch.float32)
    text = dict(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=12,
    )
    both = CLIPConfig(
        vision_config={**vision, "hidden_act": "quick_gelu"}, text_config=text, projection_dim=8,
    )
    write_tower("clip", CLIPModel(both), torch.float16)

    expected = {"input_ids": torch.tensor(INPUT_IDS)}
    for name in ("llama-gqa", "llama-mha"):
        model = LlamaForCausalLM.from_pretrained(DIRECTORY / name, dtype=torch.float32).eval()
        expected[f"{name}.logits"] = model(torch.tensor([INPUT_IDS]), use_cache=False).logits[0]
    picture = pixel_values("pixel_values", (1, 3, 16, 16))
    tower = CLIPVisionModel.from_pretrained(DIRECTORY / "clip-vision", dtype=torch.float32).eval()
    expected["clip-vision.features"] = tower(picture).last_hidden_state
    tower = CLIPModel.from_pretrained(DIRECTORY / "clip", dtype=torch.float32).eval().vision_model
    expected["clip.features"] = tower(picture).last_hidden_state
    write_tensors(DIRECTORY / "expected.safetensors", expected)
