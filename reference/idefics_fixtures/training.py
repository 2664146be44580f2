"""Gradients of the two golden configurations, and ten training steps of `fixtures/tiny` under torch's AdamW.

Every sequence is run alone and without padding; a loss is a sum over sequences divided by a count of all of them.
`targets[t]` is the id that position t must predict, -100 where nothing counts (already shifted).

`gradients-{A,B}.safetensors`, weights as `idefics_testing::write_golden_checkpoint` makes them. Rows r = 0, 1:

    rows.r.input_ids [T]   rows.r.image_index [T], the row's picture that a token sees, -1 for none
    rows.r.pixel_values [n, 3, 8, 8]   rows.r.targets.FORM [T]
    FORM.loss [1]   FORM.n_targets [1]   FORM.grad.NAME, of the parameter's shape
    rows.r.loss_sum.FORM [1], sum of the row's cross-entropies   rows.r.logits [T, V + A]

FORM is `masked` (transformers up to 4.50: all tokens but the first of each sequence, mean over them), `ignored` (-100
labels over base and additional vocabulary, mean over the rest; transformers crashes on its own form of it when there
are additional tokens, so it is torch's `cross_entropy` here) or `z` (`masked` plus 0.001 · logsumexp² averaged over
the same positions, m4's z-loss). The reference's parameters without any gradient, `post_layernorm`, are left out.

`steps.json`: `sequences` of token ids, pictures (`golden_fill(name, [3, 32, 32])`) and targets, `batches` of their
indices, one a step, and three runs with `losses` before each step, `grad_norms` before clipping, and the 2-norm that
each trained parameter has at the end (`final_norms`):

    full       every parameter but `post_layernorm`, which has no gradient
    backbones  the vision tower, the text layers, the final norm and the base embedding frozen (both freeze flags)
    lora       PEFT adapters that start as `lora-start/`; `lora-end/` is what comes out

Weight decay spares parameters whose name contains one of `no_decay` (m4's rule; a LoRA factor by its whole PEFT name).
"""

import copy

import torch
from torch.nn.functional import cross_entropy
from transformers import IdeficsForVisionText2Text

from .adapters import save_adapter, with_adapter
from .common import FIXTURES, rng, shortest, write_json, write_tensors
from .golden import golden_config, pixel_values, uniform
from .tiny import Tiny

DIRECTORY = FIXTURES / "training"
IGNORE = -100
Z_LOSS = 1e-3

# Token ids, the row's picture that each token sees, and the targets of the `ignored` form.
GOLDEN_ROWS = [
    ([1, 5, 41, 40, 7, 8, 9], [-1, -1, 0, 0, 1, 1, 1], [5, 41, IGNORE, 7, IGNORE, 9, IGNORE]),
    ([1, 5, 6, 40, 9], [-1, -1, -1, 0, 0], [IGNORE, 6, 40, IGNORE, IGNORE]),
]
# Of the specification: the loss with source and target unmasked, of transformers 4.57.6 and 5.23.0.
PUBLISHED_LOSS = {"A": 3.6924046, "B": 3.8715038}

NO_DECAY = ["bias", "alpha", "layernorm", "ln", "layer_norm", "perceiver_resampler"]
STEPS = 10
CLIP = 1.0
LORA = dict(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj"], bias="none")
RUNS = {"full": 2e-3, "backbones": 5e-3, "lora": 2e-2}


def golden_model(name: str) -> IdeficsForVisionText2Text:
    model = IdeficsForVisionText2Text(golden_config(name)).float()
    state = {}
    for key, value in model.state_dict().items():
        if "alpha_" in key:
            base, amp = 0.5, 0.1
        elif value.dim() == 1 and key.endswith(".weight"):
            base, amp = 1.0, 0.1
        else:
            base, amp = 0.0, 0.3
        state[key] = uniform(key, tuple(value.shape), base, amp)
    model.load_state_dict(state)
    # The library's defaults freeze both backbones.
    return model.requires_grad_(True)


def shifted(input_ids: list[int]) -> list[int]:
    """Every token but the first is a target."""
    return [*input_ids[1:], IGNORE]


def row_logits(model, input_ids: list[int], image_index: list[int], pictures: torch.Tensor) -> torch.Tensor:
    """[T, V + A]"""
    mask = torch.zeros(1, len(input_ids), max(1, len(pictures)), dtype=torch.long)
    for token, image in enumerate(image_index):
        if image >= 0:
            mask[0, token, image] = 1
    if len(pictures) == 0:
        side = model.config.vision_config.image_size
        pictures = torch.zeros(1, 3, side, side)
    return model(
        input_ids=torch.tensor([input_ids]),
        attention_mask=torch.ones(1, len(input_ids), dtype=torch.long),
        pixel_values=pictures[None],
        image_attention_mask=mask,
        use_cache=False,
    ).logits[0]


def loss_sum(logits: torch.Tensor, targets: list[int], z_loss: float = 0.0) -> torch.Tensor:
    targets = torch.tensor(targets)
    loss = cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    return loss + z_loss * logits[targets != IGNORE].logsumexp(-1).square().sum()


def write_gradients() -> None:
    pixels = pixel_values("pixel_values", (2, 2, 3, 8, 8))
    for name in ("A", "B"):
        model = golden_model(name)
        expected = {}
        rows = []
        for index, (input_ids, image_index, ignored) in enumerate(GOLDEN_ROWS):
            pictures = pixels[index, : max(image_index) + 1]
            targets = {"masked": shifted(input_ids), "ignored": ignored, "z": shifted(input_ids)}
            rows.append((input_ids, image_index, pictures, targets))
            row = f"rows.{index}"
            expected[f"{row}.input_ids"] = torch.tensor(input_ids)
            expected[f"{row}.image_index"] = torch.tensor(image_index)
            expected[f"{row}.pixel_values"] = pictures
            for form, values in targets.items():
                expected[f"{row}.targets.{form}"] = torch.tensor(values)
        for form in ("masked", "ignored", "z"):
            model.zero_grad()
            n_targets = sum(target != IGNORE for *_, targets in rows for target in targets[form])
            total = 0.0
            for index, (input_ids, image_index, pictures, targets) in enumerate(rows):
                logits = row_logits(model, input_ids, image_index, pictures)
                loss = loss_sum(logits, targets[form], Z_LOSS if form == "z" else 0.0)
                (loss / n_targets).backward()
                total += loss.item()
                expected[f"rows.{index}.loss_sum.{form}"] = loss.detach()[None]
                expected[f"rows.{index}.logits"] = logits.detach()
            if form == "masked":
                assert abs(total / n_targets - PUBLISHED_LOSS[name]) < 2e-6, total / n_targets
                check_padded(model, name, pixels)
            expected[f"{form}.loss"] = torch.tensor([total / n_targets])
            expected[f"{form}.n_targets"] = torch.tensor([n_targets])
            for key, parameter in model.named_parameters():
                if parameter.grad is None:
                    assert "post_layernorm" in key, key
                else:
                    expected[f"{form}.grad.{key}"] = parameter.grad.clone()
        write_tensors(DIRECTORY / f"gradients-{name}.safetensors", expected)


def check_padded(model, name: str, pixels: torch.Tensor) -> None:
    """The reference's own form, a padded batch with the mask of the target tokens, has the same loss and gradients.

    Padded on the right: on the left it would also count the prediction of `<s>` from the last padding position.
    """
    alone = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    length = len(GOLDEN_ROWS[0][0])
    ids, attention, images = (torch.zeros(2, length, *rest, dtype=torch.long) for rest in ((), (), (2,)))
    for row, (input_ids, image_index, _) in enumerate(GOLDEN_ROWS):
        ids[row, : len(input_ids)] = torch.tensor(input_ids)
        attention[row, : len(input_ids)] = 1
        for token, image in enumerate(image_index):
            if image >= 0:
                images[row, token, image] = 1
    pixels = pixels.clone()
    pixels[1, 1] = 0
    model.zero_grad()
    logits = model(
        input_ids=ids, attention_mask=attention, pixel_values=pixels, image_attention_mask=images, use_cache=False
    ).logits
    kept = attention[:, 1:] != 0
    loss = cross_entropy(logits[:, :-1][kept], ids[:, 1:][kept])
    assert abs(loss.item() - PUBLISHED_LOSS[name]) < 2e-6, loss.item()
    loss.backward()
    for key, value in model.named_parameters():
        if value.grad is not None:
            scale = alone[key].abs().max().item()
            assert (value.grad - alone[key]).abs().max().item() <= 1e-5 * scale + 1e-8, key


def sequences(tiny: Tiny) -> list[dict]:
    """Six sequences with none, one and two pictures; answers alone count in every other one."""
    fake, image, end = (tiny.model.config.vocab_size + index for index in range(3))
    generator = rng("training/sequences")

    def text(length: int) -> list[int]:
        return [int(id) for id in generator.integers(3, tiny.model.config.vocab_size, length)]

    result = []
    for index, n_images in enumerate((1, 2, 0, 1, 2, 1)):
        ids, seen = [1, *text(4)], [-1] * 5
        for picture in range(n_images):
            part = [fake, image, fake, *text(5)]
            ids += part
            # The first of the pair stands before its picture and still sees the one before it, if any.
            seen += [picture - 1, *[picture] * (len(part) - 1)]
        answer = [*text(6), end]
        ids, seen = [*ids, *answer], [*seen, *[n_images - 1] * len(answer)]
        targets = shifted(ids)
        first_answer = len(ids) - len(answer) - 1
        targets = [
            IGNORE if target in (fake, image) or (index % 2 == 1 and position < first_answer) else target
            for position, target in enumerate(targets)
        ]
        names = [f"pixel_values.train.{index}.{picture}" for picture in range(n_images)]
        result.append({"input_ids": ids, "image_index": seen, "targets": targets, "pictures": names})
    return result


def batches(count: int) -> list[list[int]]:
    return [[(2 * step) % count, (2 * step + 1) % count] for step in range(STEPS)]


def trained(model, how: str):
    """The model with the parameters of a run made trainable."""
    model.requires_grad_(True)
    if how == "backbones":
        frozen = ("model.vision_model.", "model.layers.", "model.norm.", "model.embed_tokens.weight")
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(not key.startswith(frozen))
    if how == "lora":
        model = with_adapter(model, "training/lora", **LORA)
    return model


def run_steps(model, how: str, data: list[dict], side: int) -> dict:
    parameters = {key: value for key, value in model.named_parameters() if value.requires_grad}
    decayed = [value for key, value in parameters.items() if not any(part in key for part in NO_DECAY)]
    spared = [value for key, value in parameters.items() if any(part in key for part in NO_DECAY)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}],
        lr=RUNS[how], betas=(0.9, 0.999), eps=1e-8,
    )
    losses, norms = [], []
    for batch in batches(len(data)):
        optimizer.zero_grad()
        n_targets = sum(target != IGNORE for index in batch for target in data[index]["targets"])
        total = 0.0
        for index in batch:
            sequence = data[index]
            pictures = [uniform(name, (3, side, side), 0.0, 1.0) for name in sequence["pictures"]]
            pictures = torch.stack(pictures) if pictures else torch.zeros(0, 3, side, side)
            logits = row_logits(model, sequence["input_ids"], sequence["image_index"], pictures)
            loss = loss_sum(logits, sequence["targets"]) / n_targets
            loss.backward()
            total += loss.item()
        losses.append(shortest(total))
        norms.append(shortest(torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)))
        optimizer.step()
    final = {
        key: shortest(value.detach().norm()) for key, value in sorted(parameters.items()) if value.grad is not None
    }
    return {"learning_rate": RUNS[how], "losses": losses, "grad_norms": norms, "final_norms": final}


def write_steps(tiny: Tiny) -> None:
    data = sequences(tiny)
    side = tiny.model.config.vision_config.image_size
    runs = {}
    for how in RUNS:
        model = trained(copy.deepcopy(tiny.model), how)
        if how == "lora":
            save_adapter(model, DIRECTORY / "lora-start")
        runs[how] = run_steps(model, how, data, side)
        if how == "lora":
            save_adapter(model, DIRECTORY / "lora-end")
    write_json(DIRECTORY / "steps.json", {
        "checkpoint": "tiny",
        "optimizer": {"betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1, "clip": CLIP, "no_decay": NO_DECAY},
        "sequences": data,
        "batches": batches(len(data)),
        "runs": runs,
    })


def write_training(tiny: Tiny) -> None:
    write_gradients()
    write_steps(tiny)
