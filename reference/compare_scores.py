"""Compares `idefics score` with transformers on a fresh random checkpoint.

    python reference/compare_scores.py --binary target/release/idefics [--seed N]

For each of two shapes (instruct with resampler, base without) it writes a random checkpoint in f32 and one in bf16,
random pictures and prompts, and lets both programs compute the log-probability of every token. It fails unless

- at f32 the largest absolute difference is below 1e-4, and
- at bf16 our mean distance from the reference at f32 is not larger than the reference's own at bf16
  (the weights are those of the bf16 checkpoint in all three).
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import IdeficsForVisionText2Text, IdeficsProcessor  # noqa: E402
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil  # noqa: E402

from idefics_fixtures.common import rng  # noqa: E402
from idefics_fixtures.pictures import scene  # noqa: E402
from idefics_fixtures.tiny import (  # noqa: E402
    VOCAB_SIZE,
    random_model,
    tiny_base_config,
    tiny_config,
    write_checkpoint,
)
from idefics_fixtures.tokenizer import (  # noqa: E402
    BASE_TOKENS,
    INSTRUCT_TOKENS,
    TEXT,
    load_tokenizer,
    train_sentencepiece,
)

F32_LIMIT = 1e-4
SHAPES = {"instruct": (tiny_config, INSTRUCT_TOKENS), "base": (tiny_base_config, BASE_TOKENS)}


def write_pictures(directory: Path, generator: np.random.Generator, count: int) -> list[Path]:
    paths = []
    for index in range(count):
        width, height = (int(side) for side in generator.integers(5, 90, 2))
        pixels = scene(width, height, f"compare/{generator.integers(1 << 30)}")
        mode, channels = [("RGB", 3), ("RGBA", 4)][index % 2]
        paths.append(directory / f"picture{index}.png")
        Image.fromarray(pixels[..., :channels].copy(), mode).save(paths[-1])
    return paths


def random_lines(generator: np.random.Generator, pictures: list[Path], count: int, vocab: int) -> list[dict]:
    """Lines of `idefics score`: with images and without, with a continuation as text or ids, and prompts alone."""
    texts = TEXT.read_text(encoding="utf-8").splitlines()

    def text() -> str:
        words = texts[generator.integers(len(texts))].split(" ")
        start = int(generator.integers(max(1, len(words) - 2)))
        return " ".join(words[start : start + int(generator.integers(2, 14))])

    lines = []
    for index in range(count):
        prompt = [{"text": text()}]
        for _ in range(int(generator.integers(0, 4))):
            # Pictures and texts in any order, runs of either included.
            if generator.random() < 0.6:
                prompt.append({"image": str(pictures[generator.integers(len(pictures))])})
            if generator.random() < 0.7:
                prompt.append({"text": text()})
        if generator.random() < 0.3:
            prompt = prompt[1:] or prompt
        line = {"prompt": prompt}
        if index % 3 == 1:
            line["continuation"] = text()
        elif index % 3 == 2:
            line["token_ids"] = generator.integers(3, vocab, int(generator.integers(2, 12))).tolist()
        lines.append(line)
    return lines


class Reference:
    """transformers on one checkpoint, at one dtype."""

    def __init__(self, directory: Path, added_tokens: list[str], sentencepiece: bytes, dtype: torch.dtype):
        self.model = IdeficsForVisionText2Text.from_pretrained(directory, dtype=dtype).eval()
        self.dtype = dtype
        side = self.model.config.vision_config.image_size
        self.tokenizer = remembering(load_tokenizer(sentencepiece, added_tokens))
        self.processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=side), self.tokenizer)

    @torch.no_grad()
    def score(self, line: dict) -> tuple[list[int], np.ndarray]:
        """The tokens that count, those of the continuation or of the whole prompt, and their log-probabilities; a
        prompt's first token has none."""
        prompt = [segment.get("text") or Image.open(segment["image"]) for segment in line["prompt"]]
        inputs = self.processor(text=[prompt], add_end_of_utterance_token=False, return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        continuation = line.get("token_ids", [])
        if "continuation" in line:
            # Prompt and continuation are one text: a token over the seam belongs to the continuation.
            joined = self.tokenizer.encode(self.tokenizer.seen[0] + line["continuation"], add_special_tokens=False)
            shared = next((n for n, (a, b) in enumerate(zip(ids, joined)) if a != b), min(len(ids), len(joined)))
            ids, continuation = ids[:shared], joined[shared:]
        whole = ids + continuation
        extra = len(continuation)
        # Every later token looks at the image of the last prompt token; `<image>` ids get no image of their own.
        mask = inputs["image_attention_mask"].long()[:, : len(ids)]
        mask = torch.cat([mask, mask[:, -1:].expand(-1, extra, -1)], dim=1)
        logits = self.model(
            input_ids=torch.tensor([whole]),
            attention_mask=torch.ones(1, len(whole), dtype=torch.long),
            pixel_values=inputs["pixel_values"].to(self.dtype),
            image_attention_mask=mask,
            use_cache=False,
        ).logits[0]
        logprobs = logits.float().log_softmax(-1)
        first = len(ids) if extra else 1
        positions = torch.arange(first, len(whole))
        return continuation or ids, logprobs[positions - 1, torch.tensor(whole)[positions]].numpy()


def remembering(tokenizer):
    """The tokenizer, with the strings it was last called with in `seen`."""

    class Remembering(type(tokenizer)):
        def __call__(self, texts, **kwargs):
            self.seen = list(texts)
            return super().__call__(texts, **kwargs)

    tokenizer.__class__ = Remembering
    return tokenizer


def ours(binary: Path, model: Path, prompts: Path, dtype: str) -> list[dict]:
    command = [binary, "score", "--model", model, "--prompts", prompts, "--dtype", dtype, "--add-end-of-utterance", "never"]
    run = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE)
    if run.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {run.returncode}")
    return [json.loads(line) for line in run.stdout.decode().splitlines()]


def compare(lines: list[dict], results: list[dict], reference: Reference) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Log-probabilities of each line, ours and the reference's, for the tokens that we say we scored."""
    assert len(results) == len(lines), f"{len(lines)} lines in, {len(results)} out"
    got, expected = [], []
    for number, (line, result) in enumerate(zip(lines, results), 1):
        ids, logprobs = reference.score(line)
        if result["token_ids"] != ids:
            sys.exit(f"line {number}: token ids {result['token_ids']}, the reference has {ids}")
        if len(result["logprobs"]) != len(logprobs):
            sys.exit(f"line {number}: {len(result['logprobs'])} log-probabilities, the reference has {len(logprobs)}")
        total = float(np.sum(result["logprobs"]))
        if abs(total - result["sum_logprob"]) > 1e-3 or not np.isclose(
            np.exp(-total / len(logprobs)), result["perplexity"], rtol=1e-3
        ):
            sys.exit(f"line {number}: sum_logprob or perplexity does not follow from logprobs")
        got.append(np.array(result["logprobs"]))
        expected.append(logprobs)
    return got, expected


def check(shape: str, binary: Path, seed: int, count: int, directory: Path) -> bool:
    config, added_tokens = SHAPES[shape]
    sentencepiece = train_sentencepiece(VOCAB_SIZE)
    generator = rng(f"compare/{shape}", seed)
    pictures = write_pictures(directory, generator, 6)
    # Added tokens are left out: whether an `<image>` id in a continuation opens a new image is not defined.
    lines = random_lines(generator, pictures, count, VOCAB_SIZE)
    prompts = directory / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = {}
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        models[name] = directory / name
        roomy = config()
        roomy.max_position_embeddings = 512  # the longest random line must fit
        model = random_model(roomy, f"compare/{shape}", seed)
        write_checkpoint(models[name], model, sentencepiece, added_tokens, dtype=dtype)

    exact = Reference(models["f32"], added_tokens, sentencepiece, torch.float32)
    got, expected = compare(lines, ours(binary, models["f32"], prompts, "f32"), exact)
    differences = [float(np.abs(a - b).max()) for a, b in zip(got, expected)]
    worst = int(np.argmax(differences))
    good = differences[worst] < F32_LIMIT
    tokens = sum(len(row) for row in got)
    print(f"{shape} f32: {tokens} tokens, largest difference {differences[worst]:.3g} (line {worst + 1}), "
          f"limit {F32_LIMIT:g}: {'ok' if good else 'FAILED'}")

    exact = Reference(models["bf16"], added_tokens, sentencepiece, torch.float32)
    rounded = Reference(models["bf16"], added_tokens, sentencepiece, torch.bfloat16)
    results = ours(binary, models["bf16"], prompts, "bf16")
    got, expected = compare(lines, results, exact)
    _, theirs = compare(lines, results, rounded)
    our_distance = float(np.abs(np.concatenate(got) - np.concatenate(expected)).mean())
    their_distance = float(np.abs(np.concatenate(theirs) - np.concatenate(expected)).mean())
    close = our_distance <= their_distance
    print(f"{shape} bf16: mean distance from f32 {our_distance:.4g}, the reference's own {their_distance:.4g}: "
          f"{'ok' if close else 'FAILED'}")
    return good and close


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=Path, required=True)
    parser.add_argument("--seed", type=int, help="default: a new one each time")
    parser.add_argument("--lines", type=int, default=60, help="prompts per shape")
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--keep", type=Path, help="write the checkpoints and prompts here and keep them")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)
        for shape in SHAPES if arguments.shape == "all" else [arguments.shape]:
            directory = root / shape
            directory.mkdir(parents=True, exist_ok=True)
            good &= check(shape, arguments.binary.resolve(), seed, arguments.lines, directory)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
