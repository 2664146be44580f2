"""Two tiny random checkpoints, written by transformers' own `save_pretrained`.

`tiny`: instruct form, f32, one file; resampler, query and key norms, a gated block before every second layer.
`tiny-base`: base form, bf16, several shards with an index; no resampler, gates per channel before every layer, no
query and key norms, and `tokenizer.model` without `tokenizer.json`.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, IdeficsConfig, IdeficsForVisionText2Text

from .common import FIXTURES, SEED, rng
from .tokenizer import BASE_TOKENS, INSTRUCT_TOKENS, load_tokenizer, train_sentencepiece, write_tokenizer

VOCAB_SIZE = 448
IMAGE_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGE_STD = [0.26862954, 0.26130258, 0.27577711]


@dataclass
class Tiny:
    """A checkpoint with what the other writers need of it."""

    name: str
    model: IdeficsForVisionText2Text
    tokenizer: object
    added_tokens: list[str]


def tiny_config() -> IdeficsConfig:
    return IdeficsConfig(
        vocab_size=VOCAB_SIZE,
        additional_vocab_size=len(INSTRUCT_TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        rms_norm_eps=1e-6,
        cross_layer_interval=2,
        qk_layer_norms=True,
        use_resampler=True,
        alpha_type="float",
        freeze_text_layers=False,
        freeze_vision_layers=False,
        max_position_embeddings=128,
        vision_config=dict(
            embed_dim=32, image_size=32, patch_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, hidden_act="gelu",
        ),
        perceiver_config=dict(
            use_resampler=True, resampler_n_latents=8, resampler_depth=2, resampler_n_heads=2,
            resampler_head_dim=16, qk_layer_norms_perceiver=True,
        ),
    )


def tiny_base_config() -> IdeficsConfig:
    return IdeficsConfig(
        vocab_size=VOCAB_SIZE,
        additional_vocab_size=len(BASE_TOKENS),
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        rms_norm_eps=1e-5,
        cross_layer_interval=1,
        qk_layer_norms=False,
        use_resampler=False,
        alpha_type="vector",
        freeze_text_layers=False,
        freeze_vision_layers=False,
        max_position_embeddings=128,
        vision_config=dict(
            embed_dim=48, image_size=32, patch_size=16, num_hidden_layers=1, num_attention_heads=3,
            intermediate_size=64, hidden_act="gelu",
        ),
    )


def random_model(config: IdeficsConfig, name: str, seed: int = SEED) -> IdeficsForVisionText2Text:
    """Every parameter random, in sizes that keep activations of order one.

    Norms, biases and gates are random too: with the reference's initial values (1, 0, 0) a test could not tell
    whether they are used. The head's rows of byte tokens are small, so that generated text is mostly readable.
    """
    model = IdeficsForVisionText2Text(config).float().eval()
    state = {}
    for key, value in model.state_dict().items():
        generator = rng(f"{name}/{key}", seed)
        noise = torch.from_numpy(generator.standard_normal(tuple(value.shape))).float()
        if "alpha_" in key:
            sign = 1 if generator.random() < 0.5 else -1
            value = sign * (0.6 + 0.2 * noise.clamp(-2, 2))
        elif value.dim() == 1 and key.endswith(".weight"):
            value = 1 + 0.2 * noise
        elif key.endswith(".bias"):
            value = 0.1 * noise
        elif any(part in key for part in ("embed_tokens", "class_embedding", "position_embedding", "latents")):
            value = 0.7 * noise
        elif key.startswith("lm_head"):
            value = 1.5 * noise / math.sqrt(value.shape[1])
            if value.shape[0] == VOCAB_SIZE:
                value[3:259] *= 0.3
        else:
            value = noise / math.sqrt(value[0].numel())
        state[key] = value
    model.load_state_dict(state)
    return model


def write_checkpoint(
    directory: Path, model: IdeficsForVisionText2Text, sentencepiece: bytes, added_tokens: list[str], **how
) -> None:
    """All files of a checkpoint directory. `how`: dtype, max_shard_size, with_tokenizer_json."""
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    to_save = model.to(how.get("dtype", torch.float32))
    to_save.save_pretrained(directory, max_shard_size=how.get("max_shard_size", "1GB"))
    write_tokenizer(directory, sentencepiece, added_tokens, how.get("with_tokenizer_json", True))
    preprocessor = {
        "image_num_channels": 3,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "image_size": model.config.vision_config.image_size,
        "image_processor_type": "IdeficsImageProcessor",
        "processor_class": "IdeficsProcessor",
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")


def write_tiny() -> Tiny:
    sentencepiece = train_sentencepiece(VOCAB_SIZE)
    directory = FIXTURES / "tiny"
    write_checkpoint(directory, random_model(tiny_config(), "tiny"), sentencepiece, INSTRUCT_TOKENS)
    return _reload("tiny", sentencepiece, INSTRUCT_TOKENS)


def write_tiny_base() -> Tiny:
    sentencepiece = train_sentencepiece(VOCAB_SIZE)
    directory = FIXTURES / "tiny-base"
    write_checkpoint(
        directory, random_model(tiny_base_config(), "tiny-base"), sentencepiece, BASE_TOKENS,
        dtype=torch.bfloat16, max_shard_size="80KB", with_tokenizer_json=False,
    )
    return _reload("tiny-base", sentencepiece, BASE_TOKENS)


def _reload(name: str, sentencepiece: bytes, added_tokens: list[str]) -> Tiny:
    """What was written, in f32: the weights of tiny-base are those after rounding to bf16."""
    model = IdeficsForVisionText2Text.from_pretrained(FIXTURES / name, dtype=torch.float32).eval()
    return Tiny(name, model, load_tokenizer(sentencepiece, added_tokens), added_tokens)
