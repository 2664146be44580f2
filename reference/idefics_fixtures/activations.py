"""Intermediate activations by name, and logits, of the tiny checkpoints.

`expected.safetensors` holds, for the pictures `golden_fill("pixel_values", [3, 3, h, h])`:

    vision.embeddings, vision.layers.N, vision.out   [3, P, E]
    perceiver.blocks.N, perceiver.out                [3, L, E]     (with the resampler)

and for each case C, a sequence run alone and without padding:

    C.input_ids [T]   C.images [n], rows of pixel_values   C.image_attention_mask [T, max(n, 1)]
    C.cross.N.attn [T, D], the attention's output before the gate; C.cross.N.out, after the whole block
    C.layers.N.out [T, D]   C.norm [T, D]   C.logits [T, V + A]
    C.bf16_mean_distance [1], of the log-probabilities of the same model run in bf16, over all positions and tokens

`batch.*` is all cases left-padded into one batch, as the reference's processor does it, with the logits of the last
position, `batch.last_logits [B, V + A]`. `interpolated.HxW.{embeddings,out}` is the vision tower with
`interpolate_pos_encoding=True` on the picture `golden_fill("pixel_values.HxW", [1, 3, H, W])`.
"""

import copy

import torch
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)

from .common import FIXTURES, write_tensors
from .golden import pixel_values
from .tiny import Tiny

F, I, E = "<fake_token_around_image>", "<image>", "<end_of_utterance>"

# name, text, rows of pixel_values
CASES = {
    "tiny": [
        ("two_images", f"<s>User:{F}{I}{F}{I}{F}What is in this image?{E}\nAssistant:", [0, 1]),
        ("text_first", f"<s>Two children are playing. Question:{F}{I}{F}What color is the car? Answer:", [2]),
        ("text_only", "<s>There are 3 birds on the table. The weather is", []),
        ("after_eos", f"<s>{F}{I}{F}a dog</s> the sea was cold{F}{I}{F}a red hat", [1, 0]),
    ],
    "tiny-base": [
        ("two_images", f"<s>{F}{I}{F}This is a bird.{F}{I}{F}This is a", [1, 2]),
        ("text_first", f"<s>Image:{F}{I}{F}Caption:", [0]),
        ("text_only", "<s>An old fisherman", []),
    ],
}

# Same number of patches but not square; square; wide; tall; not multiples of the patch.
INTERPOLATED_SIZES = [(64, 16), (48, 48), (32, 56), (72, 40), (44, 60), (36, 36)]


class Recorder:
    """Outputs of named modules of one forward pass, without the batch dimension where it is 1."""

    def __init__(self, model):
        self.values = {}
        self.handles = []
        inner = model.model
        vision = inner.vision_model
        self._output(vision.embeddings, "vision.embeddings")
        for index, layer in enumerate(vision.encoder.layers):
            self._output(layer, f"vision.layers.{index}")
        self._output(vision, "vision.out")
        if model.config.use_resampler:
            perceiver = inner.perceiver_resampler
            for index in range(1, len(perceiver.blocks)):
                # The residual is added outside the block: its result is the next block's second argument.
                self._input(perceiver.blocks[index][0], f"perceiver.blocks.{index - 1}", 1)
            self._input(perceiver.layer_norm, f"perceiver.blocks.{len(perceiver.blocks) - 1}", 0)
            self._output(perceiver, "perceiver.out")
        for index, block in enumerate(inner.gated_cross_attn_layers):
            self._output(block.cross_attn, f"cross.{index}.attn")
            self._output(block, f"cross.{index}.out")
        for index, layer in enumerate(inner.layers):
            self._output(layer, f"layers.{index}.out")
        self._output(inner.norm, "norm")

    def _output(self, module, name):
        def hook(_module, _args, output):
            value = output if isinstance(output, torch.Tensor) else output[0]
            self.values[name] = value.detach()

        self.handles.append(module.register_forward_hook(hook))

    def _input(self, module, name, index):
        def hook(_module, args):
            self.values[name] = args[index].detach()

        self.handles.append(module.register_forward_pre_hook(hook))

    def take(self) -> dict[str, torch.Tensor]:
        values, self.values = self.values, {}
        return values

    def remove(self):
        for handle in self.handles:
            handle.remove()


def pictures(tiny: Tiny) -> torch.Tensor:
    side = tiny.model.config.vision_config.image_size
    return pixel_values("pixel_values", (3, 3, side, side))


def image_mask(tiny: Tiny, input_ids: torch.Tensor, images: int) -> torch.Tensor:
    """[B, T, max(images, 1)], by the reference processor's own functions."""
    if images == 0:
        return torch.zeros(*input_ids.shape, 1, dtype=torch.long)
    incremental, _ = image_attention_mask_for_packed_input_ids(input_ids, tiny.tokenizer, "pt")
    return incremental_to_binary_attention_mask(incremental, "pt", num_classes=images)


def case_inputs(tiny: Tiny, name: str) -> dict[str, torch.Tensor]:
    """What the reference's forward and generate take for one case."""
    text, images = next((text, images) for case, text, images in CASES[tiny.name] if case == name)
    input_ids = torch.tensor([tiny.tokenizer.encode(text, add_special_tokens=False)])
    all_pictures = pictures(tiny)
    pixels = all_pictures[images] if images else torch.zeros_like(all_pictures[:1])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": pixels[None],
        "image_attention_mask": image_mask(tiny, input_ids, len(images)),
    }


def batch_inputs(tiny: Tiny, names: list[str]) -> dict[str, torch.Tensor]:
    """Several cases left-padded with id 0 and with zero pictures."""
    rows = [case_inputs(tiny, name) for name in names]
    images = [next(images for case, _, images in CASES[tiny.name] if case == name) for name in names]
    length = max(row["input_ids"].shape[1] for row in rows)
    slots = max(1, *(len(row) for row in images))
    batch = {key: [] for key in rows[0]}
    for row, own in zip(rows, images):
        pad = (length - row["input_ids"].shape[1], 0)
        batch["input_ids"].append(torch.nn.functional.pad(row["input_ids"], pad))
        batch["attention_mask"].append(torch.nn.functional.pad(row["attention_mask"], pad))
        pixels = torch.zeros(1, slots, *row["pixel_values"].shape[2:])
        pixels[:, : row["pixel_values"].shape[1]] = row["pixel_values"]
        batch["pixel_values"].append(pixels)
        mask = torch.nn.functional.pad(row["image_attention_mask"], (0, slots - row["image_attention_mask"].shape[2]))
        batch["image_attention_mask"].append(torch.nn.functional.pad(mask, (0, 0, *pad)))
    return {key: torch.cat(value) for key, value in batch.items()}


@torch.no_grad()
def write_activations(tiny: Tiny) -> None:
    model = tiny.model
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    recorder = Recorder(model)
    expected = {}

    model.model.vision_model(pictures(tiny))
    expected.update(recorder.take())
    if model.config.use_resampler:
        model.model.perceiver_resampler(expected["vision.out"])
        expected.update(recorder.take())

    for name, _, images in CASES[tiny.name]:
        inputs = case_inputs(tiny, name)
        logits = model(**inputs, use_cache=False).logits
        recorded = recorder.take()
        _same(recorded["vision.out"][: len(images)], expected["vision.out"][images])
        kept = {key: value for key, value in recorded.items() if not key.startswith(("vision.", "perceiver."))}
        for key, value in {**kept, "logits": logits}.items():
            expected[f"{name}.{key}"] = value[0]
        in_bf16 = rounded(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}, use_cache=False).logits
        distance = (in_bf16.double().log_softmax(-1) - logits.double().log_softmax(-1)).abs().mean()
        expected[f"{name}.bf16_mean_distance"] = distance.float()[None]
        expected[f"{name}.input_ids"] = inputs["input_ids"][0]
        expected[f"{name}.image_attention_mask"] = inputs["image_attention_mask"][0]
        expected[f"{name}.images"] = torch.tensor(images, dtype=torch.long)

    names = [name for name, _, _ in CASES[tiny.name]]
    batch = batch_inputs(tiny, names)
    logits = model(**batch, use_cache=False).logits
    recorder.take()
    for index, name in enumerate(names):
        # Left padding changes nothing at real tokens (upstream's `test_left_padding_compatibility`).
        _same(logits[index, batch["attention_mask"][index] == 1], expected[f"{name}.logits"])
    expected["batch.last_logits"] = logits[:, -1]
    for key in ("input_ids", "attention_mask", "image_attention_mask"):
        expected[f"batch.{key}"] = batch[key]

    if tiny.name == "tiny":
        for height, width in INTERPOLATED_SIZES:
            picture = pixel_values(f"pixel_values.{height}x{width}", (1, 3, height, width))
            model.model.vision_model(picture, interpolate_pos_encoding=True)
            recorded = recorder.take()
            for part in ("embeddings", "out"):
                expected[f"interpolated.{height}x{width}.{part}"] = recorded[f"vision.{part}"]
    recorder.remove()
    write_tensors(FIXTURES / tiny.name / "expected.safetensors", expected)


def _same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape, (a.shape, b.shape)
    if a.numel():
        difference = (a - b).abs().max().item()
        assert difference < 2e-5, f"two runs of the reference differ by {difference}"
