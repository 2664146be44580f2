"""Writes everything in fixtures/ from the pinned reference, and its manifest.

    python reference/make_fixtures.py

The result is the same, byte for byte, on every run with the versions of requirements.txt on the same kind of CPU; on
another kind the last digits of the floating-point values may differ. `--check` writes nothing new: it fails if a run
would change a file.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

# Before torch is imported: one thread sums in one order.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import bitsandbytes  # noqa: E402
import numpy  # noqa: E402
import peft  # noqa: E402
import PIL  # noqa: E402
import sentencepiece  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from idefics_fixtures import (  # noqa: E402
    activations,
    adapters,
    answers,
    common,
    generation,
    golden,
    llama_vectors,
    pictures,
    prompts,
    quantized,
    stub,
    tiny,
    training,
    unimodal,
    warpers,
)

# The first folder or file of a path that matches names the writer.
WRITERS = {
    "adapters/": "adapters.py",
    "init/": "unimodal.py",
    "training/": "training.py",
    "golden_keys.json": "golden.py",
    "llama_tokenizer.json": "llama_vectors.py",
    "processor/": "pictures.py",
    "prompts.json": "prompts.py",
    "quantize.json": "quantized.py",
    "tiny-nf4": "quantized.py",
    "warpers.json": "warpers.py",
    "generation/": "stub.py",
    "answers.json": "answers.py",
    "generation.json": "generation.py",
    "expected.safetensors": "activations.py",
    "tokenizer": "tokenizer.py",
    "": "tiny.py",
}


# What the recipe of the default model writes: `idefics-tiny-recipe eval --write`.
NOT_OURS = "naming/"


def write_all() -> None:
    golden.write_golden_keys()
    llama_vectors.write_llama_vectors()
    pictures.write_pictures()
    warpers.write_warpers()
    stub.write_stub_generation()
    tinies = [tiny.write_tiny(), tiny.write_tiny_base()]
    for checkpoint in tinies:
        activations.write_activations(checkpoint)
        generation.write_generation(checkpoint)
        answers.write_answers(checkpoint)
    prompts.write_prompts(tinies)
    quantized.write_quantize()
    quantized.write_tiny_nf4()
    adapters.write_adapters(tinies[0])
    training.write_training(tinies[0])
    unimodal.write_unimodal()
    write_manifest()


def write_manifest() -> None:
    files = {}
    for path in sorted(common.FIXTURES.rglob("*")):
        name = path.relative_to(common.FIXTURES).as_posix()
        if path.is_file() and name != "manifest.json" and not name.startswith(NOT_OURS):
            path.chmod(0o644)
            writer = next(writer for part, writer in WRITERS.items() if part in name)
            digest = common.sha256(path.read_bytes())
            files[name] = {"sha256": digest, "generator": f"reference/idefics_fixtures/{writer}"}
    modules = (torch, transformers, tokenizers, sentencepiece, numpy, PIL, bitsandbytes, peft)
    versions = {module.__name__: module.__version__.split("+")[0] for module in modules}
    common.write_json(common.FIXTURES / "manifest.json", {
        "command": "python reference/make_fixtures.py",
        "versions": {"python": platform.python_version(), **versions},
        "seed": common.SEED,
        "third_party": {
            "llama_tokenizer.json": "strings and ids of llama.cpp's tokenizer tests, MIT, Copyright (c) 2023-2026 "
            "The ggml authors",
        },
        "files": files,
    })


def digests() -> dict[str, str]:
    return {
        path.relative_to(common.FIXTURES).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(common.FIXTURES.rglob("*"))
        if path.is_file()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a run would change fixtures/")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    if not arguments.check:
        # Files that no writer writes any more must not stay behind.
        for path in common.FIXTURES.glob("*"):
            if path.is_file():
                path.unlink()
            elif not f"{path.name}/".startswith(NOT_OURS):
                shutil.rmtree(path)
        write_all()
        return

    before = digests()
    with tempfile.TemporaryDirectory() as kept:
        shutil.copytree(common.FIXTURES, kept, dirs_exist_ok=True)
        try:
            write_all()
            after = digests()
        finally:
            shutil.rmtree(common.FIXTURES)
            shutil.copytree(kept, common.FIXTURES)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    print(json.dumps({"files": len(after), "changed": changed}))
    if changed:
        sys.exit(1)


if __name__ == "__main__":
    main()
